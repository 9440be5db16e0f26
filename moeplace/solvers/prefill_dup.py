"""Prefill-guided duplication ("Patterns behind Chaos", arXiv 2510.05497, Algorithm 2): copies by prefill's loads.

Per layer, from the contiguous placement, spare slots get copies one by one: the expert and the GPU whose copy changes
the load of the busiest GPU most for the better. Copies share an expert's tokens evenly; loads are roofline costs of
prefill frequencies (:mod:`moeplace.packing.prefill`). As printed, every spare slot is filled, also where a copy makes
nothing better: reading its weights then costs time in small steps of decode.

Of copies that change the busiest GPU alike the one whose GPU ends with the least load is taken, then the lowest numbers
of expert and GPU. The paper has one extra slot per GPU (``--num-redundant-experts`` as many as GPUs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from moeplace.errors import ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.packing.eplb import slots_without_copies
from moeplace.packing.prefill import prefill_frequency, roofline_of
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.solution import Clock, Limits, Report, Solution, found

Bools: TypeAlias = npt.NDArray[np.bool_]

DESCRIPTION = "Patterns behind Chaos, Dup: spare slots get the copies that relieve the busiest GPU, by prefill's loads"
FITTED_ON = "prefill"  # whatever phase it is judged on
OPTIONS: Mapping[str, str] = {}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Fill the spare slots of every layer. Complexity: O(layers · spare slots · experts · GPUs).

    Raises
    ------
    ProblemError
        No slot is spare.
    """
    if problem.num_slots == problem.num_experts:
        raise ProblemError(
            "no slot is spare",
            rule="prefill-dup keeps the contiguous placement and adds copies",
            hint=f"--num-redundant-experts {problem.num_gpus}, as published, or --solver prefill-remap",
        )
    frequency, notes = prefill_frequency(problem)
    roofline = roofline_of(problem)
    homes = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
    clock, lists = Clock(limits), []
    for row in frequency:
        host = np.zeros((problem.num_experts, problem.num_gpus), bool)
        host[np.arange(problem.num_experts), np.repeat(np.arange(problem.num_gpus), homes)] = True
        own = [np.flatnonzero(host[:, gpu]).tolist() for gpu in range(problem.num_gpus)]
        if not clock.over:
            for expert, gpu in duplicated(row, host, problem.slots_per_gpu - homes, roofline):
                own[gpu].append(expert)
        lists.append(own)
    placement = Placement.from_lists(lists, problem.num_experts)
    return found(problem, placement, limits, report, solver="prefill-dup", notes=notes, clock=clock)


def duplicated(
    frequency: Floats, host: Bools, spare: Ints, roofline: Callable[[Floats], Floats]
) -> list[tuple[int, int]]:
    """Return ``(expert, GPU)`` of the copies of one layer, in the order in which they are made.

    Parameters
    ----------
    frequency
        ``[expert]`` tokens of each expert.
    host
        ``[expert, GPU]`` who holds whom before.
    spare
        ``[GPU]`` free slots.
    roofline
        Cost of a copy by the tokens it serves.
    """
    host, spare, made = host.copy(), spare.copy(), []
    costs = np.stack([roofline(frequency / number) for number in range(1, host.shape[1] + 1)])
    expert = np.arange(len(frequency))
    while (spare > 0).any():
        count = host.sum(axis=1)
        now = costs[count - 1, expert]
        shared = costs[np.minimum(count, len(costs) - 1), expert]
        load = now @ host
        relieved = load - (now - shared)[:, None] * host
        receiving = load[None, :] + shared[:, None]
        busiest = np.maximum(relieved.max(axis=1)[:, None], receiving)
        closed = host | (spare <= 0)[None, :]
        if closed.all():
            break
        least = float(busiest[~closed].min())
        tied = ~closed & (busiest <= least * (1 + 1e-12))
        best = int(np.where(tied, receiving, np.inf).argmin())
        chosen, gpu = divmod(best, host.shape[1])
        host[chosen, gpu] = True
        spare[gpu] -= 1
        made.append((chosen, gpu))
    return made
