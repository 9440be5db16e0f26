"""Annealing that starts on a sample of a layer's tokens: what the sample is, and that its answer is as sound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_trace

from moeplace.hypergraph import Effort, Layer, LayerSearch, Patterns, layer, thin


def _patterns(seed: int, tokens: int) -> Patterns:
    return Patterns.of(make_trace(seed, tokens=tokens, layers=1, experts=8, top_k=3).experts[:, 0], 8)


@given(seed=st.integers(0, 200), tokens=st.integers(1, 2000))
def test_a_sample_is_a_part_of_the_tokens(seed: int, tokens: int) -> None:
    """As many tokens as were asked for, none drawn twice, the same ones for the same seed."""
    patterns = _patterns(seed, tokens)
    sample = thin.thinned(patterns, seed)
    assert sample.tokens == min(tokens, thin.CHOICES * 8 // 3)
    of = {tuple(row): weight for row, weight in zip(patterns.experts.tolist(), patterns.weight.tolist(), strict=True)}
    for row, weight in zip(sample.experts.tolist(), sample.weight.tolist(), strict=True):
        assert 0 < weight <= of[tuple(row)]
    again = thin.thinned(patterns, seed)
    assert np.array_equal(again.experts, sample.experts)
    assert np.array_equal(again.weight, sample.weight)


def test_a_sample_must_be_worth_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of few distinct patterns are annealed on all their tokens."""
    patterns = _patterns(0, 2000)
    assert not thin.worth_thinning(patterns)
    monkeypatch.setattr(thin, "CHOICES", 3)
    assert thin.worth_thinning(patterns)


@pytest.mark.parametrize("slack", [np.inf, 1.3])
def test_the_answer_is_as_sound(monkeypatch: pytest.MonkeyPatch, slack: float) -> None:
    """Within the cap, its copies counted over all tokens, and near what brute force finds."""
    monkeypatch.setattr(thin, "CHOICES", 48)
    monkeypatch.setattr(thin, "WORTH", 0)
    monkeypatch.setattr(layer, "enumerable", lambda *_: False)
    for seed in range(4):
        patterns = _patterns(seed, 400)
        load = patterns.load.astype(float)
        one = Layer(patterns=patterns, load=load, cap=slack * load.sum() / 2, rooms=np.array([4, 4]))
        assert thin.worth_thinning(patterns)
        states = (np.isin(np.arange(8), part).astype(int) for part in itertools.combinations(range(8), 4))
        best = min((patterns.copies(state, 2) for state in states if one.keeps_cap(state)), default=None)
        found = LayerSearch(one, Effort(swaps=16), 0).run()
        if best is None or found.group is None:
            continue
        assert one.keeps_cap(found.group)
        assert found.value == patterns.copies(found.group, 2)
        assert found.bound <= best <= found.value <= 1.03 * best
