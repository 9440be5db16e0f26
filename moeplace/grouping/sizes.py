"""Groups brought within limits of size: Algorithm 2 of GRACE-MoE, "controlled non-uniform grouping".

With ``n`` experts in ``D`` groups the ideal size is ``E = n/D``; a ratio ``r`` allows ``δ = max(1, round(E·r))`` more
or fewer. Groups above the upper limit keep their members of most affinity and give up the rest; each of these joins the
group with room that it has most affinity with; at last groups below the lower limit take the members of least
affinity from others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeLimits:
    """Fewest and most experts of each group, ``[group]``; what is asked of them can always be met."""

    low: Ints
    high: Ints

    @classmethod
    def of(cls, experts: int, rooms: Ints, ratio: float) -> SizeLimits:
        """Return the limits of ``experts`` in groups that have ``rooms`` [group] slots, at least as many in all.

        ``ratio`` is GRACE's ``r``. 0 means sizes as even as can be, infinity any size but 0. A group never gets more
        than its slots; where a limit from the ratio cannot be met because of these, other groups may get more.
        """
        groups = len(rooms)
        ideal = experts / groups
        if math.isinf(ratio):
            low, high = np.ones(groups, np.int64), np.full(groups, experts)
        else:
            delta = 0 if ratio == 0 else max(1, math.floor(ideal * ratio + 0.5))
            low = np.full(groups, max(1, math.floor(ideal) - delta))
            high = np.full(groups, math.ceil(ideal) + delta)
        high = np.minimum(high, rooms)
        while high.sum() < experts:
            open_groups = high < rooms
            high[open_groups] += 1
        low = np.minimum(low, high)
        while low.sum() > experts:
            low[len(low) - 1 - int(low[::-1].argmax())] -= 1
        return cls(low=low, high=high)


def by_room(label: Ints, rooms: Ints) -> Ints:
    """``[expert]`` the same groups renamed: the larger one, the more slots where it goes; ties keep their order."""
    size = np.bincount(label, minlength=len(rooms))
    name = np.empty(len(rooms), np.int64)
    name[np.argsort(-size, kind="stable")] = np.argsort(-rooms, kind="stable")
    return name[label]


def controlled(affinity: Floats, label: Ints, limits: SizeLimits) -> Ints:
    """``[expert]`` groups changed as little as Algorithm 2 does until all sizes keep the limits.

    Complexity: O(experts²) for each expert that changes its group.
    """
    label, groups = label.copy(), len(limits.low)
    own = affinity.astype(np.float64)
    np.fill_diagonal(own, 0.0)
    given_up: list[int] = []
    for group in range(groups):
        members = np.flatnonzero(label == group)
        if (surplus := len(members) - int(limits.high[group])) > 0:
            strength = own[np.ix_(members, members)].sum(axis=1)
            given_up += members[np.argsort(strength, kind="stable")[:surplus]].tolist()
    label[given_up] = -1
    for expert in sorted(given_up, key=lambda expert: (-float(own[expert].sum()), expert)):
        size = np.bincount(label[label >= 0], minlength=groups)
        label[expert] = _most_attached(own[expert], label, size < limits.high)
    return _fill_needy(own, label, limits.low)


def _most_attached(attraction: Floats, label: Ints, is_open: npt.NDArray[np.bool_]) -> int:
    """Return the open group with most affinity to an expert; of equal ones the first."""
    placed = label >= 0
    pull = np.bincount(label[placed], attraction[placed], minlength=len(is_open))
    return int(np.where(is_open, pull, -1.0).argmax())


def _fill_needy(own: Floats, label: Ints, low: Ints) -> Ints:
    """Move experts of least affinity to their groups into groups below their limit; no giver falls below its own."""
    size = np.bincount(label, minlength=len(low))
    while (need := np.maximum(0, low - size)).any():
        needy = int(need.argmax())
        bond = (own * (label[:, None] == label[None, :])).sum(axis=1)
        moved = int(np.where((size > low)[label], bond, np.inf).argmin())
        size[label[moved]] -= 1
        label[moved] = needy
        size[needy] += 1
    return label
