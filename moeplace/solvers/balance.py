"""Load balanced as far as it goes: EPLB's start, best exchanges, kicks of places and of copies, proof by bounds.

Every layer is improved by :func:`moeplace.packing.pack_layers` until it meets its certified floor or its kicks are used
up. Where load is the objective, layers that are small enough are then solved by an integer programme, which also proves
them, and on demand the floors of large ones are raised by the configuration linear programme. Only load counts: no
traffic, no batches, no current placement.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.bounds import load_floor
from moeplace.errors import InputError
from moeplace.frozen import Floats
from moeplace.metrics import max_over_mean
from moeplace.milp import Budget
from moeplace.objective import UNITS, objective_value
from moeplace.packing import configuration_floor, exact_layer, pack_layers
from moeplace.packing.configurations import ROUNDS
from moeplace.packing.eplb import balance_global
from moeplace.placement import Placement
from moeplace.problem import LOAD, Problem
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason

DESCRIPTION = "least load of the busiest GPU: exchanges, kicks of places and copies, small layers proved"
USES_START = True
BOUNDS = ("simple", "configurations")
OPTIONS: Mapping[str, str] = {
    "kicks": "kicks of each layer (default: 300, times --work)",
    "bound": "simple (default) or configurations (tighter, seconds a layer: at most 4 slots per GPU, none spare)",
}
KICKS = 300
EXACT_WORK, EXACT_WORK_OF_ALL = 5.0, 20.0  # of one layer, and of all together
MET = 1e-9


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Balance the load of every layer. Complexity: O(layers · kicks · slots of a GPU · slots of all)."""
    clock = Clock(limits)
    kind = limits.options.get("bound", BOUNDS[0])
    if kind not in BOUNDS:
        raise InputError(f"bound {kind!r}", rule=f"one of {', '.join(BOUNDS)}")
    load = problem.stats.load
    mean = load.sum(axis=1) / problem.num_gpus
    start = _start(problem)
    placement = pack_layers(
        load.astype(np.float64),
        start,
        problem.slots_per_gpu,
        floor=load_floor(problem) * mean,
        kicks=limits.whole("kicks", max(1, round(KICKS * limits.work))),
        seed=limits.seed,
        stop=lambda: clock.over,
    )
    floor, notes = load_floor(problem), []
    whole = problem.objective == LOAD and not problem.is_sampled
    if whole and not problem.whole_model:
        placement, floor = _prove(problem, placement, floor, (limits, clock))
        if kind == "configurations":
            floor = _raise(problem, placement, floor, (limits, clock), report)
    elif problem.start is not None and objective_value(problem, placement) > objective_value(problem, problem.start):
        placement, notes = problem.start, ["balancing made the objective worse: the start is kept"]
    value = objective_value(problem, placement)
    bound = float(floor.mean()) if whole else None
    proven = bound is not None and value <= bound * (1 + MET)
    return Solution(
        placement=placement,
        objective=value,
        unit=UNITS[problem.objective],
        bound=None if bound is None else min(bound, value),
        status=Status.OPTIMAL if proven else Status.FEASIBLE,
        stop_reason=StopReason.PROVEN if proven else clock.stop_reason() if clock.over else StopReason.EXHAUSTED,
        solver="balance",
        seed=limits.seed,
        history=tuple(report.history),
        notes=tuple(notes),
    )


def _start(problem: Problem) -> Placement:
    """Return the start that was given if it is a packing of every layer, else EPLB's."""
    given = problem.start
    same = given is not None and given.max_slots == problem.max_slots
    if given is not None and same and (given.used_slots() <= problem.slots_per_gpu).all() and not given.duplicates():
        return given
    return balance_global(problem.stats.load.astype(np.float64), problem.slots_per_gpu)


def _prove(
    problem: Problem, placement: Placement, floor: Floats, run: tuple[Limits, Clock]
) -> tuple[Placement, Floats]:
    """Solve the layers that do not meet their floor exactly, where they are small; return raised floors too."""
    limits, clock = run
    ratio, floor = max_over_mean(placement, problem.stats.load), floor.copy()
    slots = placement.slots.astype(np.int64)
    work = min(EXACT_WORK, EXACT_WORK_OF_ALL / max(1, int((ratio > floor * (1 + MET)).sum()))) * limits.work
    for layer in np.flatnonzero(ratio > floor * (1 + MET)):
        if clock.over:
            break
        load = problem.stats.load[layer]
        mean = load.sum() / problem.num_gpus
        budget = Budget(work=work, time_limit_s=clock.left_s, seed=limits.seed, stop=limits.stop)
        found = exact_layer(load, slots[layer], problem.slots_per_gpu, float(floor[layer] * mean), budget)
        if found is None:
            break
        slots[layer] = found[0]
        floor[layer] = max(floor[layer], found[1] / mean)
    return Placement(slots=slots, num_experts=problem.num_experts), floor


def _raise(problem: Problem, placement: Placement, floor: Floats, run: tuple[Limits, Clock], report: Report) -> Floats:
    """Raise the floors that are not met by the configuration linear programme.

    Only where a floor is above the mean: whole configurations are then few. At the mean there are so many that a layer
    was never seen to gain more than one selection.
    """
    limits, clock = run
    load = problem.stats.load
    if problem.num_slots > problem.num_experts:
        return floor
    ratio, mean, floor = max_over_mean(placement, load), load.sum(axis=1) / problem.num_gpus, floor.copy()
    whole = np.ceil(floor * mean * (1 - 1e-12) - 1e-6).astype(np.int64)
    layers = np.flatnonzero((ratio > floor * (1 + MET)) & (whole > np.ceil(mean)))
    for i, layer in enumerate(layers.tolist()):
        if clock.over:
            break
        report.progress(i, len(layers), "bounding layers")
        found = configuration_floor(
            load[layer],
            problem.slots_per_gpu,
            floor=int(whole[layer]),
            packing=placement.slots[layer].astype(np.int64),
            rounds=max(1, round(ROUNDS * limits.work)),
            stop=lambda: clock.over,
        )
        floor[layer] = max(floor[layer], found / mean[layer])
    return floor
