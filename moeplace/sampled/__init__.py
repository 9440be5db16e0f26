"""Placements chosen on sampled steps: what every copy adds to its GPU in every step, and swaps that lower the sum.

The time of a step is a sum over layers of the busiest GPU's time. Its mean over steps drawn from the trace (sample
average approximation, Kleywegt, Shapiro, Homem-de-Mello, SIAM J. Optim. 12, 2002) parts into layers; its tail does not.
"""

from __future__ import annotations

from moeplace.sampled.improve import Search, improve_mean, improve_tail
from moeplace.sampled.tables import StepTables

__all__ = ["Search", "StepTables", "improve_mean", "improve_tail"]
