"""Laws of :mod:`moeplace.routing`."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import placements, relabel_placement

from moeplace.placement import Placement
from moeplace.routing import ReplicaTable


@given(placements(), st.integers(0, 99))
def test_the_slot_chosen_holds_the_expert(placement: Placement, seed: int) -> None:
    """Whatever the token, a selection is served by a slot that holds its expert."""
    table, rng = ReplicaTable.of(placement), np.random.default_rng(seed)
    token = rng.integers(0, 2**40, 50)
    experts = rng.integers(0, placement.num_experts, (50, 3))
    for layer in range(placement.num_layers):
        slot = table.choose_even(layer, experts, token)
        flat = placement.slots[layer].ravel()
        assert np.array_equal(flat[slot], experts)
        assert np.array_equal(slot, table.choose_even(layer, experts, token))


def test_copies_share_evenly() -> None:
    """Of 30,000 consecutive tokens every copy of an expert serves its share within six deviations."""
    placement = Placement(slots=np.array([[[0, 1], [0, 2], [0, 1]]]), num_experts=3)
    table = ReplicaTable.of(placement)
    token = np.arange(30_000)
    for expert, copies in ((0, 3), (1, 2), (2, 1)):
        slot = table.choose_even(0, np.full((30_000, 1), expert), token)
        used, counts = np.unique(slot, return_counts=True)
        assert len(used) == copies
        assert np.abs(counts - 30_000 / copies).max() <= 6 * np.sqrt(30_000 / copies)


def test_layers_choose_independently() -> None:
    """The copy a token gets in one layer says nothing about the next: a quarter of the tokens in each combination."""
    table = ReplicaTable.of(Placement(slots=np.array([[[0], [0]], [[0], [0]]]), num_experts=1))
    one, other = (table.choose_even(layer, np.zeros((40_000, 1), int), np.arange(40_000)).ravel() for layer in (0, 1))
    counts = np.bincount(one * 2 + other)
    assert np.abs(counts - 10_000).max() < 6 * np.sqrt(10_000)


@given(placements(layers=2), st.integers(0, 99))
def test_renaming_experts_changes_nothing(placement: Placement, seed: int) -> None:
    """With experts renamed in placement and trace alike, every selection is served by the same slot."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(placement.num_experts)
    experts = rng.integers(0, placement.num_experts, (20, 2))
    plain, renamed = ReplicaTable.of(placement), ReplicaTable.of(relabel_placement(placement, order))
    for layer in range(2):
        slot = plain.choose_even(layer, experts, np.arange(20))
        assert np.array_equal(slot, renamed.choose_even(layer, order[experts], np.arange(20)))
