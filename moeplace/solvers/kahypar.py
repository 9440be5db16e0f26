"""Fewest copies by a partitioner of hypergraphs, Mt-KaHyPar (arXiv 2303.17679): the peer of ``setpart``.

Experts are vertices, the sets of experts that tokens chose are hyperedges weighted by tokens, and the connectivity
objective ``km1`` counts what a token's copies exceed one by. Blocks are GPUs (with ``--copies-level node`` nodes, split
over their GPUs afterwards), each of at most its slots. The deterministic preset gives one answer per seed.

The partitioner knows one weight per vertex, and slots take it: blocks it leaves too large give up the experts that cost
the fewest copies elsewhere. The load cap is kept afterwards: experts of the busiest GPU are swapped for lighter ones,
the swap of fewest added copies for the load it takes away first. What still breaks the cap is told as for any method.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeplace.errors import MissingExtraError, ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.hypergraph import Patterns, split_nodes
from moeplace.hypergraph.names import named_after_homes
from moeplace.packing.eplb import slots_without_copies
from moeplace.placement import Placement
from moeplace.problem import COPIES, NODE, Problem
from moeplace.solution import Clock, Limits, Report, Solution, found

DESCRIPTION = "fewest copies by Mt-KaHyPar's hypergraph partitioner, load caps kept by swaps (extra: partition)"
OPTIONS: Mapping[str, str] = {}
ROOM = 1e-9


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Partition every layer. Complexity: the partitioner's, and O(experts² · patterns) for every swap of a repair.

    Raises
    ------
    ProblemError
        The objective is another one, slots are counted over the whole model, or the trace holds only counts.
    MissingExtraError
        Mt-KaHyPar is not installed.
    """
    sample = problem.stats.sample
    if problem.objective != COPIES or problem.whole_model or sample is None:
        raise ProblemError(
            f"objective {problem.objective}", rule="kahypar minimises the copies of a token", hint="--objective copies"
        )
    library, clock = _partitioner(), Clock(limits)
    rooms = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
    by_node = problem.copies_level == NODE
    blocks = rooms.reshape(-1, problem.topology.gpus_per_node)
    state, skipped = np.empty((problem.num_layers, problem.num_experts), np.int64), 0
    for layer in range(problem.num_layers):
        load = problem.stats.load[layer].astype(np.float64)
        cap = np.inf if problem.load_cap is None else float(problem.load_cap[layer]) * load.sum() / problem.num_gpus
        patterns = Patterns.of(sample.experts[:, layer], problem.num_experts)
        size = blocks.sum(axis=1) if by_node else rooms
        if clock.over:
            group, skipped = np.repeat(np.arange(len(size)), size), skipped + 1
        else:
            group = partitioned(library, patterns, size, limits.seed)
            most = cap * (problem.topology.gpus_per_node if by_node else 1)
            group = within_cap(patterns, seated(patterns, group, size), load, most, len(size))
        state[layer] = split_nodes(patterns, load, cap, group, blocks, seed=limits.seed) if by_node else group
        report.progress(layer + 1, problem.num_layers, "partitioning layers")
    notes = (f"the run was stopped: {skipped} layers are contiguous",) if skipped else ()
    node = problem.topology.node_of_gpu() if by_node else np.zeros(problem.num_gpus, np.int64)
    state, told = named_after_homes(sample.experts, sample.rank, state, rooms, node)
    lists = [[np.flatnonzero(row == number).tolist() for number in range(problem.num_gpus)] for row in state]
    placement = Placement.from_lists(lists, problem.num_experts)
    return found(problem, placement, limits, report, solver="kahypar", notes=(*notes, *told))


@functools.cache
def _partitioner() -> tuple[Any, Any]:
    """Return the library and its handle, which a process may make only once."""
    try:
        library = importlib.import_module("mtkahypar")
    except ImportError as error:
        raise MissingExtraError(
            "solver kahypar needs mtkahypar, which is not installed",
            hint="pip install 'moeplace[partition]', or --solver setpart",
        ) from error
    return library, library.initialize(1, False)


def partitioned(library: tuple[Any, Any], patterns: Patterns, rooms: Ints, seed: int) -> Ints:
    """``[expert]`` blocks as the partitioner gives them, sizes as it could keep them."""
    used = np.flatnonzero(rooms)
    edges = patterns.experts.tolist() if patterns.top_k > 1 else []
    if len(used) < 2 or not edges:
        return np.repeat(np.arange(len(rooms)), rooms)
    module, handle = library
    module.set_seed(seed % 2**31)
    context = handle.context_from_preset(module.PresetType.DETERMINISTIC)
    context.set_partitioning_parameters(len(used), 0.0, module.Objective.KM1)
    context.set_individual_target_block_weights(rooms[used].tolist())
    context.logging = False
    ones, weight = [1] * patterns.num_experts, patterns.weight.tolist()
    graph = handle.create_hypergraph(context, patterns.num_experts, len(edges), edges, ones, weight)
    block: Ints = used[np.asarray(graph.partition(context).get_partition(), np.int64)]
    return block


class _Tables:
    """Which pattern has which expert, and how many experts each block holds of a pattern."""

    def __init__(self, patterns: Patterns, group: Ints, num_groups: int) -> None:
        rows = np.arange(len(patterns.weight))[:, None]
        self.has = np.zeros((patterns.num_experts, len(rows)))
        self.has[patterns.experts, rows] = 1.0
        self.weight = patterns.weight.astype(np.float64)
        self.held = np.zeros((num_groups, len(rows)))
        np.add.at(self.held, (group[patterns.experts], rows), 1.0)

    def moved(self, experts: Ints, source: int, target: int) -> Floats:
        """``[expert, pattern]`` copies that moving each expert from one block to another adds."""
        change = (self.held[target] == 0).astype(np.float64) - (self.held[source] == 1)
        added: Floats = self.has[experts] * (change * self.weight)
        return added

    def move(self, expert: int, source: int, target: int) -> None:
        """Book a move."""
        self.held[source] -= self.has[expert]
        self.held[target] += self.has[expert]

    def swapped(self, first: Ints, second: Ints, source: int, target: int) -> Floats:
        """``[first, second]`` copies added by swapping experts of two blocks: tokens that chose both add nothing."""
        there, back = self.moved(first, source, target), self.moved(second, target, source)
        both = there @ self.has[second].T + (back @ self.has[first].T).T
        added: Floats = there.sum(axis=1)[:, None] + back.sum(axis=1)[None, :] - both
        return added


def seated(patterns: Patterns, group: Ints, rooms: Ints) -> Ints:
    """Return blocks of exactly ``rooms`` experts: the cheapest moves out of those that are too large."""
    group, size = group.copy(), np.bincount(group, minlength=len(rooms))
    tables = _Tables(patterns, group, len(rooms))
    while (size > rooms).any():
        options = []
        for source in np.flatnonzero(size > rooms).tolist():
            members = np.flatnonzero(group == source)
            for target in np.flatnonzero(size < rooms).tolist():
                added = tables.moved(members, source, target).sum(axis=1)
                options.append((float(added.min()), int(members[added.argmin()]), source, target))
        _, expert, source, target = min(options)
        tables.move(expert, source, target)
        group[expert] = target
        size[source] -= 1
        size[target] += 1
    return group


def within_cap(patterns: Patterns, group: Ints, load: Floats, most: float, num_groups: int) -> Ints:
    """Swap experts of the busiest block until none is over ``most``, or no swap lowers that block's load.

    A swap counts by the copies it adds for each token it takes off the busiest block, as far as that is over; the other
    block stays below what the busiest had. The sum of squared loads falls, so the loop ends.
    """
    group, busy = group.copy(), np.bincount(group, load, num_groups)
    tables = _Tables(patterns, group, num_groups)
    while busy.max() > most * (1 + ROOM):
        source = int(busy.argmax())
        own, options = np.flatnonzero(group == source), []
        for target in range(num_groups):
            other = np.flatnonzero(group == target)
            less = load[own][:, None] - load[other][None, :]
            fits = (less > 0) & (busy[target] + less < busy[source])
            if target == source or not fits.any():
                continue
            # what takes the target over the cap again is no gain
            gain = np.minimum(less, busy[source] - most) - np.maximum(busy[target] + less - most, 0.0)
            gain += np.maximum(busy[target] - most, 0.0)
            fits &= gain > ROOM
            if not fits.any():
                continue
            rate = np.where(fits, tables.swapped(own, other, source, target) / np.where(fits, gain, 1.0), np.inf)
            i, j = np.unravel_index(int(rate.argmin()), rate.shape)
            options.append((float(rate[i, j]), int(own[i]), int(other[j]), target))
        if not options:
            break
        _, first, second, target = min(options)
        tables.move(first, source, target)
        tables.move(second, target, source)
        group[first], group[second] = target, source
        busy = np.bincount(group, load, num_groups)
    return group
