"""Traffic between the GPUs of consecutive layers, at any size: annealing, recombination, and a certified bound.

Under context-coherent execution a token moves from expert to expert, and what is minimised is the share of consecutive
pairs on different GPUs, within a load cap for every layer. See :mod:`moeplace.chains` for the method and its bounds.
Experts are placed once: where slots are spare they stay empty, but experts may move into them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from moeplace.bounds import cross_bound, load_floor
from moeplace.chains import Climb, Instance, Work
from moeplace.chains.duals import exact_matching
from moeplace.chains.sdp import ChainSDP, bounds
from moeplace.errors import InputError, ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.metrics import max_over_mean
from moeplace.objective import UNITS, objective_value
from moeplace.packing import pack_layers
from moeplace.packing.eplb import balance_global, slots_without_copies
from moeplace.placement import EMPTY, Placement
from moeplace.problem import CROSS, Problem
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason, relative_gap

DESCRIPTION = "least traffic between GPUs at any size: annealed, recombined, within load caps, with a certified bound"
USES_START = True
BOUNDS = ("sdp", "matching")
OPTIONS: Mapping[str, str] = {
    "bound": "sdp (default: tight, takes most of the time at 256 experts) or matching (weak, in seconds)"
}
QUICK = 0.03  # work of a first, short search
SHARE_OF_TIME = 0.6  # of a time limit that the search may take
KICKS = 100
SDP_WORK = 5.5e11  # multiplications of eigenvectors, at work 1
MOST_STEPS, LEAST_STEPS, EVALUATIONS = 400, 10, 8
STALLED = 2e-5  # of all pairs, between two evaluations


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Find a placement with little traffic, and bound what any can reach.

    Raises
    ------
    ProblemError
        The objective is another one, or slots are counted over the whole model.
    """
    kind = limits.options.get("bound", BOUNDS[0])
    if kind not in BOUNDS:
        raise InputError(f"bound {kind!r}", rule=f"one of {', '.join(BOUNDS)}")
    if problem.objective != CROSS or problem.whole_model:
        raise ProblemError(
            f"objective {problem.objective}",
            rule="search minimises the share of pairs that cross GPUs, layer by layer",
            hint="--dataflow context-coherent --objective cross",
        )
    return _Run(problem, limits, report).solve(kind)


class _Run:
    """One call of :func:`solve`."""

    def __init__(self, problem: Problem, limits: Limits, report: Report) -> None:
        self.problem, self.limits, self.report = problem, limits, report
        self.clock = Clock(limits)
        stats = problem.stats
        if stats.transition is None:
            raise ProblemError("the trace holds only counts", rule="traffic between layers needs tokens")
        self.pairs = stats.transition
        self.total = max(1, int(self.pairs.sum()))
        mean = stats.load.sum(axis=1) / problem.num_gpus
        cap = np.full(problem.num_layers, np.inf) if problem.load_cap is None else problem.load_cap * mean
        self.cap = None if problem.load_cap is None else cap
        self.instance = Instance.of(self.pairs, stats.load, cap, problem.num_gpus, slots=problem.num_slots)
        self.notes: list[str] = []

    def solve(self, kind: str) -> Solution:
        start = self._start()
        if self.instance.excess(start).any():
            return self._nothing(start)
        best = self._climb(start)
        placement = self._placement(best)
        value = objective_value(self.problem, placement)
        bound = self._bound(kind, value)
        proven = value <= bound * (1 + 1e-9)
        reached = not proven and self.limits.gap > 0 and (relative_gap(value, bound) or 0.0) <= self.limits.gap
        stopped = self.clock.stop_reason() if self.clock.over else StopReason.EXHAUSTED
        return Solution(
            placement=placement,
            objective=value,
            unit=UNITS[CROSS],
            bound=min(bound, value),
            status=Status.OPTIMAL if proven else Status.FEASIBLE,
            stop_reason=StopReason.PROVEN if proven else StopReason.GAP if reached else stopped,
            solver="search",
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=tuple(self.notes),
        )

    def _start(self) -> Ints:
        """Return the state to start from: the start that was given, EPLB's or a better balanced one, within the cap."""
        problem = self.problem
        given = problem.start
        if given is not None and (given.replicas() == 1).all() and not given.duplicates():
            state = self._state(given)
            if not self.instance.excess(state).any():
                return state
        load = problem.stats.load.astype(np.float64)
        slots = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
        placement = balance_global(load, slots)
        if self.instance.excess(self._state(placement)).any():
            floor = load_floor(problem) * load.sum(axis=1) / problem.num_gpus
            placement = pack_layers(
                load, placement, slots, floor=floor, kicks=KICKS, seed=self.limits.seed, stop=lambda: self.clock.over
            )
        return self._state(placement)

    def _state(self, placement: Placement) -> Ints:
        """``[layer, slot]`` GPUs of the experts, and of one expert of nothing for each empty slot."""
        problem = self.problem
        gpu = np.zeros((problem.num_layers, problem.num_slots), np.int64)
        spare = np.arange(problem.num_experts, problem.num_slots)
        for layer, slots in enumerate(placement.slots):
            where, _ = np.nonzero(slots != EMPTY)
            gpu[layer, slots[slots != EMPTY]] = where
            empty = problem.slots_per_gpu - np.bincount(where, minlength=problem.num_gpus)
            gpu[layer, spare] = np.repeat(np.arange(problem.num_gpus), empty)
        return gpu

    def _placement(self, state: Ints) -> Placement:
        problem = self.problem
        slots = np.full((problem.num_layers, problem.num_gpus, problem.max_slots), EMPTY, np.int64)
        for layer, row in enumerate(state[:, : problem.num_experts]):
            for gpu in range(problem.num_gpus):
                held = np.flatnonzero(row == gpu)
                slots[layer, gpu, : len(held)] = held
        return Placement(slots=slots, num_experts=problem.num_experts)

    def _climb(self, start: Ints) -> Ints:
        """Search briefly, so that a run that is cut has something, then with all the work."""
        best, limit = start, self.limits.time_limit_s * SHARE_OF_TIME
        for scale in (QUICK, 1.0):
            work = Work.of(self.instance, scale * self.limits.work)
            climb = Climb(
                self.instance, best, seed=self.limits.seed, threads=self.limits.threads, watch=self._watch(limit)
            )
            best = climb.run(work, self._improved)
            if climb.taken_back:
                many = f"{climb.taken_back} layers of annealed states could not be brought within the load cap by swaps"
                self.notes.append(f"{many}: they are the start's, and the best states may do without them")
            if self.clock.seconds > limit:
                self.notes.append(f"the time limit of {self.limits.time_limit_s:g} s cut the search short")
                break
        return best

    def _watch(self, limit: float) -> Callable[[float], bool]:
        def watch(share: float) -> bool:
            self.report.progress(share, 1.0, "searching")
            return self.clock.over or self.clock.seconds > limit

        return watch

    def _improved(self, source: str, state: Ints) -> None:
        placement = self._placement(state)
        load = float(max_over_mean(placement, self.problem.stats.load).mean())
        value = 1 - self.instance.stays(state) / max(1, int(self.instance.pairs.sum(dtype=np.int64)))
        self.report.improved(f"search, {source}", value, unit=UNITS[CROSS], figures={"load max/mean": load})

    def _bound(self, kind: str, value: float) -> float:
        """Return a lower bound on the share that crosses: the better of both kinds."""
        problem = self.problem
        best = cross_bound(problem)
        if problem.num_layers < 2 or problem.num_gpus < 2:
            return best
        if kind == "matching":
            kept = int(exact_matching(self.pairs, problem.max_slots).sum())
            return max(best, 1 - kept / self.total)
        if not problem.divides_evenly:
            self.notes.append("uneven or spare slots: the bound is that of matchings, without the load cap")
            return best
        size = 2 * problem.num_experts
        wanted = int(self.limits.work * SDP_WORK / ((problem.num_layers - 1) * size**3))
        steps = min(MOST_STEPS, max(LEAST_STEPS, wanted))
        sdp = ChainSDP(self.pairs, problem.stats.load, self.cap, problem.num_gpus, threads=self.limits.threads)
        before = best
        for taken, most in bounds(sdp, steps, max(5, steps // EVALUATIONS), lambda: self.clock.over):
            best = max(best, 1 - most / self.total)
            self.report.progress(taken, steps, f"bounding: at least {best:.4f} of pairs cross")
            if best >= value or (relative_gap(value, best) or 0.0) <= self.limits.gap:
                break
            if taken > steps // 2 and best - before < STALLED:
                break
            before = best
        return best

    def _nothing(self, start: Ints) -> Solution:
        """Return the solution where no start keeps the cap."""
        excess = self.instance.excess(start)
        worst = int(excess.argmax())
        name = self.problem.stats.meta.layer_ids[worst]
        ratio = self._ratio(start)
        return Solution(
            placement=None,
            objective=math.inf,
            unit=UNITS[CROSS],
            status=Status.UNKNOWN,
            stop_reason=self.clock.stop_reason() if self.clock.over else StopReason.EXHAUSTED,
            solver="search",
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=(
                f"no balanced start keeps the load cap in {int((excess > 0).sum())} layers; "
                f"the best found has max/mean {ratio[worst]:.4f} in layer {name}",
            ),
        )

    def _ratio(self, state: Ints) -> Floats:
        busy = self.instance.gpu_load(state)
        ratio: Floats = busy.max(axis=1) / busy.mean(axis=1)
        return ratio
