"""Laws of :mod:`moeplace.tails`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import binom, norm

from moeplace.tails import QUANTILES, cvar, expected_maximum, noise_floor, paired, quantile, summarise, tail_steps

SAMPLES = st.lists(st.floats(0, 1e6), min_size=1, max_size=120).map(np.array)


@given(SAMPLES)
def test_quantiles_are_numpys(sample: np.ndarray) -> None:
    """Quantiles are order statistics: NumPy's inverted empirical distribution."""
    summary = summarise(sample)
    for name, share in QUANTILES.items():
        assert summary[name].value == np.quantile(sample, share, method="inverted_cdf")
    assert summary["mean"].value == pytest.approx(sample.mean())


@given(SAMPLES)
def test_tails_are_ordered(sample: np.ndarray) -> None:
    """p50 ≤ p95 ≤ p99 ≤ max, CVaR95 lies between p95 and the maximum, and every value inside its interval."""
    summary = summarise(sample)
    assert summary["p50"].value <= summary["p95"].value <= summary["p99"].value <= sample.max()
    slack = 1e-9 * (1 + sample.max())
    assert summary["p95"].value - slack <= summary["cvar95"].value <= sample.max() + slack
    for estimate in summary.values():
        assert estimate.low <= estimate.value <= estimate.high


@pytest.mark.parametrize("count", [20, 100, 300, 1000])
def test_cvar_of_whole_tails_is_their_mean(count: int) -> None:
    """Where 5 % is a whole number of steps CVaR95 is the mean of that many largest, to the last digit."""
    sample = np.random.default_rng(count).permutation(np.arange(count, dtype=float) ** 2)
    assert cvar(sample) == pytest.approx(np.sort(sample)[-count // 20 :].mean(), rel=1e-12)


def test_cvar_weights_the_boundary() -> None:
    """5 % of 30 steps is 1.5: the largest counts whole, the second half."""
    sample = np.arange(30.0)
    assert cvar(sample) == pytest.approx((29 + 0.5 * 28) / 1.5)
    assert cvar(np.array([7.0])) == pytest.approx(7.0)


@given(SAMPLES, st.floats(0.1, 10), st.floats(-5, 5))
def test_cvar_is_coherent(sample: np.ndarray, scale: float, shift: float) -> None:
    """CVaR scales and shifts with its sample, and is subadditive."""
    assert cvar(sample * scale + shift) == pytest.approx(cvar(sample) * scale + shift, abs=1e-6, rel=1e-9)
    other = sample[::-1] * 2
    assert cvar(sample + other) <= cvar(sample) + cvar(other) + 1e-6 * (1 + sample.max())


@pytest.mark.parametrize(("share", "count"), [(0.5, 60), (0.95, 300), (0.95, 1000), (0.99, 1000)])
def test_quantile_intervals_cover(share: float, count: int) -> None:
    """In 2,000 samples the interval holds the true quantile at least 94 % of the time, and not nearly always."""
    rng = np.random.default_rng(0)
    truth, covered = norm.ppf(share), 0
    for _ in range(2000):
        found = quantile(np.sort(rng.standard_normal(count)), share)
        covered += found.low <= truth <= found.high
    assert 0.94 <= covered / 2000 <= 0.99


@pytest.mark.parametrize(("share", "count"), [(0.5, 100), (0.5, 37), (0.95, 300), (0.95, 1000), (0.99, 2000)])
def test_quantile_intervals_are_the_tightest_of_their_kind(share: float, count: int) -> None:
    """Ranks r and s cover with probability P(r ≤ B < s) ≥ 95 %, at most 2.5 % lost at each end; closer ranks lose more.

    For the median of 100 these are the tabulated ranks 40 and 61.
    """
    found = quantile(np.arange(1.0, count + 1), share)
    low, high = int(found.low), int(found.high)
    assert binom.cdf(low - 1, count, share) < 0.025 <= binom.cdf(low, count, share)
    assert binom.sf(high - 1, count, share) <= 0.025 < binom.sf(high - 2, count, share)
    if (share, count) == (0.5, 100):
        assert (low, high) == (40, 61)


def test_mean_and_cvar_intervals_cover() -> None:
    """Student's interval covers the mean in 93–97 % of samples; the bootstrap covers CVaR95 in at least 85 %."""
    rng = np.random.default_rng(1)
    truth = norm.pdf(norm.ppf(0.95)) / 0.05
    hits = np.zeros(2)
    for _ in range(150):
        summary = summarise(rng.standard_normal(400))
        hits += [
            summary["mean"].low <= 0 <= summary["mean"].high,
            summary["cvar95"].low <= truth <= summary["cvar95"].high,
        ]
    assert 0.90 <= hits[0] / 150 <= 0.99
    assert hits[1] / 150 >= 0.85


def test_summaries_repeat() -> None:
    """The same sample gives the same bits, in any order for quantiles."""
    sample = np.random.default_rng(2).random(50)
    assert summarise(sample) == summarise(sample)
    assert summarise(sample)["p95"] == summarise(sample[::-1])["p95"]
    assert tail_steps(300, 0.99) == pytest.approx(3)


@pytest.mark.parametrize(
    ("gpus", "published"), [(8, 1.42), (16, 1.77), (32, 2.07), (64, 2.34), (128, 2.59), (256, 2.82)]
)
def test_expected_maxima(gpus: int, published: float) -> None:
    """z_R is the published value within 0.01 (2.8269 is printed as 2.82) and its definition ∫ x dΦ(x)^R to 1e-6."""
    assert expected_maximum(gpus) == pytest.approx(published, abs=0.01)
    edges = np.linspace(-10, 10, 400_001)
    middle = (edges[1:] + edges[:-1]) / 2
    assert expected_maximum(gpus) == pytest.approx(float((middle * np.diff(ndtr(edges) ** gpus)).sum()), abs=1e-6)


def test_exact_small_maxima() -> None:
    """The maximum of one normal is 0 on average, of two 1/√π, of three 1.5/√π."""
    found = [expected_maximum(count) for count in (1, 2, 3)]
    assert found == pytest.approx([0, 1 / np.sqrt(np.pi), 1.5 / np.sqrt(np.pi)], abs=1e-6)


def test_noise_floor_is_what_perfect_balance_shows() -> None:
    """Selections dealt uniformly over GPUs show the predicted max/mean within 2 %; one GPU has no noise."""
    rng = np.random.default_rng(3)
    for gpus, mean in ((8, 128), (64, 64)):
        load = rng.multinomial(gpus * mean, np.full(gpus, 1 / gpus), 3000)
        assert noise_floor(gpus, mean) == pytest.approx((load.max(axis=1) / mean).mean(), rel=0.03)
    assert noise_floor(1, 5.0) == 1.0


def test_layer_tails_do_not_add() -> None:
    """The sum of per-layer p99s exceeds the p99 of the sum."""
    layers = np.random.default_rng(4).gamma(2.0, size=(10, 500))
    apart = sum(summarise(layer)["p99"].value for layer in layers)
    assert apart > summarise(layers.sum(axis=0))["p99"].value * 1.2


@given(st.lists(st.floats(1, 1e6), min_size=2, max_size=50), st.floats(0.1, 10))
def test_a_paired_change_forgets_what_both_share(base: list[float], factor: float) -> None:
    """A placement slower by the same share in each step: that share, whose interval narrows with the steps' spread."""
    times = np.array(base)
    change = paired(times * factor, times)
    assert change.value == pytest.approx(factor - 1, rel=1e-6, abs=1e-9)
    shifted = paired(times + 5, times)
    assert shifted.low == pytest.approx(shifted.high, rel=1e-6, abs=1e-7)
    assert change.low <= change.value <= change.high
