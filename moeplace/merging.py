"""What statistics of parts are made of so that they merge: tables that grow, sets of numbers, samples of fixed size.

All are commutative and associative: parts can be merged in any order and any grouping with the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplace.fingerprint import Hashes

Array: TypeAlias = npt.NDArray[Any]

SORT_FROM = 4096  # fewer waiting numbers are not worth a sort


def grown(table: Array, shape: tuple[int, ...]) -> Array:
    """Return ``table`` with zeros behind it along every axis that is shorter than ``shape``'s."""
    width = [(0, max(0, wanted - have)) for have, wanted in zip(table.shape, shape, strict=True)]
    return np.pad(table, width) if any(more for _, more in width) else table


def summed(left: Array, right: Array) -> Array:
    """Add two tables of counts, the missing rows, columns, … of either being zeros; ``left`` may be reused."""
    left = grown(left, right.shape).astype(np.int64, copy=False)
    left[tuple(slice(size) for size in right.shape)] += right
    return left


def packed(table: Array) -> Array:
    """Return a table of counts in the smallest type that holds them, to be kept or sent."""
    return table.astype(np.min_scalar_type(int(table.max(initial=0))), copy=False)


class DistinctNumbers:
    """Whole numbers, each once. What adding some costs does not depend on how many there are.

    They are sorted in when as many wait as are sorted. Complexity: O(log n) for each number, on average.

    Parameters
    ----------
    values
        The first ones, sorted, each once.
    """

    def __init__(self, values: Array | None = None) -> None:
        self._sorted = np.zeros(0, np.int64) if values is None else values
        self._waiting: list[Array] = []
        self._num_waiting = 0

    def add(self, values: Array) -> None:
        """Add numbers, in any order."""
        self._waiting.append(values)
        self._num_waiting += len(values)
        if self._num_waiting > max(SORT_FROM, len(self._sorted)):
            self.values()

    def merge(self, other: DistinctNumbers) -> None:
        """Add another's numbers."""
        self.add(other.values())

    def values(self) -> Array:
        """Return all of them, sorted, each once."""
        if self._waiting:
            self._sorted = np.unique(np.concatenate([self._sorted, *self._waiting]))
            self._waiting, self._num_waiting = [], 0
        return self._sorted


class RowSample:
    """The ``size`` rows of lowest priority among all that were offered, with their columns.

    With well-mixed priorities it is a uniform sample, and the same however the rows are divided and merged. A column
    that some rows lack is left out. Memory: twice ``size`` rows.

    Attributes
    ----------
    threshold
        Rows of a higher priority than this will not be kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: list[dict[str, Array]] = []
        self._held = 0
        self.threshold = np.iinfo(np.uint64).max

    def add(self, priority: Hashes, columns: Mapping[str, Array]) -> None:
        """Offer rows: ``priority`` [row], and ``columns`` with one entry per row each."""
        keep = priority <= self.threshold
        whole = bool(keep.all())
        self._hold({name: column if whole else column[keep] for name, column in {**columns, "": priority}.items()})

    def merge(self, other: RowSample) -> None:
        """Offer another sample's rows."""
        for part in other._parts:
            self.add(part[""], {name: column for name, column in part.items() if name})

    def columns(self) -> dict[str, Array]:
        """Return the columns of the rows kept, in no particular order; empty when no row was offered."""
        return {name: column for name, column in self._joined().items() if name}

    def state(self) -> dict[str, Array]:
        """Return the rows kept as arrays, for :meth:`restored`."""
        return {name or "priority": column for name, column in self._joined().items()}

    @classmethod
    def restored(cls, size: int, state: Mapping[str, Array]) -> RowSample:
        """Return the sample that a state was taken of."""
        sample = cls(size)
        if state:
            sample.add(state["priority"], {name: column for name, column in state.items() if name != "priority"})
        return sample

    def _hold(self, part: dict[str, Array]) -> None:
        self._parts.append(part)
        self._held += len(part[""])
        if self._held > 2 * self.size:
            self._parts = [self._joined()]

    def _joined(self) -> dict[str, Array]:
        if not self._parts:
            return {}
        common = [name for name in self._parts[0] if all(name in part for part in self._parts)]
        joined = {name: np.concatenate([part[name] for part in self._parts]) for name in common}
        if self._held > self.size:
            best = np.argpartition(joined[""], self.size - 1)[: self.size]
            joined = {name: column[best] for name, column in joined.items()}
            self._parts = [joined]  # first: stopped here by a signal, the rows are still those of the sample
            self._held, self.threshold = self.size, joined[""].max()
        self._parts = [joined]
        return joined
