"""What every reader needs: options, the tally of bad rows, labels, defaults and the rules of one top-k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.trace import BLOCK_BYTES, MAX_EXPERTS, IntArray, Trace

Columns: TypeAlias = dict[str, npt.NDArray[Any]]

SHOWN_BAD_ROWS = 5
CACHE_BYTES = 256 << 20

NO_REQUEST = "request ids not given: all tokens belong to one request"
NO_POSITION = "token positions not given: tokens are numbered per request in the order of the file"
NO_PHASE = "phase not given: all tokens are taken as decode"


class ModelLike(Protocol):
    """What a reader needs to know of a model."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def num_experts(self) -> int:
        """Routed experts per MoE layer."""

    @property
    def top_k(self) -> int:
        """Experts a token chooses per MoE layer."""

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Absolute ids of the MoE layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderOptions:
    """How to read an input.

    Attributes
    ----------
    model
        The model the user names; None when the file must say everything.
    skip_bad
        How many bad rows may be left out; one more is an error.
    bad_files
        The same for files of a trace of many.
    block_bytes
        Expert ids per block of a stream.
    cache_bytes
        Expert ids kept in memory for a second pass over a file that can be opened again.
    """

    model: ModelLike | None = None
    skip_bad: int = 0
    bad_files: float = 0
    block_bytes: int = BLOCK_BYTES
    cache_bytes: int = CACHE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """One row that breaks the format."""

    what: str
    rule: str | None
    hint: str | None
    where: Location

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" (rule: {self.rule})" if self.rule else "")


class BadRows:
    """Tally of bad rows: keeps the first few to show, and raises when more than ``limit`` were met."""

    def __init__(self, limit: float) -> None:
        self.limit, self.count = limit, 0
        self.shown: list[BadRow] = []

    @property
    def full(self) -> bool:
        """True when an error is due and has all the rows it will show."""
        return self.count > self.limit and len(self.shown) >= SHOWN_BAD_ROWS

    def add(self, row: BadRow) -> None:
        """Count one bad row."""
        self.count += 1
        if len(self.shown) < SHOWN_BAD_ROWS:
            self.shown.append(row)

    def __add__(self, other: BadRows) -> BadRows:
        total = BadRows(self.limit)
        total.count = self.count + other.count
        rows = [*self.shown, *other.shown]
        total.shown = sorted(rows, key=lambda row: row.where.line or 0)[:SHOWN_BAD_ROWS]
        return total

    def check(self) -> None:
        """Raise :class:`TraceError` when there are more bad rows than may be skipped."""
        if self.count <= self.limit:
            return
        last = self.shown[-1]
        others = [str(row) for row in self.shown[:-1]]
        if self.limit:
            others.insert(0, f"more bad rows than the {self.limit:g} that may be skipped; the first {len(self.shown)}:")
        raise TraceError(last.what, rule=last.rule, hint=last.hint, where=last.where, others=others)

    def sentence(self) -> tuple[str, ...]:
        """Say how many rows were skipped, if any."""
        if not self.count:
            return ()
        rows = "1 bad row" if self.count == 1 else f"{self.count} bad rows"
        return (f"{rows} skipped; the first: {self.shown[0]}",)


class Labels:
    """Request or domain labels of a file: integers stay as they are, strings are numbered by first appearance."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self.kind: type | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The strings, by number."""
        return tuple(self._numbers)

    def accepts(self, values: Sequence[Any]) -> bool:
        """True when all are integers, or all strings, as those before."""
        kinds = set(map(type, values))
        return kinds in ({int}, {str}) and (self.kind is None or kinds == {self.kind})

    def numbers(self, values: Sequence[Any]) -> IntArray | None:
        """Numbers of labels that are accepted; None when an integer does not fit."""
        self.kind = type(values[0])
        if self.kind is int:
            return integer_column(values)
        for name in dict.fromkeys(values):
            self._numbers.setdefault(name, len(self._numbers))
        return np.fromiter(map(self._numbers.__getitem__, values), np.int64, len(values))


def integer_column(values: Sequence[Any]) -> IntArray | None:
    """Python integers as int64; None when one is not an integer or does not fit."""
    if set(map(type, values)) != {int}:
        return None
    try:
        return np.fromiter(values, np.int64, len(values))
    except OverflowError:
        return None


class RunningNumbers:
    """Running number of each occurrence of a key, for positions that a file does not give."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}

    def number(self, keys: IntArray) -> IntArray:
        """Number the occurrences of each key from where the last call ended. Complexity: O(n log n)."""
        unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        order = np.argsort(inverse, kind="stable")
        firsts = np.repeat(np.cumsum(counts) - counts, counts)
        numbers = np.empty(keys.size, np.int64)
        numbers[order] = np.arange(keys.size) - firsts
        starts = np.array([self._next.get(int(key), 0) for key in unique], np.int64)
        self._next.update(zip(unique.tolist(), (starts + counts).tolist(), strict=True))
        return np.asarray(numbers + starts[inverse])


def changes(*keys: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Mark the elements that differ from the one before in any of the keys; the first one does."""
    marks = np.zeros(len(keys[0]), np.bool_)
    marks[:1] = True
    for key in keys:
        marks[1:] |= key[1:] != key[:-1]
    return marks


@dataclass(frozen=True, slots=True, kw_only=True)
class IdLimit:
    """How many experts a layer has, and who says so; by default what is accepted while nobody has said it."""

    num_experts: int = MAX_EXPERTS
    source: str = f"at most {MAX_EXPERTS} experts are supported"
    from_model: bool = False


def top_k_problem(ids: Sequence[int], limit: IdLimit) -> tuple[int, str, str, str] | None:
    """Find what is wrong with one top-k of integers: its index, what, rule and hint; None when all is well."""
    for i, expert in enumerate(ids):
        rule = f"ids lie in 0..{limit.num_experts - 1}: {limit.source}"
        if expert < 0:
            return i, f"expert {expert}", rule, "recorders pad with -1: leave padding tokens out"
        if expert >= limit.num_experts:
            hint = (
                "is --model the model that was recorded?"
                if limit.from_model
                else "correct num_experts, or map physical slot ids to logical experts first"
            )
            return i, f"expert {expert}", rule, hint
    for i, expert in enumerate(ids):
        if expert in ids[:i]:
            return (
                i,
                f"expert {expert} stands twice in the top-k {list(ids)}",
                f"the {len(ids)} experts of a token differ",
                "padding or physical slot ids do this: record logical experts without padding",
            )
    return None


def frozen_columns(parts: Sequence[Columns]) -> Columns:
    """Join columns end to end and make them read-only, so that a :class:`~moeplace.trace.Trace` need not copy them."""
    joined = dict(parts[0]) if len(parts) == 1 else {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
    for column in joined.values():
        column.setflags(write=False)
    return joined


def trace_bytes(block: Trace) -> int:
    """Bytes of a block's columns."""
    columns = (block.experts, block.request, block.position, block.phase, block.step, block.rank, block.domain)
    return sum(column.nbytes for column in columns if column is not None)
