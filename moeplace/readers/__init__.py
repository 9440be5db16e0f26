"""Trace readers: the folder is the registry, one module per input format.

A reader module has ``NAME``, ``DESCRIPTION``, ``sniff(head, name) -> int`` and
``open(source, options) -> TraceStream | Counts``. A format is chosen by content, not by file name: every reader scores
the first bytes of the decompressed input (for a zip archive, followed by its member names), the highest wins. A reader
that takes folders also has ``sniff_folder(folder: Path) -> int`` and ``open_folder(folder: Path, options)``.
"""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import cast

from moeplace.errors import Location, TraceError, unknown_name
from moeplace.files import InputFile, open_input
from moeplace.readers._bundle import first_document, first_of_archive, is_tar
from moeplace.readers._common import ModelLike, ReaderOptions
from moeplace.trace import Counts, Trace, TraceStream, concatenate

__all__ = ["ModelLike", "ReaderOptions", "format_names", "list_formats", "open_trace", "read_trace"]

_KNOWN_HEADS = {
    b"PAR1": "a Parquet file",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x02": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"<": "XML or HTML",
}


def format_names() -> tuple[str, ...]:
    """Names of the input formats, without importing their readers."""
    return tuple(sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def list_formats() -> dict[str, str]:
    """Input formats and what they are, by name."""
    return {name: _reader(name).DESCRIPTION for name in format_names()}


def open_trace(
    path: str | os.PathLike[str], *, model: ModelLike | None = None, format: str | None = None, skip_bad: int | None = 0
) -> TraceStream | Counts:
    """Open a trace as a stream of blocks, or counts as a whole.

    Parameters
    ----------
    path
        A file, a pipe, or ``-`` for standard input; plain, gzip or zstd. Some formats also come as folders.
    model
        The model that was recorded: gives what the file leaves out, and must agree with what it says.
    format
        A name from :func:`format_names`; None looks at the content.
    skip_bad
        How many bad rows, or files of a folder of requests, may be left out of a trace; one more is an error. None: no
        row, and any file of a folder or archive of many.

    Raises
    ------
    InputError
        The input cannot be opened or decompressed.
    TraceError
        The input is empty, of no known format, or breaks its format.
    """
    options = ReaderOptions(model=model, skip_bad=skip_bad or 0, bad_files=math.inf if skip_bad is None else skip_bad)
    names = format_names()
    if format is not None and format not in names:
        raise unknown_name("format", format, names)
    if os.path.isdir(path):
        folder = Path(path)
        reader = _reader(_sniffed_folder(folder, names if format is None else (format,)))
        return cast("TraceStream | Counts", reader.open_folder(folder, options))
    source = open_input(path)
    head = source.head()
    if not head:
        hint = "was the recording stopped before the first token?"
        raise TraceError("is empty", rule="a trace has at least one token", hint=hint, where=Location(file=source.name))
    chosen = format or _sniffed(source, head, names)
    return cast("TraceStream | Counts", _reader(chosen).open(source, options))


def read_trace(
    path: str | os.PathLike[str], *, model: ModelLike | None = None, format: str | None = None, skip_bad: int | None = 0
) -> Trace | Counts:
    """Read a trace or counts into memory; the parameters and errors are those of :func:`open_trace`."""
    opened = open_trace(path, model=model, format=format, skip_bad=skip_bad)
    if isinstance(opened, Counts):
        return opened
    blocks = list(opened.blocks())
    return concatenate(blocks, opened.meta)


def _reader(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def _sniffed(source: InputFile, head: bytes, names: tuple[str, ...]) -> str:
    members: list[str] = []
    if head.startswith(b"PK"):
        # the names stand at the end of a zip archive, and tell one npz from another
        members = _member_names(source)
        head = b"\n".join([head, *(member.encode() for member in members)])
    if is_tar(head) and source.can_reopen and not first_document(head):
        head = first_of_archive(source) or head  # it stands behind the first bytes
    scores = {name: int(_reader(name).sniff(head, source.name)) for name in names}
    best = max(names, key=lambda name: scores[name])
    if scores[best] > 0:
        return best
    raise TraceError(
        f"is of no known format: it looks like {_looks_like(head, members)}",
        rule="a trace is in one of the known formats",
        hint=f"known formats: {', '.join(names)}",
        where=Location(file=source.name),
    )


def _sniffed_folder(folder: Path, names: tuple[str, ...]) -> str:
    readers = {name: _reader(name) for name in names}
    able = {name: reader for name, reader in readers.items() if hasattr(reader, "open_folder")}
    if len(names) == 1 and able:
        return names[0]
    scores = {name: int(reader.sniff_folder(folder)) for name, reader in able.items()}
    best = max(scores, key=lambda name: scores[name], default=None)
    if best is not None and scores[best] > 0:
        return best
    held = sorted(os.listdir(folder))
    raise TraceError(
        f"is a folder of no known format: it holds {', '.join(held[:5]) or 'nothing'}",
        rule="a trace is a file, or a folder of a format that comes as folders",
        hint=f"formats that come as folders: {', '.join(sorted(able)) or 'not ' + ', '.join(names)}",
        where=Location(file=str(folder)),
    )


def _member_names(source: InputFile) -> list[str]:
    try:
        with source.seekable() as handle, zipfile.ZipFile(handle) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        return []


def _looks_like(head: bytes, members: list[str]) -> str:
    if any(member.endswith("data.pkl") for member in members):
        return "a PyTorch file"
    if members:
        return f"a zip archive of {', '.join(members[:5])}"
    for mark, kind in _KNOWN_HEADS.items():
        if head.startswith(mark):
            return kind
    if head.lstrip().startswith((b"{", b"[")):
        keys = dict.fromkeys(re.findall(r'"([^"\n]{1,40})"\s*:', head.decode(errors="replace")))
        return f"JSON with the keys {', '.join(list(keys)[:6])}" if keys else "JSON"
    line = head.split(b"\n", 1)[0][:60]
    shown = line.decode(errors="replace").strip()
    return f"text that begins {shown!r}" if shown.isprintable() else f"binary data that begins {head[:8].hex(' ')}"
