"""Which tokens of every sampled step chose an expert, as bit sets ordered by the home of the token.

A GPU receives one copy of a token that chose any of its experts: the tokens it is sent are the union of its experts'
bit sets, and those from one home are the bits of a few words. Swaps are judged on unions, so that the copies of every
step, by home and destination, are exact. See :mod:`moeplace.network` for what its links carry of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.batches import Steps
from moeplace.counting import compile_kernel
from moeplace.execution import Execution, step_tokens
from moeplace.fingerprint import hashed
from moeplace.frozen import Floats, Ints
from moeplace.network import KERNEL_OF_PHASE, NORMAL
from moeplace.problem import DISPATCH_COMBINE, LOAD, Problem
from moeplace.topology import CUSTOM

NOTHING, TOTAL, LINKS = 0, 1, 2  # what of the copies counts: nothing, their number, the busiest link
WORD = 64
COMPILE_FROM = 50_000  # selections of a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What copies cost in a step, and where tokens come from.

    Attributes
    ----------
    what
        :data:`NOTHING`, :data:`TOTAL` or :data:`LINKS`.
    distinct
        One copy for each GPU of a token, not for each selection.
    two_level
        Copies for another node go once to the GPU of the home's rail there, which forwards them.
    local_us, nic_us
        µs that one copy, out and back, keeps a port of its domain and a NIC busy; ``local_us`` is the price of a copy
        where their number counts.
    fixed_us
        Latency of a layer's dispatch and combine.
    node
        ``[GPU]`` node.
    place
        ``[batch, step token]`` number of a token's bit among those of its step.
    words, homes
        Words of one home, and homes.
    row
        ``[batch, step token]`` rows of the tokens in ``ids``.
    ids
        ``[token, layer, k]`` experts.
    """

    what: int
    distinct: bool
    two_level: bool
    local_us: float
    nic_us: float
    fixed_us: float
    node: Ints
    place: Ints
    words: int
    homes: int
    row: Ints
    ids: np.ndarray

    @classmethod
    def of(cls, problem: Problem, batches: Ints, *, price: float = 0.0) -> Wire | None:
        """Describe the exchanges of a problem's steps, or copies at a price where the objective is load.

        None where copies are not known (counts), need not be (load at no price), or their links are not those of a
        switched network without an oversubscribed spine: what stands in for them is in
        :class:`~moeplace.sampled.tables.StepTables`.
        """
        steps, topology = problem.steps, problem.topology
        if not isinstance(steps, Steps) or problem.num_gpus < 2:
            return None
        total = problem.objective == LOAD
        if total and not price:
            return None
        normal = KERNEL_OF_PHASE[problem.law.phase] == NORMAL
        switched = not (topology.is_direct or topology.kind == CUSTOM or topology.spine_oversubscription > 1)
        if not total and (problem.dataflow != DISPATCH_COMBINE or not switched):
            return None
        homes = 1 if total else problem.num_gpus
        home = np.zeros(steps.rows.shape, np.int64)
        if not total:
            home = step_tokens(steps, problem.num_gpus, Execution(dataflow=problem.dataflow)).home
            home = home.reshape(steps.rows.shape)
        place, words = _places(home[batches], homes)
        both = float(problem.model.bytes_per_copy_dispatch + problem.model.bytes_per_copy_combine) * 1e-3
        nic = both / topology.nic_gb_per_s if topology.num_nodes > 1 and not total else 0.0
        latency = topology.normal_latency_us if normal else topology.low_latency_us
        return cls(
            what=TOTAL if total else LINKS,
            distinct=total or normal,
            two_level=normal and topology.num_nodes > 1 and not total,
            local_us=price if total else both / topology.local_gb_per_s,
            nic_us=nic,
            fixed_us=0.0 if total else 2 * latency,
            node=topology.node_of_gpu() if not total else np.zeros(problem.num_gpus, np.int64),
            place=place,
            words=words,
            homes=homes,
            row=steps.rows[batches],
            ids=steps.trace.experts,
        )

    @property
    def batches(self) -> int:
        """Steps."""
        return int(self.row.shape[0])

    def layer_bytes(self, experts: int) -> int:
        """Bytes of the bit sets of so many experts."""
        return 8 * experts * self.batches * self.homes * self.words

    def sets(self, layer: int, expert: Ints) -> np.ndarray:
        """``[item, batch, word]`` tokens that each copy serves; of an expert's copies each serves a share by a hash.

        Parameters
        ----------
        layer
            The layer.
        expert
            ``[item]`` experts, -1 for an empty slot. Complexity: O(batches · tokens · k + items · batches · words).
        """
        chosen = self.ids[:, layer][self.row]
        batches, tokens, top_k = chosen.shape
        count = np.bincount(expert[expert >= 0], minlength=int(chosen.max()) + 1)
        held = np.flatnonzero(expert >= 0)
        order = held[np.argsort(expert[held], kind="stable")]
        first = np.cumsum(count) - count
        turn = (hashed(self.row, layer) >> np.uint64(33)).astype(np.int64)
        sets = np.zeros((len(expert), batches, self.homes * self.words), np.uint64)
        fill = compiled_fill() if batches * tokens * top_k >= COMPILE_FROM else fill_sets
        fill(chosen, turn, self.place, (first, count, order), sets)
        return sets

    def rates(self) -> Floats:
        """``[2]`` µs of a copy on a port of a domain and on a NIC."""
        return np.array([self.local_us, self.nic_us])


@functools.cache
def compiled_fill() -> Callable[..., None]:
    """Return the compiled :func:`fill_sets`."""
    return compile_kernel(fill_sets)


def fill_sets(chosen: Any, turn: Any, place: Any, held: Any, sets: Any) -> None:
    """Set the bit of every token in the set of the copy that serves it, for each of its experts."""
    first, count, order = held
    for b in range(chosen.shape[0]):
        for t in range(chosen.shape[1]):
            word, bit = place[b, t] // 64, np.uint64(1) << np.uint64(place[b, t] % 64)
            for j in range(chosen.shape[2]):
                e = chosen[b, t, j]
                sets[order[first[e] + turn[b, t] % count[e]], b, word] |= bit


def _places(home: Ints, homes: int) -> tuple[Ints, int]:
    """Number the tokens of every step, those of a home in whole words of their own; and the words of a home."""
    batches, size = home.shape
    order = np.argsort(home, axis=1, kind="stable")
    counts = np.stack([np.bincount(row, minlength=homes) for row in home])
    words = max(1, -(-int(counts.max()) // WORD))
    sorted_home = np.take_along_axis(home, order, axis=1)
    first = np.cumsum(counts, axis=1) - counts
    inside = np.arange(size)[None] - np.take_along_axis(first, sorted_home, axis=1)
    place = np.empty((batches, size), np.int64)
    np.put_along_axis(place, order, sorted_home * (words * WORD) + inside, axis=1)
    return place, words
