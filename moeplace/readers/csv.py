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
from typing import Any

import numpy as np

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._blocks import KeptBlocks
from moeplace.readers._columns import ColumnStream, columns_bytes, tally
from moeplace.readers._common import NO_PHASE, NO_POSITION, NO_REQUEST, BadRows, Columns, Labels, ReaderOptions
from moeplace.readers._counts import checked_counts
from moeplace.readers._csv_rows import Layout, Record, Row, RowParser, layout_of, read_records
from moeplace.readers._meta import Declared, Shape
from moeplace.readers._route import TokenAssembler
from moeplace.trace import DECODE, Counts, TraceStream

NAME = "csv"
DESCRIPTION = "CSV: a row per token and layer (moe-beyond, DynaNDE, llama.cpp moe-trace), or per choice"

_RULE = "a CSV trace has a header that names the layer and the experts"
_ROUNDED = "a score rounded to 0 hides a choice: write more digits"


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
    if layout.expert is not None and layout.position is None:
        return _counted(source, layout, options)
    return CsvStream(source, options, layout)


class CsvStream(ColumnStream):
    """Tokens put together from the rows of their layers."""

    def __init__(self, source: InputFile, options: ReaderOptions, layout: Layout) -> None:
        num_experts = len(layout.numbered) if layout.matrix else None
        shape = Shape(source.name, Declared(num_experts=num_experts), options.model)
        super().__init__(source, options, shape)
        self._file, self._layout = source, layout
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
        gathered = _Gathered(self._requests)
        for row in _rows_of(self._file, self._layout, self._shape, bad):
            gathered.add(row)
            if gathered.num_ids >= self._options.block_bytes:
                yield gathered.taken()
        bad.check()
        if gathered.num_ids:
            yield gathered.taken()


class _Gathered:
    """Rows collected into columns."""

    def __init__(self, requests: Labels) -> None:
        self._requests, self._counted = requests, dict[tuple[int, Any], int]()
        self._rows: list[Row] = []
        self._positions: list[int] = []
        self.num_ids = 0

    def add(self, row: Row) -> None:
        """Take a row in; without a position it is its request's next token in this layer."""
        position = row.position
        if position is None:
            key = (row.layer, row.request)
            position = self._counted[key] = self._counted.get(key, -1) + 1
        self._rows.append(row)
        self._positions.append(position)
        self.num_ids += len(row.ids)

    def taken(self) -> Columns:
        """Return the columns of all rows since the last time."""
        rows, positions = self._rows, self._positions
        self._rows, self._positions, self.num_ids = [], [], 0
        requests = self._requests.numbers([row.request for row in rows])
        columns: Columns = {
            "experts": np.array([row.ids for row in rows], np.int32)[:, None, :],
            "request": np.zeros(len(rows), np.int64) if requests is None else requests,
            "position": np.array(positions, np.int64),
            "layer": np.array([row.layer for row in rows], np.int64),
            "line": np.array([row.line for row in rows], np.int64),
        }
        if rows[0].phase is not None:
            columns["phase"] = np.array([row.phase for row in rows], np.uint8)
        if rows[0].step is not None:
            columns["step"] = np.array([row.step for row in rows], np.int64)
        return columns


def _rows_of(source: InputFile, layout: Layout, shape: Shape, bad: BadRows) -> Iterator[Row]:
    """Yield the good rows, each with its whole top-k, and tally the bad ones."""
    parser = RowParser(source.name, layout, shape.limit)
    top_k = shape.top_k
    with source.stream() as stream:
        records = read_records(stream, source.name, layout)
        whole = _joined(records, parser, bad) if layout.expert is not None else _single(records, parser, bad)
        for record, row in whole:
            if top_k is None:
                shape.set_top_k(top_k := len(row.ids))
            if len(row.ids) != top_k:
                what = f"{len(row.ids)} experts: {row.ids}"
                said = (what, f"top-{top_k} in every row", _ROUNDED if layout.matrix else None)
                index = layout.ids if layout.ids is not None else (layout.numbered or (layout.expert or 0,))[0]
                tally(bad, parser.error(record, index, 0, said), source.name)
            else:
                yield row


def _single(records: Iterator[Record], parser: RowParser, bad: BadRows) -> Iterator[tuple[Record, Row]]:
    """Yield every good row."""
    for record in records:
        try:
            row = parser.parse(record)
        except TraceError as exc:
            tally(bad, exc, parser.file)
            continue
        yield record, row


def _joined(records: Iterator[Record], parser: RowParser, bad: BadRows) -> Iterator[tuple[Record, Row]]:
    """Join consecutive rows of one choice each into the top-k of one token and layer."""
    current: tuple[Record, Row] | None = None
    for record, row in _single(records, parser, bad):
        if current is None or row[1:6] != current[1][1:6]:
            if current is not None:
                yield current
            current = record, row
            continue
        try:
            parser.check(record, [*current[1].ids, *row.ids], parser.layout.expert or 0)
        except TraceError as exc:
            tally(bad, exc, parser.file)
            continue
        current[1].ids.extend(row.ids)
    if current is not None:
        yield current


def _counted(source: InputFile, layout: Layout, options: ReaderOptions) -> Counts:
    """Count the rows of ``layer, expert``."""
    shape = Shape(source.name, Declared(), options.model)
    parser, bad = RowParser(source.name, layout, shape.limit), BadRows(options.skip_bad)
    seen: dict[tuple[int, int], int] = {}
    with source.stream() as stream:
        for _, row in _single(read_records(stream, source.name, layout), parser, bad):
            key = (row.layer, row.ids[0])
            seen[key] = seen.get(key, 0) + 1
    bad.check()
    if not seen:
        raise TraceError("holds no choices", rule="one row per choice", where=Location(file=source.name))
    layers = sorted({layer for layer, _ in seen})
    shape.set_num_experts(max(expert for _, expert in seen))
    counts = np.zeros((len(layers), shape.num_experts or 1), np.int64)
    for (layer, expert), count in seen.items():
        counts[layers.index(layer), expert] = count
    notes = [*shape.assumptions, "rows do not say which token chose: only counts can be read", *bad.sentence()]
    return checked_counts(counts, "counts", source.name, {"layer_ids": layers, "assumptions": notes}, options)


def _first_lines(head: bytes) -> list[str]:
    """Return the first two lines that are neither blank nor comments."""
    text = head.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [line for _, line in zip(range(2), lines, strict=False)]
