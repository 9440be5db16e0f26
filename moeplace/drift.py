"""Drift: how far the load moves from one stretch of a trace to the next."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from moeplace import measures
from moeplace.frozen import Floats, Ints
from moeplace.merging import Array, grown, summed
from moeplace.parts import CHUNK_TOKENS, MOST_CHUNKS


class ChunkLoads:
    """Loads of consecutive chunks of a trace, at most :data:`MOST_CHUNKS`: beyond it, each two are joined.

    Chunks are numbered in recorded order. Loads of the same chunk add up, so that parts can be added in any order.
    """

    def __init__(self) -> None:
        self._joined = 0  # how often chunks were joined in pairs
        self._chunks: dict[int, tuple[int, Ints]] = {}

    def add(self, number: int, load: Ints, tokens: int) -> None:
        """Add tokens and their load ``[layer, expert]`` to a chunk."""
        self._put(number >> self._joined, load, tokens)
        while len(self._chunks) > MOST_CHUNKS:
            self._join()

    def merge(self, other: ChunkLoads) -> None:
        """Add another's loads of the same chunks."""
        while self._joined < other._joined:
            self._join()
        for number, (tokens, load) in other._chunks.items():
            self.add(number << other._joined, load, tokens)

    def _put(self, number: int, load: Ints, tokens: int) -> None:
        held, sum_ = self._chunks.get(number, (0, None))
        self._chunks[number] = (held + tokens, load.copy() if sum_ is None else summed(sum_, load))

    def _join(self) -> None:
        chunks, self._chunks, self._joined = self._chunks, {}, self._joined + 1
        for number, (tokens, load) in chunks.items():
            self._put(number >> 1, load, tokens)

    def drift(self, top_k: int) -> tuple[Floats, Floats]:
        """``[chunk - 1]`` total variation between consecutive chunks, and what chance would show; means over layers.

        Chunks with fewer than :data:`CHUNK_TOKENS` tokens are left out.
        """
        full = [self._chunks[number] for number in sorted(self._chunks) if self._chunks[number][0] >= CHUNK_TOKENS]
        distance, noise = [], []
        for (tokens, load), (more, following) in itertools.pairwise(full):
            pairs = list(zip(grown(load, following.shape), grown(following, load.shape), strict=True))
            distance.append(float(np.mean([measures.total_variation(a, b) for a, b in pairs])))
            chosen = [(a + b) * (top_k / (a + b).sum()) for a, b in pairs]
            expected = [measures.sampling_variation(np.minimum(q, 1), tokens, more) for q in chosen]
            noise.append(float(np.mean(expected)))
        return np.array(distance), np.array(noise)

    def state(self) -> dict[str, Array]:
        """Return the loads as named arrays, for :meth:`restored`."""
        numbers = sorted(self._chunks)
        shape = [max(sizes) for sizes in zip(*(self._chunks[number][1].shape for number in numbers), strict=True)]
        loads = [grown(self._chunks[number][1], tuple(shape)) for number in numbers]
        return {
            "chunks/joined": np.array(self._joined),
            "chunks/number": np.array(numbers, np.int64),
            "chunks/tokens": np.array([self._chunks[number][0] for number in numbers], np.int64),
            "chunks/load": np.stack(loads) if loads else np.zeros((0, 0, 0), np.int64),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Array]) -> ChunkLoads:
        """Return the loads that a state was taken of."""
        chunks = cls()
        chunks._joined = int(state["chunks/joined"])
        rows = zip(state["chunks/number"].tolist(), state["chunks/tokens"].tolist(), state["chunks/load"], strict=True)
        chunks._chunks = {number: (tokens, load.copy()) for number, tokens, load in rows}
        return chunks
