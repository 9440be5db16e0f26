"""Replicas near tokens: what is sent to other nodes, and the annealing that makes it little."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_placement, make_problem, make_trace, random_placement, slow_topology

from moeplace.affinity import count_routing
from moeplace.bounds import objective_bound
from moeplace.errors import ProblemError
from moeplace.hypergraph import Patterns
from moeplace.hypergraph.anneal import Schedule
from moeplace.hypergraph.cover import most_covered
from moeplace.hypergraph.nearby import NodeAnnealer
from moeplace.metrics import max_over_mean, remote_copies
from moeplace.objective import load_ratio, objective_value
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.routing import Router
from moeplace.solution import Limits, Status
from moeplace.solvers import solve

NEAR = {"objective": "remote", "routing": "topology-aware"}
SHORT = Schedule(turns=6, swaps=60, hot=0.6, cold=0.01, first_price=0.1)


def _near(seed: int, spec: str = "scale-out:2x1", **options: Any) -> Problem:
    shape = {key: options.pop(key) for key in ("tokens", "layers", "experts", "top_k", "ranks") if key in options}
    return make_problem(make_trace(seed, **shape), slow_topology(spec), **{**NEAR, **options})


def _plainly(problem: Problem, placement: Placement) -> float:
    """Copies to other nodes by going through homes, tokens and the choices of copies, for even shares."""
    sample, topology = problem.stats.sample, problem.topology
    assert sample is not None
    node_of, nodes = topology.node_of_gpu(), topology.num_nodes
    total = 0.0
    for number, token in enumerate(sample.experts):
        homes = range(nodes) if sample.rank is None else [node_of[sample.rank[number]]]
        for layer, experts in enumerate(token):
            held = [node_of[np.flatnonzero(placement.copies()[layer, :, e])].tolist() for e in experts]
            for home in homes:
                open_ = [[home] if home in copies else copies for copies in held]
                ways = list(itertools.product(*open_))
                total += sum(len(set(way) - {home}) for way in ways) / len(ways) / len(homes)
    return total / (sample.num_tokens * sample.meta.num_layers)


@pytest.mark.parametrize("spec", ["scale-out:2x2", "scale-out:3x1", "scale-out:4x1"])
@pytest.mark.parametrize("ranks", [None, 3])
@given(seed=st.integers(0, 99))
def test_remote_copies_equal_a_plain_count(spec: str, ranks: int | None, seed: int) -> None:
    """With ``nearest`` the expected number equals the sum over homes and over ways to choose copies."""
    topology = slow_topology(spec)
    rooms = [2 if topology.gpus_per_node > 1 else 3] * topology.num_gpus
    problem = _near(seed, spec, tokens=12, top_k=3, ranks=ranks, slots_per_gpu=rooms, routing="nearest")
    placement = random_placement(seed, rooms, 2, 6)
    if placement.duplicates() or (placement.copies().reshape(2, topology.num_nodes, -1, 6).sum(axis=2) > 1).any():
        return  # copies of one node are weighed one by one: a plain count of nodes is another one
    assert objective_value(problem, placement) == pytest.approx(_plainly(problem, placement))


@given(seed=st.integers(0, 99))
def test_few_homes_are_as_good_as_all(seed: int) -> None:
    """With more nodes than homes that are tried, the mean over tokens is near the mean over all homes."""
    topology = slow_topology("scale-out:32x1")
    trace, placement = make_trace(seed, tokens=400, experts=16), random_placement(seed, [1] * 32, 2, 16)
    router = Router.of(placement, topology, "nearest")
    told = remote_copies(trace, placement, topology, router)
    even = np.repeat(np.arange(32), len(trace.experts))
    every = trace.replace(
        experts=np.tile(trace.experts, (32, 1, 1)),
        request=np.tile(trace.request, 32) + np.repeat(np.arange(32), len(trace.experts)) * 100,
        position=np.tile(trace.position, 32),
        phase=np.tile(trace.phase, 32),
        rank=even,
    )
    assert told == pytest.approx(remote_copies(every, placement, topology, router), rel=0.02)


@given(seed=st.integers(0, 99))
def test_what_is_annealed_is_what_is_measured(seed: int) -> None:
    """The annealer's cost and loads of a state are the objective and the loads of its placement."""
    problem = _near(seed, "scale-out:4x1", tokens=60, experts=8, top_k=3, slots_per_gpu=[3] * 4, layers=1)
    sample = problem.stats.sample
    assert sample is not None
    annealer = NodeAnnealer(Patterns.of(sample.experts[:, 0], 8), problem.stats.load[0], np.full((4, 1), 3))
    placement = random_placement(seed, [3] * 4, 1, 8)
    if placement.duplicates():
        return
    state = annealer.run(placement.slots[0], np.inf, SHORT, seed)
    for slots in (placement.slots[0], state):
        own = Placement(slots=slots[None], num_experts=8)
        near = problem.replace(routing="nearest")
        assert annealer.sent(slots) / sample.num_tokens == pytest.approx(objective_value(near, own))
        busy = annealer.busy(slots)
        assert busy.max() / busy.mean() == pytest.approx(max_over_mean(own, problem.stats.load)[0])
    assert annealer.sent(state) <= annealer.sent(placement.slots[0]) + 1e-9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cap", [None, 1.3])
def test_small_layers_are_solved_to_the_optimum(seed: int, cap: float | None) -> None:
    """On every placement of a small layer with copies, none keeps the cap and sends less; the bound is below it."""
    problem = _near(seed, tokens=60, layers=1, experts=4, slots_per_gpu=[3, 3], load_cap=cap)
    allowed = [
        placement
        for placement in every_placement(problem)
        if cap is None or load_ratio(problem, placement).max() <= cap * (1 + 1e-9)
    ]
    answer = solve(problem, "nearby", Limits())
    best = min((objective_value(problem, placement) for placement in allowed), default=None)
    if best is None:
        assert answer.status is Status.UNKNOWN
        return
    assert objective_bound(problem) <= best * (1 + 1e-9)
    assert answer.objective == pytest.approx(best)


@given(seed=st.integers(0, 999), top_k=st.integers(2, 4))
def test_no_nodes_cover_more_than_the_bound(seed: int, top_k: int) -> None:
    """Of all ways to fill nodes, with copies or without, none covers more tokens; without spare slots it is near."""
    experts = 6
    patterns = Patterns.of(make_trace(seed, tokens=60, layers=1, experts=experts, top_k=top_k).experts[:, 0], experts)
    for rooms in ((3, 3), (4, 3), (2, 2, 3)):
        ways = itertools.product(*[itertools.combinations(range(experts), room) for room in rooms])
        most = 0
        for held in ways:
            if len(set().union(*held)) == experts:
                inside = [np.isin(patterns.experts, some).all(axis=1) for some in held]
                most = max(most, int(sum(patterns.weight[row].sum() for row in inside)))
        assert most_covered(patterns, np.array(rooms)) >= most - 1e-6


def test_the_bound_is_worth_its_name() -> None:
    """On tokens of two circles that share no expert, halves cover all, and the bound proves what others send."""
    chosen = np.array([[0, 1], [1, 2], [2, 3], [0, 3], [4, 5], [5, 6], [6, 7], [4, 7]] * 10)[:, None, :]
    trace = make_trace(0, tokens=80, layers=1, experts=8).replace(experts=chosen)
    problem = make_problem(trace, "scale-out:2x1", **(NEAR | {"routing": "even"}))
    answer = solve(problem, "nearby")
    assert answer.objective == pytest.approx(0.5)
    assert answer.bound == pytest.approx(0.5, abs=0.02)


def test_copies_go_where_tokens_are() -> None:
    """An expert that all tokens choose is copied to both nodes before any other."""
    trace = make_trace(0, tokens=200, layers=1, experts=6)
    chosen = trace.experts.copy()
    chosen[:, 0, 0] = 0
    chosen[:, 0, 1] = 1 + np.arange(200) % 5
    problem = make_problem(trace.replace(experts=chosen), "scale-out:2x1", redundant=1, **NEAR)
    answer = solve(problem, "nearby")
    assert answer.placement is not None
    assert (answer.placement.copies()[0, :, 0] == 1).all()


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_copies_may_be_fewer_than_slots(extra: int) -> None:
    """With ``extra`` no layer has more copies than that; nodes may then hold unequal numbers, and the bound holds."""
    problem = _near(4, tokens=60, layers=2, experts=4, slots_per_gpu=[4, 4])
    answer = solve(problem, "nearby", Limits(options={"extra": str(extra)}))
    assert answer.placement is not None
    used = answer.placement.used_slots().sum(axis=1)
    assert (used <= 4 + extra).all()
    best = min(
        objective_value(problem, placement)
        for placement in every_placement(_near(4, tokens=60, layers=2, experts=4, slots_per_gpu=[4, 4]))
        if (placement.used_slots().sum(axis=1) <= 4 + extra).all()
    )
    assert answer.objective == pytest.approx(best)
    assert answer.bound is not None
    assert answer.bound <= best * (1 + 1e-9)


def test_without_spare_slots_it_is_a_partition() -> None:
    """Every expert once: what is sent is the nodes visited, less the home that is one of all."""
    problem = _near(1, "scale-out:2x2", tokens=200, experts=8, routing="even")
    answer = solve(problem, "nearby")
    assert answer.placement is not None
    visited = objective_value(problem.replace(objective="copies", copies_level="node"), answer.placement)
    assert answer.objective == pytest.approx(visited / 2)


def test_load_caps_are_kept_or_no_answer_is_given() -> None:
    """The cap holds as the evaluator sees loads; one that nothing meets gives no placement and says where."""
    problem = _near(3, "scale-out:2x2", tokens=300, experts=16, redundant=4, load_cap=1.1)
    answer = solve(problem, "nearby")
    assert answer.placement is not None
    assert load_ratio(problem, answer.placement).max() <= 1.1 + 1e-9
    tight = solve(problem.replace(load_cap=1.0), "nearby", Limits(options={"runs": "1"}))
    assert (tight.placement, tight.status) == (None, Status.UNKNOWN)
    assert "no placement within the load cap" in " ".join(tight.notes)


def test_a_start_is_never_made_worse() -> None:
    """Given the answer of a long run, a short one keeps it."""
    problem = _near(5, "scale-out:2x2", tokens=300, experts=16, redundant=4)
    good = solve(problem, "nearby")
    again = solve(problem.replace(start=good.placement), "nearby", Limits(options={"runs": "1"}, seed=9))
    assert again.objective <= good.objective


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "copies"}, "other nodes"),
        ({"routing": "even", "redundant": 2}, "own node"),
        ({"whole_model": True}, "whole model"),
    ],
)
def test_other_problems_are_refused(options: dict[str, Any], words: str) -> None:
    """What it does not minimise it says, with what to say instead."""
    with pytest.raises(ProblemError, match=words) as caught:
        solve(_near(0, experts=6, **options), "nearby")
    assert caught.value.hint


def test_recorded_homes_decide_the_objective() -> None:
    """The answer's value is counted at recorded homes, and a note says that the search knows none."""
    problem = _near(2, tokens=80, redundant=2, ranks=2)
    answer = solve(problem, "nearby")
    assert answer.placement is not None
    assert answer.objective == pytest.approx(_plainly(problem, answer.placement))
    assert any("recorded" in note or "records" in note for note in answer.notes)
    assert count_routing(make_trace(2, ranks=2)).sample is not None
