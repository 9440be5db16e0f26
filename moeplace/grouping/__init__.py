"""Experts that tokens choose together, put into groups: spectral clustering, sizes, the knee, copies of hot experts.

What GRACE-MoE (arXiv 2509.25041) and Occult (arXiv 2505.13345) build placements from. All of it works on one layer's
``affinity`` [expert, expert]: how many tokens chose both. The solvers ``grace`` and ``occult`` decide what goes where.
"""

from __future__ import annotations

from moeplace.grouping.quality import affinity_utilisation, knee, size_deviation
from moeplace.grouping.replicas import hot_experts, num_replicas
from moeplace.grouping.sizes import SizeLimits, by_room, controlled
from moeplace.grouping.spectral import spectral_groups
from moeplace.grouping.uniform import exchanged, grown

__all__ = [
    "SizeLimits",
    "affinity_utilisation",
    "by_room",
    "controlled",
    "exchanged",
    "grown",
    "hot_experts",
    "knee",
    "num_replicas",
    "size_deviation",
    "spectral_groups",
]
