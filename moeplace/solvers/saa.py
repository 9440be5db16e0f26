"""Sample-average approximation: a placement for the steps that servers run, mean or tail, not for their average.

The mean-balanced placement is balanced on average and not in any step: experts of one topic are busy together. Swaps of
copies, judged on hundreds of steps at once, lower the mean over steps of what the evaluator adds up, and for a tail the
mean of the worst 5 % besides. Where a token is sent once to each GPU, or copies have a cap, work and copies are weighed
against each other, from placements that keep experts of one topic together as well as from balanced ones. A fourth of
the steps takes no part in that: of the placements found, the one that is best on those is the answer, so that what only
fits the sample is not taken. See :mod:`moeplace.sampled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moeplace.batches import Steps
from moeplace.errors import ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.metrics import copies_per_token, max_over_mean
from moeplace.objective import UNITS, objective_value, step_values
from moeplace.packing import pack_layers
from moeplace.packing.eplb import balance_global
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.sampled import (
    SLACKS,
    Costs,
    Search,
    StepTables,
    Wire,
    best_layers,
    few_copies,
    improve_joint,
    improve_joint_tail,
    improve_mean,
    joint_values,
    least_price,
)
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason
from moeplace.tails import CVAR, MEAN, risk_value

DESCRIPTION = "placements chosen on sampled steps: least mean, p95, p99 or CVaR95 of load or step time"
USES_START = True
OPTIONS: Mapping[str, str] = {}
KEPT_BACK = 4  # one step of so many, to choose by
KICKS = 60
BALANCE_KICKS = 100
WORK = 3e8  # swaps times steps, of all layers
SPARE_WORK = 1e9  # the same where slots are spare
WIRE_WORK = 5e7  # the same where copies are counted too
TAIL_SWEEPS = 3  # over the layers: more fit the sample alone
MIX = 0.2  # of the worst steps, beside the mean
MOST_TOGETHER = 64  # experts of a layer whose placements with few copies are found in seconds
PRICED = 200  # steps that the price of a copy is found on
DEARER = 6  # times that the price is raised because it does not keep the cap on copies
ROOM = 5e-4  # of the cap, for what the tail's swaps add


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
        # in an order that has nothing to do with what they hold: the first ones stand for the rest
        self.fit = np.random.default_rng(0).permutation(np.flatnonzero(~kept))
        # where there are too few steps all are fitted, and chosen by
        self.apart = np.flatnonzero(kept) if kept.any() else self.fit
        mean = problem.stats.load.sum(axis=1) / problem.num_gpus
        self.cap = np.full(problem.num_layers, np.inf) if problem.load_cap is None else problem.load_cap * mean
        self.costs = self._costs(0.0)

    def solve(self) -> Solution:
        starts = self._starts()
        tried = {name: placement for name, placement in starts.items() if self._within(placement)} or dict(starts)
        found = dict(tried)
        costs = self.costs
        if self.problem.copies_cap is not None:
            costs, found["mean of the steps"] = self._capped(tried)
        else:
            found["mean of the steps"] = self._mean(costs, tried)
        self._tell("mean of the steps", found["mean of the steps"])
        if self.problem.risk != MEAN and not self.clock.over:
            search = self._search(costs.wire is not None)
            tail = improve_joint_tail(costs, found["mean of the steps"], MIX, search, sweeps=TAIL_SWEEPS)
            found["worst of the steps"] = tail
            self._tell("worst of the steps", tail)
        return self._answer(found, starts)

    def _costs(self, price: float, batches: Ints | None = None) -> Costs:
        """What the steps to fit are made of, copies at a price where the objective is load."""
        batches = self.fit if batches is None else batches
        problem, tables = self.problem, self.tables.part(batches)
        each = price / (problem.num_layers * max(1, problem.law.step_tokens))
        wire = Wire.of(problem, batches, price=each)
        return Costs(tables if wire is None else replace(tables, port_us=0.0), wire)

    def _starts(self) -> dict[str, Placement]:
        """Placements to begin with: the given one, those that balance the mean step, those with few copies."""
        problem = self.problem
        starts: dict[str, Placement] = {}
        if problem.start is not None and not problem.start.duplicates():
            starts["start"] = problem.start
        mean = self.tables.rows[:, :, self.fit].mean(axis=2, dtype=np.float64)
        for name, load in (("balanced load", problem.stats.load.astype(np.float64)), ("balanced steps", mean)):
            even = balance_global(load, problem.slots_per_gpu)
            if name == "balanced load":
                starts["EPLB"] = even
            floor = load.sum(axis=1) / problem.num_gpus
            starts[name] = pack_layers(
                load, even, problem.slots_per_gpu, floor=floor, kicks=BALANCE_KICKS, seed=self.limits.seed,
                stop=lambda: self.clock.over,
            )  # fmt: skip
        few = problem.copies_cap is not None or (self.costs.wire is not None and self.costs.wire.distinct)
        if few and problem.divides_evenly and problem.num_experts <= MOST_TOGETHER and problem.stats.sample is not None:
            ids, load = problem.stats.sample.experts, problem.stats.load.astype(np.float64)
            for slack in SLACKS:
                starts[f"few copies, load {slack:+.0%}"] = few_copies(
                    ids, load, starts["balanced load"], slack, seed=self.limits.seed, stop=lambda: self.clock.over
                )
        return starts

    def _within(self, placement: Placement) -> bool:
        cap = self.problem.load_cap
        return cap is None or bool((max_over_mean(placement, self.problem.stats.load) <= cap * (1 + 1e-9)).all())

    def _search(self, wired: bool, kicks: float = KICKS) -> Search:
        problem, limits = self.problem, self.limits
        budget = (WIRE_WORK if wired else WORK) * limits.work / (problem.num_layers * len(self.fit))
        return Search(
            load=problem.stats.load.astype(np.float64),
            cap=self.cap,
            room=problem.slots_per_gpu,
            kicks=max(1, round(kicks * limits.work)) if kicks else 0,
            budget=max(1, int(budget)),
            seed=limits.seed,
            threads=max(1, limits.threads),
            stop=lambda: self.clock.over,
        )

    def _mean(self, costs: Costs, tried: Mapping[str, Placement]) -> Placement:
        """Lower the mean from the best start, or where copies count from each, layer by layer."""
        search = self._search(costs.wire is not None)
        values = {name: float(joint_values(costs, one, search).mean()) for name, one in tried.items()}
        best = tried[min(values, key=lambda name: values[name])]
        if self.problem.num_slots > self.problem.num_experts:
            # copies are passed on from expert to expert by what GPUs do
            share = replace(search, budget=max(1, int(search.budget * SPARE_WORK / WORK)))
            best = improve_mean(self.tables.part(self.fit), best, self._weights, share)
            return best if costs.wire is None else improve_joint(costs, best, replace(search, kicks=0))[0]
        if costs.wire is None:
            return improve_mean(costs.tables, best, self._weights, search)
        if not costs.wire.distinct:
            return improve_joint(costs, best, search)[0]
        share = replace(search, kicks=0, budget=max(1, search.budget // (len(tried) + 1)))
        rough = best_layers(improve_joint(costs, one, share) for one in tried.values())
        return improve_joint(costs, rough, replace(search, budget=share.budget))[0]

    @property
    def _weights(self) -> Floats:
        return np.full(len(self.fit), 1 / len(self.fit))

    def _capped(self, tried: Mapping[str, Placement]) -> tuple[Costs, Placement]:
        """Lower the mean load at the least price of a copy that keeps the cap on copies per token."""
        cap = self.problem.copies_cap
        assert cap is not None
        free = self._mean(self.costs, tried)
        if self._copies(free) <= cap:
            return self.costs, free
        search = self._search(True)
        quick = replace(search, kicks=0, budget=2 * self.problem.num_slots**2)
        last = min(tried.values(), key=lambda one: abs(self._copies(one) - cap))
        few = self.fit[:PRICED]
        price = least_price(lambda each: self._copies(improve_joint(self._costs(each, few), last, quick)[0]), cap)
        costs = self._costs(price)
        found = self._mean(costs, tried)
        for _ in range(DEARER):
            if self._copies(found) <= cap * (1 - ROOM) or self.clock.over:
                break
            price *= 1.08
            costs = self._costs(price)
            found = improve_joint(costs, found, search)[0]
        return costs, found

    def _copies(self, placement: Placement) -> float:
        return copies_per_token(self.problem.stats, placement, self.problem.topology)

    def _values(self, placement: Placement, batches: Ints) -> Floats:
        """``[batch]`` what the evaluator says of some steps."""
        steps = self.problem.steps
        assert steps is not None
        part = steps.part(batches) if isinstance(steps, Steps) else steps.take(batches)
        return step_values(self.problem.replace(steps=part), placement)

    def _tell(self, source: str, placement: Placement) -> None:
        value = objective_value(self.problem, placement)
        self.report.improved(f"saa, {source}", value, unit=UNITS[self.problem.objective])

    def _answer(self, found: Mapping[str, Placement], starts: Mapping[str, Placement]) -> Solution:
        """Choose by the steps kept back, of those that are no worse on all steps than the given start."""
        problem, risk = self.problem, self.problem.risk
        allowed = dict(found)
        if problem.copies_cap is not None:
            copies = {name: self._copies(one) for name, one in found.items()}
            kept = {name: one for name, one in found.items() if copies[name] <= problem.copies_cap * (1 + 1e-9)}
            allowed = kept or {name: found[name] for name in [min(copies, key=lambda name: copies[name])]}
        # a p99 of the few steps kept apart is noise; the mean of their worst 5 % is less so
        by = MEAN if risk == MEAN else CVAR
        apart = {name: self._values(one, self.apart) for name, one in allowed.items()}
        ranked = sorted(allowed, key=lambda name: risk_value(apart[name], by))
        most = objective_value(problem, starts["start"]) if "start" in allowed else np.inf
        for chosen in ranked:
            whole = step_values(problem, allowed[chosen])
            if risk_value(whole, risk) <= most:
                break
        fit, kept_apart = (risk_value(part, risk) for part in (whole[self.fit], apart[chosen]))
        stopped = self.clock.over
        return Solution(
            placement=allowed[chosen],
            objective=risk_value(whole, risk),
            unit=UNITS[problem.objective],
            status=Status.FEASIBLE,
            stop_reason=self.clock.stop_reason() if stopped else StopReason.EXHAUSTED,
            solver="saa",
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=(
                f"{risk} of {len(self.fit)} steps it was fitted to: {fit:,.4f} {UNITS[problem.objective]}; of "
                f"{len(self.apart)} kept apart: {kept_apart:,.4f}; chosen for these: {chosen}",
            ),
        )
