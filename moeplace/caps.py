"""Caps that are given by what EPLB reaches: on the load of GPUs, and on the copies of a token."""

from __future__ import annotations

import re

import numpy as np

from moeplace.affinity import RoutingStats
from moeplace.errors import InputError
from moeplace.frozen import Floats, Ints
from moeplace.metrics import copies_per_token, max_over_mean
from moeplace.packing.eplb import balance_global
from moeplace.topology import Topology


def cap_for(cap: str | float | None, stats: RoutingStats, slots_per_gpu: Ints) -> Floats | None:
    """``[layer]`` cap on max/mean GPU load: a number for every layer, or EPLB's own maximum per layer."""
    if cap is None:
        return None
    if cap == "eplb":
        return max_over_mean(balance_global(stats.load.astype(np.float64), slots_per_gpu), stats.load)
    try:
        return np.full(stats.meta.num_layers, float(cap))
    except ValueError:
        raise InputError(f"load cap {cap!r}", rule="a number of at least 1, or eplb") from None


def copies_cap_for(
    cap: str | float | None, stats: RoutingStats, slots_per_gpu: Ints, topology: Topology
) -> float | None:
    """Copies per token: a number, or ``eplb`` and ``eplb-6%`` for those of EPLB's placement and so much less."""
    if cap is None:
        return None
    text = str(cap).strip()
    match = re.fullmatch(r"eplb(?:([+-]\d+(?:\.\d+)?)%)?", text)
    if match:
        own = copies_per_token(stats, balance_global(stats.load.astype(np.float64), slots_per_gpu), topology)
        return own * (1 + float(match[1] or 0) / 100)
    try:
        return float(text)
    except ValueError:
        raise InputError(f"copies cap {text!r}", rule="a number of at least 1, eplb, or eplb-6%") from None
