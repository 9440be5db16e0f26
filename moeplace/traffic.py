"""Tokens, placement and replica choice → rows that each copy computes, and who sends how many copies to whom."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.balance import least_busy_split
from moeplace.counting import compile_kernel, count_visits
from moeplace.fingerprint import hashed
from moeplace.frozen import Ints
from moeplace.network import NORMAL, Traffic
from moeplace.routing import STEP, Router
from moeplace.topology import Topology

COMPILE_FROM_SELECTIONS = 300_000  # of one layer: beyond it NumPy takes longer than a compiled loop takes to load


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """Tokens of many steps, or of their micro-batches.

    Attributes
    ----------
    row
        ``[token]`` row of each in the expert ids, which several steps may share; the replica choice goes by it.
    group, num_groups
        ``[token]`` step (or micro-batch) of each, and how many there are.
    home
        ``[token]`` rank whose attention holds it.
    """

    row: Ints
    group: Ints
    num_groups: int
    home: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """What one layer's tokens do to GPUs and network.

    Attributes
    ----------
    rows
        ``[group, GPU, slot]`` rows that each copy computes.
    traffic
        Copies of the dispatch by home and destination.
    """

    rows: npt.NDArray[Any]
    traffic: Traffic


def visit(ids: npt.NDArray[Any], tokens: StepTokens, router: Router, layer: int, place: tuple[Topology, str]) -> Visits:
    """Send the tokens of one layer to the copies that serve them.

    Parameters
    ----------
    ids
        ``[row, k]`` chosen experts.
    tokens
        Which rows make up which step, and their homes.
    router, layer
        The replica choice, and the MoE layer's ordinal.
    place
        The topology, and the kernel: ``low-latency`` sends one copy per selection, ``normal`` one per distinct GPU and
        per distinct node.

    Returns
    -------
    Visits
        Complexity: O(tokens · k), with a small constant where there are many.
    """
    topology, kernel = place
    loops = router.per_step or len(tokens.row) * ids.shape[1] >= COMPILE_FROM_SELECTIONS
    if loops and not router.is_joint:
        return _by_loop(ids, tokens, router, layer, place)
    slot = slots_of(ids, tokens, router, layer)
    width = router.table.slots_per_gpu
    shape = (tokens.num_groups, topology.num_gpus, width)
    rows = count_visits(tokens.group, slot, (shape[0], shape[1] * width), distinct=False).reshape(shape)
    return Visits(
        rows=rows, traffic=dispatch_traffic(slot // width, tokens.home, (tokens.group, shape[0]), topology, kernel)
    )


def slots_of(ids: npt.NDArray[Any], tokens: StepTokens, router: Router, layer: int) -> Ints:
    """``[token, k]`` slot that serves each selection; for policies without shares of their own in every step."""
    return router.choose(layer, ids[tokens.row], tokens.row, tokens.home)


def home_ranks(
    recorded: npt.NDArray[np.int64] | None, turn: npt.NDArray[np.int64], num_gpus: int
) -> npt.NDArray[np.int64]:
    """``[token]`` home rank: the recorded one where every rank exists, otherwise dealt in turn."""
    if recorded is not None and recorded.size and recorded.min() >= 0 and recorded.max() < num_gpus:
        return recorded
    return turn % num_gpus


def dispatch_traffic(
    gpu: npt.NDArray[Any], home: Ints, group: tuple[Ints, int], topology: Topology, kernel: str
) -> Traffic:
    """Copies each home rank sends in one layer's dispatch.

    Parameters
    ----------
    gpu
        ``[token, k]`` GPU that serves each selection.
    home
        ``[token]`` rank whose attention holds the token.
    group
        ``[token]`` batch of each token, and the number of batches.
    topology
        Gives the nodes.
    kernel
        ``low-latency`` sends one copy per selection, ``normal`` one per distinct GPU and per distinct node.

    Returns
    -------
    Traffic
        ``copies`` [batch, GPU, GPU] and, for normal kernels, ``node_copies`` [batch, GPU, node], int64.
    """
    gpus, nodes = topology.num_gpus, topology.num_nodes
    source, shape = group[0] * gpus + home, (group[1], gpus, -1)
    sources, distinct = group[1] * gpus, kernel == NORMAL
    copies = count_visits(source, gpu, (sources, gpus), distinct=distinct).reshape(shape)
    if not distinct:
        return Traffic(copies=copies)
    node_copies = count_visits(source, gpu // topology.gpus_per_node, (sources, nodes), distinct=True)
    return Traffic(copies=copies, node_copies=node_copies.reshape(shape))


def chain_traffic(gpu: npt.NDArray[Any], following: npt.NDArray[Any], group: tuple[Ints, int], gpus: int) -> Traffic:
    """Copies between consecutive layers when a token moves from expert to expert: all ``k·k`` pairs of each token.

    ``gpu`` and ``following`` are ``[token, k]`` GPUs in layer ``l`` and ``l+1``.
    """
    copies = np.zeros(group[1] * gpus * gpus, np.int64)
    for i in range(gpu.shape[1]):
        source = (group[0] * gpus + gpu[:, i]) * gpus
        copies += np.bincount((source[:, None] + following).ravel(), minlength=copies.size)
    return Traffic(copies=copies.reshape(group[1], gpus, gpus))


def step_quotas(ids: npt.NDArray[Any], tokens: StepTokens, router: Router, layer: int, gpus: int) -> Ints:
    """``[group, expert, copy]`` how many tokens of an expert this copy and those before it serve in each step.

    The split that makes the busiest GPU of the step as little loaded as possible, rounded to whole tokens.
    """
    table = router.table
    load = count_visits(tokens.group, ids[tokens.row], (tokens.num_groups, table.count.shape[1]), distinct=False)
    split, _ = least_busy_split(load.astype(np.float64), table.gpu[layer], table.count[layer], gpus)
    # sums are rounded, not shares: they end at the whole load and no share is off by more than one
    return np.rint(np.cumsum(split, axis=2)).astype(np.int64)


def _by_loop(
    ids: npt.NDArray[Any], tokens: StepTokens, router: Router, layer: int, place: tuple[Topology, str]
) -> Visits:
    topology, kernel = place
    gpus, nodes, groups = topology.num_gpus, topology.num_nodes, tokens.num_groups
    table = router.table
    rows = np.zeros((groups, gpus * table.slots_per_gpu), np.int32)
    copies = np.zeros((groups, gpus, gpus), np.int32)
    distinct = kernel == NORMAL
    node_copies = np.zeros((groups, gpus, nodes) if distinct else (1, 1, 1), np.int32)
    quota = step_quotas(ids, tokens, router, layer, gpus) if router.per_step else np.zeros((1, 1, 1), np.int64)
    loop = _compiled() if len(tokens.row) * ids.shape[1] >= COMPILE_FROM_SELECTIONS else _visit_loop
    with np.errstate(over="ignore"):  # hashes are meant to overflow
        loop(
            (ids, tokens.row, tokens.group, tokens.home, hashed(tokens.row, layer)),
            (table.slot[layer], table.count[layer], router.upto[layer], router.class_of_home, quota),
            (table.slots_per_gpu, topology.node_of_gpu(), distinct, router.per_step),
            (rows, copies, node_copies),
        )
    traffic = Traffic(copies=copies, node_copies=node_copies if distinct else None)
    return Visits(rows=rows.reshape(groups, gpus, -1), traffic=traffic)


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_visit_loop, _copy_of)


def _visit_loop(tokens: Any, choice: Any, place: Any, counted: Any) -> None:
    """Count rows and copies token by token; compiled where there are many."""
    ids, row, group, home, token_hash = tokens
    slot, count, upto, class_of_home, quota = choice
    width, node_of_gpu, distinct, per_step = place
    rows, copies, node_copies = counted
    top_k = ids.shape[1]
    gpu_seen = np.full(len(node_of_gpu), -1, np.int64)  # token that has met a GPU, or a node, last
    node_seen = np.full(len(node_of_gpu), -1, np.int64)
    dealt = np.zeros(quota.shape[:2], np.int64)
    for i in range(len(row)):
        batch, source = group[i], home[i]
        for j in range(top_k):
            expert = ids[row[i], j]
            copy = 0
            if count[expert] > 1:
                if per_step:
                    while dealt[batch, expert] >= quota[batch, expert, copy]:
                        copy += 1
                    dealt[batch, expert] += 1
                else:
                    copy = _copy_of(upto[class_of_home[source], expert], token_hash[i], slot[expert, 0])
            place_of = slot[expert, copy]
            gpu = place_of // width
            rows[batch, place_of] += 1
            if not distinct:
                copies[batch, source, gpu] += 1
                continue
            if gpu_seen[gpu] != i:
                gpu_seen[gpu] = i
                copies[batch, source, gpu] += 1
            node = node_of_gpu[gpu]
            if node_seen[node] != i:
                node_seen[node] = i
                node_copies[batch, source, node] += 1


def _copy_of(upto: Any, token_hash: Any, first_slot: Any) -> int:
    """Number of the copy that the static shares give a token."""
    mixed = (token_hash + np.uint64(first_slot) * STEP) >> np.uint64(40)
    turn = np.float32(mixed) * np.float32(2.0**-24)
    copy = 0
    while upto[copy] <= turn:
        copy += 1
    return copy
