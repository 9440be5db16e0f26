"""NumPy members of an archive, and the rules of the columns in it, shared by the npz and count readers."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.readers._common import Labels
from moeplace.trace import IntArray

# what damaged archives make zipfile, zlib and numpy raise
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, OSError, struct.error, MemoryError)


class Archive:
    """The arrays of an npz file by key, read one at a time.

    Raises
    ------
    TraceError
        The zip is cut off or damaged; an array holds Python objects.
    """

    def __init__(self, handle: BinaryIO, file: str) -> None:
        self.file, self.handle = file, handle
        try:
            self.zip = zipfile.ZipFile(handle)
        except DAMAGE as exc:
            raise TraceError(
                f"is not a whole npz archive: {exc}",
                rule="an npz file is a zip of .npy arrays",
                hint="the copy was cut off or damaged: copy it again",
                where=Location(file=file),
            ) from exc
        self.keys = [name.removesuffix(".npy") for name in self.zip.namelist()]

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def where(self, element: str) -> Location:
        """Location of an element of the archive."""
        return Location(file=self.file, element=element)

    def open(self, key: str) -> IO[bytes]:
        """Open the member that holds an array."""
        name = key if key in self.zip.namelist() else f"{key}.npy"
        try:
            return self.zip.open(name)
        except (*DAMAGE, RuntimeError) as exc:
            raise self.damaged(key, exc) from exc

    def read(self, key: str) -> npt.NDArray[Any]:
        """Read a whole array."""
        with self.open(key) as member:
            try:
                return np.lib.format.read_array(member, allow_pickle=False)
            except DAMAGE as exc:
                raise self.damaged(key, exc) from exc

    def damaged(self, element: str, exc: Exception) -> TraceError:
        """Error for an array that cannot be read."""
        if "allow_pickle" in str(exc) or "Object arrays" in str(exc):
            hint = "save it as an array of integers or strings"
            rule = "arrays of Python objects are not loaded: they can run code"
            return TraceError("holds Python objects", rule=rule, hint=hint, where=self.where(element))
        hint = "the copy was cut off or damaged: copy it again"
        return TraceError(f"cannot be read: {exc}", hint=hint, where=self.where(element))


class ColumnReader:
    """Checks named values of an archive or a JSON object and turns them into plain numbers, names and columns."""

    def __init__(self, file: str, values: Mapping[str, npt.NDArray[Any]]) -> None:
        self.file, self.values = file, values

    def where(self, element: str) -> Location:
        """Location of an element."""
        return Location(file=self.file, element=element)

    def integer(self, key: str) -> int | None:
        """A single integer of at least 1; None when the key is absent."""
        if key not in self.values:
            return None
        value = self.values[key]
        if value.size != 1 or value.dtype.kind not in "iu" or int(value.reshape(-1)[0]) < 1:
            raise TraceError(f"{_shown(value)}", rule=f"{key} is one positive integer", where=self.where(key))
        return int(value.reshape(-1)[0])

    def string(self, key: str) -> str | None:
        """A single string; None when the key is absent."""
        if key not in self.values:
            return None
        value = self.values[key]
        if value.size != 1 or value.dtype.kind != "U":
            raise TraceError(f"{_shown(value)}", rule=f"{key} is one string", where=self.where(key))
        return str(value.reshape(-1)[0])

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty when the key is absent."""
        if key not in self.values or not self.values[key].size:
            return ()
        value = self.values[key]
        if value.ndim != 1 or value.dtype.kind != "U":
            raise TraceError(f"{_shown(value)}", rule=f"{key} is a list of strings", where=self.where(key))
        return tuple(map(str, value))

    def layer_ids(self) -> tuple[int, ...] | None:
        """The layer ids; None when they are absent."""
        if "layer_ids" not in self.values:
            return None
        value = self.values["layer_ids"]
        if (
            value.ndim != 1
            or value.dtype.kind not in "iu"
            or not value.size
            or (np.diff(value.astype(np.int64)) <= 0).any()
        ):
            rule = "layer_ids is a list of increasing integers"
            raise TraceError(f"{_shown(value)}", rule=rule, where=self.where("layer_ids"))
        return tuple(map(int, value))

    def integers(self, key: str, length: int, unit: str) -> IntArray | None:
        """An integer column; None when the key is absent."""
        if key not in self.values:
            return None
        column = self._column(key, length, unit)
        if column.dtype.kind == "f" and np.isnan(column).any():
            at = int(np.isnan(column).argmax())
            raise TraceError("NaN", rule=f"{key} holds integers", where=self.where(f"{key}[{at}]"))
        if column.dtype.kind not in "iu":
            hint = f"save {key}.astype(numpy.int64)"
            raise TraceError(f"{key} is {column.dtype}", rule="integers", hint=hint, where=self.where(key))
        if column.dtype == np.uint64 and (column > np.iinfo(np.int64).max).any():
            raise TraceError(f"{int(column.max())}", rule=f"{key} fits 64-bit integers", where=self.where(key))
        return column.astype(np.int64, copy=False)

    def labels(
        self, key: str, names: tuple[str, ...], length: int, unit: str
    ) -> tuple[IntArray | None, tuple[str, ...]]:
        """A column of integers, or of strings numbered by first appearance after ``names``, and all names."""
        if key not in self.values:
            return None, names
        column = self._column(key, length, unit)
        if column.dtype.kind == "U":
            table = Labels(names)
            return table.numbers(column.tolist()), table.names
        numbers = self.integers(key, length, unit)
        if names and numbers is not None and ((numbers < 0) | (numbers >= len(names))).any():
            at = int(((numbers < 0) | (numbers >= len(names))).argmax())
            rule = f"it indexes {len(names)} names"
            raise TraceError(f"{key} {numbers[at]}", rule=rule, where=self.where(f"{key}[{at}]"))
        return numbers, names

    def _column(self, key: str, length: int, unit: str) -> npt.NDArray[Any]:
        column = self.values[key]
        if column.shape != (length,):
            what, rule = f"shape {list(column.shape)}", f"{key} has one value per {unit}: {length}"
            raise TraceError(what, rule=rule, where=self.where(key))
        return column


def small_arrays(archive: Archive, keys: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Read those of ``keys`` that the archive has."""
    return {key: archive.read(key) for key in keys if key in archive}


def _shown(value: npt.NDArray[Any]) -> str:
    text = np.array2string(value, threshold=8, separator=", ").replace("\n", "")
    return f"{text} ({value.dtype})"
