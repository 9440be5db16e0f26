"""How good groups are: the affinity they keep together, and how unequal their sizes are (GRACE-MoE, equations 1, 2)."""

from __future__ import annotations

import numpy as np

from moeplace.frozen import Floats, Ints

LEAST_BEND = 1e-9  # above the line, both axes scaled to 1


def affinity_utilisation(affinity: Floats, label: Ints) -> float:
    """Share of all pairs chosen together that are in one group: ``U = Σ_C Σ_{i<j∈C} A_ij / Σ_{i<j} A_ij``."""
    weight = affinity.astype(np.float64)
    np.fill_diagonal(weight, 0.0)
    total = float(weight.sum())
    return float(weight[label[:, None] == label[None, :]].sum()) / total if total > 0 else 1.0


def size_deviation(label: Ints, groups: int) -> float:
    """Root mean square of how far sizes are from ``E = experts/groups``: ``S = sqrt(1/D · Σ_d (|C_d| - E)²)``."""
    size = np.bincount(label, minlength=groups)
    return float(np.sqrt(((size - len(label) / groups) ** 2).mean()))


def knee(deviation: Floats, utilisation: Floats) -> int | None:
    """Place of the knee of a curve: the point that is farthest above the line between its ends; None where none is.

    Both axes are scaled to 0..1 first. Of equal points the one of least deviation is taken, also on a curve that is
    flat; of two with the same deviation and utilisation the first.
    """
    order = np.lexsort((np.arange(len(deviation)), -utilisation, deviation))
    wide, high = float(np.ptp(deviation)), float(np.ptp(utilisation))
    if wide <= 0 or high <= 0:
        return int(order[0])
    across = (deviation[order] - deviation.min()) / wide
    up = (utilisation[order] - utilisation[order[0]]) / high
    above = up - up[-1] * across
    return None if above.max() <= LEAST_BEND else int(order[int(above.argmax())])
