"""What is annealed: pairs of consecutive choices, loads, and the most load of a GPU in each layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Floats, Ints

MOST_PAIRS = 2**30
UNLIMITED = 1e300


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
    """

    pairs: npt.NDArray[np.int32]
    back: npt.NDArray[np.int32]
    load: Floats
    cap: Floats
    num_gpus: int

    @classmethod
    def of(cls, pairs: Ints, load: Ints, cap: Floats, num_gpus: int, *, slots: int | None = None) -> Instance:
        """Lay out the arrays; pairs too many for 32 bits are scaled down and rounded.

        ``slots`` are those of a layer, at least its experts; the spare ones become experts of nothing.
        """
        whole = np.asarray(pairs, np.float64)
        most = float(whole.sum(axis=(1, 2)).max(initial=0.0))
        if most >= MOST_PAIRS:
            whole = whole * (MOST_PAIRS / most)
        spare = 0 if slots is None else slots - load.shape[1]
        own = np.pad(np.rint(whole).astype(np.int32), ((0, 0), (0, spare), (0, spare)))
        return cls(
            pairs=np.ascontiguousarray(own),
            back=np.ascontiguousarray(own.transpose(0, 2, 1)),
            load=np.pad(np.asarray(load, np.float64), ((0, 0), (0, spare))),
            cap=np.where(np.isfinite(cap), cap, UNLIMITED).astype(np.float64),
            num_gpus=num_gpus,
        )

    @property
    def mean_load(self) -> float:
        """Mean load of a GPU in a layer."""
        return float(self.load.sum(axis=1).mean()) / self.num_gpus

    def stays(self, gpu: Ints) -> int:
        """Pairs that stay on their GPU. Complexity: O(layers · experts²)."""
        total = 0
        for layer, table in enumerate(self.pairs):
            total += int(table[gpu[layer][:, None] == gpu[layer + 1][None, :]].sum(dtype=np.int64))
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
        """``[layer, GPU, expert]`` pairs an expert would keep on each GPU with the layers beside its own."""
        layers, experts = gpu.shape
        on = (gpu[:, None, :] == np.arange(self.num_gpus)[None, :, None]).astype(np.float64)
        near = np.zeros((layers, self.num_gpus, experts), np.int32)
        for layer in range(layers - 1):
            near[layer + 1] += np.rint(on[layer] @ self.pairs[layer]).astype(np.int32)
            near[layer] += np.rint(on[layer + 1] @ self.back[layer]).astype(np.int32)
        return near

    def between(self, layer: int, before: Ints, after: Ints) -> Floats:
        """``[GPU, next GPU]`` pairs that go from each GPU of ``layer`` to each of the next, given both rows."""
        flat = before[:, None] * self.num_gpus + after[None, :]
        weights = self.pairs[layer].ravel()
        table: Floats = np.bincount(flat.ravel(), weights=weights, minlength=self.num_gpus**2).astype(np.float64)
        return table.reshape(self.num_gpus, self.num_gpus)
