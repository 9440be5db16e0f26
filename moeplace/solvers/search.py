"""Traffic between the GPUs of consecutive layers, at any size: annealing, recombination, and a certified bound.

Under context-coherent execution a token moves from expert to expert. What is minimised is the share of consecutive
pairs on different GPUs (or nodes), within a load cap for every layer; see :mod:`moeplace.chains` for the method and its
bounds. Or it is the predicted time of a step: then pairs cost what their way costs on the topology, by level (GPU,
node, leaf switch) or hop, experts weigh what they cost their GPU, and the cap on the busiest GPU is a choice: several
are tried with little work, the best one with all of it. At last GPUs are renamed (:mod:`moeplace.ranks`).
Where copies share tokens evenly the share of pairs that cross is linear in what each copy takes, so some copy of an
expert can take it all at no more crossing: without a load cap, copies gain nothing, every expert is placed once, and
spare slots are room. Within a cap, or where the busiest GPU's work is paid for, copies let experts keep together that
are too hot to otherwise: spare slots then hold what copies pay (:mod:`moeplace.cloning`), starting from the best
placement without, so that the answer is never worse than that one. Bounds hold for all copies that slots allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from moeplace.bounds import cross_bound, load_floor, step_time_bound
from moeplace.chains import Climb, Work
from moeplace.chains.clones import Chain
from moeplace.chains.duals import exact_matching
from moeplace.chains.sdp import ChainSDP, bounds
from moeplace.cloning import Cloning, starts
from moeplace.compute import ExpertCompute
from moeplace.errors import InputError, ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.metrics import max_over_mean
from moeplace.objective import UNITS, copy_costs, objective_value
from moeplace.packing import pack_layers
from moeplace.packing.eplb import balance_global, slots_without_copies
from moeplace.placement import EMPTY, Placement
from moeplace.problem import CONTEXT_COHERENT, CROSS, GPU, NODE, STEP_TIME, Problem
from moeplace.ranks import rename_gpus
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason, relative_gap

DESCRIPTION = "least traffic between GPUs at any size: annealed, recombined, within load caps, with a certified bound"
USES_START = True
BOUNDS = ("sdp", "matching")
OPTIONS: Mapping[str, str] = {
    "bound": "sdp (default: tight, takes most of the time at 256 experts) or matching (weak, in seconds)",
    "copies": "fill (default: copies in spare slots where a load cap or step time makes them pay) or none",
}
COPIES = ("fill", "none")
QUICK = 0.03  # work of a first, short search
SHARE_OF_TIME = 0.6  # of a time limit that the search may take
KICKS = 100
SDP_WORK = 1.2e12  # multiplications of eigenvectors, at work 1
MOST_STEPS, LEAST_STEPS, EVALUATIONS = 400, 10, 8
STALLED = 2e-5  # of all pairs, between two evaluations; twice ends the bounding
SLACKS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, math.inf)  # of the busiest GPU's work, above the balanced one's
SCAN = 0.08  # work of the search under each
COPIES_CAPS = (0.0, 0.2, 0.6, 1.0)  # of the work that copies can take off the busiest GPU, what a cap takes off
TRIES = 300  # exchanges of ranks on direct networks


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
    moving = problem.objective == STEP_TIME and problem.dataflow == CONTEXT_COHERENT and not problem.is_sampled
    if not (problem.objective == CROSS or moving) or problem.whole_model:
        raise ProblemError(
            f"objective {problem.objective} with {problem.dataflow} execution",
            rule="search minimises pairs that cross GPUs, or step time where tokens move from expert to expert",
            hint="--dataflow context-coherent, with --objective cross or step-time",
        )
    return _Run(problem, limits, report).solve(kind)


class _Run:
    """One call of :func:`solve`."""

    def __init__(self, problem: Problem, limits: Limits, report: Report) -> None:
        self.problem, self.limits, self.report = problem, limits, report
        self.clock, self.notes = Clock(limits), list[str]()
        stats = problem.stats
        if stats.transition is None:
            raise ProblemError("the trace holds only counts", rule="traffic between layers needs tokens")
        self.pairs = stats.transition
        self.total = max(1, int(self.pairs.sum()))
        self.timed = problem.objective == STEP_TIME
        once = np.ones((problem.num_layers, problem.num_experts), np.int64)
        self.load = self._weigh(once)
        mean = self.load.sum(axis=1) / problem.num_gpus
        self.cap = np.full(problem.num_layers, np.inf) if problem.load_cap is None else problem.load_cap * mean
        self.chain = Chain(
            pairs=self.pairs,
            weigh=self._weigh,
            cap=self.cap,
            slots_per_gpu=problem.slots_per_gpu,
            cost=_ways(problem),
        )
        self.alone = np.full((problem.num_layers, problem.num_slots), EMPTY, np.int64)
        self.alone[:, : problem.num_experts] = np.arange(problem.num_experts)
        self.instance = self.chain.instance(self.alone)
        self.copying = self._copies_may_pay()
        self.limit_s = limits.time_limit_s * (1.0 if self.timed else SHARE_OF_TIME) * (0.5 if self.copying else 1.0)

    def _weigh(self, count: Ints) -> Floats:
        """``[layer, expert]`` load of one copy of each expert: tokens, or what it costs its GPU in µs."""
        problem = self.problem
        if self.timed and problem.load_cap is None:
            return _work(problem, self.pairs, count)
        load: Floats = problem.stats.load / count
        return load

    def _copies_may_pay(self) -> bool:
        """Whether copies are tried: slots are spare, copies share evenly, and load has a cap or a price."""
        problem, wanted = self.problem, self.limits.options.get("copies", COPIES[0])
        if wanted not in COPIES:
            raise InputError(f"copies {wanted!r}", rule=f"one of {', '.join(COPIES)}")
        priced = self.timed or problem.load_cap is not None
        if wanted == "none" or not priced or problem.num_slots == problem.num_experts or problem.num_gpus < 2:
            return False
        if not problem.shares_evenly:
            self.notes.append(f"experts are placed once: copies would have to share evenly, not {problem.routing}")
        return problem.shares_evenly

    def solve(self, kind: str) -> Solution:
        start = self._start()
        best: Placement | None = None
        if not self.instance.excess(start).any():
            best = self._sweep(start) if self.timed else self._placement(self._climb(start))
        if self.copying:
            self.limit_s *= 2
            best = self._copied(best)
        if best is None:
            return self._nothing(start)
        tries = max(1, round(TRIES * self.limits.work))
        placement = rename_gpus(self.problem, best, seed=self.limits.seed, tries=tries, stop=lambda: self.clock.over)
        value = objective_value(self.problem, placement)
        bound = self._time_bound() if self.timed else self._crossing_bound(kind, self.problem, value)
        proven = value <= bound * (1 + 1e-9)
        reached = not proven and self.limits.gap > 0 and (relative_gap(value, bound) or 0.0) <= self.limits.gap
        stopped = self.clock.stop_reason() if self.clock.over else StopReason.EXHAUSTED
        return Solution(
            placement=placement,
            objective=value,
            unit=UNITS[self.problem.objective],
            bound=min(bound, value),
            status=Status.OPTIMAL if proven else Status.FEASIBLE,
            stop_reason=StopReason.PROVEN if proven else StopReason.GAP if reached else stopped,
            solver="search",
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=tuple(self.notes),
        )

    def _sweep(self, start: Ints) -> Placement:
        """Search under several caps on the busiest GPU's work, then on under the best; return the least step time."""
        given = self._given()
        best, cap = self._scan(self._placement(start), SLACKS, SCAN)
        self.instance = replace(self.chain, cap=cap).instance(self.alone)
        last = self._placement(self._climb(self._state(best), (1.0,)))
        options = [last, best] if given is None else [last, best, self._placement(given)]
        return min(options, key=lambda placement: objective_value(self.problem, placement))

    def _scan(self, start: Placement, slacks: Sequence[float], work: float) -> tuple[Placement, Floats]:
        """Search from a balanced placement under caps more and more slack; the least step time, and under which cap."""
        balanced = self.chain.gpu_load(start).max(axis=1)
        expert, state = self.chain.items(start)
        best, kept, value = start, balanced, objective_value(self.problem, start)
        for slack in slacks:
            if self.clock.over:
                break
            cap = np.minimum(self.cap, balanced * (1 + slack))
            self.instance = replace(self.chain, cap=cap).instance(expert)
            state = self._climb(state, (work,), expert)
            placement = self.chain.placement(expert, state)
            if (now := objective_value(self.problem, placement)) < value:
                best, value, kept = placement, now, cap
        return best, np.minimum(self.cap, kept)

    def _copied(self, best: Placement | None) -> Placement | None:
        """Return the best placement with copies, or the given one without where that is not better."""
        problem, limits = self.problem, self.limits
        found = [] if best is None else [best]
        given = self._start_that_fits()
        first = [] if given is None else [given]
        caps = [self.cap]
        if self.timed and best is not None:
            first.append(self._evenest())
            found += [one for one in first if self.chain.keeps_cap(one).all()]
            busiest, reach = (self.chain.gpu_load(one).max(axis=1) for one in (best, first[-1]))
            above = np.maximum(0.0, busiest - reach)
            caps = [np.minimum(self.cap, busiest - above * share) for share in COPIES_CAPS]
        for i, cap in enumerate(caps):
            chain = replace(self.chain, cap=cap)
            kicks = KICKS if problem.load_cap is not None else 0  # µs are not shared as tokens are
            options = starts(chain, self.load, cap, kicks=kicks, seed=limits.seed, stop=lambda: self.clock.over)
            options += first
            if self.timed and best is not None:
                options = [chain.patched(option, best) for option in options]
            watch = self._watch(self.limit_s * (0.5 + 0.5 * (i + 1) / len(caps)))
            told = found.append if self.timed else lambda _: None

            def improved(source: str, placement: Placement, told: Callable[[Placement], None] = told) -> None:
                told(placement)
                self._told(source, placement)

            cloning = Cloning(chain, seed=limits.seed, threads=limits.threads, watch=watch, improved=improved)
            if (last := cloning.run(best, options, limits.work / len(caps))) is not None:
                found.append(last)
        return min(found, key=lambda placement: objective_value(problem, placement), default=None)

    def _evenest(self) -> Placement:
        """Return a placement whose copies fill all slots and balance tokens as far as that goes."""
        problem, load = self.problem, self.problem.stats.load.astype(np.float64)
        floor, slots = load_floor(problem) * load.sum(axis=1) / problem.num_gpus, problem.slots_per_gpu
        start, seed = balance_global(load, slots), self.limits.seed
        return pack_layers(load, start, slots, floor=floor, kicks=KICKS, seed=seed, stop=lambda: self.clock.over)

    def _start(self) -> Ints:
        """Return the state to start from: the start that was given, EPLB's or a better balanced one, within the cap."""
        problem = self.problem
        given = self._given()
        if given is not None and not self.timed:
            return given
        load = self.load
        slots = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
        placement = balance_global(load, slots)
        if self.timed or self.instance.excess(self._state(placement)).any():
            least = 1.0 if self.timed else load_floor(problem)
            floor = least * load.sum(axis=1) / problem.num_gpus
            placement = pack_layers(
                load, placement, slots, floor=floor, kicks=KICKS, seed=self.limits.seed, stop=lambda: self.clock.over
            )
        return self._state(placement)

    def _given(self) -> Ints | None:
        """Return the start that was given, where it has no copies and keeps the cap."""
        given = self._start_that_fits()
        if given is None or (given.replicas() != 1).any():
            return None
        state = self._state(given)
        return None if self.instance.excess(state).any() else state

    def _start_that_fits(self) -> Placement | None:
        """Return the start that was given, its slots as many as the problem's; None where it breaks their rules."""
        given = self.problem.start
        if given is None or given.duplicates() or (given.used_slots() > self.problem.slots_per_gpu).any():
            return None
        return self.chain.placement(*self.chain.items(given))

    def _state(self, placement: Placement) -> Ints:
        """``[layer, slot]`` GPUs of the experts, and of one expert of nothing for each empty slot."""
        return self.chain.items(placement)[1]

    def _placement(self, state: Ints) -> Placement:
        return self.chain.placement(self.alone, state)

    def _climb(self, start: Ints, scales: tuple[float, ...] = (QUICK, 1.0), expert: Ints | None = None) -> Ints:
        """Search briefly, so that a run that is cut has something, then with all the work."""
        best, limit = start, self.limit_s
        items = self.alone if expert is None else expert
        for scale in scales:
            work = Work.of(self.instance, scale * self.limits.work)
            climb = Climb(
                self.instance, best, seed=self.limits.seed, threads=self.limits.threads, watch=self._watch(limit)
            )
            best = climb.run(work, lambda source, state: self._told(source, self.chain.placement(items, state)))
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

    def _told(self, source: str, placement: Placement) -> None:
        problem = self.problem
        load = float(max_over_mean(placement, problem.stats.load).mean())
        value = objective_value(problem, placement)
        self.report.improved(f"search, {source}", value, unit=UNITS[problem.objective], figures={"load max/mean": load})

    def _time_bound(self) -> float:
        """Lower bound on the step time: what must cross GPUs and nodes by the better of degrees and the SDP."""
        problem = self.problem
        crossing: dict[str, float] = {}
        if problem.num_layers > 1 and problem.num_gpus > 1:
            levels = (GPU, NODE) if problem.topology.num_nodes > 1 else (GPU,)
            for level in levels:
                share = self._crossing_bound(
                    "sdp", problem.replace(objective=CROSS, copies_level=level), 1.0, len(levels)
                )
                crossing[level] = share * self.total
        return step_time_bound(problem, crossing)

    def _crossing_bound(self, kind: str, problem: Problem, value: float, parts: int = 1) -> float:
        """Return a lower bound on the share that crosses: the better of both kinds, with a part of the work."""
        groups, slots = problem.levelled
        best = cross_bound(problem)
        if problem.num_layers < 2 or groups < 2:
            return best
        if kind == "matching":
            kept = int(exact_matching(self.pairs, slots).sum())
            return max(best, 1 - kept / self.total)
        if (problem.slots_per_gpu != problem.max_slots).any():
            self.notes.append("GPUs have unlike slots: the bound is that of matchings, without the load cap")
            return best
        size = 2 * problem.num_slots
        wanted = int(self.limits.work * SDP_WORK / ((problem.num_layers - 1) * size**3 * parts))
        steps = min(MOST_STEPS, max(LEAST_STEPS, wanted))
        cap = None
        if problem.load_cap is not None:
            cap = problem.load_cap * self.problem.stats.load.sum(axis=1) / groups
        spare = problem.num_slots - problem.num_experts
        pairs = np.pad(self.pairs, ((0, 0), (0, spare), (0, spare)))
        load = np.pad(problem.stats.load, ((0, 0), (0, spare)))
        # without a cap no copies cross less than experts placed once
        once = spare == 0 or cap is None
        sdp = ChainSDP(pairs, load, cap, groups, threads=self.limits.threads, once=once)
        before, stalled = best, 0
        for taken, most in bounds(sdp, steps, max(5, steps // EVALUATIONS), lambda: self.clock.over):
            best = max(best, 1 - most / self.total)
            self.report.progress(taken, steps, f"bounding: at least {best:.4f} of pairs cross")
            if best >= value or (relative_gap(value, best) or 0.0) <= self.limits.gap:
                break
            stalled = stalled + 1 if best - before < STALLED else 0
            if taken > steps // 2 and stalled > 1:
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
            unit=UNITS[self.problem.objective],
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


def _ways(problem: Problem) -> Floats | None:
    """``[GPU, next GPU]`` what a pair costs by its way; None where all ways between GPUs cost the same."""
    if problem.objective == STEP_TIME:
        ways: Floats = 1 / problem.topology.pair_bandwidth_gb_per_s()
        return ways
    if problem.copies_level != NODE:
        return None
    node = problem.topology.node_of_gpu()
    return (node[:, None] != node[None, :]).astype(np.float64)


def _work(problem: Problem, pairs: Ints, count: Ints) -> Floats:
    """``[layer, expert]`` µs a copy costs its GPU in the mean step: computing its rows, and moving its tokens.

    A GPU's compute is the larger of reading weights and arithmetic; in each layer that of all experts placed once
    decides which one is meant. Tokens that come and go are moved at the mean cost of a way, as if experts were
    anywhere.
    """
    model, topology = problem.model, problem.topology
    compute = ExpertCompute.of(model, topology.accelerator, problem.law.phase)
    memory, arithmetic = copy_costs(problem, np.ones_like(count), compute)
    heavier = memory.sum(axis=1, keepdims=True) >= arithmetic.sum(axis=1, keepdims=True)
    memory, arithmetic = copy_costs(problem, count, compute)
    moved = np.zeros(count.shape)
    moved[:-1] += pairs.sum(axis=2)
    moved[1:] += pairs.sum(axis=1)
    us_of_pair = 1e-3 * model.bytes_per_copy_dispatch * float((1 / topology.pair_bandwidth_gb_per_s()).mean())
    share = problem.law.step_tokens / problem.stats.num_tokens / 2  # what comes and what goes overlap
    work: Floats = np.where(heavier, memory, arithmetic) + moved / count * share * us_of_pair
    return work
