"""Trials: one solver on one topology, fitted on one part of a trace and judged on the other, with one seed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from moeplace.affinity import RoutingStats, count_routing
from moeplace.build import Choices, assumptions, build_problem, preset_for
from moeplace.contest import score_sentences
from moeplace.errors import InfeasibleError, InputError, NothingFoundError, PlacementError, ProblemError, SolverError
from moeplace.frozen import Floats, replaced, seal
from moeplace.model import load_model
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.readers import open_trace
from moeplace.routing import EVEN, Router
from moeplace.scoring import Score, score
from moeplace.solution import Limits, Solution
from moeplace.solvers import AUTO, load_solver, solve
from moeplace.solvers.linear import contiguous
from moeplace.split import parse_split, select
from moeplace.spool import Spooled
from moeplace.suites import Method
from moeplace.trace import Counts, TraceStream

HALF = "half"
STEP_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """A trace by its path, and how it is read: a small value that can be sent to where it is read."""

    path: str
    input_format: str | None = None
    skip_bad: int | None = None
    model: str | None = None

    def open(self) -> TraceStream | Counts:
        """Open it."""
        model = None if self.model is None else load_model(self.model)
        return open_trace(self.path, model=model, format=self.input_format, skip_bad=self.skip_bad)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is tried.

    Attributes
    ----------
    trace
        Label of the trace.
    topology, solver
        As :func:`~moeplace.topology.load_topology` and :meth:`~moeplace.suites.Method.of` take them.
    seed
        Of the split, the solver and the steps that are drawn.
    """

    trace: str
    topology: str
    solver: str
    seed: int

    def __str__(self) -> str:
        return f"{self.solver} on {self.topology}, {self.trace}, seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all trials have in common.

    Attributes
    ----------
    choices
        The problem, but for its topology.
    split
        ``half`` is another half for every seed; or a split that is the same for all.
    limits
        Fields of :class:`~moeplace.solution.Limits`, but for the seed.
    scoring
        Options of :func:`~moeplace.scoring.score`, but for the seed.
    threads
        Threads of one trial.
    """

    choices: Choices = field(default_factory=Choices)
    split: str = HALF
    limits: Mapping[str, Any] = field(default_factory=dict)
    scoring: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1

    def split_of(self, trial: Trial) -> str:
        """Return the split of a trial."""
        return f"{HALF}:{trial.seed}" if self.split == HALF else self.split


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """Step times of a trial in one phase, and what is left of imbalance.

    Attributes
    ----------
    phase
        Of the steps.
    step_us
        ``[step]`` times.
    max_over_mean, excess
        Load max/mean on the whole test part, mean over layers; max/mean of steps above their noise floor.
    """

    phase: str
    step_us: Floats
    max_over_mean: float
    excess: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a trial: step times and what the solver said, or why there is none.

    Attributes
    ----------
    trial
        What was tried.
    times
        Per phase.
    objective, unit, gap, status, stop_reason, solve_s
        Of the answer; ``solve_s`` is wall time.
    failure
        Why there is no answer; None where there is one.
    notes
        What was assumed.
    facts
        Numbers on the test part and the placement: ``load_std`` (of GPU load over its mean, mean over layers), traffic
        in natural units, ``extra_copies`` (and ``extra_gb`` where the model is known), ``moves`` from the baseline, or
        from the contiguous placement where there is none.
    """

    trial: Trial
    times: tuple[PhaseTimes, ...] = ()
    objective: float | None = None
    unit: str = ""
    gap: float | None = None
    status: str = ""
    stop_reason: str = ""
    solve_s: float = 0.0
    failure: str | None = None
    notes: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seal(self, notes=tuple(self.notes))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values, for :meth:`of_dict`."""
        own = {name: getattr(self, name) for name in self.__slots__ if name not in ("trial", "times")}
        own["trial"] = {name: getattr(self.trial, name) for name in self.trial.__slots__}
        own["times"] = [
            {name: getattr(entry, name) for name in entry.__slots__}
            | {"step_us": [round(time_us, STEP_DIGITS) for time_us in entry.step_us.tolist()]}
            for entry in self.times
        ]
        return own

    @classmethod
    def of_dict(cls, document: Mapping[str, Any]) -> Outcome:
        """Take what :meth:`to_dict` returned; anything else raises KeyError, TypeError or ValueError."""
        own = dict(document)
        times = tuple(
            PhaseTimes(**{**entry, "step_us": np.array(entry["step_us"], np.float64)}) for entry in own.pop("times")
        )
        return cls(**{**own, "trial": Trial(**own["trial"]), "times": times})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """The two parts of a trace, each counted once for all trials on them."""

    fit: TraceStream | Counts
    test: TraceStream | Counts
    fit_stats: RoutingStats
    test_stats: RoutingStats

    @classmethod
    def of(cls, source: TraceStream | Counts, split: str, *, phase: str | None = None, threads: int = 1) -> Sides:
        """Split and count a trace, of one phase or both."""
        rule = parse_split(split)
        fit = select(source, split=rule, part="fit", phase=phase)
        test = select(source, split=rule, part="test", phase=phase)
        counted = [count_routing(side, threads=threads) for side in (fit, test)]
        return cls(fit=fit, test=test, fit_stats=counted[0], test_stats=counted[1])


def run_trial(sides: Sides, trial: Trial, setup: Setup, stop: threading.Event | None = None) -> Outcome:
    """Solve on one part and score on the other.

    A solver that finds nothing, or a problem that cannot be, is an outcome; anything else that goes wrong is raised.
    """
    method = Method.of(trial.solver)
    limits = Limits(**{**setup.limits, "seed": trial.seed, "threads": setup.threads, "stop": stop or threading.Event()})
    limits = limits.replace(options=method.options)
    routed = {} if method.routing is None else {"routing": method.routing}
    choices = replaced(setup.choices, topology=trial.topology, **method.goals, **routed)
    started = time.monotonic()
    try:
        problem = build_problem(sides.fit, choices, threads=setup.threads, stats=sides.fit_stats)
        solution = _solved(problem, method, limits)
        if solution.placement is None:
            raise NothingFoundError("; ".join(solution.notes) or f"{trial.solver} found no placement")
    except (ProblemError, PlacementError, SolverError, InfeasibleError, NothingFoundError) as error:
        return Outcome(trial=trial, failure=str(error).splitlines()[0], solve_s=time.monotonic() - started)
    solve_s = time.monotonic() - started
    scoring = {**setup.scoring, **routed}
    scores = score(
        sides.test,
        {trial.solver: solution.placement},
        problem.topology,
        problem.model,
        stats=sides.test_stats,
        profile=sides.fit_stats.load,
        profile_tokens=None if sides.fit_stats.sample is None else sides.fit_stats.sample.experts,
        seed=trial.seed,
        threads=setup.threads,
        **scoring,
    )
    times = tuple(
        PhaseTimes(
            phase=entry.law.phase,
            step_us=entry.simulation.step_us,
            max_over_mean=float(entry.max_over_mean.mean()),
            excess=entry.excess,
        )
        for entry in scores
    )
    notes = (*assumptions(problem, choices), *score_sentences(scores, sides.test, choices))
    facts = _facts(problem, solution.placement, scores, (sides, scoring.get("routing") or EVEN, choices))
    return Outcome(trial=trial, times=times, solve_s=solve_s, notes=notes, facts=facts, **_answer(solution))


def _solved(problem: Problem, method: Method, limits: Limits) -> Solution:
    try:
        return solve(problem, method.solver, limits)
    except InputError as error:  # no such solver or option here: for this method there is no answer
        raise SolverError(str(error).splitlines()[0]) from error


def _facts(
    problem: Problem, placement: Placement, scores: Sequence[Score], place: tuple[Sides, str, Choices]
) -> dict[str, float]:
    sides, routing, choices = place
    sample = sides.fit_stats.sample
    tokens = None if sample is None else sample.experts
    router = Router.of(placement, problem.topology, routing, sides.fit_stats.load, tokens)
    load = np.einsum("lge,le->lg", router.gpu_share(problem.num_gpus), sides.test_stats.load.astype(np.float64))
    base = problem.baseline or contiguous(problem.slots_per_gpu, problem.num_layers, problem.num_experts)
    extra = float(placement.copies().sum() - problem.num_layers * problem.num_experts)
    facts = {
        "load_std": float((load.std(axis=1) / load.mean(axis=1)).mean()),
        "extra_copies": extra,
        "moves": float(np.maximum(placement.copies() - base.copies(), 0).sum()),
    }
    if choices.model is not None or preset_for(sides.test.meta, sides.test.meta.model_id) is not None:
        facts["extra_gb"] = extra * problem.model.expert_weight_bytes / 1e9
    traffic = scores[0].traffic
    told = {name: getattr(traffic, name) for name in traffic.__slots__}
    return facts | {name: float(value) for name, value in told.items() if value is not None}


def _answer(solution: Solution) -> dict[str, Any]:
    return {
        "objective": solution.objective,
        "unit": solution.unit,
        "gap": solution.gap,
        "status": str(solution.status),
        "stop_reason": str(solution.stop_reason),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialItem:
    """A trial with all that is needed to run it elsewhere."""

    trial: Trial
    source: TraceFile | Spooled
    setup: Setup


def run_item(item: TrialItem) -> Outcome:
    """Run a trial; trials on the same part of the same trace that follow one another read and count it once."""
    phase = item.setup.choices.phase
    of_tokens = phase if phase != "mixed" else None
    split, threads = item.setup.split_of(item.trial), item.setup.threads
    sides = _sides(item.source, split, of_tokens, threads)
    own = fitted_on(Method.of(item.trial.solver).solver)
    if own is None or own == phase or isinstance(opened(item.source), Counts):
        return run_trial(sides, item.trial, item.setup)
    fit = select(opened(item.source), split=parse_split(split), part="fit", phase=own)
    return run_trial(replace(sides, fit_stats=count_routing(fit, threads=threads)), item.trial, item.setup)


def fitted_on(solver: str) -> str | None:
    """Phase by whose tokens a method places, whatever it is judged on; None: by those of the comparison."""
    if solver == AUTO:
        return None
    try:
        named: str | None = getattr(load_solver(solver.split("+")[0]), "FITTED_ON", None)
    except (InputError, ImportError):  # told where it is run
        return None
    return named


def opened(source: TraceFile | Spooled) -> TraceStream | Counts:
    """Open a trace, once for trials that follow one another in a thread: a stream has one reader at a time."""
    return _opened(source, threading.get_ident())


@lru_cache(maxsize=2)
def _opened(source: TraceFile | Spooled, thread: int) -> TraceStream | Counts:
    return source.open() if isinstance(source, TraceFile) else source


def _sides(source: TraceFile | Spooled, split: str, phase: str | None, threads: int) -> Sides:
    return _sides_of(source, split, phase, threads, threading.get_ident())


@lru_cache(maxsize=1)
def _sides_of(source: TraceFile | Spooled, split: str, phase: str | None, threads: int, thread: int) -> Sides:
    return Sides.of(opened(source), split, phase=phase, threads=threads)
