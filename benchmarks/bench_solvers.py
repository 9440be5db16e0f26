"""Solvers: time and quality on published shapes."""

from __future__ import annotations

import numpy as np

from benchmarks.cases import Case, best_seconds
from benchmarks.instances import MODELS, make_trace
from moeplace.build import build_problem
from moeplace.metrics import max_over_mean
from moeplace.problem import slots_for
from moeplace.solution import Limits
from moeplace.solvers import solve
from moeplace.solvers.eplb import balance_global, balance_hierarchical

MIXTRAL_CASES = ((4, "cbc"), (4, "cpsat"), (8, "cbc"), (8, "cpsat"))


def cases(seeds: int) -> list[Case]:
    """EPLB at DeepSeek-V3 size, and MoETuner's integer programmes at Mixtral size."""
    return [*_eplb(seeds), *_moetuner(seeds)]


def _eplb(seeds: int) -> list[Case]:
    results = []
    for seed in range(seeds):
        load = np.random.default_rng(seed).lognormal(0, 1, (58, 256))
        slots = slots_for(256, 64, redundant=64)
        seconds = best_seconds(lambda load=load, slots=slots: balance_global(load, slots))
        placed = balance_global(load, slots)
        name = f"eplb 58×256 + 64 on 64 GPUs, seed {seed}"
        quality = f"max/mean {max_over_mean(placed, load).mean():.4f}, {len(placed.duplicates())} duplicates"
        results.append(Case(name=name, value=seconds, unit="s", target=0.3, note=quality))
        nodes = best_seconds(lambda load=load, slots=slots: balance_hierarchical(load, slots, 8, 8))
        results.append(Case(name="  hierarchical, 8 groups on 8 nodes", value=nodes, unit="s", target=0.3))
    return results


def _moetuner(seeds: int) -> list[Case]:
    results = []
    for seed in range(seeds):
        trace = make_trace("mixtral", "mid", seed)
        for gpus, backend in MIXTRAL_CASES:
            problem = build_problem(trace, topology=f"scale-up:{gpus}", model=MODELS["mixtral"])
            answers = []
            seconds = best_seconds(
                lambda problem=problem, backend=backend, answers=answers: answers.append(
                    solve(problem, "moetuner", Limits(options={"backend": backend}))
                ),
                repeats=1,
            )
            gaps = ", ".join(
                f"{stage.name} {stage.status} {'-' if stage.gap is None else format(stage.gap, '.2%')}"
                for stage in answers[0].stages
            )
            name = f"moetuner {backend}, mixtral 32×8 on {gpus} GPUs, seed {seed}"
            results.append(Case(name=name, value=seconds, unit="s", note=gaps))
    return results
