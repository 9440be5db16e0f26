"""What "Patterns behind Chaos" (arXiv 2510.05497, Algorithm 2) places by: prefill frequencies and a roofline cost.

* *Frequency* ``f[l, e]``: selections by the prefill tokens the problem has seen. Where its trace is already cut to one
  phase (``--phase prefill``) or tells none, these are all its tokens.
* *Cost*: "a roofline-based cost model", whose formula could not be read. Here it is the larger of reading an expert's
  weights, once if any token chose it, and of computing its rows, for the rows of a step of the problem's batch law:
  ``max(P(n>0)·bytes/bandwidth, E⌈n/τ⌉·τ·FLOPs/rate)``, ``n`` a Poisson number. Costs of a GPU add up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeplace.affinity import grouped_load
from moeplace.compute import ExpertCompute
from moeplace.frozen import Floats
from moeplace.problem import Problem
from moeplace.trace import PHASES, PREFILL


def prefill_frequency(problem: Problem) -> tuple[Floats, tuple[str, ...]]:
    """``[layer, expert]`` mean selections of each expert in a step of the problem's law, and what to tell of it."""
    stats = problem.stats
    load, notes = stats.load, ("the trace holds only counts: they are taken for prefill's",)
    if (sample := stats.sample) is not None:
        by_phase = grouped_load(sample, sample.phase.astype(np.int64), len(PHASES))
        tokens = np.bincount(sample.phase, minlength=len(PHASES))
        prompt = int(tokens[PREFILL])
        if prompt == 0:
            notes = ("no prefill token: placed by the loads of decode, as an oracle would",)
        elif prompt == sample.num_tokens:
            notes = ("placed by the loads of prefill: score --phase decode judges it on decode",)
        elif (by_phase[PREFILL].sum(axis=1) > 0).all():
            load = by_phase[PREFILL]
            part = "" if sample.num_tokens == stats.num_tokens else " of a sample"
            notes = (f"placed by the loads of {prompt} prefill tokens{part}, decode tokens left out",)
    total = load.sum(axis=1, keepdims=True)
    rows = load * (stats.meta.top_k * problem.law.step_tokens / total)
    return rows.astype(np.float64), notes


def roofline_of(problem: Problem) -> Callable[[Floats], Floats]:
    """Return the cost [µs] of a copy by the mean rows it serves in a step."""
    compute = ExpertCompute.of(problem.model, problem.topology.accelerator, problem.law.phase)

    def cost(rows: Floats) -> Floats:
        memory, arithmetic = compute.expected_copy_us(rows)
        larger: Floats = np.maximum(memory, arithmetic)
        return larger

    return cost
