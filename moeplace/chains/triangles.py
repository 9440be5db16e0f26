"""Triangle inequalities of one block: if one expert shares its GPU with two others, these share theirs.

``Z[i,j] + Z[i,k] - Z[j,k] ≤ 1`` holds for every placement and any three experts of two consecutive layers. There are
too many to hold them all: those that an iterate violates most are added as they are found, with a multiplier each that
rises with the violation and falls below it (the method of multipliers). A multiplier at 0 drops its inequality.
"""

from __future__ import annotations

import numpy as np

from moeplace.chains.eigen import Singles
from moeplace.frozen import Floats, Ints

VIOLATED = 0.02
LARGEST_STEP, SHARED_STEP = 0.5, 3.0


class Triangles:
    """The inequalities in force in one block of ``size`` experts, and their multipliers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.corners = np.zeros((0, 3), np.int64)
        self.price = np.zeros(0)
        self._step = np.zeros(0)

    def separate(self, block: Singles, most: int) -> None:
        """Drop what has no price and add up to ``most`` inequalities that ``block`` ``[size, size]`` violates most.

        Complexity: O(size · size · (entries above ½ in a row)).
        """
        kept = self.price > 0
        self.corners, self.price = self.corners[kept], self.price[kept]
        found, amount = violated(block)
        known = np.isin(self._code(found), self._code(self.corners))
        found, amount = found[~known], amount[~known]
        if len(found) > most:
            chosen = np.argpartition(-amount, most)[:most]
            found = found[np.sort(chosen)]
        self.corners = np.concatenate([self.corners, found])
        self.price = np.concatenate([self.price, np.zeros(len(found))])
        entries = self._entries()
        shared = np.bincount(entries.ravel(), minlength=self.size**2)[entries].sum(axis=0)
        self._step = np.minimum(LARGEST_STEP, SHARED_STEP / np.maximum(shared, 1))

    def _entries(self) -> Ints:
        """``[3, inequality]`` entries of the block that each one adds, adds and takes off, upper triangle."""
        i, j, k = self.corners.T
        ends = np.stack([np.stack([i, i, j]), np.stack([j, k, k])])
        flat: Ints = ends.min(axis=0) * self.size + ends.max(axis=0)
        return flat

    def _code(self, corners: Ints) -> Ints:
        i, j, k = corners.T
        code: Ints = (i * self.size + np.minimum(j, k)) * self.size + np.maximum(j, k)
        return code

    def update(self, block: Singles, rho: float) -> Floats:
        """Move the multipliers by their violations; return ``[size, size]`` symmetric weights of ``Z``.

        ``rho`` is the step of the method around it. With the multipliers ``t``, ``Σ t·(Z[i,j] + Z[i,k] - Z[j,k])`` is
        the inner product of these weights and ``Z``.
        """
        entries = self._entries()
        first, second, third = block.ravel()[entries].astype(np.float64)
        self.price = np.maximum(0.0, self.price + rho * self._step * (first + second - third - 1))
        sums = np.bincount(entries.ravel(), np.concatenate([self.price, self.price, -self.price]), self.size**2)
        weights = sums.reshape(self.size, self.size)
        half: Floats = (weights + weights.T) / 2
        return half


def violated(block: Singles) -> tuple[Ints, Floats]:
    """``[inequality, 3]`` experts of the inequalities that are violated by more than 2 %, and by how much.

    Of the two entries that are added the larger is above ½, so that few need to be looked at.
    """
    found, amounts = [], []
    for i, row in enumerate(block):
        near = np.flatnonzero(row > 0.5)
        near = near[near != i]
        excess = row[near][:, None] + row[None, :] - block[near] - 1
        larger = row[near][:, None] >= row[None, :]
        larger &= (row[near][:, None] > row[None, :]) | (near[:, None] < np.arange(len(row))[None, :])
        excess[~larger] = -1
        excess[:, i] = -1
        at, k = np.nonzero(excess > VIOLATED)
        found.append(np.stack([np.full(len(at), i), near[at], k], axis=1))
        amounts.append(excess[at, k])
    return np.concatenate(found), np.concatenate(amounts).astype(np.float64)
