"""A trace out of blocks of columns: what is common to readers that turn their format into columns first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from moeplace.errors import InputError, Location, TraceError
from moeplace.files import InputFile, InputFolder
from moeplace.readers._blocks import KeptBlocks
from moeplace.readers._common import BadRow, BadRows, Columns, ReaderOptions, frozen_columns, top_k_problem, trace_bytes
from moeplace.readers._meta import Shape
from moeplace.trace import COLUMNS, MAX_EXPERTS, IntArray, Trace, TraceMeta


class ColumnStream(ABC):
    """A trace, block by block, over the columns that a format's parser yields.

    A subclass settles the shape's top-k and, unless it does so in :meth:`_settle_scan`, its layers before the first
    block. When nobody says how many experts there are, the input is walked once first; a walk over blocks that do not
    fit the cache parses the input again.
    """

    repeated_hint: str | None = None

    def __init__(self, source: InputFile | InputFolder, options: ReaderOptions, shape: Shape) -> None:
        self._source, self._options, self._shape = source, options, shape
        self._keep_bytes = options.cache_bytes if source.can_reopen else None
        self._row_bad = BadRows(options.skip_bad)
        self._skipped: tuple[str, ...] = ()
        self._scanned: KeptBlocks[Columns] | None = None

    @abstractmethod
    def _rows(self) -> Iterator[Columns]:
        """Walk the input: columns of complete tokens, and what :meth:`_place` needs; bad rows go to ``_row_bad``."""

    @abstractmethod
    def _place(self, columns: Columns, token: int, layer: int) -> Location:
        """Where the ids of a token (a row of a block) and layer (an index of its layers) stand in the input."""

    def _scan(self, columns: Columns) -> None:
        """Look at a block of the walk that finds the number of experts."""
        return

    def _settle_scan(self) -> None:
        """Settle what that walk has shown."""
        return

    def _selected(self, columns: Columns) -> Columns:
        """Return a block with the layers that are kept."""
        return columns

    def _names(self) -> dict[str, tuple[str, ...]]:
        """Domains and request names, complete once the blocks have been walked."""
        return {}

    @property
    def meta(self) -> TraceMeta:
        """The model's shape; names and skipped rows are complete once the blocks have been walked."""
        return self._shape.build(extra=self._skipped, **self._names())

    def blocks(self) -> Iterator[Trace]:
        """Yield consecutive blocks of tokens."""
        yield from self._blocks
        if self._blocks.complete:
            self._scanned = None

    def _start(self) -> None:
        """Learn what is not declared and read the first block."""
        if self._shape.num_experts is None:
            largest = 0
            self._scanned = KeptBlocks(self._rows, columns_bytes, self._keep_bytes)
            for columns in self._scanned:
                largest = max(largest, _largest_id(columns))
                self._scan(columns)
            self._shape.set_num_experts(largest)
            self._settle_scan()
        self._blocks = KeptBlocks(self._tokens, trace_bytes, self._keep_bytes)
        next(iter(self._blocks), None)

    def _tokens(self) -> Iterator[Trace]:
        bad, tokens = BadRows(self._options.skip_bad), 0
        for columns in self._rows() if self._scanned is None else self._scanned:
            block = self._screened(self._selected(columns), bad)
            (self._row_bad + bad).check()
            tokens += block.num_tokens
            if block.num_tokens:
                yield block
        total = self._row_bad + bad
        total.check()
        self._skipped = total.sentence()
        if not tokens:
            raise TraceError(
                "holds no routed tokens", rule="a trace has at least one token", where=Location(file=self._source.name)
            )

    def _screened(self, columns: Columns, bad: BadRows) -> Trace:
        """Return the good tokens of a block and tally the bad ones."""
        own = {name: column for name, column in columns.items() if name in COLUMNS}
        try:
            return Trace(meta=self.meta, **own)
        except TraceError:
            ids = columns["experts"]
        ordered = np.sort(ids, axis=-1)
        wrong = (ordered[..., 0] < 0) | (ordered[..., -1] >= self._shape.limit.num_experts)
        wrong |= (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
        for token in np.flatnonzero(wrong.any(axis=1)).tolist():
            bad.add(self._bad_token(columns, token, int(wrong[token].argmax())))
            if bad.full:
                break
        bad.check()
        good = ~wrong.any(axis=1)
        return Trace(meta=self.meta, **{name: column[good] for name, column in own.items()})

    def _bad_token(self, columns: Columns, token: int, layer: int) -> BadRow:
        ids = columns["experts"][token, layer].tolist()
        where = self._place(columns, token, layer)
        problem = top_k_problem(ids, self._shape.limit)
        if problem is None:
            return BadRow(what=f"experts {ids}", rule=None, hint=None, where=where)
        _, what, rule, hint = problem
        if "twice" in what and self.repeated_hint:
            hint = self.repeated_hint
        return BadRow(what=what, rule=rule, hint=hint, where=where)


class BlockBuilder:
    """Joins columns of a few tokens each into blocks of about ``block_bytes`` of expert ids."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes, self._bytes = block_bytes, 0
        self._parts: list[Columns] = []

    def add(self, columns: Columns) -> Columns | None:
        """Take columns in; return a block when one is full."""
        self._parts.append(columns)
        self._bytes += columns["experts"].nbytes
        return self.rest() if self._bytes >= self._block_bytes else None

    def rest(self) -> Columns | None:
        """Return what has been taken in since the last block."""
        parts, self._parts, self._bytes = self._parts, [], 0
        return frozen_columns(parts) if parts else None


def blocks_of(parts: Iterable[Columns], num_ids: int) -> Iterator[Columns]:
    """Cut parts of rows, joined end to end, into blocks of the fewest rows that have ``num_ids`` expert ids."""
    kept: list[Columns] = []
    num_kept = 0
    for part in parts:
        num_rows, start = len(part["experts"]), 0
        size = -(-num_ids * num_rows // part["experts"].size)
        while num_kept + num_rows - start >= size:
            end = start + size - num_kept
            yield frozen_columns([*kept, {name: column[start:end] for name, column in part.items()}])
            kept, num_kept, start = [], 0, end
        if start < num_rows:
            kept.append({name: column[start:] for name, column in part.items()})
            num_kept += num_rows - start
    if kept:
        yield frozen_columns(kept)


def tally(bad: BadRows, error: InputError, file: str) -> None:
    """Count an error of a part of the input as a bad row; raise when there are more than may be skipped."""
    where = error.where if isinstance(error.where, Location) else Location(file=file)
    bad.add(BadRow(what=error.what, rule=error.rule, hint=error.hint, where=where))
    if bad.full:
        bad.check()


def within(where: Location, element: str) -> Location:
    """Name an element at a place of a file."""
    return replace(where, element=element)


def columns_bytes(columns: Columns) -> int:
    """Bytes of a block's columns."""
    return sum(column.nbytes for column in columns.values())


def _largest_id(columns: Columns) -> int:
    ids: IntArray = columns["experts"]
    if ids.dtype != np.uint8:
        ids = ids[(ids >= 0) & (ids < MAX_EXPERTS)]
    return int(ids.max()) if ids.size else 0
