"""Which copy of an expert serves a token.

One policy so far, ``even``: every copy of an expert serves the same share of its tokens, dealt by a hash. Compute and
communication use the same choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.fingerprint import hashed
from moeplace.placement import EMPTY, Placement

POLICIES = ("even",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTable:
    """Slots of every copy of every expert.

    Attributes
    ----------
    slot
        ``[layer, expert, copy]`` slot number within the layer (GPU · slots per GPU + slot), copies in slot order,
        repeated from the first where an expert has fewer copies than the widest.
    count
        ``[layer, expert]`` number of copies.
    slots_per_gpu
        Slots of each GPU, empty ones included: ``slot // slots_per_gpu`` is the GPU.
    """

    slot: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]
    slots_per_gpu: int

    @classmethod
    def of(cls, placement: Placement) -> ReplicaTable:
        """Index a placement. Complexity: O(layers · slots)."""
        count = placement.replicas()
        layers, experts = count.shape
        width = int(count.max())
        flat = placement.slots.reshape(layers, -1)
        table = np.zeros((layers, experts, width), np.int64)
        for layer in range(layers):
            used = np.flatnonzero(flat[layer] != EMPTY)
            order = used[np.argsort(flat[layer][used], kind="stable")]
            starts = np.cumsum(count[layer]) - count[layer]
            table[layer] = order[starts[:, None] + np.arange(width) % count[layer][:, None]]
        return cls(slot=table, count=count, slots_per_gpu=placement.max_slots)

    def choose_even(self, layer: int, experts: npt.NDArray[Any], token: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Slot that serves each selection, copies taking an even share of the tokens.

        Parameters
        ----------
        layer
            MoE layer ordinal.
        experts
            ``[token, k]`` chosen experts.
        token
            ``[token]`` token numbers; a token always gets the same copy of an expert.
        """
        table = self.slot[layer]
        if table.shape[1] == 1:
            return table[experts, 0]
        # offset by a slot, not by the expert's number: renaming experts must not change who is served where
        turn = (hashed(token, layer)[:, None] >> np.uint64(17)) + table[experts, 0].astype(np.uint64)
        return table[experts, (turn % self.count[layer][experts].astype(np.uint64)).astype(np.int64)]
