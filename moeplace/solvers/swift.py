"""A deployed placement improved by few moves, as vllm-ascend's SwiftBalancer does.

The placement given (``--baseline``, or a start) is kept but for at most ``moves`` experts that come to a GPU in each
layer. As described for SwiftBalancer: layers whose max/mean is below 1.01 are left alone, at most 100 steps are made
from the busiest GPU, a step takes off at least 1 % of the mean load, redundant copies are chosen anew as well as
exchanged, and the whole change is dropped unless it lowers the sum over layers of the busiest GPU's load below 0.95 of
what it was.
There a pair of ranks exchanges at most once; here the bound is on what comes to a rank, which is what a transfer waits
for. The steps are in :mod:`moeplace.packing.bounded`.

Source: vllm-project/vllm-ascend, SwiftBalancer policy (description).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.errors import InputError, ProblemError
from moeplace.packing.bounded import arrivals, improve_within
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution, found

DESCRIPTION = "SwiftBalancer: the deployed placement (--baseline) improved by at most so many moves per GPU"
USES_START = NEEDS_START = True
MOVES, WORTH, GAIN, BALANCED = 1, 0.95, 0.01, 1.01
OPTIONS: Mapping[str, str] = {
    "moves": f"most experts that come to a GPU in a layer (default: {MOVES})",
    "worth": f"the change is made only if it lowers the busiest GPUs' load to this share (default: {WORTH}; 1: always)",
}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Improve the placement given, layer by layer.

    Raises
    ------
    ProblemError
        There is no placement to start from, it has other slots, or slots are counted over the whole model.
    """
    moves, worth = limits.whole("moves", MOVES), _share(limits, "worth", WORTH)
    before = problem.start if problem.start is not None else problem.baseline
    if before is None or problem.whole_model:
        raise ProblemError(
            "slots are counted over the whole model" if problem.whole_model else "no placement is deployed",
            rule="swift changes a given placement by a few moves, layer by layer",
            hint="--equal-experts layer" if problem.whole_model else "--baseline FILE, or --solver NAME+swift",
        )
    before.check_fits(problem.slots_per_gpu)
    load = problem.stats.load.astype(np.float64)
    after = improve_within(load, before, problem.slots_per_gpu, moves=moves, gain=GAIN, balanced=BALANCED)
    was, now = (float(placement.gpu_load(load).max(axis=1).sum()) for placement in (before, after))
    come = arrivals(before, after)
    falls = now / was if was else 1.0
    note = (
        f"{int(come.sum())} experts come to GPUs, at most {int(come.max())} to one in a layer; "
        f"the busiest GPUs' load falls to {falls:.3f} of what it was"
    )
    if now >= worth * was and worth < 1:
        note = f"the busiest GPUs' load would fall to {falls:.3f}, not below {worth:g}: nothing moves"
        after = improve_within(load, before, problem.slots_per_gpu, moves=0, gain=GAIN, balanced=BALANCED)
    return found(problem, after, limits, report, solver="swift", notes=(note,))


def _share(limits: Limits, name: str, usual: float) -> float:
    try:
        value = float(limits.options.get(name, usual))
        if 0 < value <= 1:
            return value
    except ValueError:
        pass
    raise InputError(f"{name} {limits.options[name]!r}", rule="a number above 0, at most 1")
