"""What it takes to turn one placement into another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeplace.errors import InputError, PlacementError, UnknownNameError
from moeplace.exporters.native import PlacementFile
from moeplace.frozen import Ints
from moeplace.model import load_model


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
    expert_bytes
        Bytes of one expert's weights, None when the model is unknown.
    """

    arriving: Ints
    leaving: Ints
    layer_ids: tuple[int, ...]
    num_copies: int
    expert_bytes: float | None

    @property
    def moved_copies(self) -> int:
        """Copies to load in all."""
        return int(self.arriving.sum())

    @property
    def moved_bytes(self) -> float | None:
        """Bytes to load in all."""
        return None if self.expert_bytes is None else self.moved_copies * self.expert_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return a ``moeplace/diff/1`` document."""
        return {
            "schema": "moeplace/diff/1",
            "moved_copies": self.moved_copies,
            "moved_share": round(self.moved_copies / self.num_copies, 9),
            "moved_bytes": self.moved_bytes,
            "arriving_per_gpu": self.arriving.sum(axis=0).tolist(),
            "leaving_per_gpu": self.leaving.sum(axis=0).tolist(),
            "per_layer": [
                {"layer": layer, "moved_copies": int(count)}
                for layer, count in zip(self.layer_ids, self.arriving.sum(axis=1), strict=True)
            ],
        }


def compare_placements(before: PlacementFile, after: PlacementFile, *, model: str | None = None) -> Change:
    """Count the copies each GPU must load and may drop; GPUs keep their numbers.

    Raises
    ------
    PlacementError
        The placements differ in layers, GPUs or experts.
    """
    shapes = [(p.num_layers, p.num_gpus, p.num_experts) for p in (before.placement, after.placement)]
    if shapes[0] != shapes[1]:
        raise PlacementError(
            f"{shapes[0]} and {shapes[1]} layers, GPUs and experts", rule="placements of the same shape are compared"
        )
    delta = after.placement.copies() - before.placement.copies()
    return Change(
        arriving=delta.clip(min=0).sum(axis=2),
        leaving=(-delta).clip(min=0).sum(axis=2),
        layer_ids=after.layer_ids,
        num_copies=int(after.placement.used_slots().sum()),
        expert_bytes=_expert_bytes(after, model),
    )


def _expert_bytes(after: PlacementFile, model: str | None) -> float | None:
    if model is not None:
        return float(load_model(model).expert_weight_bytes)
    named = after.details.get("model", {})
    try:
        return float(load_model(str(named.get("name", ""))).expert_weight_bytes)
    except (UnknownNameError, InputError):
        return None
