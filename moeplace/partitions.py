"""Every way to divide a layer's experts over GPUs, and the best chain of such divisions by dynamic programming.

Where only the share of pairs that stay on a GPU counts, GPUs can be renamed in every layer, so a layer's state is a
division into *unnamed* groups: 105 for 8 experts on 4 GPUs, 35 on 2, 1 where each GPU holds one expert. What stays
between two divisions is a linear assignment of their groups, so the best chain is a longest path through layers of
states (Viterbi), with hard load caps as missing states and a price on the busiest GPU as a cost of each state. With one
state per layer it is exactly ``layers - 1`` assignment problems.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.frozen import Floats, Ints

MAX_DIVISIONS = 10_000
MAX_ORDERS = 120  # ways to match groups that are all tried; beyond, an assignment is solved
BLOCK_ARCS = 2_000_000


def num_divisions(experts: int, gpus: int) -> int:
    """Ways to divide experts into ``gpus`` unnamed groups of equal size: ``E!/(S!^G·G!)``; 0 where they do not divide.

    >>> num_divisions(8, 4), num_divisions(8, 2), num_divisions(8, 8), num_divisions(9, 2)
    (105, 35, 1, 0)
    """
    if gpus < 1 or experts % gpus:
        return 0
    size = experts // gpus
    return math.factorial(experts) // (math.factorial(size) ** gpus * math.factorial(gpus))


def work_of(experts: int, gpus: int, layers: int) -> float:
    """Elementary steps of :func:`best_chain`, roughly."""
    orders = math.factorial(gpus) if math.factorial(gpus) <= MAX_ORDERS else gpus**3
    return float(num_divisions(experts, gpus)) ** 2 * orders * (layers - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Divisions:
    """All divisions of a layer.

    Attributes
    ----------
    members
        ``[group, expert]`` which experts each possible group holds.
    groups
        ``[division, GPU]`` groups of each division; the first holds expert 0, and so on.
    """

    members: Floats
    groups: Ints

    @classmethod
    def of(cls, experts: int, gpus: int) -> Divisions:
        """List them. Complexity: their number."""
        size = experts // gpus
        number = {group: i for i, group in enumerate(itertools.combinations(range(experts), size))}
        members = np.zeros((len(number), experts))
        for group, i in number.items():
            members[i, list(group)] = 1.0
        found = [[number[group] for group in division] for division in _divide(tuple(range(experts)), size)]
        return cls(members=members, groups=np.array(found, np.int64))

    @property
    def num_gpus(self) -> int:
        """GPUs."""
        return int(self.groups.shape[1])

    def busiest(self, load: Floats) -> Floats:
        """``[layer, division]`` load of the busiest group for ``load`` [layer, expert]."""
        by_group = load @ self.members.T
        most: Floats = by_group[:, self.groups].max(axis=2)
        return most

    def gpu_of(self, division: int, order: Ints) -> Ints:
        """``[expert]`` GPU of each expert where group ``g`` of a division is on GPU ``order[g]``."""
        gpu = np.zeros(self.members.shape[1], np.int64)
        for place, group in enumerate(self.groups[division]):
            gpu[self.members[group] > 0] = order[place]
        return gpu


def _divide(experts: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield every division of experts into groups of a size, the lowest expert first."""
    if not experts:
        yield []
        return
    first, rest = experts[0], experts[1:]
    for others in itertools.combinations(rest, size - 1):
        left = tuple(expert for expert in rest if expert not in others)
        for division in _divide(left, size):
            yield [(first, *others), *division]


def best_chain(
    pairs: Ints, divisions: Divisions, cost: Floats, stop: Callable[[], bool] = lambda: False
) -> tuple[Ints, float] | None:
    """Choose a division for every layer, and which group goes where, so that most pairs stay on their GPU.

    Parameters
    ----------
    pairs
        ``[layer-1, expert, next expert]`` pairs of consecutive choices.
    divisions
        The states.
    cost
        ``[layer, division]`` what a division costs, in pairs; infinite where it is not allowed.
    stop
        Asked between layers.

    Returns
    -------
    tuple
        ``[layer, expert]`` GPUs, and pairs that stay less costs; None where a layer has no allowed division, or the
        work was stopped. Complexity: O(layers · divisions² · orders of groups).
    """
    if not np.isfinite(cost).any(axis=1).all():
        return None
    value = -cost[0]
    came_from = []
    for layer in range(len(pairs)):
        if stop():
            return None
        gained, origin = _step(pairs[layer].astype(np.float64), divisions, value)
        value = gained - cost[layer + 1]
        came_from.append(origin)
    state = int(value.argmax())
    best = float(value[state])
    chain = [state]
    for origin in reversed(came_from):
        chain.append(int(origin[chain[-1]]))
    chain.reverse()
    order = np.arange(divisions.num_gpus)
    gpus = [divisions.gpu_of(chain[0], order)]
    for layer, (before, after) in enumerate(itertools.pairwise(chain)):
        stay = _between(pairs[layer].astype(np.float64), divisions)
        table = stay[np.ix_(divisions.groups[before], divisions.groups[after])]
        row, column = linear_sum_assignment(-table)
        placed = np.empty_like(order)
        placed[column] = order[row]
        order = placed
        gpus.append(divisions.gpu_of(chain[layer + 1], order))
    return np.stack(gpus), best


def _between(pairs: Floats, divisions: Divisions) -> Floats:
    """``[group, next group]`` pairs from one possible group to another."""
    stay: Floats = divisions.members @ pairs @ divisions.members.T
    return stay


def _step(pairs: Floats, divisions: Divisions, value: Floats) -> tuple[Floats, Ints]:
    """``[division]`` best value that each division of the next layer is reached with, and from which."""
    stay, groups = _between(pairs, divisions), divisions.groups
    open_states = np.flatnonzero(np.isfinite(value))
    count, gpus = groups.shape
    gained, origin = np.full(count, -np.inf), np.zeros(count, np.int64)
    exhaustive = math.factorial(gpus) <= MAX_ORDERS
    block = max(1, BLOCK_ARCS // len(open_states))
    for start in range(0, count, block):
        chosen = groups[start : start + block]
        if exhaustive:
            arcs = np.full((len(open_states), len(chosen)), -np.inf)
            for order in itertools.permutations(range(gpus)):
                kept = np.zeros_like(arcs)
                for g, h in enumerate(order):
                    kept += stay[groups[open_states, g][:, None], chosen[None, :, h]]
                np.maximum(arcs, kept, out=arcs)
        else:
            arcs = np.array([[_matched(stay[np.ix_(groups[p], q)]) for q in chosen] for p in open_states])
        arcs += value[open_states][:, None]
        best = arcs.argmax(axis=0)
        gained[start : start + block] = arcs[best, np.arange(len(chosen))]
        origin[start : start + block] = open_states[best]
    return gained, origin


def _matched(table: Floats) -> float:
    row, column = linear_sum_assignment(-table)
    return float(table[row, column].sum())
