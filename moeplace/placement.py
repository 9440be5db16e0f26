"""Placements: which expert lives in which slot of which GPU, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import PlacementError
from moeplace.frozen import digest, frozen_array, replaced, seal

EMPTY = -1
MAX_EXPERTS = 32_767  # ids are int16


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Experts in slots.

    Attributes
    ----------
    slots
        ``[MoE layer, GPU, slot]`` int16 expert id, :data:`EMPTY` for an empty slot. GPUs that hold fewer experts than
        others are padded with empty slots. Reshaped to ``[layer, GPU·slot]`` it is a stack's physical-to-logical map.
    num_experts
        Experts per layer.

    Raises
    ------
    PlacementError
        An id is out of range, or an expert of a layer is on no GPU.
    """

    slots: npt.NDArray[np.signedinteger[Any]]
    num_experts: int

    def __post_init__(self) -> None:
        raw = np.asarray(self.slots)
        if raw.ndim != 3 or 0 in raw.shape or raw.dtype.kind not in "iu":
            raise PlacementError(f"slots of shape {raw.shape} and type {raw.dtype}", rule="integers [layer, GPU, slot]")
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise PlacementError(f"{self.num_experts} experts per layer", rule=f"1 to {MAX_EXPERTS}")
        bad = (raw < EMPTY) | (raw >= self.num_experts)
        if bad.any():
            layer, gpu, slot = (int(i) for i in np.argwhere(bad)[0])
            raise PlacementError(
                f"expert {raw[layer, gpu, slot]} in slot {slot} of GPU {gpu}, layer {layer}",
                rule=f"ids lie in 0..{self.num_experts - 1}, {EMPTY} is an empty slot",
            )
        seal(self, slots=frozen_array(raw, np.int16))
        missing = np.argwhere(self.copies().sum(axis=1) == 0)
        if missing.size:
            layer, expert = (int(i) for i in missing[0])
            raise PlacementError(
                f"expert {expert} of layer {layer} is on no GPU ({len(missing)} missing in all)",
                rule="every expert of every layer is placed",
            )

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return int(self.slots.shape[0])

    @property
    def num_gpus(self) -> int:
        """Number of GPUs."""
        return int(self.slots.shape[1])

    @property
    def max_slots(self) -> int:
        """Slots of the GPU that has the most."""
        return int(self.slots.shape[2])

    def copies(self) -> npt.NDArray[np.int64]:
        """``[layer, GPU, expert]`` copies of each expert on each GPU. Complexity: O(layers · GPUs · experts)."""
        layers, gpus, _ = self.slots.shape
        cell = np.arange(layers * gpus).reshape(layers, gpus, 1) * (self.num_experts + 1)
        flat = (cell + self.slots + 1).ravel()
        table = np.bincount(flat, minlength=layers * gpus * (self.num_experts + 1))
        return table.reshape(layers, gpus, self.num_experts + 1)[:, :, 1:]

    def replicas(self) -> npt.NDArray[np.int64]:
        """``[layer, expert]`` number of copies of each expert."""
        return self.copies().sum(axis=1)

    def even_share(self) -> npt.NDArray[np.float64]:
        """``[layer, GPU, expert]`` share of an expert's tokens each GPU serves when copies share them evenly."""
        copies = self.copies()
        return copies / copies.sum(axis=1, keepdims=True)

    def gpu_load(self, load: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """``[layer, GPU]`` load of each GPU for ``load`` ``[layer, expert]``, copies sharing evenly."""
        shares: npt.NDArray[np.float64] = np.einsum("lge,le->lg", self.even_share(), load.astype(np.float64))
        return shares

    def used_slots(self) -> npt.NDArray[np.int64]:
        """``[layer, GPU]`` number of slots that hold an expert."""
        return (self.slots != EMPTY).sum(axis=2)

    def duplicates(self) -> list[tuple[int, int, int]]:
        """``(layer, GPU, expert)`` wherever one GPU holds two copies of one expert: a wasted slot."""
        return [(int(a), int(b), int(c)) for a, b, c in np.argwhere(self.copies() > 1)]

    def check_fits(self, slots_per_gpu: npt.NDArray[Any], *, whole_model: bool = False, distinct: bool = True) -> None:
        """Raise :class:`PlacementError` where a GPU holds more than its slots, or two copies of one expert.

        Parameters
        ----------
        slots_per_gpu
            ``[GPU]`` slots each GPU has in every layer.
        whole_model
            Count slots over all layers together instead of in each layer.
        distinct
            Forbid two copies of one expert on one GPU.
        """
        if len(slots_per_gpu) != self.num_gpus:
            raise PlacementError(f"{self.num_gpus} GPUs", rule=f"the problem has {len(slots_per_gpu)}")
        used, room = self.used_slots(), np.asarray(slots_per_gpu)
        if whole_model:
            used, room = used.sum(axis=0, keepdims=True), room * self.num_layers
        over = np.argwhere(used > room)
        if over.size:
            layer, gpu = (int(i) for i in over[0])
            place = "over all layers" if whole_model else f"in layer {layer}"
            raise PlacementError(
                f"GPU {gpu} holds {used[layer, gpu]} experts {place}", rule=f"it has {room[gpu]} slots"
            )
        if distinct and (twice := self.duplicates()):
            layer, gpu, expert = twice[0]
            raise PlacementError(
                f"GPU {gpu} holds expert {expert} of layer {layer} twice",
                rule="copies of an expert sit on distinct GPUs",
            )

    def permute_gpus(self, order: npt.NDArray[Any]) -> Placement:
        """Relabel GPUs: GPU ``g`` of the result is this placement's ``order[g]`` (``[GPU]`` or ``[layer, GPU]``)."""
        index = np.broadcast_to(np.asarray(order), (self.num_layers, self.num_gpus))
        return self.replace(slots=np.take_along_axis(self.slots, index[:, :, None], axis=1))

    def replace(self, **changes: object) -> Placement:
        """Copy with some fields changed."""
        return replaced(self, **changes)

    def digest(self) -> str:
        """Sha256 of the slots."""
        return digest(self)

    def to_lists(self) -> list[list[list[int]]]:
        """Return the slots as nested lists, trailing empty slots kept so that ``from_lists`` restores them."""
        lists: list[list[list[int]]] = self.slots.tolist()
        return lists

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[Sequence[int]]], num_experts: int) -> Placement:
        """Build from nested lists ``[layer][GPU][slot]``; ragged lists are padded with empty slots."""
        width = max((len(gpu) for layer in lists for gpu in layer), default=0)
        gpus = {len(layer) for layer in lists}
        if len(gpus) != 1 or not width:
            raise PlacementError(
                f"layers with {sorted(gpus)} GPUs", rule="every layer lists the same GPUs, at least one"
            )
        slots = np.full((len(lists), gpus.pop(), width), EMPTY, np.int64)
        for i, layer in enumerate(lists):
            for j, gpu in enumerate(layer):
                slots[i, j, : len(gpu)] = gpu
        return cls(slots=slots, num_experts=num_experts)


def spread_slots(total: int, num_gpus: int) -> npt.NDArray[np.int64]:
    """``[GPU]`` slots when ``total`` slots are dealt as evenly as possible over GPUs, and so over nodes.

    288 slots on 64 GPUs become 32 GPUs with 5 and 32 with 4, alternating.
    """
    edges = np.arange(num_gpus + 1) * total // num_gpus
    return np.diff(edges)[::-1].copy()
