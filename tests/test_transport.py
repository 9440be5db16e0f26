"""Experts near the ranks that choose them: the transportation problem of each layer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import every_placement, make_problem, make_trace, slow_topology

from moeplace.errors import InfeasibleError, ProblemError
from moeplace.feasible import keeps_caps
from moeplace.objective import objective_value
from moeplace.placement import Placement
from moeplace.problem import OBJECTIVES, Problem
from moeplace.solution import Limits, Status
from moeplace.solvers import choose, solve
from moeplace.solvers.transport import transport_costs, way_us
from moeplace.topology import load_topology

SPECS = ("scale-up:2", "scale-out:2x2", "torus:2x2", "mesh:1x3")


def problem_of(seed: int, spec: str, **options: object) -> Problem:
    """Return a small problem whose tokens have home ranks."""
    topology = slow_topology(spec)
    ranks = options.pop("ranks", topology.num_gpus)
    trace = make_trace(seed, tokens=60, experts=options.pop("experts", 4), ranks=ranks, layers=options.pop("layers", 2))
    return make_problem(trace, topology, **options)


def transported_us(problem: Problem, placement: Placement) -> float:
    """Wire time of rows by the definition: token by token, place by place."""
    sources, share = problem.stats.source_load, placement.even_share()
    way = way_us(problem.topology, problem.model.bytes_per_copy_dispatch, problem.model.bytes_per_copy_combine)
    assert sources is not None
    total = 0.0
    for layer, gpu in itertools.product(range(problem.num_layers), range(problem.num_gpus)):
        for rank in range(len(sources)):
            total += float(sources[rank, layer] @ share[layer, gpu]) * way[rank, gpu]
    return total / problem.stats.num_tokens / problem.num_layers


@given(st.integers(0, 10**6), st.sampled_from(SPECS), st.integers(0, 1))
@settings(max_examples=25, deadline=None)
def test_no_placement_costs_less(seed: int, spec: str, redundant: int) -> None:
    """The stage tells the least wire time of all placements there are, copies of experts among them."""
    gpus = load_topology(spec).num_gpus
    problem = problem_of(seed, spec, layers=1, experts=gpus + 1 if gpus < 4 else 4, redundant=redundant * gpus)
    answer = solve(problem, "transport")
    assert answer.placement is not None
    (stage,) = answer.stages
    assert stage.status is Status.OPTIMAL
    assert stage.objective == pytest.approx(transported_us(problem, answer.placement))
    least = min(transported_us(problem, other) for other in every_placement(problem))
    assert stage.objective == pytest.approx(least)


@given(st.integers(0, 10**6), st.floats(1.0, 1.6))
@settings(max_examples=25, deadline=None)
def test_a_load_cap_is_kept_at_least_cost(seed: int, cap: float) -> None:
    """Under a cap: the least of all placements that keep it; none where none does."""
    problem = problem_of(seed, "scale-up:3", experts=6, layers=1)
    load = problem.stats.load[0].astype(float)
    problem = problem.replace(load_cap=max(cap, float(load.max() / load.sum() * 3)))
    within = [other for other in every_placement(problem) if keeps_caps(problem, other)]
    try:
        answer = solve(problem, "transport")
    except InfeasibleError:  # below the certified floor of the layer
        assert not within
        return
    if answer.placement is None:
        assert not within
        return
    assert keeps_caps(problem, answer.placement)
    assert answer.stages[0].objective == pytest.approx(min(transported_us(problem, other) for other in within))


@given(st.integers(0, 10**6), st.sampled_from(SPECS))
@settings(max_examples=15, deadline=None)
def test_never_worse_than_renamed_gpus(seed: int, spec: str) -> None:
    """Names of whole groups are fewer choices than places of experts."""
    problem = problem_of(seed, spec, experts=12)
    ours, theirs = solve(problem, "transport").placement, solve(problem, "balance+relabel").placement
    assert ours is not None
    assert theirs is not None
    assert transported_us(problem, ours) <= transported_us(problem, theirs) * (1 + 1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_answers_are_valid_for_every_objective(objective: str) -> None:
    """The problem's objective is recomputed; its bound and status know nothing of the stage's proof."""
    problem = problem_of(1, "scale-out:2x2", experts=8, objective=objective)
    answer = solve(problem, "transport")
    assert answer.placement is not None
    answer.placement.check_fits(problem.slots_per_gpu, whole_model=False)
    assert answer.objective == objective_value(problem, answer.placement)
    assert answer.bound is None or answer.bound <= answer.objective
    again = solve(problem, "transport", Limits(threads=2)).placement
    assert again is not None
    assert again.digest() == answer.placement.digest()


def test_ways_are_priced_by_the_topology() -> None:
    """Nothing at home, hops on a mesh, NICs between nodes."""
    mesh = way_us(load_topology("mesh:1x3"), 1e3, 2e3)
    assert np.diag(mesh) == pytest.approx(0)
    assert mesh[0, 2] == pytest.approx(2 * mesh[0, 1])
    nodes = load_topology("scale-out:2x2")
    way = way_us(nodes, 1e3, 2e3)
    assert way[0, 2] == pytest.approx(3 / nodes.nic_gb_per_s)
    assert way[0, 1] == pytest.approx(3 / nodes.local_gb_per_s)
    problem = problem_of(0, "scale-out:2x2")
    assert transport_costs(problem).shape == (2, 4, 4)


def test_refusals_say_what_to_do() -> None:
    """No homes, more homes than GPUs, and tokens that do not return home."""
    with pytest.raises(ProblemError, match="no source ranks") as told:
        solve(make_problem(make_trace(0, experts=4), "scale-up:2"), "transport")
    assert "--solver balance" in str(told.value.hint)
    with pytest.raises(ProblemError, match="come from"):
        solve(problem_of(0, "scale-up:2", ranks=4), "transport")
    with pytest.raises(ProblemError, match="context-coherent"):
        solve(problem_of(0, "scale-up:2", dataflow="context-coherent"), "transport")


def test_auto_tries_it_where_homes_are_recorded() -> None:
    """With one row per selection, recorded homes and no cap."""
    names = [candidate.name for candidate in choose(problem_of(0, "scale-up:2"))[0]]
    assert "transport" in names
    for other in (make_problem(make_trace(0, experts=4), "scale-up:2"), problem_of(0, "scale-up:2", load_cap=1.5)):
        assert "transport" not in [candidate.name for candidate in choose(other)[0]]
