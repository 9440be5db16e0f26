"""From a trace and a few names to a :class:`~moeplace.problem.Problem`, every assumption said in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.affinity import RoutingStats, count_routing
from moeplace.errors import InputError, ProblemError, UnknownNameError
from moeplace.frozen import Floats, Ints
from moeplace.metrics import max_over_mean
from moeplace.model import ModelSpec, generic_model, load_model
from moeplace.placement import Placement
from moeplace.problem import DISPATCH_COMBINE, STEP_TIME, Problem, slots_for
from moeplace.scoring import law_for
from moeplace.solvers.eplb import balance_global
from moeplace.topology import Topology, load_topology
from moeplace.trace import Counts, TraceMeta, TraceStream

DEFAULT_GPUS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a user may say about a problem; None means the default, which is then reported as an assumption.

    Attributes
    ----------
    model, topology, accelerator
        Names or TOML files; a topology may be ``KIND:DIMS``.
    num_gpus
        Must agree with the topology, or alone means one scale-up domain.
    redundant, slots_per_gpu
        Redundant experts per layer in total, or slots per GPU and layer.
    dataflow, objective, copies_level, whole_model
        See :class:`~moeplace.problem.Problem`.
    load_cap
        A number, or ``eplb`` for the maximum of EPLB's global policy in each layer.
    phase, batch_requests, batch_tokens
        The batch law.
    """

    model: str | None = None
    topology: str | None = None
    accelerator: str | None = None
    num_gpus: int | None = None
    redundant: int | None = None
    slots_per_gpu: int | None = None
    dataflow: str = DISPATCH_COMBINE
    objective: str = STEP_TIME
    copies_level: str = "gpu"
    whole_model: bool = False
    load_cap: str | float | None = None
    phase: str | None = None
    batch_requests: int | None = None
    batch_tokens: int | None = None
    baseline: Placement | None = None


def build_problem(
    source: TraceStream | Counts, choices: Choices | None = None, *, threads: int = 1, **more: Any
) -> Problem:
    """Count a trace and set up the problem it poses.

    Parameters
    ----------
    source
        The fit part of a trace, or of counts.
    choices
        What is fixed; alternatively give its fields as keywords.
    threads
        Threads for counting.

    Examples
    --------
    >>> import moeplace
    >>> trace = moeplace.read_trace("traces/hand.jsonl")
    >>> problem = moeplace.build_problem(trace, topology="scale-up:2")
    >>> problem.num_experts, problem.num_gpus, problem.num_slots
    (4, 2, 4)
    """
    if choices is not None and more:
        raise TypeError("give either choices or its fields as keywords, not both")
    choices = choices or Choices(**more)
    model = model_for(source.meta, choices.model)
    stats = count_routing(source, threads=threads)
    topology = topology_for(choices, stats)
    slots = slots_for(
        stats.meta.num_experts, topology.num_gpus, redundant=choices.redundant, per_gpu=choices.slots_per_gpu
    )
    return Problem(
        stats=stats,
        model=model,
        topology=topology,
        slots_per_gpu=slots,
        law=law_for(
            source,
            topology.num_gpus,
            phase=choices.phase,
            requests=choices.batch_requests,
            tokens=choices.batch_tokens,
        ),
        dataflow=choices.dataflow,
        objective=choices.objective,
        copies_level=choices.copies_level,
        load_cap=cap_for(choices.load_cap, stats, slots),
        whole_model=choices.whole_model,
        baseline=choices.baseline,
    )


def model_for(meta: TraceMeta, name: str | None) -> ModelSpec:
    """Return the named model, else the preset the trace names, else a generic one of the trace's shape."""
    if name is not None:
        return load_model(name)
    if meta.model_id:
        try:
            known = load_model(meta.model_id)
        except (UnknownNameError, InputError):
            known = None
        if known is not None and known.num_experts == meta.num_experts and known.top_k == meta.top_k:
            return known
    return generic_model(meta.num_experts, meta.top_k, meta.layer_ids, meta.model_id or "unknown model")


def topology_for(choices: Choices, stats: RoutingStats | None = None) -> Topology:
    """Return the topology asked for; by default one scale-up domain of 8 GPUs, or of as many as the trace has ranks.

    Raises
    ------
    ProblemError
        The number of GPUs disagrees with the topology.
    """
    ranks = len(stats.source_load) if stats is not None and stats.source_load is not None else DEFAULT_GPUS
    spec = choices.topology or f"scale-up:{choices.num_gpus or ranks}"
    topology = load_topology(spec, accelerator=choices.accelerator)
    if choices.num_gpus is not None and choices.num_gpus != topology.num_gpus:
        raise ProblemError(
            f"{choices.num_gpus} GPUs on {topology.name}",
            rule=f"{topology.name} has {topology.num_gpus}",
            hint="leave one of --num-gpus and --topology out",
        )
    return topology


def cap_for(cap: str | float | None, stats: RoutingStats, slots_per_gpu: Ints) -> Floats | None:
    """``[layer]`` cap on max/mean GPU load: a number for every layer, or EPLB's own maximum per layer."""
    if cap is None:
        return None
    if cap == "eplb":
        return max_over_mean(balance_global(stats.load.astype(np.float64), slots_per_gpu), stats.load)
    try:
        return np.full(stats.meta.num_layers, float(cap))
    except ValueError:
        raise InputError(f"load cap {cap!r}", rule="a number of at least 1, or eplb") from None


def assumptions(problem: Problem, choices: Choices) -> tuple[str, ...]:
    """What was not said but assumed, one sentence each."""
    said = list(problem.stats.meta.assumptions)
    preset = choices.model is None
    if preset and problem.model.name == (problem.stats.meta.model_id or "unknown model"):
        said.append(
            f"the model's widths are unknown: times are for hidden {problem.model.hidden}, expert inner "
            f"{problem.model.expert_inner}, {problem.model.weight_bytes:g} bytes a weight; --model names another"
        )
    elif preset:
        said.append(f"model {problem.model.name}, as the trace names it")
    if choices.topology is None:
        said.append(
            f"topology {problem.topology.name} of {problem.topology.accelerator.name}; --topology names another"
        )
    if not problem.stats.has_tokens:
        said.append("the trace holds only counts: load can be optimised, affinity and copies cannot be seen")
    if problem.stats.source_load is None and problem.stats.has_tokens:
        said.append("home ranks are not recorded: requests are dealt over the GPUs evenly")
    return tuple(said)


def describe(problem: Problem) -> Mapping[str, str]:
    """The instance in words, for the head of a log."""
    stats, slots, model = problem.stats, problem.slots_per_gpu, problem.model
    low, high = int(slots.min()), int(slots.max())
    each = f"{low} per GPU" if low == high else f"{low} to {high} per GPU"
    width = f"hidden {model.hidden}, expert inner {model.expert_inner}, {model.weight_bytes:g} B a weight"
    law = problem.law
    requests = f", {stats.num_requests} requests" if stats.num_requests else ""
    cap = "none" if problem.load_cap is None else f"{problem.load_cap.min():.4f} to {problem.load_cap.max():.4f}"
    return {
        "trace": f"{stats.num_tokens:,} tokens{requests}, {problem.num_layers} MoE layers × {problem.num_experts} "
        f"experts, top-{stats.meta.top_k}, digest {stats.trace_digest[:12]}",
        "model": f"{model.name} ({width})",
        "topology": f"{problem.topology.name}: {problem.num_gpus} × {problem.topology.accelerator.name}, "
        f"{problem.topology.num_nodes} node{'s' * (problem.topology.num_nodes > 1)}",
        "slots": f"{problem.num_slots} per layer, {each}, {problem.num_slots - problem.num_experts} redundant",
        "objective": f"{problem.objective} under {problem.dataflow}; load cap {cap}",
        "step": f"{law.phase}, {law.requests} requests × {law.tokens} tokens over all GPUs",
    }
