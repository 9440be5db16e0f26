"""Sets of experts named after the ranks whose tokens touch them most: copies that meet no network.

Which set is which GPU changes neither copies per token nor loads. Where the trace records home ranks, names that keep
most copies at home are an assignment problem per layer: the gain of a name is the tokens of that rank that choose any
expert of the set. With copies counted by node, whole nodes are named, and GPUs inside them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moeplace.frozen import Floats, Ints


def copies_at_home(experts: Ints, home: Ints, group: Ints, num_groups: int) -> Floats:
    """``[set, rank]`` tokens of each rank that choose any expert of each set.

    Parameters
    ----------
    experts
        ``[token, k]`` chosen experts of a layer.
    home
        ``[token]`` home ranks, below ``num_groups``.
    group
        ``[expert]`` sets. Complexity: O(tokens · (k + sets)).
    """
    touched = np.zeros((len(home), num_groups), bool)
    np.put_along_axis(touched, group[experts], True, axis=1)
    gain = np.zeros((num_groups, num_groups))
    for rank in range(num_groups):
        gain[:, rank] = touched[home == rank].sum(axis=0)
    return gain


def best_names(gain: Floats, rooms: Ints, node: Ints) -> Ints:
    """``[set]`` ranks of most gain, only ranks with as many slots; sets of one node stay on one node.

    Parameters
    ----------
    gain
        ``[set, rank]``, not negative.
    rooms
        ``[set]`` slots of each.
    node
        ``[rank]`` nodes of equally many ranks; all 0 where sets are free. Complexity: O(nodes² · (ranks per node)³).
    """
    blocks = [np.flatnonzero(node == number) for number in np.unique(node)]
    allowed = np.where(rooms[:, None] == rooms[None, :], gain, -2 * gain.sum() - 1.0)
    inner = [[linear_sum_assignment(allowed[np.ix_(a, b)], maximize=True)[1] for b in blocks] for a in blocks]
    outer = [
        [allowed[a, b[rank]].sum() for b, rank in zip(blocks, row, strict=True)]
        for a, row in zip(blocks, inner, strict=True)
    ]
    names = np.empty(len(gain), np.int64)
    for i, j in zip(*linear_sum_assignment(np.array(outer), maximize=True), strict=True):
        names[blocks[i]] = blocks[j][inner[i][j]]
    return names


def named_after_homes(
    experts: npt.NDArray[Any], rank: npt.NDArray[Any] | None, state: Ints, rooms: Ints, node: Ints
) -> tuple[Ints, tuple[str, ...]]:
    """Name the sets of all layers, and tell how many copies that keeps at home.

    Parameters
    ----------
    experts
        ``[token, layer, k]`` choices.
    rank
        ``[token]`` homes; None or ranks that are no GPUs: names stay.
    state
        ``[layer, expert]`` GPUs.
    rooms, node
        As for :func:`best_names`.

    Returns
    -------
    tuple
        ``[layer, expert]`` GPUs, and notes.
    """
    gpus = len(rooms)
    if rank is None or gpus < 2 or not len(rank) or int(rank.max()) >= gpus or int(rank.min()) < 0:
        return state, ()
    home, named, before, after = rank.astype(np.int64), state.copy(), 0.0, 0.0
    for layer, group in enumerate(state):
        gain = copies_at_home(experts[:, layer].astype(np.int64), home, group, gpus)
        names = best_names(gain, rooms, node)
        before += float(np.trace(gain))
        after += float(gain[np.arange(gpus), names].sum())
        named[layer] = names[group]
    cells = len(home) * len(state)
    note = f"GPUs are named after homes: {after / cells:.3f} copies of a token in a layer stay at home"
    return named, (f"{note}, {before / cells:.3f} with the names before",)
