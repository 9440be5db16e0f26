"""Contiguous placement: expert ``e`` on GPU ``e // (E/G)``, spare slots repeating the first experts.

What serving stacks do when told nothing (vLLM's ``linear`` strategy, SGLang's ``trivial`` map, Megatron's default).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.frozen import Ints
from moeplace.placement import EMPTY, Placement
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution, found

DESCRIPTION = "contiguous experts, as servers place them by default"
OPTIONS: Mapping[str, str] = {}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Fill slots in order: every expert once, then the first experts again while slots are spare.

    A copy that would land on a GPU that already holds its expert is skipped: the slot stays empty. O(slots).
    """
    placement = contiguous(problem.slots_per_gpu, problem.num_layers, problem.num_experts)
    return found(problem, placement, limits, report, solver="linear")


def contiguous(slots_per_gpu: Ints, num_layers: int, num_experts: int) -> Placement:
    """Return the placement of :func:`solve` for ``slots_per_gpu`` [GPU]."""
    row = np.full((len(slots_per_gpu), int(slots_per_gpu.max())), EMPTY, np.int64)
    number = 0
    for gpu, slots in enumerate(slots_per_gpu):
        for slot in range(int(slots)):
            expert = number % num_experts
            if expert not in row[gpu]:
                row[gpu, slot] = expert
            number += 1
    return Placement(slots=np.broadcast_to(row, (num_layers, *row.shape)), num_experts=num_experts)
