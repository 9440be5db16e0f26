"""One solve of one programme: its size, its start, its backend, and what the answer proves."""

from __future__ import annotations

import math

import numpy as np

from moeplace.bounds import load_floor, objective_bound
from moeplace.errors import ProblemError
from moeplace.frozen import Floats
from moeplace.joint.copies import add_copies, patterns
from moeplace.joint.cross import add_cross
from moeplace.joint.decision import Decision
from moeplace.joint.load import add_load
from moeplace.joint.parts import Part
from moeplace.joint.symmetry import add_order, named
from moeplace.joint.times import add_times
from moeplace.metrics import max_over_mean
from moeplace.milp import Backend, Budget, MilpResult
from moeplace.network import KERNEL_OF_PHASE, NORMAL
from moeplace.objective import UNITS, objective_value
from moeplace.packing import pack_layers
from moeplace.packing.eplb import balance_global, slots_without_copies
from moeplace.placement import Placement
from moeplace.problem import CONTEXT_COHERENT, COPIES, CROSS, STEP_TIME, Problem
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason

MAX_TERMS = 1_000_000  # beyond, building the model takes longer than any search in it pays
LEAST_WORK, MOST_WORK, TERMS_PER_WORK = 1.0, 30.0, 4_000
KICKS = 100
MET, PROOF = 1e-9, 2e-6


def most_copies(problem: Problem) -> int:
    """Most copies of an expert that the model knows: 1 where more cannot help, or are no linear model."""
    uncapped_cross = problem.objective == CROSS and problem.load_cap is None
    if problem.objective == COPIES or uncapped_cross:
        return 1
    layers = problem.num_layers if problem.whole_model else 1
    spare = (problem.num_slots - problem.num_experts) * layers
    return max(1, min(int((problem.slots_per_gpu > 0).sum()), spare + 1))


def num_terms(problem: Problem) -> int:
    """About how many coefficients the programme has, without building it."""
    layers, gpus, most = problem.num_layers, problem.num_gpus, most_copies(problem)
    cells = layers * problem.num_experts * most * gpus
    terms = cells * (2 if most == 1 else 5) + (cells if problem.load_cap is not None else 0)
    pairs = problem.stats.transition
    if problem.objective == CROSS and pairs is not None:
        return terms + 3 * int((pairs > 0).sum()) * most * most * gpus
    if problem.objective == COPIES:
        places = gpus if problem.copies_level == "gpu" else problem.topology.num_nodes
        k = problem.stats.meta.top_k
        wide = gpus // places
        return terms + sum(len(number) for _, number in patterns(problem)) * places * (k * (1 + wide) + 1)
    if problem.objective == STEP_TIME and problem.dataflow == CONTEXT_COHERENT:
        flows = (layers - 1) * problem.num_experts * most * gpus * gpus
        arrivals = problem.num_experts * most * (gpus if most > 1 else 1 / (most * gpus))
        return terms + 2 * cells + round(flows * (2 + 2 * gpus + arrivals))
    return terms + cells * (1 if problem.objective != STEP_TIME else 2 + 4 * gpus)


def fits(problem: Problem, placement: Placement) -> bool:
    """Whether a placement keeps the slots and the load cap."""
    used, room = placement.used_slots(), problem.slots_per_gpu
    if problem.whole_model:
        used, room = used.sum(axis=0, keepdims=True), room * problem.num_layers
    if (used > room).any() or placement.duplicates():
        return False
    if problem.load_cap is None:
        return True
    return bool((max_over_mean(placement, problem.stats.load) <= problem.load_cap * (1 + MET)).all())


class Run:
    """One programme.

    Parameters
    ----------
    problem, limits, report
        As for every solver. The default work grows with the model's terms, from 1 to 30.
    name
        The solver's name in reports.

    Raises
    ------
    ProblemError
        Times with normal kernels, or too many terms.
    """

    def __init__(self, problem: Problem, limits: Limits, report: Report, name: str) -> None:
        self.problem, self.limits, self.report, self.name = problem, limits, report, name
        self.clock = Clock(limits)
        self.most = most_copies(problem)
        self.floor = objective_bound(problem)
        self.notes: list[str] = []
        spare = problem.num_slots > problem.num_experts
        # with the copies objective an answer is the best without copies, which proves nothing about those with them
        self.covers_all = not (spare and problem.objective == COPIES)
        if not self.covers_all:
            self.notes.append("which copy serves a token is no linear model: experts are placed once, and not proved")
        self._check()
        self.start = self._find_start()
        self.value = math.inf if self.start is None else objective_value(problem, self.start)

    def solve(self, backend: Backend, most_work: float = MOST_WORK) -> Solution:
        """Build the programme and solve it, where the start does not meet the floor already."""
        if self.clock.over or self.value <= self.floor * (1 + MET):
            return self._answer(self.start, self.value, self.floor, self.clock.stop_reason())
        decision, part = self._build()
        model = decision.model
        self.report.stage(self.name, f"{model.num_variables:,} variables, {model.num_terms:,} terms")
        budget = Budget(
            work=min(most_work, max(LEAST_WORK, model.num_terms / TERMS_PER_WORK)) * self.limits.work,
            time_limit_s=self.clock.left_s,
            gap=self.limits.gap,
            seed=self.limits.seed,
            stop=self.limits.stop,
        )
        result = backend(model, budget, lambda found, bound: self._improved(found / part.scale, bound, part))
        return self._read(decision, part, result)

    def _check(self) -> None:
        problem = self.problem
        if problem.is_sampled:
            raise ProblemError(
                f"{problem.risk} of {problem.objective} over sampled steps",
                rule=f"{self.name} solves for the mean step",
                hint="--solver saa, or leave --risk and --risk-batches out",
            )
        if (
            problem.objective == STEP_TIME
            and problem.dataflow != CONTEXT_COHERENT
            and KERNEL_OF_PHASE[problem.law.phase] == NORMAL
            and problem.stats.has_tokens
        ):
            raise ProblemError(
                f"step time of {problem.law.phase} steps",
                rule=f"{self.name} times low-latency kernels: normal ones send one copy per node, forwarded by rail",
                hint="--phase decode, --objective load or copies, or another solver",
            )
        terms = num_terms(problem)
        if terms > MAX_TERMS:
            raise ProblemError(
                f"an integer programme of about {terms:,} terms",
                rule=f"{self.name} solves at most {MAX_TERMS:,}",
                hint="fewer layers or GPUs, or another solver, whose bound says how far from the optimum it can be",
            )

    def _find_start(self) -> Placement | None:
        """Return the better of the start that was given and a balanced one, of those within the cap."""
        problem = self.problem
        load = problem.stats.load.astype(np.float64)
        given = problem.start
        if given is not None and fits(problem, given):
            return given
        alone = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
        balanced = balance_global(load, alone if self.most == 1 else problem.slots_per_gpu)
        if fits(problem, balanced):
            return balanced
        floor = load_floor(problem) * load.sum(axis=1) / problem.num_gpus
        room = alone if self.most == 1 else problem.slots_per_gpu
        packed = pack_layers(
            load, balanced, room, floor=floor, kicks=KICKS, seed=self.limits.seed, stop=lambda: self.clock.over
        )
        return packed if fits(problem, packed) else None

    def _build(self) -> tuple[Decision, Part]:
        """Return the model, its start written into it where it can say it."""
        problem, start = self.problem, self.start
        decision = Decision(problem, self.most)
        add_order(decision)
        point = None
        if start is not None:
            start = named(problem, start, self.most)
            point = decision.point(start)
        part = self._part(decision, point)
        if self.covers_all and self.floor > 0:
            decision.model.add(part.costs, lower=part.scale * self.floor * (1 - 1e-9))
        decision.model.minimise(part.costs)
        if point is not None and start is not None:
            whole = np.pad(point, (0, decision.model.num_variables - len(point)))
            part.complete(whole, start)
            decision.model.begin_at(whole)
        return decision, part

    def _part(self, decision: Decision, point: Floats | None) -> Part:
        objective = self.problem.objective
        if objective == STEP_TIME:
            return add_times(decision, point, self.value)
        if objective == CROSS:
            return add_cross(decision)
        return add_copies(decision) if objective == COPIES else add_load(decision)

    def _improved(self, value: float, bound: float | None, part: Part) -> None:
        best = min((entry.objective for entry in self.report.history), default=math.inf)
        if value < best * (1 - 1e-6):
            certified = max(self.floor, (bound or 0.0) / part.scale if self.covers_all else 0.0)
            self.report.improved(self.name, value, bound=min(certified, value), unit=UNITS[self.problem.objective])

    def _read(self, decision: Decision, part: Part, result: MilpResult) -> Solution:
        """Return what the backend's answer says of the problem."""
        problem = self.problem
        found = None if result.values is None else decision.placement(result.values)
        candidates = [(objective_value(problem, p), p) for p in (found, self.start) if p is not None]
        if not candidates:
            return self._nothing(result)
        value, placement = min(candidates, key=lambda entry: entry[0])
        proven = result.status is Status.OPTIMAL and self.covers_all
        bound = self.floor
        if self.covers_all and result.bound is not None:
            bound = max(bound, result.bound / part.scale)
        if proven and value <= bound * (1 + PROOF):
            bound = value  # a backend proves to this precision
        return self._answer(placement, value, bound, result.stop_reason)

    def _answer(self, placement: Placement | None, value: float, bound: float, stop: StopReason) -> Solution:
        proven = placement is not None and value <= bound * (1 + MET)
        if stop is StopReason.PROVEN and not proven:
            stop = StopReason.EXHAUSTED
        return Solution(
            placement=placement,
            objective=value,
            unit=UNITS[self.problem.objective],
            bound=min(bound, value) if placement is not None else None,
            status=Status.OPTIMAL if proven else Status.FEASIBLE if placement is not None else Status.UNKNOWN,
            stop_reason=StopReason.PROVEN if proven else stop,
            solver=self.name,
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=tuple(self.notes),
        )

    def _nothing(self, result: MilpResult) -> Solution:
        """Return the solution where no placement keeps the cap, or none was found."""
        proven = result.status is Status.INFEASIBLE and self.covers_all
        word = "no placement keeps the load cap" if proven else "no placement within the load cap was found"
        return Solution(
            placement=None,
            objective=math.inf,
            unit=UNITS[self.problem.objective],
            status=Status.INFEASIBLE if proven else Status.UNKNOWN,
            stop_reason=result.stop_reason,
            solver=self.name,
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=(*self.notes, word),
        )
