"""What it takes to turn one placement into another."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_problem, placements, random_placement

from moeplace.diff import compare_placements, move_terms
from moeplace.errors import PlacementError
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.trace import Trace


def _two_gpus(*layers: list[list[int]]) -> Placement:
    return Placement.from_lists(layers, 4)


def test_a_change_counted_by_hand() -> None:
    """Swapping two experts moves two copies, a third copy arrives alone, and order inside a GPU does not matter."""
    before = _two_gpus([[0, 1], [2, 3]], [[0, 1], [2, 3]])
    after = _two_gpus([[2, 1], [0, 3]], [[1, 0], [3, 2, 0]])
    change = compare_placements(before, after, layer_ids=(3, 5), expert_bytes=10.0)
    assert change.arriving.tolist() == [[1, 1], [0, 1]]
    assert change.leaving.tolist() == [[1, 1], [0, 0]]
    assert (change.moved_copies, change.moved_bytes, change.num_copies) == (3, 30.0, 9)
    assert change.to_dict() == {
        "schema": "moeplace/diff/1",
        "moved_copies": 3,
        "moved_share": round(3 / 9, 9),
        "moved_bytes": 30.0,
        "arriving_per_gpu": [1, 2],
        "leaving_per_gpu": [1, 1],
        "links": [
            {"from": 0, "to": 1, "moved_copies": 2, "moved_bytes": 20.0},
            {"from": 1, "to": 0, "moved_copies": 1, "moved_bytes": 10.0},
        ],
        "relabelled": None,
        "per_layer": [{"layer": 3, "moved_copies": 2}, {"layer": 5, "moved_copies": 1}],
    }


def test_bytes_are_unknown_without_a_model() -> None:
    """Without an expert's size bytes are None, in the document too."""
    placement = _two_gpus([[0, 1], [2, 3]])
    change = compare_placements(placement, placement)
    assert change.moved_bytes is None
    assert json.loads(json.dumps(change.to_dict()))["moved_bytes"] is None
    assert change.layer_ids == (0,)


@given(placements())
def test_a_placement_is_no_change_from_itself(placement: Placement) -> None:
    """Nothing arrives and nothing leaves, whatever copies and empty slots there are."""
    change = compare_placements(placement, placement)
    assert not change.arriving.any()
    assert not change.leaving.any()


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_way_back_is_the_mirror(one: int, other: int) -> None:
    """What arrives one way leaves the other way, and arrivals less departures are the copies added."""
    first, second = (random_placement(seed, [4, 3, 4], 2, 6) for seed in (one, other))
    there, back = compare_placements(first, second), compare_placements(second, first)
    assert np.array_equal(there.arriving, back.leaving)
    assert np.array_equal(there.leaving, back.arriving)
    added = second.used_slots() - first.used_slots()
    assert np.array_equal(there.arriving - there.leaving, added)


@pytest.mark.parametrize("other", [(3, [3, 3], 6), (2, [3, 3, 3], 6), (2, [3, 3], 5)])
def test_other_shapes_are_refused(other: tuple[int, list[int], int]) -> None:
    """Placements of other layers, GPUs or experts cannot be compared, and the message has both shapes."""
    layers, room, experts = other
    with pytest.raises(PlacementError, match="2 layers of 6 experts on 2 GPUs") as caught:
        compare_placements(random_placement(0, [3, 3], 2, 6), random_placement(0, room, layers, experts))
    assert f"{layers} layers of {experts} experts on {len(room)} GPUs" in str(caught.value)


def test_moves_of_a_problem_are_against_its_baseline(small_trace: Trace, toy_problem: Problem) -> None:
    """Without a baseline there are no terms; with one they are its comparison, in the model's bytes."""
    placement, deployed = random_placement(1, [3, 3], 2, 6), random_placement(2, [3, 3], 2, 6)
    assert move_terms(toy_problem, placement) == {}
    problem = make_problem(small_trace, "scale-up:2", baseline=deployed)
    terms = move_terms(problem, placement)
    moved = compare_placements(deployed, placement).moved_copies
    assert moved > 0
    assert (terms["moved_copies"].value, terms["moved_copies"].unit) == (moved, "copies")
    assert terms["moved_bytes"].value == moved * problem.model.expert_weight_bytes
