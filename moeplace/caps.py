"""Caps as they are given: by what EPLB reaches on load and copies per token, by bytes and shares on moves."""

from __future__ import annotations

import re

import numpy as np

from moeplace.affinity import RoutingStats
from moeplace.errors import InputError
from moeplace.frozen import Floats, Ints
from moeplace.metrics import copies_per_token, max_over_mean
from moeplace.moving import MoveLimits
from moeplace.packing.eplb import balance_global
from moeplace.placement import Placement
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


def moves_for(
    baseline: Placement | None,
    expert_bytes: float,
    *,
    copies: float | None = None,
    total_bytes: float | None = None,
    gpu_bytes: float | None = None,
    horizon_steps: int | None = None,
) -> MoveLimits | None:
    """Limits on moves, in copies of one expert; None where none is given.

    ``copies`` is a number, or as float a share of the baseline's copies; of it and ``total_bytes`` the tighter holds.

    Raises
    ------
    InputError
        A limit is given and no baseline.
    """
    if all(value is None for value in (copies, total_bytes, gpu_bytes, horizon_steps)):
        return None
    if baseline is None:
        raise InputError("limits on moves", rule="moves are counted from a placement", hint="--baseline FILE")
    total = copies
    if isinstance(copies, float):
        total = int(copies * int(baseline.used_slots().sum()) + 1e-9)
    if total_bytes is not None:
        most = int(total_bytes // expert_bytes)
        total = most if total is None else min(int(total), most)
    return MoveLimits(
        max_copies=None if total is None else int(total),
        max_copies_per_gpu=None if gpu_bytes is None else int(gpu_bytes // expert_bytes),
        horizon_steps=horizon_steps,
    )
