"""Solutions: what a solver found, how good it is, why it stopped, and the native placement file."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeplace.errors import InputError
from moeplace.frozen import replaced, seal
from moeplace.objective import UNITS, Term, objective_value
from moeplace.placement import Placement
from moeplace.problem import Problem


class Status(enum.StrEnum):
    """What is known about an answer."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


class StopReason(enum.StrEnum):
    """Why a solver stopped: proven, gap reached, out of time, interrupted, or at the end of its work budget."""

    PROVEN = "proven"
    GAP = "gap"
    TIME_LIMIT = "time limit"
    INTERRUPTED = "interrupted"
    EXHAUSTED = "exhausted"


def relative_gap(objective: float, bound: float | None) -> float | None:
    """``(objective - bound)/objective``: 0 when both are 0, None without a bound."""
    if bound is None:
        return None
    if objective <= 0:
        return 0.0
    return max(0.0, (objective - bound) / objective)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incumbent:
    """One improvement: when [s], where it came from, objective and bound, and numbers worth showing beside them."""

    seconds: float
    source: str
    objective: float
    bound: float | None = None
    unit: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float | None:
        """Relative gap to the bound."""
        return relative_gap(self.objective, self.bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A sub-problem a method solves with an objective of its own (MoETuner's two integer programmes)."""

    name: str
    objective: float
    bound: float | None
    unit: str
    status: Status
    stop_reason: StopReason

    @property
    def gap(self) -> float | None:
        """Relative gap of the stage's own objective."""
        return relative_gap(self.objective, self.bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A solver's answer.

    Attributes
    ----------
    placement
        The answer, or None where there is none.
    objective, unit, bound
        Value of the problem's objective, its unit, and a certified lower bound on it (None where none is known).
    status, stop_reason
        What is known, and why the solver stopped.
    solver, seed
        Who answered.
    terms
        The parts of the cost.
    stages
        Sub-problems with objectives of their own.
    history
        Improvements in order.
    notes
        Sentences the user should read.
    """

    placement: Placement | None
    objective: float
    unit: str
    status: Status
    stop_reason: StopReason
    solver: str
    bound: float | None = None
    seed: int = 0
    terms: Mapping[str, Term] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    history: tuple[Incumbent, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seal(self, stages=tuple(self.stages), history=tuple(self.history), notes=tuple(self.notes))

    @property
    def gap(self) -> float | None:
        """``(objective - bound)/objective``; None without a bound."""
        return relative_gap(self.objective, self.bound)

    def replace(self, **changes: object) -> Solution:
        """Copy with some fields changed."""
        return replaced(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much work a solver may do.

    Attributes
    ----------
    time_limit_s
        A safety stop by the wall clock; a run cut by it may differ from run to run, and says so.
    gap
        Stop once the relative gap is at most this.
    work
        Scale of the deterministic work budget each solver derives from the instance (1 = default).
    seed, threads
        Random seed; threads, which never change the result.
    options
        Options of the chosen solver, by name.
    stop
        Set to make a solver return its best answer soon (Ctrl-C sets it).
    """

    time_limit_s: float = 300.0
    gap: float = 0.0
    work: float = 1.0
    seed: int = 0
    threads: int = 1
    options: Mapping[str, str] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def whole(self, name: str, usual: int, least: int = 0) -> int:
        """Return a solver's option as a whole number of at least ``least``, or what is usual where it is not given.

        Raises
        ------
        InputError
            It is something else.
        """
        text = self.options.get(name)
        if text is None:
            return usual
        if not text.isdecimal() or int(text) < least:
            raise InputError(f"{name} {text!r}", rule="a whole number" + (f" of at least {least}" if least else ""))
        return int(text)

    def replace(self, **changes: object) -> Limits:
        """Copy with some fields changed."""
        return replaced(self, **changes)


def found(
    problem: Problem,
    placement: Placement,
    limits: Limits,
    report: Report,
    *,
    solver: str,
    notes: tuple[str, ...] = (),
    clock: Clock | None = None,
) -> Solution:
    """Return the answer of a method that proves nothing; it was cut short where its ``clock`` is over."""
    return Solution(
        placement=placement,
        objective=objective_value(problem, placement),
        unit=UNITS[problem.objective],
        status=Status.FEASIBLE,
        stop_reason=clock.stop_reason() if clock is not None and clock.over else StopReason.EXHAUSTED,
        solver=solver,
        seed=limits.seed,
        history=tuple(report.history),
        notes=notes,
    )


class Report:
    """Where a solver tells how it is doing. This one keeps the history and says nothing; the command line prints."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.history: list[Incumbent] = []

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def stage(self, name: str, detail: str = "") -> None:
        """Announce a new stage of the method."""

    def progress(self, done: float, total: float, what: str) -> None:
        """Tell how far the current stage is."""

    def improved(self, source: str, objective: float, **details: Any) -> None:
        """Record an improvement: ``bound``, ``unit`` and ``figures`` as in :class:`Incumbent`."""
        self.history.append(Incumbent(seconds=self.seconds, source=source, objective=objective, **details))


class Clock:
    """Time left under some limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started

    @property
    def left_s(self) -> float:
        """Time left, at least 0."""
        return max(0.0, self._limits.time_limit_s - self.seconds)

    @property
    def interrupted(self) -> bool:
        """Whether the user asked to stop."""
        return self._limits.stop.is_set()

    @property
    def over(self) -> bool:
        """Whether to stop now, for either reason."""
        return self.interrupted or self.left_s <= 0

    def stop_reason(self) -> StopReason:
        """Why it is over."""
        return StopReason.INTERRUPTED if self.interrupted else StopReason.TIME_LIMIT
