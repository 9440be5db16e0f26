"""MoETuner's second integer programme: clusters onto GPUs, least sum of the slowest transfers.

With ``y[l, c, g] = 1`` where cluster ``c`` of layer ``l`` is on GPU ``g``, costs ``C`` and ``D`` as in
:mod:`moeplace.moetuner.chain`, and a lower bound ``b_l`` on each ``z_l``, write ``z_l = b_l + w_l``, ``w_l ≥ 0``. For
each layer pair, clusters ``c, d``, distinct cost ``v`` with ``C[l, c, d]·v > b_l``, and set ``S`` of GPUs that have the
same GPUs ``F = {h: D[g, h] ≥ v}`` at cost ``v`` or more,

    w_l ≥ (C[l, c, d]·v - b_l) · ( Σ_{g∈S} y[l, c, g] + Σ_{h∈F} y[l+1, d, h] - 1 ).

*Correct.* At a 0/1 point both sums are 0 or 1 (one-to-one), so the right side is positive only if ``c`` is in ``S`` and
``d`` in ``F``; then ``D[g(c), h(d)] ≥ v`` and the true ``z_l`` is at least ``C·v``. With ``v = D[g(c), h(d)]`` and the
``S`` of ``g(c)`` the row is the published product term itself. Pairs with ``C·v ≤ b_l`` can never raise ``z_l`` above
its bound and are left out. *Tight.* Summing over the GPUs of a node instead of one row per GPU makes the bracket
positive at fractional points where the published product, ``D`` row by row, is negative. Rows whose excess is more than
the start leaves (``Σ_l (z_l of the start - b_l)``) become ``Σ + Σ ≤ 1``: such a placement costs more than the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.milp import LinearModel
from moeplace.moetuner.chain import Chain

MARGIN = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingModel:
    """The linear model; ``y`` [layer, cluster, GPU] numbers its variables."""

    model: LinearModel
    y: Ints

    def gpus(self, values: Floats) -> Ints:
        """``[layer, cluster]`` GPUs of a feasible point."""
        gpu: Ints = values[self.y].argmax(axis=2)
        return gpu


def num_terms(chain: Chain, bounds: Floats) -> int:
    """Non-zeros of the mapping model's cost rows, about, without building it."""
    return sum(
        int((traffic * cost > bound + MARGIN * bound).sum()) * sum(len(near) + len(far) for near, far in groups)
        for cost, groups in _levels(chain.cost)
        for traffic, bound in zip(chain.traffic, bounds, strict=True)
    )


def mapping_model(chain: Chain, bounds: Floats, start: Ints, total_bound: float) -> MappingModel:
    """Build the integer programme of the module's text.

    Parameters
    ----------
    chain
        The instance.
    bounds
        ``[layer-1]`` lower bounds ``b_l``.
    start
        ``[layer, cluster]`` GPUs of a feasible assignment: a MIP start, and what bounds the excess.
    total_bound
        A lower bound on ``Σ_l z_l``, at least ``Σ b_l``.
    """
    model = LinearModel()
    y = _assignment(model, chain)
    costs = chain.layer_costs(start)
    spare = max(0.0, float(costs.sum() - bounds.sum()))
    # a little room above the start, so that rounding never cuts it off
    room = spare * (1 + 1e-6) + MARGIN * float(costs.sum())
    w = [model.continuous(f"w{layer}", 0.0, room) for layer in range(chain.num_layers - 1)]
    for layer, bound in enumerate(bounds.tolist()):
        for terms, excess in _cost_rows(chain, y, layer, bound):
            if excess > room:
                model.add(terms, upper=1)
            else:
                model.add([(w[layer], 1.0), *((v, -excess * a) for v, a in terms)], lower=-excess)
    if not chain.is_level:
        for g in range(chain.num_gpus):
            model.add(_held(chain, y, g), int(chain.total_lower[g]), int(chain.total_upper[g]))
    gained = min(total_bound - float(bounds.sum()), spare) * (1 - MARGIN)
    if gained > 0:
        model.add([(v, 1.0) for v in w], lower=gained)
    # a fixed variable makes the objective Σ z_l itself, so that gaps mean what they say
    floor = float(bounds.sum())
    constant = model.continuous("floor", floor, floor)
    model.minimise([(constant, 1.0), *((v, 1.0) for v in w)])
    placed = {int(y[layer, c, g]): 1.0 for (layer, c), g in np.ndenumerate(start)}
    model.begin_at(placed | {constant: floor} | {v: float(costs[i] - bounds[i]) for i, v in enumerate(w)})
    return MappingModel(model=model, y=y)


def memory_model(chain: Chain, start: Ints, capacity: Ints) -> MappingModel:
    """Least number of experts by which a GPU must miss its range over all layers, given the clusters' sizes.

    ``min t`` with ``total_lower_g - t ≤ Σ_l Σ_c size[l, c]·y[l, c, g] ≤ min(total_upper_g + t, capacity_g)``.
    """
    model = LinearModel()
    y = _assignment(model, chain)
    relaxed = model.integer("t", 0, int(chain.sizes.sum()))
    for g in range(chain.num_gpus):
        held = _held(chain, y, g)
        model.add([*held, (relaxed, 1)], lower=int(chain.total_lower[g]))
        model.add([*held, (relaxed, -1)], upper=int(chain.total_upper[g]))
        model.add(held, upper=int(capacity[g]))
    model.minimise([(relaxed, 1.0)])
    placed = {int(y[layer, c, g]): 1.0 for (layer, c), g in np.ndenumerate(start)}
    model.begin_at(placed | {relaxed: float(chain.excess(start))})
    return MappingModel(model=model, y=y)


def _assignment(model: LinearModel, chain: Chain) -> Ints:
    gpus = range(chain.num_gpus)
    fits = chain.sizes[:, :, None] <= chain.room[None, None, :]
    y = np.array(
        [
            [[model.integer(f"y{layer}_{c}_{g}", 0, int(fits[layer, c, g])) for g in gpus] for c in gpus]
            for layer in range(chain.num_layers)
        ],
        np.int64,
    )
    for table in y:
        for i in gpus:
            model.add([(int(v), 1) for v in table[i]], lower=1, upper=1)
            model.add([(int(v), 1) for v in table[:, i]], lower=1, upper=1)
    return y


def _held(chain: Chain, y: Ints, gpu: int) -> list[tuple[int, float]]:
    return [(int(y[layer, c, gpu]), float(size)) for (layer, c), size in np.ndenumerate(chain.sizes)]


def _levels(cost: Floats) -> list[tuple[float, list[tuple[Ints, Ints]]]]:
    """Each distinct cost ``v`` with its sets ``S`` (GPUs that see the same far GPUs) and ``F`` (those far GPUs)."""
    found = []
    for value in np.unique(cost[cost > 0]):
        far = cost >= value
        patterns: dict[bytes, list[int]] = {}
        for g, row in enumerate(far):
            patterns.setdefault(row.tobytes(), []).append(g)
        groups = [(np.array(near), np.flatnonzero(far[near[0]])) for near in patterns.values()]
        found.append((float(value), [(near, others) for near, others in groups if others.size]))
    return found


def _cost_rows(chain: Chain, y: Ints, layer: int, bound: float) -> Iterator[tuple[list[tuple[int, float]], float]]:
    for cost, groups in _levels(chain.cost):
        excess = chain.traffic[layer] * cost - bound
        for c, d in np.argwhere(excess > MARGIN * bound):
            for near, far in groups:
                terms = [(int(v), 1.0) for v in y[layer, c, near]] + [(int(v), 1.0) for v in y[layer + 1, d, far]]
                yield terms, float(excess[c, d])
