"""A node's experts split over its GPUs: balanced first, then with fewer copies within the cap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.anneal import Annealer, Schedule
from moeplace.hypergraph.layer import ROOM
from moeplace.hypergraph.pairs import pairs_of
from moeplace.hypergraph.patterns import Patterns
from moeplace.packing import pack_layers
from moeplace.packing.eplb import balance_global

KICKS = 15
TURNS, SWAPS = 20, 16  # of the short annealing in each node


def split_nodes(
    patterns: Patterns,
    load: Floats,
    cap: float,
    node: Ints,
    rooms: Ints,
    *,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Ints:
    """Split the experts of every node over its GPUs.

    Parameters
    ----------
    patterns, load
        The layer, and ``[expert]`` loads.
    cap
        Most load of a GPU; infinite: the least load of the busiest is all that counts.
    node
        ``[expert]`` node.
    rooms
        ``[node, GPU]`` experts of each GPU.
    seed, stop
        Of the exchanges; asked after every node.

    Returns
    -------
    ndarray
        ``[expert]`` GPU, numbered through all nodes. The cap is kept where exchanges reach it.
    """
    gpu = np.zeros(patterns.num_experts, np.int64)
    together = pairs_of(patterns)
    for number, room in enumerate(rooms):
        experts = np.flatnonzero(node == number)
        if not len(experts):
            continue
        own = load[experts][None].astype(np.float64)
        packed = balance_global(own, room)
        floor = np.array([float(own.max() if not np.isfinite(cap) else cap)])
        packed = pack_layers(own, packed, room, floor=floor, kicks=KICKS, seed=seed)
        state = packed.copies()[0].argmax(axis=0)
        busy = np.bincount(state, own[0], len(room))
        if np.isfinite(cap) and (busy <= cap * (1 + ROOM)).all() and not stop():
            inner = _inside(together, experts)
            schedule = Schedule(turns=TURNS, swaps=SWAPS * len(experts))
            if len(inner.weight):
                state = Annealer(inner, own[0], cap * (1 + ROOM), len(room)).run(state, schedule, seed)[0]
        gpu[experts] = state + number * rooms.shape[1]
    return gpu


def _inside(together: Floats, experts: Ints) -> Patterns:
    """Pairs of experts inside a node as patterns: what tokens save there by sharing GPUs, to first order."""
    together = np.triu(together[np.ix_(experts, experts)])
    rows = np.argwhere(together)
    weight = together[tuple(rows.T)].astype(np.int64)
    return Patterns(experts=rows, weight=weight, num_experts=len(experts))
