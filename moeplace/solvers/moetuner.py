"""MoETuner: balance the load of every layer by one integer programme, then place the clusters by another.

ILP1 groups the experts of each layer into one cluster per GPU with the least deviation from the mean load; ILP2 puts
the clusters of all layers on GPUs with the least sum over layers of the slowest transfer. Both are the published models
(arXiv 2502.06643, §4; see :mod:`moeplace.moetuner`), with starts and bounds that make their gaps small and certified.
The published text leaves one point open: whether clusters of a layer hold equally many experts. Here they do, unless
the problem counts memory over the whole model (``whole_model``): then a cluster only must not be empty, and ILP2 gives
every GPU equally many experts over all layers.

MoETuner does not replicate experts: slots beyond the experts stay empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from moeplace.errors import InputError
from moeplace.frozen import Floats, Ints
from moeplace.milp import Budget, backend
from moeplace.moetuner.bounds import pair_bounds
from moeplace.moetuner.chain import Chain, improve, level_start
from moeplace.moetuner.clusters import Layer, clustering_model, even_sizes
from moeplace.moetuner.gpus import mapping_model, memory_model, num_terms
from moeplace.moetuner.nodes import MAX_STATES, shortest_chain, two_levels
from moeplace.moetuner.tally import PROOF, Tally, stage_of, worst
from moeplace.objective import UNITS, objective_value
from moeplace.placement import EMPTY, Placement
from moeplace.problem import Problem
from moeplace.solution import Clock, Limits, Report, Solution, Stage, Status, StopReason

DESCRIPTION = "MoETuner's two integer programmes: balanced clusters, then clusters onto GPUs (no replicas)"
OPTIONS: Mapping[str, str] = {
    "backend": "cbc (PuLP's, default), cpsat (OR-Tools) or highs (SciPy's)",
    "tolerance": "relative gap at which each integer programme stops (default 0.025, as published)",
}
WORK_1, WORK_2 = 20.0, 20.0
SHARE_1 = 0.6
GENEROUS = 5.0
MAX_TERMS = 200_000
TRANSFER = "pairs per GB/s"


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Answer the problem by ILP1 in every layer and one ILP2.

    The answer is FEASIBLE: each programme has an objective of its own, reported as a stage with its own bound and
    status. The default work budget is about 20 s of one core for each programme; most of it is needed only where
    nothing can be proven sooner.
    """
    return _Run(problem, limits, report).solve()


class _Run:
    """One call of :func:`solve`."""

    def __init__(self, problem: Problem, limits: Limits, report: Report) -> None:
        self.problem, self.limits, self.report = problem, limits, report
        self.clock = Clock(limits)
        self.backend_name = limits.options.get("backend", "cbc")
        self.backend = backend(self.backend_name)
        self.gap = max(limits.gap, _tolerance(limits.options.get("tolerance", "0.025")))
        self.stages: list[Stage] = []
        self.notes: list[str] = []

    def solve(self) -> Solution:
        """Both programmes, one after the other."""
        clusters = self.cluster_layers(whole_model=self.problem.whole_model)
        if clusters is None:
            return self.no_answer()
        gpu = self.place_clusters(self.chain(clusters))
        if gpu is None:
            self.notes.append("clusters of equal size are used in every layer instead")
            clusters = self.cluster_layers(whole_model=False)
            gpu = None if clusters is None else self.place_clusters(self.chain(clusters))
        if clusters is None or gpu is None:
            return self.no_answer()
        spare = self.problem.num_slots - self.problem.num_experts
        if spare:
            self.notes.append(f"MoETuner does not replicate experts: {spare} slots per layer stay empty")
        return self.answer(_placement(self.problem, np.take_along_axis(gpu, clusters, axis=1)))

    def answer(self, placement: Placement) -> Solution:
        """The solution for a placement."""
        stop = worst(stage.stop_reason for stage in self.stages)
        cut = stop in (StopReason.INTERRUPTED, StopReason.TIME_LIMIT)
        return Solution(
            placement=placement,
            objective=objective_value(self.problem, placement),
            unit=UNITS[self.problem.objective],
            status=Status.FEASIBLE,
            stop_reason=stop if cut else StopReason.EXHAUSTED,
            solver="moetuner",
            seed=self.limits.seed,
            stages=tuple(self.stages),
            history=tuple(self.report.history),
            notes=tuple(self.notes),
        )

    def no_answer(self) -> Solution:
        """The solution where ILP1 found no clustering within the load cap.

        Without spare slots nothing can be replicated, so a proof for MoETuner is a proof for the problem.
        """
        proven = any(stage.status is Status.INFEASIBLE for stage in self.stages)
        exact = self.problem.num_slots == self.problem.num_experts and not self.problem.whole_model
        return Solution(
            placement=None,
            objective=math.inf,
            unit=UNITS[self.problem.objective],
            status=Status.INFEASIBLE if proven and exact else Status.UNKNOWN,
            stop_reason=worst(stage.stop_reason for stage in self.stages),
            solver="moetuner",
            seed=self.limits.seed,
            stages=tuple(self.stages),
            history=tuple(self.report.history),
            notes=tuple(self.notes),
        )

    def layers(self, *, whole_model: bool) -> list[Layer]:
        """ILP1's instance of every layer."""
        problem = self.problem
        gpus, experts = problem.num_gpus, problem.num_experts
        if whole_model:
            fewest = min(1, experts // gpus)
            lower, upper = np.full(gpus, fewest), np.full(gpus, experts - fewest * (gpus - 1))
        else:
            lower, upper = even_sizes(experts, problem.slots_per_gpu)
        caps = np.full(problem.num_layers, np.inf)
        if problem.load_cap is not None:
            caps = np.floor(problem.load_cap * problem.stats.load.sum(axis=1) / gpus * (1 + 1e-9))
        return [
            Layer(load=load, lower=lower, upper=upper, cap=float(cap))
            for load, cap in zip(problem.stats.load, caps, strict=True)
        ]

    def cluster_layers(self, *, whole_model: bool) -> Ints | None:
        """ILP1: ``[layer, expert]`` clusters, or None where a layer has none."""
        layers = self.layers(whole_model=whole_model)
        shape = f"{len(layers)} layers, {self.problem.num_experts} experts into {self.problem.num_gpus} clusters each"
        self.report.stage("ILP1", f"{shape}, by {self.backend_name}")
        tally = Tally("ILP1 again" if self.stages else "ILP1", layers, self.report)
        for i, layer in enumerate(layers):
            self.report.progress(i, len(layers), "ILP1 layers")
            if not tally.is_proven(i):
                self._cluster_layer(tally, i, layer, len(layers) - i)
        self.report.progress(len(layers), len(layers), "ILP1 layers")
        self.stages.append(tally.stage())
        ids = self.problem.stats.meta.layer_ids
        if tally.too_large:
            self.notes.append(f"ILP1 is too large in {tally.too_large} layers (> {MAX_TERMS} terms): greedy clusters")
        if not tally.missing:
            return np.array(tally.clusters)
        names = ", ".join(str(ids[i]) for i in tally.missing[:8])
        word = "no clusters are within the load cap" if tally.infeasible else "no clusters were found"
        self.notes.append(f"ILP1: {word} in {len(tally.missing)} layers: {names}")
        return None

    def _cluster_layer(self, tally: Tally, i: int, layer: Layer, layers_left: int) -> None:
        left_s = SHARE_1 * self.limits.time_limit_s - self.clock.seconds
        # a fair share would let the clock cut layers whose work budget fits the whole limit easily
        left_s *= min(1.0, GENEROUS / layers_left)
        if self.clock.interrupted or left_s <= 0:
            tally.reasons[i] = self.clock.stop_reason()
            return
        built = clustering_model(layer, tally.clusters[i])
        if built.model.num_terms > MAX_TERMS:
            tally.too_large += 1
            return
        budget = self._budget(WORK_1 / len(tally.layers), left_s)
        result = self.backend(built.model, budget, lambda value, bound: tally.improved(i, value, bound))
        tally.finish(i, result, None if result.values is None else built.clusters(result.values))

    def chain(self, clusters: Ints) -> Chain:
        """ILP2's instance. Complexity: O(layers · experts² · GPUs)."""
        problem = self.problem
        gpus, layers = problem.num_gpus, problem.num_layers
        member = (clusters[:, None, :] == np.arange(gpus)[None, :, None]).astype(np.float64)
        transition = problem.stats.transition
        if transition is None:
            traffic = np.zeros((layers - 1, gpus, gpus))
        else:
            traffic = np.array([a @ pairs @ b.T for a, pairs, b in zip(member, transition, member[1:], strict=False)])
        total_lower, total_upper = even_sizes(layers * problem.num_experts, layers * problem.slots_per_gpu)
        everything = np.full(gpus, problem.num_experts)
        return Chain(
            traffic=traffic.reshape(layers - 1, gpus, gpus),
            cost=1 / problem.topology.pair_bandwidth_gb_per_s(),
            sizes=member.sum(axis=2).astype(np.int64),
            room=everything if problem.whole_model else problem.slots_per_gpu,
            total_lower=total_lower,
            total_upper=total_upper,
        )

    def place_clusters(self, chain: Chain) -> Ints | None:
        """ILP2: ``[layer, cluster]`` GPUs, or None where the clusters fit no memory."""
        levelled = self._level(chain)
        if levelled is None:
            return None
        chain, start = levelled
        if self.problem.stats.transition is None:
            self.notes.append("ILP2 is skipped: counts do not tell which expert follows which")
            return start
        if chain.num_gpus == 1 or chain.num_layers == 1:
            self.notes.append("ILP2 is skipped: nothing moves between GPUs")
            return start
        self.report.stage("ILP2", f"{chain.num_layers} layers, {chain.num_gpus} GPUs, by {self.backend_name}")
        if self.clock.over:
            value, reason = float(chain.layer_costs(start).sum()), self.clock.stop_reason()
            self.stages.append(stage_of("ILP2", value, 0.0, TRANSFER, reason))
            return start
        return self._map(chain, start)

    def _level(self, chain: Chain) -> tuple[Chain, Ints] | None:
        """A start that keeps the memory rows, and the chain with those rows relaxed where they cannot be kept."""
        start = level_start(chain)
        if chain.excess(start) == 0:
            return chain, start
        capacity = self.problem.num_layers * self.problem.slots_per_gpu
        self.report.stage("memory", "equally many experts on every GPU over the whole model")
        built = memory_model(chain, start, capacity)
        result = self.backend(built.model, self._budget(WORK_2, self.clock.left_s / 4), None)
        if result.values is None or result.objective is None:
            proven = result.status is Status.INFEASIBLE
            word = "INFEASIBLE as published: ILP1's clusters cannot" if proven else "ILP1's clusters were not found to"
            self.notes.append(f"{word} fit the GPUs' memory over the whole model")
            return None
        start, missed = built.gpus(result.values), round(result.objective)
        if missed:
            proven = (result.bound or 0.0) > 0.5
            self.stages.append(
                stage_of("memory", float(missed), max(0.0, result.bound or 0.0), "experts", result.stop_reason)
            )
            word = "INFEASIBLE as published: ILP1's clusters allow no" if proven else "No assignment was found with"
            self.notes.append(f"{word} equal memory over the whole model; GPUs miss their share by {missed} experts")
            chain = chain.relaxed(missed, capacity)
        return chain, start

    def _map(self, chain: Chain, start: Ints) -> Ints:
        bounds = pair_bounds(chain)
        start, total_bound = self._best_start(chain, start, bounds)
        value = float(chain.layer_costs(start).sum())
        total_bound = min(value, total_bound)
        self.report.improved("ILP2 start", value, bound=total_bound, unit=TRANSFER)
        if num_terms(chain, bounds) > MAX_TERMS:
            self.notes.append(f"ILP2 has more than {MAX_TERMS} terms: the start and its bound are kept")
            self.stages.append(stage_of("ILP2", value, total_bound, TRANSFER, StopReason.EXHAUSTED))
            return start
        built = mapping_model(chain, bounds, start, total_bound)
        seen = [value]

        def improved(objective: float, bound: float | None) -> None:
            if objective < seen[0] * (1 - PROOF):
                seen[0] = objective
                certified = min(objective, max(total_bound, bound or 0.0))
                self.report.improved("ILP2", objective, bound=certified, unit=TRANSFER)

        result = self.backend(built.model, self._budget(WORK_2, self.clock.left_s), improved)
        found = start if result.values is None else built.gpus(result.values)
        if chain.layer_costs(found).sum() > value:
            found = start
        value = float(chain.layer_costs(found).sum())
        self.stages.append(
            stage_of("ILP2", value, max(total_bound, result.bound or 0.0), TRANSFER, result.stop_reason, gap=self.gap)
        )
        return found

    def _best_start(self, chain: Chain, start: Ints, bounds: Floats) -> tuple[Ints, float]:
        """A good assignment and a lower bound on every assignment's cost."""
        levels = two_levels(chain.cost)
        if levels is None or levels.num_partitions > MAX_STATES:
            return improve(chain, start, stop=lambda: self.clock.over), float(bounds.sum())
        # without the memory rows this is the optimum; with them still a bound
        exact = shortest_chain(chain, levels)
        bound = max(float(bounds.sum()), float(chain.layer_costs(exact).sum()))
        if chain.admits(exact):
            self.notes.append("ILP2: start and bound come from an exact dynamic programme over nodes")
            return exact, bound
        return improve(chain, start, stop=lambda: self.clock.over), bound

    def _budget(self, work: float, time_limit_s: float) -> Budget:
        limits = self.limits
        return Budget(
            work=work * limits.work, time_limit_s=time_limit_s, gap=self.gap, seed=limits.seed, stop=limits.stop
        )


def _tolerance(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise InputError(f"tolerance {text!r}", rule="a number from 0 to below 1, or a percentage")
    return value


def _placement(problem: Problem, gpu: Ints) -> Placement:
    """The placement of ``gpu`` [layer, expert], experts of a GPU in order of their ids."""
    layers, experts = gpu.shape
    held = np.array([np.bincount(row, minlength=problem.num_gpus) for row in gpu])
    slots = np.full((layers, problem.num_gpus, max(problem.max_slots, int(held.max()))), EMPTY, np.int64)
    for layer, row in enumerate(gpu):
        for g in range(problem.num_gpus):
            slots[layer, g, : held[layer, g]] = np.flatnonzero(row == g)
    return Placement(slots=slots, num_experts=experts)
