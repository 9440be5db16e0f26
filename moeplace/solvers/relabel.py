"""GPUs renamed: every group of experts stays together, and goes where its traffic is cheapest.

Under context-coherent execution the GPUs of each layer get the names that make what crosses GPUs, nodes or links
cheapest (see :mod:`moeplace.ranks`): MoETuner's second programme with the sum for its objective, solved by assignment
problems, and on tori and meshes the map from ranks to coordinates. Where tokens return home and the trace tells their
ranks, groups go to the ranks that choose them most. Loads stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeplace.packing.eplb import balance_global, slots_without_copies
from moeplace.problem import CONTEXT_COHERENT, Problem
from moeplace.ranks import rename_gpus
from moeplace.solution import Clock, Limits, Report, Solution, found

DESCRIPTION = "the start's GPUs renamed for cheaper traffic, in each layer and in all alike (rank maps)"
USES_START = True
OPTIONS: Mapping[str, str] = {}
TRIES = 1000


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Rename the GPUs of the start, or of EPLB's placement. Complexity: O(sweeps · layers · GPUs³)."""
    clock = Clock(limits)
    start = problem.start
    if start is None:
        slots = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
        start = balance_global(problem.stats.load.astype(float), slots)
    notes: tuple[str, ...] = ()
    if problem.dataflow != CONTEXT_COHERENT and problem.stats.source_load is None:
        notes = ("tokens return to homes that the trace does not tell: names of GPUs change nothing on average",)
    tries = max(1, round(TRIES * limits.work))
    placement = rename_gpus(problem, start, seed=limits.seed, tries=tries, stop=lambda: clock.over)
    return found(problem, placement, limits, report, solver="relabel", notes=notes)
