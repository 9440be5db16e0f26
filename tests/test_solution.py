"""Laws of :mod:`moeplace.solution`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.solution import Clock, Incumbent, Limits, Report, Solution, Stage, Status, StopReason, relative_gap

ANSWER = Solution(
    placement=None, objective=8.0, unit="µs", status=Status.UNKNOWN, stop_reason=StopReason.EXHAUSTED, solver="none"
)


@given(st.floats(0, 1e9), st.floats(0, 1))
def test_gap_is_relative_to_the_objective(objective: float, share: float) -> None:
    """``(objective - bound)/objective``, in 0..1, 0 when both are 0 or equal."""
    gap = relative_gap(objective, objective * share)
    assert gap is not None
    assert 0 <= gap <= 1
    if objective > 1e-300:
        assert gap == pytest.approx(1 - share, abs=1e-9)


def test_gap_at_the_edges() -> None:
    """No bound, no gap; both zero, gap 0; a bound a rounding error above the value is gap 0, not negative."""
    assert relative_gap(5.0, None) is None
    assert relative_gap(0.0, 0.0) == 0.0
    assert relative_gap(1.0, 1.0 + 1e-12) == 0.0
    assert relative_gap(4.0, 3.0) == 0.25


def test_everything_with_a_bound_has_the_same_gap() -> None:
    """Incumbents, stages and solutions use the one definition."""
    stage = Stage(
        name="one", objective=8.0, bound=6.0, unit="", status=Status.FEASIBLE, stop_reason=StopReason.TIME_LIMIT
    )
    values = (ANSWER.replace(bound=6.0), Incumbent(seconds=0.0, source="x", objective=8.0, bound=6.0), stage)
    assert [value.gap for value in values] == [0.25] * 3
    assert ANSWER.gap is None


def test_status_and_reason_are_separate() -> None:
    """What is known and why it stopped are two enumerations with no word in common."""
    assert {status.value for status in Status} == {"optimal", "feasible", "infeasible", "unknown"}
    assert not {status.value for status in Status} & {reason.value for reason in StopReason}


def test_reports_keep_history() -> None:
    """A report keeps improvements in order, with what was said about them."""
    report = Report()
    report.stage("one")
    report.progress(1, 2, "half")
    report.improved("a", 3.0, bound=1.0, unit="µs")
    report.improved("b", 2.0, figures={"max/mean": 1.5})
    assert [(entry.source, entry.objective, entry.bound) for entry in report.history] == [
        ("a", 3.0, 1.0),
        ("b", 2.0, None),
    ]
    assert report.history[0].seconds <= report.history[1].seconds <= report.seconds
    assert report.history[1].figures == {"max/mean": 1.5}


def test_clock() -> None:
    """Time is over when none is left or the user asks; the reason says which."""
    assert not Clock(Limits()).over
    spent = Clock(Limits(time_limit_s=0.0))
    assert (spent.over, spent.left_s, spent.stop_reason()) == (True, 0.0, StopReason.TIME_LIMIT)
    limits = Limits()
    shared = limits.replace(seed=1)
    limits.stop.set()
    assert Clock(shared).over
    assert Clock(shared).stop_reason() is StopReason.INTERRUPTED
