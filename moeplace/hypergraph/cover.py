r"""How many tokens nodes can serve by themselves, copies included: a bound on those whose experts one node holds all.

A token with ``m`` of its ``k`` experts on a node is covered there at ``m = k``. For each whole ``j``, 0 to ``k - 2``,

    1[m = k]  ≤  (m - j)(m - j - 1) / ((k - j)(k - j - 1))

since the right side is 1 at ``k`` and never negative at whole numbers (as in Dawson and Sankoff 1967). With ``u_n`` the
indicator of what node ``n`` holds, ``P_ef`` the tokens that chose both experts and loads ``l``, tokens covered on all
nodes are at most ``Σ_n u_n'P·u_n - 2j·l'u_n`` and a constant. Now ``c = Σ_n u_n`` are copies and ``e_n = u_n - c/N``:

    Σ_n u_n'P·u_n = c'P·c/N + Σ_n e_n'P·e_n,     Σ_n e_ne² = c_e - c_e²/N =: w(c_e)

so with any prices ``d`` the last sum is at most ``Σ_e (d_e + λ)·w(c_e)``, ``λ`` the largest eigenvalue of ``P`` less
``diag d`` (on the complement of the ones where all nodes hold as many). What is left depends on copies alone, one each
and the spare slots where they gain most. Every ``d`` gives a bound; subgradients improve them. Without spare slots this
is the semidefinite bound on cuts (Donath and Hoffman 1973; Delorme and Poljak 1993).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.pairs import pairs_of
from moeplace.hypergraph.patterns import Patterns

STEPS = 120
WORK = 1e9  # experts cubed times steps: fewer steps where layers are large
SMOOTH = 0.01  # of the largest eigenvalue: those so near count in a step's direction
SAFE = 1e-9


def most_covered(
    patterns: Patterns, rooms: Ints, spare: int | None = None, *, stop: Callable[[], bool] = lambda: False
) -> float:
    """Upper bound on tokens covered, summed over nodes, with ``rooms`` [node] slots.

    ``spare`` of them at most hold further copies of experts; default: all. Complexity: O(k · patterns · k² + steps ·
    experts³).
    """
    tokens, top_k, experts = float(patterns.tokens), patterns.top_k, patterns.num_experts
    rooms = np.minimum(rooms, experts)  # more experts never cover less: slots that may be in use are
    extra = int(rooms.sum()) - experts
    full, extra = spare is None or spare >= extra, extra if spare is None else min(spare, extra)
    load = np.sort(patterns.load)[::-1]
    each = [min(tokens, float(load[:room].sum()) / top_k) if room >= top_k else 0.0 for room in rooms.tolist()]
    best = float(sum(each))
    if top_k < 2 or len(rooms) < 2 or (rooms >= experts).all():
        return best
    together = pairs_of(patterns)
    even = full and bool((rooms == rooms[0]).all())
    forms = [_Form(together, patterns, j, (len(rooms), extra), even=even) for j in range(top_k - 1)]
    plain = [form.bound(np.zeros(experts))[0] for form in forms]
    steps = int(min(STEPS, WORK / experts**3))
    return min(best, *plain, forms[int(np.argmin(plain))].improved(steps, stop))


class _Form:
    """The bound of one ``j``."""

    def __init__(self, together: Floats, patterns: Patterns, j: int, shape: tuple[int, int], *, even: bool) -> None:
        (self.nodes, self.spare), self.even = shape, even
        below = (patterns.top_k - j) * (patterns.top_k - j - 1)
        self.matrix, load = together / below, patterns.load.astype(np.float64) / below
        sums = self.matrix.sum(axis=1)
        copies = np.arange(1, self.nodes + 1)
        self.width = copies - copies**2 / self.nodes  # w(c)
        # most that a further copy adds beside what prices say: with copies of others where they add most
        heavy = np.repeat(-np.sort(-self.matrix, axis=1), self.nodes - 1, axis=1)[:, : max(0, self.spare)].sum(axis=1)
        self.gain = (2 * sums + heavy) / self.nodes - 2 * j * load
        self.fixed = float(sums.sum()) / self.nodes - 2 * j * float(load.sum())
        self.fixed += self.nodes * j * (j + 1) * patterns.tokens / below

    def bound(self, price: Floats) -> tuple[float, Floats]:
        """Bound under prices, and a subgradient of it."""
        form = self.matrix - np.diag(price)
        if self.even:
            row = form.mean(axis=0)
            form = form - row[None, :] - row[:, None] + row.mean()
        value, vector = np.linalg.eigh(form)
        top = float(value[-1])
        wide = self.width[0]
        added = (price + top)[:, None] * np.diff(self.width)[None, :] + self.gain[:, None]
        order = np.argsort(-added, axis=None, kind="stable")[: max(0, self.spare)]
        total = self.fixed + wide * float((price + top).sum()) + float(added.ravel()[order].sum())
        expert, copy = np.unravel_index(order, added.shape)
        weight = np.full(len(price), wide)
        np.add.at(weight, expert, np.diff(self.width)[copy])
        near = np.exp((value - top) / (SMOOTH * max(abs(top), 1e-300)))
        slope = weight - float(weight.sum()) * (vector**2 @ (near / near.sum()))
        return total + SAFE * (abs(total) + abs(self.fixed)), slope

    def improved(self, steps: int, stop: Callable[[], bool]) -> float:
        """Best bound of some subgradient steps over the prices."""
        price, best, at = np.zeros(len(self.gain)), np.inf, np.zeros(len(self.gain))
        length = 0.3 * float(np.abs(self.matrix).sum(axis=1).mean())
        for step in range(steps):
            value, slope = self.bound(price)
            if value < best:
                best, at = value, price
            if stop():
                break
            slope = slope - slope.mean()
            size = float(np.abs(slope).max())
            if size <= 0:
                break
            price = (at if step % 20 == 19 else price) - length * 0.96**step * slope / size
        return best
