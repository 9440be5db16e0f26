"""Placements improved on the mean of sampled steps, layer by layer, spare slots passed on from expert to expert."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moeplace.chains.instance import UNLIMITED
from moeplace.frozen import Floats, Ints
from moeplace.placement import EMPTY, Placement
from moeplace.sampled.kernel import SINGLE, compiled_mean, descend_and_kick
from moeplace.sampled.tables import StepTables

COMPILE_FROM = 2_000_000  # swaps times steps
REPLICA_KICKS = 0.25  # of all kicks, where slots are spare
TAIL = 0.05
PASSES = 4  # over all swaps, from one kick to the next


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search may do, and what it keeps.

    Attributes
    ----------
    load, cap
        ``[layer, expert]`` mean loads and ``[layer]`` most load of a GPU (infinite without a cap).
    room
        ``[GPU]`` slots.
    kicks, budget
        Kicks of each layer and swaps it may judge.
    seed, threads
        Of the kicks; threads do not change the result.
    stop
        Asked between layers.
    moving
        ``[layer, GPU, expert]`` cost of a copy there, beside the risk; None without.
    """

    load: Floats
    cap: Floats
    room: Ints
    kicks: int
    budget: int
    seed: int
    threads: int
    stop: Callable[[], bool]
    moving: Floats | None = None

    @property
    def swaps(self) -> int:
        """Swaps a layer may come to, about: small layers end long before the budget."""
        items = int(self.room.sum())
        return min(self.budget, PASSES * (self.kicks + 1) * items * items // 2)


class LayerItems:
    """One layer's slots as items: the expert of each (-1 for none) and its GPU."""

    def __init__(self, slots: Ints, room: Ints, tables: StepTables, layer: int, load: Floats) -> None:
        self.tables, self.layer, self.load = tables, layer, load
        self.where = np.repeat(np.arange(len(room)), room)
        self.expert = np.full(len(self.where), EMPTY, np.int64)
        first = np.cumsum(room) - room
        for g, row in enumerate(slots):
            held = row[row != EMPTY]
            self.expert[first[g] : first[g] + len(held)] = held
        self.gpus = len(room)

    @property
    def copies(self) -> Ints:
        """``[expert]`` copies."""
        return np.bincount(self.expert[self.expert >= 0], minlength=len(self.load))

    def codes(self) -> Ints:
        """``[item]`` experts as the kernels take them."""
        single = (self.expert >= 0) & (self.copies[np.maximum(self.expert, 0)] == 1)
        return self.expert + single * SINGLE

    def arrays(self) -> tuple[np.ndarray, np.ndarray, Floats, Floats]:
        """``work``, ``usage``, ``load`` of items and ``busy`` of GPUs, as the kernels take them."""
        copies = self.copies
        work = self.tables.work(self.layer, self.expert, copies)
        usage = self.tables.base(self.gpus)
        np.add.at(usage, self.where, work)
        load = np.where(self.expert < 0, 0.0, (self.load / np.maximum(copies, 1))[np.maximum(self.expert, 0)])
        return work, usage, load, np.bincount(self.where, load, self.gpus).astype(np.float64)

    def slots(self, width: int) -> Ints:
        """``[GPU, slot]`` experts."""
        slots = np.full((self.gpus, width), EMPTY, np.int64)
        for g in range(self.gpus):
            held = self.expert[(self.where == g) & (self.expert >= 0)]
            slots[g, : len(held)] = np.sort(held)
        return slots


def improve_mean(tables: StepTables, placement: Placement, weights: Floats, search: Search) -> Placement:
    """Return the placement of :func:`improve_mean_layers`."""
    return improve_mean_layers(tables, placement, weights, search)[0]


def improve_mean_layers(
    tables: StepTables, placement: Placement, weights: Floats, search: Search
) -> tuple[Placement, Floats]:
    """Lower the weighted sum over steps of the busiest GPU's time, in every layer by itself.

    Slots are passed on from expert to expert where some are spare, unless copies have a cost of where they are.

    Parameters
    ----------
    tables
        What experts add in every step.
    placement
        Where to start; the result is never worse.
    weights
        ``[batch]`` weights of the steps.
    search
        Limits.

    Returns
    -------
    tuple
        The placement, and each layer's sum, with the cost of where its copies are. Complexity: O(layers ·
        budget · batches), but few of the batches are looked at for most swaps.
    """
    layers, batches = placement.num_layers, len(weights)
    many = layers * search.swaps * batches >= COMPILE_FROM
    kernel = compiled_mean() if many else descend_and_kick

    def improve(layer: int) -> tuple[Ints, float]:
        state = LayerItems(placement.slots[layer], search.room, tables, layer, search.load[layer])
        moving = np.zeros((0, 0)) if search.moving is None else moving_costs(search, layer, state)
        word = np.array([(search.seed * 1_000_003 + layer + 1) * 0x9E3779B97F4A7C15 % 2**64 | 1], np.uint64)
        rng = np.random.default_rng([search.seed, layer])
        spare = len(state.expert) > len(state.load) and search.moving is None
        rounds = max(1, round(REPLICA_KICKS * search.kicks)) if spare else 0
        # half of the work goes to places, the rest to who has copies
        budget = search.budget // (2 * rounds) if rounds else 0
        first = 0 if search.stop() else search.budget - rounds * budget
        best = _run(kernel, state, (weights, moving), search.cap[layer], search.kicks if not spare else 0, first, word)
        for _ in range(rounds):
            other = _recopied(state, rng)
            if other is None or search.stop():
                continue
            value = _run(kernel, other, (weights, moving), search.cap[layer], 0, budget, word)
            if value < best:
                state, best = other, value
        return state.slots(placement.max_slots), best

    with np.errstate(over="ignore"), ThreadPoolExecutor(search.threads) as pool:
        slots, values = zip(*pool.map(improve, range(layers)), strict=True)
    return Placement(slots=np.stack(slots), num_experts=placement.num_experts), np.array(values)


def moving_costs(search: Search, layer: int, state: LayerItems) -> Floats:
    """``[item, GPU]`` cost of every item of a layer there, nothing without costs of moving."""
    if search.moving is None:
        return np.zeros((len(state.expert), state.gpus))
    costs = search.moving[layer][:, np.maximum(state.expert, 0)].T
    return np.ascontiguousarray(np.where(state.expert[:, None] < 0, 0.0, costs))


def finite_cap(cap: float) -> float:
    """Return a cap that arithmetic can go by, where there may be none."""
    return float(cap) if np.isfinite(cap) else UNLIMITED


def _run(
    kernel: Callable[..., float],
    state: LayerItems,
    costs: tuple[Floats, Floats],
    cap: float,
    kicks: int,
    budget: int,
    word: np.ndarray,
) -> float:
    work, usage, load, busy = state.arrays()
    top, (weights, moving) = finite_cap(cap), costs
    value = kernel(work, state.where, state.codes(), usage, weights, load, busy, top, moving, kicks, budget, word)
    return value if busy.max() <= top * (1 + 1e-9) else np.inf


def _recopied(state: LayerItems, rng: np.random.Generator) -> LayerItems | None:
    """Return the layer with one slot passed on: a copy too many, or an empty slot, becomes a copy of another expert."""
    copies = state.copies
    given = np.flatnonzero((state.expert < 0) | (copies[np.maximum(state.expert, 0)] > 1))
    if not len(given):
        return None
    item = int(rng.choice(given))
    chance = state.load / (copies + 1.0)
    held = state.expert[(state.where == state.where[item])]
    chance[held[held >= 0]] = 0.0
    if not chance.sum() > 0:
        return None
    other = object.__new__(LayerItems)
    other.tables, other.layer, other.load, other.gpus = state.tables, state.layer, state.load, state.gpus
    other.where, other.expert = state.where.copy(), state.expert.copy()
    other.expert[item] = int(rng.choice(len(chance), p=chance / chance.sum()))
    return other
