r"""A lower bound on copies by semidefinite programming: what pairs of experts that share a GPU can save at most.

Write ``X[e,f]`` for whether two experts share a GPU, 1 on the diagonal. An expert of a token with ``r`` of its experts
on its GPU, itself among them, stands for ``1/r`` copies, and the token's copies are the sum over its experts:
``Σ_e 1/r_e`` with ``r_e = Σ_f X[e,f]`` over the token. For every slope ``b ≥ 0``

    1/r  ≥  a(b) - b·r        with  a(b) = min over whole r of 1/r + b·r,

so copies are at least ``Σ a(b) - ⟨B, X⟩`` for the matrix ``B`` that the slopes of all tokens add up to (with
one slope for all this is the bound of :mod:`moeplace.hypergraph.pairs`). ``X`` is positive semidefinite, not negative,
and its rows add up to ``S``; over those matrices ``⟨B, X⟩`` is maximised by the alternating direction method of
multipliers on the dual (Wen, Goldfarb, Yin, Math. Prog. Comp. 2, 2010). Slopes follow the iterate: those of ``1/r`` at
its rows, mixed with those before (fictitious play). Any slopes and any positive semidefinite multiplier give a valid
bound, evaluated in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from moeplace.chains.duals import symmetric_bound
from moeplace.chains.eigen import PositivePart
from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.patterns import Patterns

STEPS = 600  # at 64 experts
LEAST_STEPS = 40
BETWEEN = 20  # steps for each change of slopes
PENALTY, LARGE_PENALTY, LARGE = 5.0, 8.0, 128
STEP_LENGTH = 1.6
START_SHARE = 0.3  # of the known partition in the first iterate
LEAST_MIX = 0.1
CELLS = 4_000_000  # gathered at once


def default_steps(num_experts: int, work: float) -> int:
    """Steps for a layer: in all layers together they take some seconds to half a minute."""
    return max(LEAST_STEPS, round(STEPS * work * (64 / num_experts) ** 2))


def relaxed_bound(patterns: Patterns, group: Ints, num_groups: int, *, steps: int, stop: Callable[[], bool]) -> float:
    """Lower bound on the copies of all tokens over partitions into groups of equal size, whatever the load cap.

    Parameters
    ----------
    patterns
        The layer.
    group, num_groups
        A good partition ``[expert]``, and its groups of ``experts / num_groups``.
    steps
        Of the method.
    stop
        Asked between changes of slopes.

    Returns
    -------
    float
        Complexity: O(steps · experts³ + steps/20 · patterns · k²).
    """
    if num_groups < 2:
        return float(patterns.tokens)
    relaxation = _Relaxation(patterns, group, patterns.num_experts // num_groups)
    best = 0.0
    for turn in range(-(-steps // BETWEEN)):
        if stop():
            break
        relaxation.iterate(BETWEEN)
        best = max(best, relaxation.bound())
        relaxation.follow(max(LEAST_MIX, 1 / (2 + turn)))
    return best * (1 - 1e-9)


def slope(rows: Floats) -> Floats:
    """Slope ``1/(j(j+1))`` of the line through ``1/j`` and ``1/(j+1)`` that is tight at each ``rows``, at least 1."""
    whole = np.floor(np.maximum(rows, 1.0) + 1e-9)
    return np.asarray(1.0 / (whole * (whole + 1.0)))


def intercept(slopes: Floats, most: int) -> Floats:
    """``min over r = 1..most of 1/r + b·r``."""
    least = np.full_like(slopes, np.inf)
    for r in range(1, most + 1):
        np.minimum(least, 1.0 / r + slopes * r, out=least)
    return least


class _Relaxation:
    """The iterate: slopes, the matrix, and the multipliers of its cone and of its signs."""

    def __init__(self, patterns: Patterns, group: Ints, slots: int) -> None:
        self.patterns, self.slots, self.experts = patterns, slots, patterns.num_experts
        self.weight = patterns.weight.astype(np.float64)
        even = np.full((self.experts, self.experts), (slots - 1) / (self.experts - 1))
        np.fill_diagonal(even, 1.0)
        self.x = (1 - START_SHARE) * even + START_SHARE * (group[:, None] == group[None, :])
        self.slopes = slope(self._rows())
        self.gain = self._gain()
        self._scale = self.experts / max(1e-300, float(self.gain.sum() - np.trace(self.gain)))
        self.penalty = PENALTY if self.experts < LARGE else LARGE_PENALTY
        self.cone = np.zeros_like(self.x)
        self.signs = np.zeros_like(self.x)
        self._part = PositivePart()

    def _rows(self) -> Floats:
        """``[pattern, k]`` experts of the token that share the GPU of each, fractional."""
        ids, top_k = self.patterns.experts, self.patterns.top_k
        table = np.clip(self.x, 0.0, 1.0)
        rows = np.empty(ids.shape)
        block = max(1, CELLS // (top_k * top_k))
        for start in range(0, len(ids), block):
            part = ids[start : start + block]
            rows[start : start + block] = table[part[:, :, None], part[:, None, :]].sum(axis=2)
        return rows

    def _gain(self) -> Floats:
        """``[expert, expert]`` the symmetric matrix of all slopes."""
        ids, size = self.patterns.experts, self.experts
        share = self.weight[:, None] * self.slopes
        flat = np.zeros(size * size)
        for other in range(self.patterns.top_k):
            flat += np.bincount((ids * size + ids[:, other : other + 1]).ravel(), share.ravel(), size * size)
        table = flat.reshape(size, size)
        return 0.5 * (table + table.T)

    def iterate(self, times: int) -> None:
        """Take steps: multipliers of the sums in closed form, then of signs, then of the cone, then the matrix."""
        size, penalty, diagonal = self.experts, self.penalty, np.arange(self.experts)
        cost = -self._scale * self.gain
        for _ in range(times):
            left = cost - self.cone - self.signs
            by_row = (self.slots - self.x.sum(axis=1)) / penalty + left.sum(axis=1)
            alone = (1.0 - self.x[diagonal, diagonal]) / penalty + left[diagonal, diagonal]
            total = float((by_row - alone).sum()) / (size - 1)
            row = (by_row - alone - total / 2) / max(size / 2 - 1, 0.5)
            sums = 0.5 * (row[:, None] + row[None, :])
            sums[diagonal, diagonal] += alone - row
            target = cost - sums - self.x / penalty
            self.signs = np.maximum(0.0, target - self.cone)
            self.cone = self._part.of((target - self.signs).astype(np.float32)).astype(np.float64)
            x = self.x + STEP_LENGTH * penalty * (sums + self.cone + self.signs - cost)
            self.x = 0.5 * (x + x.T)

    def bound(self) -> float:
        """Bound of the present slopes and the cone's multiplier, lifted until no eigenvalue is below 0."""
        cone = 0.5 * (self.cone + self.cone.T) / self._scale
        values = np.linalg.eigvalsh(cone)
        lift = max(0.0, -float(values[0])) + 1e-12 * float(np.abs(values).max(initial=0.0))
        cone[np.arange(self.experts), np.arange(self.experts)] += lift
        most = min(self.slots, self.patterns.top_k)
        constant = float(self.weight @ intercept(self.slopes, most).sum(axis=1))
        value = constant - symmetric_bound(self.gain + cone, self.slots)
        return value if math.isfinite(value) else 0.0

    def follow(self, mix: float) -> None:
        """Move the slopes towards those of the iterate."""
        self.slopes = (1 - mix) * self.slopes + mix * slope(self._rows())
        self.gain = self._gain()
