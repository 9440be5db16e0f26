"""JSONL in batches of lines: parsed by orjson, joined and checked as arrays, so that a line costs a few microseconds.

A batch in which anything is unusual is walked line by line instead (:mod:`moeplace.readers._jsonl_rows`), which finds
the bad rows or reads the good ones.
"""

from __future__ import annotations

import contextlib
import gc
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson

from moeplace.errors import InputError, Location, TraceError
from moeplace.readers._common import BadRow, BadRows, Columns, Labels, integer_column
from moeplace.readers._jsonl_rows import (
    PHASE_NUMBERS,
    ROW_TYPES,
    Layout,
    RowError,
    RowShape,
    check_line,
    layout_of,
)
from moeplace.readers._meta import Shape
from moeplace.trace import first_bad_row, id_dtype

CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Consecutive lines that are not blank.

    ``may_hold_booleans`` is False when no ``true`` or ``false`` occurs; ``cut`` when the input ends within the last.
    """

    lines: list[bytes]
    numbers: Sequence[int]
    may_hold_booleans: bool
    cut: bool


def batches(stream: BinaryIO, file: str) -> Iterator[Batch]:
    """Cut a stream into batches of about :data:`CHUNK_BYTES`.

    Raises
    ------
    TraceError
        Compressed data ends early or is damaged: names the line it stops in.
    """
    rest, number, at_start = b"", 1, True
    while True:
        try:
            chunk = stream.read(CHUNK_BYTES)
        except InputError as exc:
            raise TraceError(exc.what, rule=exc.rule, hint=exc.hint, where=Location(file=file, line=number)) from exc
        text = rest + chunk if rest else chunk
        if at_start:
            text, at_start = text.removeprefix(_BOM), False
        lines = text.split(b"\n")
        rest = lines.pop()
        if not chunk and rest:
            lines.append(rest)
        batch = _batch(lines, number, text, cut=not chunk and bool(rest))
        if batch.lines:
            yield batch
        number += len(lines)
        if not chunk:
            return


def _batch(lines: list[bytes], first: int, text: bytes, cut: bool) -> Batch:
    numbers: Sequence[int] = range(first, first + len(lines))
    blank = [not line or line.isspace() for line in lines]
    if any(blank):
        numbers = [number for number, empty in zip(numbers, blank, strict=True) if not empty]
        lines = [line for line, empty in zip(lines, blank, strict=True) if not empty]
    return Batch(lines=lines, numbers=numbers, may_hold_booleans=b"true" in text or b"false" in text, cut=cut)


class RowParser:
    """Turns batches of lines into columns, and keeps what rows have in common.

    Parameters
    ----------
    file
        Name for errors.
    shape
        The model's shape; settled from the first good row.
    meta
        The meta line, or an empty object.
    """

    def __init__(self, file: str, shape: Shape, meta: dict[str, Any]) -> None:
        declared = shape.declared
        self.file, self.shape, self.meta = file, shape, meta
        layers = len(declared.layer_ids) if declared.layer_ids else None
        self.row = RowShape(
            num_layers=layers,
            top_k=declared.top_k,
            num_domains=len(declared.domains) or None,
            known_layers=declared.layer_ids,
        )
        self.requests, self.domains = Labels(declared.request_names), Labels(declared.domains)
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def parse(self, batch: Batch, bad: BadRows) -> Columns | None:
        """Return the columns of a batch's good rows, None when it has none.

        ``experts`` is ``[row, layer, k]``; rows of one layer each also have ``layer`` and ``line``.

        Raises
        ------
        TraceError
            More rows are bad than may be skipped.
        """
        if self.row.columns is None:
            self._establish(batch)
        columns = self._fast(batch) if self.row.columns is not None else None
        return self._slow(batch, bad) if columns is None else columns

    def _establish(self, batch: Batch) -> None:
        """Take what rows have in common from the first good row."""
        for i, line in enumerate(batch.lines):
            with contextlib.suppress(RowError):
                row = check_line(line, self.row, self.shape.limit, self.meta, batch.cut and i == len(batch.lines) - 1)
                if row is not None:
                    self._settle(row)
                    return

    def _settle(self, row: dict[str, Any]) -> None:
        per_layer = "layer" in row
        ids = [row["ids"]] if per_layer else row["ids"]
        self.shape.set_top_k(len(ids[0]))
        if not per_layer:
            self.shape.set_layers(len(ids), row.get("layers"))
        self.row.num_layers, self.row.top_k = len(ids), len(ids[0])
        self.row.columns, self.row.layers = frozenset(row), row.get("layers")
        self.row.kinds = {name: type(row[name]) for name in ("request", "domain") if name in row}

    def _fast(self, batch: Batch) -> Columns | None:
        with _collector_paused():
            try:
                rows = [orjson.loads(line) for line in batch.lines]
                layouts = {self._layout(keys) for keys in set(map(tuple, rows))}
                if len(layouts) != 1:
                    return None
                layout = layouts.pop()
                if layout.columns != self.row.columns:
                    return None
                if layout.type is not None and not {row[layout.type] for row in rows} <= ROW_TYPES:
                    return None
                return self._columns(rows, layout, batch.may_hold_booleans, batch.numbers)
            except (TypeError, ValueError, KeyError, OverflowError):
                return None

    def _layout(self, keys: tuple[str, ...]) -> Layout:
        if keys not in self._layouts:
            self._layouts[keys] = layout_of(keys)
        return self._layouts[keys]

    def _slow(self, batch: Batch, bad: BadRows) -> Columns | None:
        good, numbers = [], []
        last = batch.numbers[-1]
        for number, line in zip(batch.numbers, batch.lines, strict=True):
            try:
                row = check_line(line, self.row, self.shape.limit, self.meta, batch.cut and number == last)
            except RowError as exc:
                where = Location(file=self.file, line=number, column=exc.column)
                bad.add(BadRow(what=exc.what, rule=exc.rule, hint=exc.hint, where=where))
                if bad.full:
                    break
                continue
            if row is not None:
                good.append(row)
                numbers.append(number)
        bad.check()
        if not good:
            return None
        columns = self._columns(good, Layout(**{name: name for name in Layout._fields}), True, numbers)
        if columns is None:
            where = Location(file=self.file, line=numbers[0])
            raise TraceError("rows that cannot be joined", rule="all rows have the same fields and types", where=where)
        return columns

    def _columns(
        self, rows: list[dict[str, Any]], layout: Layout, booleans: bool, numbers: Sequence[int]
    ) -> Columns | None:
        present = self.row.columns or frozenset()
        experts = self._experts([row[layout.ids or ""] for row in rows], booleans)
        if experts is None or first_bad_row(experts, self.shape.limit.num_experts) is not None:
            return None
        if "layers" in present and any(row[layout.layers or ""] != self.row.layers for row in rows):
            return None
        # labels come last: a batch that is refused must not have numbered any
        names = [n for n in ("position", "phase", "step", "rank", "layer", "domain", "request") if n in present]
        values = {name: [row[getattr(layout, name)] for row in rows] for name in names}
        for name, labels in (("request", self.requests), ("domain", self.domains)):
            if name in values and not labels.accepts(values[name]):
                return None
        columns: Columns = {"experts": experts}
        for name in names:
            column = self._column(name, values[name])
            if column is None:
                return None
            columns[name] = column
        if self.row.per_layer:
            columns["line"] = np.asarray(numbers, np.int64)
        return columns

    def _experts(self, ids: list[Any], booleans: bool) -> npt.NDArray[Any] | None:
        """Join the id lists of all rows; None unless every list is as long as the first row's."""
        num_rows, num_layers, top_k = len(ids), self.row.num_layers or 1, self.row.top_k or 1
        top_ks = ids
        if not self.row.per_layer:
            if set(map(len, ids)) != {num_layers}:
                return None
            top_ks = list(chain.from_iterable(ids))
        if set(map(len, top_ks)) != {top_k}:
            return None
        flat = list(chain.from_iterable(top_ks))
        # bytes() and array() refuse floats, strings and None by themselves, but take booleans for 0 and 1
        if booleans and set(map(type, flat)) != {int}:
            return None
        joined: npt.NDArray[Any]
        try:
            joined = np.frombuffer(bytes(flat), np.uint8)
        except ValueError:
            joined = np.frombuffer(array("H", flat), np.uint16)
        if self.shape.num_experts is not None:
            dtype = np.dtype(id_dtype(self.shape.num_experts))
            if dtype.itemsize < joined.itemsize:
                return None
            joined = joined.astype(dtype, copy=False)
        return joined.reshape(num_rows, num_layers, top_k)

    def _column(self, name: str, values: list[Any]) -> npt.NDArray[Any] | None:
        if name == "request":
            return self.requests.numbers(values)
        if name == "phase":
            if not set(map(type, values)) <= {str, int}:
                return None
            return np.array([PHASE_NUMBERS[value] for value in values], np.uint8)
        allowed = self.row.known_layers if name == "layer" else None
        if name == "domain":
            numbers = self.domains.numbers(values)
            if self.row.num_domains is not None and self.domains.kind is int:
                allowed = tuple(range(self.row.num_domains))
        else:
            numbers = integer_column(values)
        if numbers is not None and allowed is not None and not np.isin(numbers, allowed).all():
            return None
        return numbers


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the cycle collector: a batch makes many small lists and no cycles, and each scan of them costs as much."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
