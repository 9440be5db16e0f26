"""What it takes to turn one placement into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.errors import PlacementError
from moeplace.frozen import Ints
from moeplace.objective import Term
from moeplace.placement import Placement
from moeplace.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Difference between two placements of the same shape.

    Attributes
    ----------
    arriving, leaving
        ``[layer, GPU]`` copies a GPU must load, and copies it drops.
    layer_ids
        One id per layer.
    num_copies
        Copies in the new placement.
    moves
        ``[move, 4]`` layer (its place, from 0), expert, GPU it can be loaded from, GPU that loads it.
    expert_bytes
        Bytes of one expert's weights, None when the model is unknown.
    order
        ``[GPU]`` where GPUs were renamed: GPU g is the new placement's GPU ``order[g]``; None where they were not.
    """

    arriving: Ints
    leaving: Ints
    layer_ids: tuple[int, ...]
    num_copies: int
    moves: Ints
    expert_bytes: float | None = None
    order: Ints | None = None

    @property
    def moved_copies(self) -> int:
        """Copies to load in all."""
        return int(self.arriving.sum())

    @property
    def moved_bytes(self) -> float | None:
        """Bytes to load in all."""
        return None if self.expert_bytes is None else self.moved_copies * self.expert_bytes

    def links(self) -> list[tuple[int, int, int]]:
        """``(from GPU, to GPU, copies)`` of every pair of GPUs with copies to move, most copies first."""
        pairs, copies = np.unique(self.moves[:, 2:], axis=0, return_counts=True)
        rows = [(int(a), int(b), int(n)) for (a, b), n in zip(pairs, copies, strict=True)]
        return sorted(rows, key=lambda row: (-row[2], row[0], row[1]))

    def to_dict(self) -> dict[str, Any]:
        """Return a ``moeplace/diff/1`` document."""
        each = self.expert_bytes
        links = [
            {"from": a, "to": b, "moved_copies": n, "moved_bytes": None if each is None else n * each}
            for a, b, n in self.links()
        ]
        return {
            "schema": "moeplace/diff/1",
            "moved_copies": self.moved_copies,
            "moved_share": round(self.moved_copies / self.num_copies, 9),
            "moved_bytes": self.moved_bytes,
            "arriving_per_gpu": self.arriving.sum(axis=0).tolist(),
            "leaving_per_gpu": self.leaving.sum(axis=0).tolist(),
            "links": links,
            "relabelled": None if self.order is None else self.order.tolist(),
            "per_layer": [
                {"layer": layer, "moved_copies": int(count)}
                for layer, count in zip(self.layer_ids, self.arriving.sum(axis=1), strict=True)
            ],
        }


def compare_placements(
    before: Placement,
    after: Placement,
    *,
    layer_ids: Sequence[int] | None = None,
    expert_bytes: float | None = None,
    num_nodes: int = 1,
    relabel: bool = False,
) -> Change:
    """Count the copies each GPU must load and may drop, and say where each can come from.

    Parameters
    ----------
    before, after
        Placements of as many layers, GPUs and experts; slots may differ.
    layer_ids
        One id per layer; default 0, 1, ….
    expert_bytes
        Bytes of one expert's weights.
    num_nodes
        Nodes the GPUs are on, in equal runs: a copy is loaded from the same node where one holds it.
    relabel
        Rename the GPUs of ``after`` by :func:`closest_names` first; otherwise they keep their numbers.

    Returns
    -------
    Change
        Complexity: O(layers · GPUs · experts), and O(layers · GPUs² · experts) to relabel.

    Raises
    ------
    PlacementError
        The placements differ in layers, GPUs or experts.
    """
    shapes = [f"{p.num_layers} layers of {p.num_experts} experts on {p.num_gpus} GPUs" for p in (before, after)]
    if shapes[0] != shapes[1]:
        raise PlacementError(
            f"the first placement has {shapes[0]}, the second {shapes[1]}",
            rule="placements of the same shape are compared",
            hint="were they made for the same model and topology?",
        )
    check_nodes(after.num_gpus, num_nodes)
    order = closest_names(before, after, num_nodes=num_nodes) if relabel else None
    after = after if order is None else after.permute_gpus(order)
    delta = after.copies() - before.copies()
    return Change(
        arriving=delta.clip(min=0).sum(axis=2),
        leaving=(-delta).clip(min=0).sum(axis=2),
        layer_ids=tuple(range(after.num_layers) if layer_ids is None else layer_ids),
        num_copies=int(after.used_slots().sum()),
        moves=sourced(before.copies(), np.argwhere(delta > 0), delta[delta > 0], num_nodes=num_nodes),
        expert_bytes=expert_bytes,
        order=order,
    )


def closest_names(before: Placement, after: Placement, *, num_nodes: int = 1) -> Ints:
    """``[GPU]`` order by which ``after.permute_gpus(order)`` keeps most copies where they are in ``before``.

    One name for all layers: ranks are processes. GPUs change places only inside their node, and nodes as a whole, so
    that traffic within and between nodes stays what it is; and only with GPUs of as many slots. A linear assignment of
    GPUs for each pair of nodes, then one of nodes, on ``overlap[g, h] = Σ min(before[l, g, e], after[l, h, e])``: the
    optimum of that kind.

    Raises
    ------
    PlacementError
        The GPUs do not divide into the nodes.
    """
    from scipy.optimize import linear_sum_assignment

    gpus = check_nodes(before.num_gpus, num_nodes)
    held = [placement.copies().transpose(1, 0, 2).reshape(placement.num_gpus, -1) for placement in (before, after)]
    overlap = np.zeros((before.num_gpus, after.num_gpus))
    for times in range(1, int(min(held[0].max(), held[1].max())) + 1):  # min(a, b) is how often both reach a number
        overlap += (held[0] >= times).astype(np.float32) @ (held[1] >= times).astype(np.float32).T
    room = after.used_slots().max(axis=0)
    overlap[room[:, None] != room[None]] = -float(overlap.sum() + 1)  # keeping all names never has to take one of these
    worth = np.zeros((num_nodes, num_nodes))
    inside = np.zeros((num_nodes, num_nodes, gpus), np.int64)
    for a in range(num_nodes):
        for b in range(num_nodes):
            block = overlap[a * gpus : (a + 1) * gpus, b * gpus : (b + 1) * gpus]
            rows, chosen = linear_sum_assignment(block, maximize=True)
            worth[a, b], inside[a, b] = block[rows, chosen].sum(), b * gpus + chosen
    nodes, partners = linear_sum_assignment(worth, maximize=True)
    order: Ints = inside[nodes, partners].ravel()
    return order


def check_nodes(num_gpus: int, num_nodes: int) -> int:
    """GPUs of each node.

    Raises
    ------
    PlacementError
        The GPUs do not divide into the nodes.
    """
    if num_nodes < 1 or num_gpus % num_nodes:
        raise PlacementError(f"{num_gpus} GPUs on {num_nodes} nodes", rule="every node has as many GPUs")
    return num_gpus // num_nodes


def sourced(held: Ints, wanted: Ints, times: Ints, *, num_nodes: int = 1) -> Ints:
    """``[move, 4]`` layer, expert, GPU to load from, GPU that loads, of each copy that is wanted.

    A copy comes from a GPU of the same node where one holds it, and of those from the one that has sent the fewest.

    Parameters
    ----------
    held
        ``[layer, GPU, expert]`` copies there are.
    wanted, times
        ``[want, 3]`` layer, GPU, expert; ``[want]`` copies of each.
    num_nodes
        Nodes the GPUs are on, in equal runs.
    """
    per_node = held.shape[1] // num_nodes
    sent = np.zeros(held.shape[1], np.int64)
    moves = []
    for (layer, gpu, expert), number in zip(wanted.tolist(), times.tolist(), strict=True):
        holders = np.flatnonzero(held[layer, :, expert])
        near = holders[holders // per_node == gpu // per_node]
        choice = near if near.size else holders
        for _ in range(number):
            source = int(choice[sent[choice].argmin()])
            sent[source] += 1
            moves.append((layer, expert, source, gpu))
    return np.array(moves, np.int64).reshape(-1, 4)


def move_terms(problem: Problem, placement: Placement) -> Mapping[str, Term]:
    """``moved_copies`` and ``moved_bytes`` against the problem's baseline; empty where it has none."""
    if problem.baseline is None:
        return {}
    change = compare_placements(problem.baseline, placement, expert_bytes=float(problem.model.expert_weight_bytes))
    return {
        "moved_copies": Term(value=change.moved_copies, unit="copies"),
        "moved_bytes": Term(value=change.moved_bytes or 0.0, unit="bytes"),
    }
