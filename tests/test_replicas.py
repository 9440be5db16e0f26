"""Laws of the methods that choose copies by load: budgets over layers, risk, bounded changes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_problem, make_trace, random_placement, slow_topology

import moeplace
from moeplace.errors import InputError, ProblemError
from moeplace.metrics import max_over_mean
from moeplace.packing import kernel
from moeplace.packing.bounded import _compiled as compiled_bounded
from moeplace.packing.bounded import arrivals, improve_within
from moeplace.packing.budget import share_by_threshold, share_exactly, spread_layers
from moeplace.packing.eplb import balance_global
from moeplace.packing.risk import _choose, balance_risk, gpu_risk, step_covariance
from moeplace.packing.risk import _compiled as compiled_risk
from moeplace.placement import EMPTY, Placement
from moeplace.solution import Limits
from moeplace.solvers import solve

DATA = Path(__file__).parents[2] / "shared" / "data"
FLASHLB = [600, 560, 120, 120, 20, 10, 10, 10]


def flashlb_example() -> moeplace.Problem:
    """FlashLB's public example as recorded counts: eight experts on eight GPUs of two slots."""
    counts = np.array(FLASHLB)[None, None]
    meta = moeplace.TraceMeta(num_experts=8, top_k=1, layer_ids=(0,))
    trace = moeplace.Counts(meta=meta, counts=counts)
    return moeplace.build_problem(trace, num_gpus=8, slots_per_gpu=2, objective="load")


def test_the_flashlb_example() -> None:
    """The published example: EPLB and TensorRT-LLM 232, FlashLB's greedy 205, ours 196.667, which is proved."""
    problem = flashlb_example()
    mean = sum(FLASHLB) / 8
    busiest = {name: solve(problem, name).objective * mean for name in ("eplb", "tensorrt-llm", "flashlb", "balance")}
    assert busiest["eplb"] == pytest.approx(232)
    assert busiest["tensorrt-llm"] == pytest.approx(232)
    assert busiest["flashlb"] == pytest.approx(205)
    assert busiest["balance"] == pytest.approx(590 / 3)


def test_risk_keeps_apart_what_is_hot_together() -> None:
    """Two topics of two experts each: means cannot tell which pairs to part, risk parts the experts of a topic."""
    steps = np.array([[9, 1, 9, 1], [9, 1, 9, 1], [1, 9, 1, 9], [1, 9, 1, 9]], float)
    covariance = step_covariance(steps)
    placed = balance_risk(steps.mean(axis=1)[None], lambda _: covariance, np.array([2, 2]))
    for held in placed.slots[0]:
        assert sorted(expert // 2 for expert in held) == [0, 1]
    assert gpu_risk(placed, steps.mean(axis=1)[None], lambda _: covariance) == pytest.approx(10)


@given(st.integers(0, 10**6))
def test_the_risk_of_a_gpu_is_that_of_its_load_over_steps(seed: int) -> None:
    """Mean and deviation by covariance are those of the load that copies get step by step, with z any number."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, 50, (5, 7)).astype(float)
    placement = random_placement(seed, np.array([2, 3, 2]), 1, 5)
    busy = placement.even_share()[0] @ steps
    z = float(rng.random() * 3)
    told = gpu_risk(placement, steps.mean(axis=1)[None], lambda _: step_covariance(steps), z)
    assert told[0] == pytest.approx(busy.mean(axis=1) + z * busy.std(axis=1))


@given(st.integers(0, 10**6))
def test_compiled_and_plain_loops_agree(seed: int) -> None:
    """Risk packing and bounded improvement give the same slots whether compiled or not."""
    rng = np.random.default_rng(seed)
    steps, room = rng.integers(0, 50, (6, 4)).astype(float), np.array([3, 2, 3])
    results = []
    for choose in (_choose, compiled_risk()):
        slots, count = np.full((3, 3), EMPTY, np.int64), np.ones(6, np.int64)
        choose(steps.mean(axis=1), step_covariance(steps), 0.7, room, 2, count, slots)
        results.append((slots.tolist(), count.tolist()))
    assert results[0] == results[1]
    start = random_placement(seed, room, 1, 6)
    from moeplace.packing import bounded

    changed = []
    for improve in (bounded._improve, compiled_bounded()):
        slots, count = start.slots[0].astype(np.int64), start.replicas()[0]
        slots[1, 2] = bounded.CLOSED
        improve(steps.mean(axis=1), count, slots, 1, 0.01, 1.01)
        changed.append((slots.tolist(), count.tolist()))
    assert changed[0] == changed[1]


@given(st.integers(0, 10**6), st.integers(0, 3))
def test_few_moves_and_never_worse(seed: int, moves: int) -> None:
    """No GPU gets more new experts in a layer than allowed; no layer's busiest GPU gets busier; slots are kept."""
    rng = np.random.default_rng(seed)
    room = rng.integers(2, 4, 4)
    before = random_placement(seed, room, 2, 6)
    load = rng.integers(0, 100, (2, 6)).astype(float)
    after = improve_within(load, before, room, moves=moves, gain=0.01, balanced=1.01)
    after.check_fits(room)
    assert arrivals(before, after).max() <= moves
    assert (after.gpu_load(load).max(axis=1) <= before.gpu_load(load).max(axis=1) + 1e-9).all()


def test_swift_needs_a_placement_and_keeps_a_good_one() -> None:
    """Without a baseline swift refuses; a change that is not worth its moves is not made."""
    problem = make_problem(make_trace(1, tokens=80, experts=8), slow_topology("scale-out:2x2"), redundant=4)
    with pytest.raises(ProblemError, match="no placement is deployed"):
        solve(problem, "swift")
    bad = random_placement(3, problem.slots_per_gpu, 2, 8)
    free = solve(problem.replace(baseline=bad), "swift", Limits(options={"moves": "3", "worth": "1"}))
    assert free.placement is not None
    busy, was = (p.gpu_load(problem.stats.load).max(axis=1).sum() for p in (free.placement, bad))
    assert busy < was
    kept = solve(problem.replace(baseline=free.placement), "swift")
    assert kept.placement is not None
    assert np.array_equal(kept.placement.copies(), free.placement.copies())
    assert "nothing moves" in kept.notes[0]
    for options in ({"moves": "some"}, {"worth": "2"}, {"worth": "x"}):
        with pytest.raises(InputError):
            solve(problem.replace(baseline=bad), "swift", Limits(options=options))


@given(st.integers(0, 10**6))
def test_sharing_is_exact(seed: int) -> None:
    """Of all ways to deal the slots none costs less, and none of the same cost uses fewer, by brute force."""
    rng = np.random.default_rng(seed)
    sizes = np.concatenate([[0], np.sort(rng.choice(np.arange(1, 6), 3, replace=False))])
    curves = np.minimum.accumulate(rng.integers(0, 20, (3, 4)).astype(float), axis=1)
    total = int(rng.integers(0, 16))
    chosen = share_exactly(curves, sizes, total)
    cost = curves[np.arange(3), chosen].sum()
    ways = [way for way in itertools.product(range(4), repeat=3) if sizes[list(way)].sum() <= total]
    best = min((curves[np.arange(3), list(way)].sum(), sizes[list(way)].sum()) for way in ways)
    assert (cost, sizes[chosen].sum()) == best


def test_the_threshold_by_hand() -> None:
    """A layer that gains from many slots takes many, one that gains from few takes few, one without gain none."""
    sizes = np.array([0, 2, 4])
    curves = np.array([[2.0, 1.6, 1.2], [1.4, 1.2, 1.2], [1.0, 1.0, 1.0]])
    assert share_by_threshold(curves, sizes).tolist() == [2, 1, 0]
    assert share_by_threshold(curves[:, :1], sizes[:1]).tolist() == [0, 0, 0]


def test_crafts_rule_tries_the_sizes_of_its_code() -> None:
    """With ``rule=craft`` every layer takes one of the numbers of extra slots that CRAFT's released code tries."""
    problem = make_problem(
        make_trace(4, tokens=300, layers=6, experts=16), "scale-up:4", objective="load", redundant=20
    )
    answer = solve(problem, "craft", Limits(options={"rule": "craft"}))
    assert answer.placement is not None
    assert set(answer.placement.used_slots().sum(axis=1) - 16) <= {0, 4, 8, 16}


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=6))
def test_layers_are_spread(used: list[list[int]]) -> None:
    """Orders are permutations; no GPU holds more in all layers than another by more than the widest layer's spread."""
    orders = spread_layers([np.array(row) for row in used])
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    total = sum(np.array(row)[order] for row, order in zip(used, orders, strict=True))
    assert total.max() - total.min() <= max(max(row) - min(row) for row in used)


def test_craft_keeps_its_budget_and_its_bound() -> None:
    """The extra slots used are within the total; the stage's figure is the placement's, and not below the bound."""
    problem = make_problem(
        make_trace(3, tokens=200, layers=4, experts=8), slow_topology("scale-up:4"), redundant=8, objective="load"
    )
    spare = 4 * 8
    for options in ({}, {"extra": "5"}, {"extra": "0"}, {"extra": "100%"}, {"rule": "craft"}):
        answer = solve(problem, "craft", Limits(options=options))
        assert answer.placement is not None
        used = int(answer.placement.used_slots().sum()) - 4 * 8
        total = {"5": 5, "0": 0, "100%": spare}.get(options.get("extra", ""), 8)
        if "rule" not in options:
            assert used <= total
        (stage,) = answer.stages
        assert stage.objective == pytest.approx(max_over_mean(answer.placement, problem.stats.load).mean())
        assert stage.bound is not None
        assert stage.bound <= stage.objective
    for options in ({"extra": "-1"}, {"extra": "x%"}, {"rule": "guess"}, {"kicks": "x"}):
        with pytest.raises(InputError):
            solve(problem, "craft", Limits(options=options))


@pytest.mark.parametrize("total", [0, 1, 2, 4])
def test_the_budget_bound_holds_for_every_placement(total: int) -> None:
    """Against every placement of two small layers within the total."""
    problem = make_problem(make_trace(5, tokens=60, experts=3), "scale-up:2", slots_per_gpu=[3, 3], objective="load")
    answer = solve(problem, "craft", Limits(options={"extra": str(total)}))
    ways = {
        held: np.array([[expert in gpu for expert in range(3)] for gpu in held])
        for held in itertools.product(
            [set_ for size in range(4) for set_ in itertools.combinations(range(3), size)], repeat=2
        )
    }
    options = []
    for layer in range(2):
        load, best = problem.stats.load[layer], {}
        for copies in ways.values():
            if copies.any(axis=0).all():
                busy = (copies / copies.sum(axis=0)) @ load
                extra = int(copies.sum()) - 3
                best[extra] = min(best.get(extra, np.inf), busy.max() / busy.mean())
        options.append(best)
    least = min(a + b for m, a in options[0].items() for n, b in options[1].items() if m + n <= total) / 2
    assert answer.stages[0].bound is not None
    assert answer.stages[0].bound <= least + 1e-9
    assert answer.objective >= least - 1e-9


def test_packing_may_leave_empty_slots_as_room() -> None:
    """With ``fill=False`` a packing keeps its number of copies, whatever the kicks."""
    rng = np.random.default_rng(0)
    load = rng.integers(1, 100, (3, 8)).astype(float)
    start = balance_global(load, np.array([3, 3, 3]))
    slots = np.full((3, 3, 5), EMPTY, np.int64)
    slots[:, :, :3] = start.slots
    wide = Placement(slots=slots, num_experts=8)
    packed = kernel.pack_layers(load, wide, np.array([5, 5, 5]), floor=np.zeros(3), kicks=50, fill=False)
    assert (packed.used_slots().sum(axis=1) == 9).all()
    full = kernel.pack_layers(load, wide, np.array([5, 5, 5]), floor=np.zeros(3), kicks=50)
    assert full.used_slots().sum() > packed.used_slots().sum()


@pytest.mark.slow
def test_a_quarter_of_the_replicas_balances_real_counts() -> None:
    """GLM-5.2's counts on 64 GPUs: a tenth of EPLB's replicas, dealt by layer, is better balanced than all of them."""
    path = DATA / "glm52_expert_counts" / "counts.npz"
    if not path.exists():
        pytest.skip("no shared/data/glm52_expert_counts beside the repository")
    counts = moeplace.read_trace(path)
    problem = moeplace.build_problem(
        counts, topology="scale-up:64", redundant=64, objective="load", accelerator="gb200"
    )
    eplb = solve(problem, "eplb")
    craft = solve(problem, "craft", Limits(options={"extra": "10%", "kicks": "5"}))
    assert craft.placement is not None
    assert int(craft.placement.used_slots().sum()) <= 75 * (256 + 6.4)
    assert craft.objective < eplb.objective
