"""MoETuner's second problem on networks of one or two levels, solved exactly by dynamic programming.

When every one-to-one assignment is allowed and the network knows only "same GPU", "same node" (cost ``d1``) and "other
node" (cost ``d2 ≥ d1``), the labels of nodes and of GPUs inside a node are free in every layer. What is left to choose
per layer is which clusters share a node: an unordered partition into ``N`` blocks of ``M``. For blocks ``A`` (layer
``l``) and ``B`` (layer ``l+1``) on one node the cost is

    K(A, B) = max( d2 · max_{c∈A, d∉B} C[c, d],  d1 · largest second-largest entry of a row or column of C[A, B] )

because the entries that stay on their GPU are a matching of the block. A pair of partitions costs the bottleneck
assignment of its blocks, and the best sequence of partitions is a shortest path (Viterbi). Proof that labels are free:
a relabelling of layer ``l+1`` and of all later layers changes no cost of the earlier pairs, and the later ones only see
GPUs up to the network's symmetry.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Floats, Ints
from moeplace.moetuner.chain import Chain

MAX_STATES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoLevels:
    """``nodes`` nodes of ``gpus_per_node`` consecutive GPUs; cost inside a node and between nodes [s/GB]."""

    nodes: int
    gpus_per_node: int
    near: float
    far: float

    @property
    def num_partitions(self) -> int:
        """Unordered partitions of the clusters into nodes."""
        orders = math.factorial(self.gpus_per_node) ** self.nodes * math.factorial(self.nodes)
        return math.factorial(self.nodes * self.gpus_per_node) // orders


def two_levels(cost: Floats) -> TwoLevels | None:
    """The one or two levels of a cost matrix of equal, consecutive nodes; None where there are more."""
    gpus = len(cost)
    apart = ~np.eye(gpus, dtype=bool)
    values = np.unique(cost[apart])
    if len(values) == 1:
        return TwoLevels(nodes=1, gpus_per_node=gpus, near=float(values[0]), far=float(values[0]))
    if len(values) != 2:
        return None
    size = int((cost[0] < values[1]).sum())
    node = np.arange(gpus) // size
    expected = np.where(node[:, None] == node[None, :], values[0], values[1])
    if gpus % size or not (cost[apart] == expected[apart]).all():
        return None
    return TwoLevels(nodes=gpus // size, gpus_per_node=size, near=float(values[0]), far=float(values[1]))


def shortest_chain(chain: Chain, levels: TwoLevels) -> Ints:
    """``[layer, cluster]`` GPUs of an optimal assignment.

    Complexity: O(layers · partitions² · nodes!) time, O(layers · partitions²) memory.
    """
    partitions = _partitions(levels.nodes, levels.gpus_per_node)
    blocks = {block: i for i, block in enumerate(sorted({block for partition in partitions for block in partition}))}
    member = np.zeros((len(blocks), chain.num_gpus), bool)
    for block, i in blocks.items():
        member[i, list(block)] = True
    states = np.array([[blocks[block] for block in partition] for partition in partitions])
    best = np.zeros(len(states))
    came: list[Ints] = []
    for traffic in chain.traffic:
        steps = _pair_costs(_block_costs(traffic, member, levels), states)
        total = best[:, None] + steps
        came.append(total.argmin(axis=0))
        best = total.min(axis=0)
    path = [int(best.argmin())]
    for previous in reversed(came):
        path.append(int(previous[path[-1]]))
    return _gpus(chain, levels, states[path[::-1]], member)


def _partitions(nodes: int, size: int) -> list[tuple[tuple[int, ...], ...]]:
    def split(rest: tuple[int, ...]) -> list[tuple[tuple[int, ...], ...]]:
        if not rest:
            return [()]
        found = []
        for others in itertools.combinations(rest[1:], size - 1):
            block = (rest[0], *others)
            left = tuple(i for i in rest if i not in block)
            found += [(block, *tail) for tail in split(left)]
        return found

    return split(tuple(range(nodes * size)))


def _block_costs(traffic: Floats, member: npt.NDArray[np.bool_], levels: TwoLevels) -> Floats:
    """``[block, next block]`` the cost ``K`` of the module's text. Complexity: O(blocks² · GPUs)."""
    sent = np.where(member[:, :, None], traffic[None], 0.0).max(axis=1)
    crossing = np.where(~member[None], sent[:, None, :], 0.0).max(axis=2)
    row_seconds = _second_largest(traffic, member)
    column_seconds = _second_largest(traffic.T, member)
    by_row = np.where(member[:, :, None], row_seconds[None], 0.0).max(axis=1)
    by_column = np.where(member[:, :, None], column_seconds[None], 0.0).max(axis=1).T
    staying = np.maximum(by_row, by_column)
    costs: Floats = np.maximum(levels.far * crossing, levels.near * staying)
    return costs


def _second_largest(table: Floats, member: npt.NDArray[np.bool_]) -> Floats:
    """``[row, block]`` second-largest entry of each row among the block's columns."""
    inside = np.where(member[None], table[:, None, :], 0.0)
    if inside.shape[2] < 2:
        return np.zeros(inside.shape[:2])
    second: Floats = np.partition(inside, -2, axis=2)[:, :, -2]
    return second


def _pair_costs(block_costs: Floats, states: Ints) -> Floats:
    best = np.full((len(states), len(states)), np.inf)
    for order in itertools.permutations(range(states.shape[1])):
        costs = np.zeros_like(best)
        for node, other in enumerate(order):
            np.maximum(costs, block_costs[states[:, node]][:, states[:, other]], out=costs)
        np.minimum(best, costs, out=best)
    return best


def _gpus(chain: Chain, levels: TwoLevels, path: Ints, member: npt.NDArray[np.bool_]) -> Ints:
    """Label the nodes and GPUs along a path of partitions."""
    size = levels.gpus_per_node
    gpu = np.zeros(chain.sizes.shape, np.int64)
    order = list(path[0])
    for node, block in enumerate(order):
        gpu[0, member[block]] = node * size + np.arange(size)
    for layer, traffic in enumerate(chain.traffic):
        costs = _block_costs(traffic, member, levels)
        options = itertools.permutations(path[layer + 1])
        order_next = min(options, key=lambda blocks: max(costs[a, b] for a, b in zip(order, blocks, strict=True)))
        for block, following in zip(order, order_next, strict=True):
            _stay(traffic, gpu[layer], gpu[layer + 1], member[block], member[following])
        order = list(order_next)
    return gpu


def _stay(
    traffic: Floats, here: Ints, there: Ints, rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_]
) -> None:
    """Place the clusters ``columns`` on the GPUs of ``rows``: the heaviest entries stay while they are a matching."""
    row, column = np.flatnonzero(rows), np.flatnonzero(columns)
    block = traffic[np.ix_(row, column)]
    free_rows, free_columns = list(range(len(row))), list(range(len(column)))
    for flat in np.argsort(-block, axis=None, kind="stable"):
        i, j = divmod(int(flat), len(column))
        if i in free_rows and j in free_columns:
            there[column[j]] = here[row[i]]
            free_rows.remove(i)
            free_columns.remove(j)
