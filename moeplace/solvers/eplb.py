"""DeepSeek's expert-parallel load balancer (EPLB), re-derived from its description.

Per layer: extra copies go one by one to the expert with the most load per copy (optimal for the hottest copy alone);
copies are then packed onto GPUs, heaviest first, each onto the least loaded GPU with a free slot. ``hierarchical``
first packs whole expert groups onto nodes and repeats the two steps inside each node, so that group-limited routing
stays inside nodes; ``global`` ignores nodes. Load is all it sees: no traffic, no batches, no current placement. The
policies themselves are in :mod:`moeplace.packing.eplb`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.errors import InputError, ProblemError
from moeplace.packing.eplb import balance_global, balance_hierarchical, slots_without_copies
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution, found

DESCRIPTION = "DeepSeek's EPLB: replicate the hottest experts, pack copies heaviest first"
POLICIES = ("auto", "hierarchical", "global")
COPIES = ("fill", "none")
OPTIONS: Mapping[str, str] = {
    "policy": "auto (hierarchical where expert groups divide over nodes), hierarchical or global",
    "copies": "fill (default: every spare slot gets a copy) or none (spare slots stay empty)",
}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Balance the load of every layer apart. Complexity: O(slots · layers · GPUs), vectorised over layers."""
    policy = limits.options.get("policy", "auto")
    if policy not in POLICIES:
        raise InputError(f"EPLB policy {policy!r}", rule=f"one of {', '.join(POLICIES)}")
    groups, nodes = problem.model.num_groups, problem.topology.num_nodes
    grouped = nodes > 1 and groups > 1 and groups % nodes == 0
    if policy == "hierarchical" and nodes > 1 and not grouped:
        raise ProblemError(
            f"{groups} expert groups on {nodes} nodes",
            rule="the hierarchical policy packs whole groups, the same number onto every node",
            hint="--option policy=global, or auto",
        )
    if limits.options.get("copies", "fill") not in COPIES:
        raise InputError(f"EPLB copies {limits.options['copies']!r}", rule=f"one of {', '.join(COPIES)}")
    slots = problem.slots_per_gpu
    if limits.options.get("copies") == "none":
        slots = slots_without_copies(slots, problem.num_experts)
    load = problem.stats.load.astype(np.float64)
    hierarchical = grouped and policy != "global"
    placement = balance_hierarchical(load, slots, nodes, groups) if hierarchical else balance_global(load, slots)
    policy = "hierarchical" if hierarchical else "global"
    return found(problem, placement, limits, report, solver="eplb", notes=(f"EPLB's {policy} policy",))
