"""The evaluator: step times of a placement over batches drawn from a trace, and what makes the slow ones slow.

Every step's MoE layers are added up first; mean, p50, p95, p99 and CVaR95 are over steps. Model outputs, not
measurements: the constants are published ones and no public tail measurement exists to validate against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.attention import AttentionTime
from moeplace.batches import Steps
from moeplace.compute import ExpertCompute
from moeplace.errors import ProblemError
from moeplace.execution import Execution, step_tokens
from moeplace.frozen import Floats
from moeplace.model import ModelSpec
from moeplace.network import KERNEL_OF_PHASE, LOW_LATENCY, Exchange, Traffic, exchange
from moeplace.overlap import NONE, PartTimes, step_times
from moeplace.placement import EMPTY, Placement
from moeplace.problem import CONTEXT_COHERENT
from moeplace.routing import Router
from moeplace.tails import Estimate, noise_floor, summarise
from moeplace.topology import Topology
from moeplace.trace import Counts
from moeplace.traffic import chain_traffic, slots_of, visit


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """Means over steps for one layer."""

    layer_id: int
    compute_us: float
    dispatch_us: float
    combine_us: float
    max_over_mean: float
    balancedness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Step times of one placement on one topology.

    Attributes
    ----------
    step_us, step_max_over_mean
        ``[batch]`` time of each step, and its GPU load max/mean, mean over layers.
    summary
        mean, p50, p95, p99, cvar95, each with an interval.
    attention_us
        Mean over steps of all layers' attention; 0 where it is left out.
    layers
        Means per layer.
    links
        Kind of link → ``[GPU]`` (``[leaf]`` for spine links) busy share of communication time.
    bottlenecks
        How often each named link was the busiest, as a share of all exchanges.
    noise_floor
        max/mean load of perfect long-run balance in steps of this size.
    """

    step_us: Floats
    step_max_over_mean: Floats
    summary: Mapping[str, Estimate]
    attention_us: float
    layers: tuple[LayerRow, ...]
    links: Mapping[str, Floats]
    bottlenecks: tuple[tuple[str, float], ...]
    noise_floor: float


def simulate(
    steps: Steps,
    placement: Placement,
    topology: Topology,
    model: ModelSpec,
    execution: Execution | None = None,
    *,
    profile: npt.NDArray[Any] | None = None,
    tokens: npt.NDArray[Any] | None = None,
) -> Simulation:
    """Time every step of a placement.

    Parameters
    ----------
    steps
        From :func:`moeplace.scoring.draw_steps`.
    placement
        Layers, GPUs and experts must be those of the steps and the topology.
    topology, model
        Hardware and widths.
    execution
        How a step is run; default: dispatch-combine, copies sharing evenly, nothing overlapped.
    profile
        ``[layer, expert]`` loads that the replica choice goes by, for policies that need them; default: all alike.
    tokens
        ``[token, layer, k]`` experts of a profile's tokens, for the policy that learns from them.

    Returns
    -------
    Simulation
        Complexity: O(batches · tokens · layers · k) time; one layer of all batches in memory at a time.
    """
    check_shapes(placement, steps.trace.meta.num_layers, steps.trace.meta.num_experts, topology)
    execution = execution or Execution()
    router = Router.of(placement, topology, execution.routing, profile, tokens)
    return _TokenRun(steps, router, (topology, model), execution).run()


def check_shapes(placement: Placement, layers: int, experts: int, topology: Topology) -> None:
    """Raise :class:`ProblemError` unless a placement fits the trace and the topology."""
    if (placement.num_layers, placement.num_experts) != (layers, experts):
        raise ProblemError(
            f"the placement has {placement.num_layers} layers of {placement.num_experts} experts",
            rule=f"the trace has {layers} of {experts}",
            hint="was it made for another model?",
        )
    if placement.num_gpus != topology.num_gpus:
        raise ProblemError(
            f"the placement is for {placement.num_gpus} GPUs",
            rule=f"{topology.name} has {topology.num_gpus}",
            hint="--topology must be the one it was made for, or one of as many GPUs",
        )


class _Tally:
    """Adds up layers, whatever they were computed from. A step may be cut into parts, which are timed apart."""

    def __init__(self, steps: int, parts: int, topology: Topology, model: ModelSpec) -> None:
        self._topology, self._model, self._shape = topology, model, (steps, parts)
        self._layers: list[LayerRow] = []
        self._ratio = np.zeros(steps)
        self._times: list[tuple[Floats, Floats, Floats]] = []
        self._busy_us: dict[str, Floats] = {}
        self._exchange_us = 0.0
        self._bottlenecks: Counter[str] = Counter()

    def exchange(self, traffic: Traffic, kernel: str, bytes_per_copy: float, *, returning: bool = False) -> Floats:
        """``[part]`` time of one direction, its links and bottleneck noted."""
        timed = exchange(self._topology, traffic, kernel=kernel, bytes_per_copy=bytes_per_copy, returning=returning)
        for name, busy in timed.link_us.items():
            self._busy_us[name] = self._busy_us.get(name, 0.0) + busy.sum(axis=0)
        self._exchange_us += float(timed.time_us.sum())
        self._note_bottlenecks(timed)
        return timed.time_us

    def dispatch_and_combine(self, traffic: Traffic, kernel: str) -> tuple[Floats, Floats]:
        """Times of a dispatch and of the combine that returns over the same links."""
        return (
            self.exchange(traffic, kernel, self._model.bytes_per_copy_dispatch),
            self.exchange(traffic, kernel, self._model.bytes_per_copy_combine, returning=True),
        )

    def _note_bottlenecks(self, timed: Exchange) -> None:
        names, busiest = timed.bottleneck()
        idle = timed.time_us <= timed.latency_us
        links, counts = np.unique(np.where(idle, -1, busiest), return_counts=True)
        for link, count in zip(links.tolist(), counts.tolist(), strict=True):
            self._bottlenecks["latency" if link < 0 else names[link]] += count

    def add_layer(self, layer_id: int, load: Floats, times: tuple[Floats, Floats, Floats]) -> None:
        """Add a layer: ``load`` [part, GPU] rows, and its compute, dispatch and combine times [part]."""
        compute, dispatch, combine = (time.reshape(self._shape) for time in times)
        self._times.append((compute, dispatch, combine))
        load = load.reshape(*self._shape, -1).sum(axis=1)
        ratio = _max_over_mean(load)
        self._ratio += ratio
        self._layers.append(
            LayerRow(
                layer_id=layer_id,
                compute_us=float(compute.sum(axis=1).mean()),
                dispatch_us=float(dispatch.sum(axis=1).mean()),
                combine_us=float(combine.sum(axis=1).mean()),
                max_over_mean=float(ratio.mean()),
                balancedness=float((1 / ratio).mean()),
            )
        )

    def result(self, selections: float, overlap: str = NONE, attention_us: Floats | None = None) -> Simulation:
        """Summarise.

        ``selections`` are the mean selections per GPU and step, ``attention_us`` [step, part] one layer's attention.
        """
        attention = np.zeros(self._shape) if attention_us is None else attention_us
        compute, dispatch, combine = (np.stack(times) for times in zip(*self._times, strict=True))
        parts = PartTimes(attention=attention, compute=compute, dispatch=dispatch, combine=combine)
        step_us = step_times(parts, overlap)
        total = sum(self._bottlenecks.values()) or 1
        ranked = sorted(self._bottlenecks.items(), key=lambda item: (-item[1], item[0]))
        return Simulation(
            step_us=step_us,
            step_max_over_mean=self._ratio / max(1, len(self._layers)),
            summary=summarise(step_us),
            attention_us=len(self._layers) * float(attention.sum(axis=1).mean()),
            layers=tuple(self._layers),
            links={name: busy / max(self._exchange_us, 1e-12) for name, busy in self._busy_us.items()},
            bottlenecks=tuple((name, count / total) for name, count in ranked),
            noise_floor=noise_floor(self._topology.num_gpus, selections),
        )


class _TokenRun:
    """One simulation of recorded tokens, layer by layer."""

    def __init__(self, steps: Steps, router: Router, place: tuple[Topology, ModelSpec], execution: Execution) -> None:
        self.topology, self.model = place
        self.router, self.execution = router, execution
        self.trace, self.law, self.meta = steps.trace, steps.law, steps.trace.meta
        self.tokens = step_tokens(steps, self.topology.num_gpus, execution, (router, self.topology))
        groups, gpus = self.tokens.num_groups, self.topology.num_gpus
        held = self.tokens.group * gpus + self.tokens.home
        self.home_rows = np.bincount(held, minlength=groups * gpus).reshape(groups, gpus)
        context = self.trace.position[self.tokens.row] + 1
        # tokens of a request stand together, the last of them behind all the others
        request = np.tile(self.law.turns(), steps.num_batches)
        last = (np.diff(request, append=-1) != 0) | (np.diff(self.tokens.group, append=-1) != 0)
        self.context, self.cached = (
            np.bincount(held, weights=context * kept, minlength=groups * gpus).reshape(groups, gpus)
            for kept in (np.ones(len(last)), last)
        )
        self.compute = ExpertCompute.of(self.model, self.topology.accelerator, self.law.phase)
        self.tally = _Tally(steps.num_batches, execution.parts, self.topology, self.model)

    def run(self) -> Simulation:
        """Time every layer."""
        if self.execution.dataflow == CONTEXT_COHERENT:
            self._run_chain()
        else:
            for layer, layer_id in enumerate(self.meta.layer_ids):
                self._run_layer(layer, layer_id)
        selections = self.law.step_tokens * self.meta.top_k / self.topology.num_gpus
        return self.tally.result(selections, self.execution.overlap, self._attention_us())

    def _run_layer(self, layer: int, layer_id: int) -> None:
        kernel = KERNEL_OF_PHASE[self.law.phase]
        ids = np.ascontiguousarray(self.trace.experts[:, layer])
        seen = visit(ids, self.tokens, self.router, layer, (self.topology, kernel))
        times = (self._compute_us(seen.rows), *self.tally.dispatch_and_combine(seen.traffic, kernel))
        self.tally.add_layer(layer_id, seen.rows.sum(axis=2), times)

    def _run_chain(self) -> None:
        groups, gpus, width = self.tokens.num_groups, self.topology.num_gpus, self.router.table.slots_per_gpu
        nothing = np.zeros(groups)
        following = slots_of(self.trace.experts[:, 0], self.tokens, self.router, 0)
        for layer, layer_id in enumerate(self.meta.layer_ids):
            slot, moved_us = following, nothing
            if layer + 1 < self.meta.num_layers:
                following = slots_of(self.trace.experts[:, layer + 1], self.tokens, self.router, layer + 1)
                group = (self.tokens.group, groups)
                moved = chain_traffic(slot // width, following // width, group, gpus)
                moved_us = self.tally.exchange(moved, LOW_LATENCY, self.model.bytes_per_copy_dispatch)
            flat = self.tokens.group[:, None] * (gpus * width) + slot
            rows = np.bincount(flat.ravel(), minlength=groups * gpus * width).reshape(groups, gpus, width)
            self.tally.add_layer(layer_id, rows.sum(axis=2), (self._compute_us(rows), moved_us, nothing))

    def _compute_us(self, rows: npt.NDArray[Any]) -> Floats:
        busy = self.compute.rank_us(rows, self.home_rows)
        slowest: Floats = (busy if self.topology.gpu_speed is None else busy / self.topology.gpu_speed).max(axis=-1)
        return slowest

    def _attention_us(self) -> Floats | None:
        if not self.execution.with_attention:
            return None
        busy = AttentionTime.of(self.model, self.topology.accelerator).rank_us(
            self.home_rows, self.context, self.cached
        )
        if self.topology.gpu_speed is not None:
            busy = busy / self.topology.gpu_speed
        return busy.max(axis=-1).reshape(-1, self.execution.parts)


def simulate_counts(
    counts: Counts,
    placement: Placement,
    topology: Topology,
    model: ModelSpec,
    *,
    phase: str,
) -> Simulation:
    """Time every recorded step of a trace that holds only counts.

    Copies of an expert share its rows evenly; homes are spread evenly; every selection is one copy on the wire, since
    counts do not tell which experts a token chose together.
    """
    check_shapes(placement, counts.meta.num_layers, counts.meta.num_experts, topology)
    compute = ExpertCompute.of(model, topology.accelerator, phase)
    gpus = topology.num_gpus
    tokens = counts.counts.sum(axis=2) / counts.meta.top_k
    tally = _Tally(counts.num_steps, 1, topology, model)
    for layer, (layer_id, rows) in enumerate(zip(counts.meta.layer_ids, _slot_rows(counts, placement), strict=True)):
        load = rows.sum(axis=2)
        busy = compute.rank_us(rows, tokens[:, layer, None] / gpus)
        compute_us = (busy if topology.gpu_speed is None else busy / topology.gpu_speed).max(axis=1)
        traffic = Traffic(copies=np.repeat(load[:, None, :] / gpus, gpus, axis=1))
        tally.add_layer(layer_id, load, (compute_us, *tally.dispatch_and_combine(traffic, LOW_LATENCY)))
    return tally.result(float(counts.counts.sum(axis=2).mean()) / gpus)


def counts_max_over_mean(counts: Counts, placement: Placement) -> Floats:
    """``[step]`` GPU load max/mean, mean over layers: what :func:`simulate_counts` tells of it, without any times.

    Complexity: O(steps · layers · slots).
    """
    total = np.zeros(counts.num_steps)
    for rows in _slot_rows(counts, placement):
        total += _max_over_mean(rows.sum(axis=2))
    return total / max(1, counts.meta.num_layers)


def _slot_rows(counts: Counts, placement: Placement) -> Iterator[Floats]:
    """Layer by layer, ``[step, GPU, slot]`` rows of every slot; copies of an expert share them evenly."""
    slots = np.maximum(placement.slots, 0).astype(np.int64)
    share = 1 / np.take_along_axis(placement.replicas()[:, None, :], slots, axis=2)
    share = np.where(placement.slots == EMPTY, 0.0, share)
    for layer in range(placement.num_layers):
        yield counts.counts[:, layer, slots[layer]] * share[layer]


def _max_over_mean(load: Floats) -> Floats:
    """``[step]`` busiest over mean of ``[step, GPU]``; 1 where a step holds no token: nothing is out of balance."""
    mean = load.mean(axis=1)
    ratio: Floats = np.divide(load.max(axis=1), mean, out=np.ones(len(load)), where=mean > 0)
    return ratio
