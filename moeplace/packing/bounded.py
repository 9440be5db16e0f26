"""A deployed placement made better by few moves: at most so many experts come to a GPU in a layer.

From the placement that is there, the busiest GPU exchanges one of its experts with another GPU's, or hands some of its
load to one more copy in a slot that an expert with several copies gives up (or that is empty). The step that leaves the
least load on the GPUs it touches is made, as long as it takes off at least a given share of the mean load and every GPU
stays within its moves. Load alone counts; copies share evenly and stay on distinct GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.counting import compile_kernel
from moeplace.frozen import Floats, Ints
from moeplace.placement import EMPTY, Placement

CLOSED = -2  # a slot that a GPU with fewer slots than others does not have
MOST_STEPS = 100  # of a layer
COMPILE_FROM = 2_000_000  # slots of a GPU times slots of a layer times GPUs times layers


def improve_within(
    load: Floats, start: Placement, slots_per_gpu: Ints, *, moves: int, gain: float, balanced: float
) -> Placement:
    """Improve every layer by few moves.

    Parameters
    ----------
    load
        ``[layer, expert]`` loads.
    start
        The placement that is there; it fits the slots, without two copies of an expert on a GPU.
    slots_per_gpu
        ``[GPU]`` slots of each.
    moves
        Most experts that come to a GPU in a layer.
    gain
        Least share of the mean GPU load that a step takes off.
    balanced
        Layers whose max/mean is below this stay as they are.

    Returns
    -------
    Placement
        No GPU of it has more than ``moves`` experts in a layer that were not there. Complexity: O(steps · slots of a
        GPU · slots of a layer · copies) for each layer.
    """
    layers, gpus, width = start.slots.shape
    room = np.asarray(slots_per_gpu)
    slots = np.full((layers, gpus, max(width, int(room.max()))), EMPTY, np.int64)
    slots[:, :, :width] = start.slots
    order = np.argsort(slots == EMPTY, axis=2, kind="stable")
    slots = np.take_along_axis(slots, order, axis=2)
    slots[:, np.arange(slots.shape[2])[None, :] >= room[:, None]] = CLOSED
    count = start.replicas()
    enough = layers * slots.shape[2] * slots[0].size * gpus >= COMPILE_FROM
    kernel = _compiled() if enough else _improve
    for layer in range(layers):
        kernel(np.ascontiguousarray(load[layer], np.float64), count[layer], slots[layer], moves, gain, balanced)
    slots = np.maximum(slots, EMPTY)[:, :, : int(room.max())]
    return Placement(slots=slots, num_experts=start.num_experts)


def arrivals(before: Placement, after: Placement) -> Ints:
    """``[layer, GPU]`` experts that are on a GPU and were not."""
    come: Ints = ((after.copies() > 0) & (before.copies() == 0)).sum(axis=2)
    return come


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_improve, _best_exchange, _best_copy, _copy_peak)


def _improve(load: Any, count: Any, slots: Any, moves: int, gain: float, balanced: float) -> None:
    """Improve one layer's ``slots`` [GPU, slot] and ``count`` [expert] in place."""
    gpus, width = slots.shape
    come = np.zeros(gpus, np.int64)
    holds, busy = np.zeros((len(load), gpus), np.bool_), np.zeros(gpus)
    for g in range(gpus):
        for j in range(width):
            if slots[g, j] >= 0:
                holds[slots[g, j], g] = True
                busy[g] += load[slots[g, j]] / count[slots[g, j]]
    mean = busy.sum() / gpus
    for _ in range(MOST_STEPS):
        h = int(busy.argmax())
        if busy[h] < balanced * mean:
            return
        most = busy[h] - max(gain, 1e-9) * mean
        peak, i, g, j = _best_exchange(load, count, slots, busy, holds, come, moves, h, most)
        other, x, y, z = _best_copy(load, count, slots, busy, holds, come, moves, h, most)
        if i < 0 and x < 0:
            return
        if x >= 0 and other < peak:
            a, b = slots[h, x], slots[y, z]
            for k in range(gpus):
                busy[k] += holds[a, k] * (load[a] / (count[a] + 1) - load[a] / count[a])
                if b >= 0 and count[b] > 1:
                    busy[k] += holds[b, k] * (load[b] / (count[b] - 1) - load[b] / count[b])
            busy[y] += load[a] / (count[a] + 1)
            count[a] += 1
            holds[a, y] = True
            if b >= 0:
                count[b] -= 1
                busy[y] -= load[b] / count[b]
                holds[b, y] = False
            slots[y, z] = a
            come[y] += 1
            continue
        a, b = slots[h, i], slots[g, j]
        slots[h, i], slots[g, j] = b, a
        moved = load[a] / count[a]
        holds[a, h], holds[a, g] = False, True
        come[g] += 1
        if b >= 0:
            moved -= load[b] / count[b]
            holds[b, g], holds[b, h] = False, True
            come[h] += 1
        busy[h] -= moved
        busy[g] += moved


def _best_exchange(
    load: Any, count: Any, slots: Any, busy: Any, holds: Any, come: Any, moves: int, h: int, most: float
) -> Any:
    """Least load of the busier of the two after an exchange of ``h``, and its two slots; -1 where none is allowed."""
    gpus, width = slots.shape
    best, best_i, best_g, best_j = most, -1, -1, -1
    for i in range(width):
        a = slots[h, i]
        if a < 0:
            continue
        for g in range(gpus):
            if g == h or holds[a, g] or come[g] >= moves:
                continue
            for j in range(width):
                b = slots[g, j]
                if b == CLOSED or (b >= 0 and (holds[b, h] or come[h] >= moves)):
                    continue
                moved = load[a] / count[a] - (load[b] / count[b] if b >= 0 else 0.0)
                peak = max(busy[h] - moved, busy[g] + moved)
                if peak <= best:
                    best, best_i, best_g, best_j = peak, i, g, j
    return (best if best_i >= 0 else np.inf), best_i, best_g, best_j


def _best_copy(
    load: Any, count: Any, slots: Any, busy: Any, holds: Any, come: Any, moves: int, h: int, most: float
) -> Any:
    """Least load of the GPUs touched when an expert of ``h`` gets one more copy, and its slot and the copy's."""
    gpus, width = slots.shape
    best, best_i, best_g, best_j = most, -1, -1, -1
    for i in range(width):
        a = slots[h, i]
        if a < 0:
            continue
        for g in range(gpus):
            if holds[a, g] or come[g] >= moves:
                continue
            for j in range(width):
                b = slots[g, j]
                if b == CLOSED or (b >= 0 and count[b] < 2):
                    continue
                peak = _copy_peak(load, count, busy, holds, a, b, g)
                if peak <= best:
                    best, best_i, best_g, best_j = peak, i, g, j
    return (best if best_i >= 0 else np.inf), best_i, best_g, best_j


def _copy_peak(load: Any, count: Any, busy: Any, holds: Any, a: int, b: int, g: int) -> float:
    """Most load of the GPUs touched when ``a`` takes a slot of ``b`` (or an empty one) on ``g``."""
    less = load[a] / (count[a] + 1) - load[a] / count[a]
    more = load[b] / (count[b] - 1) - load[b] / count[b] if b >= 0 else 0.0
    peak = busy[g] + load[a] / (count[a] + 1) - (load[b] / count[b] if b >= 0 else 0.0)
    for k in range(len(busy)):
        if k != g and (holds[a, k] or (b >= 0 and holds[b, k])):
            after = busy[k] + (less if holds[a, k] else 0.0) + (more if b >= 0 and holds[b, k] else 0.0)
            peak = max(peak, after)
    return peak
