"""Many CSV rows at once: cells found and numbers read by NumPy over the bytes, so that a row costs a fraction of a µs.

Only blocks in which every row is good and plainly written are read here. Any other is left to
:mod:`moeplace.readers._csv_rows`, row by row, which reads the rarer spellings and says what is wrong where.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from moeplace.readers._common import IdLimit, changes
from moeplace.readers._csv_rows import INTEGER, PHASES, Layout, Row, RowParser
from moeplace.trace import IntArray, first_bad_row

Bytes: TypeAlias = npt.NDArray[np.uint8]
Offsets: TypeAlias = npt.NDArray[np.intp]

_NEWLINE, _QUOTE, _RETURN, _SPACE, _MINUS = b'\n"\r -'
_MAX_DIGITS = 18  # as many as surely fit int64
# what may stand in a list of ids besides digits
_IN_LIST = np.zeros(256, np.bool_)
_IN_LIST[list(b"0123456789[](),;| \t\r\n\v\f")] = True
# a score of zeros, with or without a point, weighs less than 2 besides the delimiter before it, which weighs 2
_WEIGHT = np.full(256, 2, np.uint8)
_WEIGHT[list(b"0\r")] = 0
_WEIGHT[ord(".")] = 1


class Unclear(Exception):
    """A block that has to be read row by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Good rows of one layer each, as columns; ``ids`` is ``[row, k]``.

    ``request`` indexes ``names`` where the requests of the file are not integers.
    """

    line: IntArray
    layer: IntArray
    ids: npt.NDArray[np.int32]
    request: IntArray
    names: tuple[str, ...] | None = None
    position: IntArray | None = None
    phase: npt.NDArray[np.uint8] | None = None
    step: IntArray | None = None


def rows_of(rows: Sequence[Row]) -> Rows:
    """Columns of rows that were read one by one."""
    names = None
    request: Any = [row.request for row in rows]
    if isinstance(request[0], str):
        names = tuple(dict.fromkeys(request))
        number = {name: i for i, name in enumerate(names)}
        request = [number[name] for name in request]
    first = rows[0]
    return Rows(
        line=np.array([row.line for row in rows], np.int64),
        layer=np.array([row.layer for row in rows], np.int64),
        ids=np.array([row.ids for row in rows], np.int32),
        request=np.array(request, np.int64),
        names=names,
        position=None if first.position is None else np.array([row.position for row in rows], np.int64),
        phase=None if first.phase is None else np.array([row.phase for row in rows], np.uint8),
        step=None if first.step is None else np.array([row.step for row in rows], np.int64),
    )


def clear_rows(data: bytes, line: int, whole: bool, parser: RowParser, top_k: int | None) -> tuple[Rows, int]:
    """Read a block of whole rows, the first of which stands in ``line``, and say how many bytes of it were used.

    Those are all, except where several rows make up one top-k: unless the block is the ``whole`` rest of the file, the
    last top-k may go on in the next block, and is left for it.

    Complexity: O(bytes), about 8 ns each.

    Raises
    ------
    Unclear
        A row is bad, or has not ``top_k`` ids, or is written in a way that only the row parser reads. Nothing has
        changed then.
    """
    layout = parser.layout
    try:
        cells = _Cells(data, line, layout)
        rows = _rows(cells, parser)
    except ValueError as exc:
        # not UTF-8, or not a number
        raise Unclear from exc
    used, num_bytes = len(rows.line), len(data)
    if layout.joins:
        rows, used = _joined(rows, top_k, whole)
        num_bytes = min(num_bytes, int(cells.edges[used * layout.width]))
    if rows.layer.min() < 0 or top_k not in (None, rows.ids.shape[1]):
        raise Unclear
    if layout.request is not None:
        parser.named_requests = rows.names is not None
    elif layout.signed and rows.position is not None:
        parser.sequence, parser.last = int(rows.request[-1]), int(rows.position[-1])
    return rows, num_bytes


def _rows(cells: _Cells, parser: RowParser) -> Rows:
    """Columns of all rows of a block."""
    layout = parser.layout
    position = None if layout.position is None else cells.column(layout.position)
    request, names = _requests(cells, parser, position)
    phase = None if layout.phase is None else _phases(cells, layout.phase)
    if layout.signed and position is not None:
        phase = (position >= 0).astype(np.uint8)
    return Rows(
        line=cells.lines(),
        layer=cells.column(layout.layer),
        ids=_ids(cells, layout, parser.limit),
        request=request,
        names=names,
        position=position,
        phase=phase,
        step=None if layout.step is None else cells.column(layout.step),
    )


def _joined(rows: Rows, top_k: int | None, whole: bool) -> tuple[Rows, int]:
    """Join consecutive rows of one choice each into the top-k of a token and layer; say how many rows were used."""
    keys = (rows.layer, rows.request, rows.position, rows.phase, rows.step)
    starts = np.flatnonzero(changes(*(key for key in keys if key is not None)))
    used = len(rows.line) if whole else int(starts[-1])
    starts = starts[starts < used]
    if not starts.size:
        raise Unclear
    each = used // starts.size if top_k is None else top_k
    if not np.array_equal(starts, np.arange(0, used, each)) or used % each:
        raise Unclear
    request = rows.request[starts]
    joined = Rows(
        line=rows.line[starts],
        layer=rows.layer[starts],
        ids=_distinct(rows.ids[:used].reshape(-1, each)),
        request=request,
        # numbered by first appearance, so that those of rows left out come last
        names=None if rows.names is None else rows.names[: int(request.max()) + 1],
        position=None if rows.position is None else rows.position[starts],
        phase=None if rows.phase is None else rows.phase[starts],
        step=None if rows.step is None else rows.step[starts],
    )
    return joined, used


class _Cells:
    """Where the cells of a block stand: ``starts`` and ``ends`` are ``[row, column]`` offsets into ``text``."""

    def __init__(self, data: bytes, line: int, layout: Layout) -> None:
        data.decode()
        # with a line end on both sides no cell needs to be treated differently
        self._data = data = b"\n" + data + (b"" if data.endswith(b"\n") else b"\n")
        self.text: Bytes = np.frombuffer(data, np.uint8)
        self._line, self._quoted = line, b'"' in data
        if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
            raise Unclear
        newline = self.text == _NEWLINE
        edge = newline | (self.text == ord(layout.delimiter))
        if self._quoted:
            edge &= ~self._inside_quotes(edge)
        self.edges: Offsets = np.flatnonzero(edge)
        num_rows = (len(self.edges) - 1) // layout.width
        at_ends = newline[self.edges]
        # every width-th edge is a line end, and no other is
        if not at_ends[:: layout.width].all() or np.count_nonzero(at_ends) != num_rows + 1:
            raise Unclear
        shape = (num_rows, layout.width)
        self.starts, self.ends = (self.edges[:-1] + 1).reshape(shape), self.edges[1:].reshape(shape).copy()
        self.ends[:, -1] -= self.text[self.ends[:, -1] - 1] == _RETURN
        if (self.ends - self.starts).max() > csv.field_size_limit():
            raise Unclear

    def _inside_quotes(self, edge: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Mark what stands inside quotes; quotes that do not enclose a whole cell are not understood."""
        quote = self.text == _QUOTE
        at = np.flatnonzero(quote)
        opening, closing = at[0::2], at[1::2]
        if len(opening) != len(closing):
            raise Unclear
        # two quotes side by side inside a cell stand for one: they close and open again
        before, after = opening - 1, closing + 1
        if not (edge[before] | quote[before]).all():
            raise Unclear
        if not (edge[after] | quote[after] | (self.text[after] == _RETURN)).all():
            raise Unclear
        return _between(at, quote.size)

    def lines(self) -> IntArray:
        """Line in which each row starts."""
        newlines = np.flatnonzero(self.text == _NEWLINE) if self._quoted else self.edges[:0]
        if len(newlines) <= len(self.starts) + 1:
            return np.arange(self._line, self._line + len(self.starts))
        return np.searchsorted(newlines, self.starts[:, 0]) + (self._line - 1)

    def spans(self, columns: int | slice | list[int]) -> tuple[Offsets, Offsets]:
        """Starts and ends of the content of cells, which leaves out the quotes around it."""
        starts, ends = self.starts[:, columns], self.ends[:, columns]
        if not self._quoted:
            return starts, ends
        opened = self.text[starts] == _QUOTE
        return starts + opened, ends - opened

    def column(self, index: int) -> npt.NDArray[np.int64]:
        """Whole numbers of a column."""
        return self.integers(index).astype(np.int64, copy=False)

    def integers(self, columns: int | slice | list[int]) -> IntArray:
        """Whole numbers in cells."""
        starts, ends = self.spans(columns)
        if self.text[starts.flat[0]] == _SPACE:
            starts = starts + (self.text[starts] == _SPACE)
        negative = self.text[starts] == _MINUS
        if not negative.any():
            return _numbers(self.text, starts, ends)
        return np.where(negative, -1, 1) * _numbers(self.text, starts + negative, ends)

    def texts(self, column: int) -> tuple[list[str], list[str]]:
        """Texts of a column without the space around them: the distinct ones in order of appearance, and each row's."""
        starts, ends = self.spans(column)
        raw = [self._data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        text_of = {cell: cell.decode().replace('""', '"').strip() for cell in dict.fromkeys(raw)}
        return list(dict.fromkeys(text_of.values())), list(map(text_of.__getitem__, raw))

    def lists(self, column: int) -> IntArray:
        """Lists of equally many ids in cells, ``[row, k]``."""
        starts, ends = self.spans(column)
        inside = _between(np.stack((starts, ends), axis=1).ravel(), self.text.size)
        if (inside & ~_IN_LIST.take(self.text)).any():
            raise Unclear
        digit = inside & ((self.text - ord("0")) < 10)
        bounds = np.flatnonzero(digit[1:] != digit[:-1]) + 1
        top_k, rest = divmod(len(bounds), 2 * len(starts))
        if not top_k or rest:
            raise Unclear
        begins, stops = bounds[0::2].reshape(-1, top_k), bounds[1::2].reshape(-1, top_k)
        if (begins[:, 0] < starts).any() or (stops[:, -1] > ends).any():
            raise Unclear
        return _numbers(self.text, begins, stops)

    def chosen(self, columns: slice | list[int]) -> IntArray:
        """Positions among ``columns`` of the scores above 0, equally many in every row, the highest first."""
        starts, ends = self.spans(columns)
        lengths = ends - starts
        # most scores are 0, which shows without reading them as numbers; JSON has numbers that are finite
        weights = np.add.reduceat(_WEIGHT.take(self.text), self.edges[:-1], dtype=np.int64) - 2
        weights = weights.reshape(self.starts.shape)[:, columns]
        row, expert = np.nonzero((weights > 1) | (lengths <= weights))
        spans = zip(starts[row, expert].tolist(), ends[row, expert].tolist(), strict=True)
        values = orjson.loads(b"[%b]" % b",".join([self._data[start:end] for start, end in spans]))
        if len(values) != len(row) or not set(map(type, values)) <= {int, float}:
            raise Unclear
        scores = np.array(values, np.float64)
        if (scores < 0).any():
            raise Unclear
        row, expert, scores = row[scores > 0], expert[scores > 0], scores[scores > 0]
        counts = np.bincount(row, minlength=len(starts))
        if not counts[0] or (counts != counts[0]).any():
            raise Unclear
        order = np.argsort(-scores.reshape(len(starts), -1), axis=1, kind="stable")
        return np.take_along_axis(expert.reshape(order.shape), order, axis=1)


def _between(bounds: Offsets, size: int) -> npt.NDArray[np.bool_]:
    """Mark what lies from the first bound to the second, from the third to the fourth, and so on."""
    lengths = np.diff(bounds, prepend=0, append=size)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def _numbers(text: Bytes, starts: Offsets, ends: Offsets) -> IntArray:
    """Numbers written in decimal digits from each start to its end."""
    lengths = ends - starts
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > _MAX_DIGITS:
        raise Unclear
    values = np.zeros(starts.shape, np.int32 if longest < 10 else np.int64)
    for place in range(longest, 0, -1):
        at = ends - place
        digit = text[at] - ord("0")
        if place > shortest:
            digit *= at >= starts
        # a byte below "0" has wrapped round to a large number
        if digit.max() > 9:
            raise Unclear
        values *= 10
        values += digit
    return values


def _ids(cells: _Cells, layout: Layout, limit: IdLimit) -> npt.NDArray[np.int32]:
    """Ids of every row, checked against the rules of a top-k."""
    numbered = _columns(layout.numbered)
    if layout.matrix:
        return cells.chosen(numbered).astype(np.int32)
    if layout.ids is not None:
        ids = cells.lists(layout.ids)
    elif layout.numbered:
        ids = cells.integers(numbered)
    else:
        ids = cells.integers([layout.expert or 0])
    if ids.min() < 0 or ids.max() >= limit.num_experts:
        raise Unclear
    return _distinct(ids.astype(np.int32, copy=False))


def _distinct(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    if first_bad_row(ids[:, None, :], IdLimit().num_experts) is not None:
        raise Unclear
    return ids


def _requests(cells: _Cells, parser: RowParser, position: IntArray | None) -> tuple[IntArray, tuple[str, ...] | None]:
    """Request of every row, and their names if they are not integers."""
    layout = parser.layout
    if layout.request is None:
        request = np.full(len(cells.starts), parser.sequence, np.int64)
        if layout.signed and position is not None:
            previous = np.concatenate(([parser.last], position[:-1]))
            request += np.cumsum((previous >= 0) & (position < 0))
        return request, None
    named = parser.named_requests
    if named is None:
        start, end = (int(offsets[0]) for offsets in cells.spans(layout.request))
        named = not INTEGER.fullmatch(cells.text[start:end].tobytes().decode().strip())
    if not named:
        return cells.column(layout.request), None
    names, texts = cells.texts(layout.request)
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[text] for text in texts], np.int64), tuple(names)


def _phases(cells: _Cells, column: int) -> npt.NDArray[np.uint8]:
    names, texts = cells.texts(column)
    number = {name: PHASES.get(name.lower()) for name in names}
    if None in number.values():
        raise Unclear
    return np.array([number[text] for text in texts], np.uint8)


def _columns(numbered: Sequence[int]) -> slice | list[int]:
    """Columns as a slice where they stand side by side: a view costs no copy."""
    if numbered and list(numbered) == list(range(numbered[0], numbered[0] + len(numbered))):
        return slice(numbered[0], numbered[0] + len(numbered))
    return list(numbered)
