"""Native JSON Lines: one line per token, or one per token and layer, with or without a meta line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import orjson

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._blocks import KeptBlocks
from moeplace.readers._common import (
    NO_PHASE,
    NO_POSITION,
    NO_REQUEST,
    BadRows,
    Columns,
    IdLimit,
    ReaderOptions,
    RunningNumbers,
    frozen_columns,
    trace_bytes,
)
from moeplace.readers._jsonl_batch import Batch, RowParser, batches
from moeplace.readers._jsonl_rows import ALIASES, ROW_TYPES, RowError, column_of, layout_of, parse_line
from moeplace.readers._meta import Declared, Shape
from moeplace.readers._route import TokenAssembler
from moeplace.trace import DECODE, MAX_EXPERTS, SCHEMA, Trace, TraceMeta

NAME = "jsonl"
DESCRIPTION = "JSON Lines: one line per token, or per token and layer, with an optional meta line (moeplace/trace/1)"

_NAME_ENDING = re.compile(r"\.(jsonl|ndjson)(\.gz|\.zst)?$")


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like a JSONL trace: 0 not at all, 100 certain."""
    by_name = 5 if _NAME_ENDING.search(name) and b"\0" not in head else 0
    line = next((part for part in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if part.strip()), b"")
    if not line.lstrip().startswith(b"{"):
        return by_name
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return 60 if any(b'"%s"' % alias.encode() in line for alias in ALIASES["ids"]) else by_name
    if value.get("type") == "meta" or value.get("type") in ROW_TYPES or value.get("schema") == SCHEMA:
        return 95
    ids = layout_of(value).ids
    return 90 if ids is not None and isinstance(value[ids], list) else by_name


def open(source: InputFile, options: ReaderOptions) -> JsonlStream:
    """Open a JSONL trace as a stream.

    Raises
    ------
    TraceError
        The meta line, or more rows of the first block than may be skipped, break the format.
    """
    return JsonlStream(source, options)


class JsonlStream:
    """A JSONL trace, block by block; a walk over a file that does not fit the cache parses it again."""

    def __init__(self, source: InputFile, options: ReaderOptions) -> None:
        self._source, self._options = source, options
        self._parser: RowParser | None = None
        self._row_bad = BadRows(options.skip_bad)
        self._skipped: tuple[str, ...] = ()
        self._scanned: KeptBlocks[Columns] | None = None
        self._live: Iterator[Columns] | None = self._started()
        keep = options.cache_bytes if source.can_reopen else None
        # rows are kept only when they are needed twice; otherwise each is dropped as soon as its block is built
        if self._needs_scan():
            self._scanned = KeptBlocks(self._parse_rows, _columns_bytes, keep, live=self._live)
            self._live = None
            self._scan(self._scanned)
        self._assume_defaults()
        self._blocks = KeptBlocks(self._tokens, trace_bytes, keep)
        next(iter(self._blocks), None)

    @property
    def meta(self) -> TraceMeta:
        """The model's shape; names and skipped rows are complete once the blocks have been walked."""
        parser = self._known_parser()
        return parser.shape.build(
            extra=self._skipped, domains=parser.domains.names, request_names=parser.requests.names
        )

    def blocks(self) -> Iterator[Trace]:
        """Yield consecutive blocks of tokens."""
        yield from self._blocks
        if self._blocks.complete:
            self._scanned = None

    def _known_parser(self) -> RowParser:
        if self._parser is None:
            raise TraceError("holds no routed tokens", where=Location(file=self._source.name))
        return self._parser

    def _started(self) -> Iterator[Columns]:
        """Start a walk and parse its first block, which settles what the rows have in common."""
        rows = self._parse_rows()
        first = next(rows, None)
        if first is None:
            raise TraceError(
                "holds no routed tokens",
                rule="one line per token" + (" after the meta line" if self._parser and self._parser.meta else ""),
                where=Location(file=self._source.name),
            )
        return chain([first], rows)

    def _parse_rows(self) -> Iterator[Columns]:
        bad = self._row_bad = BadRows(self._options.skip_bad)
        parts: list[Columns] = []
        with self._source.stream() as stream:
            first = True
            for whole in batches(stream, self._source.name):
                batch = self._without_meta(whole) if first else whole
                first = False
                columns = self._known_parser().parse(batch, bad) if batch.lines else None
                if columns is None:
                    continue
                parts.append(columns)
                if sum(part["experts"].nbytes for part in parts) >= self._options.block_bytes:
                    yield frozen_columns(parts)
                    parts = []
        if parts:
            yield frozen_columns(parts)

    def _without_meta(self, batch: Batch) -> Batch:
        """Take the meta line off the first batch; on the first walk, learn from it."""
        where = Location(file=self._source.name, line=batch.numbers[0], column=1)
        meta, text = _meta_line(batch.lines[0])
        if self._parser is None:
            declared = _declared(meta, text, where)
            shape = Shape(self._source.name, declared, self._options.model, where if meta else None)
            self._parser = RowParser(self._source.name, shape, meta)
        return replace(batch, lines=batch.lines[1:], numbers=batch.numbers[1:]) if meta else batch

    def _needs_scan(self) -> bool:
        parser = self._known_parser()
        return parser.shape.num_experts is None or (parser.row.per_layer and parser.shape.declared.layer_ids is None)

    def _scan(self, rows: KeptBlocks[Columns]) -> None:
        """Walk all rows once for what the file does not declare: the largest id, and the layers that appear."""
        largest, layers, per_layer = 0, set[int](), self._known_parser().row.per_layer
        for columns in rows:
            largest = max(largest, int(columns["experts"].max()))
            if per_layer:
                layers.update(np.unique(columns["layer"]).tolist())
        shape = self._known_parser().shape
        shape.set_num_experts(largest)
        if per_layer and shape.declared.layer_ids is None:
            self._known_parser().row.known_layers = tuple(sorted(layers))

    def _assume_defaults(self) -> None:
        parser = self._known_parser()
        columns, shape = parser.row.columns or frozenset(), parser.shape
        if parser.row.per_layer and parser.row.known_layers is not None:
            shape.set_layers(len(parser.row.known_layers), parser.row.known_layers)
        if "request" not in columns:
            shape.assume(NO_REQUEST)
        if "position" not in columns:
            shape.assume(NO_POSITION)
        if "phase" not in columns:
            shape.assume(NO_PHASE)

    def _tokens(self) -> Iterator[Trace]:
        parser, counters = self._known_parser(), _Counters()
        rows: Iterator[Columns]
        if self._live is not None:
            rows, self._live = self._live, None
        else:
            rows = iter(self._scanned) if self._scanned is not None else self._parse_rows()
        bad = BadRows(self._options.skip_bad)
        assembler = None
        if parser.row.per_layer:
            num_experts = parser.shape.num_experts or IdLimit().num_experts
            assembler = TokenAssembler(self._source.name, parser.row.known_layers or (), num_experts, bad)
        tokens = 0
        for columns in rows:
            filled: Columns | None = counters.filled(columns)
            if assembler is not None and filled is not None:
                filled = assembler.add(filled)
                (self._row_bad + bad).check()
            if filled is not None:
                tokens += len(filled["experts"])
                filled.setdefault("phase", np.full(len(filled["experts"]), DECODE, np.uint8))
                yield Trace(meta=self.meta, **filled)
        if assembler is not None:
            assembler.finish()
        total = self._row_bad + bad
        total.check()
        self._skipped = total.sentence()
        if not tokens:
            raise TraceError("holds no complete token", where=Location(file=self._source.name))


class _Counters:
    """Fills in the request and position of rows that do not have them."""

    def __init__(self) -> None:
        self._tokens = RunningNumbers()
        self._rows_of_layer: dict[int, RunningNumbers] = {}

    def filled(self, columns: Columns) -> Columns:
        filled = dict(columns)
        filled.setdefault("request", np.zeros(len(columns["experts"]), np.int64))
        if "position" not in filled:
            filled["position"] = self._positions(filled)
        return filled

    def _positions(self, columns: Columns) -> Any:
        if "layer" not in columns:
            return self._tokens.number(columns["request"])
        # the n-th row of a request in a layer is its n-th token
        positions = np.empty(len(columns["request"]), np.int64)
        for layer in np.unique(columns["layer"]).tolist():
            rows = columns["layer"] == layer
            counter = self._rows_of_layer.setdefault(layer, RunningNumbers())
            positions[rows] = counter.number(columns["request"][rows])
        return positions


def _meta_line(line: bytes) -> tuple[dict[str, Any], str]:
    try:
        text, value = parse_line(line, False)
    except RowError:
        return {}, ""
    is_meta = value.get("type") == "meta" or ("schema" in value and layout_of(value).ids is None)
    return (value, text) if is_meta else ({}, "")


def _declared(meta: dict[str, Any], text: str, where: Location) -> Declared:
    """Read the meta line's fields, each under any of its names."""
    schema = meta.get("schema", SCHEMA)
    if schema != SCHEMA:
        hint = f"this version reads {SCHEMA}"
        raise TraceError(f"schema {schema!r}", rule="a trace has a trace schema", hint=hint, where=where)

    def field(kind: str, *names: str) -> Any:
        name = next((name for name in names if meta.get(name) is not None), None)
        if name is None:
            return None
        value = meta[name]
        if not _KINDS[kind](value):
            column = column_of(text, [name])
            where_value = Location(file=where.file, line=where.line, column=column)
            raise TraceError(f"{name} is {value!r}", rule=f"{name} is {kind}", where=where_value)
        return tuple(value) if isinstance(value, list) else value

    layer_ids = meta.get("layer_ids")
    return Declared(
        num_experts=field(f"an integer from 1 to {MAX_EXPERTS}", "num_experts"),
        top_k=field(f"an integer from 1 to {MAX_EXPERTS}", "top_k", "num_experts_per_tok"),
        layer_ids=field(
            "a list of increasing integers",
            *("layers_logged", "moe_layer_ids"),
            *(["layer_ids"] if isinstance(layer_ids, list) else []),
        ),
        num_layers=field(f"an integer from 1 to {MAX_EXPERTS}", "num_layers"),
        first_moe_layer=field("an integer", "first_moe_layer"),
        model_id=field("a string", "model_id", "model"),
        domains=field("a list of strings", "domains") or (),
        request_names=field("a list of strings", "request_names") or (),
        assumptions=field("a list of strings", "assumptions") or (),
    )


def _is_integers(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int and item >= 0 for item in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "an integer": lambda value: type(value) is int and value >= 0,
    f"an integer from 1 to {MAX_EXPERTS}": lambda value: type(value) is int and 1 <= value <= MAX_EXPERTS,
    "a list of increasing integers": lambda value: _is_integers(value) and value == sorted(set(value)),
    "a string": lambda value: isinstance(value, str),
    "a list of strings": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
}


def _columns_bytes(columns: Columns) -> int:
    return sum(column.nbytes for column in columns.values())
