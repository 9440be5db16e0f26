"""What it takes to turn one placement into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    expert_bytes
        Bytes of one expert's weights, None when the model is unknown.
    """

    arriving: Ints
    leaving: Ints
    layer_ids: tuple[int, ...]
    num_copies: int
    expert_bytes: float | None = None

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


def compare_placements(
    before: Placement,
    after: Placement,
    *,
    layer_ids: Sequence[int] | None = None,
    expert_bytes: float | None = None,
) -> Change:
    """Count the copies each GPU must load and may drop; GPUs keep their numbers.

    Parameters
    ----------
    before, after
        Placements of as many layers, GPUs and experts; slots may differ.
    layer_ids
        One id per layer; default 0, 1, ….
    expert_bytes
        Bytes of one expert's weights.

    Returns
    -------
    Change
        Complexity: O(layers · GPUs · experts).

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
    delta = after.copies() - before.copies()
    return Change(
        arriving=delta.clip(min=0).sum(axis=2),
        leaving=(-delta).clip(min=0).sum(axis=2),
        layer_ids=tuple(range(after.num_layers) if layer_ids is None else layer_ids),
        num_copies=int(after.used_slots().sum()),
        expert_bytes=expert_bytes,
    )


def move_terms(problem: Problem, placement: Placement) -> Mapping[str, Term]:
    """``moved_copies`` and ``moved_bytes`` against the problem's baseline; empty where it has none."""
    if problem.baseline is None:
        return {}
    change = compare_placements(problem.baseline, placement, expert_bytes=float(problem.model.expert_weight_bytes))
    return {
        "moved_copies": Term(value=change.moved_copies, unit="copies"),
        "moved_bytes": Term(value=change.moved_bytes or 0.0, unit="bytes"),
    }
