r"""Copies chosen and packed by the risk of GPUs: mean plus ``z`` deviations, what is hot together apart.

Over the steps of a profile expert ``e`` has a mean load ``μ_e``, and loads covary by ``Σ_ef``. With ``n_e`` copies
that share evenly, a GPU that holds the set ``D`` has the risk

    R_D = Σ_e μ_e/n_e + z·√(Σ_{e,f ∈ D} Σ_ef/(n_e·n_f))

Copies are packed heaviest first (by their own risk), each onto the GPU whose risk stays lowest. An extra copy goes to
the expert with the most risk per copy *whose extra copy does not make that packing worse*, else to the one that harms
it least: counts and packing are chosen together, which EPLB does not.

FlashLB (vllm-ascend, ``policy_flashlb``) searches counts by a grouped tree instead; this greedy reaches the figure that
is published for it (205 where EPLB has 232). Steps are judged by mean and covariance alone, as there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.counting import compile_kernel
from moeplace.frozen import Floats, Ints
from moeplace.placement import EMPTY, Placement

Z = 0.674  # of the upper quartile of a normal distribution, as FlashLB has it
COMPILE_FROM = 200_000  # copies times GPUs that may be looked at: about a second without compiling
SAME = 1e-12


def balance_risk(
    mean: Floats,
    covariance: Callable[[int], Floats],
    slots_per_gpu: Ints,
    *,
    z: float = Z,
    stop: Callable[[], bool] = lambda: False,
) -> Placement:
    """Choose copies and pack them, layer by layer.

    Parameters
    ----------
    mean
        ``[layer, expert]`` mean loads.
    covariance
        Layer → ``[expert, expert]`` covariance of loads over steps.
    slots_per_gpu
        ``[GPU]`` slots of each.
    z
        Deviations above the mean that count as risk.
    stop
        Asked before every extra copy; what is left is packed without more.

    Returns
    -------
    Placement
        Copies of an expert are on distinct GPUs; a slot whose copy would have no other GPU stays empty. Complexity:
        O(extra copies · tries · copies · GPUs · slots of a GPU) for each layer; tries are few.
    """
    layers, experts = mean.shape
    room = np.asarray(slots_per_gpu, np.int64)
    spare = int(room.sum()) - experts
    slots = np.full((layers, len(room), int(room.max())), EMPTY, np.int64)
    enough = layers * max(1, spare) * int(room.sum()) * len(room) >= COMPILE_FROM
    kernel = _compiled() if enough else _choose
    for layer in range(layers):
        count = np.ones(experts, np.int64)
        spread = np.ascontiguousarray(covariance(layer))
        kernel(mean[layer], spread, z, room, 0, count, slots[layer])
        for _ in range(spare):  # one by one, so that a stop comes through
            if stop():
                break
            before = int(count.sum())
            kernel(mean[layer], spread, z, room, 1, count, slots[layer])
            if int(count.sum()) == before:
                break
    return Placement(slots=slots, num_experts=experts)


def gpu_risk(placement: Placement, mean: Floats, covariance: Callable[[int], Floats], z: float = Z) -> Floats:
    """``[layer, GPU]`` mean load and ``z`` deviations, copies sharing evenly."""
    share = placement.even_share()
    spread = np.array([np.einsum("ge,ef,gf->g", part, covariance(i), part) for i, part in enumerate(share)])
    risk: Floats = placement.gpu_load(mean) + z * np.sqrt(np.maximum(0.0, spread))
    return risk


def step_covariance(steps: Floats) -> Floats:
    """``[expert, expert]`` covariance of ``steps`` [expert, step]; nothing where there is one step."""
    if steps.shape[1] < 2:
        return np.zeros((len(steps), len(steps)))
    centred = steps - steps.mean(axis=1, keepdims=True)
    covariance: Floats = centred @ centred.T / steps.shape[1]
    return covariance


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_choose, _packed)


def _choose(mean: Any, covariance: Any, z: float, room: Any, extra: int, count: Any, slots: Any) -> None:
    """Choose ``count`` [expert] and pack ``slots`` [GPU, slot] of one layer."""
    experts = len(mean)
    most = (room > 0).sum()
    trial = slots.copy()
    worst = _packed(mean, covariance, z, room, count, slots)
    own = mean + z * np.sqrt(np.maximum(0.0, np.diag(covariance)))
    for _ in range(extra):
        order = np.argsort(-own / count, kind="mergesort")
        least, chosen = np.inf, -1
        for place in range(experts):
            e = order[place]
            if count[e] >= most:
                continue
            count[e] += 1
            value = _packed(mean, covariance, z, room, count, trial)
            count[e] -= 1
            if value < least * (1 - SAME):
                least, chosen = value, e
            if value <= worst * (1 + SAME):
                chosen = e
                break
        if chosen < 0:
            return
        count[chosen] += 1
        worst = _packed(mean, covariance, z, room, count, slots)


def _packed(mean: Any, covariance: Any, z: float, room: Any, count: Any, slots: Any) -> float:
    """Pack copies by risk into ``slots``; return the risk of the riskiest GPU, infinite where copies do not fit."""
    experts, gpus = len(mean), len(room)
    used = np.zeros(gpus, np.int64)
    load, variance, risk = np.zeros(gpus), np.zeros(gpus), np.zeros(gpus)
    slots[:] = EMPTY
    own = (mean + z * np.sqrt(np.maximum(0.0, np.diag(covariance)))) / count
    order = np.argsort(-own, kind="mergesort")
    for place in range(experts):
        e = order[place]
        for _ in range(count[e]):
            least, target, wider = np.inf, -1, 0.0
            for g in range(gpus):
                if used[g] >= room[g]:
                    continue
                spread, holds = covariance[e, e] / (count[e] * count[e]), False
                for j in range(used[g]):
                    f = slots[g, j]
                    holds = holds or f == e
                    spread += 2.0 * covariance[e, f] / (count[e] * count[f])
                if holds:
                    continue
                value = load[g] + mean[e] / count[e] + z * np.sqrt(max(0.0, variance[g] + spread))
                if value < least:
                    least, target, wider = value, g, spread
            if target < 0:
                return np.inf
            slots[target, used[target]] = e
            used[target] += 1
            load[target] += mean[e] / count[e]
            variance[target] += wider
            risk[target] = least
    return risk.max()
