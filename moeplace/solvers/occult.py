"""Uniform groups of co-activated experts, as Occult places them (arXiv 2505.13345): the baseline of GRACE-MoE.

Per layer, experts that tokens choose together share a GPU, and every GPU gets the same number of experts (as even as
slots allow, without copies). A token is then sent once to each GPU it needs. Nodes and loads play no part: which group
goes to which GPU is the order in which they are found.

What could be read of the paper names the goal, not the procedure. Here groups grow one after another, each from the
free expert of most affinity by always taking the one of most affinity to its members, and then exchange experts while
that keeps more affinity: a baseline should not be weaker than its idea. ``exchange=none`` leaves groups as they have
grown. The paper's pruning, which changes what a model computes, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.errors import InputError, ProblemError
from moeplace.grouping import affinity_utilisation, exchanged, grown
from moeplace.packing.eplb import slots_without_copies
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.solution import Clock, Limits, Report, Solution, found

DESCRIPTION = "Occult's uniform groups of experts that tokens choose together, without copies"
EXCHANGES = ("pairs", "none")
OPTIONS: Mapping[str, str] = {
    "exchange": "pairs (default: exchange experts while that keeps more affinity) or none (groups as they have grown)"
}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Group every layer. Complexity: O(layers · experts²), and as much for every exchange.

    Raises
    ------
    ProblemError
        The trace holds only counts.
    """
    exchange = limits.options.get("exchange", EXCHANGES[0])
    if exchange not in EXCHANGES:
        raise InputError(f"exchange {exchange!r}", rule=f"one of {', '.join(EXCHANGES)}")
    together = problem.stats.coactivation
    if together is None:
        raise ProblemError(
            "the trace holds only counts",
            rule="occult groups experts that tokens choose together",
            hint="record a per-token trace, or --solver eplb",
        )
    clock = Clock(limits)
    sizes = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
    lists, kept = [], []
    for affinity in together.astype(np.float64):
        gpu = grown(affinity, sizes)
        if exchange == "pairs" and not clock.over:
            gpu = exchanged(affinity, gpu)
        lists.append([np.flatnonzero(gpu == number).tolist() for number in range(problem.num_gpus)])
        kept.append(affinity_utilisation(affinity, gpu))
    note = f"{np.mean(kept):.1%} of the affinity stays on a GPU"
    if problem.stats.meta.top_k == 1:
        note = "tokens choose one expert each, so no two are chosen together: groups are as good as any"
    placement = Placement.from_lists(lists, problem.num_experts)
    return found(problem, placement, limits, report, solver="occult", notes=(note,), clock=clock)
