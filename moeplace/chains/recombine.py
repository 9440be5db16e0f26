"""The best chain of layers taken from several states, by dynamic programming over layers.

Annealed states of one instance agree in most layers up to the names of GPUs and are worse in different ones. GPUs that
have equally many slots can be renamed in a layer, so an arc from one state's layer to another's next one is worth its
best assignment of names, and the best chain is a longest path. It is at least as good as the best of the states.
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
        Complexity: O(states² · layers · (experts² + GPUs³)).
    """
    layers, count = len(states[0]), len(states)
    same = _same_size(instance, states[0])
    value, origins = np.zeros(count), []
    for layer in range(layers - 1):
        arcs = np.array([[_arc(instance, layer, a[layer], b[layer + 1], same)[0] for b in states] for a in states])
        arcs = arcs + value[:, None]
        origins.append(arcs.argmax(axis=0))
        value = arcs.max(axis=0)
    chain = [int(value.argmax())]
    for origin in reversed(origins):
        chain.append(int(origin[chain[-1]]))
    chain.reverse()
    rows = [states[chain[0]][0]]
    for layer in range(layers - 1):
        following = states[chain[layer + 1]][layer + 1]
        rows.append(_arc(instance, layer, rows[-1], following, same)[1][following])
    return np.stack(rows)


def _same_size(instance: Instance, state: Ints) -> npt.NDArray[np.bool_]:
    """``[GPU, GPU]`` whether two GPUs hold equally many experts, so that they can swap names."""
    size = np.bincount(state[0], minlength=instance.num_gpus)
    same: npt.NDArray[np.bool_] = size[:, None] == size[None, :]
    return same


def _arc(instance: Instance, layer: int, before: Ints, after: Ints, same: npt.NDArray[np.bool_]) -> tuple[float, Ints]:
    """Most pairs that stay between two rows when the second's GPUs are renamed, and their new names ``[GPU]``."""
    table = instance.between(layer, before, after)
    row, column = linear_sum_assignment(np.where(same, -table, table.sum() + 1.0))
    name = np.empty_like(row)
    name[column] = row
    return float(table[row, column].sum()), name
