"""Laws of :mod:`moeplace.results`: what is kept is found again exactly where nothing it depends on has changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from strategies import make_trace

from moeplace import results as module
from moeplace.build import Choices
from moeplace.errors import OutputError
from moeplace.results import Results
from moeplace.trials import Outcome, PhaseTimes, Setup, TraceFile, Trial, TrialItem
from moeplace.writers import write_trace

TRIAL = Trial(trace="t", topology="scale-up:2", solver="eplb", seed=3)


def _item(path: Path, setup: Setup | None = None, trial: Trial = TRIAL) -> TrialItem:
    return TrialItem(trial=trial, source=TraceFile(path=str(path)), setup=setup or Setup())


def _outcome(failure: str | None = None) -> Outcome:
    times = PhaseTimes(phase="decode", step_us=np.array([1.0, 2.0]), max_over_mean=1.0, excess=0.0)
    return Outcome(trial=TRIAL, times=(times,), failure=failure)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small trace."""
    write_trace(make_trace(0, tokens=20), tmp_path / "t.npz", format="npz")
    return tmp_path / "t.npz"


def test_what_is_kept_is_found_by_others(path: Path, tmp_path: Path) -> None:
    """Another process with the same trace, trial and setup finds the outcome, whatever its threads."""
    Results(tmp_path / "r").save(_item(path, Setup(threads=1)), _outcome())
    found = Results(tmp_path / "r").load(_item(path, Setup(threads=7)))
    assert found is not None
    assert found.times[0].step_us.tolist() == [1.0, 2.0]


def test_anything_else_is_not(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another trial, setup, trace content, file that an option names, or version of the program is not found."""
    results = Results(tmp_path / "r")
    table = tmp_path / "gemm.csv"
    table.write_text("a")
    setup = Setup(choices=Choices(compute_table=str(table)))
    results.save(_item(path, setup), _outcome())
    assert results.load(_item(path, setup)) is not None
    other = Trial(trace="t", topology="scale-up:2", solver="linear", seed=3)
    assert results.load(_item(path, setup, other)) is None
    assert results.load(_item(path, Setup(choices=setup.choices, limits={"work": 2.0}))) is None
    write_trace(make_trace(1, tokens=20), tmp_path / "u.npz", format="npz")
    assert results.load(_item(tmp_path / "u.npz", setup)) is None
    table.write_text("b")
    assert results.load(_item(path, setup)) is None
    table.write_text("a")
    monkeypatch.setattr(module, "_program", lambda: "another version")
    assert results.load(_item(path, setup)) is None


def test_failures_and_damage_are_tried_again(path: Path, tmp_path: Path) -> None:
    """A failure is not kept, a damaged file is as none."""
    results = Results(tmp_path / "r")
    results.save(_item(path), _outcome("no"))
    assert results.load(_item(path)) is None
    results.save(_item(path), _outcome())
    (kept,) = (tmp_path / "r" / "trials").iterdir()
    kept.write_text(kept.read_text()[:-20])
    assert results.load(_item(path)) is None


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    """A file in its place is an error that names the folder."""
    (tmp_path / "r").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Results(tmp_path / "r")
