"""CSV traces: a row per token and layer, or per choice; the header says which column holds what.

Read as they are: moe-beyond (``Layer ID, Batch Number, Token, Activated Expert IDs``), DynaNDE (``layer_id, token_id,
expert_0 … expert_{E-1}`` with one score per expert), ``layer, token, experts`` under any of the usual names, one row
per choice (``token, layer, rank, expert``), and llama.cpp's moe-trace: ``position, layer, id, …`` without a header, or
``layer, expert`` alone, which are only counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._blocks import KeptBlocks
from moeplace.readers._columns import ColumnStream, blocks_of, columns_bytes
from moeplace.readers._common import (
    NO_PHASE,
    NO_POSITION,
    NO_REQUEST,
    BadRows,
    Columns,
    Labels,
    ReaderOptions,
    changes,
)
from moeplace.readers._counts import checked_counts
from moeplace.readers._csv_blocks import Rows
from moeplace.readers._csv_rows import Layout, RowParser, layout_of
from moeplace.readers._csv_walk import RowWalk
from moeplace.readers._meta import Declared, Shape
from moeplace.readers._route import TokenAssembler
from moeplace.trace import DECODE, MAX_EXPERTS, Counts, IntArray, TraceStream

NAME = "csv"
DESCRIPTION = "CSV: a row per token and layer (moe-beyond, DynaNDE, llama.cpp moe-trace), or per choice"

_RULE = "a CSV trace has a header that names the layer and the experts"


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like a CSV trace."""
    if b"\0" in head[:4096]:
        return 0
    lines = _first_lines(head)
    layout = layout_of(lines)
    if layout is None:
        return 0
    # any table of integers could be one without a header: only a prompt's negative positions are telling
    return 85 if layout.header else 60 if layout.signed and lines[0].lstrip().startswith("-") else 0


def open(source: InputFile, options: ReaderOptions) -> TraceStream | Counts:
    """Open a CSV trace as a stream; rows of ``layer, expert`` alone are counts.

    Raises
    ------
    TraceError
        The header names no layer or no experts, or more rows of the first block than may be skipped are bad.
    """
    layout = layout_of(_first_lines(source.head()))
    if layout is None:
        where = Location(file=source.name, line=1, column=1)
        raise TraceError("no layer or no experts among the columns", rule=_RULE, where=where)
    if layout.only_counts:
        return _counted(source, layout, options)
    return CsvStream(source, options, layout)


class CsvStream(ColumnStream):
    """Tokens put together from the rows of their layers."""

    def __init__(self, source: InputFile, options: ReaderOptions, layout: Layout) -> None:
        num_experts = len(layout.numbered) if layout.matrix else None
        shape = Shape(source.name, Declared(num_experts=num_experts), options.model)
        super().__init__(source, options, shape)
        self._file, self._layout = source, layout
        # the same for every walk: a smaller one would refuse other rows than the first walk did
        self._limit = shape.limit
        self._parse_bad = BadRows(options.skip_bad)
        self._requests = Labels()
        self._layer_rows = KeptBlocks(self._parsed, columns_bytes, self._keep_bytes)
        largest, layers = 0, set[int]()
        for columns in self._layer_rows:
            largest = max(largest, int(columns["experts"].max()))
            layers.update(np.unique(columns["layer"]).tolist())
        if not layers:
            rule = "one row per token and layer"
            raise TraceError("holds no routed tokens", rule=rule, where=Location(file=source.name))
        self._layer_ids = tuple(sorted(layers))
        self._shape.set_num_experts(largest)
        self._assume(layout)
        self._shape.set_layers(len(layers), self._layer_ids)
        self._start()

    def _assume(self, layout: Layout) -> None:
        if layout.request is None:
            self._shape.assume(NO_REQUEST if not layout.signed else "each run of negative positions begins a request")
        if layout.position is None:
            self._shape.assume(NO_POSITION)
        if layout.phase is None and not layout.signed:
            self._shape.assume(NO_PHASE)
        if layout.matrix:
            self._shape.assume("one score per expert: those above 0 are the chosen ones, the highest first")
        named = re.search(r"[_-]layer[_-]?(\d+)", PurePosixPath(self._file.name).name)
        if named is not None and self._layer_ids == (0,) and int(named[1]) != 0:
            self._shape.assume(f"the file's name says layer {int(named[1])}, its rows say layer 0: kept as 0")

    def _names(self) -> dict[str, tuple[str, ...]]:
        return {"request_names": self._requests.names}

    def _rows(self) -> Iterator[Columns]:
        bad = BadRows(self._options.skip_bad)
        assembler = TokenAssembler(self._file.name, self._layer_ids, self._shape.limit.num_experts, bad)
        for rows in self._layer_rows:
            columns = assembler.add(rows)
            self._row_bad = self._parse_bad + bad
            if columns is not None:
                columns.setdefault("phase", np.full(len(columns["experts"]), DECODE, np.uint8))
                yield columns
        assembler.finish()
        self._row_bad = self._parse_bad + bad

    def _place(self, columns: Columns, token: int, layer: int) -> Location:
        # rows were checked as they were read, so that this is never needed to say where one is bad
        return Location(file=self._file.name)

    def _parsed(self) -> Iterator[Columns]:
        """Yield blocks of rows of one layer each."""
        bad = self._parse_bad = BadRows(self._options.skip_bad)
        counted = _Counted()
        parser = RowParser(self._file.name, self._layout, self._limit)
        walk = RowWalk(self._file, parser, self._shape, bad).blocks(self._options.block_bytes)
        yield from blocks_of((self._columns(rows, counted) for rows in walk), self._options.block_bytes)

    def _columns(self, rows: Rows, counted: _Counted) -> Columns:
        request = rows.request
        if rows.names is not None:
            numbers = self._requests.numbers(rows.names)
            request = request if numbers is None else numbers[request]
        position = counted.positions(rows.layer, request) if rows.position is None else rows.position
        columns: Columns = {"experts": rows.ids[:, None, :], "request": request, "position": position}
        columns |= {"layer": rows.layer, "line": rows.line}
        for name in ("phase", "step"):
            if getattr(rows, name) is not None:
                columns[name] = getattr(rows, name)
        return columns


class _Counted:
    """Positions where a file gives none: a row is its request's next token in its layer."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, int], int] = {}

    def positions(self, layer: IntArray, request: IntArray) -> IntArray:
        """Positions of consecutive rows. Complexity: O(rows), plus a look-up where the layer or the request changes."""
        starts = np.flatnonzero(changes(layer, request))
        lengths = np.diff(starts, append=len(layer))
        bases = []
        keys = zip(layer[starts].tolist(), request[starts].tolist(), strict=True)
        for key, start, length in zip(keys, starts.tolist(), lengths.tolist(), strict=True):
            number = self._next.get(key, 0)
            self._next[key] = number + length
            bases.append(number - start)
        return np.arange(len(layer)) + np.repeat(bases, lengths)


def _counted(source: InputFile, layout: Layout, options: ReaderOptions) -> Counts:
    """Count the rows of ``layer, expert``."""
    shape = Shape(source.name, Declared(), options.model)
    bad = BadRows(options.skip_bad)
    walk = RowWalk(source, RowParser(source.name, layout, shape.limit), shape, bad)
    seen: dict[tuple[int, int], int] = {}
    for rows in walk.blocks(options.block_bytes):
        layers = np.unique(rows.layer)
        cell = np.searchsorted(layers, rows.layer) * MAX_EXPERTS + rows.ids[:, 0]
        cells, counts = np.unique(cell, return_counts=True)
        for cell, count in zip(cells.tolist(), counts.tolist(), strict=True):
            key = (int(layers[cell // MAX_EXPERTS]), cell % MAX_EXPERTS)
            seen[key] = seen.get(key, 0) + count
    if not seen:
        raise TraceError("holds no choices", rule="one row per choice", where=Location(file=source.name))
    layer_ids = sorted({layer for layer, _ in seen})
    shape.set_num_experts(max(expert for _, expert in seen))
    table = np.zeros((len(layer_ids), shape.num_experts or 1), np.int64)
    for (layer, expert), count in seen.items():
        table[layer_ids.index(layer), expert] = count
    notes = [*shape.assumptions, "rows do not say which token chose: only counts can be read", *bad.sentence()]
    return checked_counts(table, "counts", source.name, {"layer_ids": layer_ids, "assumptions": notes}, options)


def _first_lines(head: bytes) -> list[str]:
    """Return the first two lines that are neither blank nor comments."""
    text = head.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [line for _, line in zip(range(2), lines, strict=False)]
