"""All layers in one programme, or each in its own where the objective and the slots do not join them."""

from __future__ import annotations

import math

import numpy as np

from moeplace.errors import ProblemError
from moeplace.joint.run import MOST_WORK, Run, fits
from moeplace.joint.symmetry import by_layer
from moeplace.milp import Backend
from moeplace.objective import UNITS, objective_value
from moeplace.placement import EMPTY, Placement
from moeplace.problem import REMOTE, STEP_TIME, Problem
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason

GENEROUS = 5.0  # times its fair share of the time that a layer may take
LEAST_MOST = 1.0  # work of a layer, however many there are
WORST_FIRST = (StopReason.INTERRUPTED, StopReason.TIME_LIMIT, StopReason.EXHAUSTED, StopReason.GAP, StopReason.PROVEN)


def solve_jointly(problem: Problem, limits: Limits, report: Report, name: str, backend: Backend) -> Solution:
    """Solve a problem by integer programming.

    Parameters
    ----------
    problem, limits, report
        As for every solver. The default work grows with the terms, up to about 30 s of one core.
    name
        The solver's name in reports.
    backend
        What solves the programmes.

    Raises
    ------
    ProblemError
        Times with normal kernels, copies sent to other nodes, or too many terms.
    """
    if problem.objective == REMOTE:
        hint = "--objective copies --copies-level node, or --solver nearby"
        raise ProblemError(
            "objective remote", rule="integer programmes place experts without regard to homes", hint=hint
        )
    if problem.num_layers == 1 or not by_layer(problem):
        return Run(problem, limits, report, name).solve(backend)
    return _Layers(problem, limits, report, name).solve(backend)


def one_layer(problem: Problem, layer: int) -> Problem:
    """Return the problem of a layer by itself."""
    stats, rows = problem.stats, slice(layer, layer + 1)
    sample, sources = stats.sample, stats.source_load
    meta = stats.meta.replace(layer_ids=stats.meta.layer_ids[rows])
    if sample is not None:
        sample = sample.replace(meta=meta, experts=sample.experts[:, rows])
    alone = stats.replace(
        meta=meta,
        load=stats.load[rows],
        transition=None if stats.transition is None else stats.transition[:0],
        coactivation=None if stats.coactivation is None else stats.coactivation[rows],
        sample=sample,
        step_load=None if stats.step_load is None else stats.step_load[:, rows],
        source_load=None if sources is None else sources[:, rows],
    )
    cap, start = problem.load_cap, problem.start
    return problem.replace(
        stats=alone,
        load_cap=None if cap is None else cap[rows],
        start=None if start is None else start.replace(slots=start.slots[rows]),
        baseline=None,
    )


class _Layers:
    """Layers solved one after another, and told of together."""

    def __init__(self, problem: Problem, limits: Limits, report: Report, name: str) -> None:
        self.problem, self.limits, self.report, self.name = problem, limits, report, name
        self.clock = Clock(limits)
        layers = range(problem.num_layers)
        self.runs = [Run(one_layer(problem, layer), limits, Report(), name) for layer in layers]
        self.scale = 1.0 if problem.objective == STEP_TIME else 1 / problem.num_layers
        self.values = np.array([run.value for run in self.runs])
        self.bounds = np.array([run.floor for run in self.runs])

    def solve(self, backend: Backend) -> Solution:
        """Solve every layer, sharing work and time among them."""
        self.report.stage(self.name, f"{len(self.runs)} layers, each a programme of its own")
        answers: list[Solution] = []
        most_work = max(LEAST_MOST, MOST_WORK / len(self.runs))
        for i, run in enumerate(self.runs):
            self.report.progress(i, len(self.runs), "layers")
            left = self.clock.left_s * min(1.0, GENEROUS / (len(self.runs) - i))
            run.clock = Clock(self.limits.replace(time_limit_s=left))
            answer = run.solve(backend, most_work)
            if answer.status is Status.INFEASIBLE:
                return self._nothing([answer])
            answers.append(answer)
            self._tell(i, answer)
        if any(answer.placement is None for answer in answers):
            return self._nothing([answer for answer in answers if answer.placement is None])
        return self._together(answers)

    def _tell(self, layer: int, answer: Solution) -> None:
        better = answer.objective < self.values[layer] * (1 - 1e-9)
        self.values[layer] = answer.objective
        self.bounds[layer] = max(self.bounds[layer], answer.bound or 0.0)
        if better and np.isfinite(self.values).all():
            value, bound = (float(part.sum()) * self.scale for part in (self.values, self.bounds))
            self.report.improved(self.name, value, bound=min(value, bound), unit=UNITS[self.problem.objective])

    def _together(self, answers: list[Solution]) -> Solution:
        """Return the solution of all layers; bounds of layers add up."""
        placed = [answer.placement.slots[0] for answer in answers if answer.placement is not None]
        slots = np.full((len(placed), self.problem.num_gpus, max(part.shape[1] for part in placed)), EMPTY, np.int64)
        for layer, part in enumerate(placed):
            slots[layer, :, : part.shape[1]] = part
        placement = Placement(slots=slots, num_experts=self.problem.num_experts)
        value, given = objective_value(self.problem, placement), self.problem.start
        # which copy serves a token depends on the layer's number: for copies a start may be better as a whole
        if given is not None and fits(self.problem, given) and objective_value(self.problem, given) < value:
            placement, value = given, objective_value(self.problem, given)
        proven = all(answer.status is Status.OPTIMAL for answer in answers)
        bound = value if proven else min(value, float(self.bounds.sum()) * self.scale)
        return self._solution(placement, value, bound, answers)

    def _nothing(self, answers: list[Solution]) -> Solution:
        """Return the solution where some layer has none."""
        return self._solution(None, math.inf, None, answers)

    def _solution(
        self, placement: Placement | None, value: float, bound: float | None, answers: list[Solution]
    ) -> Solution:
        statuses = {answer.status for answer in answers}
        for status in (Status.INFEASIBLE, Status.UNKNOWN, Status.FEASIBLE, Status.OPTIMAL):
            if status in statuses:
                break
        reasons = {answer.stop_reason for answer in answers}
        return Solution(
            placement=placement,
            objective=value,
            unit=UNITS[self.problem.objective],
            bound=bound,
            status=status,
            stop_reason=next(reason for reason in WORST_FIRST if reason in reasons),
            solver=self.name,
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=tuple(dict.fromkeys(note for answer in answers for note in answer.notes)),
        )
