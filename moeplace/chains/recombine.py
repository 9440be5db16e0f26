"""The best chain of layers taken from several states, by dynamic programming over layers.

Annealed states of one instance agree in most layers up to the names of GPUs and are worse in different ones. GPUs that
have equally many slots can be renamed in a layer, so the best way to go on from one state's layer to another's next one
is an assignment of names. Each state's layer keeps the names of the best way that leads to it. Where only pairs that
stay on their GPU count, renaming all layers together changes nothing, and the chain found is a longest path. Otherwise
it is a good chain, and the best of the states where that is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moeplace.chains.instance import Instance
from moeplace.frozen import Ints


def recombine(instance: Instance, states: Sequence[Ints]) -> Ints:
    """Return the best chain of the states' layers.

    Parameters
    ----------
    instance
        The problem.
    states
        ``[layer, expert]`` GPUs of each state; all give every GPU equally many experts.

    Returns
    -------
    ndarray
        ``[layer, expert]`` GPUs; each layer is that of one state with GPUs renamed, so it keeps what caps that kept.
        Never worse than the best of the states. Complexity: O(states² · layers · (experts² + GPUs³)).
    """
    layers, count = len(states[0]), len(states)
    same = _same_size(instance, states[0])
    value, rows, origins = np.zeros(count), [state[0] for state in states], []
    named = [rows]
    for layer in range(layers - 1):
        ways = [_best_way(instance, layer, (value, rows), state[layer + 1], same) for state in states]
        value = np.array([way[0] for way in ways])
        rows = [way[2] for way in ways]
        origins.append([way[1] for way in ways])
        named.append(rows)
    at = int(value.argmax())
    chain = [named[-1][at]]
    for layer in range(layers - 2, -1, -1):
        at = origins[layer][at]
        chain.append(named[layer][at])
    found = np.stack(chain[::-1])
    return found if instance.is_uniform else max([found, *states], key=instance.kept)


def _best_way(
    instance: Instance,
    layer: int,
    before: tuple[npt.NDArray[np.float64], list[Ints]],
    after: Ints,
    same: npt.NDArray[np.bool_],
) -> tuple[float, int, Ints]:
    """Most that pairs up to a row are worth, the state of the row before, and the row with its GPUs renamed."""
    ways = [_renamed(instance, layer, row, after, same) for row in before[1]]
    value = before[0] + np.array([way[0] for way in ways])
    best = int(value.argmax())
    return float(value[best]), best, ways[best][1]


def _same_size(instance: Instance, state: Ints) -> npt.NDArray[np.bool_]:
    """``[GPU, GPU]`` whether two GPUs hold equally many experts, so that they can swap names."""
    size = np.bincount(state[0], minlength=instance.num_gpus)
    same: npt.NDArray[np.bool_] = size[:, None] == size[None, :]
    return same


def _renamed(
    instance: Instance, layer: int, before: Ints, after: Ints, same: npt.NDArray[np.bool_]
) -> tuple[float, Ints]:
    """Worth of the pairs between two rows when the second's GPUs have the best names, and the second with them."""
    table = instance.between(layer, before, after).T @ instance.worth  # [GPU of after, its new name]
    row, column = linear_sum_assignment(np.where(same, -table, table.sum() + 1.0))
    name = np.empty_like(row)
    name[row] = column
    return float(table[row, column].sum()), name[after]
