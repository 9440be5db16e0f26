"""Random placement: a uniform permutation of the experts in every layer; the floor any method should beat."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.placement import EMPTY, Placement
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution, found

DESCRIPTION = "a random permutation per layer"
OPTIONS: Mapping[str, str] = {}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Deal a random order of the experts, and random extra copies, over the slots of each layer.

    Complexity: O(layers · slots).
    """
    rng = np.random.default_rng(limits.seed)
    slots = np.full((problem.num_layers, problem.num_gpus, problem.max_slots), EMPTY, np.int64)
    owner = np.repeat(np.arange(problem.num_gpus), problem.slots_per_gpu)
    for layer in range(problem.num_layers):
        seats = rng.permutation(owner)
        used = np.zeros(problem.num_gpus, np.int64)
        for position, gpu in enumerate(seats):
            if position < problem.num_experts:
                expert = position
            else:
                absent = np.setdiff1d(np.arange(problem.num_experts), slots[layer, gpu])
                if not absent.size:
                    continue
                expert = int(rng.choice(absent))
            slots[layer, gpu, used[gpu]] = expert
            used[gpu] += 1
    placement = Placement(slots=slots, num_experts=problem.num_experts)
    return found(problem, placement, limits, report, solver="random")
