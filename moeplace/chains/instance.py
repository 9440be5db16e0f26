"""What is annealed: pairs of consecutive choices, what a pair is worth by where it goes, loads and their caps.

An expert with several copies is as many items, each with its share of load and pairs; they sit on distinct GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Floats, Ints

MOST_WORTH = 2**29  # of one expert's pairs: sums of four are compared in 32 bits
WHOLE = 1000  # the worth of a pair that costs nothing, where worths differ
UNLIMITED = 1e300
FINER = 64  # parts of a pair that are told apart where copies share it


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A chain of layers. Empty slots are experts without load and without pairs.

    Attributes
    ----------
    pairs, back
        ``[layer-1, expert, next expert]`` int32 pairs, and the same transposed.
    load
        ``[layer, expert]`` loads.
    cap
        ``[layer]`` most load of a GPU; :data:`UNLIMITED` without a cap.
    num_gpus
        GPUs.
    worth
        ``[GPU, next GPU]`` int32 worth of a pair that goes from one to the other: the unit matrix where only pairs that
        stay count.
    kind
        ``[layer, item]`` what an item is a copy of; no GPU may hold two of a kind. Without copies every item is alone.
    """

    pairs: npt.NDArray[np.int32]
    back: npt.NDArray[np.int32]
    load: Floats
    cap: Floats
    num_gpus: int
    worth: npt.NDArray[np.int32]
    kind: Ints

    @classmethod
    def of(
        cls,
        pairs: Ints | Floats,
        load: Ints | Floats,
        cap: Floats,
        num_gpus: int,
        *,
        slots: int | None = None,
        cost: Floats | None = None,
        kind: Ints | None = None,
    ) -> Instance:
        """Lay out the arrays; pairs too many for 32 bits are scaled down and rounded.

        ``slots`` are those of a layer, at least its experts; the spare ones become experts of nothing. ``cost``
        ``[GPU, next GPU]`` is what a pair costs by its way; without it all ways between GPUs cost the same. With
        ``kind``, ``pairs`` and ``load`` are shares of copies, and are kept in parts of :data:`FINER`.
        """
        worth = np.eye(num_gpus, dtype=np.int32)
        if cost is not None and cost.any():
            worth = np.rint(WHOLE * (1 - cost / cost.max())).astype(np.int32)
        whole = np.asarray(pairs, np.float64)
        of_expert = whole.sum(axis=2).max(initial=0.0) + whole.sum(axis=1).max(initial=0.0)
        most = float(of_expert) * int(worth.max())
        if most >= MOST_WORTH:
            whole = whole * (MOST_WORTH / most)
        elif kind is not None:
            whole = whole * min(FINER, MOST_WORTH / max(1.0, most))
        spare = 0 if slots is None else slots - load.shape[1]
        own = np.pad(np.rint(whole).astype(np.int32), ((0, 0), (0, spare), (0, spare)))
        return cls(
            pairs=np.ascontiguousarray(own),
            back=np.ascontiguousarray(own.transpose(0, 2, 1)),
            load=np.pad(np.asarray(load, np.float64), ((0, 0), (0, spare))),
            cap=np.where(np.isfinite(cap), cap, UNLIMITED).astype(np.float64),
            num_gpus=num_gpus,
            worth=np.ascontiguousarray(worth),
            kind=np.tile(np.arange(own.shape[1]), (len(load), 1)) if kind is None else kind,
        )

    @property
    def is_uniform(self) -> bool:
        """Whether only pairs that stay on their GPU count, so that GPUs can be renamed in any layer."""
        return bool((self.worth == np.eye(self.num_gpus, dtype=np.int32)).all())

    @property
    def twins(self) -> Ints:
        """``[layer, item]`` the next item of the same kind, around in a ring: the item itself where it is alone."""
        order = np.argsort(self.kind, axis=1, kind="stable")
        kinds = np.take_along_axis(self.kind, order, axis=1)
        ring = np.tile(np.arange(order.shape[1]), (len(order), 1))
        for layer in np.flatnonzero((kinds[:, 1:] == kinds[:, :-1]).any(axis=1)).tolist():
            for group in np.split(order[layer], np.flatnonzero(np.diff(kinds[layer])) + 1):
                ring[layer, group] = np.roll(group, -1)
        return ring

    @property
    def mean_load(self) -> float:
        """Mean load of a GPU in a layer."""
        return float(self.load.sum(axis=1).mean()) / self.num_gpus

    def kept(self, gpu: Ints) -> int:
        """Worth of all pairs: those that stay on their GPU. Complexity: O(layers · experts²)."""
        total = 0
        for layer in range(len(self.pairs)):
            total += int((self.between(layer, gpu[layer], gpu[layer + 1]).astype(np.int64) * self.worth).sum())
        return total

    def gpu_load(self, gpu: Ints) -> Floats:
        """``[layer, GPU]`` loads."""
        flat = np.arange(len(gpu))[:, None] * self.num_gpus + gpu
        total: Floats = np.bincount(flat.ravel(), weights=self.load.ravel(), minlength=len(gpu) * self.num_gpus).astype(
            np.float64
        )
        return total.reshape(len(gpu), self.num_gpus)

    def excess(self, gpu: Ints) -> Floats:
        """``[layer]`` load above the cap, all GPUs together; rounding of sums is none."""
        room = self.cap * (1 + 1e-12)
        above: Floats = np.maximum(0.0, self.gpu_load(gpu) - room[:, None]).sum(axis=1)
        return above

    def near(self, gpu: Ints) -> npt.NDArray[np.int32]:
        """``[layer, GPU, expert]`` worth of an expert's pairs with the layers beside its own, on each GPU."""
        return np.stack([np.rint(self.near_layer(gpu, layer)).astype(np.int32) for layer in range(len(gpu))])

    def near_layer(self, gpu: Ints, layer: int) -> Floats:
        """``[GPU, expert]`` of :meth:`near` for one layer. Complexity: O(GPUs · experts²)."""
        near = np.zeros((self.num_gpus, gpu.shape[1]))
        worth = self.worth.astype(np.float64)
        if layer > 0:
            near += worth.T[:, gpu[layer - 1]] @ self.pairs[layer - 1]
        if layer + 1 < len(gpu):
            near += worth[:, gpu[layer + 1]] @ self.back[layer]
        return near

    def between(self, layer: int, before: Ints, after: Ints) -> Floats:
        """``[GPU, next GPU]`` pairs that go from each GPU of ``layer`` to each of the next, given both rows."""
        flat = before[:, None] * self.num_gpus + after[None, :]
        weights = self.pairs[layer].ravel()
        table: Floats = np.bincount(flat.ravel(), weights=weights, minlength=self.num_gpus**2).astype(np.float64)
        return table.reshape(self.num_gpus, self.num_gpus)
