r"""Pairs that cross GPUs: products of two placements, linearised by the rows of both (RLT).

``z[e, n, f, m, g] = on[l, e, n, g]·on[l+1, f, m, g]`` says that a copy of ``e`` and one of the next layer's ``f`` share
GPU ``g``. A pair stays with probability ``Σ z/(n·m)``, so ``Σ T[e, f]·(1 - Σ z/(n·m))`` pairs cross. Multiplying the
slot rows of one layer by a placement of the other gives

    Σ_{f,m} z ≤ min(slots_g, experts)·on[l, e, n, g],   and the same the other way round,   Σ_{n,m,g} z/(n·m) ≤ 1

which imply ``z ≤ on`` at whole points. Their linear relaxation is the bound by matchings.

Without a load cap nothing is replicated in the model, and nothing is lost: for fixed other experts an expert with
copies stays as often as its copies do on average, so its best copy alone stays at least as often.

Source: Adams and Sherali, Management Science 32 (1986) 1274, the reformulation-linearisation technique.
"""

from __future__ import annotations

import numpy as np

from moeplace.frozen import Floats
from moeplace.joint.decision import Decision, Terms
from moeplace.joint.parts import Part
from moeplace.placement import Placement


def add_cross(decision: Decision) -> Part:
    """Add the pairs that cross. Size: O(layers · pairs that occur · copies² · GPUs) variables and terms."""
    pairs = decision.problem.stats.transition
    if pairs is None:
        raise ValueError("no transitions")
    total = int(pairs.sum())
    # a fixed cost: costs are those of pairs that cross, never less than nothing
    everything = decision.model.integer("pairs", 1, 1)
    costs: Terms = [(everything, float(total))]
    made: list[tuple[int, int, int]] = []
    for layer, table in enumerate(pairs):
        _link(decision, layer, table, costs, made)
    if made:
        products = np.array(made, np.int64)

    def complete(point: Floats, placement: Placement) -> None:
        del placement
        point[everything] = 1.0
        if made:
            point[products[:, 0]] = point[products[:, 1]] * point[products[:, 2]]

    return Part(costs=costs, scale=float(max(1, total)), complete=complete)


def _link(decision: Decision, layer: int, table: np.ndarray, costs: Terms, made: list[tuple[int, int, int]]) -> None:
    """Link a layer with the next: ``table`` [expert, next expert] pairs."""
    model, on = decision.model, decision.on
    rows: dict[int, list[int]] = {}
    for e, f in np.argwhere(table).tolist():
        shared: Terms = []
        for n, m, g in np.ndindex(decision.most, decision.most, on.shape[3]):
            here, there = int(on[layer, e, n, g]), int(on[layer + 1, f, m, g])
            if model.upper[here] == 0:
                continue
            z = model.integer(f"z{layer}_{e}_{n + 1}_{f}_{m + 1}_{g}", 0, 1, implied=True)
            share = 1 / ((n + 1) * (m + 1))
            shared.append((z, share))
            costs.append((z, -float(table[e, f]) * share))
            made.append((z, here, there))
            rows.setdefault(here, []).append(z)
            rows.setdefault(there, []).append(z)
        model.add(shared, upper=1)
    room = decision.problem.slots_per_gpu if not decision.problem.whole_model else None
    gpus = on.shape[3]
    for variable, products in rows.items():
        # binaries of the placement are numbered with the GPU as the fastest axis
        most = len(products) if room is None else min(int(room[variable % gpus]), len(products))
        model.add([*((z, 1.0) for z in products), (variable, -float(most))], upper=0)
