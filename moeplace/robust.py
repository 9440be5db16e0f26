"""Placements for traffic that may change: judged on what was left out, worst case over a set of traces or domains.

A sample average fits the steps it saw, and loses on others: that of five domains may be worse on a sixth than plain
balance. What it fits most are the few experts that a step loads far above all others, and those are others elsewhere;
square roots of the loads, which weigh them less, are one method more to be tried. Here each scenario (a trace, or a
domain of one) is left out in turn, every method answers for the others and is judged on it, and the method whose worst
relative value is least answers for all. The worst is taken over the set, or over mixtures within a ball around equal
weights in total variation (distributionally robust optimisation; Ben-Tal et al., Management Science 59, 2013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeplace.batches import Steps, TokenIndex, expert_rows
from moeplace.bounds import objective_bound
from moeplace.build import Choices, build_problem
from moeplace.errors import InputError
from moeplace.frozen import Floats
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value
from moeplace.placement import Placement
from moeplace.problem import LOAD, STEP_TIME, Problem
from moeplace.scoring import draw_steps
from moeplace.solution import Limits, Report, Solution, Status
from moeplace.solvers import finish, load_solver, solve
from moeplace.split import select_tokens
from moeplace.trace import Counts, TraceStream, concatenate

STEPS = 300  # drawn from each scenario
BASE = "eplb"
OWN_WORK = 0.5
ROOTED = 1 << 20  # selections of a layer and step, where they are square roots


@dataclass(frozen=True, slots=True)
class Method:
    """A way to answer.

    Attributes
    ----------
    solver
        Its name.
    slack
        How far above the best balance of the mean load it may let a GPU go; None for no such cap.
    roots
        Whether it is shown square roots of the loads (:func:`rooted`).
    """

    solver: str
    slack: float | None = None
    roots: bool = False

    def __str__(self) -> str:
        parts = [self.solver] if self.slack is None else [self.solver, f"load {self.slack:+.1%}"]
        return ", ".join([*parts, "square roots"] if self.roots else parts)


METHODS = (Method(BASE), Method("balance"), Method("saa", 0.01), Method("saa", roots=True), Method("saa"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrets:
    """What was found out about each scenario.

    Attributes
    ----------
    names
        Scenarios.
    left_out
        ``{method: [scenario]}`` value on a scenario left out, over that of EPLB fitted to the same others.
    value, own, base
        ``[scenario]`` value of the answer, of the scenario's own optimum as found, and of EPLB's placement for all.
    chosen
        The method that answered.
    """

    names: tuple[str, ...]
    left_out: Mapping[str, Floats]
    value: Floats
    own: Floats
    base: Floats
    chosen: str

    def rows(self) -> list[tuple[str, float, float, float, float]]:
        """Scenario, value, regret against its own optimum, against EPLB, and what the method had when left out."""
        left = self.left_out[self.chosen]
        return [
            (name, float(v), float(v / o - 1), float(v / b - 1), float(x - 1))
            for name, v, o, b, x in zip(self.names, self.value, self.own, self.base, left, strict=True)
        ]

    def sentences(self) -> tuple[str, ...]:
        """The table in words, one line a scenario."""
        worst = {name: f"{float(ratio.max()) - 1:+.1%}" for name, ratio in self.left_out.items()}
        head = ", ".join(f"{name} {value}" for name, value in worst.items())
        lines = [
            f"{name}: {value:,.4f}, {regret:+.2%} against its own optimum, {base:+.2%} against {BASE}; left out "
            f"{left:+.2%}"
            for name, value, regret, base, left in self.rows()
        ]
        return (f"worst on a scenario left out, against {BASE}: {head}; chosen: {self.chosen}", *lines)


def scenarios_of(sources: Mapping[str, TraceStream | Counts]) -> dict[str, TraceStream | Counts]:
    """Return the traces themselves, or the domains of a single one.

    Raises
    ------
    InputError
        There are fewer than two, or counts and tokens together.
    """
    found = dict(sources)
    if len(sources) == 1:
        (source,) = sources.values()
        found = {}
        for number, name in enumerate(source.meta.domains):
            part = _domain(source, number)
            if part is not None:
                found[name] = part
    if len(found) < 2:
        raise InputError(
            f"{len(found)} scenarios", rule="a robust placement is for at least two",
            hint="name several traces, or one that records domains",
        )  # fmt: skip
    if len({isinstance(source, Counts) for source in found.values()}) > 1:
        raise InputError("counts and tokens together", rule="scenarios are all of one kind")
    return found


def _domain(source: TraceStream | Counts, number: int) -> TraceStream | Counts | None:
    if isinstance(source, Counts):
        steps = np.flatnonzero(source.domain == number) if source.domain is not None else np.zeros(0, np.int64)
        return source.take(steps) if len(steps) else None
    parts = [
        block.take(np.flatnonzero(block.domain == number))
        for block in source.blocks()
        if block.domain is not None and (block.domain == number).any()
    ]
    return concatenate(parts, source.meta) if parts else None


def union(parts: Sequence[TraceStream | Counts]) -> TraceStream | Counts:
    """Join scenarios into one trace, requests kept apart."""
    meta = parts[0].meta.replace(domains=())
    if isinstance(parts[0], Counts):
        counts = [part.counts for part in parts if isinstance(part, Counts)]
        return Counts(meta=meta, counts=np.concatenate(counts))
    blocks, first = [], 0
    for part in parts:
        assert not isinstance(part, Counts)
        whole = concatenate(list(select_tokens(part).blocks()), part.meta)
        blocks.append(whole.replace(meta=meta, request=whole.request + first, domain=None))
        first += int(whole.request.max()) + 1
    return concatenate(blocks, meta)


def solve_robust(
    sources: Mapping[str, TraceStream | Counts],
    choices: Choices,
    limits: Limits,
    report: Report | None = None,
    *,
    radius: float = 1.0,
) -> tuple[Problem, Solution, Regrets]:
    """Answer for all scenarios by the method that does best on those left out.

    Parameters
    ----------
    sources
        Traces by name, or one with domains.
    choices
        What is fixed; the objective is load or step time.
    limits, report
        As for :func:`~moeplace.solvers.solve`.
    radius
        Most total variation between the mixture that may come and equal weights: 1 is the worst scenario alone, 0 the
        mean of all.

    Returns
    -------
    tuple
        The problem of all scenarios, its solution, and what was found out. Complexity: scenarios · methods solves.

    Raises
    ------
    InputError
        Another objective, too few scenarios, or a radius outside 0 to 1.
    """
    if choices.objective not in (LOAD, STEP_TIME) or not 0 <= radius <= 1:
        what = f"radius {radius:g}" if choices.objective in (LOAD, STEP_TIME) else f"objective {choices.objective}"
        raise InputError(f"a robust placement with {what}", rule="load or step time, radius 0 to 1")
    report = report or Report()
    scenarios = scenarios_of(sources)
    names = list(scenarios)
    problems = {name: sampled_problem(scenarios[name], choices) for name in names}
    methods = [method for method in METHODS if not method.roots or _rootable(choices)]
    ratios: dict[str, list[float]] = {str(method): [] for method in methods}
    for number, name in enumerate(names):
        report.progress(number, len(names), f"without {name}")
        others = sampled_problem(union([scenarios[other] for other in names if other != name]), choices)
        answers = {str(method): _answer(others, method, limits) for method in methods}
        base = objective_value(problems[name], answers[BASE])
        for method, placement in answers.items():
            ratios[method].append(objective_value(problems[name], placement) / base)
    left_out = {method: np.array(values) for method, values in ratios.items()}
    chosen = min(methods, key=lambda method: worst_mixture(left_out[str(method)], radius))
    whole = sampled_problem(union([scenarios[name] for name in names]), choices)
    solution = _run(whole, chosen, limits, report)
    found, plain = solution.placement, _answer(whole, METHODS[0], limits)
    assert found is not None  # as it answered with less
    own = {name: _answer(problems[name], METHODS[-1], limits.replace(work=limits.work * OWN_WORK)) for name in names}
    value = {name: objective_value(problems[name], found) for name in names}
    regrets = Regrets(
        names=tuple(names),
        left_out=left_out,
        value=np.array([value[name] for name in names]),
        # the answer itself may be better on a scenario than what its own search found
        own=np.array([min(value[name], objective_value(problems[name], own[name])) for name in names]),
        base=np.array([objective_value(problems[name], plain) for name in names]),
        chosen=str(chosen),
    )
    answer = finish(whole, solution.replace(notes=(*solution.notes, *regrets.sentences())), objective_bound(whole))
    return whole, answer.replace(solver=f"robust ({chosen})"), regrets


def worst_mixture(values: Floats, radius: float) -> float:
    """Largest mean of ``values`` over weights at most ``radius`` away from equal ones in total variation.

    Weight is taken from the smallest values, at most all of it, and given to the largest. Complexity: O(n log n).
    """
    ordered = np.sort(values)
    weights = np.full(len(ordered), 1 / len(ordered))
    left = min(radius, 1 - 1 / len(ordered))
    for place in range(len(ordered) - 1):
        taken = min(left, float(weights[place]))
        weights[place] -= taken
        weights[-1] += taken
        left -= taken
    return float(weights @ ordered)


def sampled_problem(source: TraceStream | Counts, choices: Choices) -> Problem:
    """Return the problem of a scenario, over its recorded steps or as many as are drawn."""
    if isinstance(source, Counts):
        return build_problem(source, replace(choices, risk_batches=None, risk="mean")).replace(
            steps=source, risk=choices.risk
        )
    problem = build_problem(source, replace(choices, risk_batches=choices.risk_batches or STEPS))
    if problem.steps is None:
        return problem.replace(steps=draw_steps(source, TokenIndex.of(source), problem.law))
    return problem


def _answer(problem: Problem, method: Method, limits: Limits) -> Placement:
    found = _run(problem, method, limits, Report()).placement
    assert found is not None
    return found


def _run(problem: Problem, method: Method, limits: Limits, report: Report) -> Solution:
    """Answer by a method; without a cap of its own the problem's is kept as it is."""
    options: dict[str, Any] = {"policy": "global"} if method.solver == BASE else {}
    asked = problem
    if method.slack is not None:
        plain = problem.replace(steps=None, risk="mean", objective=LOAD, baseline=None, moves=None)
        balanced = load_solver("balance").solve(plain, limits.replace(options={}), Report()).placement
        assert balanced is not None
        least = max_over_mean(balanced, problem.stats.load) * (1 + 1e-9)
        cap = least * (1 + method.slack)
        cap = cap if problem.load_cap is None else np.maximum(least, np.minimum(cap, problem.load_cap))
        asked = problem.replace(load_cap=cap, start=balanced)
    if not method.roots:
        return solve(asked, method.solver, limits.replace(options=options), report)
    assert problem.steps is not None
    found = solve(asked.replace(steps=rooted(problem.steps)), method.solver, limits.replace(options=options), report)
    if found.placement is None:
        return found
    return found.replace(objective=objective_value(asked, found.placement), bound=None, status=Status.FEASIBLE)


def _rootable(choices: Choices) -> bool:
    """Whether loads alone count, so that their roots may stand for them."""
    return choices.objective == LOAD and choices.copies_cap is None


def rooted(steps: Steps | Counts) -> Counts:
    """Return steps in which every expert has the square root of its share of a layer's selections.

    The root steadies the spread of numbers that vary with their size (Bartlett, Biometrics 3, 1947). Complexity:
    O(steps · layers · experts).
    """
    if isinstance(steps, Counts):
        meta, rows = steps.meta, steps.counts.astype(np.float64)
    else:
        meta, rows = steps.trace.meta, np.moveaxis(expert_rows(steps), 2, 0).astype(np.float64)
    roots = np.sqrt(rows)
    whole = roots.sum(axis=2, keepdims=True)
    share = np.divide(roots, whole, out=np.zeros_like(roots), where=whole > 0)
    return Counts(meta=meta, counts=np.rint(share * ROOTED).astype(np.int64))
