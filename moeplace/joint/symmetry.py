"""GPUs whose names do not matter, and rows that leave one naming of many.

Two GPUs are interchangeable where exchanging them changes neither slots nor the objective of any placement. The GPUs of
a class can then be renamed at will: in every layer by itself where the objective is a sum over layers, else in all
layers alike. Without copies they are named by their first expert in order of falling load, so that GPU ``i`` of a class
holds none of the ``i`` hottest experts; with copies, which may share a first expert, by falling load.
"""

from __future__ import annotations

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.joint.decision import Decision
from moeplace.joint.times import unit_stages
from moeplace.objective import home_selections
from moeplace.placement import EMPTY, Placement
from moeplace.problem import CONTEXT_COHERENT, COPIES, CROSS, STEP_TIME, Problem


def classes(problem: Problem) -> list[list[int]]:
    """Sets of interchangeable GPUs, each in order. Complexity: O(GPUs⁴ · links) for ``step-time``, else O(GPUs²)."""
    same = problem.slots_per_gpu[:, None] == problem.slots_per_gpu[None, :]
    if problem.objective == COPIES and problem.copies_level == "node":
        node = problem.topology.node_of_gpu()
        same = same & (node[:, None] == node[None, :])
    if problem.objective == STEP_TIME:
        same = same & _alike_in_time(problem, same)
    found: list[list[int]] = []
    for gpu in range(problem.num_gpus):
        home = next((members for members in found if same[members[0], gpu]), None)
        if home is None:
            found.append([gpu])
        else:
            home.append(gpu)
    return found


def by_layer(problem: Problem) -> bool:
    """Whether GPUs can be renamed in each layer by itself."""
    chained = problem.objective == CROSS or (problem.objective == STEP_TIME and problem.dataflow == CONTEXT_COHERENT)
    return not chained and not problem.whole_model


def _alike_in_time(problem: Problem, candidates: np.ndarray) -> np.ndarray:
    """``[GPU, GPU]`` whether exchanging the two leaves speeds, homes and the set of links of every round as it was."""
    gpus, topology = problem.num_gpus, problem.topology
    speed = np.ones(gpus) if topology.gpu_speed is None else topology.gpu_speed
    homes = home_selections(problem)
    uses = [unit_stages(problem, returning=returning) for returning in (False, True)]
    tables = [busy for stages in uses for chunks in stages for rounds in chunks for busy in rounds]
    alike = np.eye(gpus, dtype=bool)
    for a, b in np.argwhere(np.triu(candidates, 1)).tolist():
        order = np.arange(gpus)
        order[[a, b]] = b, a
        homed = homes.shape[1] == 1 or np.array_equal(homes[:, a], homes[:, b])
        if speed[a] == speed[b] and homed and all(_same_links(busy, order) for busy in tables):
            alike[a, b] = alike[b, a] = True
    return alike


def _same_links(busy: Floats, order: Ints) -> bool:
    """Whether renaming GPUs maps the links ``busy`` [link, from GPU, to GPU] to themselves."""
    apart = busy * ~np.eye(len(order), dtype=bool)
    one, other = (
        rows[np.lexsort(rows.T)] for rows in (x.reshape(len(x), -1) for x in (apart, apart[:, order][:, :, order]))
    )
    return np.array_equal(one, other)


def add_order(decision: Decision) -> None:
    """Add the rows and bounds that name the GPUs of each class."""
    problem, model = decision.problem, decision.model
    sets = classes(problem)
    for layer in range(problem.num_layers if by_layer(problem) else 1):
        hottest = np.argsort(-problem.stats.load[layer], kind="stable")
        for members in sets:
            for i, g in enumerate(members):
                if decision.most == 1:
                    for v in decision.on[layer, hottest[:i], 0, g].tolist():
                        model.upper[v] = 0.0
                elif i:
                    model.add([*decision.gpu_load(layer, members[i - 1]), *decision.gpu_load(layer, g, -1.0)], 0)


def named(problem: Problem, placement: Placement, most: int) -> Placement:
    """Rename GPUs so that the rows of :func:`add_order` hold, ``most`` being the copies that are modelled."""
    order = np.tile(np.arange(problem.num_gpus), (problem.num_layers, 1))
    gpu_load = placement.gpu_load(problem.stats.load)
    sets = classes(problem)
    for layer in range(problem.num_layers):
        if layer and not by_layer(problem):
            order[layer] = order[0]
            continue
        key = _first_members(problem, placement, layer) if most == 1 else -gpu_load[layer]
        for members in sets:
            order[layer, members] = np.array(members)[np.argsort(key[members], kind="stable")]
    return placement.permute_gpus(order)


def _first_members(problem: Problem, placement: Placement, layer: int) -> Ints:
    """``[GPU]`` rank by falling load of the hottest expert that each holds; of empty GPUs one beyond all."""
    hottest = np.argsort(-problem.stats.load[layer], kind="stable")
    rank = np.empty(problem.num_experts + 1, np.int64)
    rank[hottest] = np.arange(problem.num_experts)
    rank[EMPTY] = problem.num_experts
    first: Ints = rank[placement.slots[layer]].min(axis=1)
    return first
