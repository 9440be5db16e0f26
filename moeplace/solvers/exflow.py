"""ExFlow (arXiv 2401.08383): the paths of top-1 tokens cut as rarely as can be, by an integer programme.

A token that stays where its expert is moves when its next expert is elsewhere. With ``x[e, c]`` whether expert ``e`` is
in part ``c``, and equal numbers of experts of every layer in every part,

    min Σ_token Σ_step cost[token, step],   cost[token, step] ≥ ±(x[e_step, c] - x[e_step+1, c])  for every part c.

GPUs are parted in two, and each part again (recursive bipartition), as published. Tokens that take the same step have
the same cost, so there is one variable for each pair of experts, weighted by its tokens: the same optimum with a number
of variables that does not grow with the trace, and no need to add tokens 5,000 at a time. The paper solves it with
Gurobi, 60 s a bisection; here it is HiGHS, CBC or CP-SAT with deterministic work, from a contiguous start. Where a
layer chain is too large for that, the chain is annealed instead (:mod:`moeplace.chains`), all GPUs at once.

Models with more than one expert per token have no single path: they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace.chains import Climb, Instance, Work
from moeplace.errors import InputError, ProblemError
from moeplace.frozen import Ints
from moeplace.milp import Budget, LinearModel, backend
from moeplace.packing.eplb import slots_without_copies
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.ranks import rename_gpus
from moeplace.solution import Clock, Limits, Report, Solution, Stage, found

DESCRIPTION = "ExFlow: paths of top-1 tokens cut as rarely as can be, GPUs bisected by integer programmes"
METHODS = ("auto", "programme", "chain")
OPTIONS: Mapping[str, str] = {
    "method": "programme (recursive bisection), chain (annealing, at any size) or auto (default: by size)",
    "backend": "highs (SciPy's, default), cbc (PuLP's) or cpsat (OR-Tools)",
}
MOST_EXPERTS = 64  # of all layers that a programme takes
WORK = 4.0  # of one bisection, roughly seconds
CHAIN_WORK = 0.1  # of what search takes
TRIES = 300
UNIT = "share of its steps"


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Place every layer. Complexity: GPUs - 1 integer programmes of layers · experts binaries.

    Raises
    ------
    ProblemError
        Tokens choose more than one expert, or the trace holds only counts.
    """
    method = limits.options.get("method", METHODS[0])
    if method not in METHODS:
        raise InputError(f"method {method!r}", rule=f"one of {', '.join(METHODS)}")
    solver = limits.options.get("backend", "highs")
    backend(solver)
    stats = problem.stats
    if stats.transition is None:
        raise ProblemError("the trace holds only counts", rule="exflow goes by the paths of tokens")
    if stats.meta.top_k != 1:
        raise ProblemError(
            f"top-{stats.meta.top_k} tokens",
            rule="exflow's programme is for one expert per token: with more there is no single path",
            hint="--solver search minimises all consecutive pairs",
        )
    if method == METHODS[0]:
        method = METHODS[1] if problem.num_layers * problem.num_experts <= MOST_EXPERTS else METHODS[2]
    run = _Run(problem, limits, report, solver)
    return run.annealed() if method == "chain" else run.bisected()


@dataclass(slots=True)
class _Part:
    """GPUs ``first`` to ``last - 1`` and, per layer, the experts that are to be dealt over them."""

    first: int
    last: int
    members: list[Ints]


class _Run:
    """One call of :func:`solve`."""

    def __init__(self, problem: Problem, limits: Limits, report: Report, solver: str) -> None:
        self.problem, self.limits, self.report, self.solver = problem, limits, report, solver
        self.clock = Clock(limits)
        self.rooms = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
        transition = problem.stats.transition
        assert transition is not None
        self.pairs = transition
        self.stages: list[Stage] = []

    def bisected(self) -> Solution:
        """Part the GPUs in two, and each part again, until every part is one GPU."""
        problem = self.problem
        gpu = np.zeros((problem.num_layers, problem.num_experts), np.int64)
        everyone = [np.arange(problem.num_experts)] * problem.num_layers
        parts = [_Part(0, problem.num_gpus, everyone)]
        while parts:
            part = parts.pop(0)
            if part.last - part.first == 1:
                for row, members in zip(gpu, part.members, strict=True):
                    row[members] = part.first
                continue
            self.report.progress(len(self.stages), problem.num_gpus - 1, "bisecting")
            parts += self._halves(part)
        placement = self._placement(gpu)
        answer = found(problem, placement, self.limits, self.report, solver="exflow", clock=self.clock)
        return answer.replace(stages=tuple(self.stages))

    def _halves(self, part: _Part) -> list[_Part]:
        middle = (part.first + part.last + 1) // 2
        size = int(self.rooms[part.first : middle].sum())
        chosen = self._cut(part, size)
        left = [members[one] for members, one in zip(part.members, chosen, strict=True)]
        right = [members[~one] for members, one in zip(part.members, chosen, strict=True)]
        return [_Part(part.first, middle, left), _Part(middle, part.last, right)]

    def _cut(self, part: _Part, size: int) -> list[npt.NDArray[np.bool_]]:
        """Per layer, which members go to the first half, ``size`` in each layer."""
        first_half = [np.arange(len(members)) < size for members in part.members]
        name = f"GPUs {part.first} to {part.last - 1}"
        if self.clock.over or size in (0, len(part.members[0])):
            return first_half
        model, chosen, steps = self._programme(part, size)
        start = dict.fromkeys((int(number) for row in chosen for number in row[:size]), 1.0)
        model.begin_at(self._completed(model, start, part, chosen))
        budget = Budget(
            work=WORK * self.limits.work,
            time_limit_s=self.clock.left_s,
            gap=self.limits.gap,
            seed=self.limits.seed,
            stop=self.limits.stop,
        )
        result = backend(self.solver)(model, budget, None)
        if result.values is None or result.objective is None:
            return first_half
        self.stages.append(
            Stage(
                name=name,
                objective=result.objective / max(1, steps),
                bound=None if result.bound is None else max(0.0, result.bound) / max(1, steps),
                unit=UNIT,
                status=result.status,
                stop_reason=result.stop_reason,
            )
        )
        return [result.values[row] > 0.5 for row in chosen]

    def _programme(self, part: _Part, size: int) -> tuple[LinearModel, list[Ints], int]:
        """Return the model of a bisection, ``[member]`` variables of each layer, and the steps it weighs."""
        model = LinearModel()
        chosen = [
            np.array([model.binary(f"x{layer}_{expert}") for expert in members], np.int64)
            for layer, members in enumerate(part.members)
        ]
        for row in chosen:
            model.add([(int(number), 1.0) for number in row], lower=size, upper=size)
        costs, steps = [], 0
        for layer, one, other, tokens in self._steps(part):
            cut = model.continuous(f"cut{layer}_{one}_{other}", upper=1.0)
            here, there = int(chosen[layer][one]), int(chosen[layer + 1][other])
            model.add([(cut, 1.0), (here, -1.0), (there, 1.0)], lower=0.0)
            model.add([(cut, 1.0), (here, 1.0), (there, -1.0)], lower=0.0)
            costs.append((cut, float(tokens)))
            steps += tokens
        model.minimise(costs)
        return model, chosen, steps

    def _steps(self, part: _Part) -> list[tuple[int, int, int, int]]:
        """Layer, member, member of the next layer, and tokens of every step that begins and ends in the part."""
        found_steps = []
        for layer in range(self.problem.num_layers - 1):
            own = self.pairs[layer][np.ix_(part.members[layer], part.members[layer + 1])]
            for one, other in np.argwhere(own > 0).tolist():
                found_steps.append((layer, one, other, int(own[one, other])))
        return found_steps

    def _completed(
        self, model: LinearModel, start: dict[int, float], part: _Part, chosen: list[Ints]
    ) -> dict[int, float]:
        """Add the values of the cuts to a start."""
        values, number = dict(start), sum(len(row) for row in chosen)
        for place, (layer, one, other, _) in enumerate(self._steps(part)):
            here, there = int(chosen[layer][one]), int(chosen[layer + 1][other])
            values[number + place] = abs(start.get(here, 0.0) - start.get(there, 0.0))
        return values

    def annealed(self) -> Solution:
        """Anneal all GPUs of the chain at once, and give its GPUs the names that cross nodes least."""
        problem, work = self.problem, CHAIN_WORK * self.limits.work
        cap = np.full(problem.num_layers, np.inf)
        instance = Instance.of(self.pairs, problem.stats.load.astype(np.float64), cap, problem.num_gpus)
        start = np.tile(np.repeat(np.arange(problem.num_gpus), self.rooms), (problem.num_layers, 1))

        def watch(share: float) -> bool:
            self.report.progress(share, 1.0, "annealing")
            return self.clock.over

        climb = Climb(instance, start, seed=self.limits.seed, threads=self.limits.threads, watch=watch)
        gpu = climb.run(Work.of(instance, work), lambda source, state: None)
        tries = max(1, round(TRIES * self.limits.work))
        placement = rename_gpus(
            problem, self._placement(gpu), seed=self.limits.seed, tries=tries, stop=lambda: self.clock.over
        )
        size = f"{problem.num_layers * problem.num_experts} experts in all layers"
        notes = (f"{size}: annealed, not bisected by integer programmes (--option method=programme)",)
        return found(problem, placement, self.limits, self.report, solver="exflow", notes=notes, clock=self.clock)

    def _placement(self, gpu: Ints) -> Placement:
        gpus = range(self.problem.num_gpus)
        lists = [[np.flatnonzero(row == number).tolist() for number in gpus] for row in gpu]
        return Placement.from_lists(lists, self.problem.num_experts)
