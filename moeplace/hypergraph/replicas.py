"""Copies of experts placed so that tokens visit few GPUs when each goes where the fewest GPUs serve it.

A token's cost is the size of the smallest set of GPUs on which all of its experts have a copy
(:mod:`moeplace.fanout`). Slots of one layer are annealed on the exact sum over token patterns: two slots of different
GPUs exchange what they hold, or a slot whose expert has other copies (or that is empty) takes another expert. What a
proposal costs is read from tables (:mod:`moeplace.hypergraph.serving`) but for patterns that hold both of its experts.
Loads, which cost more to tell, are looked at only where the copies saved could pay for them, and tables are changed
only by what is taken. The load of GPUs is that of tokens which share evenly between equals: learnt weights
(:func:`moeplace.fanout.learn_weights`) lower its maximum, so the cap is met or nearly met before they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.chains.anneal import LOG_LEVELS
from moeplace.counting import compile_kernel
from moeplace.frozen import Floats, Ints
from moeplace.hypergraph import serving
from moeplace.hypergraph.anneal import SEED_STEP, Schedule
from moeplace.hypergraph.patterns import Patterns
from moeplace.hypergraph.serving import (
    FIRST_REST,
    SECOND_REST,
    WORD,
    Incidence,
    Serving,
    change_load,
    change_ways,
    holds,
    toggle,
    ways,
)
from moeplace.placement import EMPTY

CLOSED = -2  # a slot that a GPU with fewer slots than others does not have
SAMPLED = 40  # exchanges whose costs set the unit of temperatures
GUESSED = 0.5  # of the price of load as guessed that is believed before loads are told
COMPILE_FROM = 100_000  # proposals times patterns of an expert: a second without compiling


class CopyAnnealer:
    """The patterns of one layer, ready for runs from any state.

    Parameters
    ----------
    patterns
        The layer's token patterns.
    room
        ``[GPU]`` slots of each.
    load
        ``[expert]`` loads; default: those of the patterns, which a sample has only nearly.
    """

    def __init__(self, patterns: Patterns, room: Ints, load: Floats | None = None) -> None:
        self.patterns, self.room = patterns, np.asarray(room)
        self.tokens = Incidence.of_patterns(patterns, load)

    def copies(self, slots: Ints) -> int:
        """Sum over tokens of the GPUs each visits, for ``slots`` [GPU, slot]."""
        tables = Serving.of_slots(slots, self.tokens)
        self._counter()(self.tokens, tables)
        return int(tables.cost @ self.tokens.weight)

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
            The best state within the cap that was met, else the last one. Complexity: O(1) for a proposal of experts
            with one copy each that is turned down by the tables, O(patterns of an expert) for one of others,
            O(patterns of the experts · k²) for one that is taken.
        """
        width = slots.shape[1]
        slots = np.take_along_axis(slots, np.argsort(slots == EMPTY, axis=1, kind="stable"), axis=1)
        state = np.where(np.arange(width)[None, :] < self.room[:, None], slots, CLOSED).astype(np.int64).ravel()
        tables, busy = Serving.of_slots(slots, self.tokens), np.zeros(len(self.room))
        compiled = self._is_long(schedule)
        (_compiled_fill() if compiled else serving.fill)(self.tokens, tables)
        (_compiled_loads() if compiled else serving.loads)(self.tokens, tables, busy)
        kernel = _compiled() if compiled else _turn
        unit = self._spread(state, tables, width, seed)
        percent = max(0.01 * float(busy.sum()) / len(busy), 1e-300)
        heat, price = schedule.course(unit, percent)
        now = np.array([int(tables.cost @ self.tokens.weight)])
        least = np.array([now[0] if (busy <= cap).all() else 2**62])
        best, word = state.copy(), np.array([max(1, (seed + 1) * SEED_STEP % 2**64)], np.uint64)
        with np.errstate(over="ignore"):
            for turn in range(len(heat)):
                kernel(
                    self.tokens, tables, cap, state, width, busy, now, best, least, schedule.swaps, heat[turn],
                    price[turn], 0.1 / percent, LOG_LEVELS, word,
                )  # fmt: skip
                if stop():
                    break
        found = best if least[0] < 2**62 else state
        return np.maximum(found, EMPTY).reshape(slots.shape)

    def _is_long(self, schedule: Schedule) -> bool:
        each = len(self.tokens.of) / max(1, self.patterns.num_experts)
        return schedule.turns * schedule.swaps * each >= COMPILE_FROM

    def _counter(self) -> Callable[..., None]:
        return _compiled_count() if len(self.tokens.weight) >= COMPILE_FROM // 50 else serving.count

    def _spread(self, state: Ints, tables: Serving, width: int, seed: int) -> float:
        """Spread of the costs of random exchanges, at least 1."""
        rng, found = np.random.default_rng(seed), []
        trial = tables._replace(mask=tables.mask.copy(), cost=tables.cost.copy())
        for _ in range(SAMPLED):
            i, j = rng.integers(0, len(state), 2)
            a, b, g, h = state[i], state[j], i // width, j // width
            if a < 0 or b < 0 or g == h or holds(tables.mask, a, h) or holds(tables.mask, b, g):
                continue
            trial.mask[:] = tables.mask
            for expert in (a, b):
                trial.mask[expert, g // WORD] ^= 1 << int(g % WORD)
                trial.mask[expert, h // WORD] ^= 1 << int(h % WORD)
            self._counter()(self.tokens, trial)
            found.append(float((trial.cost - tables.cost) @ self.tokens.weight))
        return max(1.0, float(np.std(found))) if found else 1.0


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_turn, _mixed, _above, _hoped, _guess, _together, _rest, _step, _has, *serving.HELPERS)


@functools.cache
def _compiled_fill() -> Callable[..., None]:
    return compile_kernel(serving.fill, *serving.HELPERS)


@functools.cache
def _compiled_loads() -> Callable[..., None]:
    return compile_kernel(serving.loads, *serving.HELPERS)


@functools.cache
def _compiled_count() -> Callable[..., None]:
    return compile_kernel(serving.count, *serving.HELPERS)


def _turn(
    tokens: Any, tables: Any, cap: float, state: Any, width: int, busy: Any, now: Any, best: Any, least: Any,
    proposals: int, heat: float, price: float, bend: float, logs: Any, random: Any,
) -> None:  # fmt: skip
    """Make proposals at one temperature; everything from ``tables`` to ``least`` is changed in place."""
    size, levels, word = len(state), len(logs) - 1, random[0]
    mask, number, host, joined, scratch = tables.mask, tables.number, tables.host, tables.joined, np.zeros(len(busy))
    load = tokens.load
    above = _above(busy, cap, bend)
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
            a, g = ((draw & 0xFFFFF) * len(number)) >> 20, np.int64(-1)
            if (b >= 0 and number[b] == 1) or holds(mask, a, h):
                continue
        else:  # slots i and j exchange
            a = state[i]
            if g == h or a < 0 or a == b or holds(mask, a, h) or (b >= 0 and holds(mask, b, g)):
                continue
        room = -heat * logs[(draw >> 51) & levels]
        scratch[:] = busy
        _guess(load, number, host, a, b, g, h, scratch)
        more = _above(scratch, cap, bend) - above
        limit = room + price * above if more <= 0.0 else room - GUESSED * price * more
        change = _hoped(joined, number, a, g, h) + (_hoped(joined, number, b, h, g) if b >= 0 else 0)
        if change > limit:
            continue
        if taking or number[a] > 1 or (b >= 0 and number[b] > 1):
            change = _mixed(tokens, tables, a, b, g, h)
        elif b >= 0:
            change += _together(tokens, tables, a, b, g, h)
        if change > limit:
            continue
        scratch[:] = busy
        change_load(tokens, tables, a, b, -1.0, scratch)
        toggle(mask, number, host, a, g, h)
        toggle(mask, number, host, b, h, g)
        change_load(tokens, tables, a, b, 1.0, scratch)
        after = _above(scratch, cap, bend)
        if change > room - price * (after - above):
            toggle(mask, number, host, a, h, g)
            toggle(mask, number, host, b, g, h)
            continue
        change_ways(tokens, tables, a, b)
        busy[:] = scratch
        above = after
        state[j] = a
        if not taking:
            state[i] = b
        now[0] += change
        if after == 0.0 and now[0] < least[0]:
            least[0] = now[0]
            best[:] = state
    random[0] = word


def _above(busy: Any, cap: float, bend: float) -> float:
    """What load above the cap is counted as: linear, and more for what is far above."""
    total = 0.0
    for k in range(len(busy)):
        over = max(0.0, busy[k] - cap)
        total += over * (1.0 + over * bend)
    return total


def _hoped(joined: Any, number: Any, e: Any, gone: Any, new: Any) -> int:
    """What it costs at least to move or add a copy of an expert, the other expert left alone; exact for the only copy.

    Proposals that this rules out are not looked at further; patterns that hold both experts and would gain only by both
    steps together, which is rare, are not seen by it where one of them has copies.
    """
    least = 0 if new < 0 else -joined[e, new]
    return least + joined[e, gone] if gone >= 0 and number[e] == 1 else least


def _guess(load: Any, number: Any, host: Any, a: Any, b: Any, g: Any, h: Any, busy: Any) -> None:
    """Change loads as if copies shared evenly whatever else tokens chose: a copy of ``a`` to ``h``, ``b`` off."""
    if g >= 0:
        part = load[a] / number[a] - (load[b] / number[b] if b >= 0 else 0.0)
        busy[g] -= part
        busy[h] += part
        return
    part = load[a] / (number[a] + 1)
    busy[h] += part
    for c in range(number[a]):
        busy[host[a, c]] -= part / number[a]
    if b >= 0:
        part = load[b] / number[b]
        for c in range(number[b]):
            busy[host[b, c]] += part / (number[b] - 1)
        busy[h] -= part + part / (number[b] - 1)


def _mixed(tokens: Any, tables: Any, a: Any, b: Any, g: Any, h: Any) -> int:
    """What it costs when a copy of ``a`` goes from GPU ``g`` to ``h`` and one of ``b`` the other way; -1: nowhere."""
    experts, weight, of, first, cost, pairs = (
        tokens.experts, tokens.weight, tokens.of, tokens.first, tables.cost, tokens.pairs,
    )  # fmt: skip
    mask, number, host, good, work = tables.mask, tables.number, tables.host, tables.good, tables.work
    total = 0
    _rest(mask, work, a, g, FIRST_REST)
    for place in range(first[a] if number[a] > 1 or g < 0 else first[a + 1], first[a + 1]):
        total += weight[of[place]] * _step(mask, good, work, place, FIRST_REST, g, h)
    if number[a] == 1 and g >= 0:
        total += tables.joined[a, g] - tables.joined[a, h]
    if b < 0:
        return total
    _rest(mask, work, b, h, SECOND_REST)
    for place in range(first[b] if number[b] > 1 else first[b + 1], first[b + 1]):
        total += weight[of[place]] * _step(mask, good, work, place, SECOND_REST, h, g)
    if number[b] == 1:
        total += tables.joined[b, h] - tables.joined[b, g]
    toggle(mask, number, host, a, g, h)
    toggle(mask, number, host, b, h, g)
    key = min(a, b) * len(tokens.load) + max(a, b)
    for pair in range(tokens.first_pair[key], tokens.first_pair[key + 1]):
        x, y = pairs[pair, 0], pairs[pair, 1]
        if a > b:
            x, y = y, x
        p = of[x]
        known = _step(mask, good, work, x, FIRST_REST, g, h) + _step(mask, good, work, y, SECOND_REST, h, g)
        total += weight[p] * (ways(experts, mask, number, work, p, -1) - cost[p] - known)
    toggle(mask, number, host, a, h, g)
    toggle(mask, number, host, b, g, h)
    return total


def _together(tokens: Any, tables: Any, a: Any, b: Any, g: Any, h: Any) -> int:
    """Tokens that chose both experts, of one copy each: an exchange changes nothing for them, which tables miss."""
    key = min(a, b) * len(tokens.load) + max(a, b)
    total, good, of, weight, pairs = 0, tables.good, tokens.of, tokens.weight, tokens.pairs
    for pair in range(tokens.first_pair[key], tokens.first_pair[key + 1]):
        x, y = pairs[pair, 0], pairs[pair, 1]
        if a > b:
            x, y = y, x
        alone = (not _has(good, x, g)) + (not _has(good, y, h))
        total += weight[of[x]] * alone
    return total


def _rest(mask: Any, work: Any, e: Any, gpu: Any, row: int) -> None:
    """Write the GPUs of an expert but one to a row of scratch."""
    for w in range(mask.shape[1]):
        work[row, w] = mask[e, w]
    if gpu >= 0:
        work[row, gpu // WORD] ^= 1 << (gpu % WORD)


def _step(mask: Any, good: Any, work: Any, place: Any, row: int, gone: Any, new: Any) -> int:
    """GPUs more that a pattern visits when one of its experts has a copy on another GPU, beside those of a row."""
    for w in range(mask.shape[1]):
        if good[w, place] & work[row, w]:
            return 0
    return _has(good, place, gone) - _has(good, place, new)


def _has(good: Any, place: Any, gpu: Any) -> int:
    """1 where a GPU is among the ways, 0 where it is not or there is none (-1)."""
    return 0 if gpu < 0 else (good[gpu // WORD, place] >> (gpu % WORD)) & 1
