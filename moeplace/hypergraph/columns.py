"""Columns: sets of experts that one GPU may hold, all of one size, with what they cost."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.kernels import compiled_costs, compiled_hits, compiled_scan
from moeplace.hypergraph.patterns import Patterns, bit_sets

LISTED = 60_000  # sets of one size that are listed; more are only counted through
MOST_SETS = 12_000_000  # sets of one size whose costs are all computed
MOST_HITS = 6e10  # sets × patterns where inclusion and exclusion does not reach
ORDER = 4  # most experts of a table
MOST_CELLS = 20_000_000  # of a table
ADDED = 150  # columns a pricing of unlisted sets adds at most
LOOKED_UP = 300  # subsets of a set, by table, where sets are listed


@dataclass(frozen=True, slots=True)
class Pool:
    """Some columns: ``members`` [column, size] padded with -1, and ``cost`` [column] in tokens."""

    members: Ints
    cost: Ints

    def __len__(self) -> int:
        return len(self.cost)

    @property
    def sizes(self) -> Ints:
        """``[column]`` experts of each."""
        return (self.members >= 0).sum(axis=1)

    @classmethod
    def empty(cls, width: int) -> Pool:
        """Return no columns."""
        return cls(np.zeros((0, width), np.int64), np.zeros(0, np.int64))

    def take(self, rows: Ints) -> Pool:
        """Return some of the columns."""
        return Pool(self.members[rows], self.cost[rows])

    def joined(self, *others: Pool) -> Pool:
        """Return these columns and others, each once, in order of their members."""
        width = max(pool.members.shape[1] for pool in (self, *others))
        padded = [
            np.pad(pool.members, ((0, 0), (0, width - pool.members.shape[1])), constant_values=-1)
            for pool in (self, *others)
        ]
        members, first = np.unique(np.concatenate(padded), axis=0, return_index=True)
        return Pool(members, np.concatenate([pool.cost for pool in (self, *others)])[first])

    def reduced(self, price: Floats) -> Floats:
        """``[column]`` cost less the prices [expert] of its members."""
        padded = np.append(price, 0.0)
        return self.cost - padded[self.members].sum(axis=1)


def enumerable(patterns: Patterns, size: int) -> bool:
    """Whether the costs of all sets of ``size`` experts can be computed in seconds."""
    experts, order = patterns.num_experts, min(size, patterns.top_k)
    count = math.comb(experts, size)
    if count > MOST_SETS:
        return False
    if order <= ORDER and experts**order <= MOST_CELLS:
        return True
    return experts <= 64 and count * len(patterns.weight) <= MOST_HITS


class EverySet:
    """All sets of ``size`` experts whose load is within the cap.

    Parameters
    ----------
    patterns
        The layer.
    size
        Experts of a set.
    load
        ``[expert]`` loads.
    cap
        Most load of a set.
    listed
        Keep members beside costs; default: up to :data:`LISTED` sets.
    """

    def __init__(self, patterns: Patterns, size: int, load: Floats, cap: float, *, listed: bool | None = None) -> None:
        self.size, self.load, self.cap = size, load, cap
        self.num_experts = patterns.num_experts
        count = math.comb(self.num_experts, size)
        self.pool: Pool | None = None
        if count <= LISTED if listed is None else listed:
            members = _every_combination(self.num_experts, size)
            members = members[load[members].sum(axis=1) <= cap]
            self.pool = Pool(members, _listed_costs(patterns, members))
        else:
            self.cost = _all_costs(patterns, size, count)

    def price(self, price: Floats) -> tuple[float, Pool]:
        """Least reduced cost of all sets (infinite where there is none), and some unlike sets of low reduced cost.

        Complexity: O(sets).
        """
        if self.pool is None:
            least, best = self._scan(price, -math.inf, 0)[:2]
            order = np.argsort(least, axis=None, kind="stable")[:ADDED]
            found = np.sort(best.ravel()[order])
            found = found[found >= 0]
            return float(least.min()), Pool(
                unranked(found, self.num_experts, self.size), self.cost[found].astype(np.int64)
            )
        if not len(self.pool):
            return math.inf, self.pool
        reduced = self.pool.reduced(price)
        order = np.argsort(reduced, kind="stable")
        members = self.pool.members[order].ravel()
        _, first = np.unique(members, return_index=True)
        return float(reduced[order[0]]), self.pool.take(np.unique(order[first // self.size]))

    def within(self, price: Floats, most: float, room: int) -> Pool | None:
        """Every set with a reduced cost of at most ``most``; None where there are more than ``room``."""
        if self.pool is not None:
            rows = np.flatnonzero(self.pool.reduced(price) <= most)
            return self.pool.take(rows) if len(rows) <= room else None
        _, _, members, where, count = self._scan(price, most, room)
        return Pool(members[:count], self.cost[where[:count]].astype(np.int64)) if count <= room else None

    def _scan(self, price: Floats, most: float, room: int) -> tuple[Floats, Ints, Ints, Ints, int]:
        table = (self.num_experts, self.num_experts)
        least, best = np.full(table, np.inf), np.full(table, -1)
        members, where = np.zeros((room, self.size), np.int64), np.zeros(room, np.int64)
        count = compiled_scan()(
            self.cost, np.asarray(price, np.float64), self.load, self.cap, self.size, most, least, best, members, where
        )
        return least, best, members, where, int(count)


def _every_combination(num_experts: int, size: int) -> Ints:
    flat = np.fromiter(itertools.chain.from_iterable(itertools.combinations(range(num_experts), size)), np.int64)
    return flat.reshape(-1, size)


def _listed_costs(patterns: Patterns, members: Ints) -> Ints:
    """``[set]`` costs of listed sets, by look-ups of their subsets where these are few."""
    size = members.shape[1]
    order = min(size, patterns.top_k)
    looked_up = sum(math.comb(size, j) for j in range(1, order + 1))
    if looked_up > LOOKED_UP or patterns.num_experts**order > MOST_CELLS:
        many = len(members) * len(patterns.weight) > 3e7
        return _hits(patterns, members) if many and patterns.num_experts <= 64 else patterns.touching(members)
    total = np.zeros(len(members), np.int64)
    for table in patterns.tables(order):
        sign = 1 if table.ndim % 2 else -1
        for chosen in itertools.combinations(range(size), table.ndim):
            total += sign * table[tuple(members[:, place] for place in chosen)]
    return total


def _hits(patterns: Patterns, members: Ints) -> Ints:
    out = np.zeros(len(members), np.int64)
    sets = bit_sets(members, patterns.num_experts)
    compiled_hits()(
        np.ascontiguousarray(sets[:, 0]), np.ascontiguousarray(patterns.masks()[:, 0]), patterns.weight, out
    )
    return out


def _all_costs(patterns: Patterns, size: int, count: int) -> npt.NDArray[np.int32]:
    """``[set]`` int32 costs of all sets, lexicographic."""
    order = min(size, patterns.top_k)
    if order > ORDER or patterns.num_experts**order > MOST_CELLS:
        out = np.zeros(count, np.int32)
        for start in range(0, count, LISTED):
            rows = np.arange(start, min(count, start + LISTED))
            out[rows] = _hits(patterns, unranked(rows, patterns.num_experts, size))
        return out
    tables = patterns.tables(order)
    blank = [np.zeros((1,) * j, np.int32) for j in range(1, ORDER + 1)]
    out = np.zeros(count, np.int32)
    compiled_costs()(*[*tables, *blank[order:]], order, size, out)
    return out


def unranked(rank: Ints, num_experts: int, size: int) -> Ints:
    """``[set, size]`` members of the sets at places ``rank`` in lexicographic order. Complexity: O(sets · experts)."""
    members = np.zeros((len(rank), size), np.int64)
    left = np.asarray(rank, np.int64).copy()
    filled = np.zeros(len(rank), np.int64)
    for expert in range(num_experts):
        rest = num_experts - expert - 1
        ways = np.array([math.comb(rest, size - 1 - j) if j < size else 0 for j in range(size + 1)])[filled]
        here = (left < ways) & (filled < size)
        members[here, filled[here]] = expert
        left[~here & (filled < size)] -= ways[~here & (filled < size)]
        filled += here
    return members
