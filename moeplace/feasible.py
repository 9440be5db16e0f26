"""Caps of a problem: whether they can be kept, and whether a placement keeps them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplace.bounds import load_floor
from moeplace.errors import InfeasibleError
from moeplace.metrics import copies_per_token
from moeplace.objective import load_ratio
from moeplace.placement import Placement
from moeplace.problem import Problem

TOLERANCE = 1e-9


def check_cap(problem: Problem) -> None:
    """Raise :class:`InfeasibleError` where the load cap of a layer is below its certified floor, or that on copies."""
    if problem.copies_cap is not None:
        least = max(1, -(-problem.stats.meta.top_k // problem.max_slots))
        if problem.copies_cap < least * (1 - TOLERANCE):
            raise InfeasibleError(
                f"a cap of {problem.copies_cap:g} copies per token",
                rule=f"{problem.stats.meta.top_k} experts of a token need {least} GPUs of {problem.max_slots} slots",
                hint="raise --copies-cap",
            )
    if problem.load_cap is None:
        return
    floor = load_floor(problem)
    layers = np.flatnonzero(problem.load_cap < floor * (1 - TOLERANCE))
    if layers.size:
        shown = ", ".join(
            f"layer {problem.stats.meta.layer_ids[i]} (cap {problem.load_cap[i]:.4f}, floor {floor[i]:.4f})"
            for i in layers[:8]
        )
        raise InfeasibleError(
            f"the load cap is below the certified floor in {layers.size} of {problem.num_layers} layers: {shown}",
            rule="no placement has a max/mean GPU load below the floor",
            hint="raise --load-cap or add redundant experts",
        )


def over_cap(problem: Problem, placement: Placement | None) -> npt.NDArray[np.bool_]:
    """``[layer]`` whether a placement exceeds the load cap."""
    if problem.load_cap is None or placement is None:
        return np.zeros(problem.num_layers, bool)
    over: npt.NDArray[np.bool_] = load_ratio(problem, placement) > problem.load_cap * (1 + TOLERANCE)
    return over


def keeps_caps(problem: Problem, placement: Placement | None) -> bool:
    """Whether a placement keeps every cap of the problem."""
    return not over_cap(problem, placement).any() and not over_copies(problem, placement)


def over_copies(problem: Problem, placement: Placement | None) -> bool:
    """Whether a placement exceeds the cap on copies per token."""
    if problem.copies_cap is None or placement is None:
        return False
    return copies_per_token(problem.stats, placement, problem.topology) > problem.copies_cap * (1 + TOLERANCE)
