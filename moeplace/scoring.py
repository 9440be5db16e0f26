"""Scores: placements judged on a trace they were not fitted on, with everything a reader needs to trust the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.affinity import RoutingStats, count_routing
from moeplace.batches import MIXED, BatchLaw, Steps, TokenIndex, default_law, draw, gather
from moeplace.errors import InputError
from moeplace.execution import AUTO_HOMES, Execution
from moeplace.frozen import Floats, Ints
from moeplace.homes import seen_tokens
from moeplace.metrics import TrafficMetrics, max_over_mean, traffic_metrics
from moeplace.model import ModelSpec
from moeplace.naive import NaiveTimes, naive_times
from moeplace.placement import Placement
from moeplace.problem import DISPATCH_COMBINE
from moeplace.routing import Router
from moeplace.simulate import Simulation, check_shapes, simulate, simulate_counts
from moeplace.tails import Estimate, summarise
from moeplace.topology import Topology
from moeplace.trace import Counts, TraceStream

SCHEMA = "moeplace/score/1"
PREFILL_FROM_TOKENS_PER_GPU = 128
DIGITS = 9
LAW_OPTIONS = ("requests", "tokens", "prefill_requests", "prefill_tokens", "batches", "seed", "arrival")
EXECUTION_OPTIONS = ("dataflow", "routing", "homes", "overlap", "micro_batches", "with_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One placement on one topology in one phase.

    Attributes
    ----------
    placement, topology
        Their labels.
    law, execution
        What a step is, and how an engine runs it.
    simulation
        Step times and what makes them.
    naive
        The MoE layers of such a step under what calculators assume; None under context-coherent execution.
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
    execution: Execution
    simulation: Simulation
    naive: NaiveTimes | None
    max_over_mean: Floats
    traffic: TrafficMetrics
    trace_digest: str

    @property
    def step_max_over_mean(self) -> float:
        """GPU load max/mean of a layer of a step, mean over steps and layers."""
        return float(np.mean([row.max_over_mean for row in self.simulation.layers]))

    @property
    def excess(self) -> float:
        """How far that is above the noise floor: what a better placement could still win."""
        return self.step_max_over_mean - self.simulation.noise_floor

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``scores`` in a ``moeplace/score/1`` document."""
        run, ratio = self.simulation, self.max_over_mean
        return {
            "placement": self.placement,
            "topology": self.topology,
            "phase": self.law.phase,
            "batch": batch_document(self.law),
            "execution": {name: getattr(self.execution, name) for name in self.execution.__slots__},
            "attention_us": _round(run.attention_us),
            "step_time_us": {name: _estimate(value) for name, value in run.summary.items()},
            "noise_floor": _round(run.noise_floor),
            "naive_us": self._naive(),
            "load": {
                "max_over_mean_mean": _round(ratio.mean()),
                "max_over_mean_median": _round(np.median(ratio)),
                "max_over_mean_worst": _round(ratio.max()),
                "balancedness": _round((1 / ratio).mean()),
                "imbalance_ratio": _round(ratio.mean() - 1),
                "step_max_over_mean_mean": _round(self.step_max_over_mean),
                "step_max_over_mean": {
                    name: _estimate(value) for name, value in summarise(run.step_max_over_mean).items()
                },
                "step_excess_over_noise_floor": _round(self.excess),
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

    def _naive(self) -> dict[str, float | None] | None:
        if self.naive is None:
            return None
        names = ("compute", "dispatch", "combine", "total")
        return {name: _round(getattr(self.naive, f"{name}_us")) for name in names}


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
        ``phase`` (``decode``, ``prefill`` or ``mixed``; default: decode and prefill where the trace has them);
        ``requests``, ``tokens``, ``prefill_requests``, ``prefill_tokens``, ``batches``, ``seed`` and ``arrival`` of the
        batch law; the fields of :class:`~moeplace.execution.Execution`; ``profile`` [layer, expert], the loads that the
        replica choice goes by (default: those of the scored trace), and ``profile_tokens`` [token, layer, k] beside
        them; ``routings``, label → replica choice of a placement that has its own; ``stats``, the statistics of the
        source if it is counted already; ``threads``.

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
    others = {"phase", "threads", "profile", "profile_tokens", "routings", "stats"}
    if unknown := set(options) - {*others, *LAW_OPTIONS, *EXECUTION_OPTIONS}:
        raise TypeError(f"score() got unexpected options {sorted(unknown)}")
    places = [topologies] if isinstance(topologies, Topology) else list(topologies)
    execution = Execution(**{name: options[name] for name in EXECUTION_OPTIONS if options.get(name) is not None})
    for topology in places:
        for placement in placements.values():
            check_shapes(placement, source.meta.num_layers, source.meta.num_experts, topology)
    if isinstance(source, Counts):
        _check_counts(execution)
    stats = options.get("stats") or count_routing(source, threads=options.get("threads", 1))
    profile = stats.load if options.get("profile") is None else np.asarray(options["profile"])
    tokens = options.get("profile_tokens")
    if tokens is None and options.get("profile") is None and stats.sample is not None:
        tokens = stats.sample.experts
    own = {} if isinstance(source, Counts) else options.get("routings") or {}
    ways = {label: execution.replace(routing=own.get(label, execution.routing)) for label in placements}
    entries = [
        _Entry.of(label, placements[label], (topology, model), (stats, (profile, tokens), ways[label]))
        for topology in places
        for label in placements
    ]
    if isinstance(source, Counts):
        return tuple(entry.on_counts(source, options.get("phase")) for entry in entries)
    index = TokenIndex.of(source)
    phases = [options["phase"]] if options.get("phase") else index.phases()
    scores = []
    for phase in phases:
        steps = draw_steps(source, index, _law(index, phase, options), execution.homes)
        scores += [entry.on_steps(steps) for entry in entries]
    return tuple(scores)


def _check_counts(execution: Execution) -> None:
    """Refuse what counts cannot tell."""
    usual = Execution()
    for name in EXECUTION_OPTIONS:
        asked = getattr(execution, name)
        if asked != getattr(usual, name):
            raise InputError(
                f"{name.replace('_', ' ')} {asked} on counts",
                rule="counts hold neither homes nor which experts a token chose together",
                hint="leave it out, or use a per-token trace",
            )


def batch_document(law: BatchLaw) -> dict[str, Any]:
    """Return a law as part of a JSON document."""
    names = ["requests", "tokens", "batches", "seed", "arrival"]
    names += ["prefill_requests", "prefill_tokens"] if law.phase == MIXED else []
    return {name: getattr(law, name) for name in names}


def draw_steps(source: TraceStream, index: TokenIndex, law: BatchLaw, homes: str = AUTO_HOMES) -> Steps:
    """Draw the steps of a law from a stream and read their tokens, and first tokens where ``homes`` go by them."""
    trace, rows = gather(source, draw(index, law))
    seen = seen_tokens(homes)
    opening = gather(source, index.first_tokens(seen))[0] if seen else None
    return Steps(trace=trace, rows=rows, law=law, opening=opening)


def counts_law(counts: Counts, num_gpus: int, phase: str | None = None) -> BatchLaw:
    """Return the law recorded counts stand for: each recorded step is a batch of its mean size.

    Counts do not say their phase: steps of 128 tokens per GPU or more are taken for prefill.
    """
    tokens = max(1, round(float(counts.counts.sum(axis=2).mean()) / counts.meta.top_k))
    guessed = "prefill" if tokens >= PREFILL_FROM_TOKENS_PER_GPU * num_gpus else "decode"
    return BatchLaw(phase=phase or guessed, requests=tokens, tokens=1, batches=counts.num_steps)


def law_for(source: TraceStream | Counts, num_gpus: int, **options: Any) -> BatchLaw:
    """Return the batch law of a trace: ``phase`` (default: decode where the trace has it) and :data:`LAW_OPTIONS`."""
    if isinstance(source, Counts):
        return counts_law(source, num_gpus, options.get("phase"))
    index = TokenIndex.of(source)
    return _law(index, options.get("phase") or index.phases()[0], options)


def _law(index: TokenIndex, phase: str, options: Mapping[str, Any]) -> BatchLaw:
    """Return the usual law of a phase with what the options say instead."""
    law = default_law(index, phase, requests=options.get("requests"), tokens=options.get("tokens"))
    return law.replace(**{name: options[name] for name in LAW_OPTIONS if options.get(name) is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A placement on a topology, with what does not depend on the phase measured once."""

    label: str
    placement: Placement
    topology: Topology
    model: ModelSpec
    execution: Execution
    profile: tuple[Ints, npt.NDArray[Any] | None]
    top_k: int
    max_over_mean: Floats
    traffic: TrafficMetrics
    trace_digest: str

    @classmethod
    def of(
        cls,
        label: str,
        placement: Placement,
        place: tuple[Topology, ModelSpec],
        known: tuple[RoutingStats, tuple[Ints, npt.NDArray[Any] | None], Execution],
    ) -> _Entry:
        stats, profile, execution = known
        router = Router.of(placement, place[0], execution.routing, *profile)
        router = router.measured(None if stats.sample is None else stats.sample.experts)
        return cls(
            label=label,
            placement=placement,
            topology=place[0],
            model=place[1],
            execution=execution,
            profile=profile,
            top_k=stats.meta.top_k,
            max_over_mean=max_over_mean(placement, stats.load, router),
            traffic=traffic_metrics(stats, placement, place[0], router),
            trace_digest=stats.trace_digest,
        )

    def on_steps(self, steps: Steps) -> Score:
        load, tokens = self.profile
        run = simulate(steps, self.placement, self.topology, self.model, self.execution, profile=load, tokens=tokens)
        return self._score(run, steps.law)

    def on_counts(self, counts: Counts, phase: str | None) -> Score:
        law = counts_law(counts, self.topology.num_gpus, phase)
        run = simulate_counts(counts, self.placement, self.topology, self.model, phase=law.phase)
        return self._score(run, law)

    def _score(self, run: Simulation, law: BatchLaw) -> Score:
        returning = self.execution.dataflow == DISPATCH_COMBINE
        return Score(
            placement=self.label,
            topology=self.topology.name,
            law=law,
            execution=self.execution,
            simulation=run,
            naive=naive_times(law, self.placement, self.topology, self.model, self.top_k) if returning else None,
            max_over_mean=self.max_over_mean,
            traffic=self.traffic,
            trace_digest=self.trace_digest,
        )


def excess_removed(entry: Score, first: Score) -> dict[str, Any]:
    """Share of the load above the noise floor that a placement takes away from the first one's, mean and quantiles.

    The noise floor is what perfect long-run balance would still show in steps of this size.
    """
    floor, shares = entry.simulation.noise_floor, {}
    ours, base = (summarise(one.simulation.step_max_over_mean) for one in (entry, first))
    for name in ("mean", "p95", "p99", "cvar95"):
        above = base[name].value - floor
        shares[name] = _round((base[name].value - ours[name].value) / above) if above > 0 else None
    return {"against": first.placement, "step_max_over_mean": shares}


def scores_to_dict(scores: Sequence[Score]) -> dict[str, Any]:
    """Return a ``moeplace/score/1`` document."""
    firsts: dict[tuple[str, str], Score] = {}
    documents = []
    for entry in scores:
        first = firsts.setdefault((entry.topology, entry.law.phase), entry)
        documents.append(entry.to_dict() | {"excess_removed": excess_removed(entry, first)})
    dataflows = sorted({entry.execution.dataflow for entry in scores})
    return {
        "schema": SCHEMA,
        "dataflow": dataflows[0] if len(dataflows) == 1 else dataflows,
        "trace_digest": scores[0].trace_digest if scores else None,
        "scores": documents,
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": _round(estimate.value), "interval": [_round(estimate.low), _round(estimate.high)]}


def _round(value: Any) -> float | None:
    return None if value is None else round(float(value), DIGITS)
