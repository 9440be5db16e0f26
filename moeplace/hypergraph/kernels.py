"""Compiled loops over every set of experts of one size, in lexicographic order.

Costs come by inclusion and exclusion. With ``t_j(T)`` the tokens that chose all of ``T`` and none of the experts picked
so far, picking ``x`` costs ``t_1(x)`` more, and ``t_j(T)`` falls by ``t_{j+1}(T ∪ {x})``: the tables of a prefix serve
all sets that begin with it, and a set costs one look-up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.counting import compile_kernel


@functools.cache
def compiled_costs() -> Callable[..., None]:
    """Return :func:`cost_loop`, compiled."""
    return compile_kernel(cost_loop, _pick)


@functools.cache
def compiled_hits() -> Callable[..., None]:
    """Return :func:`hit_loop`, compiled."""
    return compile_kernel(hit_loop)


@functools.cache
def compiled_scan() -> Callable[..., int]:
    """Return :func:`scan_loop`, compiled."""
    return compile_kernel(scan_loop)


def cost_loop(t1: Any, t2: Any, t3: Any, t4: Any, order: int, size: int, out: Any) -> None:
    """Write the cost of every set of ``size`` experts to ``out``; tables up to ``order``, at most 4, are used.

    Exact where no pattern or no set has more than ``order`` experts. Complexity: O(C(E, size)) look-ups and
    O(C(E, size - j + 1)·E^(j-1)) to keep the tables of order ``j``.
    """
    experts = len(t1)
    depths = max(1, size)
    a1 = np.zeros((depths, experts), np.int32)
    a2 = np.zeros((depths if order > 1 else 1, experts if order > 1 else 1, experts if order > 1 else 1), np.int32)
    width = experts if order > 2 else 1
    a3 = np.zeros((depths if order > 2 else 1, width, width, width), np.int32)
    a1[0] = t1
    if order > 1:
        a2[0] = t2
    if order > 2:
        a3[0] = t3
    sums = np.zeros(depths, np.int32)
    pick = np.arange(size)
    depth, place = 0, 0
    while depth >= 0:
        if depth == size - 1:
            for e in range(pick[depth], experts):
                out[place] = sums[depth] + a1[depth, e]
                place += 1
        elif pick[depth] <= experts - size + depth:
            x = pick[depth]
            _pick(a1, a2, a3, t4, order, size - depth - 1, depth, x)
            sums[depth + 1] = sums[depth] + a1[depth, x]
            pick[depth + 1] = x + 1
            depth += 1
            continue
        depth -= 1
        if depth >= 0:
            pick[depth] += 1


def _pick(a1: Any, a2: Any, a3: Any, t4: Any, order: int, left: int, depth: int, x: int) -> None:
    """Fill the tables of the next depth, after ``x`` was picked and ``left`` picks remain."""
    experts = a1.shape[1]
    for e in range(x + 1, experts):
        a1[depth + 1, e] = a1[depth, e] - (a2[depth, x, e] if order > 1 else 0)
    if order > 1 and left > 1:
        for e in range(x + 1, experts):
            for f in range(e + 1, experts):
                a2[depth + 1, e, f] = a2[depth, e, f] - (a3[depth, x, e, f] if order > 2 else 0)
    if order > 2 and left > 2:
        for e in range(x + 1, experts):
            for f in range(e + 1, experts):
                for g in range(f + 1, experts):
                    a3[depth + 1, e, f, g] = a3[depth, e, f, g] - (t4[x, e, f, g] if order > 3 else 0)


def hit_loop(sets: Any, masks: Any, weight: Any, out: Any) -> None:
    """Write the tokens whose pattern meets each set; one word a bit set. Complexity: O(sets · patterns)."""
    for i in range(len(sets)):
        held = sets[i]
        total = 0
        for j in range(len(masks)):
            total += weight[j] if held & masks[j] else 0
        out[i] = total


def scan_loop(
    cost: Any, price: Any, load: Any, cap: float, size: int, most: float, least: Any, best: Any, kept: Any, where: Any
) -> int:
    """Price every set within the cap; return how many have a reduced cost of at most ``most``.

    Parameters
    ----------
    cost
        ``[set]`` costs, lexicographic.
    price, load
        ``[expert]`` duals and loads.
    cap, most
        Most load of a set, most reduced cost of one that is kept.
    least, best
        ``[expert, expert]`` least reduced cost of the sets that begin with the one and end with the other, and which
        set that is; updated.
    kept, where
        ``[room, size]`` members and ``[room]`` numbers of the sets kept, as far as there is room. Complexity: O(sets).
    """
    experts = len(price)
    sum_price, sum_load = np.zeros(size), np.zeros(size)
    pick = np.arange(size)
    depth, place, count = 0, 0, 0
    last = size - 1
    while depth >= 0:
        if depth == last:
            base, room = sum_price[last], cap - sum_load[last]
            for e in range(pick[last], experts):
                if load[e] <= room:
                    value = cost[place] - base - price[e]
                    if value <= most:
                        if count < len(kept):
                            for j in range(last):
                                kept[count, j] = pick[j]
                            kept[count, last] = e
                            where[count] = place
                        count += 1
                    if value < least[pick[0], e]:
                        least[pick[0], e], best[pick[0], e] = value, place
                place += 1
        elif pick[depth] <= experts - size + depth:
            x = pick[depth]
            sum_price[depth + 1] = sum_price[depth] + price[x]
            sum_load[depth + 1] = sum_load[depth] + load[x]
            pick[depth + 1] = x + 1
            depth += 1
            continue
        depth -= 1
        if depth >= 0:
            pick[depth] += 1
    return count
