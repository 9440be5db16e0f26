"""Laws of :mod:`moeplace.attention`."""

from __future__ import annotations

import numpy as np
import pytest
from strategies import small_model

from moeplace.attention import AttentionTime
from moeplace.errors import ProblemError
from moeplace.hardware import load_accelerator
from moeplace.model import load_model


def test_grouped_queries_by_hand() -> None:
    """Qwen3-30B-A3B on H100: 32 heads of 128, 4 of keys; weights and cache over 81 % of the memory's bandwidth."""
    model, gpu = load_model("qwen3-30b-a3b"), load_accelerator("h100")
    time = AttentionTime.of(model, gpu)
    parameters = 2048 * 128 * (2 * 32 + 2 * 4)
    bandwidth, rate = 0.81 * 3.35e6, 0.56 * 989e6  # bytes and operations in a µs
    assert time.weight_us == pytest.approx(2 * parameters / bandwidth)
    assert time.cache_us == pytest.approx(2 * (2 * 4 * 128) / bandwidth)
    assert time.token_us == pytest.approx(2 * parameters / rate)
    assert time.score_us == pytest.approx(4 * 32 * 128 / rate)
    found = time.rank_us(np.array([1, 4096]), np.array([100, 4096 * 2048]), np.array([100, 4096]))
    assert found[0] == pytest.approx(20 + time.weight_us + 100 * time.cache_us)
    assert found[1] == pytest.approx(20 + 4096 * time.token_us + 4096 * 2048 * time.score_us)


def test_latent_attention_reads_a_small_cache() -> None:
    """DeepSeek-V3 keeps 576 elements a token and layer, and scores its 128 heads against them."""
    time = AttentionTime.of(load_model("deepseek-v3"), load_accelerator("h800"))
    bandwidth = 0.81 * 3.35e6
    assert time.cache_us == pytest.approx(2 * 576 / bandwidth)
    assert time.score_us == pytest.approx(2 * 128 * (2 * 512 + 64) / (0.56 * 989e6))


def test_longer_contexts_and_more_tokens_are_never_faster() -> None:
    """Time grows with tokens and with what they look at; every rank is timed by itself."""
    time = AttentionTime.of(load_model("deepseek-v3"), load_accelerator("h100"))
    rng = np.random.default_rng(0)
    tokens, context = rng.integers(0, 500, (3, 8)), rng.integers(0, 10**6, (3, 8))
    cached = rng.integers(0, 10**5, (3, 8))
    found = time.rank_us(tokens, context, cached)
    assert found.shape == (3, 8)
    assert (time.rank_us(tokens + 1, context, cached) >= found).all()
    assert (time.rank_us(tokens, context + 1000, cached) >= found).all()
    assert (time.rank_us(tokens, context, cached + 1000) >= found).all()


def test_an_unknown_attention_is_told() -> None:
    """A model whose attention is not described cannot be timed, and the hint says what to do."""
    with pytest.raises(ProblemError, match="attention of toy is unknown") as caught:
        AttentionTime.of(small_model(), load_accelerator("h100"))
    assert "--model" in str(caught.value.hint)
