"""Tokens of replicated experts split over their copies so that the busiest GPU has as little as possible, exactly.

With a placement fixed, the least possible load of the busiest GPU is a flow problem: experts send their tokens to the
GPUs that hold them, and ``T`` is large enough when all of it fits under ``T`` on every GPU. By max-flow min-cut

    ``T* = max over sets S of experts of (load of S + what else the GPUs of S must do) / number of GPUs holding S``.

Starting from a lower bound, either the flow fits, or its minimum cut is a set ``S`` that needs a larger ``T``: at most
as many steps as there are GPUs, usually two or three (Dinkelbach 1967). It is the dispatch problem of LPLB, and has the
optimum of that linear programme.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.counting import compile_kernel
from moeplace.frozen import Floats, Ints

COMPILE_FROM_SPLITS = 30  # single layers and steps, each some milliseconds without


def least_busy_split(load: Floats, host: Ints, count: Ints, num_gpus: int) -> tuple[Floats, Floats]:
    """Split loads over copies so that the busiest GPU is as little loaded as possible.

    Parameters
    ----------
    load
        ``[case, expert]`` loads, at least 0.
    host
        ``[expert, copy]`` GPU of each copy; entries beyond an expert's copies are ignored.
    count
        ``[expert]`` copies of each expert.
    num_gpus
        GPUs.

    Returns
    -------
    tuple
        ``[case, expert, copy]`` loads of the copies, and ``[case]`` the load of the busiest GPU. Complexity for each
        case: O(experts · copies) for each token that finds its GPUs full, a few per replicated expert.
    """
    cases = np.ascontiguousarray(load, np.float64)
    hosts, counts = np.ascontiguousarray(host, np.int64), np.ascontiguousarray(count, np.int64)
    split, busiest = np.zeros((*cases.shape, hosts.shape[1])), np.zeros(len(cases))
    kernel = _compiled() if len(cases) >= COMPILE_FROM_SPLITS else _split_loop
    kernel(cases, hosts, counts, num_gpus, split, busiest)
    return split, busiest


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_split_loop, _split_case, _reach, _raise_limit, _move)


def _split_loop(load: Any, host: Any, count: Any, num_gpus: int, split: Any, busiest: Any) -> None:
    """Fill ``split`` and ``busiest``, case by case; compiled where there are many."""
    used = np.zeros(num_gpus, np.bool_)
    for e in range(host.shape[0]):
        for c in range(count[e]):
            used[host[e, c]] = True
    for case in range(load.shape[0]):
        busiest[case] = _split_case(load[case], host, count, used, split[case])


def _split_case(load: Any, host: Any, count: Any, used: Any, flow: Any) -> float:
    """Fill ``flow`` [expert, copy] and return the load of the busiest GPU."""
    experts, gpus = host.shape[0], len(used)
    fixed, left = np.zeros(gpus), load.copy()
    for e in range(experts):
        if count[e] == 1:
            flow[e, 0] = load[e]
            fixed[host[e, 0]] += load[e]
            left[e] = 0.0
    tolerance = 1e-12 * max(load.sum(), 1.0)
    limit = max(fixed.max(), load.sum() / used.sum())
    room = limit - fixed
    came_by = np.zeros(gpus, np.int64)  # copy over which a search has reached a GPU, -1 before
    parent = np.zeros(experts, np.int64)  # copy from which it has reached an expert, -1 at its start, -2 before
    for start in range(experts):
        while left[start] > tolerance:
            target = _reach(start, host, count, flow, room, came_by, parent, tolerance)
            if target < 0:
                raised = _raise_limit(left, room, came_by, parent, limit, tolerance)
                room += raised - limit
                limit = raised
            else:
                _move(target, host, flow, left, room, came_by, parent)
    return float(limit - (room + 0.0)[used].min())


def _reach(start: int, host: Any, count: Any, flow: Any, room: Any, came_by: Any, parent: Any, tolerance: float) -> int:
    """Search breadth first for a GPU with room, from an expert to its GPUs and on to experts that those could pass on.

    Returns the GPU, or -1 when all within reach are full.
    """
    experts, width = host.shape
    queue = np.zeros(experts, np.int64)
    came_by[:] = -1
    parent[:] = -2
    queue[0], parent[start] = start, -1
    first, last = 0, 1
    while first < last:
        e = queue[first]
        first += 1
        for c in range(count[e]):
            g = host[e, c]
            if came_by[g] >= 0:
                continue
            came_by[g] = e * width + c
            if room[g] > tolerance:
                return int(g)
            for other in range(experts):
                if parent[other] == -2 and count[other] > 1:
                    for d in range(count[other]):
                        if host[other, d] == g and flow[other, d] > tolerance:
                            parent[other] = other * width + d
                            queue[last] = other
                            last += 1
                            break
    return -1


def _raise_limit(left: Any, room: Any, came_by: Any, parent: Any, limit: float, tolerance: float) -> float:
    """Return the limit that the GPUs within reach, all full, need together for what the experts there have left."""
    reached, needed = 0, 0.0
    for g in range(len(room)):
        if came_by[g] >= 0:
            reached += 1
            needed += limit - room[g]
    for e in range(len(left)):
        if parent[e] > -2:
            needed += left[e]
    return float(max(needed / reached, limit + tolerance))


def _move(target: int, host: Any, flow: Any, left: Any, room: Any, came_by: Any, parent: Any) -> None:
    """Move as much as fits along the way that a search has found."""
    width = host.shape[1]
    amount, g = room[target], target
    while parent[came_by[g] // width] >= 0:
        copy = parent[came_by[g] // width]
        amount = min(amount, flow[copy // width, copy % width])
        g = host[copy // width, copy % width]
    amount = min(amount, left[came_by[g] // width])
    room[target] -= amount
    g = target
    while True:
        e = came_by[g] // width
        flow[e, came_by[g] % width] += amount
        if parent[e] < 0:
            left[e] -= amount
            return
        flow[e, parent[e] % width] -= amount
        g = host[e, parent[e] % width]
