"""Times of a step's parts on many accelerators at once: tokens are sent to their experts once, not once for each.

The same equations as :mod:`moeplace.simulate`, which a test compares with: how many rows a copy computes and which
links a copy of a token passes do not depend on what the GPUs are, only on the topology's shape and the placement.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.attention import AttentionTime
from moeplace.batches import Steps
from moeplace.compute import ExpertCompute
from moeplace.errors import MoeplaceError
from moeplace.execution import Execution, step_tokens
from moeplace.frozen import Floats
from moeplace.hardware import Accelerator
from moeplace.model import ModelSpec
from moeplace.network import KERNEL_OF_PHASE, Traffic, exchange, latency_us
from moeplace.overlap import DUAL_BATCH, NONE
from moeplace.placement import Placement
from moeplace.routing import Router
from moeplace.topology import Topology
from moeplace.traffic import visit

SPEED_OF_LINK = {"scale-up": "local_gb_per_s", "NIC": "nic_gb_per_s", "spine": "nic_gb_per_s", "link": "link_gb_per_s"}
ACTIVATION_BYTES = 2  # attention's partial sums are added up in 16 bits


class StoppedError(MoeplaceError):
    """The work was asked to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """``[layer, step, part]`` µs of experts, dispatch and combine on one cluster."""

    compute: Floats
    dispatch: Floats
    combine: Floats


def time_parts(
    steps: Steps,
    placement: Placement,
    clusters: Sequence[Topology],
    model: ModelSpec,
    *,
    halves: bool = False,
    stop: threading.Event | None = None,
) -> tuple[tuple[LayerParts, ...], tuple[LayerParts, ...]]:
    """Time the MoE layers of steps on clusters of one shape.

    Parameters
    ----------
    steps, placement, model
        As in :func:`moeplace.simulate.simulate`.
    clusters
        Topologies of the same kind and dimensions; accelerators and bandwidths may differ.
    halves
        Whether each step is also timed cut in two.
    stop
        Set to end it after the layer at hand.

    Returns
    -------
    tuple
        For every cluster the parts of whole steps, and of their halves (nothing unless asked for). Complexity: as one
        simulation, and O(layers · steps · GPUs²) for each further cluster.

    Raises
    ------
    StoppedError
        ``stop`` was set.
    """
    execution = Execution(overlap=DUAL_BATCH if halves else NONE)
    shape, phase = clusters[0], steps.law.phase
    kernel, gpus = KERNEL_OF_PHASE[phase], shape.num_gpus
    tokens = step_tokens(steps, gpus, execution)
    router = Router.of(placement, shape)
    homes = np.bincount(tokens.group * gpus + tokens.home, minlength=tokens.num_groups * gpus)
    homes = homes.reshape(steps.num_batches, execution.parts, gpus)
    computes = [ExpertCompute.of(model, place.accelerator, phase) for place in clusters]
    layers = steps.trace.meta.num_layers
    whole = [_Builder(layers, (steps.num_batches, 1)) for _ in clusters]
    cut = [_Builder(layers, (steps.num_batches, 2)) for _ in clusters] if halves else []
    for layer in range(layers):
        if stop is not None and stop.is_set():
            raise StoppedError("stopped")
        ids = np.ascontiguousarray(steps.trace.experts[:, layer])
        seen = visit(ids, tokens, router, layer, (shape, kernel))
        for builders, parts in ((whole, 1), (cut, 2)):
            if not builders:
                continue
            rows, traffic, own = _joined(seen.rows, seen.traffic, homes, parts)
            ways = [_ways(clusters, traffic, kernel, model, returning=returning) for returning in (False, True)]
            for i, builder in enumerate(builders):
                busy = computes[i].rank_us(rows, own).max(axis=-1)
                builder.set(layer, (busy, ways[0][i], ways[1][i]))
    return tuple(builder.done() for builder in whole), tuple(builder.done() for builder in cut)


class _Builder:
    """Fills the times of a cluster layer by layer."""

    def __init__(self, layers: int, shape: tuple[int, int]) -> None:
        self._times = np.zeros((3, layers, *shape))

    def set(self, layer: int, times: tuple[Floats, Floats, Floats]) -> None:
        """Set compute, dispatch and combine of a layer."""
        for row, values in zip(self._times, times, strict=True):
            row[layer] = values.reshape(row.shape[1:])

    def done(self) -> LayerParts:
        """All of it."""
        return LayerParts(compute=self._times[0], dispatch=self._times[1], combine=self._times[2])


def _joined(
    rows: npt.NDArray[Any], traffic: Traffic, homes: npt.NDArray[Any], parts: int
) -> tuple[Floats, Traffic, Floats]:
    """Rows, traffic and home rows of ``[step · parts]`` parts, from those of steps cut as finely or more."""
    steps, cut, _ = homes.shape

    def joined(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if cut == parts:
            return values.reshape(steps * parts, *values.shape[1:])
        return values.reshape(steps, cut, *values.shape[1:]).sum(axis=1)

    nodes = traffic.node_copies
    return (
        joined(rows),
        Traffic(copies=joined(traffic.copies), node_copies=None if nodes is None else joined(nodes)),
        joined(homes.reshape(steps * cut, -1)),
    )


def _ways(
    clusters: Sequence[Topology], traffic: Traffic, kernel: str, model: ModelSpec, *, returning: bool
) -> list[Floats]:
    """Time of one direction on every cluster: what the links carry is found once, at 1 GB/s and without latencies."""
    size = model.bytes_per_copy_combine if returning else model.bytes_per_copy_dispatch
    bare = clusters[0].replace(
        local_gb_per_s=1.0,
        nic_gb_per_s=1.0,
        link_gb_per_s=1.0 if clusters[0].is_direct else 0.0,
        low_latency_us=0.0,
        normal_latency_us=0.0,
        hop_latency_us=1.0,
    )
    found = exchange(bare, traffic, kernel=kernel, bytes_per_copy=size, returning=returning)
    hops = found.latency_us
    if bare.is_direct:
        carried = {"link": found.time_us - hops}
    else:
        carried = {}
        for name, busy in found.link_us.items():
            link = name.split(" ")[0]
            carried[link] = np.maximum(carried.get(link, 0.0), busy.max(axis=-1))
    times = []
    for place in clusters:
        busiest = np.max([busy / getattr(place, SPEED_OF_LINK[link]) for link, busy in carried.items()], axis=0)
        times.append(latency_us(place, kernel) + hops * place.hop_latency_us + busiest)
    return times


def attention_us(model: ModelSpec, accelerator: Accelerator, tokens: float, context: float, tp: int) -> float:
    """Time of one attention layer when each GPU is home to ``tokens``, which look at ``context`` tokens each.

    ``tp`` GPUs share weights, heads and arithmetic of their tokens; a latent cache is whole on each of them, others are
    divided by heads as far as there are any. Their partial sums are added up over the scale-up links (a ring:
    ``2·(tp−1)/tp`` times what one of them holds). Each token is of another request, which is exact for decode.
    """
    time = AttentionTime.of(model, accelerator)
    attention = model.attention
    group = tokens * tp
    heads = 1 if attention is None or attention.is_latent else min(tp, attention.num_kv_heads)
    memory = time.weight_us / tp + group * context * time.cache_us / heads
    arithmetic = group * (time.token_us + context * time.score_us) / tp
    total = time.launch_us + max(memory, arithmetic)
    return total + reduce_us(model, accelerator, group, tp)


def reduce_us(model: ModelSpec, accelerator: Accelerator, rows: float, tp: int) -> float:
    """Time in which ``tp`` GPUs add up their partial sums of so many rows over their scale-up links, by a ring."""
    if tp == 1:
        return 0.0
    moved = 2 * (tp - 1) / tp * rows * model.hidden * ACTIVATION_BYTES
    return accelerator.scale_up_latency_us + moved * 1e-3 / accelerator.scale_up_effective_gb_per_s


def prefill_attention_us(model: ModelSpec, accelerator: Accelerator, prompt: int, tp: int) -> float:
    """Time of one attention layer for a prompt on each GPU: each token looks at those before it."""
    time = AttentionTime.of(model, accelerator)
    memory = time.weight_us / tp + prompt * time.cache_us
    arithmetic = prompt * (time.token_us + (prompt + 1) / 2 * time.score_us)
    total = time.launch_us + max(memory, arithmetic)
    return total + reduce_us(model, accelerator, prompt * tp, tp)


def dense_us(model: ModelSpec, accelerator: Accelerator, tokens: float, tp: int) -> float:
    """Time of the feed-forward network of one layer without experts, its weights shared by ``tp`` GPUs."""
    if not model.dense_inner:
        return 0.0
    one = ExpertCompute.of(
        model.replace(expert_inner=model.dense_inner, num_shared=0, shared_inner=0), accelerator, "decode"
    )
    return one.launch_us + max(one.weight_us / tp, tokens * one.row_us)
