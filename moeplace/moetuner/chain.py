"""MoETuner's second problem as plain arrays: clusters of consecutive layers, what flows between them, and GPUs.

With ``g(l, c)`` the GPU of cluster ``c`` of layer ``l``, ``C[l, c, d]`` the token pairs that go from cluster ``c`` of
layer ``l`` to cluster ``d`` of layer ``l+1``, and ``D[g, h] = 1/B[g, h]`` (0 on the diagonal: staying is free),
minimise

    Σ_l z_l,   z_l = max_{c, d} C[l, c, d] · D[g(l, c), g(l+1, d)]

over one-to-one assignments per layer with as many experts on every GPU over the whole model (arXiv 2502.06643, §4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from moeplace.frozen import Floats, Ints, replaced

FORBIDDEN = 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One instance.

    Attributes
    ----------
    traffic
        ``[layer-1, cluster, next cluster]`` token pairs ``C``.
    cost
        ``[GPU, GPU]`` seconds per gigabyte ``D``, 0 on the diagonal.
    sizes
        ``[layer, cluster]`` experts in each cluster.
    room
        ``[GPU]`` most experts a GPU takes in one layer.
    total_lower, total_upper
        ``[GPU]`` fewest and most experts a GPU holds over all layers.
    """

    traffic: Floats
    cost: Floats
    sizes: Ints
    room: Ints
    total_lower: Ints
    total_upper: Ints

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.sizes)

    @property
    def num_gpus(self) -> int:
        """GPUs, and clusters per layer."""
        return len(self.cost)

    @property
    def is_level(self) -> bool:
        """Whether every one-to-one assignment is allowed: equal clusters in each layer, room for them on each GPU."""
        same = (self.sizes == self.sizes[:, :1]).all() and (self.sizes[:, :1] <= self.room).all()
        held = int(self.sizes[:, 0].sum())
        return bool(same and (self.total_lower <= held).all() and (held <= self.total_upper).all())

    def admits(self, gpu: Ints) -> bool:
        """Whether an assignment keeps the GPUs' room in every layer and their range over all layers."""
        return bool((self.sizes <= self.room[gpu]).all()) and self.excess(gpu) == 0

    def relaxed(self, by: int, capacity: Ints) -> Chain:
        """The same instance with every range over all layers wider by ``by`` experts, within ``capacity`` [GPU]."""
        upper = np.minimum(self.total_upper + by, capacity)
        return replaced(self, total_lower=self.total_lower - by, total_upper=upper)

    def layer_costs(self, gpu: Ints) -> Floats:
        """``[layer-1]`` the ``z_l`` of an assignment ``gpu`` [layer, cluster]. Complexity: O(layers · GPUs²)."""
        moved = self.traffic * self.cost[gpu[:-1, :, None], gpu[1:, None, :]]
        costs: Floats = moved.max(axis=(1, 2))
        return costs

    def totals(self, gpu: Ints) -> Ints:
        """``[GPU]`` experts over all layers."""
        held = np.zeros(self.num_gpus, np.int64)
        np.add.at(held, gpu.ravel(), self.sizes.ravel())
        return held

    def excess(self, gpu: Ints) -> int:
        """Experts by which the worst GPU misses its range over all layers; 0 where the memory rows hold."""
        held = self.totals(gpu)
        return max(0, int((self.total_lower - held).max()), int((held - self.total_upper).max()))


def level_start(chain: Chain) -> Ints:
    """``[layer, cluster]`` GPUs that keep the totals as even as a greedy pass can.

    Layer by layer the assignment that minimises ``Σ_g (held - target share)²``; the identity where clusters are equally
    large. Complexity: O(layers · GPUs³).
    """
    target = (chain.total_lower + chain.total_upper) / 2 / chain.num_layers
    held = np.zeros(chain.num_gpus)
    gpu = np.empty_like(chain.sizes)
    order = np.arange(chain.num_gpus)
    for layer, size in enumerate(chain.sizes):
        after = held[None, :] + size[:, None] - target[None, :] * (layer + 1)
        away = np.where(order[:, None] == order[None, :], 0.0, 1e-6)
        costs = np.where(size[:, None] > chain.room[None, :], FORBIDDEN, after**2 + away)
        gpu[layer] = linear_sum_assignment(costs)[1]
        held[gpu[layer]] += size
    return gpu


def improve(chain: Chain, gpu: Ints, *, sweeps: int = 8, stop: Callable[[], bool] = lambda: False) -> Ints:
    """Re-assign one layer after another, its neighbours fixed, until nothing improves.

    Clusters only change places with clusters of their own size, so room and totals stay as they are. Each step solves
    ``min max_c P[c, g] + max_c N[c, g]`` (to the layer before and to the one after) by thresholding the first and
    matching on the second. Complexity per step: O(thresholds · log GPUs · matching).
    """
    gpu = gpu.copy()
    layers = [*range(chain.num_layers)]
    for sweep in range(sweeps):
        before = chain.layer_costs(gpu).sum()
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            if stop():
                return gpu
            gpu[layer] = _best_layer(chain, gpu, layer, first_pass=sweep == 0)
        if sweep and chain.layer_costs(gpu).sum() >= before * (1 - 1e-12):
            break
    return gpu


def _best_layer(chain: Chain, gpu: Ints, layer: int, *, first_pass: bool) -> Ints:
    size_at = np.empty(chain.num_gpus, np.int64)
    size_at[gpu[layer]] = chain.sizes[layer]
    allowed = chain.sizes[layer][:, None] == size_at[None, :]
    shape = (chain.num_gpus, chain.num_gpus)
    arriving, leaving = np.zeros(shape), np.zeros(shape)
    if layer:
        table = chain.traffic[layer - 1][:, :, None] * chain.cost[gpu[layer - 1]][:, None, :]
        arriving = table.max(axis=0)
    if layer + 1 < chain.num_layers and not first_pass:
        table = chain.traffic[layer][:, :, None] * chain.cost[:, gpu[layer + 1]].T[None, :, :]
        leaving = table.max(axis=1)
    current = gpu[layer]
    best = _pair_cost(arriving, leaving, current)
    levels = np.unique(arriving[allowed])
    if len(levels) > 24:
        levels = np.unique(np.quantile(levels, np.linspace(0, 1, 24), method="lower"))
    for level in levels:
        if level >= best:
            break
        found = bottleneck_assignment(leaving, allowed & (arriving <= level), arriving)
        if found is not None and (value := _pair_cost(arriving, leaving, found)) < best:
            best, current = value, found
    return current


def _pair_cost(arriving: Floats, leaving: Floats, gpu: Ints) -> float:
    cluster = np.arange(len(gpu))
    return float(arriving[cluster, gpu].max() + leaving[cluster, gpu].max())


def bottleneck_assignment(costs: Floats, allowed: np.ndarray, tie: Floats | None = None) -> Ints | None:
    """``[row]`` column of the one-to-one assignment with the least maximal cost; None where ``allowed`` admits none.

    Thresholding by binary search over the distinct costs, each test a maximum matching; among assignments within the
    threshold the one with the least sum of ``tie``. Complexity: O(log n · matching + n³).
    """
    levels = np.unique(costs[allowed])
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        graph = csr_array((allowed & (costs <= levels[middle])).astype(np.int8))
        if (maximum_bipartite_matching(graph, perm_type="column") >= 0).all():
            high = middle
        else:
            low = middle + 1
    if low == len(levels):
        return None
    within = allowed & (costs <= levels[low])
    weights = np.where(within, costs if tie is None else tie, FORBIDDEN)
    columns: Ints = linear_sum_assignment(weights)[1]
    return columns
