"""TensorRT-LLM's expert load balancer, as its replication and placement are described.

``doReplication`` gives every extra slot to the expert with the most load per copy; ``doPlacement`` takes copies
heaviest first, each to the least loaded rank with a free slot. These are the rules of EPLB's global policy, whatever
groups and nodes there are: no topology, no batches, no current placement. One departure: TensorRT-LLM does not look
whether a rank already holds the expert; here a copy never joins another of its own.

Source: NVIDIA/TensorRT-LLM, ``cpp/tensorrt_llm/runtime/moeLoadBalancer`` (behaviour only).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.packing.eplb import balance_global
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution, found

DESCRIPTION = "TensorRT-LLM's balancer: extra copies to the most load per copy, heaviest first to the least loaded rank"
OPTIONS: Mapping[str, str] = {}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Balance the load of every layer apart. Complexity: O(slots · layers · GPUs), vectorised over layers."""
    placement = balance_global(problem.stats.load.astype(np.float64), problem.slots_per_gpu)
    return found(problem, placement, limits, report, solver="tensorrt-llm")
