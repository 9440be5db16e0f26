"""Laws of :mod:`moeplace.drift`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace import drift
from moeplace.drift import ChunkLoads
from moeplace.parts import CHUNK_TOKENS


def test_distances_of_full_chunks_by_hand() -> None:
    """Distances are between consecutive full chunks in the order of their numbers; short ones are left out."""
    chunks = ChunkLoads()
    chunks.add(2, np.array([[0, CHUNK_TOKENS]]), CHUNK_TOKENS)
    chunks.add(0, np.array([[CHUNK_TOKENS, 0]]), CHUNK_TOKENS)
    chunks.add(1, np.array([[5, 5]]), 10)
    chunks.add(3, np.array([[CHUNK_TOKENS // 2, CHUNK_TOKENS // 2]]), CHUNK_TOKENS)
    distance, noise = chunks.drift(1)
    assert distance.tolist() == [1.0, 0.5]
    assert noise[0] == pytest.approx(0.5 * 2 * np.sqrt(2 / np.pi * 0.25 * 2 / CHUNK_TOKENS))
    assert ChunkLoads().drift(1)[0].size == 0


@given(st.integers(1, 40), st.integers(0, 99), st.integers(1, 4))
def test_chunks_merge_in_any_order(count: int, seed: int, parts: int) -> None:
    """Loads added to parts that are merged and restored give what adding all of them to one gives, joined or not."""
    rng = np.random.default_rng(seed)
    loads = rng.integers(1, 9, (count, 2, 3)) * CHUNK_TOKENS
    number = rng.integers(0, 12, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "MOST_CHUNKS", 5)
        whole, pieces = ChunkLoads(), [ChunkLoads() for _ in range(parts)]
        for i in range(count):
            whole.add(int(number[i]), loads[i], CHUNK_TOKENS)
        for i in rng.permutation(count):
            pieces[i % parts].add(int(number[i]), loads[i], CHUNK_TOKENS)
        total = ChunkLoads()
        for piece in rng.permutation(parts):
            total.merge(ChunkLoads.restored(pieces[piece].state()))
    assert [side.tolist() for side in total.drift(1)] == [side.tolist() for side in whole.drift(1)]
    assert len(total.state()["chunks/number"]) <= 5
