"""Replicas chosen for where tokens already go: the fewest GPUs per token under ``fewest-gpus`` routing.

With spare slots a token that needs two experts of different GPUs may find a copy of one beside the other. How many
copies each expert has, on which GPUs they are and where the others live is decided together, layer by layer, on the
exact number of GPUs that tokens visit (:mod:`moeplace.hypergraph.replicas`), within the load cap. Runs differ in how
far they may pass the cap while weights that decide between equals are not learnt; the best state that keeps it with
them is taken. The objective is the evaluator's own under the same routing: nothing is approximated in what is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moeplace.errors import ProblemError
from moeplace.fanout import expected_shares, learn_weights
from moeplace.frozen import Floats, Ints
from moeplace.hypergraph import Patterns
from moeplace.hypergraph.anneal import Annealer, Schedule
from moeplace.hypergraph.replicas import CopyAnnealer
from moeplace.hypergraph.thin import thinned, worth_thinning
from moeplace.objective import UNITS, objective_value
from moeplace.packing.once import packed_once
from moeplace.placement import EMPTY, Placement
from moeplace.problem import COPIES, GPU, Problem
from moeplace.routing import FEWEST, ReplicaTable
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason

DESCRIPTION = "replicas where tokens already go: the fewest GPUs per token with --routing fewest-gpus, within load caps"
USES_START = True
ROUTINGS = (FEWEST,)
OPTIONS: Mapping[str, str] = {"runs": "annealing runs of each layer (default: 6, times --work)"}
RUNS = 6
PROPOSALS = 45  # of each slot, at each temperature
CHOICES = 120  # of each expert in the sample that runs are annealed on while they are hot
HOT, WARM, COOL, COLD = 0.6, 0.06, 0.08, 0.01  # temperatures, in spreads of a random exchange
FIRST_PRICE, MID_PRICE = 0.05, 2.0  # of load above the cap, as in Schedule
HOT_TURNS, COOL_TURNS = 60, 20  # of a run on a sample and then on all
COOLED = 0.34  # of the runs, the best go on
START_TURNS = 60  # of the start without copies
MARGINS = (1.0, 1.01, 0.99, 1.005, 0.98, 1.02)  # of the cap, run by run
MET = 1e-9


@dataclass(frozen=True, slots=True)
class _Best:
    """The best state of a layer: its copies summed over tokens, its slots, and whether it keeps the cap."""

    copies: float
    slots: Ints
    within: bool

    def beats(self, other: _Best | None) -> bool:
        """Whether to take it instead."""
        if other is None or self.within != other.within:
            return other is None or self.within
        return self.copies < other.copies


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Choose replicas and places for the fewest copies on the wire.

    Raises
    ------
    ProblemError
        The objective or the routing is another one, slots are counted over the whole model, the trace holds only
        counts.
    """
    if problem.objective != COPIES or problem.copies_level != GPU or problem.whole_model:
        what = f"objective {problem.objective} of {problem.copies_level}s"
        rule, hint = "fanout minimises the GPUs that a token visits, layer by layer", "--objective copies"
        raise ProblemError(what, rule=rule, hint=hint)
    if problem.num_slots > problem.num_experts and problem.routing != FEWEST:
        raise ProblemError(
            f"{problem.routing} routing",
            rule="fanout places replicas for tokens that visit the fewest GPUs",
            hint=f"--routing {FEWEST}",
        )
    return _Run(problem, limits, report).solve()


class _Run:
    """One call of :func:`solve`."""

    def __init__(self, problem: Problem, limits: Limits, report: Report) -> None:
        self.problem, self.limits, self.report, self.clock = problem, limits, report, Clock(limits)
        load = problem.stats.load.astype(np.float64)
        self.load, self.mean = load, load.sum(axis=1) / problem.num_gpus
        cap = np.full(problem.num_layers, np.inf) if problem.load_cap is None else problem.load_cap
        self.cap = cap * self.mean
        sample = problem.stats.sample
        if sample is None:
            raise ProblemError("the trace holds only counts", rule="fanout needs to know what tokens chose together")
        self.experts = sample.experts
        self.runs = limits.whole("runs", max(1, round(RUNS * limits.work)), least=1)
        self.balanced = packed_once(
            load, problem.slots_per_gpu, self.cap, seed=limits.seed, stop=lambda: self.clock.over
        )

    def solve(self) -> Solution:
        problem, layers = self.problem, range(self.problem.num_layers)
        found: list[_Best] = []
        for layer, best in zip(layers, self._layers(), strict=True):
            found.append(best)
            name = problem.stats.meta.layer_ids[layer]
            told = f"layer {name}: {best.copies / len(self.experts):.4f} copies"
            self.report.progress(len(found), problem.num_layers, told)
        if not all(best.within for best in found):
            return self._nothing([layer for layer, best in zip(layers, found, strict=True) if not best.within])
        placement = Placement(slots=np.array([best.slots for best in found]), num_experts=problem.num_experts)
        return Solution(
            placement=placement,
            objective=objective_value(problem, placement),
            unit=UNITS[COPIES],
            status=Status.FEASIBLE,
            stop_reason=self.clock.stop_reason() if self.clock.over else StopReason.EXHAUSTED,
            solver="fanout",
            seed=self.limits.seed,
            history=tuple(self.report.history),
        )

    def _layers(self) -> Iterator[_Best]:
        """Solve every layer by itself, in threads; their number changes nothing."""
        with ThreadPoolExecutor(max(1, self.limits.threads)) as pool:
            yield from pool.map(self._layer, range(self.problem.num_layers))

    def _layer(self, layer: int) -> _Best:
        """The best of some runs, each from the fewest copies without replicas, or from the start that was given."""
        patterns = Patterns.of(self.experts[:, layer], self.problem.num_experts)
        annealer = CopyAnnealer(patterns, self.problem.slots_per_gpu)
        start = self._start(layer, patterns)
        best = self._judged(layer, start, annealer)
        given = self._given(layer)
        if given is not None and (offered := self._judged(layer, given, annealer)).beats(best):
            best, start = offered, given
        # patterns are of a sample: their loads are that share of the trace's
        scale = patterns.tokens * patterns.top_k / max(1.0, float(self.load[layer].sum()))
        cap, seed = self.cap[layer] * scale, self.limits.seed * 1009 + layer
        warm = [self._hot(annealer, start, cap, seed + 97 * run) for run in range(self.runs) if not self.clock.over]
        warm = sorted(warm, key=annealer.copies)[: max(1, math.ceil(self.runs * COOLED))]
        for run, state in enumerate(warm):
            if self.clock.over:
                break
            slots = self._cooled(annealer, state, cap * MARGINS[run % len(MARGINS)], seed + 97 * run)
            offered = self._judged(layer, slots, annealer)
            if offered.beats(best):
                best = offered
        return best

    def _hot(self, annealer: CopyAnnealer, start: Ints, cap: float, seed: int) -> Ints:
        """A state annealed while it is hot, on a sample of the tokens where these are many."""
        swaps, patterns = PROPOSALS * self.problem.num_slots, annealer.patterns
        hot = Schedule(turns=HOT_TURNS, swaps=swaps, hot=HOT, cold=WARM, first_price=FIRST_PRICE, last_price=MID_PRICE)
        if not worth_thinning(patterns, CHOICES):
            return annealer.run(start, cap, hot, seed, stop=self._over)
        few = thinned(patterns, seed, CHOICES)
        share = few.tokens / patterns.tokens
        sample = CopyAnnealer(few, annealer.room, patterns.load.astype(np.float64) * share)
        return sample.run(start, cap * share, hot, seed, stop=self._over)

    def _cooled(self, annealer: CopyAnnealer, state: Ints, cap: float, seed: int) -> Ints:
        """A state annealed from there on all tokens."""
        swaps = PROPOSALS * self.problem.num_slots
        cool = Schedule(turns=COOL_TURNS, swaps=swaps, hot=COOL, cold=COLD, first_price=MID_PRICE)
        return annealer.run(state, cap, cool, seed, stop=self._over)

    def _over(self) -> bool:
        return self.clock.over

    def _start(self, layer: int, patterns: Patterns) -> Ints:
        """``[GPU, slot]`` a layer without replicas: few copies, within the cap."""
        problem, group = self.problem, self.balanced.copies()[layer].argmax(axis=0)
        if not self.clock.over:
            annealer = Annealer(patterns, self.load[layer], self.cap[layer] * (1 + MET), problem.num_gpus)
            schedule = Schedule(turns=START_TURNS, swaps=64 * problem.num_experts)
            group, _ = annealer.run(group, schedule, self.limits.seed, stop=self._over)
        slots = np.full((problem.num_gpus, problem.max_slots), EMPTY, np.int64)
        for gpu in range(problem.num_gpus):
            held = np.flatnonzero(group == gpu)
            slots[gpu, : len(held)] = held
        return slots

    def _given(self, layer: int) -> Ints | None:
        """``[GPU, slot]`` of the start that was given, where it fits."""
        given, room = self.problem.start, self.problem.slots_per_gpu
        if given is None or given.duplicates() or (given.used_slots() > room).any():
            return None
        slots = np.full((self.problem.num_gpus, self.problem.max_slots), EMPTY, np.int64)
        for gpu, held in enumerate(given.slots[layer]):
            experts = held[held != EMPTY]
            slots[gpu, : len(experts)] = experts
        return slots

    def _judged(self, layer: int, slots: Ints, annealer: CopyAnnealer) -> _Best:
        """A state with its copies, and whether it keeps the cap under learnt weights."""
        table = ReplicaTable.of(Placement(slots=slots[None], num_experts=self.problem.num_experts)).of_layer(0)
        busy = self._busy(layer, table)
        return _Best(annealer.copies(slots), slots, bool((busy <= self.cap[layer] * (1 + MET)).all()))

    def _busy(self, layer: int, table: tuple[Ints, Ints, Ints]) -> Floats:
        """``[GPU]`` loads under learnt weights, as the evaluator has them."""
        tokens, gpus = self.experts[:, layer], self.problem.num_gpus
        patterns = Patterns.of(tokens, self.problem.num_experts)
        weight = learn_weights(tokens, table, gpus)
        served = expected_shares(patterns.experts, patterns.weight.astype(np.float64), table, weight, times=4)
        total = served.sum(axis=0)
        even = np.zeros(served.shape)
        for expert in np.flatnonzero(total == 0):
            even[table[1][expert, : table[2][expert]], expert] = 1.0
        share = np.where(total > 0, served, even) / np.where(total > 0, total, np.maximum(even.sum(axis=0), 1.0))
        busy: Floats = share @ self.load[layer]
        return busy

    def _nothing(self, layers: list[int]) -> Solution:
        names = ", ".join(str(self.problem.stats.meta.layer_ids[layer]) for layer in layers[:8])
        return Solution(
            placement=None,
            objective=float("inf"),
            unit=UNITS[COPIES],
            status=Status.UNKNOWN,
            stop_reason=self.clock.stop_reason() if self.clock.over else StopReason.EXHAUSTED,
            solver="fanout",
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=(f"no placement within the load cap was found in {len(layers)} layers: {names}",),
        )
