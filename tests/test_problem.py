"""Laws of :mod:`moeplace.problem`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_problem, random_placement, small_model

from moeplace.affinity import count_routing
from moeplace.errors import ProblemError
from moeplace.problem import Problem, slots_for
from moeplace.trace import Counts, Trace


def test_a_problem_holds_together(toy_problem: Problem) -> None:
    """Sizes are those of its parts; slots are kept read-only; the digest follows the content."""
    shape = (toy_problem.num_layers, toy_problem.num_experts, toy_problem.num_gpus, toy_problem.num_slots)
    assert shape == (2, 6, 2, 6)
    assert toy_problem.max_slots == 3
    assert toy_problem.digest() == toy_problem.replace().digest() != toy_problem.replace(objective="load").digest()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots_per_gpu": [3, 2]}, "5 slots per layer for 6 experts"),
        ({"slots_per_gpu": [3, 3, 3]}, "the topology has 2"),
        ({"slots_per_gpu": [7, -1]}, "negative"),
        ({"slots_per_gpu": [10**6, 10**6]}, "GB per GPU"),
        ({"objective": "speed"}, "objective 'speed'"),
        ({"dataflow": "teleport"}, "dataflow"),
        ({"copies_level": "rack"}, "copies level"),
        ({"load_cap": 0.9}, "load cap"),
        ({"load_cap": float("nan")}, "load cap"),
        ({"model": small_model(2, 7, 2)}, "6 experts"),
        ({"model": small_model(1, 6, 2)}, "2 layers"),
        ({"start": random_placement(0, [3, 3], 1, 6)}, "start placement has 1 layers"),
        ({"baseline": random_placement(0, [2, 2, 2], 2, 6)}, "baseline placement"),
    ],
)
def test_parts_that_do_not_fit_are_refused(toy_problem: Problem, changes: dict[str, Any], words: str) -> None:
    """Every mismatch is a named error with the rule it breaks."""
    with pytest.raises(ProblemError, match=words) as caught:
        toy_problem.replace(**changes)
    assert caught.value.rule


def test_gpus_without_slots_are_allowed(toy_problem: Problem) -> None:
    """A GPU may have no slot, as long as every expert has one."""
    assert toy_problem.replace(slots_per_gpu=[6, 0]).num_slots == 6


@pytest.mark.parametrize(
    ("objective", "dataflow", "allowed"),
    [
        ("load", "dispatch-combine", True),
        ("step-time", "dispatch-combine", True),
        ("step-time", "context-coherent", False),
        ("copies", "dispatch-combine", False),
        ("cross", "dispatch-combine", False),
        ("load", "context-coherent", True),
    ],
)
def test_counts_support_what_needs_no_tokens(small_trace: Trace, objective: str, dataflow: str, allowed: bool) -> None:
    """Counts do for load and for step time under dispatch–combine; the rest is refused with a way out."""
    stats = count_routing(small_trace)
    counts = count_routing(Counts(meta=small_trace.meta, counts=stats.load[None]))
    problem = make_problem(small_trace, "scale-up:2")
    if allowed:
        problem.replace(stats=counts, objective=objective, dataflow=dataflow)
        return
    with pytest.raises(ProblemError, match="only counts") as caught:
        problem.replace(stats=counts, objective=objective, dataflow=dataflow)
    assert caught.value.hint


def test_a_cap_is_per_layer(toy_problem: Problem) -> None:
    """One number caps every layer; a number per layer stays as it is."""
    for cap, expected in ((1.5, [1.5, 1.5]), ([1.0, 2.0], [1.0, 2.0])):
        kept = toy_problem.replace(load_cap=cap).load_cap
        assert kept is not None
        assert kept.tolist() == expected


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 30))
def test_slots_from_redundancy(experts: int, gpus: int, redundant: int) -> None:
    """Slots are experts plus redundant ones, dealt as evenly as possible."""
    slots = slots_for(experts, gpus, redundant=redundant)
    assert slots.sum() == experts + redundant
    assert slots.max() - slots.min() <= 1
    assert np.array_equal(slots_for(experts, gpus), slots_for(experts, gpus, redundant=0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"redundant": -1}, "-1 redundant"),
        ({"per_gpu": 1}, "4 slots for 6 experts"),
        ({"per_gpu": 2, "redundant": 3}, "6 experts and 3 redundant"),
    ],
)
def test_bad_slots_are_told(options: dict[str, int], words: str) -> None:
    """Too few slots, or two numbers that disagree, are named errors."""
    with pytest.raises(ProblemError, match=words):
        slots_for(6, 4, **options)


def test_slots_per_gpu() -> None:
    """Slots per GPU are the same on each; redundancy may repeat what they imply."""
    assert slots_for(6, 4, per_gpu=2).tolist() == [2, 2, 2, 2]
    assert slots_for(6, 4, per_gpu=2, redundant=2).tolist() == [2, 2, 2, 2]


def test_a_model_with_another_top_k_is_refused() -> None:
    """A trace of top-k choices is not taken for a model that chooses another number of experts."""
    import moeplace
    from moeplace.errors import ProblemError

    trace = moeplace.Trace(
        meta=moeplace.TraceMeta(num_experts=8, top_k=1, layer_ids=tuple(range(32))),
        experts=np.zeros((2, 32, 1), np.uint8),
        request=np.zeros(2),
        position=np.arange(2),
        phase=np.ones(2),
    )
    with pytest.raises(ProblemError, match="1 experts a token; mixtral-8x7b has 2"):
        moeplace.build_problem(trace, model="mixtral-8x7b", topology="scale-up:4")
