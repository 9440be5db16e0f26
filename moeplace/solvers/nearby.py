"""Replicas near the tokens that need them: the fewest copies sent to other nodes, nodes and copies decided together.

Tokens are served on their own node where it holds a copy (``--routing nearest`` or ``topology-aware``). Which experts
have copies, on which nodes these are and where the others live is one decision, layer by layer, on the exact number of
nodes that tokens are sent to (:mod:`moeplace.hypergraph.nearby`), within the load cap of every GPU. An expert has at
most one copy on a node: a second one there saves no traffic between nodes. At last experts change GPUs within their
node so that tokens visit few. GRACE-MoE (arXiv 2509.25041) decides the same in steps, groups first and copies of the
hottest after.

The bound counts a copy for every token that its own node does not cover (:mod:`moeplace.hypergraph.cover`). Homes are
taken to be spread evenly. Where the trace records them they still decide the objective, which is the evaluator's own,
and the bound is the general one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from moeplace.errors import ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.hypergraph import Patterns
from moeplace.hypergraph.anneal import Schedule
from moeplace.hypergraph.cover import most_covered
from moeplace.hypergraph.nearby import MOST_NODES, NodeAnnealer
from moeplace.hypergraph.pairs import pairs_of
from moeplace.hypergraph.split import settle_node, split_node
from moeplace.hypergraph.thin import thinned, worth_thinning
from moeplace.metrics import MOST_HOMES
from moeplace.objective import UNITS, load_ratio, objective_value
from moeplace.packing.eplb import slots_without_copies
from moeplace.packing.once import packed_once
from moeplace.placement import EMPTY, Placement
from moeplace.problem import REMOTE, Problem
from moeplace.routing import NEAREST, TOPOLOGY_AWARE, Router
from moeplace.solution import Clock, Limits, Report, Solution, Status, StopReason

DESCRIPTION = "replicas near the tokens that need them: fewest copies sent to other nodes, within load caps"
USES_START = True
ROUTINGS = (TOPOLOGY_AWARE, NEAREST)
OPTIONS: Mapping[str, str] = {
    "runs": "hot runs of each layer, the best of which is cooled (default: 3, times --work)",
    "extra": "most copies beyond one of each expert, in a layer (default: as many as slots hold)",
}
RUNS = 3
HOT = Schedule(turns=48, swaps=20, hot=0.6, cold=0.03, first_price=0.1)  # swaps for each slot
COLD = Schedule(turns=12, swaps=40, hot=0.03, cold=0.005, first_price=3.0)
MET = 1e-9


@dataclass(frozen=True, slots=True)
class _Best:
    """The best state of a layer: copies sent, summed over tokens, ``[GPU, slot]`` experts, whether it keeps the cap.

    ``least`` is a lower bound on what any state sends.
    """

    sent: float
    slots: Ints
    within: bool
    least: float = 0.0

    def beats(self, other: _Best) -> bool:
        """Whether to take it instead."""
        return self.sent < other.sent if self.within == other.within else self.within


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Choose replicas and places for the fewest copies sent between nodes.

    Raises
    ------
    ProblemError
        The objective or the routing is another one, slots are counted over the whole model, or there are more nodes
        than bits of a word.
    """
    if problem.objective != REMOTE or problem.whole_model or problem.stats.sample is None:
        raise ProblemError(
            f"objective {problem.objective}" + (", slots counted over the whole model" if problem.whole_model else ""),
            rule="nearby minimises copies sent to other nodes, layer by layer",
            hint="--objective remote",
        )
    if problem.num_slots > problem.num_experts and problem.routing not in ROUTINGS:
        raise ProblemError(
            f"{problem.routing} routing",
            rule="nearby places replicas for tokens that prefer their own node",
            hint=f"--routing {TOPOLOGY_AWARE}",
        )
    if problem.topology.num_nodes > MOST_NODES:
        raise ProblemError(f"{problem.topology.num_nodes} nodes", rule=f"nearby takes at most {MOST_NODES}")
    return _Run(problem, limits, report).solve()


class _Run:
    """One call of :func:`solve`."""

    def __init__(self, problem: Problem, limits: Limits, report: Report) -> None:
        self.problem, self.limits, self.report, self.clock = problem, limits, report, Clock(limits)
        self.load = problem.stats.load.astype(np.float64)
        self.mean = self.load.sum(axis=1) / problem.num_gpus
        cap = np.full(problem.num_layers, np.inf) if problem.load_cap is None else problem.load_cap
        self.cap = cap * self.mean
        sample = problem.stats.sample
        assert sample is not None
        self.experts = sample.experts
        self.recorded = sample.rank is not None
        # homes that are recorded, or only some of many, are not all alike to every token
        self.even = not self.recorded and problem.topology.num_nodes <= MOST_HOMES
        self.rooms = problem.slots_per_gpu.reshape(problem.topology.num_nodes, -1)
        self.runs = limits.whole("runs", max(1, round(RUNS * limits.work)), least=1)
        spare = problem.num_slots - problem.num_experts
        self.extra = min(spare, limits.whole("extra", spare))
        self.balanced = packed_once(
            self.load, problem.slots_per_gpu, self.cap, seed=limits.seed, stop=lambda: self.clock.over
        )

    def solve(self) -> Solution:
        problem = self.problem
        found: list[_Best] = []
        for best in self._layers():
            name = problem.stats.meta.layer_ids[len(found)]
            found.append(best)
            told = f"layer {name}: {best.sent / len(self.experts):.4f} copies to other nodes"
            self.report.progress(len(found), problem.num_layers, told)
        placement = Placement(slots=np.array([best.slots for best in found]), num_experts=problem.num_experts)
        within = all(best.within for best in found)
        value = objective_value(problem, placement)
        given = problem.start
        if given is not None and self._allowed(given) and (not within or objective_value(problem, given) < value):
            placement, within, value = given, True, objective_value(problem, given)
        bound = None
        if self.even:
            bound = min(value, sum(best.least for best in found) / (len(self.experts) * len(found)))
        ended = self.clock.stop_reason() if self.clock.over else StopReason.EXHAUSTED
        notes = ["homes were taken to be spread evenly; the trace records others"] if self.recorded else []
        if not within:
            bad = [problem.stats.meta.layer_ids[layer] for layer, best in enumerate(found) if not best.within]
            names = ", ".join(map(str, bad[:8]))
            notes = [f"no placement within the load cap was found in {len(bad)} layers: {names}"]
        return Solution(
            placement=placement if within else None,
            objective=value if within else float("inf"),
            unit=UNITS[REMOTE],
            bound=bound if within else None,
            status=Status.FEASIBLE if within else Status.UNKNOWN,
            stop_reason=ended,
            solver="nearby",
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=tuple(notes),
        )

    @property
    def _most(self) -> int:
        """Slots of a layer that may be in use."""
        return self.problem.num_experts + self.extra

    def _allowed(self, given: Placement) -> bool:
        problem, used = self.problem, given.used_slots()
        if given.duplicates() or (used > problem.slots_per_gpu).any() or (used.sum(axis=1) > self._most).any():
            return False
        return problem.load_cap is None or bool((load_ratio(problem, given) <= problem.load_cap * (1 + MET)).all())

    def _layers(self) -> Iterator[_Best]:
        """Solve every layer by itself, in threads; their number changes nothing."""
        with ThreadPoolExecutor(max(1, self.limits.threads)) as pool:
            yield from pool.map(self._layer, range(self.problem.num_layers))

    def _layer(self, layer: int) -> _Best:
        """The best of some runs, or the balanced start where none keeps the cap."""
        patterns = Patterns.of(self.experts[:, layer], self.problem.num_experts)
        annealer = NodeAnnealer(patterns, self.load[layer], self.rooms, self._most)
        together, start = pairs_of(patterns), self._start(layer)
        best = self._judged(layer, start, annealer)
        seed, cap = self.limits.seed * 1009 + layer, float(self.cap[layer])
        warm = best
        for run in range(self.runs):
            hot, own = annealer, seed + 97 * run
            if worth_thinning(patterns):
                hot = NodeAnnealer(thinned(patterns, own), annealer.load, annealer.rooms, self._most)
            warm = self._better(layer, warm, self._annealed(hot, start, cap, HOT, own), annealer)
        best = self._better(layer, warm, self._annealed(annealer, warm.slots, cap, COLD, seed), annealer)
        settled = self._judged(layer, self._settled(layer, best.slots, together), annealer)
        best = settled if settled.within or not best.within else best
        return best if self.clock.over or not self.even else replace(best, least=self._least(patterns))

    def _least(self, patterns: Patterns) -> float:
        """Copies that are sent at least, summed over tokens: one by each that its own node does not cover."""
        covered = most_covered(patterns, self.rooms.sum(axis=1), self.extra, stop=lambda: self.clock.over)
        return max(0.0, patterns.tokens - covered / len(self.rooms))

    def _better(self, layer: int, best: _Best, slots: Ints, annealer: NodeAnnealer) -> _Best:
        offered = self._judged(layer, slots, annealer)
        return offered if offered.beats(best) else best

    def _annealed(self, annealer: NodeAnnealer, slots: Ints, cap: float, schedule: Schedule, seed: int) -> Ints:
        """``[GPU, slot]`` a state annealed from another one; that itself once the clock is over."""
        if self.clock.over:
            return slots
        own = replace(schedule, swaps=schedule.swaps * self.problem.num_slots)
        return annealer.run(slots, cap, own, seed, stop=lambda: self.clock.over)

    def _start(self, layer: int) -> Ints:
        """``[GPU, slot]`` the start that was given, each expert once on a node, else the balanced one."""
        given = self.problem.start
        source = self.balanced if given is None or not self._allowed(given) else given
        slots = np.full((self.problem.num_gpus, self.problem.max_slots), EMPTY, np.int64)
        seen: set[tuple[int, int]] = set()
        for gpu, held in enumerate(source.slots[layer]):
            node = gpu // self.rooms.shape[1]
            experts = [int(expert) for expert in held if expert != EMPTY and (node, int(expert)) not in seen]
            seen.update((node, expert) for expert in experts)
            slots[gpu, : len(experts)] = experts
        return slots

    def _settled(self, layer: int, slots: Ints, together: Floats) -> Ints:
        """``[GPU, slot]`` every node's experts where tokens visit few of its GPUs; without a cap, load is evened."""
        problem, cap = self.problem, float(self.cap[layer])
        count = np.bincount(slots[slots != EMPTY], minlength=problem.num_experts)
        share = self.load[layer] / np.maximum(count, 1)
        settled = np.full(slots.shape, EMPTY, np.int64)
        for number, room in enumerate(self.rooms):
            gpus = range(number * len(room), (number + 1) * len(room))
            held = [slots[gpu][slots[gpu] != EMPTY] for gpu in gpus]
            experts = np.concatenate(held)
            state = np.repeat(np.arange(len(room)), [len(some) for some in held])
            inner, own = together[np.ix_(experts, experts)], share[experts]
            if math.isfinite(cap):
                state = settle_node(inner, own, cap, state, len(room), seed=self.limits.seed)
            elif len(experts):
                state = split_node(inner, own, cap, slots_without_copies(room, len(experts)), seed=self.limits.seed)
            for place, gpu in enumerate(gpus):
                there = np.sort(experts[state == place])
                settled[gpu, : len(there)] = there
        return settled

    def _judged(self, layer: int, slots: Ints, annealer: NodeAnnealer) -> _Best:
        """A state with what it sends, and whether it keeps the cap as the evaluator sees loads."""
        problem, load = self.problem, self.load[layer]
        alone = Placement(slots=slots[None], num_experts=problem.num_experts)
        busy = Router.of(alone, problem.topology, problem.routing, load[None]).gpu_share(problem.num_gpus)[0] @ load
        return _Best(annealer.sent(slots), slots, bool((busy <= self.cap[layer] * (1 + MET)).all()))
