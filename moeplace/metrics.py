"""What a placement does to load and traffic, in natural units that need no hardware.

* load: max/mean and balancedness (mean/max) of GPU load, per layer; copies of an expert share its tokens evenly;
* ``cross_gpu_share``, ``cross_node_share``: share of the ``k·k`` consecutive pairs of a token on different GPUs, nodes;
* ``copies_per_token_gpu``, ``copies_per_token_node``: distinct GPUs, nodes among a token's ``k`` experts, mean over
  tokens and layers, whatever the token's home;
* ``remote_copies_per_token``: nodes other than its own that a token is sent to, all homes alike where none is recorded;
* ``next_layer_locality``: share of a token's choices in layer ``l+1`` on a GPU it used in layer ``l``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.affinity import RoutingStats
from moeplace.fingerprint import hashed
from moeplace.frozen import Floats, Ints
from moeplace.placement import Placement
from moeplace.routing import Router
from moeplace.topology import Topology
from moeplace.trace import Trace

BLOCK_TOKENS = 20_000
MOST_HOMES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficMetrics:
    """Traffic of a placement on a trace; None where the trace does not tell."""

    cross_gpu_share: float | None
    cross_node_share: float | None
    copies_per_token_gpu: float | None
    copies_per_token_node: float | None
    remote_copies_per_token: float | None
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
    remote: float | None = None
    if stats.sample is not None:
        token = token_metrics(stats.sample, placement, topology, router)
        remote = remote_copies(stats.sample, placement, topology, router)
    return TrafficMetrics(
        cross_gpu_share=crossing[0],
        cross_node_share=crossing[1],
        copies_per_token_gpu=token[0],
        copies_per_token_node=token[1],
        remote_copies_per_token=remote,
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


def remote_copies(trace: Trace, placement: Placement, topology: Topology, router: Router | None = None) -> float:
    """Nodes other than its own that a token is sent to, mean over the tokens and layers of ``trace``.

    Expected values: an expert's tokens go to its copies with the router's shares for their home, each expert by itself
    (or jointly, whatever the home, where the router chooses copies so). Without recorded ranks every home is as likely;
    with more nodes than :data:`MOST_HOMES` each token has that many homes, spread evenly. Complexity: O(tokens · layers
    · k · nodes · homes), without the homes where shares do not depend on them.
    """
    layers = trace.meta.num_layers
    if topology.num_nodes < 2 or not trace.num_tokens:
        return 0.0
    router = router or Router.of(placement, topology)
    parts = tokens_of_homes(trace, topology)
    total = sum(_remote_layer(trace.experts[:, layer], layer, router, topology, parts) for layer in range(layers))
    return total / (sum(map(len, parts)) * layers)


def tokens_of_homes(trace: Trace, topology: Topology) -> list[Ints]:
    """Tokens of every home node: those recorded; else all of them, each with at most :data:`MOST_HOMES` homes."""
    nodes, ranks, token = topology.num_nodes, _recorded(trace, topology.num_gpus), np.arange(trace.num_tokens)
    if ranks is not None:
        return [np.flatnonzero(ranks // topology.gpus_per_node == node) for node in range(nodes)]
    if nodes <= MOST_HOMES:
        return [token] * nodes
    home = (token[:, None] + np.arange(MOST_HOMES) * nodes // MOST_HOMES) % nodes
    return [np.flatnonzero((home == node).any(axis=1)) for node in range(nodes)]


def _remote_layer(
    experts: npt.NDArray[Any], layer: int, router: Router, topology: Topology, parts: list[Ints]
) -> float:
    """Sum over tokens of all homes of the nodes other than its own that each is sent to; ``parts`` by home node."""
    size, total, alike = topology.gpus_per_node, 0.0, len(np.unique(router.class_of_home)) == 1
    chance: Floats | None = None
    for own, rows in enumerate(parts):
        if chance is None or not alike or rows is not parts[own - 1]:
            chance = _node_chances(experts[rows], rows, layer, router, own * size, topology)
        total += float(chance.sum() - chance[:, own].sum())
    return total


def _node_chances(
    experts: npt.NDArray[Any], token: Ints, layer: int, router: Router, home: int, topology: Topology
) -> Floats:
    """``[token, node]`` probability that tokens of a home rank are sent to each node."""
    nodes = topology.num_nodes
    if router.is_joint:
        slot = router.choose(layer, experts, token, np.full(len(token), home))
        visited = np.zeros((len(token), nodes))
        visited[np.arange(len(token))[:, None], slot // router.table.slots_per_gpu // topology.gpus_per_node] = 1.0
        return visited
    keep = 1 - _node_shares(router, layer, home, topology)
    away = keep[experts[:, 0]]
    for j in range(1, experts.shape[1]):
        away = away * keep[experts[:, j]]
    return 1 - away


def _node_shares(router: Router, layer: int, home: int, topology: Topology) -> Floats:
    """``[expert, node]`` share of an expert's tokens of a home rank that each node serves."""
    upto = router.upto[layer][router.class_of_home[home]].astype(np.float64)
    share = np.zeros((len(upto), topology.num_nodes))
    node = router.table.gpu[layer] // topology.gpus_per_node
    np.add.at(share, (np.arange(len(upto))[:, None], node), np.diff(upto, axis=-1, prepend=0.0))
    return share


def _recorded(trace: Trace, num_gpus: int) -> Ints | None:
    """``[token]`` ranks that a trace records, where all of them exist."""
    ranks = trace.rank
    if ranks is not None and ranks.size and ranks.min() >= 0 and ranks.max() < num_gpus:
        return ranks
    return None


def _homes(trace: Trace, num_gpus: int) -> Ints:
    ranks = _recorded(trace, num_gpus)
    if ranks is not None:
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
