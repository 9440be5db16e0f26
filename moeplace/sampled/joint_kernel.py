"""Swaps of copies judged on compute and copies of all sampled steps at once, exactly; compiled where that pays.

With the worst steps weighted as they now are, ``(1 - mix)·mean + mix·CVaR`` is a weighted sum that a swap's true value
never falls below (CVaR is the largest of such sums): a swap that does not lower the sum is turned down without sorting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.counting import compile_kernel
from moeplace.sampled.kernel import LEAST_GAIN, SINGLE, TOP

MODE, DISTINCT, TWO_LEVEL, WORDS, RAILS = 0, 1, 2, 3, 4  # places in the code of an exchange
BLOCK = 32  # steps after which a swap that does harm is turned down
CLEARLY = 9.0  # square of the standard errors by which it has to
M1, M2, M4 = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
ONES = np.uint64(0x0101010101010101)
S1, S2, S4, S56 = np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(56)


@functools.cache
def compiled_joint() -> Callable[..., Any]:
    """Return the compiled :func:`descend_joint`."""
    return compile_kernel(
        descend_joint, _kick, _change, _times, _add_price, _add_links, _recount, _send_all, _send, _forward, _weigh,
        _risk, _forbidden, _swap, _compute, _beside, _retop, _insert, _union, _bits, _next,
    )  # fmt: skip


def descend_joint(layer: Any, wire: Any, rest: Any, risk: Any, bounds: Any, kicked: int, left: Any, word: Any) -> float:
    """Improve one layer by first improvements until none is left, after ``kicked`` random swaps.

    Parameters
    ----------
    layer
        ``work`` [item, channel, batch], ``where`` [item], ``expert`` [item], ``usage`` [GPU, channel, batch], ``times``
        [batch] of this layer. ``where``, ``usage`` and ``times`` end as they are in the result.
    wire
        Code and rates of the exchange; ``sets`` [item, batch, word]; ``ones`` and ``twos`` [GPU, batch, word]: tokens
        with at least one, two selections there, and the same of nodes; ``copies`` [batch, home, GPU] and ``ports``
        [batch, kind, GPU].
    rest
        ``[batch]`` times of the other layers.
    risk
        ``(mix, worst steps)``.
    bounds
        ``load`` [item], ``busy`` [GPU], ``cap`` [1]; ``moving`` [item, GPU] cost of an item there, beside the risk.
    left
        ``[1]`` swaps that may still be judged.

    Returns
    -------
    float
        The risk. Complexity: O(batches · (GPUs + words)) a swap.
    """
    _, where, expert, usage, times = layer
    items, batches = len(where), len(times)
    top = np.zeros((TOP, batches), np.float32)
    who = np.zeros((TOP, batches), np.int16)
    top_port = np.zeros((TOP, batches), np.float32)
    who_port = np.zeros((TOP, batches), np.int16)
    tops = (top, who, top_port, who_port)
    if kicked:
        _kick(kicked, layer, wire, bounds, word)
    _recount(where, wire)
    _retop(usage, tops)
    _times(-1, -1, 0, batches, layer, tops, wire, times)
    weights, new = np.zeros(batches), np.zeros(batches)
    total = rest + times
    value = _risk(total, risk)
    _weigh(total, risk, weights)
    pairs, idle = items * (items - 1) // 2, 0
    first, second = _next(word) % items, _next(word) % items
    while idle < 2 * pairs and left[0] > 0:
        second += 1
        if second == items:
            second, first = 0, (first + 1) % items
        idle += 1
        if first >= second or _forbidden(first, second, where, expert, bounds):
            continue
        left[0] -= 1
        g, h, moving = where[first], where[second], bounds[3]
        moved = moving[first, h] + moving[second, g] - moving[first, g] - moving[second, h]
        if moved + _change(first, second, layer, tops, wire, weights, new, moved) >= -LEAST_GAIN * value:
            continue
        total = rest + new
        now = _risk(total, risk)
        if now + moved < value - LEAST_GAIN * value:
            _swap(first, second, layer, bounds)
            _recount(where, wire)
            _retop(usage, tops)
            times[:] = new
            value, idle = now, 0
            _weigh(total, risk, weights)
    return value


def _kick(number: int, layer: Any, wire: Any, bounds: Any, word: Any) -> None:
    """Swap a few items that may."""
    items = len(layer[1])
    for _ in range(number):
        first, second = _next(word) % items, _next(word) % items
        if not _forbidden(first, second, layer[1], layer[2], bounds):
            _swap(first, second, layer, bounds)


def _change(first: int, second: int, layer: Any, tops: Any, wire: Any, weights: Any, new: Any, moved: float) -> float:
    """Weighted change of the times when two items swap; infinite as soon as it is clear that it does harm.

    ``moved`` is what the swap costs besides.
    """
    times = layer[4]
    change, squares, low = 0.0, 0.0, 0
    while low < len(new):
        high = min(len(new), low + BLOCK)
        _times(first, second, low, high, layer, tops, wire, new)
        for b in range(low, high):
            part = weights[b] * (new[b] - times[b])
            change += part
            squares += part * part
        if change > 0 and moved >= 0 and change * change > CLEARLY * squares:
            return np.inf
        low = high
    return change


def _times(first: int, second: int, low: int, high: int, layer: Any, tops: Any, wire: Any, new: Any) -> None:
    """Times of the layer in some steps when two items swap; as they are for items -1."""
    work, where, _, usage, _ = layer
    top, who, top_port, who_port = tops
    for b in range(low, high):
        if first < 0:
            new[b] = top[0, b] + top_port[0, b]
            continue
        g, h = where[first], where[second]
        new[b] = max(_compute(first, second, g, h, work, usage, b), _beside(g, h, top, who, b))
        if usage.shape[1] == 3:
            moved = work[second, 2, b] - work[first, 2, b]
            port = max(usage[g, 2, b] + moved, usage[h, 2, b] - moved)
            new[b] += max(port, _beside(g, h, top_port, who_port, b))
    if wire[0][MODE] == 1:
        _add_price(first, second, low, high, where, wire, new)
    elif wire[0][MODE] == 2:
        _add_links(first, second, low, high, where, wire, new)


def _compute(first: int, second: int, g: int, h: int, work: Any, usage: Any, b: int) -> float:
    """Work of the busier of two GPUs after their swap."""
    moved = work[second, 0, b] - work[first, 0, b]
    if usage.shape[1] == 1:
        return float(max(usage[g, 0, b] + moved, usage[h, 0, b] - moved))
    also = work[second, 1, b] - work[first, 1, b]
    new_g = max(usage[g, 0, b] + moved, usage[g, 1, b] + also)
    return float(max(new_g, usage[h, 0, b] - moved, usage[h, 1, b] - also))


def _beside(g: int, h: int, top: Any, who: Any, b: int) -> float:
    """Largest value of a GPU that is neither of two."""
    for place in range(TOP):
        if who[place, b] != g and who[place, b] != h:
            return float(top[place, b])
    return 0.0


def _add_price(first: int, second: int, low: int, high: int, where: Any, wire: Any, new: Any) -> None:
    """Add the price of the copies of some steps when two items swap."""
    code, rates, sets, ones, twos, _, _, copies, _, ports, _, _ = wire
    for b in range(low, high):
        number = ports[b, 1, 0]
        if first >= 0:
            g, h = where[first], where[second]
            number -= copies[b, 0, g] + copies[b, 0, h]
            for w in range(code[WORDS]):
                a, c = sets[first, b, w], sets[second, b, w]
                number += _bits(twos[g, b, w] | (ones[g, b, w] & ~a) | c)
                number += _bits(twos[h, b, w] | (ones[h, b, w] & ~c) | a)
        new[b] += number * rates[0]


def _add_links(first: int, second: int, low: int, high: int, where: Any, wire: Any, new: Any) -> None:
    """Add the time of the exchanges of some steps when two items swap."""
    code, rates, sets, ones, twos, node_ones, node_twos, copies, node_copies, ports, node, scratch = wire
    words = code[WORDS]
    for b in range(low, high):
        for kind in range(4):
            for p in range(scratch.shape[1]):
                scratch[kind, p] = ports[b, kind, p]
        for s in range(copies.shape[1] if first >= 0 else 0):
            g, h = where[first], where[second]
            between = code[TWO_LEVEL] != 0 and node[g] != node[h]
            new_g, new_h, new_m, new_n = 0, 0, 0, 0
            for w in range(s * words, (s + 1) * words):
                a, c = sets[first, b, w], sets[second, b, w]
                if code[DISTINCT] == 0:
                    new_g += _bits(c) - _bits(a)
                    continue
                new_g += _bits(twos[g, b, w] | (ones[g, b, w] & ~a) | c)
                new_h += _bits(twos[h, b, w] | (ones[h, b, w] & ~c) | a)
                if between:
                    new_m += _bits(node_twos[node[g], b, w] | (node_ones[node[g], b, w] & ~a) | c)
                    new_n += _bits(node_twos[node[h], b, w] | (node_ones[node[h], b, w] & ~c) | a)
            if code[DISTINCT] == 0:
                _send(s, g, new_g, code, node, scratch)
                _send(s, h, -new_g, code, node, scratch)
                continue
            _send(s, g, new_g - copies[b, s, g], code, node, scratch)
            _send(s, h, new_h - copies[b, s, h], code, node, scratch)
            if between:
                _forward(s, node[g], new_m - node_copies[b, s, node[g]], code, node, scratch)
                _forward(s, node[h], new_n - node_copies[b, s, node[h]], code, node, scratch)
        local, nic = 0, 0
        for p in range(scratch.shape[1]):
            local = max(local, scratch[0, p], scratch[1, p])
            nic = max(nic, scratch[2, p], scratch[3, p])
        new[b] += max(local * rates[0], nic * rates[1])


def _forward(s: int, n: int, number: int, code: Any, node: Any, ports: Any) -> None:
    """Add copies from a home to another node to the NICs they pass: to the GPU of the sender's rail there."""
    if node[s] != n:
        ports[2, s] += number
        ports[3, n * code[RAILS] + s % code[RAILS]] += number


def _send(s: int, g: int, number: int, code: Any, node: Any, ports: Any) -> None:
    """Add copies from a home to a GPU to the ports they pass: out and in of a domain (0, 1) or of NICs (2, 3)."""
    if code[MODE] == 1:
        ports[1, 0] += number
    elif code[TWO_LEVEL] != 0:
        # forwarded from the GPU of the sender's rail; those for that GPU itself pass its buffers too
        ports[0, node[g] * code[RAILS] + s % code[RAILS]] += number
        ports[1, g] += number
    elif node[s] != node[g]:
        ports[2, s] += number
        ports[3, g] += number
    elif s != g:
        ports[0, s] += number
        ports[1, g] += number


def _recount(where: Any, wire: Any) -> None:
    """Count unions, copies and ports anew."""
    code, _, sets, ones, twos, node_ones, node_twos, copies, node_copies, ports, node, _ = wire
    if code[MODE] == 0:
        return
    ones[:] = 0
    twos[:] = 0
    node_ones[:] = 0
    node_twos[:] = 0
    copies[:] = 0
    node_copies[:] = 0
    ports[:] = 0
    for i in range(len(where)):
        if code[DISTINCT] != 0:
            _union(sets[i], ones[where[i]], twos[where[i]])
            if code[TWO_LEVEL] != 0:
                _union(sets[i], node_ones[node[where[i]]], node_twos[node[where[i]]])
        else:
            for b in range(copies.shape[0]):
                for w in range(sets.shape[2]):
                    copies[b, w // code[WORDS], where[i]] += _bits(sets[i, b, w])
    _send_all(wire)


def _send_all(wire: Any) -> None:
    """Fill copies from unions, and ports from copies."""
    code, _, _, ones, _, node_ones, _, copies, node_copies, ports, node, _ = wire
    for b in range(copies.shape[0]):
        for s in range(copies.shape[1]):
            for g in range(copies.shape[2]):
                if code[DISTINCT] != 0:
                    for w in range(s * code[WORDS], (s + 1) * code[WORDS]):
                        copies[b, s, g] += _bits(ones[g, b, w])
                _send(s, g, copies[b, s, g], code, node, ports[b])
            if code[TWO_LEVEL] != 0:
                for n in range(node_copies.shape[2]):
                    for w in range(s * code[WORDS], (s + 1) * code[WORDS]):
                        node_copies[b, s, n] += _bits(node_ones[n, b, w])
                    _forward(s, n, node_copies[b, s, n], code, node, ports[b])


def _union(one: Any, ones: Any, twos: Any) -> None:
    """Add a set to what is there once and twice."""
    for b in range(one.shape[0]):
        for w in range(one.shape[1]):
            twos[b, w] |= ones[b, w] & one[b, w]
            ones[b, w] |= one[b, w]


def _bits(x: Any) -> int:
    """Count the bits of a word."""
    x = x - ((x >> S1) & M1)
    x = (x & M2) + ((x >> S2) & M2)
    x = (x + (x >> S4)) & M4
    return int((x * ONES) >> S56)


def _forbidden(first: int, second: int, where: Any, expert: Any, bounds: Any) -> bool:
    """Whether a swap changes nothing, puts two copies of one expert together, or breaks the cap."""
    load, busy, cap, _ = bounds
    g, h, e, f = where[first], where[second], expert[first], expert[second]
    if g == h or e == f:
        return True
    moved = load[second] - load[first]
    if (moved > 0 and busy[g] + moved > cap[0]) or (moved < 0 and busy[h] - moved > cap[0]):
        return True
    if (e < 0 or e >= SINGLE) and (f < 0 or f >= SINGLE):
        return False
    for other in range(len(where)):
        if other != first and other != second:
            if expert[other] == e and e >= 0 and where[other] == h:
                return True
            if expert[other] == f and f >= 0 and where[other] == g:
                return True
    return False


def _swap(first: int, second: int, layer: Any, bounds: Any) -> None:
    """Swap two items."""
    work, where, _, usage, _ = layer
    load, busy, _, _ = bounds
    g, h = where[first], where[second]
    for channel in range(usage.shape[1]):
        for b in range(usage.shape[2]):
            moved = work[second, channel, b] - work[first, channel, b]
            usage[g, channel, b] += moved
            usage[h, channel, b] -= moved
    busy[g] += load[second] - load[first]
    busy[h] -= load[second] - load[first]
    where[first], where[second] = h, g


def _retop(usage: Any, tops: Any) -> None:
    """Find the three busiest GPUs of every step, and the three busiest ports where a channel stands for them."""
    top, who, top_port, who_port = tops
    top[:] = 0.0
    who[:] = -1
    top_port[:] = 0.0
    who_port[:] = -1
    for g in range(usage.shape[0]):
        for b in range(usage.shape[2]):
            value = usage[g, 0, b]
            if usage.shape[1] > 1:
                value = max(value, usage[g, 1, b])
                _insert(usage[g, 2, b], g, top_port, who_port, b)
            _insert(value, g, top, who, b)


def _insert(value: float, g: int, top: Any, who: Any, b: int) -> None:
    """Put a value in its place among the three."""
    if value <= top[TOP - 1, b]:
        return
    place = TOP - 1
    while place > 0 and value > top[place - 1, b]:
        top[place, b], who[place, b] = top[place - 1, b], who[place - 1, b]
        place -= 1
    top[place, b], who[place, b] = value, g


def _risk(total: Any, risk: Any) -> float:
    """Mean, and mean of the worst steps, mixed."""
    mix, count = risk
    if mix == 0.0:
        return float(total.mean())
    ordered = np.partition(total, len(total) - count)
    return float((1 - mix) * total.mean() + mix * ordered[len(total) - count :].mean())


def _weigh(total: Any, risk: Any, weights: Any) -> None:
    """Weights of the steps whose sum the risk is now."""
    mix, count = risk
    weights[:] = (1 - mix) / len(total)
    if mix > 0.0:
        worst = np.argsort(-total)[:count]
        for b in worst:
            weights[b] += mix / count


def _next(word: Any) -> int:
    """Draw from a xorshift of 64 bits."""
    x = word[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    word[0] = x
    return int(x >> np.uint64(33))
