"""Copies and places by the risk of GPUs, mean plus ``z`` deviations with covariance, as FlashLB has it.

The mean-balanced placement puts experts of one topic on one GPU, which is then busy in the steps of that topic. Here
the load of a GPU is its mean over the profile's steps and ``z`` standard deviations, covariances included; counts of
copies are chosen by what the packing makes of them. The method is in :mod:`moeplace.packing.risk`. Steps are those of a
sampled problem, else recorded counts; without either there is no variance to see, and means alone are packed.

Source: vllm-project/vllm-ascend, FlashLB policy (description and published example; the search over counts is ours).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeplace.batches import expert_rows
from moeplace.errors import InputError
from moeplace.frozen import Floats
from moeplace.packing.risk import Z, balance_risk, step_covariance
from moeplace.problem import Problem
from moeplace.solution import Clock, Limits, Report, Solution, found

DESCRIPTION = "FlashLB's risk: mean load and deviations with covariance, copies chosen by what their packing gains"
OPTIONS: Mapping[str, str] = {"z": f"standard deviations that count as risk (default: {Z}, the upper quartile)"}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Balance the risk of every layer apart. Complexity: see :func:`moeplace.packing.risk.balance_risk`."""
    z, clock = _deviations(limits), Clock(limits)
    steps, notes = _steps(problem), []
    mean = problem.stats.load.astype(np.float64)
    if steps is None or steps.shape[2] < 2:
        nothing = np.zeros((problem.num_experts, problem.num_experts))
        placement = balance_risk(mean, lambda _: nothing, problem.slots_per_gpu, z=z, stop=lambda: clock.over)
        notes.append("without steps there is no variance: --risk-batches N draws some, counts record them")
    else:
        told = steps
        placement = balance_risk(
            told.mean(axis=2),
            lambda layer: step_covariance(told[layer].astype(np.float64)),
            problem.slots_per_gpu,
            z=z,
            stop=lambda: clock.over,
        )
    return found(problem, placement, limits, report, solver="flashlb", notes=tuple(notes), clock=clock)


def _deviations(limits: Limits) -> float:
    text = limits.options.get("z", str(Z))
    try:
        z = float(text)
    except ValueError:
        z = -1.0
    if not 0 <= z < float("inf"):
        raise InputError(f"z {text!r}", rule="a number of at least 0")
    return z


def _steps(problem: Problem) -> Floats | None:
    """``[layer, expert, step]`` loads of the steps that are known."""
    if problem.steps is not None:
        return expert_rows(problem.steps).astype(np.float64)
    recorded = problem.stats.step_load
    return None if recorded is None else np.moveaxis(recorded, 0, 2).astype(np.float64)
