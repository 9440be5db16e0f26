"""Laws of :mod:`moeplace.comparison`: intervals over seeds, paired changes, and the best only where it is certain."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.comparison import MEASURES, Row, compare, comparison_to_csv, comparison_to_dict, notes_of
from moeplace.scoreboard import comparison_markdown, comparison_tables
from moeplace.tails import paired, summarise
from moeplace.trials import Outcome, PhaseTimes, Setup, Trial


def _outcome(solver: str, seed: int, mean_us: float, spread_us: float = 1.0, steps: int = 40) -> Outcome:
    step_us = mean_us + spread_us * np.random.default_rng(seed).normal(size=steps)
    times = PhaseTimes(phase="decode", step_us=step_us, max_over_mean=1.2, excess=0.1)
    trial = Trial(trace="t", topology="scale-up:2", solver=solver, seed=seed)
    return Outcome(trial=trial, times=(times,), objective=1.0, unit="µs", gap=0.01 * seed, solve_s=2.0, notes=("n",))


def _apart(row: Row, other: Row, measure: str) -> bool:
    return row.step_us[measure].high < other.step_us[measure].low


@given(
    st.lists(st.tuples(st.floats(100, 110), st.floats(0.01, 20)), min_size=2, max_size=4),
    st.integers(1, 4),
)
def test_the_best_is_named_only_where_intervals_are_apart(solvers: list[tuple[float, float]], seeds: int) -> None:
    """A solver has a star in a measure exactly if its interval lies below every other's."""
    outcomes = [
        _outcome(f"s{number}", seed * 10 + number, mean, spread)
        for number, (mean, spread) in enumerate(solvers)
        for seed in range(seeds)
    ]
    # the seeds of all are the same, their noise is not
    outcomes = [
        Outcome(
            trial=Trial(trace="t", topology="x", solver=entry.trial.solver, seed=entry.trial.seed // 10),
            times=entry.times,
            gap=0.0,
        )
        for entry in outcomes
    ]
    rows = compare(outcomes)
    assert [row.solver for row in rows] == [f"s{number}" for number in range(len(solvers))]
    for measure in MEASURES:
        for row in rows:
            alone = all(_apart(row, other, measure) for other in rows if other is not row)
            assert (measure in row.best) == alone


def test_one_seed_has_the_intervals_of_its_steps() -> None:
    """With one seed the estimates are those of its own steps, the change that of the pairs."""
    outcomes = [_outcome("a", 0, 100), _outcome("b", 0, 90)]
    first, second = compare(outcomes)
    assert first.step_us == summarise(outcomes[0].times[0].step_us)
    assert second.change == paired(outcomes[1].times[0].step_us, outcomes[0].times[0].step_us)
    assert second.change is not None
    assert second.change.value == pytest.approx(-0.1, rel=0.01)
    assert first.change is not None
    assert first.change.value == first.change.low == first.change.high == 0


def test_seeds_make_a_student_interval() -> None:
    """Over three seeds: the mean of the seeds' values, plus and minus 4.303 standard errors."""
    outcomes = [_outcome("a", seed, 100 + seed) for seed in range(3)]
    (row,) = compare(outcomes)
    values = np.array([outcome.times[0].step_us.mean() for outcome in outcomes])
    half = 4.302652729911275 * values.std(ddof=1) / np.sqrt(3)
    mean = row.step_us["mean"]
    assert (mean.value, mean.low, mean.high) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half)
    )
    assert row.worst_gap == 0.02
    assert row.best == ()


def test_failed_seeds_win_nothing() -> None:
    """A solver without an answer for some seed is shown with the seeds it has, and nobody gets a star beside it."""
    failed = Outcome(trial=Trial(trace="t", topology="scale-up:2", solver="b", seed=1), failure="none")
    rows = compare([_outcome("a", 0, 100), _outcome("a", 1, 100), _outcome("b", 0, 50), failed])
    assert [row.seeds for row in rows] == [(0, 1), (0,)]
    assert not any(row.best for row in rows)


def test_gaps_need_a_bound_in_every_seed() -> None:
    """One run without a bound leaves the gap unknown."""
    bare = Outcome(trial=_outcome("a", 1, 1).trial, times=_outcome("a", 1, 1).times, gap=None)
    (row,) = compare([_outcome("a", 0, 1), bare])
    assert row.worst_gap is None


def test_every_form_has_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON, CSV, Markdown and the table show one set of figures."""
    outcomes = [_outcome(solver, seed, mean) for seed in (0, 1, 2) for solver, mean in (("a", 100), ("b", 90))]
    rows = compare(outcomes)
    document = json.loads(json.dumps(comparison_to_dict(outcomes, Setup()), allow_nan=False))
    assert document["schema"] == "moeplace/compare/1"
    assert document["notes"] == ["n"] == list(notes_of(outcomes))
    lines = list(csv.DictReader(io.StringIO(comparison_to_csv(rows))))
    for row, entry, line in zip(rows, document["rows"], lines, strict=True):
        for name in MEASURES:
            assert entry["step_time_us"][name]["value"] == pytest.approx(row.step_us[name].value)
            assert float(line[f"{name}_us"]) == entry["step_time_us"][name]["value"]
            assert [float(line[f"{name}_{end}_us"]) for end in ("low", "high")] == entry["step_time_us"][name][
                "interval"
            ]
        assert line["best"].split() == entry["best"]
    assert lines[1]["best"] == " ".join(MEASURES)
    comparison_tables(rows)
    text = capsys.readouterr().out
    shown = f"{rows[1].step_us['mean'].value:,.1f}"
    assert f"{shown} ± " in text
    assert f"| b | {shown} ± " in comparison_markdown(rows)
    assert text.count("*") == len(MEASURES) + 1
    assert len(document["trials"]) == 6
