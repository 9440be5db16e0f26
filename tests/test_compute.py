"""Laws of :mod:`moeplace.compute`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import poisson
from strategies import small_model

from moeplace.compute import ExpertCompute
from moeplace.hardware import load_accelerator
from moeplace.model import load_model

SIMPLE = ExpertCompute(weight_us=3.0, row_us=0.5, shared_weight_us=2.0, shared_row_us=0.25, tile_rows=4, launch_us=10.0)


def test_constants_from_the_formula() -> None:
    """Weights, rows and shared experts cost what the formula says for given widths and rates."""
    gpu, model = load_accelerator("h100"), small_model(weight_bytes=2.0)
    found = ExpertCompute.of(model, gpu, "prefill")
    bytes_per_us = gpu.hbm_tb_per_s * gpu.hbm_efficiency * 1e6
    flops_per_us = gpu.bf16_tflops * gpu.gemm_efficiency * 1e6
    assert found.weight_us == pytest.approx(3 * 1024 * 512 * 2 / bytes_per_us)
    assert found.row_us == pytest.approx(6 * 1024 * 512 / flops_per_us)
    assert found.shared_weight_us == pytest.approx(3 * 1024 * 256 * 2 / bytes_per_us)
    assert found.shared_row_us == pytest.approx(6 * 1024 * 256 / flops_per_us)
    assert (found.tile_rows, found.launch_us) == (128, 20.0)
    assert ExpertCompute.of(model, gpu, "decode").tile_rows == 64


def test_narrow_formats_use_the_rate_they_run_at() -> None:
    """One-byte weights run at the fp8 rate where there is one; MXFP4 and accelerators without fp8 at the bf16 rate."""
    h100, a100 = load_accelerator("h100"), load_accelerator("a100-80")
    fp8, mxfp4 = small_model(weight_bytes=1.0), small_model(weight_bytes=0.53125)
    rows = [ExpertCompute.of(*pair, "decode").row_us for pair in ((fp8, h100), (mxfp4, h100), (fp8, a100))]
    assert rows[1] / rows[0] == pytest.approx(1979 / 989)
    assert rows[2] == ExpertCompute.of(mxfp4, a100, "decode").row_us


@pytest.mark.parametrize(("experts", "measured_us"), [(64, 1049), (16, 276)])
def test_decode_gemm_of_deepseek_v3(experts: int, measured_us: float) -> None:
    """64 and 16 local fp8 experts on H100, all hit, take the measured time within 10 %, shared expert included."""
    compute = ExpertCompute.of(load_model("deepseek-v3"), load_accelerator("h100"), "decode")
    for shared in (0.0, compute.shared_weight_us):
        found = compute.replace(shared_weight_us=shared).rank_us(np.full(experts, 8), 64)
        assert float(found) == pytest.approx(measured_us, rel=0.10)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 20))
def test_rank_time_equals_a_plain_loop(rows: list[int], home: int) -> None:
    """Launch plus the larger of weights read and tiles computed, shared experts in both."""
    memory = sum(3.0 for n in rows if n > 0) + 2.0
    tiles = sum(math.ceil(n / 4) for n in rows)
    arithmetic = tiles * 4 * 0.5 + math.ceil(home / 4) * 4 * 0.25
    assert float(SIMPLE.rank_us(np.array(rows), home)) == pytest.approx(10 + max(memory, arithmetic))


def test_fractional_rows_are_rounded_up() -> None:
    """A quarter of a row is a tile; nothing is nothing. Leading axes are kept."""
    rows = np.array([[[0.25, 0.0], [4.0, 4.25]]])
    assert SIMPLE.replace(weight_us=0.0).rank_us(rows, np.zeros((1, 2))).tolist() == [[12.0, 16.0]]


@pytest.mark.parametrize("tile", [1, 4, 64, 128])
def test_expected_tiles_equal_a_poisson_sum(tile: int) -> None:
    """``E⌈n/τ⌉`` is the sum over the Poisson distribution; from 12 tiles on within half a percent."""
    compute = SIMPLE.replace(tile_rows=tile)
    for mean in (0.0, 1e-6, 0.3, 1.0, 7.5 * tile, 11.9 * tile, 12.0 * tile, 12.25 * tile, 40.0 * tile):
        n = np.arange(int(mean + 20 * math.sqrt(mean) + 60))
        exact = float((poisson.pmf(n, mean) * np.ceil(n / tile)).sum())
        rel = 1e-9 if mean < 12 * tile else 0.005
        assert float(compute.expected_tiles(np.array([mean]))[0]) == pytest.approx(exact, rel=rel, abs=1e-12)


@pytest.mark.parametrize("tile", [1, 16, 64, 128])
def test_expected_costs_grow_with_rows(tile: int) -> None:
    """More rows never cost less, across the switch between the two forms too; whole numbers are as good as floats."""
    means = np.linspace(0, 20 * tile, 20_001)
    memory, arithmetic = SIMPLE.replace(tile_rows=tile).expected_copy_us(means)
    assert (np.diff(memory) >= 0).all()
    assert (np.diff(arithmetic) >= -1e-12).all()
    assert SIMPLE.expected_tiles(np.array([3, 100])).tolist() == SIMPLE.expected_tiles(np.array([3.0, 100.0])).tolist()


@given(st.floats(0, 3000), st.integers(2, 8))
def test_splitting_never_saves_work(mean: float, copies: int) -> None:
    """``copies`` copies of an expert cost together at least as much as one: what the compute bound rests on."""
    compute = SIMPLE.replace(tile_rows=64)
    whole, parts = (compute.expected_copy_us(np.array([m])) for m in (mean, mean / copies))
    for one, part in zip(whole, parts, strict=True):
        assert copies * part[0] >= one[0] - 1e-9


def test_more_copies_can_cost_more_in_decode() -> None:
    """16 tokens over four hot experts on two GPUs: a copy of each on both doubles the weights each GPU reads."""
    compute = ExpertCompute.of(load_model("deepseek-v3"), load_accelerator("h100"), "decode")
    apart, together = np.array([[4, 4], [4, 4]]), np.full((2, 4), 2)
    assert apart.sum() == together.sum()
    assert compute.rank_us(together, 8).max() > compute.rank_us(apart, 8).max()
    means = compute.expected_copy_us(np.array([4.0, 2.0]))[0]
    assert 2 * means[1] > means[0]


def test_expected_rank_time() -> None:
    """The expectation adds launch and shared experts as the counted form does, and agrees when nothing is random."""
    rows = np.full(3, 1e4)
    expected = SIMPLE.expected_rank_us(*(term.sum() for term in SIMPLE.expected_copy_us(rows)), 8.0)
    assert float(expected) == pytest.approx(float(SIMPLE.rank_us(rows, 8.0)), rel=1e-3)
