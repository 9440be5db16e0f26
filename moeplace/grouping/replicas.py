"""Copies of the hot experts of a layer's heaviest group (GRACE-MoE, equation 3 and the rule of the hot set)."""

from __future__ import annotations

import math

import numpy as np

from moeplace.frozen import Floats, Ints


def num_replicas(group_load: Floats) -> int:
    """Return ``n = min(max(1, ⌊ρ⌋), groups - 1)`` with ``ρ`` the load of the heaviest group over the mean."""
    skew = float(group_load.max() / group_load.mean())
    return min(max(1, math.floor(skew + 1e-12)), len(group_load) - 1)


def hot_experts(load: Floats, members: Ints, replicas: int) -> Ints:
    """Return the hot ones of a group's ``members``, most load first.

    The shortest such list whose load together reaches ``W·n/(1+n)``, ``W`` being the load of the group and ``n`` the
    ``replicas``: what has to leave for the group to keep one part of ``n+1``.
    """
    ranked = members[np.argsort(-load[members], kind="stable")]
    reached = np.cumsum(load[ranked])
    threshold = float(load[members].sum()) * replicas / (1 + replicas)
    return ranked[: int(np.searchsorted(reached, threshold * (1 - 1e-12))) + 1] if replicas else ranked[:0]
