"""A node's experts split over its GPUs: balanced first, then with fewer copies within the cap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.anneal import Annealer, Schedule
from moeplace.hypergraph.layer import ROOM
from moeplace.hypergraph.patterns import Patterns
from moeplace.packing import pack_layers
from moeplace.packing.eplb import balance_global

KICKS = 60
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
            inner = _inside(patterns, experts)
            schedule = Schedule(turns=TURNS, swaps=SWAPS * len(experts))
            if len(inner.weight):
                state = Annealer(inner, own[0], cap * (1 + ROOM), len(room)).run(state, schedule, seed)[0]
        gpu[experts] = state + number * rooms.shape[1]
    return gpu


def _inside(patterns: Patterns, experts: Ints) -> Patterns:
    """What tokens chose among some experts, as patterns of pairs: copies within a node, to first order.

    A pattern of uneven width has no place in an array, so tokens count once for each pair of theirs inside the node;
    pairs that share a GPU are what saves copies.
    """
    name = np.full(patterns.num_experts, -1)
    name[experts] = np.arange(len(experts))
    inner = name[patterns.experts]
    first, second, weight = [], [], []
    for i in range(patterns.top_k):
        for j in range(i + 1, patterns.top_k):
            both = (inner[:, i] >= 0) & (inner[:, j] >= 0)
            first.append(inner[both, i])
            second.append(inner[both, j])
            weight.append(patterns.weight[both])
    pair = np.concatenate(first) * len(experts) + np.concatenate(second) if first else np.zeros(0, np.int64)
    total = np.bincount(pair, np.concatenate(weight) if weight else None, len(experts) ** 2).astype(np.int64)
    kept = np.flatnonzero(total)
    rows = np.stack([kept // len(experts), kept % len(experts)], axis=1)
    return Patterns(experts=rows, weight=total[kept], num_experts=len(experts))
