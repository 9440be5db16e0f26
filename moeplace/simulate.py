"""The evaluator: step times of a placement over batches drawn from a trace, and what makes the slow ones slow.

Every step's MoE layers are added up first; mean, p50, p95, p99 and CVaR95 are over steps. Model outputs, not
measurements: the constants are published ones and no public tail measurement exists to validate against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moeplace.batches import BatchLaw
from moeplace.compute import ExpertCompute
from moeplace.counting import count_visits
from moeplace.errors import ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.model import ModelSpec
from moeplace.network import KERNEL_OF_PHASE, LOW_LATENCY, Exchange, Traffic, exchange
from moeplace.objective import home_ranks
from moeplace.placement import EMPTY, Placement
from moeplace.problem import CONTEXT_COHERENT, DATAFLOWS, DISPATCH_COMBINE
from moeplace.routing import ReplicaTable
from moeplace.tails import Estimate, noise_floor, summarise
from moeplace.topology import Topology
from moeplace.trace import Counts, Trace
from moeplace.traffic import chain_traffic, dispatch_traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Routed tokens of many steps, ready to be placed.

    Attributes
    ----------
    trace
        The distinct tokens.
    rows
        ``[batch, request, token]`` row of each token in ``trace``.
    law
        The law they were drawn by.
    """

    trace: Trace
    rows: Ints
    law: BatchLaw

    @property
    def num_batches(self) -> int:
        """Number of steps."""
        return int(self.rows.shape[0])


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
    step_us
        ``[batch]`` time of each step.
    summary
        mean, p50, p95, p99, cvar95, each with an interval.
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
    summary: Mapping[str, Estimate]
    layers: tuple[LayerRow, ...]
    links: Mapping[str, Floats]
    bottlenecks: tuple[tuple[str, float], ...]
    noise_floor: float


def simulate(
    steps: Steps, placement: Placement, topology: Topology, model: ModelSpec, *, dataflow: str = DISPATCH_COMBINE
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
    dataflow
        ``dispatch-combine`` or ``context-coherent``.

    Returns
    -------
    Simulation
        Complexity: O(batches · tokens · layers · k) time; one layer of all batches in memory at a time.
    """
    check_shapes(placement, steps.trace.meta.num_layers, steps.trace.meta.num_experts, topology)
    if dataflow not in DATAFLOWS:
        raise ProblemError(f"dataflow {dataflow!r}", rule=f"one of {', '.join(DATAFLOWS)}")
    return _TokenRun(steps, placement, topology, model).run(chain=dataflow == CONTEXT_COHERENT)


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
    """Adds up layers, whatever they were computed from."""

    def __init__(self, batches: int, topology: Topology, model: ModelSpec) -> None:
        self._topology, self._model = topology, model
        self.step_us = np.zeros(batches)
        self._layers: list[LayerRow] = []
        self._busy_us: dict[str, Floats] = {}
        self._exchange_us = 0.0
        self._bottlenecks: Counter[str] = Counter()

    def exchange(self, traffic: Traffic, kernel: str, bytes_per_copy: float, *, returning: bool = False) -> Floats:
        """``[batch]`` time of one direction, its links and bottleneck noted."""
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
        """Add a layer: ``load`` [batch, GPU] rows, and its compute, dispatch and combine times [batch]."""
        self.step_us += times[0] + times[1] + times[2]
        mean = load.mean(axis=1)
        # a recorded step may hold no token of a layer: nothing is out of balance then
        ratio = np.divide(load.max(axis=1), mean, out=np.ones(len(load)), where=mean > 0)
        self._layers.append(
            LayerRow(
                layer_id=layer_id,
                compute_us=float(times[0].mean()),
                dispatch_us=float(times[1].mean()),
                combine_us=float(times[2].mean()),
                max_over_mean=float(ratio.mean()),
                balancedness=float((1 / ratio).mean()),
            )
        )

    def result(self, selections: float) -> Simulation:
        """Summarise; ``selections`` are the mean selections per GPU and step."""
        total = sum(self._bottlenecks.values()) or 1
        ranked = sorted(self._bottlenecks.items(), key=lambda item: (-item[1], item[0]))
        return Simulation(
            step_us=self.step_us,
            summary=summarise(self.step_us),
            layers=tuple(self._layers),
            links={name: busy / max(self._exchange_us, 1e-12) for name, busy in self._busy_us.items()},
            bottlenecks=tuple((name, count / total) for name, count in ranked),
            noise_floor=noise_floor(self._topology.num_gpus, selections),
        )


class _TokenRun:
    """One simulation of recorded tokens, layer by layer."""

    def __init__(self, steps: Steps, placement: Placement, topology: Topology, model: ModelSpec) -> None:
        self.topology, self.model = topology, model
        self.experts, self.law, self.meta = steps.trace.experts, steps.law, steps.trace.meta
        self.rows = steps.rows.reshape(-1)
        batches, requests, tokens = steps.rows.shape
        self.group = (np.repeat(np.arange(batches), requests * tokens), batches)
        turn = np.tile(np.repeat(np.arange(requests), tokens), batches)
        recorded = None if steps.trace.rank is None else steps.trace.rank[self.rows]
        self.home = home_ranks(recorded, turn, topology.num_gpus)
        homes = np.bincount(self.group[0] * topology.num_gpus + self.home, minlength=batches * topology.num_gpus)
        self.home_rows = homes.reshape(batches, topology.num_gpus)
        self.table = ReplicaTable.of(placement)
        self.shape = (batches, topology.num_gpus, placement.max_slots)
        self.compute = ExpertCompute.of(model, topology.accelerator, steps.law.phase)
        self.tally = _Tally(batches, topology, model)

    def run(self, chain: bool) -> Simulation:
        """Time every layer."""
        slot = self._slots(0)
        for layer, layer_id in enumerate(self.meta.layer_ids):
            following = self._slots(layer + 1) if layer + 1 < len(self.meta.layer_ids) else None
            copy_rows = self._copy_rows(slot)
            compute_us = self.compute.rank_us(copy_rows, self.home_rows).max(axis=1)
            moved_us = self._chain_us(slot, following) if chain else self._dispatch_us(slot)
            self.tally.add_layer(layer_id, copy_rows.sum(axis=2), (compute_us, *moved_us))
            slot = slot if following is None else following
        return self.tally.result(self.law.step_tokens * self.meta.top_k / self.topology.num_gpus)

    def _slots(self, layer: int) -> Ints:
        return self.table.choose_even(layer, self.experts[self.rows, layer], self.rows)

    def _copy_rows(self, slot: Ints) -> Ints:
        batches, gpus, width = self.shape
        return count_visits(self.group[0], slot, (batches, gpus * width), distinct=False).reshape(self.shape)

    def _dispatch_us(self, slot: Ints) -> tuple[Floats, Floats]:
        kernel = KERNEL_OF_PHASE[self.law.phase]
        sent = dispatch_traffic(slot // self.shape[2], self.home, self.group, self.topology, kernel)
        return self.tally.dispatch_and_combine(sent, kernel)

    def _chain_us(self, slot: Ints, following: Ints | None) -> tuple[Floats, Floats]:
        nothing = np.zeros(self.shape[0])
        if following is None:
            return nothing, nothing
        width = self.shape[2]
        moved = chain_traffic(slot // width, following // width, self.group, self.topology.num_gpus)
        return self.tally.exchange(moved, LOW_LATENCY, self.model.bytes_per_copy_dispatch), nothing


def simulate_counts(
    counts: Counts, placement: Placement, topology: Topology, model: ModelSpec, *, phase: str
) -> Simulation:
    """Time every recorded step of a trace that holds only counts.

    Copies of an expert share its rows evenly; homes are spread evenly; every selection is one copy on the wire, since
    counts do not tell which experts a token chose together.
    """
    check_shapes(placement, counts.meta.num_layers, counts.meta.num_experts, topology)
    compute = ExpertCompute.of(model, topology.accelerator, phase)
    gpus = topology.num_gpus
    slots = np.maximum(placement.slots, 0)
    share = np.where(
        placement.slots == EMPTY,
        0.0,
        1 / np.take_along_axis(placement.replicas()[:, None, :], slots.astype(np.int64), axis=2),
    )
    tokens = counts.counts.sum(axis=2) / counts.meta.top_k
    tally = _Tally(counts.num_steps, topology, model)
    for layer, layer_id in enumerate(counts.meta.layer_ids):
        rows = counts.counts[:, layer, slots[layer]] * share[layer]
        load = rows.sum(axis=2)
        compute_us = compute.rank_us(rows, tokens[:, layer, None] / gpus).max(axis=1)
        traffic = Traffic(copies=np.repeat(load[:, None, :] / gpus, gpus, axis=1))
        tally.add_layer(layer_id, load, (compute_us, *tally.dispatch_and_combine(traffic, LOW_LATENCY)))
    return tally.result(float(counts.counts.sum(axis=2).mean()) / gpus)
