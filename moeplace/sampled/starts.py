"""Placements to begin with: experts that are chosen together on one GPU, as far as caps on load let them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from moeplace.frozen import Floats
from moeplace.hypergraph import Patterns
from moeplace.hypergraph.anneal import Annealer, Schedule
from moeplace.placement import Placement

SLACKS = (0.02, 0.06, 0.15)  # load of a GPU above the mean
TURNS = 64
SWAPS = 48  # at each turn, for each expert


def few_copies(
    ids: np.ndarray, load: Floats, even: Placement, slack: float, *, seed: int, stop: Callable[[], bool]
) -> Placement:
    """Anneal every layer to few copies per token, no GPU's load more than ``slack`` above the mean if that can be.

    Parameters
    ----------
    ids
        ``[token, layer, k]`` experts.
    load
        ``[layer, expert]`` loads.
    even
        Where to start: every expert once, as many on each GPU as in the result.
    slack
        Above the mean load of a GPU.
    seed, stop
        Of the runs; asked between turns. Complexity: that of :class:`~moeplace.hypergraph.anneal.Annealer`.
    """
    gpus, slots = even.num_gpus, []
    for layer in range(even.num_layers):
        patterns = Patterns.of(ids[:, layer], even.num_experts)
        start = even.copies()[layer].argmax(axis=0)
        cap = float(load[layer].sum()) / gpus * (1 + slack)
        schedule = Schedule(turns=TURNS, swaps=SWAPS * even.num_experts)
        state = Annealer(patterns, load[layer], cap, gpus).run(start, schedule, seed + 7919 * layer, stop=stop)[0]
        slots.append([np.flatnonzero(state == gpu).tolist() for gpu in range(gpus)])
    return Placement.from_lists(slots, even.num_experts)


def least_price(
    copies_at: Callable[[float], float], cap: float, *, low: float = 0.01, high: float = 10.0, steps: int = 7
) -> float:
    """Return a price of a copy at which there are no more than ``cap``: by bisection, as small as that goes.

    ``copies_at`` is how many there are at a price. ``high`` where there are more than ``cap`` at every price tried.
    """
    for _ in range(steps):
        middle = float(np.sqrt(low * high))
        if copies_at(middle) <= cap:
            high = middle
        else:
            low = middle
    return high


def best_layers(placements: Iterable[tuple[Placement, Floats]]) -> Placement:
    """Return every layer of the placement that has the least of its values ``[layer]`` there."""
    tried = list(placements)
    values = np.stack([value for _, value in tried])
    chosen = values.argmin(axis=0)
    width = max(placement.max_slots for placement, _ in tried)
    rows = []
    for layer, number in enumerate(chosen.tolist()):
        row = tried[number][0].slots[layer]
        rows.append(np.pad(row, ((0, 0), (0, width - row.shape[1])), constant_values=-1))
    return Placement(slots=np.stack(rows), num_experts=tried[0][0].num_experts)
