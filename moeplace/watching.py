"""A deployed placement watched as its trace grows: a new one is proposed when what it saves repays the move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moeplace.build import Choices, build_problem
from moeplace.errors import InputError
from moeplace.moving import arriving_copies, move_us
from moeplace.objective import objective_value
from moeplace.problem import STEP_TIME, Problem
from moeplace.solution import Limits, Report, Solution
from moeplace.solvers import solve
from moeplace.split import parse_split, select
from moeplace.trace import Counts, TraceStream

HELD_OUT = "half:0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A placement that could replace the one deployed, and whether it should.

    Attributes
    ----------
    problem, solution
        What was solved, on half of the requests.
    now_us, then_us
        Predicted time of a step on the other half, of the placement deployed and of the new one.
    moved_copies, total_copies
        Copies to load, of so many.
    move_us
        Time of loading, all GPUs at once.
    horizon_steps
        Steps in which that has to be saved.
    """

    problem: Problem
    solution: Solution
    now_us: float
    then_us: float
    moved_copies: int
    total_copies: int
    move_us: float
    horizon_steps: int

    @property
    def gain_us(self) -> float:
        """µs saved in a step."""
        return self.now_us - self.then_us

    @property
    def repays(self) -> bool:
        """Whether the move is repaid within the horizon."""
        return self.moved_copies > 0 and self.gain_us > 0 and self.gain_us * self.horizon_steps >= self.move_us

    def __str__(self) -> str:
        step = f"a step takes {self.now_us:,.1f} µs as deployed, on requests not fitted to"
        if not self.moved_copies:
            return f"{step}; nothing better was found: stay"
        moved = f"moving {self.moved_copies:,} of {self.total_copies:,} copies takes {self.move_us / 1e3:,.1f} ms"
        if self.gain_us <= 0:
            return f"{step}, {self.then_us:,.1f} µs after {moved}: stay"
        steps = self.move_us / self.gain_us
        told = f"{step}, {self.then_us:,.1f} µs after a move; {moved}, repaid after {steps:,.0f} steps"
        within = "within" if self.repays else "beyond"
        return f"{told}, {within} the horizon of {self.horizon_steps:,}: {'move' if self.repays else 'stay'}"

    def to_dict(self) -> dict[str, Any]:
        """Return a ``moeplace/proposal/1`` document."""
        return {
            "schema": "moeplace/proposal/1",
            "move": self.repays,
            "now_us": self.now_us,
            "then_us": self.then_us,
            "moved_copies": self.moved_copies,
            "total_copies": self.total_copies,
            "move_us": self.move_us,
            "horizon_steps": self.horizon_steps,
            "trace_digest": self.problem.stats.trace_digest,
        }


def propose(
    source: TraceStream | Counts, choices: Choices, solver: str, limits: Limits, report: Report | None = None
) -> Proposal:
    """Solve on half of a trace's requests, from the placement deployed, and judge the answer on the other half.

    Parameters
    ----------
    source
        The trace as it is now.
    choices
        With a baseline and a horizon; the objective is step time.
    solver, limits, report
        As for :func:`~moeplace.solvers.solve`.

    Raises
    ------
    InputError
        There is no baseline or horizon, or the objective is another; or the trace has one request only.
    """
    if choices.baseline is None or choices.horizon_steps is None or choices.objective != STEP_TIME:
        raise InputError(
            "a watch without baseline, horizon or step time",
            rule="what is saved of a step's time is weighed against the time of moving",
            hint="--baseline FILE --horizon-steps 100000",
        )
    split = parse_split(HELD_OUT)
    fit, test = (select(source, split=split, part=part) for part in ("fit", "test"))
    problem = build_problem(fit, choices)
    answer = solve(problem, solver, limits, report)
    judged = build_problem(test, replace(choices, max_moves=None, max_moved_bytes=None, horizon_steps=None))
    base = choices.baseline
    new = answer.placement or base
    arriving = arriving_copies(base.copies(), new.copies())
    return Proposal(
        problem=problem,
        solution=answer.replace(placement=new),
        now_us=objective_value(judged, base),
        then_us=objective_value(judged, new),
        moved_copies=int(arriving.sum()),
        total_copies=int(base.used_slots().sum()),
        move_us=move_us(problem.topology, problem.model.expert_weight_bytes, arriving),
        horizon_steps=choices.horizon_steps,
    )


def watch(look: Callable[[], bool], wait: Callable[[], bool], *, rounds: int | None = None) -> int:
    """Look, wait, and look again, until waiting is ended or so many rounds are done; return the rounds.

    ``look`` returns whether there was anything to look at, ``wait`` whether to end.
    """
    done = 0
    while rounds is None or done < rounds:
        done += look()
        if (rounds is None or done < rounds) and wait():
            break
    return done
