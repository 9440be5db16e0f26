"""The fewest copies on the wire under dispatch–combine, proved layer by layer by set partitioning.

A token costs one copy on every GPU (or node) that holds some of its experts, so each layer is a problem of its own:
partition its experts into one set per GPU. See :mod:`moeplace.hypergraph` for the method. Experts are placed once:
where slots are spare they stay empty.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moeplace.bounds import load_floor, objective_bound
from moeplace.errors import InputError, ProblemError
from moeplace.frozen import Ints
from moeplace.hypergraph import Effort, Found, Layer, LayerSearch, Patterns, default_steps, split_nodes
from moeplace.hypergraph.names import named_after_homes
from moeplace.hypergraph.workers import work_layers
from moeplace.objective import UNITS, objective_value
from moeplace.packing import pack_layers
from moeplace.packing.eplb import balance_global, slots_without_copies
from moeplace.placement import EMPTY, Placement
from moeplace.problem import COPIES, Problem
from moeplace.solution import Clock, Limits, Report, Solution, Stage, Status, StopReason

DESCRIPTION = "the fewest GPUs or nodes a token's experts touch, within load caps, proved layer by layer"
USES_START = True
MODES = ("prove", "fast")
OPTIONS: Mapping[str, str] = {
    "mode": "prove (default) or fast: stop at a gap of 0.5 % and spend little on closing it",
    "node-cap": "most max/mean load of a node with --copies-level node (default: what the load cap implies)",
}
FAST_GAP = 0.005
KICKS = 100
LARGE = 128  # experts from which annealing gets the time of its quadratic tables
NODE_MARGINS = (1.0, 0.5, 0.25)  # of the room that a cap leaves nodes, until their GPUs can keep it too


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Find the placement of fewest copies within the caps, and bound what any can reach.

    Raises
    ------
    ProblemError
        The objective is another one, slots are counted over the whole model, or the trace holds only counts.
    """
    mode = limits.options.get("mode", MODES[0])
    if mode not in MODES:
        raise InputError(f"mode {mode!r}", rule=f"one of {', '.join(MODES)}")
    if problem.objective != COPIES or problem.whole_model or problem.stats.sample is None:
        raise ProblemError(
            f"objective {problem.objective}",
            rule="setpart minimises the copies of a token, layer by layer",
            hint="--objective copies",
        )
    return _Run(problem, limits, report, mode).solve()


def _node_cap(limits: Limits) -> float:
    text = limits.options.get("node-cap")
    if text is None:
        return math.inf
    try:
        cap = float(text)
        if cap >= 1:
            return cap
    except ValueError:
        pass
    raise InputError(f"node-cap {text!r}", rule="a number of at least 1")


def _effort(mode: str, limits: Limits, experts: int) -> Effort:
    """Work of a layer: deterministic, from the instance and ``limits.work``."""
    work, large = limits.work, experts >= LARGE
    effort = Effort(
        columns=max(200, round(20_000 * work)),
        nodes=max(1, round(4000 * work)),
        rounds=max(5, round(200 * work)),
        runs=max(1, round((1 if large else 8) * work)),
        thin_runs=max(1, round((2 if large else 24) * work)),
        swaps=192,
        gap=limits.gap,
        steps=default_steps(experts, work),
    )
    if mode == MODES[0]:
        return effort
    return Effort(
        columns=min(effort.columns, 2500),
        nodes=min(effort.nodes, 200),
        rounds=min(effort.rounds, 60),
        runs=max(1, effort.runs // 3),
        thin_runs=max(1, effort.thin_runs // 3),
        swaps=64,
        gap=max(FAST_GAP, limits.gap),
        steps=effort.steps // 4,
    )


@dataclass(slots=True)
class _Job:
    """A layer under way: its search, what it had found when last looked at, ``[expert]`` GPUs once nodes are split."""

    search: LayerSearch
    found: Found
    gpu: Ints | None = None
    failed: BaseException | None = None


class _Run:
    """One call of :func:`solve`."""

    def __init__(self, problem: Problem, limits: Limits, report: Report, mode: str) -> None:
        self.problem, self.limits, self.report = problem, limits, report
        self.clock = Clock(limits)
        self.abandoned = threading.Event()
        self.rooms = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
        self.by_node = problem.copies_level == "node"
        load = problem.stats.load.astype(np.float64)
        mean = load.sum(axis=1) / problem.num_gpus
        cap = np.full(problem.num_layers, math.inf) if problem.load_cap is None else problem.load_cap * mean
        self.load, self.cap, self.mean = load, cap, mean
        self.node_cap = _node_cap(limits) if self.by_node else math.inf
        self.effort = _effort(mode, limits, problem.num_experts)
        self.notes: list[str] = []

    def solve(self) -> Solution:
        spare = self.problem.num_slots > self.problem.num_experts
        if spare:
            self.notes.append(
                "spare slots stay empty and experts are spread as evenly as slots allow: the bound is not that of "
                "placements that copy experts or fill GPUs unevenly"
            )
        start = self._start()
        jobs = self._jobs(start)
        self._work(jobs, start)
        for job in jobs:
            job.found = job.search.found
            if job.failed is not None:
                raise job.failed
        if not spare and any(job.found.infeasible for job in jobs):
            return self._nothing(jobs, Status.INFEASIBLE)
        states = [self._state(job, start, layer) for layer, job in enumerate(jobs)]
        if any(state is None for state in states):
            return self._nothing(jobs, Status.UNKNOWN)
        return self._solution(jobs, self._named(np.array(states)), proves=not spare)

    def _named(self, state: Ints) -> Ints:
        """``[layer, expert]`` GPUs with the names that keep most copies at home, where homes are recorded."""
        sample, node = self.problem.stats.sample, self.problem.topology.node_of_gpu()
        assert sample is not None
        free = node if self.by_node else np.zeros_like(node)
        named, notes = named_after_homes(sample.experts, sample.rank, state, self.rooms, free)
        self.notes += notes
        return named

    def _start(self) -> Ints:
        """``[layer, expert]`` GPUs of the start that was given, else of EPLB's packing or a better balanced one."""
        problem, layers = self.problem, np.arange(self.problem.num_layers)
        given = problem.start
        if given is not None and (given.replicas() == 1).all() and not given.duplicates():
            held = given.copies()
            if (held.sum(axis=2) == self.rooms).all() and self._within(held.argmax(axis=1)).all():
                return held.argmax(axis=1)
        placement = balance_global(self.load, self.rooms)
        state = placement.copies().argmax(axis=1)
        over = ~self._within(state)
        if over.any():
            floor = load_floor(problem) * self.mean
            floor = np.maximum(floor, np.where(np.isfinite(self.cap), self.cap, 0.0))
            placement = pack_layers(
                self.load, placement, self.rooms, floor=floor, kicks=KICKS, seed=self.limits.seed,
                stop=lambda: self.clock.over,
            )  # fmt: skip
            state[layers[over]] = placement.copies().argmax(axis=1)[over]
        return state

    def _within(self, state: Ints) -> npt.NDArray[np.bool_]:
        """``[layer]`` whether GPUs keep the cap."""
        busy = np.array([np.bincount(row, load, len(self.rooms)) for row, load in zip(state, self.load, strict=True)])
        within: npt.NDArray[np.bool_] = np.all(busy <= self.cap[:, None] * (1 + 1e-9), axis=1)
        return within

    def _jobs(self, start: Ints) -> list[_Job]:
        searches = [self._search(layer, start, 1.0) for layer in range(self.problem.num_layers)]
        return [_Job(search, search.found) for search in searches]

    def _search(self, layer: int, start: Ints, margin: float) -> LayerSearch:
        """The search of a layer; ``margin`` is the share of the room that the cap leaves nodes."""
        problem, sample = self.problem, self.problem.stats.sample
        assert sample is not None
        patterns = Patterns.of(sample.experts[:, layer], problem.num_experts)
        rooms, cap, state = self.rooms, float(self.cap[layer]), start[layer]
        if self.by_node:
            size = problem.topology.gpus_per_node
            rooms = rooms.reshape(-1, size).sum(axis=1)
            even = float(self.mean[layer]) * size
            cap = min(cap * size, self.node_cap * even)
            cap = even + (cap - even) * margin if math.isfinite(cap) else cap
            state = balance_global(self.load[layer][None], rooms).copies()[0].argmax(axis=0)
        instance = Layer(patterns=patterns, load=self.load[layer], cap=cap, rooms=rooms)
        search = LayerSearch(instance, self.effort, self.limits.seed + 7919 * layer, self._over, self._seconds)
        if instance.keeps_cap(state):
            search.offer(state)
        return search

    def _over(self) -> bool:
        return self.clock.over or self.abandoned.is_set()

    def _seconds(self) -> float:
        return self.clock.left_s

    def _work(self, jobs: list[_Job], start: Ints) -> None:
        """A glance at every layer, so that a stop finds none untouched; then each to its end."""

        def glance(layer: int) -> None:
            self._guarded(jobs[layer], jobs[layer].search.glance)

        def search(layer: int) -> None:
            self._guarded(jobs[layer], lambda: self._layer(jobs[layer], layer, start))

        threads = self.limits.threads
        work_layers(len(jobs), glance, self.clock, threads=threads, ended=lambda layer, done: None)
        work_layers(len(jobs), search, self.clock, threads=threads, ended=lambda *told: self._tell(jobs, *told))
        self.abandoned.set()

    def _guarded(self, job: _Job, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # told to the caller in its own thread
            job.failed = error

    def _layer(self, job: _Job, layer: int, start: Ints) -> None:
        job.search.run()
        if self.by_node and job.search.found.group is not None:
            job.gpu = self._split(job, layer, start)

    def _split(self, job: _Job, layer: int, start: Ints) -> Ints | None:
        """Split nodes over GPUs; where these cannot keep the cap, try nodes with less load."""
        rooms = self.rooms.reshape(-1, self.problem.topology.gpus_per_node)
        search = job.search
        for margin in NODE_MARGINS:
            if margin < 1:
                search = self._search(layer, start, margin)
                search.run()
            node = search.found.group
            if node is None:
                continue
            gpu = split_nodes(
                search.layer.patterns, self.load[layer], float(self.cap[layer]), node, rooms, seed=self.limits.seed,
                stop=self._over,
            )  # fmt: skip
            if (np.bincount(gpu, self.load[layer], len(self.rooms)) <= self.cap[layer] * (1 + 1e-9)).all():
                job.search.found = replace(job.search.found, group=node, value=search.found.value)
                return gpu
        return None

    def _tell(self, jobs: list[_Job], layer: int, done: int) -> None:
        for job in jobs:
            job.found = job.search.found
        found, tokens = jobs[layer].found, jobs[layer].search.layer.patterns.tokens
        name = self.problem.stats.meta.layer_ids[layer]
        gap = 0.0 if found.group is None else 100 * (found.value - found.bound) / found.value
        what = f"layer {name}: {found.value / tokens:.4f} copies, gap {gap:.2f} %"
        self.report.progress(done, len(jobs), what)
        if done == len(jobs) or done % max(1, len(jobs) // 4) == 0:
            value, bound = self._value(jobs), self._bound(jobs)
            if math.isfinite(value):
                source = f"setpart, {done} of {len(jobs)} layers"
                self.report.improved(source, value, bound=min(value, bound), unit=UNITS[COPIES])

    def _value(self, jobs: list[_Job]) -> float:
        """Copies per token, mean over layers."""
        return sum(job.found.value for job in jobs) / self._cells(jobs)

    def _cells(self, jobs: list[_Job]) -> int:
        return sum(job.search.layer.patterns.tokens for job in jobs)

    def _state(self, job: _Job, start: Ints, layer: int) -> Ints | None:
        """``[expert]`` GPUs of a layer: those found, else of the start where it keeps the cap."""
        if job.gpu is not None:
            return job.gpu
        if not self.by_node and job.found.group is not None:
            return job.found.group
        within = bool(self._within(start)[layer])
        return start[layer] if within else None

    def _placement(self, state: Ints) -> Placement:
        problem = self.problem
        slots = np.full((problem.num_layers, problem.num_gpus, problem.max_slots), EMPTY, np.int64)
        for layer, row in enumerate(state):
            for gpu in range(problem.num_gpus):
                held = np.flatnonzero(row == gpu)
                slots[layer, gpu, : len(held)] = held
        return Placement(slots=slots, num_experts=problem.num_experts)

    def _bound(self, jobs: list[_Job]) -> float:
        """Mean over layers of their bounds, in copies per token."""
        return max(objective_bound(self.problem), sum(job.found.bound for job in jobs) / self._cells(jobs))

    def _solution(self, jobs: list[_Job], state: Ints, *, proves: bool) -> Solution:
        placement = self._placement(state)
        value = objective_value(self.problem, placement)
        bound = min(value, self._bound(jobs)) if proves else None
        proved = bound is not None and value <= bound * (1 + 1e-9)
        cut = self.clock.over and not all(job.found.done for job in jobs)
        reached = any(not job.found.proved for job in jobs) and self.effort.gap > 0
        within = bound is not None and value - bound <= self.effort.gap * value
        reason = StopReason.EXHAUSTED
        if proved:
            reason = StopReason.PROVEN
        elif cut:
            reason = self.clock.stop_reason()
        elif reached and within:
            reason = StopReason.GAP
        if proves:
            self._note_layers(jobs)
        return Solution(
            placement=placement,
            objective=value,
            unit=UNITS[COPIES],
            bound=bound,
            status=Status.OPTIMAL if proved else Status.FEASIBLE,
            stop_reason=reason,
            solver="setpart",
            seed=self.limits.seed,
            stages=tuple(self._stages(jobs)) if proves else (),
            history=tuple(self.report.history),
            notes=tuple(self.notes),
        )

    def _note_layers(self, jobs: list[_Job]) -> None:
        open_layers = [number for number, job in enumerate(jobs) if not job.found.proved]
        if open_layers and len(open_layers) < len(jobs):
            names = ", ".join(str(self.problem.stats.meta.layer_ids[number]) for number in open_layers[:8])
            more = "" if len(open_layers) <= 8 else ", …"
            self.notes.append(f"{len(jobs) - len(open_layers)} of {len(jobs)} layers are proved, not {names}{more}")

    def _stages(self, jobs: list[_Job]) -> list[Stage]:
        """One stage a layer: its own copies per token, bound and status."""
        told = []
        for number, job in enumerate(jobs):
            found, tokens = job.found, job.search.layer.patterns.tokens
            stopped = StopReason.EXHAUSTED if job.found.done else self.clock.stop_reason()
            told.append(
                Stage(
                    name=f"layer {self.problem.stats.meta.layer_ids[number]}",
                    objective=found.value / tokens,
                    bound=min(found.value, found.bound) / tokens,
                    unit=UNITS[COPIES],
                    status=Status.OPTIMAL if found.proved else Status.FEASIBLE,
                    stop_reason=StopReason.PROVEN if found.proved else stopped,
                )
            )
        return told

    def _nothing(self, jobs: list[_Job], status: Status) -> Solution:
        """The solution where no placement keeps the cap, or none was found."""
        bad = [number for number, job in enumerate(jobs) if job.found.infeasible or job.found.group is None]
        names = ", ".join(str(self.problem.stats.meta.layer_ids[number]) for number in bad[:8])
        proved = status is Status.INFEASIBLE
        note = "no partition keeps the load cap" if proved else "no partition within the load cap was found"
        return Solution(
            placement=None,
            objective=math.inf,
            unit=UNITS[COPIES],
            status=status,
            stop_reason=StopReason.PROVEN
            if proved
            else (self.clock.stop_reason() if self.clock.over else StopReason.EXHAUSTED),
            solver="setpart",
            seed=self.limits.seed,
            history=tuple(self.report.history),
            notes=(*self.notes, f"{note} in {len(bad)} layers: {names}"),
        )
