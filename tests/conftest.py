"""Hypothesis runs the same examples everywhere, and the tiny named values that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from shell import SHAPE, Shell
from strategies import make_problem, make_trace, small_model

from moeplace.hardware import Accelerator, load_accelerator
from moeplace.model import ModelSpec
from moeplace.problem import Problem
from moeplace.topology import Topology, load_topology
from moeplace.trace import Trace, TraceMeta
from moeplace.writers import write_trace

settings.register_profile(
    "reproducible",
    derandomize=True,
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def h100() -> Accelerator:
    """The default accelerator."""
    return load_accelerator("h100")


@pytest.fixture(scope="session")
def four_tokens() -> Trace:
    """Four tokens, two requests, two layers of four experts, top-2: small enough to count by hand."""
    return Trace(
        meta=TraceMeta(num_experts=4, top_k=2, layer_ids=(3, 4)),
        experts=[[[0, 1], [2, 3]], [[0, 2], [2, 0]], [[1, 0], [3, 2]], [[3, 0], [1, 2]]],
        request=[7, 7, 9, 9],
        position=[0, 1, 0, 1],
        phase=[0, 1, 0, 1],
    )


@pytest.fixture(scope="session")
def small_trace() -> Trace:
    """Sixty tokens of eight requests, two layers of six experts, top-2, skewed loads, both phases."""
    return make_trace(0, tokens=60, layers=2, experts=6, top_k=2, requests=8)


@pytest.fixture(scope="session")
def two_gpus() -> Topology:
    """Two GPUs in one switched domain."""
    return load_topology("scale-up:2")


@pytest.fixture(scope="session")
def two_by_two() -> Topology:
    """Two nodes of two GPUs."""
    return load_topology("scale-out:2x2")


@pytest.fixture(scope="session")
def toy_model() -> ModelSpec:
    """A narrow model of two layers with six experts, top-2, and one shared expert."""
    return small_model(layers=2, experts=6, top_k=2)


@pytest.fixture(scope="session")
def toy_problem(small_trace: Trace) -> Problem:
    """The small trace on two GPUs with three slots each."""
    return make_problem(small_trace, "scale-up:2")


@pytest.fixture(scope="session")
def shell_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one trace as npz and as JSON Lines, and counts."""
    folder = tmp_path_factory.mktemp("traces")
    trace = make_trace(0, **SHAPE)
    write_trace(trace, folder / "t.npz")
    write_trace(trace, folder / "t.jsonl")
    rng = np.random.default_rng(0)
    counts = rng.multinomial(800, np.arange(1, 33) / 528, size=(4, 3))
    np.savez(folder / "counts.npz", logical_count=counts)
    return folder


@pytest.fixture
def shell(
    tmp_path: Path, shell_files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    """A shell in a fresh folder that holds the shell files, without MOEPLACE_ variables."""
    for name in [name for name in os.environ if name.startswith("MOEPLACE_")]:
        monkeypatch.delenv(name)
    for file in shell_files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)
