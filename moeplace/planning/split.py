"""Split deployments judged on the trace: imbalance of its experts in ``T_e``, and of what they receive in ``T_c``.

:mod:`moeplace.planning.disaggregation` assumes balanced routing to choose how many GPUs attention gets; here every
micro-batch of steps drawn from the trace goes through the pipeline with its own busiest expert GPU in every layer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplace.batches import Steps
from moeplace.compute import ExpertCompute
from moeplace.execution import Execution, step_tokens
from moeplace.frozen import Floats
from moeplace.hardware import Accelerator
from moeplace.model import ModelSpec
from moeplace.network import LOW_LATENCY
from moeplace.overlap import PING_PONG, PartTimes
from moeplace.placement import Placement
from moeplace.planning import memory
from moeplace.planning.deployment import Deployment
from moeplace.planning.disaggregation import Sides
from moeplace.planning.economics import PARTS, Bill, fabric, scale_up_parts
from moeplace.planning.pingpong import ATTENTION, EXPERTS, run_pipeline
from moeplace.planning.pricebook import PriceBook
from moeplace.planning.timing import StoppedError
from moeplace.routing import Router
from moeplace.topology import Topology, build_topology
from moeplace.traffic import visit


@dataclass(frozen=True, slots=True, kw_only=True)
class Busiest:
    """Of every layer, step and micro-batch: rows of each copy, and the most that one expert GPU receives.

    Attributes
    ----------
    compute_us
        Expert accelerator → ``[layer, step, micro-batch]`` time of the busiest GPU.
    received
        ``[layer, step, micro-batch]`` copies that reach the busiest GPU.
    """

    compute_us: dict[str, Floats]
    received: Floats


def busiest_experts(
    steps: Steps,
    placement: Placement,
    shape: Topology,
    model: ModelSpec,
    accelerators: Sequence[Accelerator],
    *,
    micro_batches: int,
    stop: threading.Event | None = None,
) -> Busiest:
    """Send steps to their experts, micro-batch by micro-batch. Complexity: as one simulation without its network."""
    execution = Execution(overlap=PING_PONG, micro_batches=micro_batches)
    tokens = step_tokens(steps, shape.num_gpus, execution)
    router = Router.of(placement, shape)
    layers = steps.trace.meta.num_layers
    size = (layers, steps.num_batches, micro_batches)
    # shared experts run beside attention
    computes = {
        each.name: ExpertCompute.of(model, each, "decode").replace(shared_weight_us=0.0, shared_row_us=0.0)
        for each in accelerators
    }
    times, received = {name: np.zeros(size) for name in computes}, np.zeros(size)
    for layer in range(layers):
        if stop is not None and stop.is_set():
            raise StoppedError("stopped")
        ids = np.ascontiguousarray(steps.trace.experts[:, layer])
        rows = visit(ids, tokens, router, layer, (shape, LOW_LATENCY)).rows
        received[layer] = rows.sum(axis=2).max(axis=1).reshape(size[1:])
        for name, compute in computes.items():
            times[name][layer] = compute.rank_us(rows, 0.0).max(axis=1).reshape(size[1:])
    return Busiest(compute_us=times, received=received)


def sides_of(own: Deployment, model: ModelSpec, pair: tuple[Accelerator, Accelerator], context: float) -> Sides:
    """Both sides of a deployment; ``pair`` is what attention and experts run on."""
    return Sides(
        model=model,
        attention=pair[0],
        experts=pair[1],
        context=context,
        tp_attention=own.attention_tp,
        expert_nodes=own.expert_gpus,
    )


def part_times(own: Deployment, sides: Sides, busiest: Busiest) -> PartTimes:
    """Times of all parts: attention as balanced as requests are, experts and network as the trace has it."""
    batch = own.batch * own.attention_tp / own.micro_batches  # of an attention node and micro-batch
    compute = busiest.compute_us[sides.experts.name]
    ways = []
    for size in (sides.model.bytes_per_copy_dispatch, sides.model.bytes_per_copy_combine):
        sent = batch * sides.model.top_k * size / own.attention_tp / sides.attention.nic_effective_gb_per_s
        received = busiest.received * size / sides.experts.nic_effective_gb_per_s
        start = max(sides.attention.nic_latency_us, sides.experts.nic_latency_us)
        ways.append(start + np.maximum(sent, received) * 1e-3)
    attention = np.full(compute.shape[1:], sides.attention_us(batch))
    return PartTimes(attention=attention, compute=compute, dispatch=ways[0], combine=ways[1])


def bubbles(times: PartTimes) -> dict[str, float]:
    """Share of a step's time that each side waits, mean over a few steps run event by event."""
    waits = np.zeros(2)
    some = range(min(8, len(times.attention)))
    for step in some:
        compute = times.compute[:, step]
        attention = np.broadcast_to(times.attention[step], compute.shape)
        run = run_pipeline(attention, compute, times.dispatch[:, step], times.combine[:, step])
        waits += [run.bubbles_us(side) / run.total_us for side in (ATTENTION, EXPERTS)]
    return {"attention waits (share)": float(waits[0] / len(some)), "experts wait (share)": float(waits[1] / len(some))}


def split_memory(own: Deployment, model: ModelSpec, context: float) -> tuple[memory.Memory, memory.Memory]:
    """What an attention GPU and an expert GPU must hold."""
    slots = -(-(model.num_experts + own.redundant) // own.expert_gpus)
    tp = own.attention_tp
    attention = memory.Memory(
        expert_gb=0.0,
        other_gb=memory.other_gb(model, own.attention_gpus, tp),
        cache_gb=memory.cache_gb(model, own.batch, context, tp),
    )
    return attention, memory.Memory(expert_gb=memory.expert_gb(model, slots), other_gb=0.0, cache_gb=0.0)


def split_bill(own: Deployment, pair: tuple[Accelerator, Accelerator], book: PriceBook) -> Bill:
    """Price of both sides: each in nodes of its accelerator's domain, joined by NICs and one tree of switches."""
    total: Bill | None = None
    counts = (own.attention_gpus, own.expert_gpus)
    nodes = sum(-(-count // min(each.scale_up_domain, count)) for each, count in zip(pair, counts, strict=True))
    for each, count in zip(pair, counts, strict=True):
        domain = min(each.scale_up_domain, count)
        inside = build_topology("scale-up", (domain,), each)
        usd, watts = scale_up_parts(inside, book.network)
        more_usd, more_watts = fabric((count, nodes), each.nic_gb_per_s, book.network)
        price, power = book.accelerator_usd.get(each.name), book.accelerator_watts.get(each.name)
        share = count / domain
        bill = Bill(
            usd={"accelerators": None if price is None else count * price}
            | {part: share * usd[part] + more_usd[part] for part in PARTS[1:]},
            watts={"accelerators": None if power is None else count * power}
            | {part: share * watts[part] + more_watts[part] for part in PARTS[1:]},
        )
        total = bill if total is None else total + bill
    assert total is not None
    return total
