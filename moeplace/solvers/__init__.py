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
import numpy.typing as npt

from moeplace.bounds import load_floor, objective_bound
from moeplace.errors import InfeasibleError, InputError, SolverError, unknown_name
from moeplace.metrics import cross_shares, max_over_mean
from moeplace.objective import UNITS, Term, objective_value, terms
from moeplace.placement import Placement
from moeplace.problem import COPIES, Problem
from moeplace.solution import Limits, Report, Solution, Status, StopReason

AUTO = "auto"
ENTRY_POINTS = "moeplace.solvers"
TOLERANCE = 1e-9
AUTO_BINARIES = 8192
AUTO_WORK = 0.2


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


def choose(problem: Problem) -> tuple[tuple[str, ...], str]:
    """Solvers that ``auto`` tries for a problem, and why."""
    binaries = problem.num_layers * problem.num_experts * problem.num_gpus
    if problem.num_slots > problem.num_experts:
        return ("linear", "eplb"), "redundant slots: only methods that place copies"
    if binaries <= AUTO_BINARIES:
        return ("linear", "eplb", "moetuner"), f"{binaries:,} binaries: small enough for a short integer programme too"
    return ("linear", "eplb"), f"{binaries:,} binaries: too many for integer programmes"


def _auto_limits(name: str, limits: Limits) -> Limits:
    """Return the limits of one method that ``auto`` tries: integer programmes get a small share of the work."""
    if name != "moetuner":
        return limits
    return limits.replace(work=limits.work * AUTO_WORK, options={"backend": "cpsat", **limits.options})


def solve(problem: Problem, solver: str = AUTO, limits: Limits | None = None, report: Report | None = None) -> Solution:
    """Solve a problem and verify the answer with code that is not the solver.

    Parameters
    ----------
    problem
        What to place.
    solver
        A name of :func:`list_solvers`, several joined by ``+`` (each starts from the one before), or ``auto``.
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
    names, why = choose(problem) if solver == AUTO else (tuple(solver.split("+")), "")
    _check_options(solver, names, limits)
    if solver == AUTO:
        report.stage(AUTO, f"{', '.join(names)} ({why})")
        answers = [
            _run(problem, name, _auto_limits(name, limits), report)
            for name in names
            if not limits.stop.is_set() or name == names[0]
        ]
        found = [answer for answer in answers if answer.placement is not None]
        within = [answer for answer in found if not _over_cap(problem, answer.placement).any()]
        best = min(within or found or answers[:1], key=lambda answer: answer.objective)
        note = f"auto tried {', '.join(answer.solver for answer in answers)}; {best.solver} is best ({why})"
        return _finish(problem, best.replace(notes=(*best.notes, note), history=tuple(report.history)))
    answer: Solution | None = None
    for name in names:
        start = problem if answer is None or answer.placement is None else problem.replace(start=answer.placement)
        answer = _run(start, name, limits, report)
        if limits.stop.is_set():
            break
    if answer is None:
        raise SolverError("no solver was named")
    return _finish(problem, answer.replace(solver=solver, history=tuple(report.history)))


def check_cap(problem: Problem) -> None:
    """Raise :class:`InfeasibleError` where the load cap of a layer is below its certified floor."""
    if problem.load_cap is None:
        return
    floor = load_floor(problem)
    layers = np.flatnonzero(problem.load_cap < floor * (1 - TOLERANCE))
    if layers.size:
        shown = ", ".join(
            f"layer {problem.stats.meta.layer_ids[i]} (cap {problem.load_cap[i]:.4f}, floor {floor[i]:.4f})"
            for i in layers[:8]
        )
        raise InfeasibleError(
            f"the load cap is below the certified floor in {layers.size} of {problem.num_layers} layers: {shown}",
            rule="no placement has a max/mean GPU load below the floor",
            hint="raise --load-cap or add redundant experts",
        )


def _check_options(solver: str, names: Sequence[str], limits: Limits) -> None:
    known = sorted({option for name in names for option in load_solver(name).OPTIONS})
    for option in sorted(set(limits.options) - set(known)):
        raise InputError(
            f"solver {solver} has no option {option!r}",
            rule=f"its options are {', '.join(known) or 'none'}",
            hint="moeplace list solvers shows every option",
        )


def _run(problem: Problem, name: str, limits: Limits, report: Report) -> Solution:
    module = load_solver(name)
    own = {option: value for option, value in limits.options.items() if option in module.OPTIONS}
    report.stage(name, module.DESCRIPTION)
    answer = module.solve(problem, limits.replace(options=own), report)
    if answer.placement is not None:
        value = verify(problem, answer)
        bound = objective_bound(problem) if answer.bound is None else answer.bound
        figures = {"load max/mean": float(max_over_mean(answer.placement, problem.stats.load).mean())}
        if problem.topology.num_nodes > 1 and (
            crossing := cross_shares(problem.stats, answer.placement, problem.topology)
        ):
            figures["pairs across nodes"] = crossing[1]
        report.improved(name, value, bound=bound, unit=UNITS[problem.objective], figures=figures)
    return answer


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


def _over_cap(problem: Problem, placement: Placement | None) -> npt.NDArray[np.bool_]:
    """``[layer]`` whether a placement exceeds the load cap."""
    if problem.load_cap is None or placement is None:
        return np.zeros(problem.num_layers, bool)
    over: npt.NDArray[np.bool_] = max_over_mean(placement, problem.stats.load) > problem.load_cap * (1 + TOLERANCE)
    return over


def _finish(problem: Problem, answer: Solution) -> Solution:
    if answer.placement is None:
        return answer
    value = verify(problem, answer)
    over = _over_cap(problem, answer.placement)
    if over.any():
        layer = problem.stats.meta.layer_ids[int(np.argmax(over))]
        note = f"{answer.solver} exceeds the load cap in {int(over.sum())} layers, first layer {layer}"
        return answer.replace(placement=None, status=Status.UNKNOWN, notes=(*answer.notes, note), bound=None)
    bounds = [bound for bound in (answer.bound, objective_bound(problem)) if bound is not None]
    bound = min(max(bounds), value) if bounds else None
    proven = bound is not None and value - bound <= TOLERANCE * max(1.0, value)
    notes, sample = answer.notes, problem.stats.sample
    if proven and problem.objective == COPIES and sample is not None and sample.num_tokens < problem.stats.num_tokens:
        notes = (*notes, f"proved for a sample of {sample.num_tokens} of {problem.stats.num_tokens} tokens")
    parts = dict(terms(problem, answer.placement))
    floor = float(load_floor(problem).mean())
    load = parts["load_max_over_mean_mean"]
    parts["load_max_over_mean_mean"] = Term(value=load.value, unit=load.unit, bound=min(floor, load.value))
    return answer.replace(
        objective=value,
        unit=UNITS[problem.objective],
        bound=bound,
        terms=parts,
        notes=notes,
        status=Status.OPTIMAL if proven else answer.status,
        stop_reason=StopReason.PROVEN if proven else answer.stop_reason,
    )
