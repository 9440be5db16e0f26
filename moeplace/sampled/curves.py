"""What a layer gains by so many moved copies, and the best sharing of a budget of moves among layers.

For every number of moved copies a few of the best placements found are kept (beam search; Lowerre, PhD thesis, Carnegie
Mellon 1976); every swap of each leads to one with as many, one more or two more. Swaps that pass on a copy that has
moved already make cycles of three and more. The budget is then shared by dynamic programming over layers (knapsack with
one choice from each class; Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, ch. 11), exactly for these curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.placement import Placement
from moeplace.sampled.improve import COMPILE_FROM, LayerItems, Search, finite_cap
from moeplace.sampled.kernel import compiled_judge, judge_swaps
from moeplace.sampled.tables import StepTables, layer_times

ROUNDS = 3  # of swaps that move no more copies than before


@dataclass(frozen=True, slots=True)
class Curve:
    """One layer: ``values[m]``, least mean of its steps with ``m`` moved copies, infinite without any; its slots."""

    values: Floats
    slots: tuple[Ints | None, ...]


def gain_curves(tables: StepTables, base: Placement, search: Search, *, most: int, width: int) -> tuple[Curve, ...]:
    """Search every layer for the least mean of its steps with up to ``most`` copies away from where they were.

    Parameters
    ----------
    tables
        What experts add in every step.
    base
        Where copies are.
    search
        Loads, caps and threads.
    most, width
        Moved copies of a layer, and placements kept for each number of them.

    Returns
    -------
    tuple
        A curve for each layer. Complexity: O(layers · most · width · slots² · steps).
    """
    steps = tables.rows.shape[2]
    many = base.num_layers * most * width * base.max_slots**2 * base.num_gpus**2 * steps >= COMPILE_FROM
    judge = compiled_judge() if many else judge_swaps

    def layer_curve(layer: int) -> Curve:
        state = LayerItems(base.slots[layer], search.room, tables, layer, search.load[layer])
        return _Beam(state, search.cap[layer], most, width).run(judge, base.max_slots, search)

    with ThreadPoolExecutor(max(1, search.threads)) as pool:
        return tuple(pool.map(layer_curve, range(base.num_layers)))


class _Beam:
    """One layer's placements by moved copies, each by the GPUs of its items."""

    def __init__(self, state: LayerItems, cap: float, most: int, width: int) -> None:
        self.state, self.most, self.width = state, most, width
        self.work, _, self.load, _ = state.arrays()
        self.cap = finite_cap(cap)
        held = np.zeros((state.gpus, len(state.load) + 1), bool)
        held[state.where, state.expert] = True  # the last column is that of empty slots
        # whether an item has moved when it is on a GPU
        self.away = np.ascontiguousarray(~held[:, state.expert].T & (state.expert[:, None] >= 0)).astype(np.int64)
        self.known: list[dict[bytes, float]] = [{} for _ in range(most + 1)]

    def run(self, judge: object, slots: int, search: Search) -> Curve:
        """Fill the numbers of moved copies from none upwards."""
        usage = self._usage(self.state.where)
        self.known[0][self.state.where.tobytes()] = float(layer_times(usage).mean())
        for moved in range(self.most + 1):
            done: set[bytes] = set()
            for _ in range(ROUNDS):
                best = self._best(moved)
                fresh = [(key, value) for key, value in best if key not in done]
                if not fresh or search.stop():
                    break
                for key, value in fresh:
                    done.add(key)
                    self._spread(judge, key, value, moved)
        values, found = np.full(self.most + 1, np.inf), []
        for moved in range(self.most + 1):
            first = self._best(moved)[:1]
            values[moved] = first[0][1] if first else np.inf
            found.append(self._slots(first[0][0], slots) if first else None)
        return Curve(values, tuple(found))

    def _best(self, moved: int) -> list[tuple[bytes, float]]:
        """Return the best of a number of moved copies, and forget the others."""
        kept = sorted(self.known[moved].items(), key=lambda entry: (entry[1], entry[0]))[: self.width]
        self.known[moved] = dict(kept)
        return kept

    def _spread(self, judge: object, key: bytes, value: float, moved: int) -> None:
        """Add the best swaps of a placement to what is known."""
        where = np.frombuffer(key, np.int64).copy()
        usage, items = self._usage(where), len(where)
        busy = np.bincount(where, self.load, self.state.gpus).astype(np.float64)
        change, more = np.full((items, items), np.inf), np.zeros((items, items), np.int64)
        weights = np.full(usage.shape[2], 1 / usage.shape[2])
        assert callable(judge)
        judge(
            self.work, where, self.state.codes(), usage, weights, self.load, busy, self.cap, self.away, (change, more)
        )
        for extra in range(min(2, self.most - moved) + 1):
            limit = 0.0 if extra == 0 else np.inf
            pairs = np.flatnonzero((more == extra) & (change < limit))
            first = pairs[np.argsort(change.ravel()[pairs], kind="stable")[: self.width]]
            for a, c in zip(*np.unravel_index(first, change.shape), strict=True):
                other = where.copy()
                other[a], other[c] = where[c], where[a]
                self.known[moved + extra].setdefault(other.tobytes(), value + float(change[a, c]))

    def _usage(self, where: Ints) -> np.ndarray:
        usage = self.state.tables.base(self.state.gpus)
        np.add.at(usage, where, self.work)
        return usage

    def _slots(self, key: bytes, width: int) -> Ints:
        own = self.state.where
        self.state.where = np.frombuffer(key, np.int64)
        slots = self.state.slots(width)
        self.state.where = own
        return slots


def share_moves(curves: Sequence[Curve], budget: int) -> tuple[list[int], float]:
    """Return the moved copies of every layer whose sum of values is least within a budget, and the price of a move.

    The price is what each of the last moves of the budget gains. Complexity: O(layers · budget · most).
    """
    least = np.concatenate([[0.0], np.full(budget, np.inf)])
    choices = []
    for curve in curves:
        best, chosen = np.full(budget + 1, np.inf), np.zeros(budget + 1, np.int64)
        for moved, value in enumerate(curve.values.tolist()):
            if moved > budget or not np.isfinite(value):
                continue
            here = least[: budget + 1 - moved] + value
            better = here < best[moved:]
            best[moved:][better], chosen[moved:][better] = here[better], moved
        least = best
        choices.append(chosen)
    left, shares = int(least.argmin()), []
    few = max(0, left - max(1, budget // 10))
    fewer = float(least[: few + 1].min())
    price = (fewer - float(least[left])) / max(1, left - few)
    for chosen in reversed(choices):
        shares.append(int(chosen[left]))
        left -= shares[-1]
    return shares[::-1], price
