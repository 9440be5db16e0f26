"""The least traffic between GPUs, proved, where layers can be divided over GPUs in few ways (Mixtral, or one per GPU).

Under context-coherent execution the share of consecutive pairs that cross GPUs does not depend on the GPUs' names, so
dynamic programming over unnamed divisions of every layer finds the optimum: see :mod:`moeplace.partitions`. Load caps
are kept exactly, and ``price`` adds the busiest GPU's load to what is minimised. Spare slots stay empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from moeplace.errors import InputError, ProblemError
from moeplace.objective import UNITS, objective_value
from moeplace.partitions import MAX_DIVISIONS, Divisions, best_chain, num_divisions
from moeplace.placement import Placement
from moeplace.problem import CROSS, GPU, Problem
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason

DESCRIPTION = "the proved least traffic between GPUs, with or without a load cap, for few experts or one per GPU"
OPTIONS: Mapping[str, str] = {
    "price": "also pay this share of all pairs for each unit of max/mean load, mean over layers (default 0)"
}
ROOM = 1e-9


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Find and prove the least share of pairs that cross GPUs.

    Raises
    ------
    ProblemError
        The objective is another one, slots are uneven or spare, or there are too many divisions.
    """
    _check(problem)
    price = _price(limits.options.get("price", "0"))
    clock = Clock(limits)
    divisions = Divisions.of(problem.num_experts, problem.num_gpus)
    pairs = problem.stats.transition
    if pairs is None:
        raise ProblemError("the trace holds only counts", rule="traffic between layers needs tokens")
    load = problem.stats.load.astype(np.float64)
    ratio = divisions.busiest(load) / load.mean(axis=1, keepdims=True) * problem.num_gpus / problem.num_experts
    cost = price * float(pairs.sum()) / problem.num_layers * ratio
    if problem.load_cap is not None:
        cost = np.where(ratio <= problem.load_cap[:, None] * (1 + ROOM), cost, math.inf)
    found = best_chain(pairs, divisions, cost, stop=lambda: clock.over)
    if found is None:
        return _nothing(problem, limits, report, clock)
    order = np.argsort(found[0], axis=1, kind="stable")
    slots = order.reshape(problem.num_layers, problem.num_gpus, -1)
    placement = Placement(slots=slots, num_experts=problem.num_experts)
    value = objective_value(problem, placement)
    return Solution(
        placement=placement,
        objective=value,
        unit=UNITS[problem.objective],
        bound=value if price == 0 else None,
        status=Status.OPTIMAL if price == 0 else Status.FEASIBLE,
        stop_reason=StopReason.PROVEN if price == 0 else StopReason.EXHAUSTED,
        solver="exact",
        seed=limits.seed,
        history=tuple(report.history),
    )


def _check(problem: Problem) -> None:
    """Raise :class:`ProblemError` where the method does not apply."""
    count = num_divisions(problem.num_experts, problem.num_gpus)
    if problem.objective != CROSS or problem.copies_level != GPU or problem.whole_model:
        raise ProblemError(
            f"objective {problem.objective}, counted by {problem.copies_level}",
            rule="exact minimises the share of pairs that cross GPUs, layer by layer",
            hint="--dataflow context-coherent --objective cross",
        )
    if not problem.divides_evenly or not count:
        raise ProblemError(
            f"{problem.num_experts} experts in {problem.num_slots} slots on {problem.num_gpus} GPUs",
            rule="exact needs equally many experts on every GPU and no spare slot",
            hint="another solver takes uneven and spare slots",
        )
    if count > MAX_DIVISIONS:
        raise ProblemError(
            f"{count:,} ways to divide {problem.num_experts} experts over {problem.num_gpus} GPUs",
            rule=f"exact tries all of them, at most {MAX_DIVISIONS:,}",
            hint="another solver, with its bound, says how far from the optimum it can be",
        )


def _price(text: str) -> float:
    try:
        price = float(text)
        if 0 <= price < math.inf:
            return price
    except ValueError:
        pass
    raise InputError(f"price {text!r}", rule="a number of at least 0")


def _nothing(problem: Problem, limits: Limits, report: Report, clock: Clock) -> Solution:
    """Return the solution where no division of some layer keeps the cap, or the run was stopped."""
    return Solution(
        placement=None,
        objective=math.inf,
        unit=UNITS[problem.objective],
        status=Status.UNKNOWN if clock.over else Status.INFEASIBLE,
        stop_reason=clock.stop_reason() if clock.over else StopReason.PROVEN,
        solver="exact",
        seed=limits.seed,
        history=tuple(report.history),
        notes=() if clock.over else ("no division of some layer keeps the load cap",),
    )
