"""Copies in chains of layers: items have the loads and pairs of placements, nothing is above brute force or a bound."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from strategies import make_problem, make_trace, random_placement, slow_topology

from moeplace.bounds import cross_bound
from moeplace.chains.anneal import Schedule, anneal
from moeplace.chains.clones import Chain, counts, mixed
from moeplace.chains.duals import exact_matching, shared_bound
from moeplace.chains.repair import repair
from moeplace.chains.sdp import ChainSDP
from moeplace.cloning import changed, counts_below, pruned, starts
from moeplace.errors import InputError
from moeplace.frozen import Floats
from moeplace.metrics import cross_shares, max_over_mean
from moeplace.objective import objective_value
from moeplace.packing.eplb import balance_counts
from moeplace.placement import EMPTY, Placement
from moeplace.problem import Problem
from moeplace.solution import Limits, Status
from moeplace.solvers import solve

SHORT = Limits(work=0.002, options={"bound": "matching"})
WAYS = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]])


def _problem(seed: int, layers: int, experts: int, topology: str, **options: Any) -> Problem:
    trace = make_trace(seed, tokens=200, layers=layers, experts=experts, top_k=2)
    return make_problem(trace, topology, objective="cross", dataflow="context-coherent", **options)


def _chain(problem: Problem, cap: float | None = None, cost: Floats | None = None) -> Chain:
    load, pairs = problem.stats.load, problem.stats.transition
    assert pairs is not None
    mean = load.sum(axis=1) / problem.num_gpus
    most = np.full(problem.num_layers, np.inf) if cap is None else cap * mean
    return Chain(
        pairs=pairs, weigh=lambda count: load / count, cap=most, slots_per_gpu=problem.slots_per_gpu, cost=cost
    )


def _least_crossing(problem: Problem) -> tuple[float, float]:
    """Least share that crosses within the cap over every placement, with copies and without: brute force."""
    experts, pairs, load = problem.num_experts, problem.stats.transition, problem.stats.load
    assert pairs is not None
    every = np.array(list(itertools.product([False, True], repeat=experts)))
    held = [every[every.sum(axis=1) <= room] for room in problem.slots_per_gpu.tolist()]
    copies = np.array(list(itertools.product(*held)), np.float64)
    copies = copies[(copies.sum(axis=1) > 0).all(axis=1)]
    share = copies / copies.sum(axis=1, keepdims=True)
    least = []
    for allowed in (np.ones(len(share), bool), (copies.sum(axis=1) == 1).all(axis=1)):
        kept = []
        for layer in range(problem.num_layers):
            ratio = (share @ load[layer]).max(axis=1) / (load[layer].sum() / problem.num_gpus)
            cap = np.inf if problem.load_cap is None else problem.load_cap[layer] * (1 + 1e-9)
            kept.append(share[allowed & (ratio <= cap)])
        value = np.zeros(len(kept[0]))
        for layer, table in enumerate(pairs):
            size = problem.num_gpus * experts
            stays = (kept[layer] @ table).reshape(-1, size) @ kept[layer + 1].reshape(-1, size).T
            value = (value[:, None] + stays).max(axis=0, initial=-np.inf)
        least.append(1 - float(value.max(initial=-np.inf)) / float(pairs.sum()))
    return least[0], least[1]


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 4), ways=st.booleans())
def test_items_are_the_placement(seed: int, layers: int, ways: bool) -> None:
    """Items give the placement back; loads and pairs of the instance are those the metrics count for copies."""
    room = [3, 2, 3]
    problem = _problem(seed % 8, layers, 5, "scale-up:3", slots_per_gpu=np.array(room))
    placement = random_placement(seed, room, layers, 5)
    chain = _chain(problem, cost=WAYS if ways else None)
    expert, gpu = chain.items(placement)
    again = chain.placement(expert, gpu)
    assert np.array_equal(again.copies(), placement.copies())
    assert np.array_equal(counts(expert, 5), placement.replicas())
    instance = chain.instance(expert)
    assert instance.gpu_load(gpu) == pytest.approx(placement.gpu_load(problem.stats.load))
    assert chain.gpu_load(placement) == pytest.approx(placement.gpu_load(problem.stats.load))
    if layers == 1:
        return
    parts = 64 if (placement.replicas() > 1).any() else 1
    assert instance.kept(gpu) / parts == pytest.approx(chain.kept(placement), abs=2000 * chain.pairs.size / 64)
    total = chain.pairs.sum()
    if not ways:
        shares = cross_shares(problem.stats, placement, problem.topology)
        assert shares is not None
        assert chain.kept(placement) == pytest.approx((1 - shares[0]) * total)
        assert instance.kept(gpu) / parts == pytest.approx(chain.kept(placement), abs=0.5 * chain.pairs.size / 64)
    share = placement.even_share()
    near = sum((chain.near(share, layer) * share[layer]).sum() for layer in range(layers))
    assert near == pytest.approx(2 * chain.kept(placement))


@given(seed=st.integers(0, 10**6))
def test_annealing_and_repair_keep_copies_apart(seed: int) -> None:
    """No GPU ever holds two copies of an expert or more items than before, compiled or not."""
    room = [3, 4, 3]
    problem = _problem(seed % 8, 3, 6, "scale-up:3", slots_per_gpu=np.array(room))
    chain = _chain(problem, cap=1.2)
    expert, gpu = chain.items(random_placement(seed, room, 3, 6))
    instance = chain.instance(expert)
    plain = anneal(instance, gpu, Schedule(sweeps=8), seed, compiled=False)
    assert np.array_equal(plain, anneal(instance, gpu, Schedule(sweeps=8), seed, compiled=True))
    for state in (plain, repair(instance, plain, gpu)[0]):
        placement = chain.placement(expert, state)
        assert not placement.duplicates()
        placement.check_fits(problem.slots_per_gpu)
        assert np.array_equal(placement.replicas(), counts(expert, 6))


@given(seed=st.integers(0, 10**6), ways=st.booleans())
def test_mixed_is_the_best_chain_of_all_layers_and_names(seed: int, ways: bool) -> None:
    """Against every choice of layers and names where only pairs that stay count; never worse where ways differ."""
    problem = _problem(seed % 8, 3, 5, "scale-up:3", slots_per_gpu=np.array([3, 3, 3]))
    chain = _chain(problem, cost=WAYS if ways else None)
    placements = [random_placement(seed + i, [3, 3, 3], 3, 5) for i in range(2)]
    found = mixed(chain, placements)
    options = list(itertools.product(placements, itertools.permutations(range(3))))
    values = []
    for chosen in itertools.product(options[::6], options, options):
        rows = [one.slots[layer][list(name)] for layer, (one, name) in enumerate(chosen)]
        values.append(chain.kept(Placement(slots=np.stack(rows), num_experts=5)))
    best = chain.kept(found)
    assert best >= max(chain.kept(placement) for placement in placements)
    if not ways:
        assert best == pytest.approx(max(values))
    assert sorted(chain.gpu_load(found)[0]) in [sorted(chain.gpu_load(placement)[0]) for placement in placements]


@given(seed=st.integers(0, 10**6), cap=st.floats(1.0, 2.0))
def test_what_is_changed_or_pruned_keeps_the_cap(seed: int, cap: float) -> None:
    """Changes leave no layer above a cap it kept; pruning loses no pairs, and leaves no copy that could go."""
    room = [3, 4, 3]
    problem = _problem(seed % 8, 3, 6, "scale-up:3", slots_per_gpu=np.array(room))
    chain, placement = _chain(problem, cap=cap), random_placement(seed, room, 3, 6)
    other = changed(chain, placement, np.random.default_rng(seed))
    other.check_fits(problem.slots_per_gpu)
    assert (chain.keeps_cap(other) >= chain.keeps_cap(placement)).all()
    fewer = pruned(chain, placement)
    assert (chain.keeps_cap(fewer) >= chain.keeps_cap(placement)).all()
    assert chain.kept(fewer) >= chain.kept(placement) * (1 - 1e-9)
    for layer, gpu, slot in np.argwhere(fewer.slots != EMPTY).tolist():
        if fewer.replicas()[layer, fewer.slots[layer, gpu, slot]] > 1:
            slots = fewer.slots.copy()
            slots[layer, gpu, slot] = EMPTY
            less = fewer.replace(slots=slots)
            worse = chain.kept(less) < chain.kept(fewer) * (1 + 1e-9)
            assert worse or not chain.keeps_cap(less)[layer]


@given(seed=st.integers(0, 10**6), spare=st.integers(0, 6), level=st.floats(0.1, 2.0))
def test_counts_split_what_is_above_the_level(seed: int, spare: int, level: float) -> None:
    """Slots are used up, or no copy has more load than the level; an expert below it stays whole."""
    load = np.random.default_rng(seed).integers(0, 100, (3, 6)).astype(np.float64)
    top = level * load.sum(axis=1) / 3
    count = counts_below(load, top, 6 + spare, 3)
    assert ((count >= 1) & (count <= 3)).all()
    assert (count[load <= top[:, None]] == 1).all()
    above = ((load / count > top[:, None]) & (count < 3)).any(axis=1)
    assert (count.sum(axis=1)[above] == 6 + spare).all()
    assert (count.sum(axis=1) <= 6 + spare).all()
    placement = balance_counts(load, count, np.full(3, 4))
    placement.check_fits(np.full(3, 4))
    assert (placement.replicas() <= count).all()


@pytest.mark.parametrize("seed", range(6))
def test_small_instances_against_every_placement(seed: int) -> None:
    """The bound is below the best of all placements with copies, the answer at it or near, and never above none's."""
    bare = _problem(seed, 3, 4, "scale-up:2", slots_per_gpu=np.array([3, 3]))
    for cap in (1.0 + 0.02 * seed, 1.2):
        problem = bare.replace(load_cap=cap)
        least, alone = _least_crossing(problem)
        answer = solve(problem, "search", SHORT.replace(options={}))
        once = solve(problem, "search", SHORT.replace(options={"copies": "none"}))
        if answer.placement is None:
            assert np.isinf(alone)
            continue
        assert answer.bound is not None
        assert answer.bound <= least * (1 + 1e-9) <= answer.objective * (1 + 2e-9)
        assert answer.objective <= min(once.objective, least + 0.03)
        assert (max_over_mean(answer.placement, problem.stats.load) <= cap * (1 + 1e-9)).all()
        assert not answer.placement.duplicates()
        if once.placement is not None:
            assert once.objective >= alone - 1e-9
            assert (once.placement.replicas() == 1).all()


@given(seed=st.integers(0, 10**6), slots=st.integers(2, 4), level=st.sampled_from(["gpu", "node"]))
def test_no_bound_is_above_a_placement_with_copies(seed: int, slots: int, level: str) -> None:
    """Matchings and degrees hold for any copies, within a cap or not: they never count loads."""
    problem = _problem(seed % 8, 3, 7, "scale-out:2x2", slots_per_gpu=np.full(4, slots), copies_level=level)
    placement = random_placement(seed, [slots] * 4, 3, 7)
    value = objective_value(problem, placement)
    pairs = problem.stats.transition
    assert pairs is not None
    matching = 1 - exact_matching(pairs, problem.levelled[1]).sum() / pairs.sum()
    assert cross_bound(problem) <= value + 1e-9
    assert matching <= value + 1e-9


@given(seed=st.integers(0, 10**6), slots=st.integers(3, 4), steps=st.integers(1, 60))
def test_the_programme_bounds_placements_with_copies(seed: int, slots: int, steps: int) -> None:
    """Any iterate's bound holds for a placement with copies under its own load as the cap, triangles included."""
    problem = _problem(seed % 8, 3, 6, "scale-up:3", slots_per_gpu=np.full(3, slots))
    placement, spare = random_placement(seed, [slots] * 3, 3, 6), 3 * slots - 6
    chain = _chain(problem)
    pairs = np.pad(chain.pairs, ((0, 0), (0, spare), (0, spare)))
    load = np.pad(problem.stats.load, ((0, 0), (0, spare)))
    sdp = ChainSDP(pairs, load, placement.gpu_load(problem.stats.load).max(axis=1), 3, once=False)
    for _ in range(2):
        sdp.iterate(steps)
        assert sdp.bound() >= chain.kept(placement) * (1 - 1e-9)
        sdp.separate()


@pytest.mark.parametrize("level", ["gpu", "node"])
@pytest.mark.parametrize("seed", range(2))
def test_the_answer_s_bound_holds_for_other_copies(seed: int, level: str) -> None:
    """Under the caps that a random placement with copies just keeps, its value is not below the bound."""
    bare = _problem(seed, 3, 6, "scale-out:2x2", slots_per_gpu=np.full(4, 2), copies_level=level)
    placement = random_placement(seed, [2] * 4, 3, 6)
    problem = bare.replace(load_cap=max_over_mean(placement, bare.stats.load) * (1 + 1e-9), start=placement)
    answer = solve(problem, "search", SHORT.replace(work=0.001, options={}))
    assert answer.placement is not None
    assert answer.bound is not None
    assert answer.bound <= answer.objective <= objective_value(problem, placement) * (1 + 1e-9)


def test_the_programme_without_copies_is_no_bound_with_them() -> None:
    """Two experts, each too hot for a GPU of its own: placed once the cap cannot be kept, shared it is."""
    pairs, load = np.full((1, 4, 4), 0), np.array([[3, 1, 0, 0], [3, 1, 0, 0]])
    pairs[0, :2, :2] = [[3, 0], [0, 1]]
    shares = np.array([[[1, 1, 0, 0], [1, 0, 0, 0]]] * 2)
    placement = Placement(slots=np.array([[[0, 1], [0, EMPTY]]] * 2), num_experts=2)
    assert np.array_equal(placement.copies(), shares[:, :, :2])
    cap = placement.gpu_load(load[:, :2]).max(axis=1)
    copied, alone = (ChainSDP(pairs, load, cap, 2, once=once) for once in (False, True))
    kept = 3 * 0.5 + 1
    for sdp in (copied, alone):
        sdp.iterate(300)
    assert copied.bound() >= kept
    assert copied.bound() < 4
    assert alone.bound() < kept


@given(seed=st.integers(0, 10**6), slots=st.integers(1, 6))
def test_the_bound_on_shared_layers_holds(seed: int, slots: int) -> None:
    """Above the linear programme over symmetric matrices whose diagonal is free."""
    size = 5
    table = np.random.default_rng(seed).normal(size=(size, size))
    table = table + table.T
    if slots >= size:
        assert shared_bound(table, slots) == pytest.approx(float(table.sum()))
        return
    rows = np.kron(np.eye(size), np.ones(size))
    swap = np.eye(size * size).reshape(size, size, -1)
    same = (swap - swap.transpose(1, 0, 2)).reshape(size * size, -1)
    conditions, ends = np.vstack([rows, same]), np.concatenate([np.full(size, slots), np.zeros(size * size)])
    best = linprog(-table.ravel(), A_eq=conditions, b_eq=ends, bounds=(0, 1))
    assert best.status == 0
    assert shared_bound(table, slots) >= -best.fun - 1e-9


def test_an_expert_too_hot_for_one_gpu_is_split() -> None:
    """Where one expert alone is above the cap there is no answer without copies, and one with them."""
    trace = make_trace(3, tokens=300, layers=4, experts=8, top_k=2)
    experts = trace.experts.copy()
    other = np.where(experts[:, :, 1] == 0, experts[:, :, 0], experts[:, :, 1])
    experts[:, :, 0], experts[:, :, 1] = 0, np.where(other == 0, 1, other)
    problem = make_problem(
        trace.replace(experts=experts), "scale-up:4", objective="cross", dataflow="context-coherent", redundant=4,
        load_cap=1.3,
    )  # fmt: skip
    none = solve(problem, "search", SHORT.replace(options={"copies": "none"}))
    assert none.placement is None
    assert none.status is Status.UNKNOWN
    answer = solve(problem, "search", SHORT)
    assert answer.placement is not None
    assert (answer.placement.replicas()[:, 0] > 1).all()
    assert (max_over_mean(answer.placement, problem.stats.load) <= 1.3 * (1 + 1e-9)).all()


def test_a_start_with_copies_is_gone_on_from() -> None:
    """``eplb+search`` is no worse than EPLB's copies within their own load, in any number of threads."""
    bare = _problem(2, 4, 8, "scale-up:4", slots_per_gpu=np.full(4, 3))
    eplb = solve(bare, "eplb")
    assert eplb.placement is not None
    problem = bare.replace(load_cap=np.maximum(1.0, max_over_mean(eplb.placement, bare.stats.load)))
    one, two = (solve(problem, "eplb+search", SHORT.replace(threads=threads)) for threads in (1, 2))
    assert one.placement is not None
    assert two.placement is not None
    assert np.array_equal(one.placement.slots, two.placement.slots)
    assert one.objective <= eplb.objective
    assert (max_over_mean(one.placement, problem.stats.load) <= problem.load_cap * (1 + 1e-9)).all()


def test_copies_are_offered_to_step_time() -> None:
    """Never worse than without; the bound is below what any copies reach."""
    for phase in ("decode", "prefill"):
        problem = _problem(4, 3, 8, "scale-up:4", redundant=4, phase=phase)
        problem = problem.replace(objective="step-time", topology=slow_topology("scale-up:4"))
        brief = SHORT.replace(work=0.0001)
        answer = solve(problem, "search", brief)
        once = solve(problem, "search", brief.replace(options={"copies": "none"}))
        assert answer.objective <= once.objective * (1 + 1e-12)
        assert answer.bound is not None
        for seed in range(30):
            other = random_placement(seed, problem.slots_per_gpu, 3, 8)
            assert answer.bound <= objective_value(problem, other)


def test_step_time_with_copies_is_no_worse_than_even_copies() -> None:
    """Where arithmetic decides and an expert is hot, copies save a fifth of the time; a load cap is kept."""
    trace = make_trace(3, tokens=300, layers=3, experts=8, top_k=2)
    experts = np.where(np.arange(300)[:, None, None] % 4 > 0, [0, 1], trace.experts).astype(trace.experts.dtype)
    problem = make_problem(trace.replace(experts=experts), "scale-up:4", redundant=4, requests=2**16)
    problem = problem.replace(objective="step-time", dataflow="context-coherent")
    brief = SHORT.replace(work=0.0001)
    once = solve(problem, "search", brief.replace(options={"copies": "none"}))
    answer = solve(problem, "search", brief)
    assert answer.objective <= min(solve(problem, "eplb").objective * 1.001, 0.85 * once.objective)
    held = solve(problem.replace(load_cap=1.2), "search", brief)
    assert held.placement is not None
    assert (max_over_mean(held.placement, problem.stats.load) <= 1.2 * (1 + 1e-9)).all()


def test_where_copies_are_not_made() -> None:
    """Without a cap, with ``copies=none``, under another routing, which is said; an unknown choice is refused."""
    problem = _problem(5, 3, 8, "scale-up:4", redundant=4)
    answer = solve(problem, "search", SHORT)
    assert answer.placement is not None
    assert (answer.placement.replicas() == 1).all()
    other = solve(problem.replace(load_cap=2.5, routing="nearest"), "search", SHORT)
    assert other.placement is not None
    assert (other.placement.replicas() == 1).all()
    assert any("share evenly, not nearest" in note for note in other.notes)
    with pytest.raises(InputError, match="one of fill, none"):
        solve(problem, "search", SHORT.replace(options={"copies": "some"}))


def test_starts_have_copies_and_keep_the_cap_where_found() -> None:
    """From few copies to many, all different, each with a copy somewhere, no GPU with two of a kind."""
    problem = _problem(6, 3, 8, "scale-up:4", slots_per_gpu=np.full(4, 4))
    chain = _chain(problem, cap=1.1)
    found = starts(chain, problem.stats.load.astype(np.float64), chain.cap)
    assert found
    for one, two in itertools.pairwise(found):
        assert not np.array_equal(one.replicas(), two.replicas())
    for placement in found:
        assert (placement.replicas() > 1).any()
        placement.check_fits(problem.slots_per_gpu)
