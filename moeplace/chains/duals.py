"""Upper bounds on pairs that stay, by linear programming duals: degrees of the sharing graph, layer pair by layer pair.

Write ``X[e,f]`` for whether expert ``e`` of a layer and ``f`` of the next share a GPU. Every expert shares its GPU with
at most ``S`` of the other layer, the most slots of a GPU, so ``X`` is a fractional b-matching: entries within 0 and 1,
rows and columns adding up to at most ``S``. With copies, ``X`` is the share that stays, to which the same holds. The
best b-matching is a minimum-cost flow; any multipliers ``u, v ≥ 0`` bound it by
``S·(Σu + Σv) + Σ max(0, A - u - v)``, which is how bounds are evaluated here: valid whatever the multipliers.
"""

from __future__ import annotations

import numpy as np

from moeplace.frozen import Floats, Ints

SWEEPS = 12
FORBIDDEN = -1e30


def matching_bound(pairs: Ints, slots: int) -> Floats:
    """``[layer-1]`` most pairs that can stay, by multipliers improved in turn: quick, and above the exact matching.

    Parameters
    ----------
    pairs
        ``[layer-1, expert, next expert]`` pairs.
    slots
        Most slots of a GPU. Complexity: O(layers · experts²) for each of a fixed number of sweeps.
    """
    return np.array([transport_bound(table.astype(np.float64), slots) for table in pairs])


def exact_matching(pairs: Ints, slots: int) -> Ints:
    """``[layer-1]`` most pairs of the best b-matching, by minimum-cost flow (OR-Tools).

    Whole numbers in, whole numbers out. Complexity: some 0.1 s for each pair of layers of 256 experts.
    """
    from ortools.graph.python import min_cost_flow

    most = []
    experts = pairs.shape[1]
    slots = min(slots, experts)
    rows = np.repeat(np.arange(experts), experts)
    columns = experts + np.tile(np.arange(experts), experts)
    ends = np.arange(experts)
    source, sink = 2 * experts, 2 * experts + 1
    for table in pairs:
        flow = min_cost_flow.SimpleMinCostFlow()
        flow.add_arcs_with_capacity_and_unit_cost(rows, columns, np.ones(experts**2, np.int64), -table.ravel())
        full, free = np.full(experts, slots), np.zeros(experts, np.int64)
        flow.add_arcs_with_capacity_and_unit_cost(np.full(experts, source), ends, full, free)
        flow.add_arcs_with_capacity_and_unit_cost(experts + ends, np.full(experts, sink), full, free)
        flow.set_nodes_supplies(np.array([source, sink]), np.array([slots * experts, -slots * experts]))
        if flow.solve() != flow.OPTIMAL:
            raise RuntimeError("the minimum-cost flow was not solved")  # cannot be: all slots can be filled
        most.append(-flow.optimal_cost())
    return np.array(most, np.int64)


def spectral_bound(pairs: Ints, num_gpus: int, slots: int) -> Floats:
    """``[layer-1]`` most pairs that can stay where every GPU has ``slots`` experts and nothing is replicated.

    With ``x``, ``y`` the memberships of both layers, of orthogonal columns of norm ``√S`` that add up to the vector of
    ones, ``tr(xᵀ A y) = ΣA/G + tr(x'ᵀ A' y')`` for the parts and ``A'`` orthogonal to the ones, and Ky Fan's theorem
    bounds the second term by ``S`` times the ``G - 1`` largest singular values of ``A'``.
    Complexity: O(layers · experts³).
    """
    table = pairs.astype(np.float64)
    centred = table - table.mean(axis=1, keepdims=True) - table.mean(axis=2, keepdims=True)
    centred += table.mean(axis=(1, 2), keepdims=True)
    values = np.linalg.svd(centred, compute_uv=False)[:, : num_gpus - 1]
    bound: Floats = table.sum(axis=(1, 2)) / num_gpus + slots * values.sum(axis=1)
    return bound


def transport_bound(table: Floats, slots: int) -> float:
    """Bound ``max Σ table·X`` over ``0 ≤ X ≤ 1`` with rows and columns that add up to ``slots``, by its dual.

    Multipliers may have either sign; where ``table`` is not negative they are not, and the bound holds for sums of at
    most ``slots`` too.
    """
    kth = len(table) - slots
    if kth <= 0:
        return float(table.sum())
    v, best = np.zeros(table.shape[1]), np.inf
    for _ in range(SWEEPS):
        u = _between(table - v[None, :], kth)
        v = _between(table.T - u[None, :], kth)
        if table.min() >= 0:
            u, v = np.maximum(u, 0.0), np.maximum(v, 0.0)
        left = np.maximum(table - u[:, None] - v[None, :], 0.0).sum()
        best = min(best, float(slots * (u.sum() + v.sum()) + left))
    return best


def _between(rows: Floats, kth: int) -> Floats:
    """``[row]`` the value half way between the ``kth`` smallest and the one below it."""
    parted = np.partition(rows, (kth - 1, kth), axis=1)
    middle: Floats = 0.5 * (parted[:, kth] + parted[:, kth - 1])
    return middle


def symmetric_bound(table: Floats, slots: int) -> float:
    """Bound ``max Σ table·D`` over symmetric ``D``: diagonal 1, entries within 0 and 1, rows that add up to ``slots``.

    ``table`` is symmetric.
    """
    diagonal = float(np.trace(table))
    kth = len(table) - (slots - 1)
    if slots <= 1:
        return diagonal
    apart = table.copy()
    np.fill_diagonal(apart, FORBIDDEN)
    u, best = np.zeros(len(table)), np.inf
    for _ in range(SWEEPS):
        u = 0.5 * (u + np.partition(apart - u[None, :], kth, axis=1)[:, kth])
        left = np.maximum(apart - u[:, None] - u[None, :], 0.0).sum()
        best = min(best, float(2 * (slots - 1) * u.sum() + left))
    return diagonal + best


def shared_bound(table: Floats, slots: int) -> float:
    """Bound ``max Σ table·D`` over symmetric ``D``: all entries within 0 and 1, rows that add up to ``slots``.

    ``table`` is symmetric. Any multipliers ``u`` bound it by ``2·slots·Σu + Σ max(0, table - u - u)``.
    """
    kth = len(table) - slots
    if kth <= 0:
        return float(table.sum())
    u, best = np.zeros(len(table)), np.inf
    for _ in range(SWEEPS):
        u = 0.5 * (u + np.partition(table - u[None, :], kth, axis=1)[:, kth])
        left = np.maximum(table - u[:, None] - u[None, :], 0.0).sum()
        best = min(best, float(2 * slots * u.sum() + left))
    return best
