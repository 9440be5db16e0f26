"""The semidefinite bound on copies: valid for every partition, and what its parts say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_trace

from moeplace.frozen import Ints
from moeplace.hypergraph import Effort, Layer, LayerSearch, Patterns, columns, default_steps
from moeplace.hypergraph.pairs import pair_bound
from moeplace.hypergraph.relaxation import intercept, relaxed_bound, slope


def _patterns(seed: int, experts: int, top_k: int, tokens: int = 60) -> Patterns:
    trace = make_trace(seed, tokens=tokens, layers=1, experts=experts, top_k=top_k)
    return Patterns.of(trace.experts[:, 0], experts)


def _partitions(experts: int, groups: int) -> Iterator[Ints]:
    """Every partition into groups of equal size, the first expert of each later than that of the one before."""
    if groups == 1:
        yield np.zeros(experts, np.int64)
        return
    size = experts // groups
    for others in itertools.combinations(range(1, experts), size - 1):
        left = [e for e in range(1, experts) if e not in others]
        for rest in _partitions(len(left), groups - 1):
            state = np.zeros(experts, np.int64)
            state[left] = rest + 1
            yield state


@given(st.integers(0, 10**6), st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (9, 3)]), st.integers(1, 4))
def test_no_partition_is_below(seed: int, shape: tuple[int, int], top_k: int) -> None:
    """Whatever the partition it starts from and however short it runs; and one group costs a copy of every token."""
    experts, groups = shape
    patterns = _patterns(seed, experts, min(top_k, experts))
    least = min(patterns.copies(state, groups) for state in _partitions(experts, groups))
    start = np.random.default_rng(seed).permutation(np.arange(experts) % groups)
    for steps in (20, 100):
        assert relaxed_bound(patterns, start, groups, steps=steps, stop=lambda: False) <= least
    assert relaxed_bound(patterns, start, 1, steps=20, stop=lambda: False) == patterns.tokens
    assert relaxed_bound(patterns, start, groups, steps=20, stop=lambda: True) == 0


@pytest.mark.parametrize("seed", range(4))
def test_it_is_tighter_than_pairs(seed: int) -> None:
    """On topical tokens it is above the bound that takes one slope for all, and not far below the optimum."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 4, 400)
    chosen = np.argsort(rng.random((400, 16)) - 0.35 * (np.arange(16) % 4 == topic[:, None]), axis=1)[:, :4]
    patterns = Patterns.of(chosen, 16)
    state, groups = np.arange(16) % 4, 4
    bound = relaxed_bound(patterns, state, groups, steps=400, stop=lambda: False)
    assert bound > 1.02 * pair_bound(patterns, np.full(4, 4))
    one = Layer(patterns=patterns, load=patterns.load.astype(float), cap=np.inf, rooms=np.full(4, 4))
    assert 0.88 * LayerSearch(one, Effort(), 0).run().value < bound


@given(st.lists(st.floats(1, 9), min_size=1, max_size=6))
def test_slopes_touch_one_over_r(rows: list[float]) -> None:
    """Lines of the slope at r touch 1/r at the whole numbers around r and are below at all others."""
    r = np.array(rows)
    b = slope(r)
    a = intercept(b, 10)
    whole = np.arange(1, 11)
    assert (a[:, None] - b[:, None] * whole <= 1 / whole + 1e-12).all()
    low = np.floor(r + 1e-9)
    np.testing.assert_allclose(a - b * low, 1 / low, atol=1e-12)


def test_layers_too_large_to_count_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bound is the layer's where columns cannot be counted through, and is below what was found."""
    monkeypatch.setattr(columns, "LISTED", 0)
    monkeypatch.setattr(columns, "MOST_SETS", 0)
    patterns = _patterns(1, 16, 4, 400)
    one = Layer(patterns=patterns, load=patterns.load.astype(float), cap=np.inf, rooms=np.full(4, 4))
    found = LayerSearch(one, Effort(runs=1, turns=10, swaps=16), 0)
    found.offer(np.arange(16) % 4)
    result = found.run()
    assert pair_bound(patterns, one.rooms) < result.bound <= result.value


def test_steps_fall_with_size() -> None:
    """Fewer for larger layers, never none."""
    steps = [default_steps(experts, 1.0) for experts in (16, 64, 128, 256, 512)]
    assert steps == sorted(steps, reverse=True)
    assert min(steps) >= 20
