"""Placements chosen on sampled steps: what every copy adds to its GPU in every step, and swaps that lower the sum.

The time of a step is a sum over layers of the busiest GPU's time. Its mean over steps drawn from the trace (sample
average approximation, Kleywegt, Shapiro, Homem-de-Mello, SIAM J. Optim. 12, 2002) parts into layers; its tail does not.
"""

from __future__ import annotations

from moeplace.sampled.improve import Search, improve_mean
from moeplace.sampled.joint import Costs, improve_joint, improve_joint_tail, joint_values
from moeplace.sampled.relink import aligned, moving_value, relink
from moeplace.sampled.starts import SLACKS, best_layers, few_copies, least_price
from moeplace.sampled.tables import StepTables
from moeplace.sampled.tokens import Wire

__all__ = [
    "SLACKS",
    "Costs",
    "Search",
    "StepTables",
    "Wire",
    "aligned",
    "best_layers",
    "few_copies",
    "improve_joint",
    "improve_joint_tail",
    "improve_mean",
    "joint_values",
    "least_price",
    "moving_value",
    "relink",
]
