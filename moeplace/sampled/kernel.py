"""Swaps of copies between GPUs, judged on all sampled steps at once.

Of every step the three busiest GPUs are kept, so that the busiest beside two that swap is known at once; and of every
GPU the steps in which it is the busiest. Only in these can a swap of its copies gain, in all others it can only do
harm: most swaps are turned down by the few steps of their two GPUs. The loops are compiled where there is enough to do
and give the same with or without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.counting import compile_kernel

LEAST_GAIN = 1e-7  # of the value
TOP = 3
SINGLE = 1 << 20  # added to the number of an expert that has one copy: no other can meet it


@functools.cache
def compiled_mean() -> Callable[..., Any]:
    """Return the compiled :func:`descend_and_kick`."""
    return compile_kernel(
        descend_and_kick, _descend, _forbidden, _breaks, _together, _change, _harm, _swap, _retop, _retop_two, _level,
        _hopes, _list, _insert, _group_value, _next, _busiest_beside, _value_of, _cost_of,
    )  # fmt: skip


@functools.cache
def compiled_judge() -> Callable[..., Any]:
    """Return the compiled :func:`judge_swaps`."""
    return compile_kernel(
        judge_swaps, _breaks, _together, _change, _harm, _retop, _hopes, _list, _insert, _group_value, _busiest_beside
    )  # fmt: skip


def descend_and_kick(
    work: Any, where: Any, expert: Any, usage: Any, weights: Any, load: Any, busy: Any, cap: float, moving: Any,
    kicks: int, budget: int, word: Any,
) -> float:  # fmt: skip
    """Improve one layer's weighted sum of step times: first improvements until none, a kick of a few swaps, and again.

    ``work`` [item, channel, batch] is what items add, ``where`` [item] their GPUs, ``expert`` [item] what they are (two
    of one expert never share a GPU), ``usage`` [GPU, channel, batch] the sums, ``weights`` [batch]; ``load`` [item]
    counts against ``cap`` in ``busy`` [GPU]; ``moving`` [item, GPU] is the cost of an item there, beside the
    sum (empty: none). ``where``, ``usage`` and ``busy`` end in the best state, whose value, sum and cost, is returned.
    """
    items, batches = len(where), len(weights)
    groups = 1 if usage.shape[1] == 1 else 2
    top, who = np.zeros((groups, TOP, batches), np.float32), np.zeros((groups, TOP, batches), np.int16)
    # of every GPU the steps in which it is the busiest: those from one of its numbers to the next
    begin, steps = np.zeros((groups, len(usage) + 1), np.int64), np.zeros((groups, batches), np.int64)
    tops = (top, who, begin, steps, np.zeros((groups, len(usage))))
    _retop(usage, weights, tops)
    left = np.array([budget])
    value = _value_of(top, weights) + _cost_of(where, moving)
    value = _descend(work, where, expert, usage, weights, load, busy, cap, moving, tops, value, left, word)
    best, best_where, best_usage, best_busy = value, where.copy(), usage.copy(), busy.copy()
    for _ in range(kicks):
        if left[0] <= 0:
            break
        for _ in range(2 + _next(word) % 3):
            a, c = _next(word) % items, _next(word) % items
            if not _forbidden(a, c, where, expert, load, busy, cap):
                _swap(a, c, work, where, usage, load, busy)
        _retop(usage, weights, tops)
        value = _value_of(top, weights) + _cost_of(where, moving)
        value = _descend(work, where, expert, usage, weights, load, busy, cap, moving, tops, value, left, word)
        if value < best - LEAST_GAIN * best:
            best = value
            best_where[:], best_usage[:], best_busy[:] = where, usage, busy
        else:
            where[:], usage[:], busy[:] = best_where, best_usage, best_busy
    return best


def judge_swaps(
    work: Any, where: Any, expert: Any, usage: Any, weights: Any, load: Any, busy: Any, cap: float, away: Any,
    found: Any,
) -> None:  # fmt: skip
    """Fill ``found``: the change of the weighted sum by every swap [item, item], and how many more items are away.

    ``away`` [item, GPU] is 1 where an item on a GPU counts as moved; other arrays are as in :func:`descend_and_kick`.
    Entries of swaps that may not be are left as they are. Complexity: O(items² · batches).
    """
    items, batches = len(where), len(weights)
    groups = 1 if usage.shape[1] == 1 else 2
    top, who = np.zeros((groups, TOP, batches), np.float32), np.zeros((groups, TOP, batches), np.int16)
    begin, steps = np.zeros((groups, len(usage) + 1), np.int64), np.zeros((groups, batches), np.int64)
    tops = (top, who, begin, steps, np.zeros((groups, len(usage))))
    _retop(usage, weights, tops)
    change, more = found
    for first in range(items):
        for second in range(first + 1, items):
            if _breaks(first, second, where, expert, load, busy, cap) or _together(first, second, where, expert):
                continue
            g, h = where[first], where[second]
            change[first, second] = _change(first, second, work, where, usage, weights, tops, np.inf)
            more[first, second] = away[first, h] + away[second, g] - away[first, g] - away[second, h]


def _value_of(top: Any, weights: Any) -> float:
    """Weighted sum of step times."""
    value = 0.0
    for b in range(len(weights)):
        for group in range(top.shape[0]):
            value += weights[b] * top[group, 0, b]
    return value


def _cost_of(where: Any, moving: Any) -> float:
    """Cost of where items are."""
    cost = 0.0
    for item in range(len(moving)):
        cost += moving[item, where[item]]
    return cost


def _descend(
    work: Any, where: Any, expert: Any, usage: Any, weights: Any, load: Any, busy: Any, cap: float, moving: Any,
    tops: Any, value: float, left: Any, word: Any,
) -> float:  # fmt: skip
    """Take the first swap that helps, in an order that begins anywhere, until none of all does."""
    items = len(where)
    pairs, idle = items * (items - 1) // 2, 0
    first, second = _next(word) % items, _next(word) % items
    while idle < 2 * pairs and left[0] > 0:
        second += 1
        if second == items:
            second, first = 0, (first + 1) % items
        idle += 1
        if first >= second or _breaks(first, second, where, expert, load, busy, cap):
            continue
        left[0] -= 1
        moved = 0.0
        if len(moving):
            g, h = where[first], where[second]
            moved = moving[first, h] + moving[second, g] - moving[first, g] - moving[second, h]
        most = -LEAST_GAIN * value - moved
        change = _change(first, second, work, where, usage, weights, tops, most)
        if change < most and not _together(first, second, where, expert):
            g, h = where[first], where[second]
            _swap(first, second, work, where, usage, load, busy)
            _retop_two(g, h, usage, weights, tops)
            value += change + moved
            idle = 0
    return value


def _change(
    first: int, second: int, work: Any, where: Any, usage: Any, weights: Any, tops: Any, most: float
) -> float:  # fmt: skip
    """Change of the weighted sum when two items swap, or something no less than ``most`` where it is no less."""
    g, h = where[first], where[second]
    top, who, begin, steps, hope = tops
    change = 0.0
    for group in range(top.shape[0]):
        change -= hope[group, g] + hope[group, h]
    if change >= most:
        return change
    change = 0.0
    for group in range(top.shape[0]):
        for gpu in (g, h):
            for place in range(begin[group, gpu], begin[group, gpu + 1]):
                b = steps[group, place]
                new = _group_value(first, second, g, h, work, usage, group, b)
                rest = _busiest_beside(g, h, top, who, group, b)
                # where it becomes more than now, that is added below
                change += weights[b] * min(0.0, max(new, rest) - top[group, 0, b])
    if change >= most:
        return change
    if usage.shape[1] == 1:
        return _harm(work[first, 0], work[second, 0], usage[g, 0], usage[h, 0], top[0, 0], weights, change, most)
    for group in range(top.shape[0]):
        for b in range(len(weights)):
            new = _group_value(first, second, g, h, work, usage, group, b)
            if new > top[group, 0, b]:
                change += weights[b] * (new - top[group, 0, b])
                if change >= most:
                    return change
    return change


def _harm(
    first: Any, second: Any, giver: Any, taker: Any, busiest: Any, weights: Any, change: float, most: float
) -> float:  # fmt: skip
    """Add to a change what either GPU has above the busiest of now, until that is too much."""
    for b in range(len(weights)):
        moved = second[b] - first[b]
        above = max(giver[b] + moved, taker[b] - moved) - busiest[b]
        if above > 0:
            change += weights[b] * above
            if change >= most:
                return change
    return change


def _group_value(first: int, second: int, g: int, h: int, work: Any, usage: Any, group: int, b: int) -> float:
    """Larger value of two GPUs after their swap, in a group of channels."""
    if usage.shape[1] == 1 or group == 1:
        channel = 0 if usage.shape[1] == 1 else 2
        moved = work[second, channel, b] - work[first, channel, b]
        return max(usage[g, channel, b] + moved, usage[h, channel, b] - moved)
    moved = work[second, 0, b] - work[first, 0, b]
    also = work[second, 1, b] - work[first, 1, b]
    new_g = max(usage[g, 0, b] + moved, usage[g, 1, b] + also)
    return max(new_g, usage[h, 0, b] - moved, usage[h, 1, b] - also)


def _busiest_beside(g: int, h: int, top: Any, who: Any, group: int, b: int) -> float:
    """Value of the busiest GPU that is neither of two."""
    for place in range(TOP):
        if who[group, place, b] != g and who[group, place, b] != h:
            return float(top[group, place, b])
    return 0.0


def _forbidden(first: int, second: int, where: Any, expert: Any, load: Any, busy: Any, cap: float) -> bool:
    """Whether a swap changes nothing, puts two copies of one expert together, or breaks the cap."""
    return _breaks(first, second, where, expert, load, busy, cap) or _together(first, second, where, expert)


def _breaks(first: int, second: int, where: Any, expert: Any, load: Any, busy: Any, cap: float) -> bool:
    """Whether a swap changes nothing or breaks the cap."""
    g, h = where[first], where[second]
    if g == h or expert[first] == expert[second]:
        return True
    moved = load[second] - load[first]
    return bool((moved > 0 and busy[g] + moved > cap) or (moved < 0 and busy[h] - moved > cap))


def _together(first: int, second: int, where: Any, expert: Any) -> bool:
    """Whether a swap puts two copies of one expert together."""
    g, h, e, f = where[first], where[second], expert[first], expert[second]
    if (e < 0 or e >= SINGLE) and (f < 0 or f >= SINGLE):
        return False
    for other in range(len(where)):
        if other != first and other != second:
            if expert[other] == e and e >= 0 and where[other] == h:
                return True
            if expert[other] == f and f >= 0 and where[other] == g:
                return True
    return False


def _swap(first: int, second: int, work: Any, where: Any, usage: Any, load: Any, busy: Any) -> None:
    """Swap two items."""
    g, h = where[first], where[second]
    for channel in range(usage.shape[1]):
        for b in range(usage.shape[2]):
            moved = work[second, channel, b] - work[first, channel, b]
            usage[g, channel, b] += moved
            usage[h, channel, b] -= moved
    moved_load = load[second] - load[first]
    busy[g] += moved_load
    busy[h] -= moved_load
    where[first], where[second] = h, g


def _retop(usage: Any, weights: Any, tops: Any) -> None:
    """Find the busiest three GPUs of every step, in every group of channels; of every GPU the steps it is busiest in.

    And the most that a swap of one of its copies can gain in these: down to the third busiest GPU, where the second is
    the one it swaps with.
    """
    top, who = tops[0], tops[1]
    gpus, channels, batches = usage.shape
    top[:] = -1.0
    who[:] = -1
    for g in range(gpus):
        for b in range(batches):
            value = usage[g, 0, b]
            if channels > 1:
                value = max(value, usage[g, 1, b])
                _insert(usage[g, 2, b], g, top, who, 1, b)
            _insert(value, g, top, who, 0, b)
    _hopes(weights, tops)


def _retop_two(g: int, h: int, usage: Any, weights: Any, tops: Any) -> None:
    """Do what :func:`_retop` does where two GPUs alone have changed: in the steps where they were or now are on top."""
    top, who = tops[0], tops[1]
    for group in range(top.shape[0]):
        for b in range(usage.shape[2]):
            least, changed = top[group, TOP - 1, b], False
            for place in range(TOP):
                changed = changed or who[group, place, b] == g or who[group, place, b] == h
            if not changed and _level(usage, g, group, b) <= least and _level(usage, h, group, b) <= least:
                continue
            for place in range(TOP):
                top[group, place, b], who[group, place, b] = -1.0, -1
            for gpu in range(usage.shape[0]):
                _insert(_level(usage, gpu, group, b), gpu, top, who, group, b)
    _hopes(weights, tops)


def _level(usage: Any, gpu: int, group: int, b: int) -> float:
    """Value of a GPU in a group of channels."""
    if usage.shape[1] == 1:
        return float(usage[gpu, 0, b])
    return float(usage[gpu, 2, b]) if group == 1 else float(max(usage[gpu, 0, b], usage[gpu, 1, b]))


def _hopes(weights: Any, tops: Any) -> None:
    """List the steps of every busiest GPU, and add up what its swaps may gain in them."""
    top, who, begin, steps, hope = tops
    for group in range(top.shape[0]):
        for place in range(TOP):
            for b in range(top.shape[2]):
                top[group, place, b] = max(top[group, place, b], 0.0)
        _list(who[group, 0], begin[group], steps[group])
        hope[group] = 0.0
        for b in range(top.shape[2]):
            hope[group, who[group, 0, b]] += weights[b] * (top[group, 0, b] - top[group, TOP - 1, b])


def _list(busiest: Any, begin: Any, steps: Any) -> None:
    """List the steps of every GPU, in order."""
    begin[:] = 0
    for b in range(len(busiest)):
        begin[busiest[b] + 1] += 1
    for g in range(1, len(begin)):
        begin[g] += begin[g - 1]
    for b in range(len(busiest)):
        steps[begin[busiest[b]]] = b
        begin[busiest[b]] += 1
    for g in range(len(begin) - 1, 0, -1):
        begin[g] = begin[g - 1]
    begin[0] = 0


def _insert(value: float, g: int, top: Any, who: Any, group: int, b: int) -> None:
    """Put a value in its place among the three."""
    if value <= top[group, TOP - 1, b]:
        return
    place = TOP - 1
    while place > 0 and value > top[group, place - 1, b]:
        top[group, place, b], who[group, place, b] = top[group, place - 1, b], who[group, place - 1, b]
        place -= 1
    top[group, place, b], who[group, place, b] = value, g


def _next(word: Any) -> int:
    """Draw from a xorshift of 64 bits."""
    x = word[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    word[0] = x
    return int(x >> np.uint64(33))
