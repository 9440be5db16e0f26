"""Laws of :mod:`moeplace.packing` and of the solver ``balance``: valid, never worse, never below the floor, exact."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_placement, make_problem, make_trace, random_placement, small_model

from moeplace.affinity import count_routing
from moeplace.bounds import crowding_floor, load_floor
from moeplace.metrics import max_over_mean
from moeplace.milp import Budget
from moeplace.objective import objective_value
from moeplace.packing import exact_layer, kernel, pack_layers
from moeplace.packing.eplb import balance_global
from moeplace.problem import Problem
from moeplace.solution import Limits, Status
from moeplace.solvers import solve
from moeplace.trace import Counts, TraceMeta

SHAPES = [([2, 2, 2], 6), ([3, 2, 1], 6), ([2, 2], 3), ([3, 3], 5), ([4, 0, 2], 6), ([1, 1, 1], 3), ([2, 2, 1], 4)]
FLASHLB = [600, 560, 120, 120, 20, 10, 10, 10]


def _problem(load: Any, slots: list[int], **options: Any) -> Problem:
    counts = np.atleast_2d(np.asarray(load, np.int64))[None]
    layers, experts = counts.shape[1:]
    meta = TraceMeta(num_experts=experts, top_k=1, layer_ids=tuple(range(layers)))
    base = make_problem(
        make_trace(0, layers=layers, experts=experts, top_k=1),
        f"scale-up:{len(slots)}",
        slots_per_gpu=slots,
        model=small_model(layers, experts, 1),
        objective="load",
        **options,
    )
    return base.replace(stats=count_routing(Counts(meta=meta, counts=counts)))


def _loads(seed: int, layers: int, experts: int) -> np.ndarray:
    return 1 + np.random.default_rng(seed).lognormal(3, 1, (layers, experts)).astype(np.int64)


@cache
def _least(seed: int, shape: int) -> tuple[float, float]:
    """Least busiest load of any placement of one layer, and of its floor, by enumeration."""
    slots, experts = SHAPES[shape]
    problem = _problem(_loads(seed, 1, experts), slots)
    best = min(objective_value(problem, placement) for placement in every_placement(problem))
    return best, float(load_floor(problem)[0])


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("seed", range(6))
def test_small_layers_are_proved(seed: int, shape: int) -> None:
    """``balance`` finds the least load there is, says so, and the floor is not above it."""
    slots, experts = SHAPES[shape]
    least, floor = _least(seed, shape)
    assert floor <= least * (1 + 1e-9)
    answer = solve(_problem(_loads(seed, 1, experts), slots), "balance")
    assert answer.objective == pytest.approx(least)
    assert answer.status is Status.OPTIMAL
    assert answer.bound == pytest.approx(least)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 4), min_size=2, max_size=4))
def test_crowding_is_no_more_than_the_best(seed: int, slots: list[int]) -> None:
    """The floor of full slots is at most the least load that a search finds, for any slots."""
    experts = sum(slots)
    if experts < 2:
        return
    load = _loads(seed, 2, experts)
    floor = crowding_floor(load.astype(float), np.array(slots))
    for kicks_seed in range(3):
        start = random_placement(kicks_seed, slots, 2, experts)
        found = pack_layers(load.astype(float), start, np.array(slots), floor=floor, kicks=20, seed=kicks_seed)
        assert (found.gpu_load(load).max(axis=1) >= floor * (1 - 1e-9)).all()


def test_crowding_by_hand() -> None:
    """Loads 9, 8, 7, 1, 1, 1 on three GPUs of two slots: each hot one beside a cold one, 10; the mean is 9."""
    assert crowding_floor(np.array([[9.0, 8, 7, 1, 1, 1]]), np.array([2, 2, 2])).tolist() == [10.0]
    # four hot ones on three GPUs: two of them meet
    assert crowding_floor(np.array([[9.0, 9, 9, 9, 1, 1]]), np.array([2, 2, 2])).tolist() == [18.0]


@given(st.integers(0, 10_000), st.sampled_from(range(len(SHAPES))), st.booleans())
def test_packing_keeps_what_it_must(seed: int, shape: int, compiled: bool) -> None:
    """Every layer stays valid, within the slots, without doubles, and no worse than at the start."""
    slots, experts = SHAPES[shape]
    load = _loads(seed, 3, experts)
    start = random_placement(seed, slots, 3, experts)
    if start.duplicates():
        start = balance_global(load.astype(float), np.array(slots))
    found = pack_layers(
        load.astype(float), start, np.array(slots), floor=np.zeros(3), kicks=4000 if compiled else 10, seed=seed
    )
    found.check_fits(np.array(slots))
    assert (max_over_mean(found, load) <= max_over_mean(start, load) * (1 + 1e-9)).all()


def test_a_compiled_kernel_packs_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled or not, the same kicks give the same slots."""
    load = _loads(0, 2, 24)
    slots = np.array([5, 5, 4, 4, 4, 4])
    start = balance_global(load.astype(float), slots)
    plain = pack_layers(load.astype(float), start, slots, floor=np.zeros(2), kicks=60, seed=5)
    monkeypatch.setattr(kernel, "COMPILE_FROM_KICKS", 0)
    compiled = pack_layers(load.astype(float), start, slots, floor=np.zeros(2), kicks=60, seed=5)
    assert np.array_equal(plain.slots, compiled.slots)
    assert not np.array_equal(plain.slots, start.slots)


def test_empty_slots_may_stand_anywhere_in_a_start() -> None:
    """A start whose GPUs have empty slots before full ones keeps every expert."""
    from moeplace.placement import Placement

    start = Placement(slots=np.array([[[-1, 0, 1], [-1, -1, 2]]]), num_experts=3)
    found = pack_layers(np.array([[5.0, 4, 3]]), start, np.array([2, 1]), floor=np.zeros(1), kicks=0)
    assert found.gpu_load(np.array([[5, 4, 3]])).max() == 7


def test_flashlb_s_example_is_solved() -> None:
    """Two slots on each of eight GPUs: 196.667 with even shares, proved (EPLB 232; FlashLB 205)."""
    problem = _problem(FLASHLB, [2] * 8)
    answer = solve(problem, "balance")
    mean = sum(FLASHLB) / 8
    assert answer.objective * mean == pytest.approx(590 / 3)
    assert answer.status is Status.OPTIMAL
    assert solve(problem, "eplb").objective * mean == pytest.approx(232)


def test_an_exact_layer_starts_from_any_packing() -> None:
    """A start whose GPUs are not in order of load, or of unlike sizes, is taken; too large a layer is left alone."""
    load = np.array([7, 5, 4, 3])
    slots = np.array([[3, -1], [0, 1], [2, -1]])
    room = np.array([1, 2, 1])
    found = exact_layer(load, slots, room, 0.0, Budget(work=5))
    assert found is not None
    assert found[1] == pytest.approx(7)
    busy = np.where(found[0] < 0, 0, load[found[0]]).sum(axis=1)
    assert busy.max() == 7
    assert ((found[0] >= 0).sum(axis=1) <= room).all()
    assert exact_layer(np.ones(100, np.int64), slots, np.array([50, 50]), 0.0, Budget()) is None


def test_deepseek_size_is_nearly_even() -> None:
    """256 experts on 64 GPUs: with 32 spare slots within 0.2 % of the mean, without within 0.1 % of the floor."""
    load = np.random.default_rng(0).lognormal(8, 0.7, (4, 256)).astype(np.int64)
    slots = [5, 4] * 32
    spare = solve(_problem(load, slots), "balance")
    assert spare.objective <= 1.002
    assert spare.placement is not None
    assert not spare.placement.duplicates()
    full = solve(_problem(load, [4] * 64), "balance")
    assert full.gap is not None
    assert full.gap <= 0.001


def test_a_start_is_not_made_worse_for_another_objective() -> None:
    """Where balancing would cost more by the objective, the start is kept and the note says so."""
    trace = make_trace(3, tokens=60, layers=3, experts=6, top_k=2)
    problem = make_problem(trace, "scale-up:3", objective="cross")
    best = min(
        (random_placement(seed, [2, 2, 2], 3, 6) for seed in range(60)),
        key=lambda placement: objective_value(problem, placement),
    )
    answer = solve(problem.replace(start=best), "balance")
    assert answer.objective <= objective_value(problem, best) * (1 + 1e-9)


@pytest.mark.parametrize("text", ["x", "-1", "1.5"])
def test_kicks_are_whole(text: str) -> None:
    """Kicks that are no whole number are refused."""
    with pytest.raises(Exception, match="whole number"):
        solve(_problem(FLASHLB, [2] * 8), "balance", Limits(options={"kicks": text}))
