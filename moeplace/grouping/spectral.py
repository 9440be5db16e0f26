"""Spectral clustering of a dense affinity: eigenvectors of the normalised Laplacian, then k-means.

The recipe of Ng, Jordan and Weiss (NIPS 2001): the eigenvectors of ``D^-1/2·A·D^-1/2`` with the largest eigenvalues,
one row per expert scaled to length 1, clustered by k-means with k-means++ starts. All of it is seeded.
"""

from __future__ import annotations

import numpy as np

from moeplace.frozen import Floats, Ints

STARTS, ROUNDS = 10, 100


def spectral_groups(affinity: Floats, groups: int, seed: int) -> Ints:
    """``[expert]`` group of each expert, 0 to ``groups - 1``; sizes are free, and no group is empty if it need not be.

    Parameters
    ----------
    affinity
        ``[expert, expert]`` symmetric and not negative; the diagonal plays no part.
    groups
        How many.
    seed
        Of the starts of k-means.

    Complexity: O(experts³) for the eigenvectors, O(starts · rounds · experts · groups²) for k-means.
    """
    experts = len(affinity)
    if groups == 1:
        return np.zeros(experts, np.int64)
    if experts <= groups:
        return np.arange(experts)
    return _k_means(_embedding(affinity, groups), groups, np.random.default_rng([seed, experts, groups]))


def _embedding(affinity: Floats, dimensions: int) -> Floats:
    """``[expert, dimension]`` rows of length 1; an expert that no token chose with another one gets a row of zeros."""
    weight = affinity.astype(np.float64)
    np.fill_diagonal(weight, 0.0)
    degree = weight.sum(axis=1)
    scale = np.divide(1.0, np.sqrt(degree), out=np.zeros(len(degree)), where=degree > 0)
    _, vectors = np.linalg.eigh(scale[:, None] * weight * scale[None, :])
    rows = vectors[:, -dimensions:]
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Floats = np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-12)
    return result


def _k_means(points: Floats, groups: int, rng: np.random.Generator) -> Ints:
    """``[point]`` cluster of each, the best of several starts by the sum of squared distances."""
    best, least = np.zeros(len(points), np.int64), np.inf
    for _ in range(STARTS):
        label, cost = _lloyd(points, _first_centres(points, groups, rng))
        if cost < least * (1 - 1e-12):
            best, least = label, cost
    return best


def _first_centres(points: Floats, groups: int, rng: np.random.Generator) -> Floats:
    """k-means++: each further centre is a point drawn in proportion to its squared distance to those before it."""
    chosen = [int(rng.integers(len(points)))]
    away = _squared(points, points[chosen])[:, 0]
    for _ in range(groups - 1):
        total = float(away.sum())
        draw = rng.random()
        if total > 0:
            chosen.append(min(int(np.searchsorted(np.cumsum(away), draw * total, side="right")), len(points) - 1))
        else:  # fewer distinct points than centres
            chosen.append(next(i for i in range(len(points)) if i not in chosen))
        away = np.minimum(away, _squared(points, points[chosen[-1:]])[:, 0])
    return points[chosen]


def _lloyd(points: Floats, centres: Floats) -> tuple[Ints, float]:
    label = np.full(len(points), -1, np.int64)
    for _ in range(ROUNDS):
        away = _squared(points, centres)
        new = _none_empty(away, away.argmin(axis=1))
        if (new == label).all():
            break
        label = new
        member = label[None, :] == np.arange(len(centres))[:, None]
        centres = member @ points / np.maximum(1, member.sum(axis=1))[:, None]
    return label, float(_squared(points, centres)[np.arange(len(points)), label].sum())


def _none_empty(away: Floats, label: Ints) -> Ints:
    """Give every empty cluster the point that is farthest from its own, of clusters that have others."""
    label = label.copy()
    size = np.bincount(label, minlength=away.shape[1])
    for empty in np.flatnonzero(size == 0):
        own = np.where(size[label] > 1, away[np.arange(len(label)), label], -1.0)
        moved = int(own.argmax())
        size[label[moved]] -= 1
        label[moved] = empty
        size[empty] = 1
    return label


def _squared(points: Floats, centres: Floats) -> Floats:
    """``[point, centre]`` squared distances."""
    cross = points @ centres.T
    squared = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)[None, :] - 2 * cross
    result: Floats = np.maximum(squared, 0.0)
    return result
