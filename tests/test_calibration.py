"""Laws of :mod:`moeplace.calibration`: what was measured by the model's own law is found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.build import Choices, build_problem
from moeplace.calibration import ComputeTable, calibrate, read_compute_table
from moeplace.compute import ExpertCompute
from moeplace.errors import InputError
from moeplace.hardware import load_accelerator
from moeplace.model import load_model
from moeplace.trace import Trace

MODEL, H100 = load_model("deepseek-v3"), load_accelerator("h100")
POINTS = [(1, 1), (4, 8), (16, 16), (32, 64), (8, 512), (16, 1024), (32, 2048), (64, 700)]


def _table(points: list[tuple[int, int]], **constants: float) -> ComputeTable:
    """Measurements that follow the model exactly."""
    accelerator = H100.replace(**constants)
    times = []
    for experts, rows in points:
        compute = ExpertCompute.of(MODEL, accelerator, "prefill" if rows >= 128 else "decode")
        bare = compute.replace(shared_weight_us=0.0, shared_row_us=0.0)
        times.append(float(bare.rank_us(np.full(experts, rows), 0.0)))
    experts, rows = np.array(points, np.float64).T
    tiles = np.where(rows >= 128, 128, 64)
    return ComputeTable(experts=experts, rows=rows, tile_rows=tiles, time_us=np.array(times))


@given(st.floats(1, 100), st.floats(0.3, 1), st.floats(0.2, 1))
def test_the_constants_are_found_again(launch: float, memory: float, arithmetic: float) -> None:
    """Whatever the constants, a table that follows the model gives them back, without error."""
    table = _table(POINTS, launch_us=launch, hbm_efficiency=memory, gemm_efficiency=arithmetic)
    fit = calibrate(H100, MODEL, table)
    found = fit.accelerator
    assert (found.launch_us, found.hbm_efficiency, found.gemm_efficiency) == pytest.approx(
        (launch, memory, arithmetic), rel=1e-5
    )
    assert set(fit.fitted) == {"launch_us", "hbm_efficiency", "gemm_efficiency"}
    assert np.abs(fit.errors).max() < 1e-6


@pytest.mark.parametrize(("points", "left"), [(POINTS[:3], "gemm_efficiency"), (POINTS[4:7], "hbm_efficiency")])
def test_what_is_not_measured_is_left_as_it_was(points: list[tuple[int, int]], left: str) -> None:
    """A table bound by memory alone (or arithmetic alone) leaves the other constant, and says so."""
    fit = calibrate(H100, MODEL, _table(points, launch_us=5, hbm_efficiency=0.6, gemm_efficiency=0.5))
    assert left not in fit.fitted
    assert getattr(fit.accelerator, left) == pytest.approx(getattr(H100, left))
    assert f"{left} not determined" in str(fit)
    assert fit.accelerator.launch_us == pytest.approx(5)


def test_noise_moves_the_constants_little() -> None:
    """With 5 % noise on 80 measurements each constant is within 5 % (the start-up time within 15 %)."""
    table = _table(POINTS * 10, launch_us=20, hbm_efficiency=0.7, gemm_efficiency=0.6)
    noise = np.random.default_rng(0).normal(1, 0.05, len(table.time_us))
    noisy = ComputeTable(
        experts=table.experts, rows=table.rows, tile_rows=table.tile_rows, time_us=table.time_us * noise
    )
    fit = calibrate(H100, MODEL, noisy)
    assert fit.accelerator.hbm_efficiency == pytest.approx(0.7, rel=0.05)
    assert fit.accelerator.gemm_efficiency == pytest.approx(0.6, rel=0.05)
    assert fit.accelerator.launch_us == pytest.approx(20, rel=0.15)
    assert 0.01 < np.abs(fit.errors).mean() < 0.08


def test_tables_that_cannot_be_are_refused() -> None:
    """One point determines nothing; more than the accelerator has is not believed."""
    with pytest.raises(InputError, match="do not determine"):
        calibrate(H100, MODEL, _table(POINTS[:1]))
    with pytest.raises(InputError, match="of the accelerator's memory bandwidth"):
        calibrate(load_accelerator("l40s"), MODEL, _table(POINTS))


GOOD = "activated_experts,rows_per_expert,time_us\n1,1,40\n32,16,500\n16,1024,2000\n"


def test_files_are_read_with_or_without_a_phase(tmp_path: Path) -> None:
    """Columns may stand in any order; the phase decides the tile height, else the rows do."""
    path = tmp_path / "gemm.csv"
    path.write_text(GOOD)
    assert read_compute_table(path).tile_rows.tolist() == [64, 64, 128]
    path.write_text("Time_us, phase ,activated_experts,rows_per_expert\n40,prefill,1,1\n50,,2,1\n")
    table = read_compute_table(path)
    assert (table.tile_rows.tolist(), table.time_us.tolist()) == ([128, 64], [40, 50])
    assert table.padded_rows.tolist() == [128, 128]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("experts,rows,us\n1,1,1\n", "no column activated_experts, rows_per_expert, time_us"),
        ("", "no column"),
        (GOOD.splitlines()[0], "no measurements"),
        (GOOD + "2,-1,3\n", "rows_per_expert '-1'"),
        (GOOD + "2,1\n", "time_us None"),
        (GOOD + "2,1,nan\n", "time_us 'nan'"),
        (GOOD.replace("time_us", "time_us,phase") + "1,1,1,both\n", "phase 'both'"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    """The message tells what is wrong, and the line where there is one."""
    path = tmp_path / "gemm.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_compute_table(path)
    assert said in str(caught.value)
    if text.startswith(GOOD[:20]) and text.count("\n") > 1:
        assert f"gemm.csv:{len(text.splitlines())}" in str(caught.value)


def test_problems_take_the_measured_constants(tmp_path: Path, small_trace: Trace) -> None:
    """A problem built with a table computes with it."""
    path = tmp_path / "gemm.csv"
    path.write_text(GOOD)
    problem = build_problem(small_trace, Choices(topology="scale-up:2", model=None, compute_table=str(path)))
    found = problem.topology.accelerator
    assert found != H100
    assert (
        found.replace(
            launch_us=H100.launch_us, hbm_efficiency=H100.hbm_efficiency, gemm_efficiency=H100.gemm_efficiency
        )
        == H100
    )
