"""Extra slots shared over layers: what a layer gains from each, and how to deal a total exactly.

A curve tells the cost of a layer by its number of extra slots; it never rises, since a slot may stay empty. The least
sum of costs within a total is found exactly by dynamic programming over layers. Dealt over floors instead of costs that
packings reach, the same programme gives a certified bound for every placement within the total.

CRAFT (arXiv 2603.28768) deals by a threshold instead: with the benefit ``(balancedness(R) - balancedness(0))/R``, ``R``
one of :data:`CRAFT_SIZES`, a layer takes the largest ``R`` whose benefit is at least the mean of all layers' benefits;
else the largest of at most 16 with at least half the mean; else its best. How ties and the mean are taken is not told
in full: here the mean is over all layers and all ``R > 0``. Its padding of the total to a multiple of the GPUs is left
out: slots may stay empty here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeplace.frozen import Floats, Ints

CRAFT_SIZES = (0, 4, 8, 16, 32)  # extra slots of a layer that its released code tries
MODEST = 16


def share_exactly(curves: Floats, sizes: Ints, total: int) -> Ints:
    """Deal extra slots so that the sum of costs is least.

    Parameters
    ----------
    curves
        ``[layer, choice]`` cost of a layer with ``sizes[choice]`` extra slots.
    sizes
        ``[choice]`` rising numbers of extra slots; the first is 0.
    total
        Most extra slots of all layers together.

    Returns
    -------
    array
        ``[layer]`` the choice of each; of equal costs the fewer slots. Complexity: O(layers · total · choices).
    """
    layers = len(curves)
    total = min(int(total), layers * int(sizes[-1]))
    best = np.zeros(total + 1)
    taken = np.zeros((layers, total + 1), np.int64)
    for layer in range(layers):
        with_layer = best + curves[layer, 0]
        for choice in range(1, len(sizes)):
            size = int(sizes[choice])
            if size > total:
                break
            cost = best[: total + 1 - size] + curves[layer, choice]
            better = cost < with_layer[size:] - 1e-12
            with_layer[size:][better] = cost[better]
            taken[layer, size:][better] = choice
        best = with_layer
    left, chosen = int(np.flatnonzero(best <= best.min() + 1e-12)[0]), np.zeros(layers, np.int64)
    for layer in range(layers - 1, -1, -1):
        chosen[layer] = taken[layer, left]
        left -= int(sizes[chosen[layer]])
    return chosen


def share_by_threshold(curves: Floats, sizes: Ints) -> Ints:
    """``[layer]`` choices by CRAFT's rule, which has no total: see the module. ``curves`` are 1 less balancedness.

    Complexity: O(layers · choices).
    """
    if len(sizes) < 2:
        return np.zeros(len(curves), np.int64)
    benefit = (curves[:, :1] - curves[:, 1:]) / sizes[1:]
    mean = float(benefit.mean())
    chosen = np.zeros(len(curves), np.int64)
    for layer, gains in enumerate(benefit):
        enough = np.flatnonzero(gains >= mean)
        modest = np.flatnonzero((gains >= mean / 2) & (sizes[1:] <= MODEST))
        pick = enough[-1] if enough.size else modest[-1] if modest.size else int(gains.argmax())
        chosen[layer] = pick + 1 if gains[pick] > 0 else 0
    return chosen


def spread_layers(used: Sequence[Ints]) -> Ints:
    """``[layer, GPU]`` orders of GPUs that even out the slots each uses over all layers.

    ``used`` are ``[GPU]`` slots of each layer. Layer by layer the fullest GPU goes where the fewest slots are in use.
    GPU ``g`` of the result is the layer's GPU ``order[g]``.
    """
    total = np.zeros(len(used[0]), np.int64)
    orders = []
    for held in used:
        order = np.empty(len(held), np.int64)
        order[np.argsort(total, kind="stable")] = np.argsort(-held, kind="stable")
        total += held[order]
        orders.append(order)
    return np.array(orders)
