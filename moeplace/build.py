"""From a trace and a few names to a :class:`~moeplace.problem.Problem`, every assumption said in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.affinity import RoutingStats, count_routing
from moeplace.batches import DEFAULT_PREFILL_TOKENS, DEFAULT_REQUESTS, MIXED, UNIFORM, BatchLaw, Steps, TokenIndex
from moeplace.calibration import calibrate, read_compute_table
from moeplace.caps import cap_for, copies_cap_for, moves_for
from moeplace.checks import Finding, check_stats, identical_start
from moeplace.errors import InputError, ProblemError, UnknownNameError, unknown_name
from moeplace.model import ModelSpec, generic_model, load_model
from moeplace.placement import Placement
from moeplace.presets import is_path
from moeplace.problem import DISPATCH_COMBINE, REMOTE, STEP_TIME, Problem, slots_for
from moeplace.routing import EVEN
from moeplace.scoring import draw_steps, law_for
from moeplace.tails import MEAN
from moeplace.topology import Topology, load_topology
from moeplace.trace import DECODE, PHASES, PREFILL, Counts, TraceMeta, TraceStream

SHOWN_DOMAINS = 12
DEFAULT_GPUS = 8
WIRE_BYTES = {"fp8": 1, "bf16": 2}
UNKNOWN_MODEL = "unknown model"


RISK_BATCHES = 1000  # steps that a tail is fitted to


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a user may say about a problem; None means the default, which is then reported as an assumption.

    Attributes
    ----------
    model, topology, accelerator
        Names or TOML files; a topology may be ``KIND:DIMS``.
    compute_table
        CSV file of measured expert GEMMs that the accelerator's compute constants are fitted to.
    dispatch_dtype, combine_dtype
        ``fp8`` or ``bf16``: what activations are sent as, to experts and back.
    num_gpus, num_nodes
        Must agree with the topology; without one, GPUs alone mean one scale-up domain, and nodes a scale-out network.
    num_groups
        Groups that experts are split into for hierarchical EPLB, in place of the model's own.
    redundant, slots_per_gpu
        Redundant experts per layer in total, or slots per GPU and layer.
    dataflow, objective, copies_level, whole_model
        See :class:`~moeplace.problem.Problem`.
    risk
        What of the step time is minimised: ``mean``, the only one so far.
    load_cap
        A number, or ``eplb`` for the maximum of EPLB's global policy in each layer.
    copies_cap
        Copies per token, or ``eplb-6%`` for so much less than the placement of EPLB's global policy has.
    phase, batch_requests, batch_tokens, batch_prefill_requests, batch_prefill_tokens, arrival
        The batch law.
    risk_batches
        Steps to draw for a risk; given with the mean, the mean over them is minimised, not the mean step.
    baseline, max_moves, max_moved_bytes, max_moved_bytes_per_gpu, horizon_steps
        The placement now deployed; copies to move at most (a number, or a share of all), bytes at most in all and on
        one GPU, and the steps over which moving has to repay itself.
    routing
        Which copy of an expert serves a token; default: copies share evenly.
    """

    model: str | None = None
    topology: str | None = None
    accelerator: str | None = None
    compute_table: str | None = None
    dispatch_dtype: str | None = None
    combine_dtype: str | None = None
    num_gpus: int | None = None
    num_nodes: int | None = None
    num_groups: int | None = None
    redundant: int | None = None
    slots_per_gpu: int | None = None
    dataflow: str = DISPATCH_COMBINE
    objective: str = STEP_TIME
    risk: str = MEAN
    copies_level: str = "gpu"
    whole_model: bool = False
    load_cap: str | float | None = None
    copies_cap: str | float | None = None
    phase: str | None = None
    batch_requests: int | None = None
    batch_tokens: int | None = None
    batch_prefill_requests: int | None = None
    batch_prefill_tokens: int | None = None
    risk_batches: int | None = None
    arrival: str | None = None
    baseline: Placement | None = None
    routing: str | None = None
    max_moves: int | float | None = None
    max_moved_bytes: float | None = None
    max_moved_bytes_per_gpu: float | None = None
    horizon_steps: int | None = None


def build_problem(
    source: TraceStream | Counts,
    choices: Choices | None = None,
    *,
    threads: int = 1,
    stats: RoutingStats | None = None,
    **more: Any,
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
    stats
        Statistics of the source, if it is counted already.

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
    check_law(source, requests=choices.batch_requests, tokens=choices.batch_tokens)
    model = sent_as(model_for(source.meta, choices.model), choices)
    if choices.num_groups is not None:  # a token may still use any of them: only EPLB goes by these groups
        model = model.replace(num_groups=choices.num_groups, groups_per_token=0)
    stats = count_routing(source, threads=threads) if stats is None else stats
    topology, _ = measured(topology_for(choices, stats), model, choices)
    if choices.objective == REMOTE and topology.num_nodes < 2:
        rule, hint = "it counts copies sent to other nodes", "--topology scale-out:NODESxGPUS, or --objective copies"
        raise ProblemError(f"objective remote on {topology.name}, which is one node", rule=rule, hint=hint)
    slots = slots_for(
        stats.meta.num_experts, topology.num_gpus, redundant=choices.redundant, per_gpu=choices.slots_per_gpu
    )
    law = law_for(
        source,
        topology.num_gpus,
        phase=choices.phase,
        requests=choices.batch_requests,
        tokens=choices.batch_tokens,
        prefill_requests=choices.batch_prefill_requests,
        prefill_tokens=choices.batch_prefill_tokens,
        arrival=choices.arrival,
        batches=choices.risk_batches or (None if choices.risk == MEAN and choices.copies_cap is None else RISK_BATCHES),
    )
    return Problem(
        stats=stats,
        model=model,
        topology=topology,
        slots_per_gpu=slots,
        law=law,
        dataflow=choices.dataflow,
        objective=choices.objective,
        copies_level=choices.copies_level,
        load_cap=cap_for(choices.load_cap, stats, slots),
        copies_cap=copies_cap_for(choices.copies_cap, stats, slots, topology),
        whole_model=choices.whole_model,
        steps=_steps(source, law, choices),
        risk=choices.risk,
        baseline=choices.baseline,
        routing=choices.routing or EVEN,
        moves=moves_for(
            choices.baseline,
            model.expert_weight_bytes,
            copies=choices.max_moves,
            total_bytes=choices.max_moved_bytes,
            gpu_bytes=choices.max_moved_bytes_per_gpu,
            horizon_steps=choices.horizon_steps,
        ),
    )


def _steps(source: TraceStream | Counts, law: BatchLaw, choices: Choices) -> Steps | Counts | None:
    """Draw the steps a risk is taken over; None where the mean step will do."""
    if choices.risk == MEAN and choices.risk_batches is None and choices.copies_cap is None:
        return None
    return source if isinstance(source, Counts) else draw_steps(source, TokenIndex.of(source), law)


def check_law(source: TraceStream | Counts, **given: int | None) -> None:
    """Raise :class:`InputError` where a batch law is given for counts: their recorded steps are the batches."""
    named = [name for name, value in given.items() if value is not None]
    if named and isinstance(source, Counts):
        flags = ", ".join(f"--{name.replace('_', '-')}" if "batches" in name else f"--batch-{name}" for name in named)
        raise InputError(
            f"{flags} on counts",
            rule="the steps of counts are the recorded ones",
            hint="leave it out, or use a per-token trace",
        )


def model_for(meta: TraceMeta, name: str | None) -> ModelSpec:
    """Return the named model, else the preset the trace names, else a generic one of the trace's shape."""
    if name is not None:
        return load_model(name)
    known = preset_for(meta, meta.model_id)
    return known or generic_model(meta.num_experts, meta.top_k, meta.layer_ids, meta.model_id or UNKNOWN_MODEL)


def sent_as(model: ModelSpec, choices: Choices) -> ModelSpec:
    """Return a model whose activations are sent in the chosen formats."""
    asked = {"dispatch_bytes": choices.dispatch_dtype, "combine_bytes": choices.combine_dtype}
    for dtype in asked.values():
        if dtype is not None and dtype not in WIRE_BYTES:
            raise unknown_name("dtype", dtype, list(WIRE_BYTES))
    return model.replace(**{name: WIRE_BYTES[dtype] for name, dtype in asked.items() if dtype is not None})


def measured(topology: Topology, model: ModelSpec, choices: Choices) -> tuple[Topology, tuple[str, ...]]:
    """Return a topology whose GPUs compute as the chosen table says, and a sentence on how well that fits."""
    if choices.compute_table is None:
        return topology, ()
    fit = calibrate(topology.accelerator, model, read_compute_table(choices.compute_table))
    return topology.replace(accelerator=fit.accelerator), (str(fit),)


def preset_for(meta: TraceMeta, name: str | None) -> ModelSpec | None:
    """Return the preset of a name where there is one and its shape is that of the trace."""
    try:
        known = load_model(name) if name and not is_path(name) else None
    except (UnknownNameError, InputError):
        return None
    return known if known and (known.num_experts, known.top_k) == (meta.num_experts, meta.top_k) else None


def topology_for(choices: Choices, stats: RoutingStats | None = None) -> Topology:
    """Return the topology asked for; by default one scale-up domain of 8 GPUs, or of as many as the trace has ranks.

    Raises
    ------
    ProblemError
        The number of GPUs disagrees with the topology.
    """
    ranks = len(stats.source_load) if stats is not None and stats.source_load is not None else DEFAULT_GPUS
    gpus, nodes = choices.num_gpus or ranks, choices.num_nodes or 1
    if choices.topology is None and gpus % nodes:
        raise ProblemError(f"{gpus} GPUs on {nodes} nodes", rule="every node has as many GPUs", hint="--num-gpus")
    spec = choices.topology or (f"scale-out:{nodes}x{gpus // nodes}" if nodes > 1 else f"scale-up:{gpus}")
    topology = load_topology(spec, accelerator=choices.accelerator)
    if choices.num_nodes not in (None, topology.num_nodes):
        raise ProblemError(
            f"{choices.num_nodes} nodes on {topology.name}",
            rule=f"{topology.name} has {topology.num_nodes}",
            hint="leave one of --num-nodes and --topology out",
        )
    if choices.num_gpus is not None and choices.num_gpus != topology.num_gpus:
        raise ProblemError(
            f"{choices.num_gpus} GPUs on {topology.name}",
            rule=f"{topology.name} has {topology.num_gpus}",
            hint="leave one of --num-gpus and --topology out",
        )
    return topology


def assumptions(problem: Problem, choices: Choices) -> tuple[str, ...]:
    """What was not said but assumed, one sentence each."""
    meta = problem.stats.meta
    said = list(meta.assumptions)
    if choices.model is None:
        said.append(model_sentence(meta, problem.model))
    if choices.topology is None:
        said.append(
            f"topology {problem.topology.name} of {problem.topology.accelerator.name}; --topology names another"
        )
    if choices.compute_table is not None:
        said += measured(topology_for(choices, problem.stats), problem.model, choices)[1]
    if not problem.stats.has_tokens:
        said.append("the trace holds only counts: load can be optimised, affinity and copies cannot be seen")
    elif problem.stats.source_load is None:
        said.append("home ranks are not recorded: requests are dealt over the GPUs evenly")
    if choices.phase is None and problem.stats.sample is not None and len(np.unique(problem.stats.sample.phase)) > 1:
        said.append(
            f"load is counted over prefill and decode tokens, the step is a {problem.law.phase} one; see --phase"
        )
    if choices.routing is None and problem.num_slots > problem.num_experts and problem.topology.num_nodes > 1:
        said.append("copies share an expert's tokens evenly: see --routing for stacks that prefer a near one")
    if problem.stats.has_tokens:
        said += law_sentences(problem.law, requests=choices.batch_requests, tokens=choices.batch_tokens)
    return tuple(said)


def trace_warnings(source: TraceStream | Counts, problem: Problem, doubts: Sequence[Finding] = ()) -> tuple[str, ...]:
    """What looks wrong with the trace of a problem, one sentence each with what to do about it.

    Only what is cheap to find is looked for: in the statistics, and at the start of the trace; ``doubts`` are what
    counting it has raised (:func:`~moeplace.soundness.count_and_doubt`). ``moeplace stats`` looks for more.
    """
    found = [*doubts, *check_stats(problem.stats, problem.model)]
    if not isinstance(source, Counts):
        found = [*identical_start(source), *found]
    return tuple(str(finding) for finding in found if finding.level == "warning")


def model_sentence(meta: TraceMeta, model: ModelSpec) -> str:
    """Say where the model comes from when it was not named."""
    if preset_for(meta, meta.model_id) is not None:
        return f"model {model.name}, as the trace names it"
    return (
        f"the model's widths are unknown: times are for hidden {model.hidden}, expert inner {model.expert_inner}, "
        f"{model.weight_bytes:g} bytes a weight; --model names another"
    )


def law_sentences(law: BatchLaw, *, requests: int | None, tokens: int | None) -> list[str]:
    """Say where the default batch law was cut down to what the trace has; None are the defaults."""
    phase = PREFILL if law.phase == PHASES[PREFILL] else DECODE
    usual = DEFAULT_REQUESTS[phase]
    said = []
    if tokens is None and phase == PREFILL and law.tokens < DEFAULT_PREFILL_TOKENS:
        said.append(
            f"a prefill step takes {law.tokens} tokens of a request, not {DEFAULT_PREFILL_TOKENS}: "
            "most requests of the trace are shorter"
        )
    if requests is None and law.requests < usual and law.phase != MIXED:
        said.append(
            f"a {law.phase} step holds {law.requests} requests, not {usual}: the trace has no more with "
            f"{law.tokens} or more {law.phase} tokens"
        )
    return said


def describe(problem: Problem) -> Mapping[str, str]:
    """The instance in words, for the head of a log."""
    stats, slots, model, law = problem.stats, problem.slots_per_gpu, problem.model, problem.law
    low, high = int(slots.min()), int(slots.max())
    each = f"{low} per GPU" if low == high else f"{low} to {high} per GPU"
    width = f"hidden {model.hidden}, expert inner {model.expert_inner}, {model.weight_bytes:g} bytes a weight"
    requests = f", {plural(stats.num_requests, 'request')}" if stats.num_requests else ""
    way = "" if problem.routing == EVEN else f", copies chosen {problem.routing}"
    cap = ""
    if problem.load_cap is not None:
        lowest, highest = float(problem.load_cap.min()), float(problem.load_cap.max())
        cap = f", load cap {lowest:.4f}" + (f" to {highest:.4f}" if highest > lowest else "")
    if problem.copies_cap is not None:
        cap += f", at most {problem.copies_cap:.4f} copies per token"
    step = f"{law.requests:,} tokens on average, as recorded"
    if stats.has_tokens:
        step = f"{law_words(law)} over all GPUs"
    told = {
        "trace": f"{plural(stats.num_tokens, 'token')}{requests}, digest {stats.trace_digest[:12]}",
        "experts": f"{plural(problem.num_layers, 'MoE layer')} × {problem.num_experts} experts, top-{stats.meta.top_k}",
        "model": f"{model.name} ({width})",
        "topology": f"{problem.topology.name}: {problem.num_gpus} × {problem.topology.accelerator.name}, "
        f"{plural(problem.topology.num_nodes, 'node')}",
        "slots": f"{problem.num_slots} per layer, {each}, {problem.num_slots - problem.num_experts} redundant",
        "objective": f"{problem.objective} under {problem.dataflow}{cap}{way}",
        "step": f"{law.phase}, {step}",
    }
    if problem.baseline is not None:
        limited = "" if problem.moves is None else f"; {problem.moves}"
        told["baseline"] = (
            f"{int(problem.baseline.used_slots().sum()):,} copies now deployed; moves are counted from it{limited}"
        )
    return told


def law_words(law: BatchLaw) -> str:
    """``256 requests × 1 token``, and the prompt chunks of a mixed step."""
    parts = [f"{plural(requests, 'request')} × {plural(tokens, 'token')}" for _, requests, tokens in law.parts()]
    neighbours = ", neighbours in the trace" if law.arrival != UNIFORM else ""
    return " and prompts of ".join(parts) + neighbours


def describe_trace(stats: RoutingStats, num_gpus: int) -> Mapping[str, str]:
    """A trace in words, for the head of a table whose GPU column is for ``num_gpus`` GPUs."""
    told = {"trace": plural(stats.num_tokens, "token")}
    if not stats.has_tokens:
        told["trace"] += " (counts only: load can be optimised, affinity cannot be seen)"
    told["requests"] = f"{stats.num_requests:,}" if stats.num_requests else "unknown"
    told["experts"] = (
        f"{plural(stats.meta.num_layers, 'MoE layer')} × {stats.meta.num_experts} experts, top-{stats.meta.top_k}"
    )
    if stats.meta.domains:
        names = stats.meta.domains
        more = f" and {len(names) - SHOWN_DOMAINS:,} more" if len(names) > SHOWN_DOMAINS else ""
        told["domains"] = ", ".join(names[:SHOWN_DOMAINS]) + more
    told["GPUs"] = f"{num_gpus}, experts placed contiguously"
    told["digest"] = stats.trace_digest[:12]
    return told


def plural(count: int, noun: str) -> str:
    """``1 node``, ``1,000 nodes``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
