"""CSV rows of one layer each, one at a time: which column holds what, what a row says, and where it breaks a rule.

This is the slow path. Whole blocks go through :mod:`moeplace.readers._csv_blocks`, which leaves to it only those in
which a row is bad or oddly written.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moeplace.errors import Location, TraceError
from moeplace.readers._common import IdLimit, top_k_problem
from moeplace.readers._csv_lines import Record

_NAMES: dict[str, tuple[str, ...]] = {
    "layer": ("layer", "layer id", "layer idx", "layer index"),
    "ids": ("activated expert ids", "expert ids", "experts", "topk ids", "topk experts", "selected experts", "indices"),
    "expert": ("expert", "expert id"),
    "request": ("request", "request id", "req id", "rid", "batch number", "prompt", "turn"),
    "position": ("token idx", "token pos", "token id", "token", "position", "pos"),
    "phase": ("phase",),
    "step": ("step",),
}
_NUMBERED = re.compile(r"(?:expert|topk|top|id|e)[ _]?(\d+)")
PHASES = {"prefill": 0, "prompt": 0, "p": 0, "0": 0, "decode": 1, "generation": 1, "d": 1, "1": 1}
_ZEROS = frozenset({"0", "0.0", "0.00", "0.0000", "0.000000", "0.00000000"})
_SPACED = str.maketrans(dict.fromkeys("[](),;|", " "))
INTEGER = re.compile(r"\s*[+-]?\d{1,18}\s*")


class Row(NamedTuple):
    """What a row says; ``request`` is an integer or a name."""

    line: int
    layer: int
    request: int | str
    position: int | None
    phase: int | None
    step: int | None
    ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The column of each field; None where a file has none.

    ``numbered`` are the columns of ``expert_0``, ``expert_1``, …: the ids of a top-k, or with ``matrix`` one score (or
    0 and 1) per expert. ``expert`` is the one id of a row, with one row per choice. ``signed`` says that negative
    positions are the prompt.
    """

    delimiter: str
    width: int
    layer: int
    ids: int | None = None
    expert: int | None = None
    numbered: tuple[int, ...] = ()
    matrix: bool = False
    request: int | None = None
    position: int | None = None
    phase: int | None = None
    step: int | None = None
    signed: bool = False
    header: bool = True

    @property
    def joins(self) -> bool:
        """True when consecutive rows of one choice each make up a top-k."""
        return self.expert is not None and self.position is not None

    @property
    def only_counts(self) -> bool:
        """True when rows are choices of nobody knows which token."""
        return self.expert is not None and self.position is None


def layout_of(lines: Sequence[str]) -> Layout | None:
    """Find the layout from the first lines (comments left out); None when they are not such a CSV file."""
    if not lines:
        return None
    delimiter = max(",;\t", key=lines[0].count)
    rows = list(csv.reader(lines[:2], delimiter=delimiter))
    first, second = rows[0], rows[1] if len(rows) > 1 else []
    if all(INTEGER.fullmatch(cell) for cell in first):
        return _headerless(first, delimiter)
    names = [re.sub(r"[\s_-]+", " ", name.strip().lower()) for name in first]
    at: dict[str, Any] = {
        field: next((names.index(a) for a in known if a in names), None) for field, known in _NAMES.items()
    }
    numbered = _numbered(names)
    layer = at.pop("layer")
    if layer is None or (at["ids"] is None and at["expert"] is None and len(numbered) < 1):
        return None
    if at["ids"] is not None:
        at["expert"], numbered = None, ()
    elif numbered:
        at["expert"] = None
    # moe-beyond's Token is text; as a position it would repeat
    place = at["position"]
    if place is not None and ("batch number" in names or not _is_integer(second, place)):
        at["position"] = None
    if at["position"] is None and at["expert"] is not None:
        at["position"] = at["step"]
    values = [second[i].strip() for i in numbered] if len(second) == len(first) else []
    return Layout(
        delimiter=delimiter,
        width=len(first),
        layer=layer,
        numbered=numbered,
        matrix=_is_matrix(values),
        **at,
    )


class RowParser:
    """Turns records into rows.

    Parameters
    ----------
    file
        Name for errors.
    layout
        Where the fields are.
    limit
        The largest id that may appear.
    """

    def __init__(self, file: str, layout: Layout, limit: IdLimit) -> None:
        self.file, self.layout, self.limit = file, layout, limit
        self.named_requests: bool | None = None
        self.sequence, self.last = 0, -1

    def parse(self, record: Record) -> Row:
        """Read one row.

        Raises
        ------
        TraceError
            A cell breaks its rule: names line and column.
        """
        layout = self.layout
        if len(record.cells) != layout.width:
            what = f"{len(record.cells)} cells"
            hint = "was the recording cut off?" if not record.text.endswith("\n") else None
            raise self.error(record, 0, 0, (what, f"{layout.width} cells in every row", hint))
        layer = self._integer(record, layout.layer, "the layer")
        if layer < 0:
            raise self.error(record, layout.layer, 0, (f"layer {layer}", "layers are numbered from 0", None))
        ids = self._ids(record)
        position = None if layout.position is None else self._integer(record, layout.position, "the token's position")
        step = None if layout.step is None else self._integer(record, layout.step, "the step")
        return Row(
            record.line, layer, self._request(record, position), position, self._phase(record, position), step, ids
        )

    def check(self, record: Record, ids: Sequence[int], index: int) -> None:
        """Raise unless ``ids``, which stand at cell ``index``, are one top-k."""
        # the quick way first: most rows are good
        if ids and min(ids) >= 0 and max(ids) < self.limit.num_experts and len(set(ids)) == len(ids):
            return
        problem = top_k_problem(ids, self.limit)
        if problem is None:
            raise self.error(record, index, 0, ("no experts", "every token chooses k experts", None))
        i, *said = problem
        layout, at = self.layout, index
        offset = _offset_of(record.cells[index], i) if layout.ids is not None else 0
        if layout.numbered and not layout.matrix:
            at = layout.numbered[i]
        raise self.error(record, at, offset, (said[0], said[1], said[2]))

    def error(self, record: Record, index: int, offset: int, said: tuple[str, str, str | None]) -> TraceError:
        """Error at a character of a cell: ``said`` is what, rule and hint."""
        line, column = _place(record, self.layout.delimiter, index, offset)
        where = Location(file=self.file, line=line, column=column)
        return TraceError(said[0], rule=said[1], hint=said[2], where=where)

    def _ids(self, record: Record) -> list[int]:
        layout, cells = self.layout, record.cells
        if layout.matrix:
            return self._chosen(record)
        if layout.ids is not None:
            text = cells[layout.ids]
            try:
                ids, first = list(map(int, text.translate(_SPACED).split())), layout.ids
            except ValueError as exc:
                odd = next(m for m in re.finditer(r"[^\s\[\](),;|]+", text) if not INTEGER.fullmatch(m[0]))
                said = (f"expert id {odd[0]}", "expert ids are integers", None)
                raise self.error(record, layout.ids, odd.start(), said) from exc
        else:
            columns = layout.numbered or (layout.expert or 0,)
            ids, first = [self._integer(record, i, "an expert id") for i in columns], columns[0]
        self.check(record, ids, first)
        return ids

    def _chosen(self, record: Record) -> list[int]:
        """Return the experts whose score is not 0, highest first."""
        scores: list[tuple[float, int]] = []
        for expert, index in enumerate(self.layout.numbered):
            cell = record.cells[index]
            if cell in _ZEROS:
                continue
            try:
                score = float(cell)
            except ValueError:
                score = math.nan
            if not math.isfinite(score) or score < 0:
                said = (f"score {cell!r} of expert {expert}", "scores are numbers, 0 for experts not chosen", None)
                raise self.error(record, index, 0, said)
            if score:
                scores.append((-score, expert))
        if not scores:
            said = ("no expert is chosen", "every token chooses k experts", None)
            raise self.error(record, self.layout.numbered[0], 0, said)
        return [expert for _, expert in sorted(scores)]

    def _request(self, record: Record, position: int | None) -> int | str:
        if self.layout.request is None:
            if self.layout.signed and position is not None:
                # the next prompt begins: files of several runs are joined end to end
                self.sequence += self.last >= 0 > position
                self.last = position
            return self.sequence
        text = record.cells[self.layout.request].strip()
        if self.named_requests is None:
            self.named_requests = not INTEGER.fullmatch(text)
        return text if self.named_requests else self._integer(record, self.layout.request, "the request")

    def _phase(self, record: Record, position: int | None) -> int | None:
        if self.layout.phase is None:
            return int(position >= 0) if self.layout.signed and position is not None else None
        text = record.cells[self.layout.phase].strip().lower()
        if text not in PHASES:
            said = (f"phase {text!r}", "phase is prefill or decode", None)
            raise self.error(record, self.layout.phase, 0, said)
        return PHASES[text]

    def _integer(self, record: Record, index: int, name: str) -> int:
        text = record.cells[index]
        if not INTEGER.fullmatch(text):
            raise self.error(record, index, 0, (f"{text!r} in place of {name}", f"{name} is an integer", None))
        return int(text)


def _headerless(first: list[str], delimiter: str) -> Layout | None:
    """Layout of ``position,layer,id,id,…`` without a header, or of ``layer,expert``."""
    if len(first) == 2:
        return Layout(delimiter=delimiter, width=2, layer=0, expert=1, header=False)
    if len(first) < 3:
        return None
    numbered = tuple(range(2, len(first)))
    return Layout(
        delimiter=delimiter, width=len(first), position=0, layer=1, numbered=numbered, signed=True, header=False
    )


def _numbered(names: Sequence[str]) -> tuple[int, ...]:
    """Columns of ``expert_0``, ``expert_1``, … in the order of their numbers, which have no gap."""
    found = {int(match[1]): i for i, name in enumerate(names) if (match := _NUMBERED.fullmatch(name))}
    numbers = sorted(found)
    whole = bool(numbers) and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return tuple(found[number] for number in numbers) if whole else ()


def _is_matrix(values: Sequence[str]) -> bool:
    """True for one score per expert; False for ids, which are integers and differ."""
    if not values:
        return False
    integers = all(INTEGER.fullmatch(value) for value in values)
    return not integers or len(set(values)) < len(values) or set(values) <= {"0", "1"}


def _is_integer(row: Sequence[str], index: int) -> bool:
    return index < len(row) and INTEGER.fullmatch(row[index]) is not None


def _offset_of(text: str, i: int) -> int:
    """Where the i-th id of a list starts in its cell."""
    return [match.start() for match in re.finditer(r"[^\s\[\](),;|]+", text)][i]


def _place(record: Record, delimiter: str, index: int, offset: int) -> tuple[int, int]:
    """Line and column, from 1, of a character of a cell."""
    at, cell, quoted, text = 0, 0, False, record.text
    while cell < index and at < len(text):
        if text[at] == '"':
            quoted = not quoted
        elif text[at] == delimiter and not quoted:
            cell += 1
        at += 1
    if text[at : at + 1] == '"':
        at += 1
    before = text[: at + offset]
    return record.line + before.count("\n"), at + offset - (before.rfind("\n") + 1) + 1
