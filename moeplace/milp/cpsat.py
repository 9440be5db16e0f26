"""CP-SAT (OR-Tools): the same models on integers, with every rounding error accounted for.

CP-SAT knows integers only. A continuous variable ``x`` in ``[lower, upper]`` becomes ``lower + unit·X`` with ``X`` a
whole number and ``unit`` the power of two that makes about 2^24 steps; variables that are integer stay as they are. The
coefficients of a row are multiplied by one factor, 1 where they are whole already, what makes the smallest 1 where that
makes all whole, and otherwise the power of two that brings the row's largest value to about 2^40, and rounded (powers
of two, so that whole numbers lose nothing). Rounding moves a row's value by at most ``Σ |rounded - exact|·max|x| +
Σ_continuous |a|·unit/2``; each row is relaxed by that much, so the integer model contains every point of the exact one
(with continuous values rounded to the grid), and its lower bound, less the same error of the objective, is a lower
bound of the exact model. The point found is completed and checked in float64, so the relaxation costs no accuracy.

Where there is a grid, one step of CP-SAT's presolve, which joins rows with "at most one" constraints, is left out: in
OR-Tools 9.15 it removes optimal points, after which a value up to 0.25 % above the optimum is "proved"
(google/or-tools#5293, open). Of 684 small models of step times, 7 were wrong with it and none without; of 592 models of
whole numbers none was wrong, and there the step makes proofs several times quicker.

The grid is no finer on purpose: with 2^34 steps and rows of 2^56, within CP-SAT's stated limits, CP-SAT 9.15 was seen
to prove a value optimal that is 3 % from the optimum; 2^30 steps and less gave the right answer. The price is that an
optimum far below the range of its variables may be reported as FEASIBLE with a tiny gap instead of OPTIMAL.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.errors import SolverError
from moeplace.frozen import replaced
from moeplace.milp.model import Budget, Claim, Floats, LinearModel, MilpResult, OnIncumbent, judge
from moeplace.solution import StopReason

GRID = 2**24
ROW = 2.0**40
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledRow:
    """``factor·(Σ a·x) = Σ terms·X + constant ± error`` for every point of the exact model."""

    terms: tuple[tuple[int, int], ...]
    constant: float
    factor: float
    error: float


def solve_cpsat(model: LinearModel, budget: Budget, on_incumbent: OnIncumbent | None = None) -> MilpResult:
    """Solve ``model`` with CP-SAT, one worker.

    Parameters
    ----------
    model
        Every continuous variable needs finite bounds (they give its grid). ``model.start`` becomes a hint.
    budget
        ``work`` is CP-SAT's deterministic time, so the answer does not depend on the clock unless ``time_limit_s`` cuts
        it (and then the result says TIME_LIMIT).
    on_incumbent
        Called in the caller's thread with the objective and the lower bound whenever either improves.

    Raises
    ------
    SolverError
        A continuous variable has no finite bounds, or CP-SAT refuses the model.
    """
    from ortools.sat.python import cp_model

    started = time.monotonic()
    grid = units(model)
    target = scaled_row(model, model.costs, grid)
    # fixed costs stay in CP-SAT's objective: its relative gap would mean something else without them
    offset = round(target.constant)
    program, variables = _program(model, grid, target, offset)
    target = replaced(target, constant=target.constant - offset)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = budget.seed % (2**31 - 1)
    solver.parameters.max_deterministic_time = max(1e-3, budget.work)
    time_limit_s = max(1e-3, budget.time_limit_s - (time.monotonic() - started))
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.relative_gap_limit = budget.gap
    solver.parameters.catch_sigint_signal = False
    if not all(model.is_integer):
        solver.parameters.presolve_inclusion_work_limit = 0
    run = _Run(solver, program, target)
    status = run.finish(budget.stop, time_limit_s, on_incumbent)
    if status == cp_model.MODEL_INVALID:
        raise SolverError(f"CP-SAT refuses the model: {program.validate()}")
    point = None
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        whole = np.array([solver.value(variable) for variable in variables], np.float64)
        point = np.asarray(model.lower) + grid * whole
        point[model.is_integer] = whole[model.is_integer]
    complete = status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
    bound = None if status == cp_model.INFEASIBLE else true_bound(target, solver.best_objective_bound)
    return judge(
        model,
        Claim(
            point=point,
            bound=bound,
            infeasible=status == cp_model.INFEASIBLE,
            stop_reason=StopReason.PROVEN if complete else run.stop_reason,
        ),
        budget.gap,
    )


def load_ortools() -> None:
    """Load OR-Tools now, before anything that would keep it from loading later."""
    from ortools.sat.python import cp_model

    del cp_model


def units(model: LinearModel) -> Floats:
    """``[variable]`` grid step: 1 for integers, else the power of two nearest above ``range/2^24``; 0 if fixed."""
    low, high = np.asarray(model.lower), np.asarray(model.upper)
    whole = np.asarray(model.is_integer, bool)
    if not np.isfinite(low).all() or not np.isfinite(high).all():
        name = model.names[int(np.argmin(np.isfinite(high - low)))]
        raise SolverError(f"variable {name} has no finite bounds", rule="CP-SAT needs bounds to lay its grid")
    wide = np.maximum(high - low, 1e-300)
    steps: Floats = np.where(whole, 1.0, np.where(high > low, np.exp2(np.ceil(np.log2(wide / GRID))), 0.0))
    return steps


def scaled_row(model: LinearModel, terms: dict[int, float], grid: Floats) -> ScaledRow:
    """Round ``Σ a·x`` to integers; see the module's text for the error. Complexity: O(terms)."""
    steps = {v: a * float(grid[v]) for v, a in terms.items()}
    reach = {v: max(abs(model.lower[v]), abs(model.upper[v])) if model.is_integer[v] else float(GRID) for v in terms}
    fixed = math.fsum(abs(a * model.lower[v]) for v, a in terms.items() if not model.is_integer[v])
    largest = fixed + math.fsum(abs(step) * reach[v] for v, step in steps.items())
    least = min((abs(step) for step in steps.values() if step), default=1.0)
    factor = next((f for f in (1.0, 1 / least) if f * largest <= ROW and _all_whole(steps.values(), f)), 0.0)
    factor = factor or 2.0 ** math.floor(math.log2(ROW / largest))
    rounded: dict[int, int] = {}
    constant = error = 0.0
    for v, step in steps.items():
        exact = factor * step
        if near := round(exact):
            rounded[v] = near
        error += abs(near - exact) * reach[v]
        if not model.is_integer[v]:
            constant += factor * terms[v] * model.lower[v]
            error += abs(exact) / 2
    shared = math.gcd(*rounded.values()) or 1
    return ScaledRow(
        terms=tuple((v, near // shared) for v, near in rounded.items()),
        constant=constant / shared,
        factor=factor / shared,
        error=error / shared,
    )


def _all_whole(steps: Iterable[float], factor: float) -> bool:
    return all((step * factor).is_integer() for step in steps)


def true_bound(target: ScaledRow, bound: float) -> float | None:
    """Lower bound of the exact objective from CP-SAT's bound on the scaled one."""
    if not math.isfinite(bound):
        return None
    return (bound + target.constant - target.error) / target.factor


def _program(model: LinearModel, grid: Floats, target: ScaledRow, offset: int) -> tuple[Any, list[Any]]:
    from ortools.sat.python import cp_model

    program = cp_model.CpModel()
    variables = [
        program.new_int_var(round(model.lower[i]), round(model.upper[i]), f"x{i}")
        if model.is_integer[i]
        else program.new_int_var(0, math.ceil((model.upper[i] - model.lower[i]) / grid[i]) if grid[i] else 0, f"x{i}")
        for i in range(model.num_variables)
    ]
    linear = cp_model.LinearExpr.weighted_sum
    for terms, lower, upper in model.rows:
        row = scaled_row(model, terms, grid)
        slack = row.error + 1e-9 * (1 + abs(row.constant))
        low = _whole(row.factor * lower - row.constant - slack, math.ceil)
        high = _whole(row.factor * upper - row.constant + slack, math.floor)
        total = linear([variables[v] for v, _ in row.terms], [a for _, a in row.terms])
        program.add_linear_constraint(total, low, high)
    program.minimize(linear([variables[v] for v, _ in target.terms], [a for _, a in target.terms]) + offset)
    if model.start is not None:
        for i, variable in enumerate(variables):
            step = (
                0.0 if grid[i] == 0 else (float(model.start[i]) - model.lower[i] * (not model.is_integer[i])) / grid[i]
            )
            program.add_hint(variable, round(step))
    return program, variables


def _whole(value: float, towards: Any) -> int:
    if math.isinf(value):
        return int(math.copysign(2**62, value))
    return int(towards(value))


class _Run:
    """One solve in a thread of its own, so that the caller can stop it and hear of incumbents in its own thread."""

    def __init__(self, solver: Any, program: Any, target: ScaledRow) -> None:
        self._solver, self._program, self._target = solver, program, target
        self._news: queue.Queue[tuple[float, float]] = queue.Queue()
        self._status: Any = None
        self._error: BaseException | None = None
        self.stop_reason = StopReason.EXHAUSTED

    def finish(self, stop: threading.Event, time_limit_s: float, on_incumbent: OnIncumbent | None) -> Any:
        """Solve, passing on news and a stop; returns CP-SAT's status and sets why a search not complete ended."""
        thread = threading.Thread(target=self._solve, daemon=True)
        started = time.monotonic()
        thread.start()
        best: tuple[float, float | None] = (math.inf, None)
        try:
            while thread.is_alive():
                thread.join(POLL_S)
                best = self._tell(best, on_incumbent)
                if stop.is_set() or time.monotonic() - started > time_limit_s:
                    self._solver.stop_search()
        finally:
            self._solver.stop_search()
            thread.join()
        if stop.is_set():
            self.stop_reason = StopReason.INTERRUPTED
        elif time.monotonic() - started >= 0.98 * time_limit_s:
            self.stop_reason = StopReason.TIME_LIMIT
        self._tell(best, on_incumbent)
        if self._error is not None:
            raise SolverError(f"CP-SAT failed: {self._error}") from self._error
        return self._status

    def _solve(self) -> None:
        from ortools.sat.python import cp_model

        news = self._news
        state = [math.inf, -math.inf]

        class Watch(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]
            def on_solution_callback(self) -> None:
                state[0] = self.objective_value
                state[1] = max(state[1], self.best_objective_bound)
                news.put((state[0], state[1]))

        def on_bound(bound: float) -> None:
            state[1] = max(state[1], bound)
            news.put((state[0], state[1]))

        self._solver.best_bound_callback = on_bound
        try:
            self._status = self._solver.solve(self._program, Watch())
        except BaseException as error:
            self._error = error

    def _tell(self, best: tuple[float, float | None], on_incumbent: OnIncumbent | None) -> tuple[float, float | None]:
        while not self._news.empty():
            scaled, scaled_bound = self._news.get()
            objective = (scaled + self._target.constant) / self._target.factor
            bound = true_bound(self._target, scaled_bound)
            if on_incumbent and math.isfinite(objective) and (objective, bound) != best:
                on_incumbent(objective, bound)
            best = (objective, bound)
        return best
