"""Experts near the ranks whose tokens choose them: a transportation problem in each layer, solved exactly.

Under dispatch–combine a selection pays the way from its token's home to the expert's GPU and back, and nothing if they
are one. Without one copy per GPU for several experts, what an expert costs on a GPU is then its own affair:
``c[e, g] = Σ_s selections[s, e] · µs[s, g]`` over recorded homes ``s``, and placing experts in slots at the least sum
is a transportation problem (Hitchcock 1941), here an assignment of experts to slots. Ways cost what the topology says a
row takes on them alone: the link or NIC of the pair, hops times a link's time on tori and meshes.

That sum is a proxy: it knows neither queues at the busiest port nor the busiest GPU. What is proved is told as a stage
of the answer; the objective and bound of the problem are their own. A copy of an expert never lowers the sum while
copies share tokens evenly, since a mean is no less than its least term: spare slots stay empty. Under a load cap layers
whose assignment breaks it become generalised assignment problems, solved by integer programming (HiGHS in SciPy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp

from moeplace.errors import ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.objective import UNITS
from moeplace.placement import Placement
from moeplace.problem import DISPATCH_COMBINE, Problem
from moeplace.solution import Clock, Limits, Report, Solution, Stage, Status, StopReason, found
from moeplace.topology import Topology

DESCRIPTION = "experts near the ranks whose tokens choose them: each layer an exact transportation problem"
OPTIONS: Mapping[str, str] = {}
NODES = 2000  # of a layer's integer programme
INFEASIBLE = 2  # HiGHS's verdict as SciPy tells it
STAGE = "remote µs per token and layer"


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Assign experts to slots. Complexity: O(layers · experts² · slots), more where the load cap binds.

    Raises
    ------
    ProblemError
        The trace has no source ranks, or more of them than there are GPUs; tokens do not return home; slots are counted
        over the whole model.
    """
    _check(problem)
    clock, cost = Clock(limits), transport_costs(problem)
    layers = []
    for layer, table in enumerate(cost):
        layers.append(_layer(problem, layer, table, limits, clock))
        report.progress(layer + 1, len(cost), STAGE)
    bad = [problem.stats.meta.layer_ids[number] for number, told in enumerate(layers) if told.gpu is None]
    if bad:
        return _nothing(problem, layers, bad, limits, report, clock)
    lists = [
        [np.flatnonzero(told.gpu == gpu).tolist() for gpu in range(problem.num_gpus)] for told in layers
    ]  # fmt: skip
    least, bound = (float(np.mean([getattr(told, name) for told in layers])) for name in ("value", "bound"))
    proved = all(told.proved for told in layers)
    share = least / max(float(cost.mean(axis=2).sum(axis=1).mean()), 1e-300)
    what = "the least of all placements" if proved else f"at least {bound:,.4g} for any placement"
    note = f"rows of a token take {least:,.4g} µs of wire time in a layer ({what}), {share:.1%} of that anywhere"
    notes = [note]
    if problem.num_slots > problem.num_experts:
        notes.append("spare slots stay empty: a copy never lowers this sum while copies share tokens evenly")
    stage = Stage(
        name=STAGE,
        objective=least,
        bound=least if proved else min(least, bound),
        unit="µs",
        status=Status.OPTIMAL if proved else Status.FEASIBLE,
        stop_reason=StopReason.PROVEN if proved else StopReason.EXHAUSTED,
    )
    placement = Placement.from_lists(lists, problem.num_experts)
    answer = found(problem, placement, limits, report, solver="transport", notes=tuple(notes))
    return answer.replace(stages=(stage,))


def _check(problem: Problem) -> None:
    sources = problem.stats.source_load
    if problem.dataflow != DISPATCH_COMBINE:
        raise ProblemError(
            f"transport with dataflow {problem.dataflow}",
            rule="tokens return to their home rank after every layer",
            hint=f"--dataflow {DISPATCH_COMBINE}, or --solver search",
        )
    if problem.whole_model:
        raise ProblemError("transport with slots counted over the whole model", rule="every layer is solved by itself")
    if sources is None:
        raise ProblemError(
            "the trace records no source ranks",
            rule="transport brings experts near the ranks whose tokens choose them",
            hint="record the rank of every token, or --solver balance",
        )
    if len(sources) > problem.num_gpus:
        raise ProblemError(
            f"the trace's tokens come from {len(sources)} ranks, the topology has {problem.num_gpus} GPUs",
            rule="every source rank is a GPU",
            hint=f"--num-gpus {len(sources)}, or a topology of as many",
        )


def way_us(topology: Topology, dispatch_bytes: float, combine_bytes: float) -> Floats:
    """``[source, GPU]`` µs that one row takes to an expert's GPU and back, alone on its way; 0 at home."""
    us_per_byte = 1e-3 / topology.pair_bandwidth_gb_per_s()
    cost: Floats = dispatch_bytes * us_per_byte + combine_bytes * us_per_byte.T
    return cost


def transport_costs(problem: Problem) -> Floats:
    """``[layer, expert, GPU]`` wire time in µs per token that each expert causes on each GPU.

    Complexity: O(layers · experts · GPUs · ranks).
    """
    sources, model = problem.stats.source_load, problem.model
    assert sources is not None
    way = way_us(problem.topology, model.bytes_per_copy_dispatch, model.bytes_per_copy_combine)
    rows = sources.astype(np.float64) / problem.stats.num_tokens
    cost: Floats = np.einsum("sle,sg->leg", rows, way[: len(sources)])
    return cost


@dataclass(frozen=True, slots=True)
class _Told:
    """A layer: ``[expert]`` GPUs or None, their cost, what none is below, and whether there is no answer at all."""

    gpu: Ints | None
    value: float
    bound: float
    infeasible: bool = False

    @property
    def proved(self) -> bool:
        return self.value <= self.bound * (1 + 1e-9)


def _layer(problem: Problem, layer: int, cost: Floats, limits: Limits, clock: Clock) -> _Told:
    """Solve a layer: as an assignment, and as an integer programme where that breaks the load cap."""
    gpu = assign(cost, problem.slots_per_gpu)
    value = float(cost[np.arange(len(gpu)), gpu].sum())
    if problem.load_cap is None:
        return _Told(gpu, value, value)
    load = problem.stats.load[layer].astype(np.float64)
    most = float(problem.load_cap[layer]) * load.sum() / problem.num_gpus
    if (np.bincount(gpu, load, problem.num_gpus) <= most * (1 + 1e-9)).all():
        return _Told(gpu, value, value)
    if clock.over:
        return _Told(None, math.inf, value)
    nodes = max(1, round(NODES * limits.work))
    return _capped(cost, load, most, problem.slots_per_gpu, value, nodes, clock.left_s)


def assign(cost: Floats, slots_per_gpu: Ints) -> Ints:
    """``[expert]`` GPUs at the least sum of ``cost`` [expert, GPU], no GPU with more experts than slots."""
    seat = np.repeat(np.arange(len(slots_per_gpu)), slots_per_gpu)
    _, chosen = linear_sum_assignment(cost[:, seat])
    gpu: Ints = seat[chosen]
    return gpu


def _capped(
    cost: Floats, load: Floats, most: float, slots: Ints, floor: float, nodes: int, seconds: float
) -> _Told:  # fmt: skip
    """Solve the layer with ``load`` [expert] of a GPU at ``most``; ``floor`` is the sum without that cap."""
    experts, gpus = cost.shape
    ones, eye = np.ones((1, gpus)), sparse.identity(gpus, format="csr")
    once = sparse.kron(sparse.identity(experts), ones)
    held = sparse.kron(np.ones((1, experts)), eye)
    busy = sparse.kron((load / max(most, 1e-300))[None, :], eye)
    scale = max(float(cost.max()), 1e-300)
    answer = milp(
        cost.ravel() / scale,
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(held, -np.inf, slots),
            LinearConstraint(busy, -np.inf, 1.0),
        ],
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        options={"node_limit": nodes, "mip_rel_gap": 1e-9, "time_limit": max(0.1, seconds)},
    )
    if answer.x is None:
        return _Told(None, math.inf, floor, infeasible=answer.status == INFEASIBLE)
    gpu = answer.x.reshape(cost.shape).argmax(axis=1)
    full = np.bincount(gpu, minlength=gpus) <= slots
    if not (full.all() and (np.bincount(gpu, load, gpus) <= most * (1 + 1e-9)).all()):
        return _Told(None, math.inf, floor)
    value, bound = float(cost[np.arange(experts), gpu].sum()), answer.mip_dual_bound
    # the programme is solved to tolerances of 1e-6: its bound is lowered by as much
    lower = floor if bound is None or not math.isfinite(bound) else bound * scale * (1 - 1e-6)
    closed = answer.status == 0 and lower >= value * (1 - 3e-6)
    return _Told(gpu, value, value if closed else min(value, max(floor, lower)))


def _nothing(
    problem: Problem, layers: list[_Told], bad: list[int], limits: Limits, report: Report, clock: Clock
) -> Solution:  # fmt: skip
    """Return the solution where no placement keeps the cap, or none was found."""
    proved = any(told.infeasible for told in layers) and problem.num_slots == problem.num_experts
    why = "keeps the load cap" if proved else "without copies was found within the load cap"
    reason = StopReason.PROVEN if proved else (clock.stop_reason() if clock.over else StopReason.EXHAUSTED)
    return Solution(
        placement=None,
        objective=math.inf,
        unit=UNITS[problem.objective],
        status=Status.INFEASIBLE if proved else Status.UNKNOWN,
        stop_reason=reason,
        solver="transport",
        seed=limits.seed,
        history=tuple(report.history),
        notes=(f"no placement {why} in {len(bad)} layers: {', '.join(map(str, bad[:8]))}",),
    )
