"""Pricing where sets are too many to count through: columns improved by exchanging one expert at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.counting import compile_kernel
from moeplace.frozen import Floats
from moeplace.hypergraph.columns import Pool
from moeplace.hypergraph.patterns import Patterns

MOST_STEPS = 12


def exchanged(patterns: Patterns, pool: Pool, price: Floats, load: Floats, cap: float) -> Pool:
    """Improve columns by exchanges until none lowers the reduced cost; every set on the way is a column too.

    Parameters
    ----------
    patterns
        The layer.
    pool
        Columns to start from, all within the cap and without padding.
    price, load
        ``[expert]`` duals and loads.
    cap
        Most load of a set.

    Returns
    -------
    Pool
        New columns. Complexity: O(patterns · k + size · experts) for each exchange.
    """
    count, size = pool.members.shape
    sets = np.zeros((count * MOST_STEPS, size), np.int64)
    costs = np.zeros(count * MOST_STEPS, np.int64)
    found = _compiled()(
        patterns.experts.astype(np.int32), patterns.weight, pool.members, pool.cost, price, load, cap, sets, costs,
        MOST_STEPS,
    )  # fmt: skip
    return Pool(np.sort(sets[:found], axis=1), costs[:found])


@functools.cache
def _compiled() -> Callable[..., int]:
    return compile_kernel(_descend, _around)


def _descend(
    experts: Any, weight: Any, members: Any, cost: Any, price: Any, load: Any, cap: float, sets: Any, costs: Any,
    most_steps: int,
) -> int:  # fmt: skip
    """Improve every set; write what is met to ``sets`` and ``costs`` and return how many."""
    size, number, found = members.shape[1], len(price), 0
    inside = np.zeros(number, np.int64)
    join, alone = np.zeros(number, np.int64), np.zeros(number, np.int64)
    both = np.zeros((number, number), np.int64)
    for i in range(len(members)):
        held, now = members[i].copy(), cost[i]
        for _ in range(most_steps):
            _around(experts, weight, held, inside, join, alone, both)
            busy = 0.0
            for j in range(size):
                busy += load[held[j]]
            least, out, into = -1e-6, -1, -1
            for j in range(size):
                a = held[j]
                for b in range(number):
                    if inside[b] or busy - load[a] + load[b] > cap:
                        continue
                    change = join[b] - alone[a] + both[a, b] - price[b] + price[a]
                    if change < least:
                        least, out, into = change, j, b
            if out < 0:
                break
            a = held[out]
            now += join[into] - alone[a] + both[a, into]
            held[out] = into
            sets[found] = held
            costs[found] = now
            found += 1
    return found


def _around(experts: Any, weight: Any, held: Any, inside: Any, join: Any, alone: Any, both: Any) -> None:
    """Count tokens that touch no expert held (``join``), only one (``alone``), and that one with another (``both``)."""
    inside[:] = 0
    join[:] = 0
    for a in held:
        inside[a] = 1
        alone[a] = 0
        both[a] = 0
    width = experts.shape[1]
    for p in range(len(weight)):
        hits, last = 0, 0
        for j in range(width):
            if inside[experts[p, j]]:
                hits += 1
                last = experts[p, j]
        if hits == 0:
            for j in range(width):
                join[experts[p, j]] += weight[p]
        elif hits == 1:
            alone[last] += weight[p]
            for j in range(width):
                both[last, experts[p, j]] += weight[p]
