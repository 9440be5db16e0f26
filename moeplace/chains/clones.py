"""Copies of experts as items of a chain: an expert with ``n`` copies is ``n`` items, each with ``1/n`` of its tokens.

Where copies share tokens evenly a pair of experts with ``n`` and ``m`` copies goes each of ``n·m`` ways equally often.
Pairs and loads of items are then exactly those of the placement with copies, and what anneals experts anneals items,
if no GPU gets two of one expert. Placements of unlike numbers of copies are put together layer by layer
(:func:`mixed`), so that every layer ends with the numbers that do best between those of its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moeplace.chains.instance import UNLIMITED, WHOLE, Instance
from moeplace.frozen import Floats, Ints
from moeplace.placement import EMPTY, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Layers of experts whose copies are to be chosen.

    Attributes
    ----------
    pairs
        ``[layer-1, expert, next expert]`` pairs.
    weigh
        ``[layer, expert]`` load of one copy of each, given how many there are.
    cap
        ``[layer]`` most load of a GPU, ``inf`` without a cap.
    slots_per_gpu
        ``[GPU]`` slots of each.
    cost
        ``[GPU, next GPU]`` cost of a pair by its way, as in :meth:`Instance.of`.
    """

    pairs: Ints
    weigh: Callable[[Ints], Floats]
    cap: Floats
    slots_per_gpu: Ints
    cost: Floats | None = None

    @property
    def num_gpus(self) -> int:
        """GPUs."""
        return len(self.slots_per_gpu)

    def instance(self, expert: Ints) -> Instance:
        """Return the instance of items, given the ``[layer, item]`` expert of each; :data:`EMPTY` for an empty slot."""
        count = counts(expert, self.pairs.shape[1])
        load = self.weigh(count)
        if (count == 1).all():
            slots = expert.shape[1]
            return Instance.of(self.pairs, load, self.cap, self.num_gpus, slots=slots, cost=self.cost)
        layer = np.arange(len(expert))[:, None]
        share = np.where(expert == EMPTY, 0.0, 1 / count[layer, expert])
        pairs = np.zeros((len(self.pairs), expert.shape[1], expert.shape[1]))
        for i, table in enumerate(self.pairs):
            pairs[i] = table[np.ix_(expert[i], expert[i + 1])] * share[i][:, None] * share[i + 1][None, :]
        kind = np.where(expert == EMPTY, np.arange(expert.shape[1]), expert)
        own = np.where(expert == EMPTY, 0.0, load[layer, expert])
        return Instance.of(pairs, own, self.cap, self.num_gpus, cost=self.cost, kind=kind)

    def items(self, placement: Placement) -> tuple[Ints, Ints]:
        """``[layer, item]`` experts and GPUs: first copies by expert, then all others, then one of each empty slot."""
        layers, experts, slots = placement.num_layers, placement.num_experts, int(self.slots_per_gpu.sum())
        expert, gpu = np.full((layers, slots), EMPTY, np.int64), np.zeros((layers, slots), np.int64)
        for layer, row in enumerate(placement.slots):
            where, slot = np.nonzero(row != EMPTY)
            held = row[where, slot].astype(np.int64)
            order = np.lexsort((where, held))
            again = np.diff(held[order], prepend=EMPTY) == 0
            order = np.concatenate([order[~again], order[again]])
            expert[layer, : len(order)], gpu[layer, : len(order)] = held[order], where[order]
            empty = self.slots_per_gpu - np.bincount(where, minlength=self.num_gpus)
            gpu[layer, len(order) :] = np.repeat(np.arange(self.num_gpus), empty)
        if expert[:, :experts].min(initial=0) < 0:
            raise ValueError("an expert has no copy")  # cannot be: placements are checked
        return expert, gpu

    def placement(self, expert: Ints, gpu: Ints) -> Placement:
        """Return the placement of items; its slots are in the order of experts."""
        layers, gpus, width = len(expert), self.num_gpus, int(self.slots_per_gpu.max())
        slots = np.full((layers, gpus, width), EMPTY, np.int64)
        for layer in range(layers):
            for g in range(gpus):
                held = expert[layer][(gpu[layer] == g) & (expert[layer] != EMPTY)]
                slots[layer, g, : len(held)] = np.sort(held)
        return Placement(slots=slots, num_experts=self.pairs.shape[1])

    def gpu_load(self, placement: Placement) -> Floats:
        """``[layer, GPU]`` loads of a placement."""
        load: Floats = np.einsum("lge,le->lg", placement.copies(), self.weigh(placement.replicas()))
        return load

    def keeps_cap(self, placement: Placement) -> npt.NDArray[np.bool_]:
        """``[layer]`` whether a placement keeps the cap; rounding of sums does not break it."""
        cap = np.where(np.isfinite(self.cap), self.cap, UNLIMITED)
        kept: npt.NDArray[np.bool_] = self.gpu_load(placement).max(axis=1) <= cap * (1 + 1e-12)
        return kept

    def patched(self, placement: Placement, other: Placement) -> Placement:
        """Return a placement whose layers above the cap are those of another one."""
        kept = self.keeps_cap(placement)[:, None, None]
        return placement.replace(slots=np.where(kept, placement.slots, other.slots))

    def worth(self) -> Floats:
        """``[GPU, next GPU]`` worth of a pair by its way, as instances have it."""
        if self.cost is None or not self.cost.any():
            return np.eye(self.num_gpus)
        worth: Floats = np.rint(WHOLE * (1 - self.cost / self.cost.max()))
        return worth

    def kept(self, placement: Placement) -> float:
        """Worth of all pairs, copies sharing evenly. Complexity: O(layers · experts² · GPUs)."""
        share, worth = placement.even_share(), self.worth()
        return float(sum((share[i] @ table @ share[i + 1].T * worth).sum() for i, table in enumerate(self.pairs)))

    def near(self, share: Floats, layer: int) -> Floats:
        """``[GPU, expert]`` worth of an expert's pairs with the layers beside its own if its tokens were all there.

        ``share`` [layer, GPU, expert] is :meth:`Placement.even_share`. Complexity: O(GPUs · experts²).
        """
        worth = self.worth()
        near = np.zeros(share.shape[1:])
        if layer > 0:
            near += worth.T @ share[layer - 1] @ self.pairs[layer - 1]
        if layer < len(self.pairs):
            near += worth @ share[layer + 1] @ self.pairs[layer].T
        return near


def counts(expert: Ints, num_experts: int) -> Ints:
    """``[layer, expert]`` copies of each expert, given the experts of items."""
    flat = np.arange(len(expert))[:, None] * (num_experts + 1) + expert + 1
    table = np.bincount(flat.ravel(), minlength=len(expert) * (num_experts + 1))
    return table.reshape(len(expert), num_experts + 1)[:, 1:]


def mixed(chain: Chain, placements: Sequence[Placement]) -> Placement:
    """Return the best chain of the placements' layers, each with GPUs of equally many slots renamed.

    The programme of :func:`moeplace.chains.recombine.recombine`, for layers that hold unlike copies. Loads of layers
    are as they were. Never worse than the best of the placements in :meth:`Chain.kept`.
    Complexity: O(placements · layers · GPUs · (experts² + placements · (GPUs · experts + GPUs²))).
    """
    if len(placements) == 1:
        return placements[0]
    worth, room = chain.worth(), chain.slots_per_gpu
    same = room[:, None] == room[None, :]
    shares = [placement.even_share() for placement in placements]
    identity = np.arange(chain.num_gpus)
    value, names, came = np.zeros(len(placements)), [identity] * len(placements), []
    named = [names]
    for layer, pairs in enumerate(chain.pairs):
        sent = [share[layer][name] @ pairs for share, name in zip(shares, names, strict=True)]
        ways = []
        for share in shares:
            found = [_named(table @ share[layer + 1].T, worth, same) for table in sent]
            total = value + np.array([way[0] for way in found])
            best = int(total.argmax())
            ways.append((float(total[best]), best, found[best][1]))
        value, names = np.array([way[0] for way in ways]), [way[2] for way in ways]
        came.append([way[1] for way in ways])
        named.append(names)
    at = int(value.argmax())
    rows = []
    for layer in range(len(chain.pairs), -1, -1):
        rows.append(placements[at].slots[layer][named[layer][at]])
        at = came[layer - 1][at] if layer else at
    joined = Placement(slots=np.stack(rows[::-1]), num_experts=placements[0].num_experts)
    return max([joined, *placements], key=chain.kept)


def _named(moved: Floats, worth: Floats, same: npt.NDArray[np.bool_]) -> tuple[float, Ints]:
    """Worth of pairs ``moved`` [GPU, next GPU] under the best names of the next, and which old GPU each name is."""
    table = worth.T @ moved  # [new name, old GPU]
    row, column = linear_sum_assignment(np.where(same, -table, table.sum() + 1.0))
    return float(table[row, column].sum()), column
