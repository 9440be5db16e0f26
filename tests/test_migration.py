"""Schedules from one placement to another: simulated, they never lose an expert, never lack room, and arrive."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_placement

from moeplace.diff import closest_names, compare_placements
from moeplace.errors import PlacementError
from moeplace.migration import Schedule, schedule_moves
from moeplace.placement import Placement


def simulate(before: Placement, after: Placement, schedule: Schedule) -> None:
    """Run the rounds copy by copy and check every law after every step."""
    held = before.copies()
    for one in schedule.rounds:
        for layer, expert, gpu in one.drops:
            held[layer, gpu, expert] -= 1
            assert held[layer, gpu, expert] >= 0, "a GPU drops what it has"
            assert held[layer, :, expert].sum() >= 1, "a copy of every expert stays"
        at_start = held.copy()
        for layer, expert, source, gpu in one.loads:
            assert at_start[layer, source, expert] >= 1, "a copy comes from where one is"
            held[layer, gpu, expert] += 1
        beyond = (held.sum(axis=2) - schedule.slots_per_gpu).clip(min=0).sum(axis=0)
        assert (beyond <= schedule.spare_slots).all(), "slots and the spare buffer hold all copies"
    assert np.array_equal(held, after.copies())


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Placement, Placement]:
    """Two placements of one shape: GPUs of different sizes, copies, empty slots."""
    room = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    experts, layers = draw(st.integers(1, sum(room))), draw(st.integers(1, 3))
    one, other = (random_placement(draw(st.integers(0, 10**6)), room, layers, experts) for _ in range(2))
    return one, other


@settings(deadline=None)
@given(pairs(), st.integers(1, 3))
def test_every_schedule_keeps_its_laws_and_arrives(pair: tuple[Placement, Placement], spare: int) -> None:
    """With one spare slot or more there is always a schedule, and it loads each copy once."""
    schedule = schedule_moves(*pair, spare_slots=spare)
    simulate(*pair, schedule)
    assert sum(len(one.loads) for one in schedule.rounds) == compare_placements(*pair).moved_copies


def test_two_copies_on_a_gpu_are_moved_too() -> None:
    """Placements of other planners may have them."""
    before = Placement.from_lists([[[0, 0, 1], [2, 3, 3]]], 4)
    after = Placement.from_lists([[[3, 2, 2], [0, 1, 1]]], 4)
    simulate(before, after, schedule_moves(before, after))


def test_full_gpus_that_swap_need_one_spare_slot() -> None:
    """Two full GPUs swap an expert: both load in one round and drop in the next; without room it is refused."""
    before, after = Placement.from_lists([[[0, 1], [2, 3]]], 4), Placement.from_lists([[[0, 2], [1, 3]]], 4)
    schedule = schedule_moves(before, after, layer_ids=(7,))
    assert [(len(one.drops), len(one.loads)) for one in schedule.rounds] == [(0, 2), (2, 0)]
    assert schedule.busiest == 1
    document = json.loads(json.dumps(schedule.to_dict()))
    assert document["rounds"][0]["loads"] == [[7, 1, 0, 1], [7, 2, 1, 0]]
    assert document["rounds"][1]["drops"] == [[7, 2, 1], [7, 1, 0]] or len(document["rounds"][1]["drops"]) == 2
    with pytest.raises(PlacementError, match="full of last copies") as caught:
        schedule_moves(before, after, spare_slots=0)
    assert "--spare-slots 1" in str(caught.value)


def test_redundant_copies_make_room_without_a_spare_slot() -> None:
    """A copy that another GPU has too goes first, and what comes takes its slot: never more than the slots."""
    before = Placement.from_lists([[[0, 1, 2], [2, 3, 0]]], 4)
    after = Placement.from_lists([[[0, 1, 3], [2, 3, 1]]], 4)
    schedule = schedule_moves(before, after, spare_slots=0)
    simulate(before, after, schedule)
    assert len(schedule.rounds) == 1


def test_copies_come_from_the_same_node_where_one_is() -> None:
    """GPU 1 loads expert 0 from GPU 0 beside it, not from GPU 2 or 3 of the other node."""
    before = Placement.from_lists([[[0, 1], [2], [0, 3], [0]]], 4)
    after = Placement.from_lists([[[0, 1], [2, 0], [0, 3], [0]]], 4)
    schedule = schedule_moves(before, after, num_nodes=2)
    assert schedule.rounds[0].loads.tolist() == [[0, 0, 0, 1]]
    assert compare_placements(before, after, num_nodes=2).moves.tolist() == [[0, 0, 0, 1]]
    with pytest.raises(PlacementError, match="4 GPUs on 3 nodes"):
        schedule_moves(before, after, num_nodes=3)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_renamed_gpus_are_recognised(seed: int, shuffle: int) -> None:
    """A placement whose GPUs were only renamed moves nothing once they are renamed back; never more than as it is."""
    before = random_placement(seed, [3, 3, 3, 3], 2, 9)
    rng = np.random.default_rng(shuffle)
    renamed = before.permute_gpus(rng.permutation(4))
    if before.used_slots().max(axis=0).min() == 3:
        assert compare_placements(before, renamed, relabel=True).moved_copies == 0
    other = random_placement(shuffle, [3, 3, 3, 3], 2, 9)
    change = compare_placements(before, other, relabel=True)
    assert change.moved_copies <= compare_placements(before, other).moved_copies
    assert change.order is not None
    simulated = compare_placements(before, other.permute_gpus(change.order))
    assert simulated.moved_copies == change.moved_copies


@given(st.integers(0, 10**6))
def test_the_best_of_all_names_is_found(seed: int) -> None:
    """Against every permutation of four GPUs, and of two nodes of two."""
    import itertools

    before, after = (random_placement(seed + i, [2, 2, 2, 2], 2, 8) for i in range(2))
    every = list(itertools.permutations(range(4)))
    inside = [order for order in every if {order[0] // 2 == order[1] // 2, order[2] // 2 == order[3] // 2} == {True}]
    for nodes, orders in ((1, every), (2, inside)):
        found = compare_placements(before, after, relabel=True, num_nodes=nodes).moved_copies
        best = min(compare_placements(before, after.permute_gpus(np.array(order))).moved_copies for order in orders)
        assert found == best


def test_gpus_of_other_sizes_keep_their_places() -> None:
    """Only GPUs of as many slots change names: the renamed placement fits where the other did."""
    before = Placement.from_lists([[[0, 1, 2], [3, 4]]], 5)
    after = Placement.from_lists([[[3, 4, 2], [0, 1]]], 5)
    assert closest_names(before, after).tolist() == [0, 1]


def test_links_add_up_to_what_moves() -> None:
    """Pairs of GPUs, most copies first; each copy has a source that held it."""
    before, after = random_placement(1, [4] * 4, 5, 12), random_placement(2, [4] * 4, 5, 12)
    change = compare_placements(before, after)
    links = change.links()
    assert sum(count for *_, count in links) == change.moved_copies
    assert [count for *_, count in links] == sorted((count for *_, count in links), reverse=True)
    for layer, expert, source, gpu in change.moves:
        assert before.copies()[layer, source, expert] > 0
        assert after.copies()[layer, gpu, expert] > before.copies()[layer, gpu, expert]
