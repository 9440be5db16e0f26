"""An upper bound on pairs that stay within the load caps, by semidefinite programming over the chain of layers.

Write ``D_l[e,f]`` for whether two experts of layer ``l`` share a GPU and ``X_l[e,f]`` for one of layer ``l`` and one of
the next. With the memberships ``x_l`` (expert × GPU), ``D_l = x_l x_lᵀ`` and ``X_l = x_l x_{l+1}ᵀ``, so every block
``[[D_l, X_l], [X_lᵀ, D_{l+1}]]`` is positive semidefinite. Entries lie within 0 and 1, the diagonal of ``D`` is 1, rows
and columns add up to ``S``, and a row weighted with loads is the load of a GPU, at most its layer's cap:
``D_l w_l ≤ c_l``, ``X_l w_{l+1} ≤ c_{l+1}``, ``X_lᵀ w_l ≤ c_l``. Maximising ``Σ A_l·X_l`` over all that relaxes the
placement problem with equally many slots on every GPU and no copies.

With copies ``x`` holds the share of an expert's tokens that a GPU serves: within 0 and 1, rows adding up to 1. Every
condition above still holds, but the diagonal of ``D`` may be below 1. Empty slots, and slots of which a share is all
that is used, are filled by experts of nothing, shared as needed: what a GPU has left is at most the number of spare
slots, so their shares are within 0 and 1 too. Triangles hold because they are linear in each of their three experts'
shares, whose extremes are single GPUs.

Blocks of consecutive layers suffice: the pattern
is chordal. :mod:`moeplace.chains.triangles` tightens it once it has nearly converged.

It is solved by the alternating direction method of multipliers in single precision: matrices with the sums (closed
form), the cone (eigenvectors, followed from step to step, in threads), the box and the caps take turns. Any iterate
gives a valid bound, evaluated in double precision: multipliers of the cone are a sum of squares by construction, those
of the caps and the triangles are clipped at 0, and what remains is bounded by :mod:`moeplace.chains.duals`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from moeplace.chains.duals import shared_bound, symmetric_bound, transport_bound
from moeplace.chains.eigen import PositivePart, Singles, eigh, load_routine
from moeplace.chains.triangles import Triangles
from moeplace.frozen import Floats, Ints

RHO_TIMES_EXPERTS = 3.2  # the step of the method: found best at 64 and at 256 experts
TRIANGLES = 1000  # added to a block at a time
SETTLED = 80  # steps before the first are
ROOM = 1e-9  # placements may exceed their caps by this


class ChainSDP:
    """One instance and its current iterate.

    Parameters
    ----------
    pairs
        ``[layer-1, expert, next expert]`` pairs.
    load
        ``[layer, expert]`` loads.
    cap
        ``[layer]`` most load of a GPU, or None without caps.
    num_gpus
        GPUs; each has ``experts / num_gpus`` slots.
    threads
        Threads; they do not change the result.
    once
        Whether no expert has copies. Otherwise copies share tokens evenly, or as they like.
    """

    def __init__(
        self, pairs: Ints, load: Ints, cap: Floats | None, num_gpus: int, *, threads: int = 1, once: bool = True
    ) -> None:
        self.once = once
        self.links, self.experts = pairs.shape[:2]
        self.slots = self.experts // num_gpus
        self.scale = self.links * self.experts / max(1.0, float(pairs.sum(dtype=np.float64)))
        self.pairs_gain = self.gain = (
            pairs * self.scale
        )  # such that a placement keeps at most about one pair for each expert and link
        mean = np.maximum(load.mean(axis=1, keepdims=True), 1e-300)
        self.weight = (load / mean).astype(np.float64)
        self.top = np.full(len(load), np.inf) if cap is None else cap / mean[:, 0] * (1 + ROOM)
        self.capped = cap is not None
        self.rho = RHO_TIMES_EXPERTS / self.experts
        self.threads = max(1, threads)
        size, half = (self.links, self.experts, self.experts), (len(load), self.experts)
        self.across = np.full(size, self.slots / self.experts, np.float32)
        self.within = np.full((len(load), self.experts, self.experts), 0.0, np.float32)
        self.within += np.float32((self.slots - 1) / max(1, self.experts - 1))
        diagonal = np.arange(self.experts)
        self.within[:, diagonal, diagonal] = 1.0
        self.box_across, self.box_within = self.across.copy(), self.within.copy()
        self.cone = np.stack([self._block(link) for link in range(self.links)])
        self.cone_dual = np.zeros_like(self.cone)
        self.across_dual, self.within_dual = np.zeros_like(self.across), np.zeros_like(self.within)
        self.rows = [np.full(shape, self.slots, np.float64) for shape in (half, size[:2], size[:2])]
        self.row_dual = [np.zeros_like(rows) for rows in self.rows]
        load_routine()
        self.triangles = [Triangles(2 * self.experts) for _ in range(self.links)]
        self.triangle_gain = np.zeros(self.within.shape)
        self._parts = [PositivePart() for _ in range(self.links)]
        self._maps = _Maps(self.weight, self.capped, self._copies())

    def iterate(self, times: int, stop: Callable[[], bool] = lambda: False) -> int:
        """Take some steps; return how many were taken. Complexity: O(layers · experts³) each."""
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self.threads) as pool:
            for done in range(times):
                if stop():
                    return done
                list(pool.map(self._meet_sums_across, range(self.links)))
                list(pool.map(self._meet_sums_within, range(len(self.weight))))
                list(pool.map(self._meet_cone, range(self.links)))
                list(pool.map(self._meet_box, range(len(self.weight))))
                if len(self.triangles[0].price):
                    self._price(list(pool.map(self._meet_triangles, range(self.links))))
        return times

    def separate(self) -> None:
        """Add the triangle inequalities that the iterate violates most."""
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(lambda link: self.triangles[link].separate(self._block(link), TRIANGLES), range(self.links)))

    def bound(self) -> float:
        """Evaluate the bound of the current iterate: pairs that stay in any placement, at most."""
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self.threads) as pool:
            links = list(pool.map(self._link_bound, range(self.links)))
            within = np.zeros((len(self.weight), self.experts, self.experts))
            total = 0.0
            for link, (value, before, after) in enumerate(links):
                total += value
                within[link] += before
                within[link + 1] += after
            total += sum(pool.map(self._layer_bound, range(len(self.weight)), within + self.triangle_gain))
            total += sum(float(triangles.price.sum()) for triangles in self.triangles)
        return total / self.scale * (1 + 1e-9)

    def _block(self, link: int) -> Singles:
        upper = np.concatenate([self.within[link], self.across[link]], axis=1)
        lower = np.concatenate([self.across[link].T, self.within[link + 1]], axis=1)
        return np.concatenate([upper, lower])

    def _copies(self) -> Floats:
        """``[layer]`` copies of its matrix: one in each block and one in the box."""
        copies = np.full(len(self.weight), 3.0)
        copies[0] = copies[-1] = 2.0
        return copies

    def _meet_sums_across(self, link: int) -> None:
        e = self.experts
        target = self.cone[link, :e, e:] - self.cone_dual[link, :e, e:]
        target = 0.5 * (target + self.box_across[link] - self.across_dual[link])
        target += (self.gain[link] / (4 * self.rho)).astype(np.float32)
        aims = [self.rows[i][link] - self.row_dual[i][link] for i in (1, 2)]
        self.across[link] = self._maps.across(link, target, self.slots, aims)

    def _meet_sums_within(self, layer: int) -> None:
        e = self.experts
        target = self.box_within[layer] - self.within_dual[layer]
        if layer < self.links:
            target = target + self.cone[layer, :e, :e] - self.cone_dual[layer, :e, :e]
        if layer > 0:
            target = target + self.cone[layer - 1, e:, e:] - self.cone_dual[layer - 1, e:, e:]
        target = target + (self.triangle_gain[layer] / self.rho).astype(np.float32)
        aim = self.rows[0][layer] - self.row_dual[0][layer]
        self.within[layer] = self._maps.within(layer, target, self.slots, aim)

    def _meet_cone(self, link: int) -> None:
        moved = self._block(link) + self.cone_dual[link]
        self.cone[link] = self._parts[link].of(moved)
        self.cone_dual[link] = moved - self.cone[link]

    def _meet_triangles(self, link: int) -> Floats:
        return self.triangles[link].update(self._block(link), self.rho)

    def _price(self, weights: list[Floats]) -> None:
        """Charge what the triangles' multipliers cost: in the gains of pairs and of experts of one layer."""
        e = self.experts
        self.triangle_gain = np.zeros_like(self.triangle_gain)
        for link, block in enumerate(weights):
            self.triangle_gain[link] -= block[:e, :e]
            self.triangle_gain[link + 1] -= block[e:, e:]
        self.gain = self.pairs_gain - 2 * np.stack([block[:e, e:] for block in weights])

    def _meet_box(self, layer: int) -> None:
        moved = self.within[layer] + self.within_dual[layer]
        clipped = np.clip(moved, 0.0, 1.0)
        if self.once:
            np.fill_diagonal(clipped, 1.0)
        self.box_within[layer], self.within_dual[layer] = clipped, moved - clipped
        self._meet_cap(0, layer, self.within[layer] @ self.weight[layer], self.top[layer])
        if layer < self.links:
            moved = self.across[layer] + self.across_dual[layer]
            self.box_across[layer] = np.clip(moved, 0.0, 1.0)
            self.across_dual[layer] = moved - self.box_across[layer]
            self._meet_cap(1, layer, self.across[layer] @ self.weight[layer + 1], self.top[layer + 1])
            self._meet_cap(2, layer, self.weight[layer] @ self.across[layer], self.top[layer])

    def _meet_cap(self, which: int, index: int, value: Floats, top: float) -> None:
        if self.capped:
            moved = value + self.row_dual[which][index]
            self.rows[which][index] = np.minimum(moved, top)
            self.row_dual[which][index] = moved - self.rows[which][index]

    def _link_bound(self, link: int) -> tuple[float, Floats, Floats]:
        """Bound what belongs to ``X`` of a link, and return what its cone adds to both layers' tables."""
        e = self.experts
        values, vectors = eigh(self.cone_dual[link])
        below = values < 0
        root = vectors[:, below].astype(np.float64) * np.sqrt(-self.rho * values[below].astype(np.float64))
        before, after = root[:e], root[e:]
        table = self.gain[link] + 2 * before @ after.T
        value = 0.0
        if self.capped:
            to_next, to_this = (self.rho * np.maximum(self.row_dual[i][link], 0.0) for i in (1, 2))
            table -= np.outer(to_next, self.weight[link + 1]) + np.outer(self.weight[link], to_this)
            value = float(to_next.sum() * self.top[link + 1] + to_this.sum() * self.top[link])
        return value + transport_bound(table, self.slots), before @ before.T, after @ after.T

    def _layer_bound(self, layer: int, table: Floats) -> float:
        """Bound what belongs to ``D`` of a layer."""
        value = 0.0
        if self.capped:
            price = self.rho * np.maximum(self.row_dual[0][layer], 0.0)
            half = 0.5 * np.outer(price, self.weight[layer])
            table = table - half - half.T
            value = float(price.sum() * self.top[layer])
        return value + (symmetric_bound if self.once else shared_bound)(table, self.slots)


class _Maps:
    """Nearest matrices with given row and column sums, near to given weighted sums: small systems, prepared once.

    Minimise ``c·|M - T|²`` plus the squared distance of weighted sums from their aims, subject to the sums. The optimum
    is ``T`` less ``U Bᵀ + A Vᵀ`` with ``A`` and ``B`` the vectors of ones and of weights; inserting it in the
    conditions leaves a system for the few numbers ``Uᵀ A`` and ``Vᵀ B``.
    """

    def __init__(self, weight: Floats, capped: bool, copies: Floats) -> None:
        ones = np.ones_like(weight)
        self.basis = np.stack([ones, weight], axis=2) if capped else ones[:, :, None]
        self.copies, self.width = copies, self.basis.shape[2]
        self.gram = np.swapaxes(self.basis, 1, 2) @ self.basis
        free = np.diag([0.0, 1.0][: self.width])
        self.inverse = np.linalg.inv(self.gram + 4 * free)
        self.own = np.linalg.inv(self.gram + 2 * copies[:, None, None] * free)
        self.systems = [self._system(layer) for layer in range(len(weight) - 1)]
        swap = self._swap()
        unit = np.eye(self.width**2)
        self.symmetric = [
            np.linalg.pinv(unit + np.kron(own, gram.T) @ swap) for own, gram in zip(self.own, self.gram, strict=True)
        ]

    def across(self, link: int, target: Singles, slots: int, aims: list[Floats]) -> Singles:
        """Return the matrix between two layers nearest to ``target``."""
        before, after = self.basis[link], self.basis[link + 1]
        rows = target @ after.astype(np.float32)
        columns = target.T @ before.astype(np.float32)
        rows, columns = 4.0 * rows.astype(np.float64), 4.0 * columns.astype(np.float64)
        for wanted, aim in ((rows, aims[0]), (columns, aims[1])):
            wanted[:, 0] -= 4.0 * slots
            wanted[:, 1:] -= 4.0 * aim[:, None]
        left, right = self.inverse[link + 1], self.inverse[link]
        known = np.concatenate([(left @ rows.T @ before).ravel(), (right @ columns.T @ after).ravel()])
        found = (self.systems[link] @ known).reshape(2, self.width, self.width)
        u = (rows - before @ found[1]) @ left
        v = (columns - after @ found[0]) @ right
        change = np.concatenate([u, before], axis=1) @ np.concatenate([after, v], axis=1).T
        return target - (0.25 * change).astype(np.float32)

    def within(self, layer: int, total: Singles, slots: int, aim: Floats) -> Singles:
        """Return the symmetric matrix of a layer nearest to all its copies, whose sum is ``total``."""
        copies, basis = self.copies[layer], self.basis[layer]
        target = total / np.float32(copies)
        target = 0.5 * (target + target.T)
        wanted = 2 * copies * (target @ basis.astype(np.float32)).astype(np.float64)
        wanted[:, 0] -= 2 * copies * slots
        wanted[:, 1:] -= 2 * copies * aim[:, None]
        own = self.own[layer]
        found = (self.symmetric[layer] @ (own @ wanted.T @ basis).ravel()).reshape(self.width, self.width)
        u = (wanted - basis @ found) @ own
        half = u @ basis.T
        return target - ((half + half.T) / (2 * copies)).astype(np.float32)

    def _system(self, link: int) -> Floats:
        swap, unit = self._swap(), np.eye(self.width**2)
        to_u = np.kron(self.inverse[link + 1], self.gram[link].T) @ swap
        to_v = np.kron(self.inverse[link], self.gram[link + 1].T) @ swap
        return np.linalg.pinv(np.block([[unit, to_u], [to_v, unit]]))

    def _swap(self) -> Floats:
        """Return the matrix that transposes a small table written as a vector."""
        width = self.width
        order = np.arange(width * width).reshape(width, width).T.ravel()
        return np.eye(width * width)[order]


def bounds(sdp: ChainSDP, steps: int, every: int, stop: Callable[[], bool]) -> Iterator[tuple[int, float]]:
    """Iterate, and yield the steps taken and the best bound so far after every ``every`` of them.

    Triangle inequalities are added at these times once the first steps are taken.
    """
    taken, best = 0, np.inf
    while taken < steps and not stop():
        if taken >= SETTLED:
            sdp.separate()
        done = sdp.iterate(min(every, steps - taken), stop)
        taken += done
        if done:
            best = min(best, sdp.bound())
            yield taken, best
