"""Lines of a CSV file, one at a time or many at once, and the records they make."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from moeplace.errors import InputError, Location, TraceError
from moeplace.files import HEAD_BYTES

_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One CSV row: the line it starts in, its text (several lines when a quoted cell has line ends) and its cells."""

    line: int
    text: str
    cells: list[str]


class Lines:
    """The lines of a stream, which may be looked at many at once before they are passed or taken one by one.

    Attributes
    ----------
    file
        Name for errors.
    number
        How many lines have been passed or taken.
    """

    def __init__(self, stream: BinaryIO, file: str) -> None:
        self.file, self.number = file, 0
        self._stream = stream
        # whole lines, how far they are used, and the line that is not whole yet
        self._data, self._at, self._rest = b"", 0, b""
        self._started = self._ended = False
        self._failure: InputError | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Take a line.

        Raises
        ------
        TraceError
            It is not UTF-8, or the compressed data before its end is damaged.
        """
        if self._at == len(self._data):
            self._load(1)
            if not self._data:
                raise StopIteration
        end = self._data.find(b"\n", self._at) + 1 or len(self._data)
        line = self._data[self._at : end]
        self._at, self.number = end, self.number + 1
        return _decoded(line, self.file, self.number)

    def ahead(self, num_bytes: int) -> tuple[bytes, bool]:
        """Return the next whole lines, about ``num_bytes`` and at least one, and whether the input ends with them.

        Raises
        ------
        TraceError
            Compressed data is damaged before the end of the next line.
        """
        if len(self._data) - self._at < num_bytes:
            self._load(num_bytes)
        end = self._data.find(b"\n", self._at + num_bytes - 1) + 1 or len(self._data)
        return self._data[self._at : end], self._ended and end == len(self._data)

    def skip(self, num_bytes: int) -> None:
        """Pass whole lines of ``num_bytes``."""
        end = self._at + num_bytes
        self.number += count_lines(self._data[self._at : end])
        self._at = end

    def put_back(self, record: Record) -> None:
        """Undo the taking of the last record."""
        self._data, self._at = record.text.encode() + self._data[self._at :], 0
        self.number = record.line - 1

    def _load(self, num_bytes: int) -> None:
        """Read on until there are whole lines of ``num_bytes``; damaged data is told once those before it are used."""
        parts = [self._data[self._at :], self._rest]
        size, whole = sum(map(len, parts)), bool(parts[0])
        while not (self._ended or self._failure or (whole and size >= num_bytes)):
            try:
                chunk = self._stream.read(HEAD_BYTES)
            except InputError as exc:
                self._failure = exc
                break
            self._ended = not chunk
            parts.append(chunk)
            size, whole = size + len(chunk), whole or b"\n" in chunk
        data = b"".join(parts)
        end = len(data) if self._ended else data.rfind(b"\n") + 1
        self._data, self._at, self._rest = data[:end], 0, data[end:]
        if not self._started:
            self._data, self._started = self._data.removeprefix(_BOM), True
        if self._failure is not None and not self._data:
            error, where = self._failure, Location(file=self.file, line=self.number + 1)
            raise TraceError(error.what, rule=error.rule, hint=error.hint, where=where) from error


def count_lines(data: bytes) -> int:
    """Count lines, the last of which may have no line end."""
    line_ends = int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))
    return line_ends + (not data.endswith(b"\n") and data != b"")


def pass_header(lines: Lines, delimiter: str, header: bool) -> None:
    """Pass blank lines and comments (``#``) at the start, and the header if there is one."""
    for text in lines:
        if not text.startswith("#") and text.strip():
            lines.put_back(Record(lines.number, text, []))
            break
    if header:
        next(read_records(lines, delimiter), None)


def read_records(lines: Lines, delimiter: str) -> Iterator[Record]:
    """Take records from ``lines``, no line more than they need; blank lines are left out.

    Raises
    ------
    TraceError
        A line is not UTF-8, a quoted cell never ends, or compressed data is damaged.
    """
    pending: list[str] = []

    def taken() -> Iterator[str]:
        for text in lines:
            pending.append(text)
            yield text

    reader = csv.reader(taken(), delimiter=delimiter, strict=True)
    while True:
        pending.clear()
        try:
            cells = next(reader, None)
        except csv.Error as exc:
            where = Location(file=lines.file, line=lines.number - len(pending) + 1)
            rule, hint = "cells with line ends or quotes are quoted", "was the recording cut off?"
            raise TraceError(f"not CSV: {exc}", rule=rule, hint=hint, where=where) from exc
        if cells is None:
            return
        if cells:
            yield Record(lines.number - len(pending) + 1, "".join(pending), cells)


def _decoded(line: bytes, file: str, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as exc:
        where = Location(file=file, line=number, column=len(line[: exc.start].decode()) + 1)
        what = f"byte 0x{line[exc.start]:02x} is not UTF-8"
        raise TraceError(what, rule="CSV is UTF-8", hint="write the trace as UTF-8", where=where) from exc
