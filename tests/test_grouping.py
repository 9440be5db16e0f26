"""Laws of the published methods: sizes keep their limits, clusters are found, copies follow the papers' rules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_placement, make_problem, make_trace

from moeplace.errors import ProblemError
from moeplace.grouping import (
    SizeLimits,
    affinity_utilisation,
    by_room,
    controlled,
    exchanged,
    grown,
    hot_experts,
    knee,
    num_replicas,
    spectral_groups,
)
from moeplace.objective import objective_value
from moeplace.packing.prefill import prefill_frequency, roofline_of
from moeplace.routing import Router
from moeplace.solution import Limits
from moeplace.solvers import solve
from moeplace.solvers.prefill_dup import duplicated


def _affinity(seed: int, experts: int) -> np.ndarray:
    half = np.triu(np.random.default_rng(seed).integers(0, 20, (experts, experts)), 1).astype(float)
    return half + half.T


def test_spectral_clustering_finds_planted_groups() -> None:
    """Three groups of different sizes with much affinity inside and little between are found."""
    truth = np.repeat([0, 1, 2], [3, 7, 5])
    affinity = np.where(truth[:, None] == truth[None, :], 50.0, 1.0)
    order = np.random.default_rng(0).permutation(15)
    label = spectral_groups(affinity[np.ix_(order, order)], 3, 0)
    assert affinity_utilisation(affinity[np.ix_(order, order)], label) == pytest.approx(
        affinity_utilisation(affinity, truth)
    )
    assert sorted(np.bincount(label)) == [3, 5, 7]


@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 4), st.sampled_from([0, 0.15, 0.5, math.inf]))
def test_controlled_groups_keep_their_limits(seed: int, experts: int, groups: int, ratio: float) -> None:
    """Every expert is in a group, sizes are within limits, limits within slots; groups within them stay as they are."""
    rng = np.random.default_rng(seed)
    room = rng.integers(0, 6, groups)
    room[0] += max(0, experts - int(room.sum()))
    limits = SizeLimits.of(experts, room, ratio)
    assert (limits.high <= room).all()
    affinity = _affinity(seed, experts)
    first = by_room(spectral_groups(affinity, groups, seed), room)
    label = controlled(affinity, first, limits)
    size = np.bincount(label, minlength=groups)
    assert size.sum() == experts
    assert ((limits.low <= size) & (size <= limits.high)).all()
    assert (controlled(affinity, label, limits) == label).all()


@given(st.integers(0, 999), st.integers(2, 9), st.integers(1, 3))
def test_uniform_groups_are_full_and_exchanges_only_help(seed: int, experts: int, groups: int) -> None:
    """Groups have the sizes asked for, and exchanges keep these and never lose affinity."""
    affinity = _affinity(seed, experts)
    sizes = np.array([len(part) for part in np.array_split(np.arange(experts), groups)])
    label = grown(affinity, sizes)
    better = exchanged(affinity, label)
    assert (np.bincount(label, minlength=groups) == sizes).all()
    assert (np.bincount(better, minlength=groups) == sizes).all()
    assert affinity_utilisation(affinity, better) >= affinity_utilisation(affinity, label) - 1e-12
    kept = affinity_utilisation(affinity, better)
    for one, other in itertools.combinations(range(experts), 2):
        swapped = better.copy()
        swapped[[one, other]] = better[[other, one]]
        assert affinity_utilisation(affinity, swapped) <= kept + 1e-9


def test_the_knee_is_where_the_curve_bends() -> None:
    """A curve that rises fast and then flattens has its knee at the bend; a flat one at its first point."""
    assert knee(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.1, 0.5, 0.52, 0.54])) == 1
    assert knee(np.array([0.0, 0.0]), np.array([0.3, 0.3])) == 0
    assert knee(np.array([0.0, 1.0, 2.0]), np.array([0.1, 0.15, 0.5])) is None  # it bends the other way
    assert knee(np.array([2.0, 0.0, 1.0]), np.array([0.5, 0.1, 0.45])) == 2


def test_the_rule_of_copies() -> None:
    """N = min(max(1, ⌊ρ⌋), GPUs - 1), and the shortest prefix that reaches W·n/(1+n)."""
    assert num_replicas(np.array([1.0, 1.0, 1.0])) == 1
    assert num_replicas(np.array([9.0, 1.0, 1.0, 1.0])) == 3
    assert num_replicas(np.array([21.0, 1.0, 1.0, 1.0])) == 3
    assert num_replicas(np.array([5.0])) == 0
    load = np.array([1.0, 6.0, 3.0, 2.0])
    assert hot_experts(load, np.arange(4), 1).tolist() == [1]
    assert hot_experts(load, np.arange(4), 2).tolist() == [1, 2]
    assert hot_experts(load, np.arange(4), 0).tolist() == []


def test_predicted_loads_are_what_the_router_weighs_by() -> None:
    """W - W_r + W_r/(n+1) on the heaviest GPU, W_i + W_r/(n+1) on its helpers; weights go with 1/load."""
    trace = make_trace(3, tokens=400, layers=1, experts=8)
    problem = make_problem(trace, "scale-up:4", slots_per_gpu=np.full(4, 8))
    bare, full = (solve(problem, "grace", Limits(options={"replicas": kind})).placement for kind in ("none", "dynamic"))
    assert bare is not None
    assert full is not None
    load = problem.stats.load.astype(float)
    before, heavy = bare.gpu_load(load)[0], int(bare.gpu_load(load)[0].argmax())
    copied = np.flatnonzero(full.replicas()[0] > 1)
    assert copied.size
    number = int(full.replicas()[0, copied[0]]) - 1
    assert number == num_replicas(before)
    helpers = np.flatnonzero(full.copies()[0, :, copied[0]] - bare.copies()[0, :, copied[0]])
    assert set(helpers) == set(np.argsort(np.where(np.arange(4) == heavy, np.inf, before), kind="stable")[:number])
    moved = load[0, copied].sum()
    expected = before.copy()
    expected[heavy] -= moved - moved / (number + 1)
    expected[helpers] += moved / (number + 1)
    assert full.gpu_load(load)[0] == pytest.approx(expected)
    router = Router.of(full, problem.topology, "weighted", load)
    share = np.diff(router.upto[0, 0, copied[0]], prepend=0.0)[: number + 1]
    inverse = 1 / expected[router.table.gpu[0, copied[0], : number + 1]]
    assert share == pytest.approx(inverse / inverse.sum(), abs=1e-6)


def test_uneven_groups_take_the_slots_of_the_whole_model() -> None:
    """Slots counted over all layers hold uneven groups without one spare slot; in every layer they do not."""
    trace = make_trace(1, tokens=300, layers=4, experts=8, top_k=2)
    tight = make_problem(trace, "scale-out:2x2")
    even = solve(tight, "grace").placement
    assert even is not None
    assert (even.used_slots() == 2).all()
    shared = solve(tight.replace(whole_model=True), "grace").placement
    assert shared is not None
    assert (shared.used_slots().sum(axis=0) == 8).all()


@pytest.mark.parametrize("backend", ["highs", "cbc", "cpsat"])
def test_a_bisection_is_optimal(backend: str) -> None:
    """On two GPUs ExFlow's programme is the whole problem: no placement crosses less often."""
    problem = make_problem(make_trace(0, tokens=300, layers=3, experts=4, top_k=1), "scale-up:2", objective="cross")
    best = min(objective_value(problem, placement) for placement in every_placement(problem))
    answer = solve(problem, "exflow", Limits(options={"method": "programme", "backend": backend}))
    assert answer.objective == pytest.approx(best)
    assert answer.stages[0].objective == pytest.approx(best)


def test_exflow_wants_one_expert_per_token() -> None:
    """With more than one expert per token there is no path to cut."""
    with pytest.raises(ProblemError, match="top-2"):
        solve(make_problem(make_trace(0), "scale-up:2"), "exflow")


def test_the_annealed_chain_keeps_equal_sizes() -> None:
    """The other method for top-1 tokens: as many experts of every layer on every GPU, no worse than contiguous."""
    problem = make_problem(make_trace(2, tokens=200, layers=3, experts=8, top_k=1), "scale-out:2x2", objective="cross")
    answer = solve(problem, "exflow", Limits(options={"method": "chain"}, work=0.01))
    assert answer.placement is not None
    assert (answer.placement.used_slots() == 2).all()
    assert answer.objective <= solve(problem, "linear").objective + 1e-12


def test_remap_goes_by_prefill() -> None:
    """Only the prompt tokens decide, and the heaviest expert goes first; without any, decode's loads do."""
    trace = make_trace(0, tokens=200, experts=6, prompt=5)
    problem = make_problem(trace, "scale-up:2", requests=4096, phase="prefill")
    frequency, notes = prefill_frequency(problem)
    prompt = trace.take(np.flatnonzero(trace.phase == 0))
    alone = make_problem(prompt, "scale-up:2", requests=4096, phase="prefill")
    assert frequency == pytest.approx(prefill_frequency(alone)[0])
    assert "decode tokens left out" in notes[0]
    one, other = (solve(entry, "prefill-remap").placement for entry in (problem, alone))
    assert one is not None
    assert other is not None
    assert one.digest() == other.digest()


def test_dup_makes_the_best_copy_each_time() -> None:
    """Each copy is a best one of all that can be made: compared with trying every one of them."""
    problem = make_problem(make_trace(0, experts=6), "scale-up:3", redundant=3, requests=50_000)
    roofline = roofline_of(problem)
    frequency = prefill_frequency(problem)[0][0]
    host = np.zeros((6, 3), bool)
    host[np.arange(6), np.repeat(np.arange(3), 2)] = True

    def busiest(held: np.ndarray) -> float:
        return float((roofline(frequency / held.sum(axis=1)) @ held).max())

    spare = np.ones(3, np.int64)
    for expert, gpu in duplicated(frequency, host, spare, roofline):
        tried = []
        for one, place in itertools.product(range(6), range(3)):
            if spare[place] and not host[one, place]:
                held = host.copy()
                held[one, place] = True
                tried.append(busiest(held))
        host[expert, gpu], spare[gpu] = True, spare[gpu] - 1
        assert busiest(host) == pytest.approx(min(tried))
    assert not spare.any()


def test_dup_without_spare_slots_says_what_it_needs() -> None:
    """No spare slot, no copies: the hint names the flag and the published number."""
    with pytest.raises(ProblemError) as caught:
        solve(make_problem(make_trace(0), "scale-up:2"), "prefill-dup")
    assert "--num-redundant-experts 2" in str(caught.value.hint)
