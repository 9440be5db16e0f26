r"""MoETuner's first integer programme: the experts of one layer into clusters of equal load.

With ``x[c, e] = 1`` where expert ``e`` is in cluster ``c``, load ``T_c = Σ_e P_e·x[c, e]`` and mean ``T̄ = Σ_e P_e/G``

    min Σ_c |T_c - T̄|   subject to  Σ_c x[c, e] = 1,  lower_c ≤ Σ_e x[c, e] ≤ upper_c           (arXiv 2502.06643, §4)

As ``Σ_c (T_c - T̄) = 0`` the objective is twice the sum of the positive parts, so one variable per cluster,
``d_c ≥ G·T_c - Σ P`` and ``d_c ≥ 0``, makes it linear and whole-numbered: ``Σ_c |T_c - T̄| = 2/G·Σ_c d_c``.

Clusters of equal limits can be renamed at will. With experts ranked by falling load, renaming by first member shows
that some optimum has ``x[c, r] = 0`` for ``r < c`` within each set of equal clusters. (Rows that order the first
members fully were tried: they prove nothing sooner and make CBC find worse clusterings.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace.errors import ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.milp import LinearModel

OVER_CAP = 1e3
MAX_SWAPS = 2_000
WORST = 8  # clusters on either side of the mean that are looked at
MAX_PAIRED = 24  # experts of a cluster whose pairs are exchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer's clustering problem.

    Attributes
    ----------
    load
        ``[expert]`` selections ``P``.
    lower, upper
        ``[cluster]`` fewest and most experts.
    cap
        Most load a cluster may have [selections]; infinite without a cap.
    """

    load: Ints
    lower: Ints
    upper: Ints
    cap: float = math.inf

    @property
    def num_clusters(self) -> int:
        """Clusters, one per GPU."""
        return len(self.lower)

    def cluster_load(self, cluster: Ints) -> Ints:
        """``[cluster]`` load of the assignment ``cluster`` [expert]."""
        return _sums(cluster, self.load, self.num_clusters)

    def deviation(self, cluster: Ints) -> float:
        """``Σ_c |T_c - T̄|`` [selections]."""
        clusters = self.num_clusters
        away = np.abs(clusters * self.cluster_load(cluster) - int(self.load.sum()))
        return float(away.sum()) / clusters


def even_sizes(total: int, room: Ints) -> tuple[Ints, Ints]:
    """Fewest and most of ``total`` things each bin of ``room`` takes when they are dealt as evenly as room allows.

    The level ``t`` is the least with ``Σ_c min(room_c, t) ≥ total``; bins then hold ``min(room_c, t-1)`` to
    ``min(room_c, t)``: the floor and ceiling of the mean where room is equal, exactly ``room`` where none is spare.

    >>> even_sizes(9, np.array([2, 8, 8]))
    (array([2, 3, 3]), array([2, 4, 4]))
    """
    if total > int(room.sum()):
        raise ProblemError(f"{total} experts", rule=f"there is room for {int(room.sum())}")
    level = 0
    while int(np.minimum(room, level).sum()) < total:
        level += 1
    lower, upper = np.minimum(room, max(0, level - 1)), np.minimum(room, level)
    return (upper, upper) if int(upper.sum()) == total else (lower, upper)


def deviation_bound(layer: Layer) -> float:
    """Lower bound on ``Σ_c |T_c - T̄|`` from arithmetic alone [selections].

    Loads are whole numbers, so with ``r = Σ P mod G`` the deviations add up to at least ``2·r·(G - r)/G``. And clusters
    that hold the experts above the mean exceed it by at least ``Σ_e (P_e - T̄)⁺`` in total (two of them in one cluster
    exceed it by more), which counts twice. Complexity: O(experts).
    """
    clusters, total = layer.num_clusters, int(layer.load.sum())
    rest = total % clusters
    hot = int(np.maximum(0, clusters * layer.load - total).sum())
    return 2 * max(rest * (clusters - rest), hot) / clusters


def balanced_start(layer: Layer) -> Ints:
    """``[expert]`` clusters: heaviest first onto the least loaded open cluster, then the best swaps and moves.

    Every swap of two experts and every move into a free place is tried, the best taken, until none lowers the deviation
    (load above the cap counts a thousandfold). Complexity: O(experts·clusters) and O(experts²) per swap.
    """
    return improved(layer, _heaviest_first(layer))


def improved(layer: Layer, start: Ints) -> Ints:
    """``[expert]`` clusters after the best swaps and moves from ``start``, then swaps of pairs, until none helps.

    Sums of pairs lie so dense that two clusters of a dozen experts can mostly be brought as near the mean as both can.
    Complexity: O(experts²) for each of at most :data:`MAX_SWAPS` steps, O(size⁴) for each pair of clusters of a size.
    """
    cluster, total = start.copy(), layer.cluster_load(start)
    for _ in range(MAX_SWAPS):
        if not (
            _best_swap(layer, cluster, total)
            or _best_move(layer, cluster, total)
            or _swap_of_pairs(layer, cluster, total)
        ):
            break
    return cluster


def _heaviest_first(layer: Layer) -> Ints:
    size, total = np.zeros(layer.num_clusters, np.int64), np.zeros(layer.num_clusters, np.int64)
    cluster = np.empty(len(layer.load), np.int64)
    for done, expert in enumerate(np.argsort(-layer.load, kind="stable")):
        owed = np.maximum(0, layer.lower - size)
        is_open = (size < layer.upper) & ((owed > 0) | (len(layer.load) - done > owed.sum()))
        chosen = int(np.argmin(np.where(is_open, total, np.iinfo(np.int64).max)))
        cluster[expert] = chosen
        size[chosen] += 1
        total[chosen] += layer.load[expert]
    return cluster


def _penalty(layer: Layer, total: npt.NDArray[np.int64]) -> Floats:
    mean = layer.load.sum() / layer.num_clusters
    costs: Floats = np.abs(total - mean) + OVER_CAP * np.maximum(0.0, total - layer.cap)
    return costs


def _best_swap(layer: Layer, cluster: Ints, total: Ints) -> bool:
    load = layer.load
    now = _penalty(layer, total)[cluster]
    moved = load[None, :] - load[:, None]
    here = total[cluster]
    after = _penalty(layer, here[:, None] + moved)
    change = after + after.T - now[:, None] - now[None, :]
    change[cluster[:, None] == cluster[None, :]] = 0.0
    i, j = divmod(int(change.argmin()), len(load))
    if change[i, j] >= -1e-9:
        return False
    a, b = cluster[i], cluster[j]
    total[a] += load[j] - load[i]
    total[b] += load[i] - load[j]
    cluster[i], cluster[j] = b, a
    return True


def _best_move(layer: Layer, cluster: Ints, total: Ints) -> bool:
    size = np.bincount(cluster, minlength=layer.num_clusters)
    free, spare = size < layer.upper, size > layer.lower
    if not free.any() or not spare.any():
        return False
    now = _penalty(layer, total)
    leave = _penalty(layer, total[cluster] - layer.load) - now[cluster]
    arrive = _penalty(layer, total[None, :] + layer.load[:, None]) - now[None, :]
    change = np.where(spare[cluster][:, None] & free[None, :], leave[:, None] + arrive, 0.0)
    change[np.arange(len(cluster)), cluster] = 0.0
    i, b = divmod(int(change.argmin()), layer.num_clusters)
    if change[i, b] >= -1e-9:
        return False
    total[cluster[i]] -= layer.load[i]
    total[b] += layer.load[i]
    cluster[i] = b
    return True


def _swap_of_pairs(layer: Layer, cluster: Ints, total: Ints) -> bool:
    """Exchange two experts of a cluster with two of another where that lowers the deviation, the worst first."""
    mean = layer.load.sum() / layer.num_clusters
    falling = np.argsort(-total, kind="stable")
    over, under = falling[total[falling] > mean][:WORST], falling[total[falling] < mean][::-1][:WORST]
    for a in over:
        for b in under:
            ours, theirs = (np.flatnonzero(cluster == c) for c in (a, b))
            if not 2 <= min(len(ours), len(theirs)) <= max(len(ours), len(theirs)) <= MAX_PAIRED:
                continue
            i, j = np.triu_indices(len(ours), 1), np.triu_indices(len(theirs), 1)
            given, taken = (layer.load[held][np.stack(at)].sum(axis=0) for held, at in ((ours, i), (theirs, j)))
            moved = given[:, None] - taken[None, :]
            after = _penalty(layer, total[a] - moved) + _penalty(layer, total[b] + moved)
            p, q = divmod(int(after.argmin()), after.shape[1])
            if after[p, q] < float(_penalty(layer, total[[a, b]]).sum()) - 1e-9:
                cluster[ours[[i[0][p], i[1][p]]]], cluster[theirs[[j[0][q], j[1][q]]]] = b, a
                total[a] -= moved[p, q]
                total[b] += moved[p, q]
                return True
    return False


def _sums(group: Ints, values: Ints, num_groups: int) -> Ints:
    table = np.zeros(num_groups, np.int64)
    np.add.at(table, group, values)
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteringModel:
    """The linear model of a layer; ``x`` [cluster, rank] numbers its variables, experts ranked by falling load."""

    model: LinearModel
    x: Ints
    order: Ints

    def clusters(self, values: Floats) -> Ints:
        """``[expert]`` clusters of a feasible point."""
        cluster = np.empty(len(self.order), np.int64)
        cluster[self.order] = values[self.x].argmax(axis=0)
        return cluster


def clustering_model(layer: Layer, start: Ints) -> ClusteringModel:
    """Build the integer programme of the module's text, starting from ``start`` [expert] where it is feasible.

    Size: experts·clusters binaries, one row per expert and two or three per cluster, O(experts·clusters) terms.
    """
    model, clusters, experts = LinearModel(), layer.num_clusters, len(layer.load)
    order = np.argsort(-layer.load, kind="stable")
    load, total = layer.load[order], int(layer.load.sum())
    twins = _twins(layer)
    turn = {c: i for members in twins for i, c in enumerate(members)}
    x = np.array(
        [[model.integer(f"x{c}_{r}", 0, int(r >= turn[c])) for r in range(experts)] for c in range(clusters)], np.int64
    )
    deviation = [model.integer(f"d{c}", 0, clusters * total, implied=True) for c in range(clusters)]
    for rank in range(experts):
        model.add([(int(v), 1) for v in x[:, rank]], lower=1, upper=1)
    for c in range(clusters):
        model.add([(int(v), 1) for v in x[c]], lower=int(layer.lower[c]), upper=int(layer.upper[c]))
        held = [(int(v), int(p)) for v, p in zip(x[c], load, strict=True)]
        model.add([(deviation[c], 1), *((v, -clusters * p) for v, p in held)], lower=-total)
        if math.isfinite(layer.cap):
            model.add(held, upper=layer.cap)
    floor = deviation_bound(layer) * clusters / 2
    model.add([(d, 1) for d in deviation], lower=math.ceil(floor - 1e-6))
    model.minimise([(d, 2 / clusters) for d in deviation])
    built = ClusteringModel(model=model, x=x, order=order)
    _begin(built, layer, deviation, _renamed(start[order], twins))
    return built


def _twins(layer: Layer) -> list[list[int]]:
    """Sets of clusters with the same limits, each in order."""
    sets: dict[tuple[int, int], list[int]] = {}
    for c, limits in enumerate(zip(layer.lower.tolist(), layer.upper.tolist(), strict=True)):
        sets.setdefault(limits, []).append(c)
    return list(sets.values())


def _renamed(cluster: Ints, twins: list[list[int]]) -> Ints:
    """Rename equal clusters by their first member."""
    name = np.arange(int(cluster.max()) + 1 if not twins else max(max(members) for members in twins) + 1)
    for members in twins:
        first = {c: int(np.argmax(cluster == c)) if (cluster == c).any() else len(cluster) + c for c in members}
        for new, old in zip(members, sorted(members, key=lambda c: first[c]), strict=True):
            name[old] = new
    renamed: Ints = name[cluster]
    return renamed


def _begin(built: ClusteringModel, layer: Layer, deviation: list[int], cluster: Ints) -> None:
    values = {int(built.x[c, rank]): 1.0 for rank, c in enumerate(cluster.tolist())}
    loads = _sums(cluster, layer.load[built.order], layer.num_clusters)
    for c, load in enumerate(loads.tolist()):
        values[deviation[c]] = float(max(0, layer.num_clusters * load - int(layer.load.sum())))
    built.model.begin_at(values)
