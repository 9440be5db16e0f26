"""States made to keep every load cap, at the least loss of pairs.

An annealed state ends within the caps but for a few selections in a few layers. There the busiest GPU gives one expert
for another: of all swaps that bring it under the cap and put no other above, the one that keeps most pairs, else the
one that takes most off the excess. A layer where no swap helps any more is taken from a state that keeps the caps, its
GPUs renamed for the best fit with the layers beside it. Copies of an expert stay on distinct GPUs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moeplace.chains.instance import Instance
from moeplace.frozen import Ints

MOST_SWAPS = 400


def repair(instance: Instance, gpu: Ints, fallback: Ints) -> tuple[Ints, int]:
    """Make a state keep the caps.

    Parameters
    ----------
    instance
        The problem.
    gpu
        ``[layer, expert]`` state.
    fallback
        A state that keeps the caps, with as many experts on every GPU.

    Returns
    -------
    tuple
        The state, and how many layers were taken from ``fallback``. Complexity: O(layers · experts²) to look, and
        O(slots of a GPU · experts) for each swap.
    """
    state, taken = gpu.copy(), 0
    for layer in np.flatnonzero(instance.excess(state) > 0).tolist():
        row = _swapped(instance, state, layer)
        if row is None:
            row, taken = _renamed(instance, state, layer, fallback[layer]), taken + 1
        state[layer] = row
    return state, taken


def _swapped(instance: Instance, state: Ints, layer: int) -> Ints | None:
    """Return the layer after swaps that bring all GPUs under the cap; None where they do not."""
    near, load, row = instance.near_layer(state, layer), instance.load[layer], state[layer].copy()
    busy = np.bincount(row, weights=load, minlength=instance.num_gpus)
    top = instance.cap[layer] * (1 + 1e-12)
    for _ in range(MOST_SWAPS):
        over = np.maximum(0.0, busy - top)
        if not over.any():
            return row
        g = int(over.argmax())
        mine, others = np.flatnonzero(row == g), np.flatnonzero(row != g)
        h = row[others]
        moved = load[mine][:, None] - load[others][None, :]
        left = np.maximum(0.0, busy[g] - moved - top) + np.maximum(0.0, busy[h][None, :] + moved - top)
        apart = _apart(instance.kind[layer], row, mine, others)
        removed = np.where(apart, over[g] + over[h][None, :] - left, -np.inf)
        gain = near[h][:, mine].T + near[g, others][None, :] - near[g, mine][:, None] - near[h, others][None, :]
        cured = (left <= over[h][None, :]) & (removed > 0)
        score = np.where(cured, gain, -np.inf) if cured.any() else removed
        a, b = np.unravel_index(int(score.argmax()), score.shape)
        if removed[a, b] <= 0:
            return None
        busy[g] -= moved[a, b]
        busy[h[b]] += moved[a, b]
        row[mine[a]], row[others[b]] = h[b], g
    return None


def _apart(kind: Ints, row: Ints, mine: Ints, others: Ints) -> npt.NDArray[np.bool_]:
    """``[item of a GPU, item of another]`` whether a swap leaves copies of one expert on distinct GPUs."""
    holds = np.zeros((int(kind.max()) + 1, int(row.max()) + 1), np.bool_)
    holds[kind, row] = True
    own: npt.NDArray[np.bool_] = holds[kind[mine]][:, row[others]]
    return ~own & ~holds[kind[others], row[mine[0]]][None, :]


def _renamed(instance: Instance, state: Ints, layer: int, row: Ints) -> Ints:
    """Return a row of the fallback with GPUs of equal size renamed for most pairs with the layers beside it."""
    gpus = instance.num_gpus
    near = instance.near_layer(state, layer)
    held = (row[None, :] == np.arange(gpus)[:, None]).astype(np.float64)
    table, size = held @ near.T, held.sum(axis=1)
    old, new = linear_sum_assignment(np.where(size[:, None] == size[None, :], -table, table.sum() + 1.0))
    name = np.empty_like(old)
    name[old] = new
    return name[row]
