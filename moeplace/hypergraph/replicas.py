"""Copies of experts placed so that tokens visit few GPUs when each goes where the fewest GPUs serve it.

A token's cost is the size of the smallest set of GPUs on which all of its experts have a copy
(:mod:`moeplace.fanout`). Slots of one layer are annealed on the exact sum over token patterns: two slots of different
GPUs exchange what they hold, or a slot whose expert has other copies (or that is empty) takes another expert. A
proposal looks at the patterns of the experts it touches; their loads, which cost more to tell, are looked at only
where the copies saved could pay for them. The load of GPUs is that of tokens which share evenly between equals: learnt
weights (:func:`moeplace.fanout.learn_weights`) lower its maximum, so the cap is met or nearly met before they are.

GPUs are bits of a 64-bit word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.chains.anneal import LOG_LEVELS
from moeplace.counting import compile_kernel
from moeplace.frozen import Ints
from moeplace.hypergraph.anneal import SEED_STEP, Schedule
from moeplace.hypergraph.patterns import Patterns
from moeplace.placement import EMPTY

MOST_GPUS = 62
CLOSED = -2  # a slot that a GPU with fewer slots than others does not have
SAMPLED = 400
COMPILE_FROM = 100_000  # proposals times patterns of an expert: a second without compiling


class CopyAnnealer:
    """The patterns of one layer, ready for runs from any state.

    Parameters
    ----------
    patterns
        The layer's token patterns.
    room
        ``[GPU]`` slots of each.
    """

    def __init__(self, patterns: Patterns, room: Ints) -> None:
        self.patterns, self.room = patterns, np.asarray(room)
        flat = patterns.experts.ravel()
        order = np.argsort(flat, kind="stable")
        self.of = (order // patterns.top_k).astype(np.int32)
        self.first = np.searchsorted(flat[order], np.arange(patterns.num_experts + 1)).astype(np.int64)
        self.experts = patterns.experts.astype(np.int32)
        self.weight = patterns.weight.astype(np.int64)

    def copies(self, slots: Ints) -> int:
        """Sum over tokens of the GPUs each visits, for ``slots`` [GPU, slot]."""
        return int(self._visits(self._masks(slots)) @ self.weight)

    def run(
        self, slots: Ints, cap: float, schedule: Schedule, seed: int, *, stop: Callable[[], bool] = lambda: False
    ) -> Ints:
        """Anneal from a state.

        Parameters
        ----------
        slots
            ``[GPU, slot]`` experts, :data:`~moeplace.placement.EMPTY` in free slots; no GPU holds one twice.
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
            each proposal.
        """
        width = slots.shape[1]
        slots = np.take_along_axis(slots, np.argsort(slots == EMPTY, axis=1, kind="stable"), axis=1)
        state = np.where(np.arange(width)[None, :] < self.room[:, None], slots, CLOSED).astype(np.int64).ravel()
        mask = self._masks(slots)
        cost, busy = self._visits(mask), np.zeros(len(self.room))
        kernel = _compiled() if self._is_long(schedule) else _turn
        scratch = np.zeros(len(self.room))
        for place in range(len(self.weight)):
            _serve(self.experts, self.weight, mask, place, 1.0, busy)
        unit = self._spread(state, mask, cost, width, seed)
        steps = np.linspace(0.0, 1.0, max(2, schedule.turns))
        heat = unit * schedule.hot * (schedule.cold / schedule.hot) ** steps
        percent = max(0.01 * float(busy.sum()) / len(busy), 1e-300)
        price = unit / percent * schedule.first_price * (schedule.last_price / schedule.first_price) ** steps
        now = np.array([int(cost @ self.weight)])
        least = np.array([now[0] if (busy <= cap).all() else 2**62])
        best, word = state.copy(), np.array([max(1, (seed + 1) * SEED_STEP % 2**64)], np.uint64)
        with np.errstate(over="ignore"):
            for turn in range(len(steps)):
                kernel(
                    self.experts, self.weight, self.of, self.first, cap, state, width, mask, cost, busy, scratch, now,
                    best, least, schedule.swaps, heat[turn], price[turn], 0.1 / percent, LOG_LEVELS, word,
                )  # fmt: skip
                if stop():
                    break
        found = best if least[0] < 2**62 else state
        return np.maximum(found, EMPTY).reshape(slots.shape)

    def _is_long(self, schedule: Schedule) -> bool:
        each = len(self.of) / max(1, self.patterns.num_experts)
        return schedule.turns * schedule.swaps * each >= COMPILE_FROM

    def _masks(self, slots: Ints) -> Ints:
        """``[expert]`` bit sets of the GPUs that hold a copy."""
        mask = np.zeros(self.patterns.num_experts, np.int64)
        for gpu, held in enumerate(slots):
            mask[held[held >= 0]] |= 1 << gpu
        return mask

    def _visits(self, mask: Ints) -> Ints:
        """``[pattern]`` GPUs that a token of each visits."""
        cost = np.zeros(len(self.weight), np.int64)
        loop = _compiled_visits() if len(cost) >= COMPILE_FROM // 50 else _visit_loop
        loop(self.experts, mask, cost)
        return cost

    def _spread(self, state: Ints, mask: Ints, cost: Ints, width: int, seed: int) -> float:
        """Spread of the costs of random exchanges, at least 1."""
        rng, trial, found = np.random.default_rng(seed), mask.copy(), []
        loop = _compiled_visits() if len(cost) >= COMPILE_FROM // 50 else _visit_loop
        after = np.zeros(len(cost), np.int64)
        for _ in range(SAMPLED // 10):
            i, j = rng.integers(0, len(state), 2)
            a, b, g, h = state[i], state[j], i // width, j // width
            if a < 0 or b < 0 or a == b or g == h or mask[a] >> h & 1 or mask[b] >> g & 1:
                continue
            both = (1 << int(g)) | (1 << int(h))
            trial[:] = mask
            trial[a] ^= both
            trial[b] ^= both
            loop(self.experts, trial, after)
            found.append(float((after - cost) @ self.weight))
        return max(1.0, float(np.std(found))) if found else 1.0


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_turn, _change, _load_change, _serve, _visits, _hit)


@functools.cache
def _compiled_visits() -> Callable[..., None]:
    return compile_kernel(_visit_loop, _visits, _hit)


def _visit_loop(experts: Any, mask: Any, cost: Any) -> None:
    """Write what tokens of every pattern visit."""
    for p in range(len(cost)):
        cost[p] = _visits(experts, mask, p)


def _turn(
    experts: Any, weight: Any, of: Any, first: Any, cap: float, state: Any, width: int, mask: Any, cost: Any, busy: Any,
    scratch: Any, now: Any, best: Any, least: Any, proposals: int, heat: float, price: float, bend: float, logs: Any,
    random: Any,
) -> None:  # fmt: skip
    """Make proposals at one temperature; everything from ``state`` to ``least`` is changed in place."""
    size, levels, word = len(state), len(logs) - 1, random[0]
    above = 0.0
    for k in range(len(busy)):
        over = max(0.0, busy[k] - cap)
        above += over * (1.0 + over * bend)
    for _ in range(proposals):
        word ^= word << np.uint64(13)
        word ^= word >> np.uint64(7)
        word ^= word << np.uint64(17)
        draw = np.int64(word >> np.uint64(1))
        i, j = ((draw & 0xFFFFF) * size) >> 20, (((draw >> 20) & 0xFFFFF) * size) >> 20
        g, h = i // width, j // width
        b = state[j]
        if b == -2:
            continue
        taking = (draw >> 40) & 1 == 1
        if taking:  # slot j takes another expert
            a = ((draw & 0xFFFFF) * len(mask)) >> 20
            if (b >= 0 and mask[b] & (mask[b] - 1) == 0) or (mask[a] >> h) & 1:
                continue
            new_a, new_b = mask[a] | (1 << h), 0 if b < 0 else mask[b] ^ (1 << h)
        else:  # slots i and j exchange
            a = state[i]
            if g == h or a < 0 or a == b or (mask[a] >> h) & 1 or (b >= 0 and (mask[b] >> g) & 1):
                continue
            both = (1 << g) | (1 << h)
            new_a, new_b = mask[a] ^ both, 0 if b < 0 else mask[b] ^ both
        room = -heat * logs[(draw >> 51) & levels]
        old_a, old_b = mask[a], 0 if b < 0 else mask[b]
        mask[a] = new_a
        if b >= 0:
            mask[b] = new_b
        change = _change(experts, weight, of, first, mask, cost, a, b, False)
        if change > room + price * above:
            mask[a] = old_a
            if b >= 0:
                mask[b] = old_b
            continue
        scratch[:] = busy
        _load_change(experts, weight, of, first, mask, a, b, 1.0, scratch)
        mask[a] = old_a
        if b >= 0:
            mask[b] = old_b
        _load_change(experts, weight, of, first, mask, a, b, -1.0, scratch)
        after, most = 0.0, 0.0
        for k in range(len(busy)):
            over = max(0.0, scratch[k] - cap)
            after += over * (1.0 + over * bend)
            most = max(most, scratch[k])
        if change > room - price * (after - above):
            continue
        mask[a] = new_a
        if b >= 0:
            mask[b] = new_b
        _change(experts, weight, of, first, mask, cost, a, b, True)
        busy[:] = scratch
        above = after
        state[j] = a
        if not taking:
            state[i] = b
        now[0] += change
        if most <= cap and now[0] < least[0]:
            least[0] = now[0]
            best[:] = state
    random[0] = word


def _change(experts: Any, weight: Any, of: Any, first: Any, mask: Any, cost: Any, a: Any, b: Any, keep: bool) -> int:
    """How the sum of costs changes with the new masks of two experts; ``keep`` writes the new costs."""
    total = 0
    for place in range(first[a], first[a + 1]):
        p = of[place]
        visits = _visits(experts, mask, p)
        total += weight[p] * (visits - cost[p])
        if keep:
            cost[p] = visits
    if b >= 0:
        for place in range(first[b], first[b + 1]):
            p = of[place]
            both = False
            for j in range(experts.shape[1]):
                both = both or experts[p, j] == a
            if both:
                continue
            visits = _visits(experts, mask, p)
            total += weight[p] * (visits - cost[p])
            if keep:
                cost[p] = visits
    return total


def _load_change(
    experts: Any, weight: Any, of: Any, first: Any, mask: Any, a: Any, b: Any, sign: float, busy: Any
) -> None:
    """Add (or take away) the loads of the tokens that chose one of two experts."""
    for place in range(first[a], first[a + 1]):
        _serve(experts, weight, mask, of[place], sign, busy)
    if b >= 0:
        for place in range(first[b], first[b + 1]):
            p = of[place]
            both = False
            for j in range(experts.shape[1]):
                both = both or experts[p, j] == a
            if not both:
                _serve(experts, weight, mask, p, sign, busy)


def _serve(experts: Any, weight: Any, mask: Any, p: Any, sign: float, busy: Any) -> None:
    """Add the loads of a pattern's tokens.

    An expert's tokens are shared by its copies on GPUs that are visited anyway; else by those on GPUs that serve all
    the experts left, else by all. That is the policy's mean with weights alike, but for what sets of two or more
    further GPUs do to each other.
    """
    fixed, common = 0, -1
    for j in range(experts.shape[1]):
        m = mask[experts[p, j]]
        if m & (m - 1) == 0:
            fixed |= m
    for j in range(experts.shape[1]):
        m = mask[experts[p, j]]
        if m & fixed == 0:
            common &= m
    for j in range(experts.shape[1]):
        m = mask[experts[p, j]]
        if m & fixed:
            m &= fixed
        elif m & common:
            m &= common
        number, rest = 0, m
        while rest:
            rest &= rest - 1
            number += 1
        share = sign * weight[p] / number
        k = 0
        while m:
            if m & 1:
                busy[k] += share
            m >>= 1
            k += 1


def _visits(experts: Any, mask: Any, p: Any) -> int:
    """GPUs that a token of a pattern visits."""
    fixed, common, left = 0, -1, 0
    for j in range(experts.shape[1]):
        m = mask[experts[p, j]]
        if m & (m - 1) == 0:
            fixed |= m
    for j in range(experts.shape[1]):
        m = mask[experts[p, j]]
        if m & fixed == 0:
            common &= m
            left += 1
    total = 0
    while fixed:
        fixed &= fixed - 1
        total += 1
    if left == 0:
        return total
    if common:
        return total + 1
    if left == 2:
        return total + 2
    return total + _hit(experts, mask, p, left)


def _hit(experts: Any, mask: Any, p: Any, left: int) -> int:
    """Size of the smallest set of GPUs that serves the three or more experts left; one GPU does not."""
    fixed = 0
    for j in range(experts.shape[1]):
        m = mask[experts[p, j]]
        if m & (m - 1) == 0:
            fixed |= m
    sets = np.zeros(left, np.int64)
    number = 0
    for j in range(experts.shape[1]):
        m = mask[experts[p, j]]
        if m & fixed == 0:
            sets[number] = m
            number += 1
    rest, taken = np.zeros(left + 1, np.int64), np.zeros(left + 1, np.int64)  # GPUs to try, and those taken
    for size in range(2, left):
        depth = 0
        rest[0], taken[0] = sets[0], 0
        while depth >= 0:
            if rest[depth] == 0:
                depth -= 1
                continue
            bit = rest[depth] & -rest[depth]
            rest[depth] ^= bit
            held, open_, common = taken[depth] | bit, 0, -1
            for j in range(number):
                if sets[j] & held == 0:
                    open_ = open_ if open_ else sets[j]
                    common &= sets[j]
            if open_ == 0 or (depth + 2 <= size and common):
                return size
            if depth + 2 < size:
                depth += 1
                rest[depth], taken[depth] = open_, held
    return left
