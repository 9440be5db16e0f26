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
        state = split_node(together[np.ix_(experts, experts)], load[experts], cap, room, seed=seed, stop=stop)
        gpu[experts] = state + number * rooms.shape[1]
    return gpu


def split_node(
    together: Floats, load: Floats, cap: float, room: Ints, *, seed: int = 0, stop: Callable[[], bool] = lambda: False
) -> Ints:
    """``[expert]`` GPU of each expert of one node, ``together`` [expert, expert] tokens that chose both.

    ``load`` [expert], ``room`` [GPU] and the rest are as in :func:`split_nodes`.
    """
    own = load[None].astype(np.float64)
    floor = np.array([float(own.max() if not np.isfinite(cap) else cap)])
    packed = pack_layers(own, balance_global(own, room), room, floor=floor, kicks=KICKS, seed=seed)
    state: Ints = packed.copies()[0].argmax(axis=0)
    return state if stop() else settle_node(together, load, cap, state, len(room), seed=seed)


def settle_node(together: Floats, load: Floats, cap: float, state: Ints, num_gpus: int, *, seed: int = 0) -> Ints:
    """``[expert]`` GPU of each expert of one node, swapped for fewer copies from ``state`` that keeps the cap.

    It stays as it is where it does not, or where there is none. Parameters are those of :func:`split_node`.
    """
    busy = np.bincount(state, load, num_gpus)
    inner = _inside(together)
    if not np.isfinite(cap) or (busy > cap * (1 + ROOM)).any() or not len(inner.weight):
        return state
    schedule = Schedule(turns=TURNS, swaps=SWAPS * len(load))
    return Annealer(inner, load, cap * (1 + ROOM), num_gpus).run(state, schedule, seed)[0]


def _inside(together: Floats) -> Patterns:
    """Pairs of experts inside a node as patterns: what tokens save there by sharing GPUs, to first order."""
    above = np.triu(together)
    rows = np.argwhere(above)
    weight = above[tuple(rows.T)].astype(np.int64)
    return Patterns(experts=rows, weight=weight, num_experts=len(together))
