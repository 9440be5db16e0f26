"""Laws of :mod:`moeplace.placement`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import placements

from moeplace.errors import PlacementError
from moeplace.placement import EMPTY, Placement, spread_slots


@given(placements())
def test_lists_round_trip(placement: Placement) -> None:
    """Nested lists hold the whole placement, and so do ragged ones without trailing empty slots."""
    lists = placement.to_lists()
    assert Placement.from_lists(lists, placement.num_experts).digest() == placement.digest()
    ragged = [[[e for e in gpu if e != EMPTY] for gpu in layer] for layer in lists]
    again = Placement.from_lists(ragged, placement.num_experts)
    assert np.array_equal(again.copies(), placement.copies())


@given(placements(), st.integers(0, 99))
def test_tables_equal_plain_loops(placement: Placement, seed: int) -> None:
    """Copies, replicas, even shares, loads and used slots are what a loop over slots gives."""
    load = np.random.default_rng(seed).integers(0, 100, (placement.num_layers, placement.num_experts))
    for layer, gpus in enumerate(placement.to_lists()):
        everywhere = [expert for gpu in gpus for expert in gpu if expert != EMPTY]
        for expert in range(placement.num_experts):
            assert placement.replicas()[layer, expert] == everywhere.count(expert) >= 1
        for gpu, held in enumerate(gpus):
            assert placement.used_slots()[layer, gpu] == sum(expert != EMPTY for expert in held)
            total = 0.0
            for expert in range(placement.num_experts):
                assert placement.copies()[layer, gpu, expert] == held.count(expert)
                share = held.count(expert) / everywhere.count(expert)
                assert placement.even_share()[layer, gpu, expert] == share
                total += share * load[layer, expert]
            assert placement.gpu_load(load)[layer, gpu] == pytest.approx(total)
    assert placement.gpu_load(load).sum(axis=1) == pytest.approx(load.sum(axis=1))


@given(placements(), st.integers(0, 99))
def test_relabelling_gpus(placement: Placement, seed: int) -> None:
    """GPU ``g`` of the result is GPU ``order[g]`` of the original, per layer if asked; the inverse restores it."""
    orders = np.array(
        [np.random.default_rng([seed, i]).permutation(placement.num_gpus) for i in range(placement.num_layers)]
    )
    moved = placement.permute_gpus(orders)
    for layer, order in enumerate(orders):
        assert np.array_equal(moved.slots[layer], placement.slots[layer][order])
    assert moved.permute_gpus(np.argsort(orders, axis=1)).digest() == placement.digest()
    assert placement.permute_gpus(orders[0]).slots[-1].tolist() == placement.slots[-1][orders[0]].tolist()


@given(st.integers(1, 400), st.integers(1, 70))
def test_slots_are_spread_evenly(total: int, gpus: int) -> None:
    """Slots add up, differ by at most one, and any run of GPUs (a node) has its share within one slot."""
    slots = spread_slots(total, gpus)
    assert slots.sum() == total
    assert slots.max() - slots.min() <= 1
    fill = np.concatenate([[0], np.cumsum(slots)]) - np.arange(gpus + 1) * total / gpus
    assert fill.max() - fill.min() <= 1 + 1e-9


def test_uneven_slots_of_the_issue() -> None:
    """288 slots on 64 GPUs are 32 GPUs with 5 and 32 with 4, alternating."""
    assert spread_slots(288, 64).tolist() == [5, 4] * 32


@pytest.mark.parametrize(
    ("slots", "experts", "words"),
    [
        ([[[0, 1], [2, 3]]], 3, "expert 3 in slot 1 of GPU 1, layer 0"),
        ([[[0, -2], [1, 2]]], 3, "expert -2"),
        ([[[0, 1], [-1, -1]]], 3, "expert 2 of layer 0 is on no GPU"),
        ([[0, 1]], 2, "shape"),
        ([[[]]], 2, "shape"),
        ([[[0.0, 1.0]]], 2, "type float64"),
        ([[[0]]], 40_000, "40000 experts"),
        ([[[70_000, 0]]], 1, "expert 70000"),
    ],
)
def test_bad_placements_are_refused(slots: Any, experts: int, words: str) -> None:
    """Ids out of range, missing experts, other shapes and types are named; nothing wraps around."""
    with pytest.raises(PlacementError, match=words):
        Placement(slots=np.array(slots), num_experts=experts)


@pytest.mark.parametrize("lists", [[], [[]], [[[]]], [[[0]], [[0], []]]])
def test_lists_of_other_shapes_are_refused(lists: Any) -> None:
    """Every layer lists the same GPUs, and there is a slot."""
    with pytest.raises(PlacementError, match="GPUs"):
        Placement.from_lists(lists, 1)


def test_fitting() -> None:
    """A GPU holds at most its slots in each layer, or over the whole model, and no expert twice."""
    placement = Placement(slots=np.array([[[0, 1, 2], [3, -1, -1]], [[0, -1, -1], [1, 2, 3]]]), num_experts=4)
    placement.check_fits(np.array([3, 3]))
    placement.check_fits(np.array([2, 2]), whole_model=True)
    with pytest.raises(PlacementError, match="GPU 0 holds 3 experts in layer 0"):
        placement.check_fits(np.array([2, 3]))
    with pytest.raises(PlacementError, match="over all layers"):
        placement.check_fits(np.array([1, 3]), whole_model=True)
    with pytest.raises(PlacementError, match="the problem has 3"):
        placement.check_fits(np.array([3, 3, 3]))
    twice = Placement(slots=np.array([[[0, 1, 1], [2, 3, 3]]]), num_experts=4)
    assert twice.duplicates() == [(0, 0, 1), (0, 1, 3)]
    twice.check_fits(np.array([3, 3]), distinct=False)
    with pytest.raises(PlacementError, match="expert 1 of layer 0 twice"):
        twice.check_fits(np.array([3, 3]))


def test_digest_and_type() -> None:
    """Slots are int16 whatever they were; equal placements have equal digests."""
    one = Placement(slots=np.array([[[0, 1]]], np.uint8), num_experts=2)
    assert one.slots.dtype == np.int16
    assert one.digest() == Placement(slots=np.array([[[0, 1]]], np.int64), num_experts=2).digest()
    assert one.digest() != Placement(slots=np.array([[[1, 0]]]), num_experts=2).digest()
