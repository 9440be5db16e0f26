r"""A lower bound on the busiest GPU's load from whole GPUs: the configuration linear programme.

A *configuration* is a set of exactly ``S`` experts with load at most ``T``. If a layer can be packed so that no GPU has
more than ``T``, then every price ``u`` [expert] satisfies

    Σ_e u_e = Σ_GPUs Σ_{e on it} u_e ≤ G · max{u(C) : C a configuration},

so a price with ``Σ u > G·max u(C)`` proves that the busiest GPU has more than ``T`` (Lagrange's and Farley's bound of
the set partitioning programme; prices are rounded to whole numbers first, which makes the proof exact). Prices come
from that programme's relaxation by column generation: the best prices against the configurations known so far, then the
configuration of most price for them. Of ``S ≤ 4`` experts it is found exactly: from pairs sorted by load, best
prefixes, and a second look where two halves share an expert. GPUs with fewer slots than others hold experts of no load
besides, any number of them, which only makes packing easier.

Two experts per GPU need no programme: the heaviest with the lightest, and so on, is optimal (exchange argument).

Sources: Gilmore and Gomory, Operations Research 9 (1961) 849; Farley, Operations Research 38 (1990) 922.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Floats, Ints
from moeplace.placement import EMPTY

MOST_SLOTS = 4
MOST_EXPERTS = 512
ROUNDS = 60  # of column generation, for each layer
COLUMNS = 150  # added in a round
SECOND_LOOKS = 3000
PRICE = 2**20
NOTHING = 1e-9
NEVER = -(2**62)


def configuration_floor(
    load: Ints,
    slots_per_gpu: Ints,
    *,
    floor: int = 0,
    packing: Ints | None = None,
    rounds: int = ROUNDS,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Lower bound on the load of the busiest GPU where every slot is full and nothing is replicated.

    Parameters
    ----------
    load
        ``[expert]`` selections, whole numbers.
    slots_per_gpu
        ``[GPU]`` slots; they add up to the experts.
    floor
        A lower bound that is known.
    packing
        ``[GPU, slot]`` experts of some good packing, :data:`~moeplace.placement.EMPTY` in what is no slot: loads
        below its busiest are searched, and its GPUs are the first configurations.
    rounds
        Most linear programmes, over all loads that are tried.
    stop
        Asked between programmes whether to end.

    Returns
    -------
    int
        ``floor``, or more. Complexity: O(experts²·log experts) for each round beside its linear programme.
    """
    room = slots_per_gpu[slots_per_gpu > 0]
    width = int(room.max())
    if width > MOST_SLOTS or len(load) > MOST_EXPERTS or len(load) != int(room.sum()):
        return floor
    weight = np.concatenate([load, np.zeros(width * len(room) - len(load), np.int64)]).astype(np.int64)
    if width <= 2:
        return max(floor, _folded(weight, len(room), width))
    search = _Search(weight, len(room), width)
    rows = _sorted_deal(weight, len(room)) if packing is None else _filled(packing, len(load), width)
    search.add([tuple(sorted(row)) for row in rows.tolist()])
    low, high = floor, int(weight[rows].sum(axis=1).max())
    while low < high and rounds > 0 and not stop():
        middle = (low + high) // 2
        refuted, used = search.refutes(middle, rounds, stop)
        rounds -= used
        low, high = (middle + 1, high) if refuted else (low, middle)
    # what was not refuted may be possible: only the lower end is a bound
    return low


def _folded(weight: Ints, gpus: int, width: int) -> int:
    """Load of the busiest GPU when the heaviest joins the lightest, and so on."""
    falling = -np.sort(-weight)
    return int(falling.max() if width == 1 else (falling[:gpus] + falling[::-1][:gpus]).max())


def _sorted_deal(weight: Ints, gpus: int) -> Ints:
    """``[GPU, slot]`` experts dealt in falling order of load, to and fro."""
    deal = np.argsort(-weight, kind="stable").reshape(-1, gpus)
    deal[1::2] = deal[1::2, ::-1]
    return deal.T


def _filled(packing: Ints, experts: int, width: int) -> Ints:
    """``[GPU, slot]`` experts of the GPUs that have any, empty slots filled with the experts of no load."""
    rows = packing[(packing != EMPTY).any(axis=1), :width].astype(np.int64)
    empty = rows == EMPTY
    rows[empty] = experts + np.arange(int(empty.sum()))
    return rows


class _Search:
    """Configurations of one layer, and prices that refute loads."""

    def __init__(self, weight: Ints, gpus: int, width: int) -> None:
        self.weight, self.gpus, self.width = weight, gpus, width
        self.left = _Halves(weight, 2)
        self.right = self.left if width == 4 else _Halves(weight, 1)
        self.known: dict[tuple[int, ...], int] = {}

    def refutes(self, most: int, rounds: int, stop: Callable[[], bool]) -> tuple[bool, int]:
        """Whether prices prove that some GPU has more than ``most``, and the rounds that were used."""
        for used in range(1, rounds + 1):
            value, price = self._prices([c for c, load in self.known.items() if load <= most])
            if value <= NOTHING:
                return False, used
            whole = np.rint(price * PRICE).astype(np.int64)
            dearest, found = self.dearest(whole, most)
            if dearest is None or int(whole.sum()) > self.gpus * dearest:
                return True, used
            before = len(self.known)
            self.add(found)
            if len(self.known) == before or stop():
                return False, used
        return False, rounds

    def add(self, configurations: list[tuple[int, ...]]) -> None:
        """Remember configurations, experts of each in order."""
        self.known |= {c: int(self.weight[list(c)].sum()) for c in configurations}

    def _prices(self, columns: list[tuple[int, ...]]) -> tuple[float, Floats]:
        """Prices from -1 to 1 with the most ``Σ u - G·m``, ``m`` bounding the price of every column."""
        from scipy.optimize import linprog
        from scipy.sparse import csr_array

        count, experts = len(columns), len(self.weight)
        members = np.array(columns, np.int64).reshape(count, self.width)
        at = np.concatenate([members, np.full((count, 1), experts)], axis=1).ravel()
        values = np.tile(np.append(np.ones(self.width), -1.0), count)
        rows = csr_array((values, at, np.arange(count + 1) * (self.width + 1)), shape=(count, experts + 1))
        answer = linprog(
            np.append(-np.ones(experts), self.gpus),
            A_ub=rows if count else None,
            b_ub=np.zeros(count) if count else None,
            bounds=[*[(-1.0, 1.0)] * experts, (-float(self.width), float(self.width))],
            method="highs",
        )
        return (0.0, np.zeros(experts)) if answer.x is None else (-float(answer.fun), answer.x[:experts])

    def dearest(self, price: Ints, most: int) -> tuple[int | None, list[tuple[int, ...]]]:
        """Most price of a configuration (or an upper bound, None where there is none), and dear configurations.

        Halves are looked at in falling order of what they could cost with the best partner their load allows; one
        whose partner shares an expert gets the best that does not.
        """
        left, right = self.left, self.right
        mine, others = left.price(price), right.price(price)
        upto = np.maximum.accumulate(others)
        best_at = np.maximum.accumulate(np.where(others == upto, np.arange(len(others)), 0))
        reach = np.searchsorted(right.weight, most - left.weight, side="right") - 1
        partner = best_at[np.maximum(reach, 0)]
        hoped = np.where(reach >= 0, mine + upto[np.maximum(reach, 0)], NEVER)
        order = np.argsort(-hoped, kind="stable")[: SECOND_LOOKS + 1]
        clash = left.clash(right, order, partner[order])
        dearest: int | None = None
        found: dict[tuple[int, ...], None] = {}
        for turn, half in enumerate(order.tolist()):
            if reach[half] < 0:
                return dearest, list(found)
            is_hopeless = dearest is not None and hoped[half] <= dearest
            if is_hopeless and len(found) >= COLUMNS:
                return dearest, list(found)
            if turn == SECOND_LOOKS:
                return max(int(hoped[half]), NEVER if dearest is None else dearest), list(found)
            if is_hopeless and clash[turn]:
                continue
            other = int(partner[half])
            if clash[turn]:
                free = right.without(left.members[half], int(reach[half]) + 1)
                if not free.any():
                    continue
                other = int(np.where(free, others[: len(free)], NEVER).argmax())
            value = int(mine[half] + others[other])
            dearest = value if dearest is None else max(dearest, value)
            found[tuple(sorted((*left.members[half].tolist(), *right.members[other].tolist())))] = None
        return dearest, list(found)


class _Halves:
    """Single experts or pairs, sorted by load."""

    def __init__(self, weight: Ints, size: int) -> None:
        count = len(weight)
        members = np.stack(np.triu_indices(count, 1), axis=1) if size == 2 else np.arange(count)[:, None]
        load = weight[members].sum(axis=1)
        order = np.argsort(load, kind="stable")
        self.members: Ints = members[order]
        self.weight: Ints = load[order]

    def price(self, price: Ints) -> Ints:
        """``[half]`` prices."""
        total: Ints = price[self.members].sum(axis=1)
        return total

    def clash(self, other: _Halves, own: Ints, theirs: Ints) -> npt.NDArray[np.bool_]:
        """``[pair]`` whether halves ``own`` share an expert with the other kind's ``theirs``."""
        same = self.members[own][:, :, None] == other.members[theirs][:, None, :]
        shared: npt.NDArray[np.bool_] = same.any(axis=(1, 2))
        return shared

    def without(self, experts: Ints, upto: int) -> npt.NDArray[np.bool_]:
        """``[half]`` which of the first ``upto`` hold none of ``experts``."""
        return ~(self.members[:upto, :, None] == experts).any(axis=(1, 2))
