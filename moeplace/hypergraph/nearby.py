r"""Copies of experts on several nodes, placed so that tokens are sent to few nodes other than their own.

A token is served on its own node wherever that holds a copy; an expert without one there is served by any of its
copies alike. With homes spread evenly over ``N`` nodes, ``M_e`` the nodes that hold expert ``e``, and every token of a
pattern ``T`` alike, the nodes it is sent to are on average

    1/N · Σ_h Σ_{n≠h} (1 - Π_{e∈T, h∉M_e} (1 - [n ∈ M_e]/|M_e|))

and each copy serves ``1/|M_e|`` of its expert's tokens. Slots of one layer are annealed on exactly that sum, and on the
loads of GPUs: two slots of different GPUs exchange what they hold, or a slot whose expert has other copies (or that is
empty) takes another expert. A node holds an expert at most once. Nodes are bits of a 64-bit word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.chains.anneal import LOG_LEVELS
from moeplace.counting import compile_kernel
from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.anneal import SEED_STEP, Schedule
from moeplace.hypergraph.patterns import Patterns
from moeplace.placement import EMPTY

MOST_NODES = 62
CLOSED = -2  # a slot that a GPU with fewer slots than others does not have
SAMPLED = 40  # exchanges
COMPILE_FROM = 100_000  # proposals times patterns of an expert: a second without compiling


class NodeAnnealer:
    """The patterns of one layer, ready for runs from any state.

    Parameters
    ----------
    patterns
        The layer's token patterns.
    load
        ``[expert]`` loads.
    rooms
        ``[node, GPU]`` slots of each.
    most
        Slots that may be in use; default: all.
    """

    def __init__(self, patterns: Patterns, load: Floats, rooms: Ints, most: int | None = None) -> None:
        self.patterns, self.load, self.rooms = patterns, np.asarray(load, np.float64), np.asarray(rooms)
        self.most = int(self.rooms.sum()) if most is None else most
        self.of, self.first = patterns.by_expert()
        self.experts = patterns.experts.astype(np.int32)
        self.weight = patterns.weight.astype(np.float64)
        self.tokens = patterns.load.astype(np.float64)

    def sent(self, slots: Ints) -> float:
        """Sum over tokens of the nodes each is sent to on average, for ``slots`` [GPU, slot]."""
        return float(self._sent(self._masks(slots)) @ self.weight)

    def busy(self, slots: Ints) -> Floats:
        """``[GPU]`` loads."""
        held = slots >= 0
        count = np.bincount(slots[held], minlength=self.patterns.num_experts)
        share = self.load / np.maximum(count, 1)
        return np.where(held, share[np.maximum(slots, 0)], 0.0).sum(axis=1)

    def run(
        self, slots: Ints, cap: float, schedule: Schedule, seed: int, *, stop: Callable[[], bool] = lambda: False
    ) -> Ints:
        """Anneal from a state.

        Parameters
        ----------
        slots
            ``[GPU, slot]`` experts, :data:`~moeplace.placement.EMPTY` in free slots; no node holds one twice.
        cap
            Most load of a GPU.
        schedule
            Temperatures and prices.
        seed
            Of the run.
        stop
            Asked after every turn.

        Returns
        -------
        array
            The best state within the cap that was met, else the last one. Complexity: O(patterns of an expert · k) for
            each proposal on patterns without copies.
        """
        width, size = slots.shape[1], self.rooms.shape[1]
        slots = np.take_along_axis(slots, np.argsort(slots == EMPTY, axis=1, kind="stable"), axis=1)
        state = np.where(np.arange(width)[None, :] < self.rooms.reshape(-1, 1), slots, CLOSED).astype(np.int64).ravel()
        mask, busy, where = self._masks(slots), self.busy(slots), self._where(slots)
        cost = self._sent(mask)
        kernel = _compiled() if self._is_long(schedule) else _turn
        unit = self._spread(slots, mask, cost, seed)
        percent = max(0.01 * float(busy.sum()) / len(busy), 1e-300)
        heat, price = schedule.course(unit, percent)
        now = np.array([float(cost @ self.weight)])
        least = np.array([now[0] if (busy <= cap).all() else np.inf])
        best, word = state.copy(), np.array([max(1, (seed + 1) * SEED_STEP % 2**64)], np.uint64)
        scratch, free = np.zeros(len(busy)), np.array([self.most - int((slots >= 0).sum())])
        with np.errstate(over="ignore"):
            for turn in range(len(heat)):
                kernel(
                    self.experts, self.weight, self.of, self.first, self.load, self.tokens, cap, state, (width, size),
                    mask, where, cost, busy, scratch, free, now, best, least, schedule.swaps, heat[turn],
                    (price[turn], 0.1 / percent), LOG_LEVELS, word,
                )  # fmt: skip
                if stop():
                    break
        found = best if np.isfinite(least[0]) else state
        return np.maximum(found, EMPTY).reshape(slots.shape)

    def _is_long(self, schedule: Schedule) -> bool:
        each = len(self.of) / max(1, self.patterns.num_experts)
        return schedule.turns * schedule.swaps * each >= COMPILE_FROM

    def _masks(self, slots: Ints) -> Ints:
        """``[expert]`` bit sets of the nodes that hold a copy."""
        mask = np.zeros(self.patterns.num_experts, np.int64)
        for gpu, held in enumerate(slots):
            mask[held[held >= 0]] |= 1 << (gpu // self.rooms.shape[1])
        return mask

    def _where(self, slots: Ints) -> Ints:
        """``[expert, node]`` GPU that holds the node's copy, where there is one."""
        where = np.zeros((self.patterns.num_experts, len(self.rooms)), np.int64)
        for gpu, held in enumerate(slots):
            where[held[held >= 0], gpu // self.rooms.shape[1]] = gpu
        return where

    def _sent(self, mask: Ints) -> Floats:
        """``[pattern]`` nodes that a token of each is sent to."""
        cost = np.zeros(len(self.weight))
        loop = _compiled_costs() if len(cost) >= COMPILE_FROM // 500 else _cost_loop
        loop(self.experts, mask, len(self.rooms), cost)
        return cost

    def _spread(self, slots: Ints, mask: Ints, cost: Floats, seed: int) -> float:
        """Spread of the costs of random exchanges between nodes; that of one token where there is none."""
        rng, trial, found = np.random.default_rng(seed), mask.copy(), []
        state, width = slots.ravel(), slots.shape[1] * self.rooms.shape[1]
        for _ in range(SAMPLED):
            i, j = rng.integers(0, len(state), 2)
            a, b, g, h = state[i], state[j], i // width, j // width
            if a < 0 or b < 0 or a == b or g == h or mask[a] >> h & 1 or mask[b] >> g & 1:
                continue
            both = (1 << int(g)) | (1 << int(h))
            trial[:] = mask
            trial[a] ^= both
            trial[b] ^= both
            found.append(float((self._sent(trial) - cost) @ self.weight))
        return max(1.0, float(np.std(found))) if found else 1.0


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_turn, _exchange, _take, _give, _price, _change, _cost, _loose, _number)


@functools.cache
def _compiled_costs() -> Callable[..., None]:
    return compile_kernel(_cost_loop, _cost, _loose, _number)


def _cost_loop(experts: Any, mask: Any, nodes: int, cost: Any) -> None:
    """Write what tokens of every pattern are sent to."""
    for p in range(len(cost)):
        cost[p] = _cost(experts, mask, nodes, p)


def _turn(
    experts: Any, weight: Any, of: Any, first: Any, load: Any, tokens: Any, cap: float, state: Any, shape: Any,
    mask: Any, where: Any, cost: Any, busy: Any, scratch: Any, free: Any, now: Any, best: Any, least: Any,
    proposals: int, heat: float, prices: Any, logs: Any, random: Any,
) -> None:  # fmt: skip
    """Make proposals at one temperature; everything from ``state`` to ``least`` is changed in place."""
    slots, levels, word, nodes = len(state), len(logs) - 1, random[0], where.shape[1]
    (width, size), (price, bend) = shape, prices
    above = _price(busy, cap, bend)
    for _ in range(proposals):
        word ^= word << np.uint64(13)
        word ^= word >> np.uint64(7)
        word ^= word << np.uint64(17)
        draw = np.int64(word >> np.uint64(1))
        i, j = ((draw & 0xFFFFF) * slots) >> 20, (((draw >> 20) & 0xFFFFF) * slots) >> 20
        g, h, b = i // width, j // width, state[j]
        if b == -2:
            continue
        m, n = g // size, h // size
        taking = (draw >> 40) & 1 == 1
        scratch[:] = busy
        if taking:  # slot j takes another expert
            a = ((draw & 0xFFFFF) * len(mask)) >> 20
            if (b >= 0 and mask[b] & (mask[b] - 1) == 0) or (b < 0 and free[0] <= 0) or (mask[a] >> n) & 1:
                continue
            _take(load, mask, where, a, b, h, scratch)
            new_a, new_b = mask[a] | (1 << n), 0 if b < 0 else mask[b] ^ (1 << n)
        else:  # slots i and j exchange
            a = state[i]
            if g == h or a < 0 or a == b or (m != n and ((mask[a] >> n) & 1 or (b >= 0 and (mask[b] >> m) & 1))):
                continue
            _exchange(load, mask, a, b, g, h, scratch)
            both = 0 if m == n else (1 << m) | (1 << n)
            new_a, new_b = mask[a] ^ both, 0 if b < 0 else mask[b] ^ both
        after = _price(scratch, cap, bend)
        room = -heat * logs[(draw >> 51) & levels] - price * (after - above)
        if room + tokens[a] + (0.0 if b < 0 else tokens[b]) < 0:
            continue  # more than one node less for each token of both is out of reach
        old_a, old_b, change = mask[a], 0 if b < 0 else mask[b], 0.0
        if new_a != old_a:
            mask[a] = new_a
            if b >= 0:
                mask[b] = new_b
            change = _change(experts, weight, of, first, mask, nodes, cost, a, b, False)
        if change > room:
            mask[a] = old_a
            if b >= 0:
                mask[b] = old_b
            continue
        if new_a != old_a:
            _change(experts, weight, of, first, mask, nodes, cost, a, b, True)
        busy[:] = scratch
        above = after
        state[j], where[a, n] = a, h
        if taking:
            free[0] -= b < 0
        else:
            state[i] = b
            if b >= 0:
                where[b, m] = g
        now[0] += change
        if after == 0.0 and now[0] < least[0] - 1e-9:
            least[0] = now[0]
            best[:] = state
    random[0] = word


def _price(busy: Any, cap: float, bend: float) -> float:
    """What load above the cap costs, in units of load."""
    total = 0.0
    for k in range(len(busy)):
        if busy[k] > cap:
            over = busy[k] - cap
            total += over * (1.0 + over * bend)
    return total


def _exchange(load: Any, mask: Any, a: Any, b: Any, g: Any, h: Any, busy: Any) -> None:
    """Move the load of a copy of ``a`` from GPU ``g`` to ``h`` and of ``b`` back."""
    moved = load[a] / _number(mask[a])
    if b >= 0:
        moved -= load[b] / _number(mask[b])
    busy[g] -= moved
    busy[h] += moved


def _take(load: Any, mask: Any, where: Any, a: Any, b: Any, h: Any, busy: Any) -> None:
    """Share the load of ``a`` with a further copy on GPU ``h``, and that of ``b`` without its copy there."""
    copies = _number(mask[a])
    share = load[a] / (copies + 1)
    _give(mask[a], where[a], share - load[a] / copies, busy)
    busy[h] += share
    if b >= 0:
        copies = _number(mask[b])
        more = load[b] / (copies - 1)
        _give(mask[b], where[b], more - load[b] / copies, busy)
        busy[h] -= more


def _give(mask: Any, where: Any, amount: float, busy: Any) -> None:
    """Add to the load of every GPU that holds a copy."""
    node, rest = 0, mask
    while rest:
        if rest & 1:
            busy[where[node]] += amount
        rest >>= 1
        node += 1


def _change(
    experts: Any, weight: Any, of: Any, first: Any, mask: Any, nodes: int, cost: Any, a: Any, b: Any, keep: bool
) -> float:
    """How the sum of costs changes with the new masks of two experts; ``keep`` writes the new costs."""
    total = 0.0
    for place in range(first[a], first[a + 1]):
        p = of[place]
        sent = _cost(experts, mask, nodes, p)
        total += weight[p] * (sent - cost[p])
        if keep:
            cost[p] = sent
    if b >= 0:
        for place in range(first[b], first[b + 1]):
            p = of[place]
            both = False
            for j in range(experts.shape[1]):
                both = both or experts[p, j] == a
            if both:
                continue
            sent = _cost(experts, mask, nodes, p)
            total += weight[p] * (sent - cost[p])
            if keep:
                cost[p] = sent
    return total


def _cost(experts: Any, mask: Any, nodes: int, p: Any) -> float:
    """Nodes other than its own that a token of a pattern is sent to, mean over homes."""
    fixed, union = 0, 0
    if nodes == 2:  # it stays where its node holds all of its experts
        both = 3
        for j in range(experts.shape[1]):
            both &= mask[experts[p, j]]
        return 1.0 - 0.5 * ((both & 1) + (both >> 1))
    for j in range(experts.shape[1]):
        m = mask[experts[p, j]]
        if m & (m - 1) == 0:
            fixed |= m
        else:
            union |= m
    total = _number(fixed) * (nodes - 1.0)
    free = union & ~fixed
    if free:
        outside = nodes - _number(union)
        if outside > 0:
            total += outside * _loose(experts, mask, p, free, 0)
        rest = union
        while rest:
            home = rest & -rest
            rest ^= home
            total += _loose(experts, mask, p, free & ~home, home)
    return total / nodes


def _loose(experts: Any, mask: Any, p: Any, free: int, home: int) -> float:
    """Nodes of ``free`` that a token of a home is sent to on average, by its experts with several copies."""
    total = 0.0
    while free:
        node = free & -free
        free ^= node
        keep = 1.0
        for j in range(experts.shape[1]):
            m = mask[experts[p, j]]
            if m & node and m & home == 0 and m & (m - 1):
                keep *= 1.0 - 1.0 / _number(m)
        total += 1.0 - keep
    return total


def _number(mask: int) -> int:
    """Bits that are set."""
    total = 0
    while mask:
        mask &= mask - 1
        total += 1
    return total
