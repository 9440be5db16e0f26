"""Load of the busiest GPU: for each layer one whole number that no GPU's load exceeds, from its certified floor on."""

from __future__ import annotations

import math

import numpy as np

from moeplace.bounds import load_floor
from moeplace.frozen import Floats
from moeplace.joint.decision import Decision, Terms
from moeplace.joint.parts import Part
from moeplace.placement import Placement


def add_load(decision: Decision) -> Part:
    """Add ``Σ_l T_l/mean_l / layers`` with ``T_l ≥`` the load of every GPU. Size: O(layers · GPUs · copies) terms."""
    model, mean = decision.model, decision.mean
    floor, layers = load_floor(decision.problem) * mean, len(decision.on)
    busiest: list[int] = []
    for layer in range(layers):
        total = float(decision.problem.stats.load[layer].sum() * decision.multiple)
        if decision.is_whole:
            low = math.ceil(floor[layer] * (1 - 1e-12) - 1e-6)
            busiest.append(model.integer(f"busiest{layer}", min(low, total), total, implied=True))
        else:
            busiest.append(model.continuous(f"busiest{layer}", floor[layer] * (1 - 1e-9), total))
        for g in range(decision.on.shape[3]):
            model.add([(busiest[layer], 1.0), *decision.gpu_load(layer, g, -1.0)], 0)
    costs: Terms = [(v, float(1 / (mean[layer] * layers))) for layer, v in enumerate(busiest)]

    def complete(point: Floats, placement: Placement) -> None:
        values = placement.gpu_load(decision.problem.stats.load).max(axis=1) * decision.multiple
        whole = np.rint(values) if decision.is_whole else values
        point[busiest] = np.maximum(whole, np.asarray(model.lower)[busiest])

    return Part(costs=costs, scale=1.0, complete=complete)
