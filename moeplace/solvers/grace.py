"""GRACE-MoE (arXiv 2509.25041 v4): experts grouped by co-activation, node by node and GPU by GPU, hot ones copied.

Per layer: spectral clustering of the affinity (tokens that choose both experts) into one group per node, of any size;
inside each node into one group per GPU, of sizes ``E·(1 ± r)``; then the hot experts of the heaviest GPU are copied to
the ``n = min(max(1, ⌊ρ⌋), GPUs - 1)`` least loaded ones, ``ρ`` being its load over the mean. Tokens then prefer copies
on their GPU, then on their node, weighted by predicted load: ``--routing topology-aware`` (or ``weighted``) of the
evaluator.

What the paper leaves open or prints ambiguously, and what is done here:

* *Slots.* The paper has as much memory as its groups need. Here a GPU has the slots of the problem: groups are limited
  by them, node groups by those of a node, copies by what groups leave free, and the notes say how often a limit was
  met. With ``--equal-experts model`` slots are counted over all layers, which leaves layers free to be uneven.
* *The ratio.* ``r`` is one for the model, at the knee of affinity utilisation ``U(r)`` against size deviation ``S(r)``
  (equations 1, 2), both within nodes, means over nodes and layers; the paper finds 0.15 on OLMoE. The knee is the
  point farthest above the line between the ends of the curve; a curve that nowhere rises above it has none, and the
  paper's 0.15 is taken. ``δ = max(1, round(E·r))`` as printed, but for
  ``ratio=0``: sizes as even as can be.
* *Algorithm 2* assigns ``L_d`` only where a group is too large: here a group within its limit stays as it is. Experts
  given up are seated in the order of their affinity to all others, in groups that have room.
* *Groups have no names:* the larger a group, the more slots where it goes.
* *The hot set* ("cumulative load exceeds ``W·n/(1+n)``") is the shortest prefix, hottest first, that reaches it.
* *Load prediction* (equation 4) splits ``W_max`` in the formula and the copied load ``W_r`` in the text. The latter
  balances: ``W' = W_max - W_r + W_r/(n+1)`` and ``W_i + W_r/(n+1)``, which is what copies sharing evenly do, and what
  the evaluator's routing weighs by.
* *Algorithm 3* calls a weighted random choice round-robin: here a hash of the token draws, the same in every run.
* *Algorithm 4* repeats the local weights in its last branch, where all remote copies are meant: so it is here.

Hierarchical sparse all-to-all is the evaluator's normal kernel (``--phase prefill``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moeplace.errors import InputError, ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.grouping import (
    SizeLimits,
    affinity_utilisation,
    by_room,
    controlled,
    hot_experts,
    knee,
    num_replicas,
    size_deviation,
    spectral_groups,
)
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.solution import Clock, Limits, Report, Solution, found

DESCRIPTION = "GRACE-MoE: spectral groups of co-activated experts, uneven over nodes and GPUs, hot experts copied"
REPLICAS = ("dynamic", "none")
OPTIONS: Mapping[str, str] = {
    "ratio": "how uneven groups of GPUs may be (default: knee, found per model; the paper has 0.15)",
    "replicas": "dynamic (default: the paper's rule, as far as slots are free) or none",
}
KNEE = "knee"
PUBLISHED = 0.15  # ratio that the paper finds on OLMoE
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Group every layer, and copy hot experts into free slots. Complexity: O(layers · experts³).

    Raises
    ------
    ProblemError
        The trace holds only counts.
    """
    replicas = limits.options.get("replicas", REPLICAS[0])
    if replicas not in REPLICAS:
        raise InputError(f"replicas {replicas!r}", rule=f"one of {', '.join(REPLICAS)}")
    if problem.stats.coactivation is None:
        raise ProblemError(
            "the trace holds only counts",
            rule="grace groups experts that tokens choose together",
            hint="record a per-token trace, or --solver eplb",
        )
    run = _Run(problem, limits, report)
    groups = run.grouped(_ratio(limits))
    if problem.stats.meta.top_k == 1:
        run.notes.append("tokens choose one expert each, so no two are chosen together: groups are as good as any")
    placement, notes = run.copied(groups) if replicas == REPLICAS[0] else (run.placement(groups, {}), ())
    return found(problem, placement, limits, report, solver="grace", notes=(*run.notes, *notes), clock=run.clock)


def _ratio(limits: Limits) -> float | None:
    """Return the ratio that is asked for; None for the knee."""
    text = limits.options.get("ratio", KNEE)
    if text == KNEE:
        return None
    try:
        ratio = float(text)
        if 0 <= ratio <= 1:
            return ratio
    except ValueError:
        pass
    raise InputError(f"ratio {text!r}", rule=f"{KNEE}, or a number from 0 to 1", hint="--option ratio=0.15")


@dataclass(slots=True)
class _Groups:
    """GPUs of experts ``[layer, expert]`` under one ratio; utilisation, size deviation, layers that met a limit."""

    gpu: Ints
    utilisation: float
    deviation: float
    limited: int


class _Run:
    """One call of :func:`solve`."""

    def __init__(self, problem: Problem, limits: Limits, report: Report) -> None:
        self.problem, self.seed, self.report = problem, limits.seed, report
        self.clock = Clock(limits)
        self.nodes, self.size = problem.topology.num_nodes, problem.topology.gpus_per_node
        together = problem.stats.coactivation
        assert together is not None
        self.affinity: Floats = together.astype(np.float64)
        self.notes: list[str] = []
        self._seen: dict[tuple[int, int, bytes], Ints] = {}

    def grouped(self, ratio: float | None) -> Ints:
        """``[layer, expert]`` GPUs under a ratio, or under that at the knee."""
        tried = RATIOS if ratio is None else (ratio,)
        found_at: list[_Groups] = []
        for place, one in enumerate(tried):
            self.report.progress(place, len(tried), f"grouping with ratio {one:g}")
            found_at.append(self._all_layers(one))
            if self.clock.over:
                break
        curve = np.array([(entry.deviation, entry.utilisation) for entry in found_at])
        bend = knee(curve[:, 0], curve[:, 1])
        chosen = min(range(len(found_at)), key=lambda place: abs(tried[place] - PUBLISHED)) if bend is None else bend
        groups = found_at[chosen]
        why = "at the knee" if bend is not None else "the paper's, for the curve has no knee"
        why = "given" if ratio is not None else why
        self.notes.append(
            f"ratio {tried[chosen]:g}, {why}: {groups.utilisation:.1%} of a node's affinity stays on a GPU, "
            f"group sizes deviate by {groups.deviation:.2f} experts"
        )
        if groups.limited:
            many = f"{groups.limited} of {self.problem.num_layers} layers"
            hint = "--num-redundant-experts or --slots-per-gpu gives room for uneven groups"
            self.notes.append(f"slots limit the groups of nodes or GPUs in {many}: {hint}")
        if self.clock.over:
            self.notes.append("the run was stopped: layers that were not grouped are contiguous")
        return groups.gpu

    def _all_layers(self, ratio: float) -> _Groups:
        problem = self.problem
        room, scale = problem.slots_per_gpu.copy(), problem.num_layers if problem.whole_model else 1
        room *= scale
        gpu = np.empty((problem.num_layers, problem.num_experts), np.int64)
        kept, deviations, limited = [], [], 0
        for layer in range(problem.num_layers):
            if self.clock.over:
                gpu[layer] = np.repeat(np.arange(problem.num_gpus), room)[: problem.num_experts]
            else:
                gpu[layer], met, deviation = self._layer(layer, room, ratio)
                limited += met
                deviations += deviation
            node = gpu[layer] // self.size
            inside = affinity_utilisation(self.affinity[layer], node)
            kept.append(affinity_utilisation(self.affinity[layer], gpu[layer]) / inside if inside > 0 else 1.0)
            if problem.whole_model:
                room -= np.bincount(gpu[layer], minlength=problem.num_gpus)
        mean = float(np.mean(deviations)) if deviations else 0.0
        return _Groups(gpu=gpu, utilisation=float(np.mean(kept)), deviation=mean, limited=limited)

    def _layer(self, layer: int, room: Ints, ratio: float) -> tuple[Ints, bool, list[float]]:
        """``[expert]`` GPUs of a layer, whether a limit of slots was met, and the size deviation of each node."""
        experts = np.arange(self.problem.num_experts)
        of_node = room.reshape(self.nodes, self.size).sum(axis=1)
        node, met = self._groups(layer, experts, of_node, math.inf)
        gpu = np.empty(len(experts), np.int64)
        deviations = []
        for number in range(self.nodes):
            members = np.flatnonzero(node == number)
            if members.size:
                own = room[number * self.size : (number + 1) * self.size]
                label, limited = self._groups(layer, members, own, ratio)
                gpu[members] = number * self.size + label
                deviations.append(size_deviation(label, self.size))
                met = met or limited
        return gpu, met, deviations

    def _groups(self, layer: int, members: Ints, room: Ints, ratio: float) -> tuple[Ints, bool]:
        """``[member]`` groups of some experts within the room of each, and whether that room made a difference."""
        own = self.affinity[layer][np.ix_(members, members)]
        key = (layer, len(room), members.tobytes())
        if key not in self._seen:
            self._seen[key] = spectral_groups(own, len(room), self.seed + 7919 * layer)
        label = by_room(self._seen[key], room)
        limits = SizeLimits.of(len(members), room, ratio)
        free = SizeLimits.of(len(members), np.full(len(room), len(members)), ratio)
        size = np.bincount(label, minlength=len(room))
        met = bool((size > np.minimum(limits.high, free.high)).any() and (limits.high < free.high).any())
        return controlled(own, label, limits), met

    def copied(self, gpu: Ints) -> tuple[Placement, tuple[str, ...]]:
        """Return the placement with copies of the hot experts, the most uneven layers first, and what to tell."""
        problem, load = self.problem, self.problem.stats.load.astype(np.float64)
        used = np.stack([np.bincount(row, minlength=problem.num_gpus) for row in gpu])
        busy = np.stack([np.bincount(row, own, problem.num_gpus) for row, own in zip(gpu, load, strict=True)])
        free = problem.slots_per_gpu - used
        if problem.whole_model:  # one row that all layers share
            total = problem.slots_per_gpu * problem.num_layers - used.sum(axis=0)
            free = np.broadcast_to(total, used.shape[1:]).copy()[None]
        copies: dict[int, list[tuple[int, int]]] = {}
        dropped = 0
        for layer in np.argsort(-busy.max(axis=1) / busy.mean(axis=1), kind="stable").tolist():
            own_free = free[0 if problem.whole_model else layer]
            number = num_replicas(busy[layer])
            heavy = int(busy[layer].argmax())
            hot = hot_experts(load[layer], np.flatnonzero(gpu[layer] == heavy), number)
            ranked = [int(other) for other in np.argsort(busy[layer], kind="stable") if other != heavy][:number]
            for expert in hot.tolist():
                for target in ranked:
                    if own_free[target] > 0:
                        own_free[target] -= 1
                        copies.setdefault(layer, []).append((expert, target))
                    else:
                        dropped += 1
        made = sum(len(entries) for entries in copies.values())
        notes = [f"{made} copies of hot experts; --routing topology-aware is the published choice between copies"]
        if dropped:
            hint = "more slots (--num-redundant-experts, --slots-per-gpu) hold them"
            notes.append(f"{dropped} further copies of the published rule find no free slot: {hint}")
        return self.placement(gpu, copies), tuple(notes)

    def placement(self, gpu: Ints, copies: Mapping[int, list[tuple[int, int]]]) -> Placement:
        """Return experts in slots, copies behind them."""
        lists = [[np.flatnonzero(row == number).tolist() for number in range(self.problem.num_gpus)] for row in gpu]
        for layer, entries in copies.items():
            for expert, target in entries:
                lists[layer][target].append(expert)
        return Placement.from_lists(lists, self.problem.num_experts)
