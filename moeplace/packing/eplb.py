"""EPLB's two policies: extra copies to the hottest experts, then copies packed heaviest first.

Two departures, both to be safe: any number of GPUs, nodes, groups and slots works, and two copies of an expert never
share a GPU (the original wastes slots that way). Where neither matters the result is the original's, slot for slot.

Source: github.com/deepseek-ai/EPLB, README and issues (#22 on copies sharing a GPU).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplace.errors import ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.placement import EMPTY, Placement, spread_slots


def slots_without_copies(slots_per_gpu: Ints, num_experts: int) -> Ints:
    """``[GPU]`` slots that hold every expert once, as evenly as the given slots allow."""
    rooms = np.minimum(slots_per_gpu, spread_slots(num_experts, len(slots_per_gpu)))
    while (missing := num_experts - int(rooms.sum())) > 0:
        open_gpus = np.flatnonzero(rooms < slots_per_gpu)
        rooms[open_gpus[np.argsort(rooms[open_gpus], kind="stable")][:missing]] += 1
    return rooms


def balance_global(load: Floats, slots_per_gpu: Ints) -> Placement:
    """EPLB's global policy: ``load`` [layer, expert] onto GPUs with ``slots_per_gpu`` [GPU] slots."""
    layers, experts = load.shape
    names = np.broadcast_to(np.arange(experts), (layers, experts))
    return Placement(slots=_place(load, names, slots_per_gpu, int(slots_per_gpu.max())), num_experts=experts)


def balance_hierarchical(load: Floats, slots_per_gpu: Ints, nodes: int, groups: int) -> Placement:
    """EPLB's hierarchical policy; ``groups`` must divide over ``nodes``, and experts over groups.

    Raises
    ------
    ProblemError
        A node has fewer slots than the experts of its groups.
    """
    layers, experts = load.shape
    size = experts // groups
    by_group = load.reshape(layers, groups, size).sum(axis=2)
    groups_in = pack(by_group, np.full(nodes, groups // nodes), None)
    width = int(slots_per_gpu.max())
    slots = np.full((layers, len(slots_per_gpu), width), EMPTY, np.int64)
    gpus = len(slots_per_gpu) // nodes
    for node in range(nodes):
        span = slice(node * gpus, (node + 1) * gpus)
        rank = np.argsort(np.where(groups_in.pack_of == node, groups_in.order_in, groups), axis=1, kind="stable")
        chosen = rank[:, : groups // nodes]
        names = (chosen[:, :, None] * size + np.arange(size)).reshape(layers, -1)
        if slots_per_gpu[span].sum() < names.shape[1]:
            raise ProblemError(
                f"node {node} has {slots_per_gpu[span].sum()} slots for {names.shape[1]} experts",
                rule="a node holds every expert of its groups",
                hint="--option policy=global, or more slots",
            )
        slots[:, span] = _place(np.take_along_axis(load, names, axis=1), names, slots_per_gpu[span], width)
    return Placement(slots=slots, num_experts=experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """``pack_of`` and ``order_in`` [row, item]: the pack of each item and its place in it; -1 where not packed."""

    pack_of: Ints
    order_in: Ints


def replicate(load: Floats, total: int, most: int) -> tuple[Ints, Ints]:
    """Copies ``[row, total]`` and counts ``[row, expert]``: each extra copy to the expert with the most load per copy.

    The first copies come in expert order. No expert gets more than ``most`` copies; when all have that many the list
    is padded with -1.
    """
    rows, experts = load.shape
    count = np.ones((rows, experts), np.int64)
    copies = np.full((rows, max(total, experts)), -1, np.int64)
    copies[:, :experts] = np.arange(experts)
    row = np.arange(rows)
    for i in range(experts, total):
        per_copy = np.where(count < most, load / count, -1.0)
        hottest = per_copy.argmax(axis=1)
        room = per_copy[row, hottest] >= 0
        copies[room, i] = hottest[room]
        count[row[room], hottest[room]] += 1
    return copies, count


def pack(weight: Floats, room: Ints, kind: Ints | None) -> Packing:
    """Pack items heaviest first, each into the lightest pack that has room and holds nothing of its kind.

    Parameters
    ----------
    weight
        ``[row, item]`` weights; negative ones are left out.
    room
        ``[pack]`` items each pack takes.
    kind
        ``[row, item]`` kinds no pack may hold twice; None for no such rule.

    Returns
    -------
    Packing
        Items for which no pack is left have pack -1. Complexity: O(items · rows · packs), vectorised over rows.
    """
    rows, items = weight.shape
    pack_of = np.full((rows, items), -1, np.int64)
    order_in = np.full((rows, items), -1, np.int64)
    if room.max(initial=0) <= 1 and items <= int((room > 0).sum()) and (weight >= 0).all():
        seats = np.flatnonzero(room > 0)[:items]
        return Packing(pack_of=np.broadcast_to(seats, (rows, items)).copy(), order_in=np.zeros_like(order_in))
    total = np.zeros((rows, len(room)))
    used = np.zeros((rows, len(room)), np.int64)
    holds = None if kind is None else np.zeros((rows, int(kind.max()) + 1, len(room)), bool)
    row = np.arange(rows)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        closed = used >= room
        if holds is not None and kind is not None:
            closed = closed | holds[row, kind[row, item]]
        target = np.where(closed, np.inf, total).argmin(axis=1)
        fits = ~closed[row, target] & (weight[row, item] >= 0)
        r, g, i = row[fits], target[fits], item[fits]
        pack_of[r, i], order_in[r, i] = g, used[r, g]
        total[r, g] += weight[r, i]
        used[r, g] += 1
        if holds is not None and kind is not None:
            holds[r, kind[r, i], g] = True
    return Packing(pack_of=pack_of, order_in=order_in)


def balance_counts(load: Floats, count: Ints, slots_per_gpu: Ints) -> Placement:
    """EPLB's packing of ``count`` [layer, expert] copies each; they fit in the slots, at most one of a kind a GPU."""
    layers, experts = load.shape
    copies = np.full((layers, int(count.sum(axis=1).max())), -1, np.int64)
    for layer, row in enumerate(count):
        more = np.concatenate([np.arange(experts), np.repeat(np.arange(experts), row - 1)])
        copies[layer, : len(more)] = more
    slots = _packed(load / count, copies, slots_per_gpu, int(slots_per_gpu.max()))
    return Placement(slots=slots, num_experts=experts)


def _place(load: Floats, names: Ints, slots_per_gpu: Ints, width: int) -> Ints:
    """Replicate and pack: ``[layer, GPU, width]`` experts, called by their ``names`` [layer, expert]."""
    copies, count = replicate(load, int(slots_per_gpu.sum()), int((slots_per_gpu > 0).sum()))
    slots = _packed(load / count, copies, slots_per_gpu, width)
    named = np.take_along_axis(names, np.maximum(slots, 0).reshape(len(load), -1), axis=1).reshape(slots.shape)
    return np.where(slots == EMPTY, EMPTY, named)


def _packed(per_copy: Floats, copies: Ints, slots_per_gpu: Ints, width: int) -> Ints:
    """Pack ``copies`` [layer, item] of experts, -1 for none, each of load ``per_copy`` [layer, expert]."""
    layers = len(per_copy)
    weight = np.where(copies < 0, -1.0, np.take_along_axis(per_copy, np.maximum(copies, 0), axis=1))
    packing = pack(weight, slots_per_gpu, np.maximum(copies, 0))
    slots = np.full((layers, len(slots_per_gpu), width), EMPTY, np.int64)
    layer, item = np.nonzero(packing.pack_of >= 0)
    own = copies[layer, item]
    slots[layer, packing.pack_of[layer, item], packing.order_in[layer, item]] = own
    for stuck in np.unique(np.nonzero((packing.pack_of < 0) & (copies >= 0))[0]):
        left = copies[stuck][(packing.pack_of[stuck] < 0) & (copies[stuck] >= 0)]
        _seat_left_over(slots[stuck], slots_per_gpu, left.tolist(), per_copy[stuck])
    return slots


def _seat_left_over(slots: Ints, room: Ints, left: list[int], per_copy: Floats) -> None:
    """Seat copies whose free GPUs all hold their expert, by exchanging with a copy elsewhere; edits ``slots`` in place.

    Of all exchanges the one with the lightest heavier GPU is made. A copy that no exchange can seat is dropped: its
    slot stays empty, its expert keeps its other copies.
    """
    for expert in left:
        weight = np.where(slots == EMPTY, 0.0, per_copy[np.maximum(slots, 0)])
        load = weight.sum(axis=1)
        best: tuple[float, int, int, int] | None = None
        for free in np.flatnonzero((slots != EMPTY).sum(axis=1) < room):
            for other in np.flatnonzero(~(slots == expert).any(axis=1)):
                for slot in np.flatnonzero(slots[other] != EMPTY):
                    moved = slots[other, slot]
                    if moved in slots[free]:
                        continue
                    gain = per_copy[moved]
                    heavier = max(load[free] + gain, load[other] - gain + per_copy[expert])
                    if best is None or heavier < best[0]:
                        best = (float(heavier), int(free), int(other), int(slot))
        if best is None:
            continue
        _, free_gpu, other_gpu, other_slot = best
        free_slot = int(np.flatnonzero(slots[free_gpu] == EMPTY)[0])
        slots[free_gpu, free_slot] = slots[other_gpu, other_slot]
        slots[other_gpu, other_slot] = expert
