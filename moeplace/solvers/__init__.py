"""The folder is the registry: one file per method, and here the look-up that verifies every answer.

A solver is a module with ``DESCRIPTION``, ``OPTIONS`` (option name → help) and ``solve(problem, limits, report)``.
Other packages add theirs through the entry-point group ``moeplace.solvers``. Solvers never import each other: ``a+b``
hands the placement of ``a`` to ``b`` as ``problem.start``.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Protocol

import numpy as np

from moeplace.bounds import load_floor, objective_bound
from moeplace.errors import InputError, SolverError, unknown_name
from moeplace.feasible import check_cap, keeps_caps, over_cap, over_copies
from moeplace.metrics import cross_shares, max_over_mean
from moeplace.migration import check_moves
from moeplace.objective import UNITS, Term, load_ratio, objective_value, terms
from moeplace.packing.eplb import balance_global, slots_without_copies
from moeplace.placement import Placement
from moeplace.portfolio import Candidate, choose
from moeplace.problem import COPIES, CROSS, LOAD, REMOTE, Problem
from moeplace.sampled import aligned, relink
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason
from moeplace.tails import MEAN

AUTO = "auto"
ENTRY_POINTS = "moeplace.solvers"
TOLERANCE = 1e-9


class Solver(Protocol):
    """What a solver module offers."""

    DESCRIPTION: str
    OPTIONS: Mapping[str, str]

    def solve(self, problem: Problem, limits: Limits, report: Report) -> Solution:
        """Answer the problem within the limits, telling the report how it goes."""


def list_solvers() -> tuple[str, ...]:
    """Names of every solver, sorted, without importing any."""
    own = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    others = [entry.name for entry in metadata.entry_points(group=ENTRY_POINTS)]
    return tuple(sorted({name.replace("_", "-") for name in [*own, *others]}))


def load_solver(name: str) -> Solver:
    """Import one solver by name.

    Raises
    ------
    UnknownNameError
        No such solver; the message suggests the nearest names.
    """
    known = list_solvers()
    if name not in known:
        raise unknown_name("solver", name, [AUTO, *known])
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            solver: Solver = entry.load()
            return solver
    module: Solver = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module


def solve(problem: Problem, solver: str = AUTO, limits: Limits | None = None, report: Report | None = None) -> Solution:
    """Solve a problem and verify the answer with code that is not the solver.

    Parameters
    ----------
    problem
        What to place.
    solver
        A name of :func:`list_solvers`, several joined by ``+`` (each starts from the one before if its module sets
        ``USES_START``), or ``auto``.
    limits, report
        Work limits and where progress goes; defaults are five minutes and silence.

    Returns
    -------
    Solution
        With the objective recomputed, a certified bound, and every term.

    Raises
    ------
    InfeasibleError
        A load cap lies below the certified floor of a layer.
    SolverError
        The answer is invalid, or its value is not what the solver claims.
    """
    limits, report = limits or Limits(), report or Report()
    check_cap(problem)
    floor = objective_bound(problem)
    if problem.baseline is not None:
        return _solve_moving(problem, solver, limits, report, floor)
    if solver == AUTO:
        return _solve_auto(problem, limits, report, floor)
    return _solve_chain(problem, tuple(solver.split("+")), limits, report, floor)


def _solve_moving(problem: Problem, solver: str, limits: Limits, report: Report, floor: float) -> Solution:
    """Solve without limits on moves, name GPUs as in the baseline, and go there as far as the limits let."""
    needs_start = solver != AUTO and getattr(load_solver(solver.split("+")[0]), "NEEDS_START", False)
    start = problem.baseline if needs_start and problem.start is None else problem.start
    free = solve(problem.replace(baseline=None, moves=None, start=start), solver, limits, report)
    if free.placement is None:
        return free
    placement, notes = aligned(problem, free.placement), free.notes
    status, bound = free.status, free.bound
    if problem.moves is not None:
        report.stage("moves", "as far towards it as the limits on moves let, swaps with the most gain a copy first")
        placement = relink(problem, placement, limits)
        value = objective_value(problem, placement)
        now = objective_value(problem, problem.baseline) if problem.baseline is not None else value
        won = "all" if now <= free.objective else f"{(now - value) / (now - free.objective):.0%}"
        notes = (
            *notes,
            f"the baseline's objective is {now:,.4f}, that of a free re-solve {free.objective:,.4f}: within the limits "
            f"on moves {won} of that gain is kept",
        )
        status, bound = Status.FEASIBLE, floor
    changed = free.replace(
        placement=placement, objective=objective_value(problem, placement), status=status, bound=bound, notes=notes,
        stop_reason=free.stop_reason if status is free.status else StopReason.EXHAUSTED,
    )  # fmt: skip
    return finish(problem, changed, floor)


def _solve_auto(problem: Problem, limits: Limits, report: Report, floor: float) -> Solution:
    candidates, why = choose(problem)
    _check_options(AUTO, [candidate.name for candidate in candidates], limits)
    report.stage(AUTO, f"{', '.join(map(str, candidates))} ({why})")
    tried: list[tuple[Candidate, Solution]] = []
    clock = Clock(limits)
    for place, candidate in enumerate(candidates):
        if not tried or not limits.stop.is_set():
            report.stage(str(candidate), load_solver(candidate.name).DESCRIPTION)
            # what quick methods leave of their share goes to those after them
            own = limits.replace(time_limit_s=clock.left_s / (len(candidates) - place))
            tried.append((candidate, _try(problem, candidate, own, report, floor)))
    found = [entry for entry in tried if entry[1].placement is not None]
    within = [entry for entry in found if keeps_caps(problem, entry[1].placement)]
    chosen, best = min(within or found or tried[:1], key=lambda entry: entry[1].objective)
    note = f"auto tried {', '.join(str(candidate) for candidate, _ in tried)}; {chosen} is best ({why})"
    return finish(problem, best.replace(notes=(*best.notes, note), history=tuple(report.history)), floor)


def _try(problem: Problem, candidate: Candidate, limits: Limits, report: Report, floor: float) -> Solution:
    """Run one candidate; one with a goal of its own is then valued by the problem's own objective."""
    own = candidate.limits(limits)
    if candidate.slack is None:
        return _run(problem, candidate.name, own, report, floor)
    plain = problem.replace(steps=None, risk=MEAN, baseline=None)
    balanced = load_solver("balance").solve(plain.replace(objective=LOAD), limits.replace(options={}), Report())
    cap = problem.load_cap
    if balanced.placement is not None:
        least = max_over_mean(balanced.placement, problem.stats.load) * (1 + TOLERANCE)
        loose = least * (1 + candidate.slack)
        cap = loose if cap is None else np.minimum(np.maximum(loose, least), cap)
    parted = plain.replace(objective=candidate.goal, load_cap=cap, start=balanced.placement)
    answer = _run(parted, candidate.name, own, report, objective_bound(parted))
    if answer.placement is None:
        return answer
    value = objective_value(problem, answer.placement)
    report.improved(str(candidate), value, bound=floor, unit=UNITS[problem.objective])
    reason = StopReason.EXHAUSTED if answer.stop_reason is StopReason.PROVEN else answer.stop_reason
    return answer.replace(
        objective=value, unit=UNITS[problem.objective], bound=None, status=Status.FEASIBLE, stop_reason=reason
    )


def _solve_chain(problem: Problem, names: Sequence[str], limits: Limits, report: Report, floor: float) -> Solution:
    _check_options("+".join(names), names, limits)
    answer: Solution | None = None
    ignored: list[str] = []
    for name in names:
        start = None if answer is None else answer.placement
        if start is not None and not getattr(load_solver(name), "USES_START", False):
            ignored.append(f"{name} does not start from another placement: the answer is its own")
        report.stage(name, load_solver(name).DESCRIPTION)
        answer = _run(problem if start is None else problem.replace(start=start), name, limits, report, floor)
        if limits.stop.is_set():
            break
    if answer is None:
        raise SolverError("no solver was named")
    notes = (*answer.notes, *ignored)
    return finish(problem, answer.replace(solver="+".join(names), notes=notes, history=tuple(report.history)), floor)


def _check_options(solver: str, names: Sequence[str], limits: Limits) -> None:
    known = sorted({option for name in names for option in load_solver(name).OPTIONS})
    for option in sorted(set(limits.options) - set(known)):
        raise InputError(
            f"solver {solver} has no option {option!r}",
            rule=f"its options are {', '.join(known) or 'none'}",
            hint="moeplace list solvers shows every option",
        )


def _run(problem: Problem, name: str, limits: Limits, report: Report, floor: float) -> Solution:
    module = load_solver(name)
    own = {option: value for option, value in limits.options.items() if option in module.OPTIONS}
    answer = module.solve(problem, limits.replace(options=own), report)
    placement = answer.placement
    if placement is not None:
        if not problem.shares_evenly and problem.routing not in getattr(module, "ROUTINGS", ()):
            answer = _rerouted(problem, answer, placement)
        value = verify(problem, answer)
        bound = floor if answer.bound is None else answer.bound
        figures = {"load max/mean": float(load_ratio(problem, placement).mean())}
        if problem.topology.num_nodes > 1 and (crossing := cross_shares(problem.stats, placement, problem.topology)):
            figures["pairs across nodes"] = crossing[1]
        report.improved(name, value, bound=bound, unit=UNITS[problem.objective], figures=figures)
    return answer


def _rerouted(problem: Problem, answer: Solution, placement: Placement) -> Solution:
    """The answer of a method that has copies share evenly, valued by the problem's replica choice; unproved."""
    _check_placement(problem, placement)
    reason = StopReason.EXHAUSTED if answer.stop_reason is StopReason.PROVEN else answer.stop_reason
    return answer.replace(
        objective=objective_value(problem, placement),
        bound=None,
        status=Status.FEASIBLE,
        stop_reason=reason,
        notes=(*answer.notes, f"{answer.solver} has copies share evenly; valued under {problem.routing} routing"),
    )


def verify(problem: Problem, answer: Solution) -> float:
    """Recompute an answer's objective and check its placement; return the recomputed value.

    Raises
    ------
    SolverError
        The placement breaks a rule, or the claimed objective is not the recomputed one.
    """
    placement = answer.placement
    if placement is None:
        raise SolverError(f"{answer.solver} found no placement")
    _check_placement(problem, placement)
    value = objective_value(problem, placement)
    if not math.isclose(value, answer.objective, rel_tol=1e-6, abs_tol=1e-9):
        raise SolverError(
            f"{answer.solver} claims {answer.objective:.9g} {answer.unit}, its placement costs {value:.9g}",
            rule="the claimed objective is the recomputed one",
        )
    if answer.bound is not None and answer.bound > value * (1 + 1e-6) + 1e-9:
        raise SolverError(f"{answer.solver} claims a bound of {answer.bound:.9g} above its own value {value:.9g}")
    if answer.status is Status.OPTIMAL and (answer.bound is None or value > answer.bound * (1 + 1e-6) + 1e-9):
        raise SolverError(
            f"{answer.solver} claims that {value:.9g} is optimal, with a bound of {answer.bound}",
            rule="a proof of optimality is a bound equal to the value",
        )
    return value


def _check_placement(problem: Problem, placement: Placement) -> None:
    if placement.num_layers != problem.num_layers or placement.num_experts != problem.num_experts:
        raise SolverError(f"a placement of {placement.num_layers} layers × {placement.num_experts} experts")
    placement.check_fits(problem.slots_per_gpu, whole_model=problem.whole_model)


def _captured(problem: Problem, value: float, bound: float) -> float | None:
    """Share of the gain over EPLB's traffic that is possible by the bound; small gaps at many GPUs flatter a result."""
    slots = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
    eplb = objective_value(problem, balance_global(problem.stats.load.astype(np.float64), slots))
    return (eplb - value) / (eplb - bound) if eplb - bound > TOLERANCE else None


def finish(problem: Problem, answer: Solution, floor: float) -> Solution:
    """Verify an answer, and complete it: bound not below ``floor``, every term, a status that the numbers bear out."""
    if answer.placement is None:
        return answer
    value = verify(problem, answer)
    over = over_cap(problem, answer.placement)
    if over.any():
        layer = problem.stats.meta.layer_ids[int(np.argmax(over))]
        note = f"{answer.solver} exceeds the load cap in {int(over.sum())} layers, first layer {layer}"
        return answer.replace(placement=None, status=Status.UNKNOWN, notes=(*answer.notes, note), bound=None)
    if over_copies(problem, answer.placement):
        note = f"{answer.solver} found no placement within the cap of {problem.copies_cap:.4f} copies per token"
        return answer.replace(placement=None, status=Status.UNKNOWN, notes=(*answer.notes, note), bound=None)
    if (broken := check_moves(problem, answer.placement)) is not None:
        raise SolverError(f"{answer.solver}: {broken}", rule="limits on moves are hard")
    bound = min(value, floor if answer.bound is None else max(floor, answer.bound))
    proven = value - bound <= TOLERANCE * max(1.0, value)
    notes, sample = answer.notes, problem.stats.sample
    if (
        proven
        and problem.objective in (COPIES, REMOTE)
        and sample is not None
        and sample.num_tokens < problem.stats.num_tokens
    ):
        notes = (*notes, f"proved for a sample of {sample.num_tokens} of {problem.stats.num_tokens} tokens")
    parts = dict(terms(problem, answer.placement))
    load, least = parts["load_max_over_mean_mean"], float(load_floor(problem).mean())
    parts["load_max_over_mean_mean"] = Term(value=load.value, unit=load.unit, bound=min(least, load.value))
    if problem.objective == CROSS and (captured := _captured(problem, value, bound)) is not None:
        parts["captured_share"] = Term(value=captured, unit="of the possible gain over EPLB")
    return answer.replace(
        objective=value,
        unit=UNITS[problem.objective],
        bound=bound,
        terms=parts,
        notes=notes,
        status=Status.OPTIMAL if proven else answer.status,
        stop_reason=StopReason.PROVEN if proven else answer.stop_reason,
    )
