"""Copies of experts packed onto GPUs so that the busiest GPU of every layer has as little load as possible.

From a start (EPLB's counts and packing), the busiest GPU exchanges the pair of experts that lowers it most, until none
does. Then it is kicked: a few random exchanges, or a slot that passes from one expert to another, which changes how
many copies they have. What came of a kick is kept unless it is clearly worse; a layer is done when it meets its lower
bound or the kicks are used up. Copies of an expert share its load evenly and sit on distinct GPUs.

The kernels are compiled where there is enough to do, and give the same with or without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace.counting import compile_kernel
from moeplace.frozen import Floats, Ints
from moeplace.placement import EMPTY, Placement

COMPILE_FROM_KICKS = 3_000  # times slots of a layer over 64; about a second without
CLOSED = -2  # a slot that a GPU with fewer slots than others does not have
COPY_KICKS = 3  # of 8 kicks, where slots are spare
SLACK = 2e-4  # how much worse than the best a kicked layer may be and go on
DRAWS = 16
DESCENTS = 30  # kicks that the first descent of a layer takes as long as


def pack_layers(
    load: Floats,
    start: Placement,
    slots_per_gpu: Ints,
    *,
    floor: Floats,
    kicks: int,
    seed: int = 0,
    fill: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> Placement:
    """Balance every layer.

    Parameters
    ----------
    load
        ``[layer, expert]`` loads.
    start
        A placement that fits.
    slots_per_gpu
        ``[GPU]`` slots of each.
    floor
        ``[layer]`` lower bounds on the load of the busiest GPU; a layer that meets its own is done.
    kicks
        Kicks of each layer.
    seed
        Of the kicks.
    fill
        Put further copies into empty slots; otherwise a layer keeps its number of copies, and empty slots are room.
    stop
        Asked after every layer; the layers after it stay as they were.

    Returns
    -------
    Placement
        No layer is worse than at the start. Complexity: O(slots of a GPU · slots of all) for each exchange.
    """
    layers, _, width = start.slots.shape
    # full slots first: a GPU with fewer slots than others has none behind them
    order = np.argsort(start.slots == EMPTY, axis=2, kind="stable")
    slots = np.take_along_axis(start.slots, order, axis=2).astype(np.int64)
    slots[:, np.arange(width)[None, :] >= np.asarray(slots_per_gpu)[:, None]] = CLOSED
    count = start.replicas()
    draws = np.random.default_rng(seed).integers(0, 2**31, (kicks, DRAWS))
    spare = int(np.sum(slots_per_gpu)) > start.num_experts
    copying = 0 if not spare else 2 if fill else 1
    enough = layers * (kicks + DESCENTS) * slots[0].size >= COMPILE_FROM_KICKS * 64
    kernel = _compiled() if enough else _pack_layer
    for layer in range(layers):
        if stop():
            break
        kernel(np.ascontiguousarray(load[layer], np.float64), count[layer], slots[layer], floor[layer], draws, copying)
    return Placement(slots=np.maximum(slots, EMPTY), num_experts=start.num_experts)


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_pack_layer, _kick_copies, _kick_places, _descend, _exchange, _recount)


def _pack_layer(load: Any, count: Any, slots: Any, floor: float, draws: Any, copying: int) -> None:
    """Improve one layer's ``slots`` [GPU, slot] and ``count`` [expert] in place.

    ``copying`` is 0 where copies stay as many as they are of each expert, 1 where they pass from expert to expert, and
    2 where empty slots take more.
    """
    experts, gpus = len(load), slots.shape[0]
    weight, busy, holds = np.zeros(experts), np.zeros(gpus), np.zeros((experts, gpus), np.bool_)
    _recount(load, count, slots, weight, busy, holds)
    _descend(weight, slots, busy, holds)
    best, best_slots, best_count = busy.max(), slots.copy(), count.copy()
    for kick in range(len(draws)):
        if best <= floor * (1 + 1e-12):
            break
        draw = draws[kick]
        if copying and draw[0] % 8 < COPY_KICKS:
            _kick_copies(count, slots, busy, holds, draw, copying)
            _recount(load, count, slots, weight, busy, holds)
        else:
            _kick_places(weight, slots, busy, holds, draw)
        _descend(weight, slots, busy, holds)
        if busy.max() < best * (1 - 1e-12):
            best = busy.max()
            best_slots[:] = slots
            best_count[:] = count
        elif busy.max() > best * (1 + SLACK):
            slots[:] = best_slots
            count[:] = best_count
            _recount(load, count, slots, weight, busy, holds)
    slots[:] = best_slots
    count[:] = best_count


def _kick_copies(count: Any, slots: Any, busy: Any, holds: Any, draw: Any, copying: int) -> None:
    """Give a slot of an expert with several copies to an expert of the busiest GPU."""
    gpus, width = slots.shape
    more = slots[busy.argmax(), draw[1] % width]
    first = draw[2] % (gpus * width)
    for place in range(gpus * width):
        g, j = (first + place) % (gpus * width) // width, (first + place) % width
        less = slots[g, j]
        free = (copying == 2 and less == EMPTY) or (less >= 0 and less != more and count[less] > 1)
        if more >= 0 and free and not holds[more, g]:
            slots[g, j] = more
            count[more] += 1
            if less >= 0:
                count[less] -= 1
            return


def _kick_places(weight: Any, slots: Any, busy: Any, holds: Any, draw: Any) -> None:
    """Make two to four random exchanges, the first of the busiest GPU."""
    gpus, width = slots.shape
    busiest = busy.argmax()
    for turn in range(2 + draw[0] // 8 % 3):
        h = busiest if turn == 0 else draw[1 + 4 * turn - 1] % gpus
        g, i, j = draw[1 + 4 * turn] % gpus, draw[2 + 4 * turn - 1] % width, draw[3 + 4 * turn - 1] % width
        a, b = slots[h, i], slots[g, j]
        apart = (a < 0 or not holds[a, g]) and (b < 0 or not holds[b, h])
        if g != h and a != b and a != CLOSED and b != CLOSED and apart:
            _exchange(weight, slots, busy, holds, h, i, g, j)


def _exchange(weight: Any, slots: Any, busy: Any, holds: Any, h: int, i: int, g: int, j: int) -> None:
    """Exchange what stands in two slots of different GPUs; either may be empty."""
    a, b = slots[h, i], slots[g, j]
    slots[h, i], slots[g, j] = b, a
    moved = 0.0
    if a >= 0:
        holds[a, h], holds[a, g] = False, True
        moved += weight[a]
    if b >= 0:
        holds[b, g], holds[b, h] = False, True
        moved -= weight[b]
    busy[h] -= moved
    busy[g] += moved


def _descend(weight: Any, slots: Any, busy: Any, holds: Any) -> None:
    """Make the best exchange of the busiest GPU until none lowers the busier of the two."""
    gpus, width = slots.shape
    while True:
        h = busy.argmax()
        top, best = busy[h], busy[h] * (1 - 1e-12)
        best_i, best_g, best_j = -1, -1, -1
        for i in range(width):
            a = slots[h, i]
            if a < 0:
                continue
            for g in range(gpus):
                if g == h or holds[a, g]:
                    continue
                for j in range(width):
                    b = slots[g, j]
                    if b == CLOSED or (b >= 0 and holds[b, h]):
                        continue
                    moved = weight[a] - (weight[b] if b >= 0 else 0.0)
                    busier = max(top - moved, busy[g] + moved)
                    if busier < best:
                        best, best_i, best_g, best_j = busier, i, g, j
        if best_i < 0:
            return
        _exchange(weight, slots, busy, holds, h, best_i, best_g, best_j)


def _recount(load: Any, count: Any, slots: Any, weight: Any, busy: Any, holds: Any) -> None:
    """Compute loads of copies and GPUs, and who holds what, anew."""
    weight[:] = load / count
    busy[:] = 0.0
    holds[:] = False
    for g in range(slots.shape[0]):
        for j in range(slots.shape[1]):
            if slots[g, j] >= 0:
                busy[g] += weight[slots[g, j]]
                holds[slots[g, j], g] = True
