"""Laws of :mod:`moeplace.overlap`: what overlapping can win, and when a pipeline has no bubbles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import UnknownNameError
from moeplace.overlap import OVERLAPS, PartTimes, step_times


def random_parts(seed: int, parts: int, layers: int = 3, steps: int = 4) -> PartTimes:
    """Random times of a few layers and steps."""
    rng = np.random.default_rng(seed)
    shape = (layers, steps, parts)
    return PartTimes(
        attention=rng.uniform(0, 5, shape[1:]),
        compute=rng.uniform(0, 9, shape),
        dispatch=rng.uniform(0, 4, shape),
        combine=rng.uniform(0, 4, shape),
    )


def even_parts(attention: float, experts: float, communication: float, micro_batches: int, layers: int) -> PartTimes:
    """One step whose micro-batches all take the same."""
    shape = (layers, 1, micro_batches)
    return PartTimes(
        attention=np.full(shape[1:], attention),
        compute=np.full(shape, experts),
        dispatch=np.full(shape, communication),
        combine=np.full(shape, communication),
    )


@given(st.integers(0, 10**6), st.sampled_from(OVERLAPS), st.integers(1, 4))
def test_no_overlap_beats_what_must_be_done(seed: int, overlap: str, parts: int) -> None:
    """A step takes at least each resource's work, at most all of it one after another, and longer if a part does."""
    times = random_parts(seed, parts)
    layers = len(times.compute)
    found = step_times(times, overlap)
    attention = layers * times.attention.sum(axis=1)
    experts, moving = times.compute.sum(axis=(0, 2)), (times.dispatch + times.combine).sum(axis=(0, 2))
    assert (found <= attention + experts + moving + 1e-9).all()
    assert (found >= np.maximum(attention, experts) - 1e-9).all()
    if overlap == "none":
        assert found == pytest.approx(attention + experts + moving)
    if overlap == "dual-batch":
        assert found == pytest.approx(np.maximum(attention + experts, moving))
    slower = PartTimes(
        attention=times.attention, compute=times.compute + 1, dispatch=times.dispatch, combine=times.combine
    )
    assert (step_times(slower, overlap) >= found - 1e-9).all()


@given(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0, 1), st.integers(2, 6), st.integers(1, 5))
def test_a_balanced_pipeline_takes_the_published_time(
    attention: float, experts: float, share: float, micro_batches: int, layers: int
) -> None:
    """With m ≥ 2(1 + T_c/T_f) micro-batches a ping-pong step takes (T_a+T_e+2T_c) + T_f(mL-1): equation (5)."""
    slower = max(attention, experts)
    communication = share * slower * (micro_batches / 2 - 1)
    if layers > 1 and communication >= slower:
        communication = share * slower
    if layers > 1 and micro_batches < 2 * (1 + communication / slower):
        return
    found = step_times(even_parts(attention, experts, communication, micro_batches, layers), "ping-pong")
    # with one layer the slower side alone sets the pace
    expected = attention + experts + 2 * communication + slower * (micro_batches * layers - 1)
    assert found[0] == pytest.approx(expected)


def test_too_few_micro_batches_leave_bubbles() -> None:
    """One micro-batch runs in a row; from two to three the wait for the network goes away (published: 1.1 to 1.4)."""
    times = [float(step_times(even_parts(10.0, 10.0, 4.0, m, 30), "ping-pong")[0]) / m for m in (1, 2, 3, 4)]
    assert times[0] == pytest.approx(30 * (10 + 10 + 8))
    assert times[1] == pytest.approx(times[0] / 2, rel=0.02)
    assert 1.1 < times[1] / times[2] < 1.45
    assert times[2] == pytest.approx(300, rel=0.05)
    assert times[3] == pytest.approx(times[2], rel=0.02)


def test_a_pipeline_by_hand() -> None:
    """Two layers, two micro-batches, uneven: walked through with a pencil."""
    parts = PartTimes(
        attention=np.array([[2.0, 3.0]]),
        compute=np.array([[[4.0, 1.0]], [[2.0, 5.0]]]),
        dispatch=np.array([[[1.0, 1.0]], [[1.0, 2.0]]]),
        combine=np.array([[[1.0, 2.0]], [[0.0, 1.0]]]),
    )
    # layer 1: attention 0-2, 2-5; arrive 3, 6; experts 3-7, 7-8; back 8, 10
    # layer 2: attention 8-10, 10-13; arrive 11, 15; experts 11-13, 15-20; back 13, 21
    assert step_times(parts, "ping-pong").tolist() == [21.0]


def test_unknown_overlaps_are_refused() -> None:
    """A misspelt overlap is named with its neighbours."""
    with pytest.raises(UnknownNameError, match="ping-pong"):
        step_times(random_parts(0, 1), "ping_pong")


def test_splitting_pays_fixed_times_twice() -> None:
    """Two half batches that each pay their start lose where starting is all there is, and win where it is nothing."""
    for start, work in itertools.product((0.0, 30.0), (0.0, 100.0)):
        whole = even_parts(0.0, start + work, start + work, 1, 5)
        halves = even_parts(0.0, start + work / 2, start + work / 2, 2, 5)
        serial, dual = float(step_times(whole, "none")[0]), float(step_times(halves, "dual-batch")[0])
        if start == 0 and work:
            assert dual < serial * 0.7
        if work == 0:
            assert dual >= serial * 0.66
