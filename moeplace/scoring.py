"""Scores: placements judged on a trace they were not fitted on, with everything a reader needs to trust the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.affinity import RoutingStats, count_routing
from moeplace.batches import BatchLaw, TokenIndex, default_law, draw, gather
from moeplace.errors import InputError, ProblemError
from moeplace.frozen import Floats
from moeplace.metrics import TrafficMetrics, max_over_mean, traffic_metrics
from moeplace.model import ModelSpec
from moeplace.placement import Placement
from moeplace.problem import DATAFLOWS, DISPATCH_COMBINE
from moeplace.simulate import Simulation, Steps, check_shapes, simulate, simulate_counts
from moeplace.tails import Estimate
from moeplace.topology import Topology
from moeplace.trace import Counts, TraceStream

SCHEMA = "moeplace/score/1"
PREFILL_FROM_TOKENS_PER_GPU = 128
DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One placement on one topology in one phase.

    Attributes
    ----------
    placement, topology
        Their labels.
    law, dataflow
        What a step is, and how tokens move.
    simulation
        Step times and what makes them.
    max_over_mean
        ``[layer]`` GPU load max/mean on the whole scored trace.
    traffic
        Traffic in natural units on the whole scored trace.
    trace_digest
        Sha256 of the tokens or counts that were scored.
    """

    placement: str
    topology: str
    law: BatchLaw
    dataflow: str
    simulation: Simulation
    max_over_mean: Floats
    traffic: TrafficMetrics
    trace_digest: str

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``scores`` in a ``moeplace/score/1`` document."""
        run, ratio = self.simulation, self.max_over_mean
        return {
            "placement": self.placement,
            "topology": self.topology,
            "phase": self.law.phase,
            "batch": {name: getattr(self.law, name) for name in ("requests", "tokens", "batches", "seed")},
            "step_time_us": {name: _estimate(value) for name, value in run.summary.items()},
            "noise_floor": _round(run.noise_floor),
            "load": {
                "max_over_mean_mean": _round(ratio.mean()),
                "max_over_mean_median": _round(np.median(ratio)),
                "max_over_mean_worst": _round(ratio.max()),
                "balancedness": _round((1 / ratio).mean()),
                "step_max_over_mean_mean": _round(np.mean([row.max_over_mean for row in run.layers])),
            },
            "traffic": {name: _round(getattr(self.traffic, name)) for name in self.traffic.__slots__},
            "per_layer": [
                {"layer": row.layer_id, "trace_max_over_mean": _round(whole)}
                | {name: _round(getattr(row, name)) for name in row.__slots__ if name != "layer_id"}
                for row, whole in zip(run.layers, ratio, strict=True)
            ],
            "link_utilisation": [
                {"link": name, "mean": _round(busy.mean()), "max": _round(busy.max()), "gpu": int(busy.argmax())}
                for name, busy in run.links.items()
            ],
            "bottlenecks": [{"link": name, "share": _round(share)} for name, share in run.bottlenecks[:10]],
        }


def score(
    source: TraceStream | Counts,
    placements: Mapping[str, Placement],
    topologies: Topology | Sequence[Topology],
    model: ModelSpec,
    **options: Any,
) -> tuple[Score, ...]:
    """Score placements on a trace, side by side, on the same steps.

    Parameters
    ----------
    source
        A trace, stream, selection or counts.
    placements
        Label → placement.
    topologies
        One or several; each must have as many GPUs as the placements.
    model
        Widths of the model.
    **options
        ``phase`` (``decode`` or ``prefill``; default: every phase the trace has), ``requests``, ``tokens``, ``batches``
        and ``seed`` of the batch law, ``dataflow``.

    Returns
    -------
    tuple of Score
        By phase, then topology, then placement. Complexity: two passes over the trace, then as :func:`simulate`.

    Raises
    ------
    ProblemError
        Shapes disagree.
    InputError
        The trace has no tokens of the phase, or too few requests for the law.
    """
    known = {"phase", "requests", "tokens", "batches", "seed", "dataflow", "threads"}
    if unknown := set(options) - known:
        raise TypeError(f"score() got unexpected options {sorted(unknown)}")
    places = [topologies] if isinstance(topologies, Topology) else list(topologies)
    dataflow = options.get("dataflow", DISPATCH_COMBINE)
    if dataflow not in DATAFLOWS:
        raise ProblemError(f"dataflow {dataflow!r}", rule=f"one of {', '.join(DATAFLOWS)}")
    for topology in places:
        for placement in placements.values():
            check_shapes(placement, source.meta.num_layers, source.meta.num_experts, topology)
    if isinstance(source, Counts) and dataflow != DISPATCH_COMBINE:
        raise InputError(
            "counts cannot be scored under context-coherent execution",
            hint="use dispatch-combine, or a per-token trace",
        )
    stats = count_routing(source, threads=options.get("threads", 1))
    entries = [_Entry.of(label, placements[label], topology, stats) for topology in places for label in placements]
    if isinstance(source, Counts):
        return tuple(entry.on_counts(source, model, options.get("phase")) for entry in entries)
    index = TokenIndex.of(source)
    phases = [options["phase"]] if options.get("phase") else index.phases()
    scores = []
    for phase in phases:
        law = default_law(index, phase, requests=options.get("requests"), tokens=options.get("tokens"))
        chosen = {name: options[name] for name in ("batches", "seed") if options.get(name) is not None}
        steps = draw_steps(source, index, law.replace(**chosen))
        scores += [entry.on_steps(steps, model, dataflow) for entry in entries]
    return tuple(scores)


def draw_steps(source: TraceStream, index: TokenIndex, law: BatchLaw) -> Steps:
    """Draw the steps of a law from a stream and read their tokens."""
    trace, rows = gather(source, draw(index, law))
    return Steps(trace=trace, rows=rows, law=law)


def counts_law(counts: Counts, num_gpus: int, phase: str | None = None) -> BatchLaw:
    """Return the law recorded counts stand for: each recorded step is a batch of its mean size.

    Counts do not say their phase: steps of 128 tokens per GPU or more are taken for prefill.
    """
    tokens = max(1, round(float(counts.counts.sum(axis=2).mean()) / counts.meta.top_k))
    guessed = "prefill" if tokens >= PREFILL_FROM_TOKENS_PER_GPU * num_gpus else "decode"
    return BatchLaw(phase=phase or guessed, requests=tokens, tokens=1, batches=counts.num_steps)


def law_for(source: TraceStream | Counts, num_gpus: int, **options: Any) -> BatchLaw:
    """Return the batch law of a trace: ``phase`` (default: decode where the trace has it), ``requests``, ``tokens``."""
    if isinstance(source, Counts):
        return counts_law(source, num_gpus, options.get("phase"))
    index = TokenIndex.of(source)
    phase = options.get("phase") or index.phases()[0]
    return default_law(index, phase, requests=options.get("requests"), tokens=options.get("tokens"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A placement on a topology, with what does not depend on the phase measured once."""

    label: str
    placement: Placement
    topology: Topology
    max_over_mean: Floats
    traffic: TrafficMetrics
    trace_digest: str

    @classmethod
    def of(cls, label: str, placement: Placement, topology: Topology, stats: RoutingStats) -> _Entry:
        return cls(
            label=label,
            placement=placement,
            topology=topology,
            max_over_mean=max_over_mean(placement, stats.load),
            traffic=traffic_metrics(stats, placement, topology),
            trace_digest=stats.trace_digest,
        )

    def on_steps(self, steps: Steps, model: ModelSpec, dataflow: str) -> Score:
        run = simulate(steps, self.placement, self.topology, model, dataflow=dataflow)
        return self._score(run, steps.law, dataflow)

    def on_counts(self, counts: Counts, model: ModelSpec, phase: str | None) -> Score:
        law = counts_law(counts, self.topology.num_gpus, phase)
        run = simulate_counts(counts, self.placement, self.topology, model, phase=law.phase)
        return self._score(run, law, DISPATCH_COMBINE)

    def _score(self, run: Simulation, law: BatchLaw, dataflow: str) -> Score:
        return Score(
            placement=self.label,
            topology=self.topology.name,
            law=law,
            dataflow=dataflow,
            simulation=run,
            max_over_mean=self.max_over_mean,
            traffic=self.traffic,
            trace_digest=self.trace_digest,
        )


def scores_to_dict(scores: Sequence[Score]) -> dict[str, Any]:
    """Return a ``moeplace/score/1`` document."""
    dataflows = sorted({entry.dataflow for entry in scores})
    return {
        "schema": SCHEMA,
        "dataflow": dataflows[0] if len(dataflows) == 1 else dataflows,
        "trace_digest": scores[0].trace_digest if scores else None,
        "scores": [entry.to_dict() for entry in scores],
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": _round(estimate.value), "interval": [_round(estimate.low), _round(estimate.high)]}


def _round(value: Any) -> float | None:
    return None if value is None else round(float(value), DIGITS)
