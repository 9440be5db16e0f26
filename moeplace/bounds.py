"""Certified lower bounds on load, traffic and predicted step time.

Every bound holds for every placement of the problem's experts in its slots, so the bound on a sum of terms is the sum
of the terms' bounds. Each is tested against exact optima on small instances.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.batches import expert_rows
from moeplace.chains.duals import matching_bound, spectral_bound
from moeplace.compute import ExpertCompute
from moeplace.frozen import Floats, Ints
from moeplace.metrics import tokens_of_homes
from moeplace.network import KERNEL_OF_PHASE, LOW_LATENCY, Traffic, exchange, latency_us
from moeplace.problem import CONTEXT_COHERENT, COPIES, CROSS, GPU, LOAD, NODE, REMOTE, Problem
from moeplace.tails import CVAR, MEAN, risk_value
from moeplace.topology import CUSTOM, num_links_per_gpu

SPECTRA = 128  # most experts for which spectra are quick


def load_floor(problem: Problem) -> Floats:
    """``[layer]`` least max/mean GPU load any placement can have, copies sharing evenly.

    The largest of: the mean over the GPUs that have slots; the hottest copy when spare slots go to copies so as to make
    it as small as possible; and, when no slot is spare, :func:`crowding_floor`, a whole number of selections.

    Proof sketch: some GPU holds a copy of the hottest expert, and adding the next copy where load per copy is largest
    minimises the largest load per copy (exchange argument). Complexity: O(layers · (slots - experts) · experts).
    """
    room = problem.slots_per_gpu[problem.slots_per_gpu > 0]
    usable = len(room)
    even = problem.num_gpus / usable
    if problem.whole_model:
        return np.full(problem.num_layers, even)
    load = problem.stats.load.astype(np.float64)
    mean = load.sum(axis=1) / problem.num_gpus
    spare = problem.num_slots - problem.num_experts
    floor = hottest_copy(load, spare, usable)
    if spare == 0:
        whole = np.ceil(load.sum(axis=1) / usable)
        floor = np.maximum(np.maximum(floor, whole), crowding_floor(load, room))
    return np.maximum(even, floor / mean)


def crowding_floor(load: Floats, slots_per_gpu: Ints) -> Floats:
    """``[layer]`` least load of the busiest GPU when every slot is full and nothing is replicated.

    For every ``n``: either the ``n`` hottest experts are on ``n`` GPUs, which hold at least the ``s - n`` coldest
    beside them (``s`` the slots of the ``n`` smallest GPUs) and whose busiest has at least the mean of the ``n``; or
    two of them share a GPU, with as many of the coldest as its slots need. The floor is the largest over ``n`` of the
    lesser of the two. With ``n = 1`` it is the hottest expert beside the coldest that fill its GPU.

    Parameters
    ----------
    load
        ``[layer, expert]`` loads.
    slots_per_gpu
        ``[GPU]`` slots; they add up to the experts. Complexity: O(layers · experts · log experts).
    """
    room = np.sort(slots_per_gpu[slots_per_gpu > 0])
    hot = -np.sort(-load, axis=1)
    hottest, coldest = _running_sums(hot), _running_sums(hot[:, ::-1])
    shared = room[room > 1]
    floor = np.zeros(len(load))
    for count in range(1, min(len(room) + 1, load.shape[1]) + 1):
        apart = together = np.full(len(load), np.inf)
        if count <= len(room):
            apart = (hottest[:, count] + coldest[:, int(room[:count].sum()) - count]) / count
        if count > 1 and len(shared):
            together = hot[:, count - 2] + hot[:, count - 1] + coldest[:, int(shared[0]) - 2]
        floor = np.maximum(floor, np.minimum(apart, together))
    return floor


def _running_sums(values: Floats) -> Floats:
    """``[row, count]`` sums of the first ``count`` values of each row."""
    return np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], axis=1)


def hottest_copy(load: Floats, spare: int, most_copies: int) -> Floats:
    """``[layer]`` least possible load of the hottest copy: ``spare`` extra copies, at most ``most_copies`` of each."""
    copies = np.ones(load.shape, np.int64)
    layer = np.arange(len(load))
    for _ in range(spare):
        per_copy = np.where(copies < most_copies, load / copies, -1.0)
        copies[layer, per_copy.argmax(axis=1)] += 1
    hottest: Floats = (load / copies).max(axis=1)
    return hottest


def cross_bound(problem: Problem) -> float:
    """Lower bound on the share of consecutive pairs that cross GPUs (or nodes), whatever the load cap.

    See :func:`least_crossing`. 0 where slots are counted over the whole model.
    """
    pairs = problem.stats.transition
    if pairs is None or problem.whole_model or not pairs.any():
        return 0.0
    total = float(pairs.sum(dtype=np.float64))
    return max(0.0, float(least_crossing(problem).sum()) / total - 1e-12)


def least_crossing(problem: Problem) -> Floats:
    """``[layer-1]`` consecutive pairs that cross GPUs at least, or nodes as ``copies_level`` says: degrees and spectra.

    The better of :func:`moeplace.chains.duals.matching_bound` and, where every slot is full and GPUs are equal, the
    spectral bound, layer by layer. Both hold for groups of any kind: those of a node are bounded as one large GPU.
    Complexity: O(layers · experts²), and O(layers · experts³) for the spectra of at most 128 experts.
    """
    pairs = problem.stats.transition
    if pairs is None:
        return np.zeros(0)
    groups, slots = problem.levelled
    most = matching_bound(pairs, slots)
    if problem.divides_evenly and problem.num_experts <= SPECTRA:
        most = np.minimum(most, spectral_bound(pairs, groups, slots))
    least: Floats = np.maximum(0.0, pairs.sum(axis=(1, 2), dtype=np.float64) - most * (1 + 1e-12))
    return least


def objective_bound(problem: Problem) -> float:
    """Lower bound on the problem's objective.

    * ``load``: mean over layers of :func:`load_floor`;
    * ``step-time``: :func:`step_time_bound`;
    * ``copies``: a token's ``k`` distinct experts need at least ``⌈k/S⌉`` GPUs of ``S`` slots;
    * ``cross``: :func:`cross_bound`;
    * ``remote``: :func:`remote_bound`.
    """
    if problem.is_sampled:
        return sampled_bound(problem)
    if problem.objective == LOAD:
        return float(load_floor(problem).mean())
    if problem.objective == CROSS:
        return cross_bound(problem)
    if problem.objective == COPIES:
        slots = problem.levelled[1]
        whole = problem.num_layers if problem.whole_model else 1
        return float(max(1, -(-problem.stats.meta.top_k // (slots * whole))))
    if problem.objective == REMOTE:
        return remote_bound(problem)
    return step_time_bound(problem)


def remote_bound(problem: Problem) -> float:
    """Lower bound on the copies of a token that are sent to other nodes than its own, whatever the routing.

    A node of ``S`` slots covers a token whose ``k`` experts it holds all, so the tokens it covers have ``k`` times as
    many selections as there are, at most those of its ``S`` hottest experts. A token that its own node does not cover
    is sent to another one, and to ``⌈(k - S)/S'⌉`` of ``S'`` slots. Complexity: O(tokens · layers · k · nodes).
    """
    sample, nodes = problem.stats.sample, problem.topology.num_nodes
    if sample is None or not sample.num_tokens or nodes < 2 or problem.whole_model:
        return 0.0
    rooms = problem.slots_per_gpu.reshape(nodes, -1).sum(axis=1)
    top_k, total, cells = sample.meta.top_k, 0.0, 0
    for node, rows in enumerate(tokens_of_homes(sample, problem.topology)):
        beyond = -(-max(0, top_k - int(rooms[node])) // int(rooms.max()))
        cells += len(rows) * problem.num_layers
        for layer in range(problem.num_layers):
            load = np.sort(np.bincount(sample.experts[rows, layer].ravel(), minlength=1))[::-1]
            total += max(beyond * len(rows), len(rows) - int(load[: rooms[node]].sum()) / top_k)
    return max(0.0, total / cells * (1 - 1e-9))


def sampled_bound(problem: Problem) -> float:
    """Lower bound on the risk of a sampled problem; it certifies the sample, not the trace.

    In every step of every layer the busiest GPU does at least the mean of all and at least the hottest expert's rows
    shared by as many copies as there can be. Their sum over layers is a floor of every step, and the risk of the floors
    is one of the risk. For the mean, the busiest GPU of a layer also has on average at least what the busiest of the
    mean step has. CVaR95 is the largest of all sums with weights ``0 ≤ q_b ≤ 1/(0.05·B)`` that add up to 1, so that any
    such weights bound it by ``Σ_l min_x Σ_b q_b·Z_lb(x)``, and that by the floor of the weighted step. Communication is
    bounded by its latency. Complexity: O(batches · layers · experts).
    """
    if problem.steps is None:
        raise ValueError("the problem has no steps")
    rows = expert_rows(problem.steps).astype(np.float64)
    usable = int((problem.slots_per_gpu > 0).sum())
    most = min(usable, problem.num_slots - problem.num_experts + 1)
    if problem.whole_model:
        most = usable
    if problem.objective == LOAD:
        mean = np.maximum(rows.sum(axis=1) / problem.num_gpus, 1e-300)
        floors = np.maximum(rows.max(axis=1) / most / mean, problem.num_gpus / usable)
        floors[rows.sum(axis=1) == 0] = 1.0
        total = floors.mean(axis=0)
        if problem.risk == MEAN and not problem.whole_model:
            ratio = (rows / mean[:, None]).sum(axis=2)  # a step without rows of a layer counts 1 and adds nothing here
            idle = (rows.sum(axis=1) == 0).sum(axis=1)
            layer = np.maximum(floors.mean(axis=1), (_mean_floor(ratio, problem) + idle) / rows.shape[2])
            return float(layer.mean())
        if problem.risk == CVAR and not problem.whole_model:
            return _cvar_floor(problem, rows / mean[:, None], floors)
        return risk_value(total, problem.risk)
    return risk_value(_time_floors(problem, rows, usable, most), problem.risk)


def _cvar_floor(problem: Problem, ratio: Floats, floors: Floats) -> float:
    """Lower bound on CVaR95 of the load: the best of a few fixed weights of the steps, each layer by itself.

    ``ratio`` [layer, expert, batch] rows over the mean of a GPU, ``floors`` [layer, batch] those of every step.
    """
    best = 0.0
    busiest = ratio.max(axis=1).mean(axis=0)
    for order in (floors.mean(axis=0), busiest, None):
        weights = np.full(ratio.shape[2], 1 / ratio.shape[2]) if order is None else worst_weights(order)
        layer = np.maximum(floors @ weights, _mean_floor(ratio @ weights, problem))
        best = max(best, float(layer.mean()))
    return best


def worst_weights(order: Floats) -> Floats:
    """``[batch]`` weights of the worst 5 % by ``order``, at most ``1/(0.05·B)`` each, that add up to 1."""
    mass = max(1.0, 0.05 * len(order))
    left, weights = 1.0, np.zeros(len(order))
    for b in np.argsort(-order, kind="stable"):
        weights[b] = min(left, 1 / mass)
        left -= float(weights[b])
        if left <= 0:
            break
    return weights


def _mean_floor(load: Floats, problem: Problem) -> Floats:
    """``[layer]`` least load of the busiest GPU for ``load`` [layer, expert] that need not be whole numbers."""
    room = problem.slots_per_gpu[problem.slots_per_gpu > 0]
    spare = problem.num_slots - problem.num_experts
    floor = np.maximum(load.sum(axis=1) / len(room), hottest_copy(load, spare, len(room)))
    return floor if spare else np.maximum(floor, crowding_floor(load, room))


def _time_floors(problem: Problem, rows: Floats, usable: int, most: int) -> Floats:
    """``[batch]`` least time of every step: compute of the busiest GPU, layer by layer, and latencies."""
    compute = ExpertCompute.of(problem.model, problem.topology.accelerator, problem.law.phase)
    speed = problem.topology.gpu_speed
    fastest, together = (1.0, float(usable)) if speed is None else (float(speed.max()), float(speed.sum()))
    memory = (rows > 0).sum(axis=1) * compute.weight_us
    tiles = np.ceil(rows / compute.tile_rows)
    even = np.maximum(memory, tiles.sum(axis=1) * compute.tile_rows * compute.row_us) / together
    hot = np.ceil(rows.max(axis=1) / most / compute.tile_rows) * compute.tile_rows * compute.row_us / fastest
    busiest = (compute.launch_us / fastest + np.maximum(even, hot)).sum(axis=0)
    kernel = KERNEL_OF_PHASE[problem.law.phase] if problem.stats.has_tokens else LOW_LATENCY
    exchanges = problem.num_layers - 1 if problem.dataflow == CONTEXT_COHERENT else 2 * problem.num_layers
    kernel = LOW_LATENCY if problem.dataflow == CONTEXT_COHERENT else kernel
    floors: Floats = busiest + exchanges * latency_us(problem.topology, kernel)
    return floors


def step_time_bound(problem: Problem, crossing: Mapping[str, float] | None = None) -> float:
    """Lower bound on the predicted step time [µs]: compute and communication bounded apart, layer by layer.

    ``crossing`` tells how many pairs of all layers together are known to cross GPUs and nodes (by ``copies_level``)
    under context-coherent execution.

    Compute: the busiest GPU does at least the mean of all, and at least the cheapest possible hottest copy. Splitting
    an expert never lowers the total: ``r·(1-e^{-n/r})`` and ``r·E⌈n/(rτ)⌉`` grow with ``r``. GPUs of unlike speed
    take at least the work of all over the speed of all (``max x_r/v_r ≥ Σx_r/Σv_r``), and the fastest has the hottest
    copy at best. Communication: the busiest receiver receives at least the mean, and at least the hottest copy, over
    all of its links together; normal kernels are bounded by their latency.
    """
    compute = ExpertCompute.of(problem.model, problem.topology.accelerator, problem.law.phase)
    tokens = problem.law.step_tokens
    rows = problem.stats.selections_per_token * tokens
    memory, arithmetic = compute.expected_copy_us(rows)
    gpus = int((problem.slots_per_gpu > 0).sum())
    spare = problem.num_slots - problem.num_experts
    hottest = hottest_copy(rows, spare, gpus) if not problem.whole_model else rows.max(axis=1) / gpus
    home_rows = tokens / problem.num_gpus
    even = compute.expected_rank_us(memory.sum(axis=1) / gpus, arithmetic.sum(axis=1) / gpus, home_rows)
    hot = compute.expected_rank_us(*compute.expected_copy_us(hottest), home_rows)
    speed = problem.topology.gpu_speed
    if speed is not None:
        even, hot = even / speed[problem.slots_per_gpu > 0].mean(), hot / speed[problem.slots_per_gpu > 0].max()
    busiest = np.maximum(even, hot)
    return float(busiest.sum()) + _communication_bound(
        problem, np.maximum(rows.sum(axis=1) / gpus, hottest), crossing or {}
    )


def _communication_bound(problem: Problem, received: Floats, crossing: Mapping[str, float]) -> float:
    model, topology, gpus = problem.model, problem.topology, problem.num_gpus
    # counts are timed as one copy per selection in either phase
    kernel = KERNEL_OF_PHASE[problem.law.phase] if problem.stats.has_tokens else LOW_LATENCY
    nothing = Traffic(copies=np.zeros((gpus, gpus)), node_copies=np.zeros((gpus, topology.num_nodes)))
    if problem.dataflow == CONTEXT_COHERENT:
        fixed = exchange(topology, nothing, kernel=LOW_LATENCY, bytes_per_copy=0).latency_us
        return fixed * (problem.num_layers - 1) + _moving_bound(problem, crossing)
    fixed = exchange(topology, nothing, kernel=kernel, bytes_per_copy=0).latency_us
    if kernel != LOW_LATENCY or problem.stats.source_load is not None or topology.kind == CUSTOM:
        return 2 * fixed * problem.num_layers
    both = float(model.bytes_per_copy_dispatch + model.bytes_per_copy_combine)
    if topology.is_direct:
        # homes are even: what a GPU receives from others comes over its links, and the busiest carries a full share
        links = max(1, num_links_per_gpu(topology.kind, topology.dims))
        busy = received.sum() * (1 - 1 / gpus) / links * both * 1e-3 / topology.link_gb_per_s
        return float(busy) + 2 * fixed * problem.num_layers
    # homes are even, so one GPU that receives this much from all others bounds the busiest port
    copies = np.zeros((len(received), gpus, gpus))
    copies[:, :, 0] = received[:, None] / gpus
    times = exchange(topology, Traffic(copies=copies), kernel=LOW_LATENCY, bytes_per_copy=both)
    inward = [value.max(axis=-1) for name, value in times.link_us.items() if name.endswith("in")]
    return float(np.max(inward, axis=0).sum()) + 2 * fixed * problem.num_layers


def _moving_bound(problem: Problem, known: Mapping[str, float]) -> float:
    """Lower bound on the time [µs] that pairs take from layer to layer, latency left out.

    The busiest port or link carries at least the mean. Pairs that cross GPUs take one hop at least; of those, at least
    :func:`least_crossing` cross nodes, and the rest stay inside them: the slower of NIC and domain is least busy when
    both are alike. What is known of all layers together bounds the sums.
    """
    if problem.whole_model or problem.num_gpus == 1:
        return 0.0
    topology, model = problem.topology, problem.model
    gpus = int((problem.slots_per_gpu > 0).sum())
    to_gb = problem.law.step_tokens / problem.stats.num_tokens * model.bytes_per_copy_dispatch * 1e-3

    def gigabytes(level: str) -> tuple[Floats, float]:
        least = least_crossing(problem.replace(copies_level=level)) * to_gb
        return least, max(float(least.sum()), known.get(level, 0.0) * to_gb * (1 - 1e-9))

    each, crossing = gigabytes(GPU)
    if topology.is_direct:
        links = max(1, num_links_per_gpu(topology.kind, topology.dims))
        return crossing / (problem.num_gpus * links * topology.link_gb_per_s)
    if topology.kind == CUSTOM:
        apart = ~np.eye(topology.num_gpus, dtype=bool)
        return crossing / (gpus * float(topology.pair_bandwidth_gb_per_s()[apart].max()))
    if topology.num_nodes == 1:
        return crossing / (gpus * topology.local_gb_per_s)
    each_away, away = gigabytes(NODE)
    nic, both = topology.nic_gb_per_s, topology.local_gb_per_s + topology.nic_gb_per_s
    return max(float(np.maximum(each_away / nic, each / both).sum()), away / nic, crossing / both) / gpus
