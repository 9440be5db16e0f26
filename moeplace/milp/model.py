"""A mixed-integer linear model, its budget and its result; and the checks every backend's answer goes through."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplace.solution import Status, StopReason

Floats: TypeAlias = npt.NDArray[np.float64]
Terms: TypeAlias = Iterable[tuple[int, float]]
OnIncumbent: TypeAlias = Callable[[float, float | None], None]

FEASIBILITY = 1e-6
PROOF = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much work one model is worth.

    Attributes
    ----------
    work
        Deterministic effort; 1 is roughly a second of one core. Each backend turns it into a limit that does not depend
        on the clock (CBC: nodes; CP-SAT: deterministic time), so the same work gives the same answer on a busy machine.
    time_limit_s
        Safety stop by the wall clock.
    gap
        Stop once ``(objective - bound)/objective`` is at most this.
    seed
        Random seed.
    stop
        Set to stop soon and keep the best solution found.
    """

    work: float = 10.0
    time_limit_s: float = 300.0
    gap: float = 0.0
    seed: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class MilpResult:
    """What a backend found, after checking.

    Attributes
    ----------
    values
        ``[variable]`` a feasible point, integers exact; None where none was found.
    objective
        Its objective, computed again in float64; None without values.
    bound
        Lower bound on the objective over all feasible points; None where none is known.
    status, stop_reason
        OPTIMAL means proven to a relative 1e-6; INFEASIBLE is only said when proven.
    """

    values: Floats | None
    objective: float | None
    bound: float | None
    status: Status
    stop_reason: StopReason


Backend: TypeAlias = Callable[["LinearModel", Budget, OnIncumbent | None], MilpResult]


class LinearModel:
    """Minimise ``c·x`` subject to ``lower ≤ A·x ≤ upper``, bounds on ``x``, and integrality of some ``x``.

    Variables are numbered from 0 in the order they are made; rows and the objective are lists of
    ``(variable, coefficient)``, in which a variable may stand more than once.

    Examples
    --------
    >>> model = LinearModel()
    >>> take = [model.binary(f"take{i}") for i in range(3)]
    >>> model.add([(i, 1.0) for i in take], lower=2)
    >>> model.minimise(zip(take, [5.0, 1.0, 2.0]))
    >>> model.violation([0, 1, 1]), model.objective_of([0, 1, 1])
    (0.0, 3.0)
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.is_integer: list[bool] = []
        self.implied: set[int] = set()
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.costs: dict[int, float] = {}
        self.start: Floats | None = None

    @property
    def num_variables(self) -> int:
        """Number of variables."""
        return len(self.names)

    @property
    def num_terms(self) -> int:
        """Number of non-zero coefficients in the rows."""
        return sum(len(terms) for terms, _, _ in self.rows)

    def binary(self, name: str) -> int:
        """Add a 0/1 variable and return its number."""
        return self._variable(name, 0.0, 1.0, True)

    def integer(self, name: str, lower: float, upper: float, *, implied: bool = False) -> int:
        """Add an integer variable and return its number.

        ``implied`` says that it is whole at some optimum once the other integers are fixed, so that a solver of mixed
        programmes may treat it as continuous and never branch on it.
        """
        variable = self._variable(name, lower, upper, True)
        if implied:
            self.implied.add(variable)
        return variable

    def continuous(self, name: str, lower: float = 0.0, upper: float = math.inf) -> int:
        """Add a continuous variable and return its number."""
        return self._variable(name, lower, upper, False)

    def _variable(self, name: str, lower: float, upper: float, is_integer: bool) -> int:
        self.names.append(name)
        self.lower.append(float(lower))
        self.upper.append(float(upper))
        self.is_integer.append(is_integer)
        return len(self.names) - 1

    def add(self, terms: Terms, lower: float = -math.inf, upper: float = math.inf) -> None:
        """Add the row ``lower ≤ Σ coefficient·variable ≤ upper``."""
        self.rows.append((_collect(terms), float(lower), float(upper)))

    def minimise(self, terms: Terms) -> None:
        """Set the objective."""
        self.costs = _collect(terms)

    def begin_at(self, values: Mapping[int, float] | npt.ArrayLike) -> None:
        """Give a starting point: a value per variable, those not named being 0. Ignored where it is not feasible."""
        if isinstance(values, Mapping):
            point = np.zeros(self.num_variables)
            for variable, value in values.items():
                point[variable] = value
        else:
            point = np.array(values, np.float64)
        self.start = point if self.violation(point) <= FEASIBILITY else None

    def objective_of(self, values: npt.ArrayLike) -> float:
        """``c·x`` in float64, summed in the order of the variables."""
        point = np.asarray(values, np.float64)
        return math.fsum(cost * float(point[variable]) for variable, cost in self.costs.items())

    def violation(self, values: npt.ArrayLike) -> float:
        """Largest violation of a bound, of integrality or of a row; 0 for a feasible point.

        A row's excess is divided by ``max(1, Σ|a_j·x_j|)``, the scale of its rounding errors. Complexity: O(terms).
        """
        point = np.asarray(values, np.float64)
        if point.shape != (self.num_variables,) or not np.isfinite(point).all():
            return math.inf
        worst = max([0.0, *(np.asarray(self.lower) - point).tolist(), *(point - np.asarray(self.upper)).tolist()])
        whole = np.asarray(self.is_integer, bool)
        worst = max([worst, *np.abs(point - np.rint(point))[whole].tolist()])
        for terms, lower, upper in self.rows:
            parts = [coefficient * float(point[variable]) for variable, coefficient in terms.items()]
            total = math.fsum(parts)
            scale = max(1.0, math.fsum(abs(part) for part in parts))
            worst = max(worst, (lower - total) / scale, (total - upper) / scale)
        return worst


def _collect(terms: Terms) -> dict[int, float]:
    total: dict[int, float] = {}
    for variable, coefficient in terms:
        total[variable] = total.get(variable, 0.0) + float(coefficient)
    return {variable: total[variable] for variable in sorted(total) if total[variable] != 0.0}


def checked_point(model: LinearModel, raw: npt.ArrayLike) -> Floats | None:
    """Turn a solver's point into an exact feasible one, or None.

    Integers are rounded and fixed; the continuous variables are chosen anew by a small linear programme (a solver
    prints few digits, and an integer solver has only a grid of them); the result is checked against the model.
    """
    point = np.asarray(raw, np.float64).copy()
    if not np.isfinite(point).all():
        return None
    whole = np.asarray(model.is_integer, bool)
    point[whole] = np.rint(point[whole])
    if not whole.all():
        completed = _complete(model, point, whole)
        point = point if completed is None else completed
    return point if model.violation(point) <= FEASIBILITY else None


def _complete(model: LinearModel, point: Floats, whole: npt.NDArray[np.bool_]) -> Floats | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    free = np.flatnonzero(~whole)
    column = {int(variable): i for i, variable in enumerate(free)}
    entries: list[tuple[int, int, float]] = []
    lows: list[float] = []
    highs: list[float] = []
    for terms, lower, upper in model.rows:
        if column.keys().isdisjoint(terms):
            continue
        fixed = math.fsum(value * float(point[v]) for v, value in terms.items() if v not in column)
        entries += [(len(lows), column[v], value) for v, value in terms.items() if v in column]
        lows.append(lower - fixed)
        highs.append(upper - fixed)
    rows: Any = ()
    if entries:
        at_row, at_column, values = (np.array(part) for part in zip(*entries, strict=True))
        rows = LinearConstraint(csr_array((values, (at_row, at_column)), shape=(len(lows), len(free))), lows, highs)
    costs = np.array([model.costs.get(int(v), 0.0) for v in free])
    limits = Bounds(np.asarray(model.lower)[free], np.asarray(model.upper)[free])
    answer = milp(costs, constraints=rows, bounds=limits)
    if answer.x is None:
        return None
    completed = point.copy()
    completed[free] = answer.x
    return completed


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a backend says: its point, its lower bound, whether it says the model is infeasible, and why it stopped.

    ``stop_reason`` PROVEN means it says its search is complete.
    """

    point: npt.ArrayLike | None
    bound: float | None
    infeasible: bool
    stop_reason: StopReason


def judge(model: LinearModel, claim: Claim, gap: float = 0.0) -> MilpResult:
    """Check a claim and state what holds.

    The better of the solver's point and the model's start is kept, so a solver that was stopped early never loses the
    start. OPTIMAL is said when the bound meets the recomputed objective to a relative 1e-6.
    """
    found = None if claim.point is None else checked_point(model, claim.point)
    candidates = [point for point in (found, model.start) if point is not None]
    if not candidates:
        reason = claim.stop_reason
        if not claim.infeasible and reason is StopReason.PROVEN:
            reason = StopReason.EXHAUSTED  # it says it is done, but its point does not satisfy the model
        status = Status.INFEASIBLE if claim.infeasible else Status.UNKNOWN
        return MilpResult(values=None, objective=None, bound=claim.bound, status=status, stop_reason=reason)
    best = min(candidates, key=model.objective_of)
    objective = model.objective_of(best)
    bound = None if claim.infeasible else claim.bound
    if bound is not None:
        bound = min(bound, objective)
    reason = claim.stop_reason
    tolerance = PROOF * max(abs(objective), 1e-9)
    if bound is not None and objective - bound <= tolerance:
        status, reason = Status.OPTIMAL, StopReason.PROVEN
    else:
        status = Status.FEASIBLE
        within = bound is not None and objective - bound <= gap * abs(objective) + tolerance
        if reason is StopReason.PROVEN:
            reason = StopReason.GAP if within else StopReason.EXHAUSTED
    return MilpResult(values=best, objective=objective, bound=bound, status=status, stop_reason=reason)
