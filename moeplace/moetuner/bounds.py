"""Certified lower bounds on each ``z_l`` of MoETuner's second problem, one layer pair at a time.

Whether ``z ≤ t`` is possible for one pair is relaxed to conditions that must hold at every distinct cost ``v`` of the
network. Call a pair of clusters *near at v* if its traffic ``C > t/v``: it must sit on GPUs with ``D < v``.

* Degrees: a cluster has at most as many near partners as a GPU has GPUs (itself included) with ``D < v``; at the
  smallest ``v`` this says that heavy pairs form a matching.
* Components: clusters joined by near pairs sit in one connected block of the graph ``D < v`` (a node of a two-level
  network), so components fit into the blocks: at most as many clusters of either layer as the block has GPUs, all
  components packed together.

The least ``t`` that passes is a lower bound on ``z_l``. On one switched domain and on equal nodes of a two-level
network the conditions are also sufficient (heavy pairs, being a matching inside components, share a GPU; the rest go
anywhere inside their node), so the bound is the exact optimum of the pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from moeplace.frozen import Floats
from moeplace.moetuner.chain import Chain

PACKING_STEPS = 20_000
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """What the network allows below one cost ``v``."""

    cost: float
    most_next: int
    most_previous: int
    blocks: tuple[int, ...]


def pair_bounds(chain: Chain) -> Floats:
    """``[layer-1]`` lower bound on each ``z_l``. Complexity: O(layers · log GPUs · levels · GPUs²)."""
    levels = _levels(chain.cost)
    return np.array([pair_bound(traffic, levels) for traffic in chain.traffic], np.float64)


def _levels(cost: Floats) -> tuple[_Level, ...]:
    # a directed network is relaxed to its faster direction
    least = np.minimum(cost, cost.T)
    found = []
    for value in np.unique(least[~np.eye(len(cost), dtype=bool)]):
        near = least < value
        _, block = connected_components(csr_array(near), directed=False)
        sizes = sorted(np.bincount(block).tolist(), reverse=True)
        degree = int(near.sum(axis=1).max())
        found.append(_Level(cost=float(value), most_next=degree, most_previous=degree, blocks=tuple(sizes)))
    return tuple(found)


def pair_bound(traffic: Floats, levels: tuple[_Level, ...]) -> float:
    """Least ``t`` for which every level's conditions hold, by binary search over the possible values of ``z``."""
    values = np.unique([0.0, *(traffic.ravel()[:, None] * [level.cost for level in levels]).ravel()])
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        # products and quotients of floats: give the test the benefit of the doubt
        if all(_passes(traffic * level.cost > values[middle] * (1 + 1e-12), level) for level in levels):
            high = middle
        else:
            low = middle + 1
    return float(values[low])


def _passes(near: Mask, level: _Level) -> bool:
    if near.sum(axis=1).max() > level.most_next or near.sum(axis=0).max() > level.most_previous:
        return False
    size = len(near)
    graph = np.zeros((2 * size, 2 * size), np.int8)
    graph[:size, size:] = near
    _, component = connected_components(csr_array(graph), directed=False)
    rows, columns = np.bincount(component[:size]), np.bincount(component[size:], minlength=int(component.max()) + 1)
    rows = np.pad(rows, (0, len(columns) - len(rows)))
    joined = [(int(a), int(b)) for a, b in zip(rows, columns, strict=True) if a and b]
    joined.sort(key=lambda item: (-max(item), item))
    return _packs(joined, level.blocks)


def _packs(items: list[tuple[int, int]], blocks: tuple[int, ...]) -> bool:
    """Whether components fit into blocks; True also where the search gives up, which keeps the bound valid.

    Single clusters are left out: they fill whatever is left.
    """
    left = [PACKING_STEPS]

    def place(index: int, room: tuple[tuple[int, int], ...]) -> bool:
        left[0] -= 1
        if index == len(items) or left[0] <= 0:
            return True
        rows, columns = items[index]
        tried: set[tuple[int, int]] = set()
        for i, (a, b) in enumerate(room):
            if rows > a or columns > b or (a, b) in tried:
                continue
            tried.add((a, b))
            if place(index + 1, (*room[:i], (a - rows, b - columns), *room[i + 1 :])):
                return True
        return False

    return place(0, tuple((block, block) for block in blocks))
