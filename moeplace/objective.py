"""The one definition of cost: predicted µs of a step, and its parts in natural units.

A step runs the MoE layers one after another: ``Σ_l (busiest rank's experts + dispatch + combine)`` under
dispatch–combine, ``Σ_l busiest rank's experts + Σ_l move to the next layer`` under context-coherent execution.
Attention does not depend on the placement and is left out.

Solvers minimise it for the *mean step*: each expert gets a Poisson number of rows with its mean over the trace, homes
are those the trace records or spread evenly, and copies share evenly. Every copy then adds a fixed number of µs to its
GPU's compute and of copies to its traffic, so the cost is linear in the placement up to the maximum over GPUs and
ports. The evaluator (:mod:`moeplace.simulate`) applies the same constants and the same port model to steps drawn from a
trace, where the busiest GPU changes from step to step: its mean is usually the higher one. A problem that holds such
steps is minimised for them: the risk (mean, p95, p99, CVaR95) of what the evaluator says of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace.compute import ExpertCompute
from moeplace.errors import ProblemError, TopologyError
from moeplace.execution import Execution
from moeplace.frozen import Floats
from moeplace.metrics import cross_shares, max_over_mean, remote_copies, token_metrics, traffic_metrics
from moeplace.network import KERNEL_OF_PHASE, LOW_LATENCY, NORMAL, Exchange, Traffic, exchange
from moeplace.placement import Placement
from moeplace.problem import CONTEXT_COHERENT, COPIES, CROSS, DISPATCH_COMBINE, GPU, LOAD, REMOTE, STEP_TIME, Problem
from moeplace.routing import Router
from moeplace.simulate import check_shapes, counts_max_over_mean, simulate, simulate_counts
from moeplace.tails import risk_value
from moeplace.trace import Counts
from moeplace.traffic import dispatch_traffic, home_ranks

UNITS = {STEP_TIME: "µs", LOAD: "max/mean", COPIES: "copies/token", CROSS: "share of pairs", REMOTE: "copies/token"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of a cost: its value, its unit, and a certified lower bound where one exists."""

    value: float
    unit: str
    bound: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Predicted µs per layer: ``compute``, ``dispatch`` and ``combine`` (under context-coherent, moves and nothing)."""

    compute: Floats
    dispatch: Floats
    combine: Floats

    @property
    def total(self) -> float:
        """Time of the step."""
        return float(self.compute.sum() + self.dispatch.sum() + self.combine.sum())


def objective_value(problem: Problem, placement: Placement) -> float:
    """Value of the problem's objective, in :data:`UNITS`; never negative.

    Complexity: O(layers · GPUs · experts), and O(sampled tokens · layers · k) for ``copies``; ``remote`` as
    :func:`moeplace.metrics.remote_copies`.
    """
    if problem.is_sampled:
        return risk_value(step_values(problem, placement), problem.risk)
    if problem.objective == STEP_TIME:
        return mean_step_times(problem, placement).total
    if problem.objective == LOAD:
        return float(load_ratio(problem, placement).mean())
    if problem.objective == CROSS:
        shares = cross_shares(problem.stats, placement, problem.topology, router_of(problem, placement))
        return 0.0 if shares is None else shares[0 if problem.copies_level == GPU else 1]
    if problem.stats.sample is None:
        return float("nan")
    if problem.objective == REMOTE:
        return remote_copies(problem.stats.sample, placement, problem.topology, router_of(problem, placement))
    copies = token_metrics(problem.stats.sample, placement, problem.topology, router_of(problem, placement))
    return copies[0] if problem.copies_level == GPU else copies[1]


def router_of(problem: Problem, placement: Placement) -> Router | None:
    """Return the problem's replica choice for a placement, with the fit part as its profile; None: an even one."""
    if problem.shares_evenly:
        return None
    sample = problem.stats.sample
    tokens = None if sample is None else sample.experts
    return Router.of(placement, problem.topology, problem.routing, problem.stats.load, tokens)


def load_ratio(problem: Problem, placement: Placement) -> Floats:
    """``[layer]`` max/mean GPU load under the problem's replica choice."""
    return max_over_mean(placement, problem.stats.load, router_of(problem, placement))


def step_values(problem: Problem, placement: Placement) -> Floats:
    """``[batch]`` objective of every step of a sampled problem: µs, or max/mean GPU load averaged over layers.

    What the evaluator gives for the same steps. Complexity: O(batches · tokens · layers · k).
    """
    steps, model, topology = problem.steps, problem.model, problem.topology
    if steps is None:
        raise ProblemError("the problem has no steps", rule="a risk is taken over sampled steps")
    if isinstance(steps, Counts) and problem.objective == LOAD:
        check_shapes(placement, problem.num_layers, problem.num_experts, topology)
        return counts_max_over_mean(steps, placement)
    if isinstance(steps, Counts):
        run = simulate_counts(steps, placement, topology, model, phase=problem.law.phase)
    else:
        execution, sample = Execution(dataflow=problem.dataflow, routing=problem.routing), problem.stats.sample
        run = simulate(
            steps,
            placement,
            topology,
            model,
            execution,
            profile=problem.stats.load,
            tokens=None if sample is None else sample.experts,
        )
    return run.step_us if problem.objective == STEP_TIME else run.step_max_over_mean


def terms(problem: Problem, placement: Placement) -> Mapping[str, Term]:
    """Every part of the cost that the trace and topology support, in µs and in natural units."""
    result: dict[str, Term] = {}
    if problem.dataflow == DISPATCH_COMBINE or problem.stats.transition is not None:
        times = mean_step_times(problem, placement)
        for name, values in (("compute", times.compute), ("dispatch", times.dispatch), ("combine", times.combine)):
            result[f"{name}_us"] = Term(value=float(values.sum()), unit="µs")
    router = router_of(problem, placement)
    ratio = max_over_mean(placement, problem.stats.load, router)
    result["load_max_over_mean_mean"] = Term(value=float(ratio.mean()), unit="max/mean")
    result["load_max_over_mean_worst"] = Term(value=float(ratio.max()), unit="max/mean")
    metrics = traffic_metrics(problem.stats, placement, problem.topology, router)
    units = {"cross": "share of pairs", "copies": "copies/token", "remote": "copies/token", "next": "share of choices"}
    for name in metrics.__slots__:
        value = getattr(metrics, name)
        if value is not None:
            result[name] = Term(value=value, unit=units[name.split("_")[0]])
    return result


def mean_step_times(problem: Problem, placement: Placement) -> LayerTimes:
    """Predicted times of the mean step, per layer."""
    tokens = problem.law.step_tokens
    model, topology = problem.model, problem.topology
    compute = ExpertCompute.of(model, topology.accelerator, problem.law.phase)
    router = router_of(problem, placement)
    if router is None:
        memory, arithmetic = copy_costs(problem, placement.replicas(), compute)
        copies = placement.copies().astype(np.float64)
        on_gpu = (np.einsum("lge,le->lg", copies, memory), np.einsum("lge,le->lg", copies, arithmetic))
    else:
        rows = problem.stats.selections_per_token[:, None] * tokens * router.gpu_share(problem.num_gpus)
        memory, arithmetic = compute.expected_copy_us(rows)
        held = placement.copies() > 0
        on_gpu = (np.where(held, memory, 0.0).sum(axis=2), np.where(held, arithmetic, 0.0).sum(axis=2))
    rank_us = compute.expected_rank_us(*on_gpu, tokens / problem.num_gpus)
    if topology.gpu_speed is not None:
        rank_us = rank_us / topology.gpu_speed
    busiest: Floats = rank_us.max(axis=1)
    if problem.dataflow == CONTEXT_COHERENT:
        move = _exchange(problem, mean_chain_traffic(problem, placement), LOW_LATENCY, model.bytes_per_copy_dispatch)
        return LayerTimes(compute=busiest, dispatch=move.time_us, combine=np.zeros(1))
    kernel = KERNEL_OF_PHASE[problem.law.phase]
    traffic, kernel = mean_dispatch_traffic(problem, placement, kernel)
    dispatch = _exchange(problem, traffic, kernel, model.bytes_per_copy_dispatch)
    combine = _exchange(problem, traffic, kernel, model.bytes_per_copy_combine, returning=True)
    return LayerTimes(compute=busiest, dispatch=dispatch.time_us, combine=combine.time_us)


def _exchange(
    problem: Problem, traffic: Traffic, kernel: str, bytes_per_copy: float, *, returning: bool = False
) -> Exchange:
    return exchange(problem.topology, traffic, kernel=kernel, bytes_per_copy=bytes_per_copy, returning=returning)


def copy_costs(problem: Problem, replicas: npt.NDArray[np.int64], compute: ExpertCompute) -> tuple[Floats, Floats]:
    """``[layer, expert]`` expected memory and arithmetic µs that one copy of each expert adds to its GPU."""
    rows = problem.stats.selections_per_token * problem.law.step_tokens / replicas
    return compute.expected_copy_us(rows)


def mean_dispatch_traffic(problem: Problem, placement: Placement, kernel: str) -> tuple[Traffic, str]:
    """Copies ``[layer, GPU, GPU]`` of the mean step, and the kernel they are for.

    Normal kernels need token-level structure; on counts the low-latency kernel's one copy per selection stands in, an
    over-estimate.
    """
    if kernel == NORMAL and problem.stats.sample is not None:
        return _sampled_dispatch(problem, placement), NORMAL
    router = router_of(problem, placement)
    share = placement.even_share() if router is None else router.gpu_share(problem.num_gpus)
    copies = np.einsum("lse,lge->lsg", home_selections(problem), share) * problem.law.step_tokens
    shape = (problem.num_layers, problem.num_gpus, problem.num_gpus)
    return Traffic(copies=np.broadcast_to(copies, shape)), LOW_LATENCY


def home_selections(problem: Problem) -> Floats:
    """``[layer, GPU, expert]`` mean selections of each expert per token, by the home of the token.

    Where the trace records no homes they are spread evenly, and the axis of GPUs is 1 long.
    """
    stats, gpus = problem.stats, problem.num_gpus
    sources = stats.source_load
    if sources is None or len(sources) > gpus:
        return stats.selections_per_token[:, None, :] / gpus
    by_source = np.zeros((stats.meta.num_layers, gpus, stats.meta.num_experts))
    by_source[:, : len(sources)] = np.swapaxes(sources, 0, 1) / stats.num_tokens
    return by_source


def _sampled_dispatch(problem: Problem, placement: Placement) -> Traffic:
    sample, topology = problem.stats.sample, problem.topology
    if sample is None:
        raise TopologyError("no token sample", rule="normal kernels need tokens")
    router = router_of(problem, placement) or Router.of(placement, topology)
    token = np.arange(sample.num_tokens)
    home = home_ranks(sample.rank, token, topology.num_gpus)
    group = (np.zeros(sample.num_tokens, np.int64), 1)
    scale = problem.law.step_tokens / sample.num_tokens
    layers = []
    for layer in range(problem.num_layers):
        gpu = router.choose(layer, sample.experts[:, layer], token, home) // router.table.slots_per_gpu
        layers.append(dispatch_traffic(gpu, home, group, topology, NORMAL))
    nodes = [layer.node_copies for layer in layers if layer.node_copies is not None]
    return Traffic(
        copies=np.concatenate([layer.copies for layer in layers]) * scale, node_copies=np.concatenate(nodes) * scale
    )


def mean_chain_traffic(problem: Problem, placement: Placement) -> Traffic:
    """Copies ``[layer-1, GPU, GPU]`` of the mean step when tokens move from expert to expert, all ``k·k`` pairs."""
    stats = problem.stats
    if stats.transition is None:
        raise TopologyError("no transitions", rule="context-coherent execution needs per-token traces")
    router = router_of(problem, placement)
    share = placement.even_share() if router is None else router.gpu_share(problem.num_gpus)
    per_token = stats.transition / stats.num_tokens
    moved = [share[layer] @ per_token[layer] @ share[layer + 1].T for layer in range(stats.meta.num_layers - 1)]
    shape = (len(moved), problem.num_gpus, problem.num_gpus)
    return Traffic(copies=np.array(moved).reshape(shape) * problem.law.step_tokens)
