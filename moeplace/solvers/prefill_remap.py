"""Prefill-guided remapping ("Patterns behind Chaos", arXiv 2510.05497, Algorithm 2): decode placed by prefill's loads.

Per layer, experts in order of decreasing cost go to the least loaded GPU that has fewer than its share of them. The
cost of an expert is a roofline of its prefill frequency. See :mod:`moeplace.packing.prefill` for both, and for what is
assumed. With a cost in proportion to the frequency this is EPLB's packing without copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.packing.eplb import pack, slots_without_copies
from moeplace.packing.prefill import prefill_frequency, roofline_of
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution, found

DESCRIPTION = "Patterns behind Chaos, Remap: experts dealt by roofline cost of prefill's loads, heaviest first"
FITTED_ON = "prefill"  # whatever phase it is judged on
OPTIONS: Mapping[str, str] = {}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Place every layer by the loads of its prefill tokens. Complexity: O(layers · experts · (GPUs + log experts))."""
    frequency, notes = prefill_frequency(problem)
    cost = roofline_of(problem)(frequency)
    sizes = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
    where = pack(cost, sizes, None).pack_of
    gpus = np.arange(problem.num_gpus)
    lists = [[np.flatnonzero(row == gpu).tolist() for gpu in gpus] for row in where]
    placement = Placement.from_lists(lists, problem.num_experts)
    return found(problem, placement, limits, report, solver="prefill-remap", notes=notes)
