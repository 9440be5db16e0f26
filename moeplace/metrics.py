"""What a placement does to load and traffic, in natural units that need no hardware.

* load: max/mean and balancedness (mean/max) of GPU load, per layer; copies of an expert share its tokens evenly;
* ``cross_gpu_share``, ``cross_node_share``: share of the ``k·k`` consecutive pairs of a token on different GPUs, nodes;
* ``copies_per_token_gpu``, ``copies_per_token_node``: distinct GPUs, nodes among a token's ``k`` experts, mean over
  tokens and layers, whatever the token's home;
* ``next_layer_locality``: share of a token's choices in layer ``l+1`` on a GPU it used in layer ``l``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.affinity import RoutingStats
from moeplace.fingerprint import hashed
from moeplace.frozen import Floats
from moeplace.placement import Placement
from moeplace.routing import Router
from moeplace.topology import Topology
from moeplace.trace import Trace

BLOCK_TOKENS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficMetrics:
    """Traffic of a placement on a trace; None where the trace does not tell."""

    cross_gpu_share: float | None
    cross_node_share: float | None
    copies_per_token_gpu: float | None
    copies_per_token_node: float | None
    next_layer_locality: float | None


def max_over_mean(placement: Placement, load: npt.NDArray[Any], router: Router | None = None) -> Floats:
    """``[layer]`` load of the busiest GPU over the mean GPU load; copies share evenly, or as the router has them."""
    share = placement.even_share() if router is None else router.gpu_share(placement.num_gpus)
    gpu: Floats = np.einsum("lge,le->lg", share, load.astype(np.float64))
    ratio: Floats = gpu.max(axis=1) / gpu.mean(axis=1)
    return ratio


def cross_shares(
    stats: RoutingStats, placement: Placement, topology: Topology, router: Router | None = None
) -> tuple[float, float] | None:
    """Share of consecutive ``k·k`` pairs that cross GPUs, and that cross nodes; copies share evenly or by the router.

    Returns None when the trace has no transitions. Complexity: O(layers · experts² · GPUs).
    """
    if stats.transition is None or stats.meta.num_layers < 2:
        return None
    share = placement.even_share() if router is None else router.gpu_share(placement.num_gpus)
    by_node = share.reshape(len(share), topology.num_nodes, topology.gpus_per_node, -1).sum(axis=2)
    total = float(stats.transition.sum())
    stay_gpu = stay_node = 0.0
    for layer in range(stats.meta.num_layers - 1):
        pairs = stats.transition[layer].astype(np.float64)
        stay_gpu += float(np.sum((share[layer] @ pairs) * share[layer + 1]))
        stay_node += float(np.sum((by_node[layer] @ pairs) * by_node[layer + 1]))
    return max(0.0, 1 - stay_gpu / total), max(0.0, 1 - stay_node / total)


def traffic_metrics(
    stats: RoutingStats, placement: Placement, topology: Topology, router: Router | None = None
) -> TrafficMetrics:
    """Every traffic metric of a placement; token-level ones from the statistics' token sample."""
    crossing = cross_shares(stats, placement, topology, router) or (None, None)
    token: tuple[float | None, float | None, float | None] = (None, None, None)
    if stats.sample is not None:
        token = token_metrics(stats.sample, placement, topology, router)
    return TrafficMetrics(
        cross_gpu_share=crossing[0],
        cross_node_share=crossing[1],
        copies_per_token_gpu=token[0],
        copies_per_token_node=token[1],
        next_layer_locality=token[2],
    )


def copies_per_token(stats: RoutingStats, placement: Placement, topology: Topology) -> float:
    """GPUs that a token of the sample visits, mean over layers; the number of choices where only counts are known."""
    if stats.sample is None:
        return float(stats.meta.top_k)
    return token_metrics(stats.sample, placement, topology)[0]


def token_metrics(
    trace: Trace, placement: Placement, topology: Topology, router: Router | None = None
) -> tuple[float, float, float | None]:
    """Copies per token at GPU and at node level, and next-layer locality, over the tokens of ``trace``.

    A router that goes by homes takes those that are recorded, else random ones by request.
    """
    router = router or Router.of(placement, topology)
    home = _homes(trace, topology.num_gpus)
    layers, top_k = trace.meta.num_layers, trace.meta.top_k
    gpu_copies = node_copies = local = 0
    for start in range(0, trace.num_tokens, BLOCK_TOKENS):
        experts = trace.experts[start : start + BLOCK_TOKENS]
        token = np.arange(start, start + len(experts))
        before: npt.NDArray[np.uint64] | None = None
        for layer in range(layers):
            slot = router.choose(layer, experts[:, layer], token, home[start : start + BLOCK_TOKENS])
            gpu = slot // router.table.slots_per_gpu
            visited = _bit_sets(gpu, topology.num_gpus)
            gpu_copies += int(np.bitwise_count(visited).sum())
            nodes = _bit_sets(gpu // topology.gpus_per_node, topology.num_nodes)
            node_copies += int(np.bitwise_count(nodes).sum())
            if before is not None:
                local += _members(before, gpu)
            before = visited
    cells = trace.num_tokens * layers
    locality = local / (trace.num_tokens * (layers - 1) * top_k) if layers > 1 else None
    return gpu_copies / cells, node_copies / cells, locality


def _homes(trace: Trace, num_gpus: int) -> npt.NDArray[np.int64]:
    ranks = trace.rank
    if ranks is not None and ranks.size and ranks.min() >= 0 and ranks.max() < num_gpus:
        return ranks
    return (hashed(trace.request, 0) % np.uint64(num_gpus)).astype(np.int64)


def _bit_sets(place: npt.NDArray[Any], num_places: int) -> npt.NDArray[np.uint64]:
    """``[token, word]`` bit set of the places a token touches."""
    sets = np.zeros((len(place), -(-num_places // 64)), np.uint64)
    token = np.arange(len(place))
    for j in range(place.shape[1]):
        sets[token, place[:, j] >> 6] |= np.uint64(1) << (place[:, j] & 63).astype(np.uint64)
    return sets


def _members(sets: npt.NDArray[np.uint64], place: npt.NDArray[Any]) -> int:
    words = np.take_along_axis(sets, place >> 6, axis=1)
    return int(((words >> (place & 63).astype(np.uint64)) & np.uint64(1)).sum())
