"""Contiguous placement: expert ``e`` on GPU ``e // (E/G)``, spare slots repeating the first experts.

What serving stacks do when told nothing (vLLM's ``linear`` strategy, SGLang's ``trivial`` map, Megatron's default).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.objective import UNITS, objective_value
from moeplace.placement import EMPTY, Placement
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution, Status, StopReason

DESCRIPTION = "contiguous experts, as servers place them by default"
OPTIONS: Mapping[str, str] = {}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Fill slots in order: every expert once, then the first experts again while slots are spare.

    A copy that would land on a GPU that already holds its expert is skipped: the slot stays empty. O(slots).
    """
    placement = contiguous(problem)
    return Solution(
        placement=placement,
        objective=objective_value(problem, placement),
        unit=UNITS[problem.objective],
        status=Status.FEASIBLE,
        stop_reason=StopReason.EXHAUSTED,
        solver="linear",
        seed=limits.seed,
        history=tuple(report.history),
    )


def contiguous(problem: Problem) -> Placement:
    """Return the placement of :func:`solve`."""
    row = np.full((problem.num_gpus, problem.max_slots), EMPTY, np.int64)
    number = 0
    for gpu, slots in enumerate(problem.slots_per_gpu):
        for slot in range(int(slots)):
            expert = number % problem.num_experts
            if expert not in row[gpu]:
                row[gpu, slot] = expert
            number += 1
    return Placement(slots=np.broadcast_to(row, (problem.num_layers, *row.shape)), num_experts=problem.num_experts)
