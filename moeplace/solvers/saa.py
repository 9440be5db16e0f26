"""Sample-average approximation: a placement for the steps that servers run, mean or tail, not for their average.

The mean-balanced placement is balanced on average and not in any step: experts of one topic are busy together. Swaps of
copies, judged on hundreds of steps at once, lower the mean over steps of what the evaluator adds up, and for a tail the
mean of the worst 5 % besides. A fourth of the steps takes no part in that: of the placements found, the one that is
best on those is the answer, so that what only fits the sample is not taken. See :mod:`moeplace.sampled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moeplace.errors import ProblemError
from moeplace.frozen import Floats
from moeplace.metrics import max_over_mean
from moeplace.objective import UNITS, objective_value, step_values
from moeplace.packing import pack_layers
from moeplace.packing.eplb import balance_global
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.sampled import Search, StepTables, improve_mean, improve_tail
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason
from moeplace.tails import CVAR, MEAN, risk_value

DESCRIPTION = "placements chosen on sampled steps: least mean, p95, p99 or CVaR95 of load or step time"
USES_START = True
OPTIONS: Mapping[str, str] = {}
KEPT_BACK = 4  # one step of so many, to choose by
KICKS = 60
BALANCE_KICKS = 100
WORK = 1.5e9  # swaps times steps, of all layers
TAIL_WORK = 1.5e9
TAIL_SWAPS = 50  # for each pair of slots: more fit the sample alone
MIX = 0.2  # of the worst steps, beside the mean


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Find a placement for the problem's steps.

    Raises
    ------
    ProblemError
        The problem has no steps, or counts slots over the whole model.
    """
    if not problem.is_sampled or problem.whole_model:
        raise ProblemError(
            f"objective {problem.objective} of the mean step",
            rule="saa chooses by sampled steps, slots counted layer by layer",
            hint="--risk p99 (or --risk-batches N with --risk mean), with --objective step-time or load",
        )
    return _Run(problem, limits, report).solve()


class _Run:
    """One call of :func:`solve`."""

    def __init__(self, problem: Problem, limits: Limits, report: Report) -> None:
        self.problem, self.limits, self.report = problem, limits, report
        self.clock = Clock(limits)
        self.tables = StepTables.of(problem)
        batches = self.tables.rows.shape[2]
        # every fourth step: recorded steps stand in the order of their domains
        kept = np.arange(batches) % KEPT_BACK == KEPT_BACK - 1
        self.fit = np.flatnonzero(~kept)
        # where there are too few steps all are fitted, and chosen by
        self.apart = np.flatnonzero(kept) if kept.any() else self.fit
        mean = problem.stats.load.sum(axis=1) / problem.num_gpus
        self.cap = np.full(problem.num_layers, np.inf) if problem.load_cap is None else problem.load_cap * mean

    def solve(self) -> Solution:
        starts = self._starts()
        tried = {name: placement for name, placement in starts.items() if self._within(placement)}
        if not tried:
            tried = dict(starts)
        found = dict(tried)
        best = min(tried, key=lambda name: self._values(tried[name])[self.fit].mean())
        search, fit = self._search(), self.tables.part(self.fit)
        found["mean of the steps"] = improve_mean(fit, tried[best], np.full(len(self.fit), 1 / len(self.fit)), search)
        self._tell("mean of the steps", found["mean of the steps"])
        if self.problem.risk != MEAN and not self.clock.over:
            most = TAIL_WORK * self.limits.work / (self.problem.num_layers * len(self.fit))
            budget = int(min(most, self.limits.work * TAIL_SWAPS * self.problem.num_slots**2))
            tail = improve_tail(fit, found["mean of the steps"], MIX, replace(search, budget=max(1, budget)))
            found["worst of the steps"] = tail
            self._tell("worst of the steps", tail)
        return self._answer(found, starts)

    def _starts(self) -> dict[str, Placement]:
        """Placements to begin with: the given one, and those that balance the mean step."""
        problem = self.problem
        starts: dict[str, Placement] = {}
        if problem.start is not None and not problem.start.duplicates():
            starts["start"] = problem.start
        mean = self.tables.rows[:, :, self.fit].mean(axis=2, dtype=np.float64)
        for name, load in (("balanced load", problem.stats.load.astype(np.float64)), ("balanced steps", mean)):
            even = balance_global(load, problem.slots_per_gpu)
            floor = load.sum(axis=1) / problem.num_gpus
            starts[name] = pack_layers(
                load, even, problem.slots_per_gpu, floor=floor, kicks=BALANCE_KICKS, seed=self.limits.seed,
                stop=lambda: self.clock.over,
            )  # fmt: skip
        return starts

    def _within(self, placement: Placement) -> bool:
        cap = self.problem.load_cap
        return cap is None or bool((max_over_mean(placement, self.problem.stats.load) <= cap * (1 + 1e-9)).all())

    def _search(self) -> Search:
        problem, limits = self.problem, self.limits
        budget = WORK * limits.work / (problem.num_layers * len(self.fit))
        return Search(
            load=problem.stats.load.astype(np.float64),
            cap=self.cap,
            room=problem.slots_per_gpu,
            kicks=max(1, round(KICKS * limits.work)),
            budget=max(1, int(budget)),
            seed=limits.seed,
            threads=max(1, limits.threads),
            stop=lambda: self.clock.over,
        )

    def _values(self, placement: Placement) -> Floats:
        return step_values(self.problem, placement)

    def _tell(self, source: str, placement: Placement) -> None:
        value = objective_value(self.problem, placement)
        self.report.improved(f"saa, {source}", value, unit=UNITS[self.problem.objective])

    def _answer(self, found: Mapping[str, Placement], starts: Mapping[str, Placement]) -> Solution:
        """Choose by the steps kept back, of those that are no worse on all steps than the given start."""
        problem, risk = self.problem, self.problem.risk
        values = {name: self._values(placement) for name, placement in found.items()}
        whole = {name: risk_value(sample, risk) for name, sample in values.items()}
        allowed = [name for name in found if "start" not in starts or whole[name] <= whole.get("start", np.inf)]
        # a p99 of the few steps kept apart is noise; the mean of their worst 5 % is less so
        by = MEAN if risk == MEAN else CVAR
        chosen = min(allowed, key=lambda name: risk_value(values[name][self.apart], by))
        fit, apart = (risk_value(part, risk) for part in (values[chosen][self.fit], values[chosen][self.apart]))
        stopped = self.clock.over
        return Solution(
            placement=found[chosen],
            objective=whole[chosen],
            unit=UNITS[problem.objective],
            status=Status.FEASIBLE,
            stop_reason=self.clock.stop_reason() if stopped else StopReason.EXHAUSTED,
            solver="saa",
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=(
                f"{risk} of {len(self.fit)} steps it was fitted to: {fit:,.4f} {UNITS[problem.objective]}; of "
                f"{len(self.apart)} kept apart: {apart:,.4f}; chosen for these: {chosen}",
            ),
        )
