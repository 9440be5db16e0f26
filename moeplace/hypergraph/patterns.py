"""The hypergraph of one layer: which sets of experts tokens chose, and how many tokens chose each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Ints

KEY_BITS = 64
CELLS = 20_000_000  # of a table of booleans held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns:
    """Token patterns: hyperedges over the experts of a layer, weighted by tokens.

    Attributes
    ----------
    experts
        ``[pattern, k]`` experts of each pattern, rising, no two patterns alike.
    weight
        ``[pattern]`` tokens that chose exactly these.
    num_experts
        Experts of the layer.
    """

    experts: Ints
    weight: Ints
    num_experts: int

    @classmethod
    def of(cls, experts: npt.NDArray[Any], num_experts: int) -> Patterns:
        """Collapse tokens: ``experts`` [token, k]. Complexity: O(tokens · (k log k + log tokens))."""
        rows = np.sort(experts.astype(np.int64), axis=1)
        top_k = rows.shape[1]
        bits = max(1, int(num_experts - 1).bit_length())
        if bits * top_k > KEY_BITS:
            distinct, weight = np.unique(rows, axis=0, return_counts=True)
            return cls(experts=distinct, weight=weight.astype(np.int64), num_experts=num_experts)
        shift = (np.arange(top_k - 1, -1, -1) * bits).astype(np.uint64)
        keys = (rows.astype(np.uint64) << shift).sum(axis=1, dtype=np.uint64)
        distinct, weight = np.unique(keys, return_counts=True)
        unpacked = (distinct[:, None] >> shift) & np.uint64((1 << bits) - 1)
        return cls(experts=unpacked.astype(np.int64), weight=weight.astype(np.int64), num_experts=num_experts)

    @property
    def top_k(self) -> int:
        """Experts of a pattern."""
        return int(self.experts.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self.weight.sum())

    @property
    def load(self) -> Ints:
        """``[expert]`` tokens that chose it."""
        flat = np.repeat(self.weight, self.top_k).astype(np.float64)
        return np.bincount(self.experts.ravel(), flat, self.num_experts).astype(np.int64)

    def by_expert(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Patterns of every expert one after another, and ``[expert + 1]`` where each expert's begin."""
        flat = self.experts.ravel()
        order = np.argsort(flat, kind="stable")
        first = np.searchsorted(flat[order], np.arange(self.num_experts + 1)).astype(np.int64)
        return (order // self.top_k).astype(np.int32), first

    def masks(self) -> npt.NDArray[np.uint64]:
        """``[pattern, word]`` bit sets of 64 experts a word."""
        return bit_sets(self.experts, self.num_experts)

    def tables(self, order: int) -> list[npt.NDArray[np.int32]]:
        """Tokens that chose all of ``j`` experts, for ``j`` = 1 to ``order``: ``[expert] * j``, filled where they rise.

        Complexity: O(patterns · Σ_j C(k, j)) time, O(experts^order) memory.
        """
        tables = []
        for size in range(1, order + 1):
            table = np.zeros(self.num_experts**size, np.int32)
            for chosen in itertools.combinations(range(self.top_k), size):
                flat = np.zeros(len(self.experts), np.int64)
                for place in chosen:
                    flat = flat * self.num_experts + self.experts[:, place]
                np.add.at(table, flat, self.weight.astype(np.int32))
            tables.append(table.reshape((self.num_experts,) * size))
        return tables

    def touching(self, members: Ints) -> Ints:
        """``[set]`` tokens that chose at least one expert of each set ``members`` [set, size]; -1 is no expert.

        Complexity: O(sets · patterns · k).
        """
        total = np.zeros(len(members), np.int64)
        for rows in _blocks(len(members), max(1, CELLS // max(1, self.experts.size))):
            inside = np.zeros((rows.stop - rows.start, self.num_experts + 1), bool)
            np.put_along_axis(inside, members[rows], True, axis=1)
            hit = inside[:, self.experts[:, 0]]
            for place in range(1, self.top_k):
                hit |= inside[:, self.experts[:, place]]
            total[rows] = hit @ self.weight
        return total

    def copies(self, group: Ints, num_groups: int) -> int:
        """Copies of all tokens together where ``group`` [expert] holds the experts. Complexity: O(patterns · k²)."""
        place = np.sort(group[self.experts], axis=1)
        distinct = 1 + (np.diff(place, axis=1) != 0).sum(axis=1)
        return int(distinct @ self.weight)


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def bit_sets(members: Ints, num_experts: int) -> npt.NDArray[np.uint64]:
    """``[set, word]`` bit sets of ``members`` [set, size], 64 experts a word; -1 is no expert."""
    sets = np.zeros((len(members), -(-num_experts // 64)), np.uint64)
    row = np.arange(len(members))
    for place in range(members.shape[1]):
        expert = members[:, place]
        bit = np.where(expert >= 0, np.uint64(1) << (np.maximum(expert, 0) & 63).astype(np.uint64), np.uint64(0))
        sets[row, np.maximum(expert, 0) >> 6] |= bit
    return sets
