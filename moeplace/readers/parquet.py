"""Parquet traces with one file per layer, as FLAME-MoE publishes them.

``actives/iter_N/layer_NN.parquet`` holds a row per token with ``indices``, a list of its k experts (``scores`` are
ignored). Row t of every layer's file is the same token. The files do not say where a sequence begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile, InputFolder
from moeplace.readers._columns import ColumnStream
from moeplace.readers._common import NO_PHASE, NO_POSITION, NO_REQUEST, BadRows, Columns, ReaderOptions, frozen_columns
from moeplace.readers._extras import need
from moeplace.readers._meta import Declared, Shape
from moeplace.trace import DECODE

NAME = "parquet"
DESCRIPTION = "Parquet with a list of expert ids per token: one layer's file, or a folder of layer_NN.parquet"

_COLUMNS = ("indices", "topk_ids", "expert_ids", "topk_experts", "selected_experts", "experts")
_LAYER = re.compile(r"layer[_-]?(\d+)")
_LEAST_ROWS = 1 << 10
_LEAST_BYTES = 12  # two marks and the length of the footer


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like Parquet."""
    return 60 if head.startswith(b"PAR1") and len(head) >= _LEAST_BYTES else 0


def sniff_folder(folder: Path) -> int:
    """Score how much a folder looks like one Parquet file per layer."""
    return 80 if _layer_files(InputFolder(folder)) else 0


def open(source: InputFile, options: ReaderOptions) -> ParquetStream:
    """Open a layer's file as a stream.

    Raises
    ------
    MissingExtraError
        The package pyarrow is not installed.
    TraceError
        A file is damaged or has no column of expert ids; layers differ in their number of tokens.
    """
    return ParquetStream(source, options)


def open_folder(folder: Path, options: ReaderOptions) -> ParquetStream:
    """Open the files of several layers as a stream; the errors are those of :func:`open`."""
    return ParquetStream(InputFolder(folder), options)


class _LayerFile:
    """One layer's expert ids, read batch by batch."""

    def __init__(self, file: InputFile) -> None:
        self.name = file.name
        library = need("pyarrow.parquet", "formats", f"{file.name} is a Parquet file")
        try:
            self._handle = file.seekable()
            self._parquet = library.ParquetFile(self._handle)
        except Exception as exc:  # pyarrow has errors of its own, ValueErrors and OSErrors
            raise self.damaged(exc) from exc
        names = self._parquet.schema_arrow.names
        self.column = next((name for name in _COLUMNS if name in names), "")
        if not self.column:
            rule, hint = "expert ids stand in a column indices", f"it has the columns {', '.join(names[:12])}"
            raise TraceError("no expert ids", rule=rule, hint=hint, where=Location(file=file.name))

    def batches(self, rows: int) -> Iterator[npt.NDArray[Any]]:
        """Yield ``[token, k]`` in the order of the file."""
        start = 0
        try:
            for batch in self._parquet.iter_batches(rows, columns=[self.column]):
                yield self._ids(batch.column(0), start)
                start += len(batch)
        except TraceError:
            raise
        except Exception as exc:
            raise self.damaged(exc) from exc
        finally:
            self._handle.close()

    def _ids(self, column: Any, start: int) -> npt.NDArray[Any]:
        kind = str(column.type)
        if "list" not in kind or not re.search(r": u?int\d+", kind):
            where = Location(file=self.name, element=self.column)
            raise TraceError(f"{self.column} is {kind}", rule="a list of integer ids per token", where=where)
        if column.null_count or column.flatten().null_count:
            rows = column.to_pylist()
            at = next(i for i, row in enumerate(rows) if row is None or None in row)
            where = Location(file=self.name, element=f"{self.column}[{start + at}]")
            raise TraceError("null", rule="every token has k expert ids", where=where)
        flat = column.flatten().to_numpy(zero_copy_only=False)
        top_k = len(flat) // len(column) if len(column) else 0
        lengths = column.value_lengths().to_numpy(zero_copy_only=False) if "fixed" not in kind else None
        if lengths is not None and len(lengths) and (lengths != lengths[0]).any():
            at = int((lengths != lengths[0]).argmax())
            where = Location(file=self.name, element=f"{self.column}[{start + at}]")
            raise TraceError(f"{lengths[at]} ids", rule=f"every token has as many: {lengths[0]}", where=where)
        return np.asarray(flat.reshape(len(column), top_k))

    def damaged(self, exc: Exception) -> TraceError:
        """Error for a file that cannot be read."""
        reason = str(exc).split("\n", 1)[0] or type(exc).__name__
        hint = "the copy was cut off or damaged: copy it again"
        return TraceError(f"is not a whole Parquet file: {reason}", hint=hint, where=Location(file=self.name))


class ParquetStream(ColumnStream):
    """Tokens put together from the files of their layers, in the order of the rows."""

    repeated_hint = "every column entry is the top-k of one token: is this the column of expert ids?"

    def __init__(self, source: InputFile | InputFolder, options: ReaderOptions) -> None:
        super().__init__(source, options, Shape(source.name, Declared(), options.model))
        self._layers: dict[int, list[str]] = {}
        numbered = True
        if isinstance(source, InputFolder):
            self._layers = _layer_files(source)
            if not self._layers:
                raise TraceError("no layer_NN.parquet", rule="one file per layer", where=Location(file=source.name))
            self._one_iteration(source)
        else:
            match = _LAYER.search(PurePosixPath(source.name).name)
            numbered = match is not None
            self._layers = {int(match[1]) if match else 0: [source.name]}
        with_ids = next(self._ids(min(self._layers)), None)
        if with_ids is None:
            raise TraceError("holds no routed tokens", rule="one row per token", where=Location(file=source.name))
        self._shape.set_top_k(with_ids.shape[1])
        self._settle_layers(numbered)
        for sentence in (NO_REQUEST, NO_POSITION, NO_PHASE):
            self._shape.assume(sentence)
        self._start()

    def _one_iteration(self, folder: InputFolder) -> None:
        places = sorted({str(PurePosixPath(name).parent) for names in self._layers.values() for name in names})
        if len(places) > 1:
            raise TraceError(
                f"layer files in {len(places)} folders: {', '.join(places[:5])}",
                rule="one folder holds the layers of one checkpoint",
                hint=f"give one of them, for example {folder.name.rstrip('/')}/{places[-1]}",
                where=Location(file=folder.name),
            )

    def _settle_layers(self, numbered: bool) -> None:
        layers = sorted(self._layers)
        if numbered:
            self._shape.set_layers(len(layers), layers)
        elif self._shape.model is not None:
            self._shape.set_layers(1, self._shape.model.moe_layer_ids[:1])
            self._shape.assume("the file's name has no layer number: taken as the model's first MoE layer")
        else:
            self._shape.set_layers(1)

    def _rows(self) -> Iterator[Columns]:
        self._row_bad = BadRows(self._options.skip_bad)
        layers = sorted(self._layers)
        readers = [self._ids(layer) for layer in layers]
        parts: list[npt.NDArray[Any]] = [np.zeros((0, self._shape.top_k or 1), np.uint8) for _ in layers]
        start = 0
        while True:
            for i, reader in enumerate(readers):
                if not len(parts[i]) and (more := next(reader, None)) is not None:
                    parts[i] = more
            count = min(map(len, parts))
            if not count:
                break
            experts = np.stack([part[:count] for part in parts], axis=1)
            parts = [part[count:] for part in parts]
            position = np.arange(start, start + count, dtype=np.int64)
            yield frozen_columns(
                [
                    {
                        "experts": experts,
                        "request": np.zeros(count, np.int64),
                        "position": position,
                        "phase": np.full(count, DECODE, np.uint8),
                    }
                ]
            )
            start += count
        longer = [layer for layer, part in zip(layers, parts, strict=True) if len(part)]
        if longer:
            shorter = next(layer for layer in layers if layer not in longer)
            what = f"layer {shorter} has {start} tokens, layer {longer[0]} has more"
            rule = "row t of every layer's file is the same token"
            where = Location(file=self._shown(self._layers[shorter][-1]))
            raise TraceError(what, rule=rule, hint="copy the shorter file again", where=where)

    def _place(self, columns: Columns, token: int, layer: int) -> Location:
        files = self._layers[sorted(self._layers)[layer]]
        row = int(columns["position"][token])
        # a layer in several files counts its rows through them
        return Location(file=self._shown(files[0]), element=f"indices[{row}]")

    def _ids(self, layer: int) -> Iterator[npt.NDArray[Any]]:
        source, top_k = self._source, self._shape.top_k or 1
        rows = max(_LEAST_ROWS, self._options.block_bytes // (len(self._layers) * top_k))
        for name in self._layers[layer]:
            file = _LayerFile(source.open(name) if isinstance(source, InputFolder) else source)
            for ids in file.batches(rows):
                if len(ids):
                    yield self._expected(ids, file)

    def _expected(self, ids: npt.NDArray[Any], file: _LayerFile) -> npt.NDArray[Any]:
        top_k = self._shape.top_k
        if top_k is not None and ids.shape[1] != top_k:
            where = Location(file=file.name, element=file.column)
            raise TraceError(f"{ids.shape[1]} ids per token", rule=f"top-{top_k} in every layer", where=where)
        return ids

    def _shown(self, name: str) -> str:
        return f"{self._source.name.rstrip('/')}/{name}" if isinstance(self._source, InputFolder) else name


def _layer_files(folder: InputFolder) -> dict[int, list[str]]:
    """Files by layer, whose number stands in the file's name."""
    layers: dict[int, list[str]] = {}
    for name in folder.files:
        path = PurePosixPath(name)
        match = _LAYER.search(path.name) if path.suffix == ".parquet" else None
        if match is not None:
            layers.setdefault(int(match[1]), []).append(name)
    return layers
