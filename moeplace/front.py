"""The trade between load and traffic: the load cap swept, what is reached under each, and what no placement can reach.

Fewest crossings want a topic's experts together, even load wants them apart. Under each of several caps on the busiest
GPU the traffic is minimised (the ε-constraint method), and once the predicted step time itself, which weighs both. Of
the placements found, the front are those that none beats in load, traffic and predicted step time together. The corner
is certified: the floor of load, the bound of traffic under the loosest cap and that of step time each hold for every
placement, so none is below it in any of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplace.bounds import load_floor, objective_bound, step_time_bound
from moeplace.errors import NothingFoundError
from moeplace.frozen import Floats
from moeplace.objective import UNITS, load_ratio, objective_value, step_values
from moeplace.placement import Placement
from moeplace.problem import CONTEXT_COHERENT, COPIES, CROSS, GPU, LOAD, NODE, STEP_TIME, Problem
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason
from moeplace.solvers import AUTO, finish, solve
from moeplace.tails import MEAN, risk_value

SLACKS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, np.inf)  # above the best balanced load of a layer
SHARE = 0.25  # of the work, under each cap
BALANCE_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """What was reached under one cap.

    Attributes
    ----------
    minimised
        The objective: traffic, or step time.
    cap
        Cap on max/mean GPU load, mean over layers; None is none.
    load, traffic, step_time_us
        Max/mean GPU load, mean over layers; the traffic objective; the predicted step time.
    node_traffic
        The same traffic counted by node: copies per token, or share of pairs; None with one node.
    mean_us, p99_us
        Mean and p99 of the sampled steps' times; None where the step time is that of the mean step.
    bound
        Certified lower bound of what was minimised under this cap.
    on_front
        No other point is at least as good in all three and better in one.
    """

    minimised: str
    cap: float | None
    load: float
    traffic: float
    bound: float | None
    step_time_us: float
    on_front: bool
    node_traffic: float | None = None
    mean_us: float | None = None
    p99_us: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """All points in order of their caps, and the certified corner.

    Attributes
    ----------
    points, chosen
        The points, and the number of the one with the least predicted step time.
    traffic, unit
        Name and unit of the traffic objective.
    load_floor, traffic_bound, step_time_bound_us
        No placement is below any of these.
    """

    points: tuple[FrontPoint, ...]
    chosen: int
    traffic: str
    unit: str
    load_floor: float
    traffic_bound: float
    step_time_bound_us: float


def trace_front(
    problem: Problem, solver: str = AUTO, limits: Limits | None = None, report: Report | None = None
) -> tuple[Front, Solution]:
    """Sweep the load cap and return the front, and the answer of least predicted step time.

    Parameters
    ----------
    problem
        What to place; its objective must be ``step-time``. A load cap it has stays the loosest.
    solver
        What minimises traffic under each cap.
    limits, report
        As for :func:`~moeplace.solvers.solve`; work and time are shared out over the caps.

    Raises
    ------
    NothingFoundError
        The solver keeps none of the caps.
    """
    limits, report = limits or Limits(), report or Report()
    clock = Clock(limits)
    kind = CROSS if problem.dataflow == CONTEXT_COHERENT else COPIES
    start, caps = _caps(problem, limits)
    found: list[tuple[Problem, Solution]] = []
    for i, cap in enumerate([*caps, problem.load_cap]):
        if found and clock.over:
            break
        asked = _mean_step(problem, kind) if i < len(caps) else problem
        parted = asked.replace(load_cap=cap, start=start)
        told = "none" if cap is None else f"max/mean {cap.mean():.4f}, mean over layers"
        report.stage("front", f"least {parted.objective}, load cap {told}")
        left_s = max(0.1, clock.left_s / (len(caps) + 1 - i))
        answer = solve(parted, solver, limits.replace(work=limits.work * SHARE, time_limit_s=left_s), report)
        if answer.placement is not None:
            found.append((parted, answer))
            start = answer.placement
    if not found:
        raise NothingFoundError(f"{solver} keeps no load cap", hint="another --solver, or a looser --load-cap")
    front = _front(problem, kind, found)
    best = found[front.chosen][1]
    solution = Solution(
        placement=best.placement,
        objective=front.points[front.chosen].step_time_us,
        unit=UNITS[STEP_TIME],
        bound=front.step_time_bound_us,
        status=Status.FEASIBLE,
        stop_reason=clock.stop_reason() if clock.over else StopReason.EXHAUSTED,
        solver=best.solver,
        seed=limits.seed,
        history=tuple(report.history),
        notes=(*best.notes, f"of {len(found)} points between load and traffic, the one of least predicted step time"),
    )
    return front, finish(problem, solution, front.step_time_bound_us)


def _caps(problem: Problem, limits: Limits) -> tuple[Placement | None, list[Floats | None]]:
    """A balanced placement, and caps from its own load per layer upwards, none above the problem's."""
    share = limits.replace(work=limits.work * BALANCE_SHARE, options={})
    balanced = solve(_mean_step(problem, LOAD), "balance", share).placement
    if balanced is None:
        return None, [problem.load_cap]
    ratio = load_ratio(problem, balanced) * (1 + 1e-9)
    caps: list[Floats | None] = []
    for slack in SLACKS:
        cap = ratio * (1 + slack)
        if problem.load_cap is not None:
            cap = np.minimum(np.maximum(cap, ratio), problem.load_cap)
        if not np.isfinite(cap).all() or (cap >= problem.num_gpus).all():
            caps.append(None)
        elif not caps or (cap != caps[-1]).any():
            caps.append(cap)
    return balanced, caps


def _mean_step(problem: Problem, objective: str) -> Problem:
    """Return the problem for load or traffic of the mean step."""
    return problem.replace(objective=objective, steps=None, risk=MEAN)


def _front(problem: Problem, kind: str, found: Sequence[tuple[Problem, Solution]]) -> Front:
    parted = _mean_step(problem, kind)
    rows, more = [], []
    for _, answer in found:
        placement = answer.placement
        if placement is not None:
            load = float(load_ratio(problem, placement).mean())
            rows.append((load, objective_value(parted, placement), objective_value(problem, placement)))
            more.append(_beside(parted, problem, placement))
    values = np.array(rows)
    points = tuple(
        FrontPoint(
            minimised=asked.objective,
            cap=None if asked.load_cap is None else float(asked.load_cap.mean()),
            load=load,
            traffic=traffic,
            bound=answer.bound,
            step_time_us=time_us,
            on_front=not bool(((values <= row).all(axis=1) & (values < row).any(axis=1)).any()),
            **beside,
        )
        for (asked, answer), row, (load, traffic, time_us), beside in zip(found, values, rows, more, strict=True)
    )
    traffic_bound, soonest = objective_bound(parted), objective_bound(problem)
    for asked, answer in found:
        if answer.bound is not None and _as_loose(asked, problem):
            if asked.objective == kind:
                traffic_bound = max(traffic_bound, answer.bound)
            else:
                soonest = max(soonest, answer.bound)
    if (
        kind == CROSS
        and not problem.is_sampled
        and problem.copies_level == GPU
        and problem.stats.transition is not None
    ):
        known = {GPU: traffic_bound * float(problem.stats.transition.sum(dtype=np.float64))}
        soonest = max(soonest, step_time_bound(problem, known))
    return Front(
        points=points,
        chosen=int(values[:, 2].argmin()),
        traffic=kind,
        unit=UNITS[kind],
        load_floor=float(load_floor(problem).mean()),
        traffic_bound=min(traffic_bound, float(values[:, 1].min())),
        step_time_bound_us=min(soonest, float(values[:, 2].min())),
    )


def _beside(parted: Problem, problem: Problem, placement: Placement) -> dict[str, float]:
    """What a point tells beside what it is judged by: traffic by node, mean and p99 of sampled steps."""
    told: dict[str, float] = {}
    if problem.topology.num_nodes > 1:
        told["node_traffic"] = objective_value(parted.replace(copies_level=NODE), placement)
    if problem.is_sampled:
        values = step_values(problem, placement)
        told |= {"mean_us": risk_value(values, MEAN), "p99_us": risk_value(values, "p99")}
    return told


def _as_loose(asked: Problem, problem: Problem) -> bool:
    """Whether a bound under the cap that was asked for holds under the problem's own."""
    if asked.load_cap is None or problem.load_cap is None:
        return asked.load_cap is None
    return bool((asked.load_cap >= problem.load_cap).all())
