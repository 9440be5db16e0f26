"""The joint integer programmes: what they prove is so, by brute force, whatever the objective and the backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import every_placement, make_problem, make_trace, random_placement, slow_topology

from moeplace.bounds import cross_bound
from moeplace.chains.sdp import ChainSDP, bounds
from moeplace.errors import ProblemError
from moeplace.joint import num_terms
from moeplace.joint.layers import one_layer
from moeplace.joint.run import Run
from moeplace.joint.symmetry import by_layer, classes, named
from moeplace.metrics import max_over_mean
from moeplace.objective import mean_step_times, objective_value
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Status, StopReason
from moeplace.solvers import load_solver, solve, verify

both = pytest.mark.parametrize("name", ["cpsat", "ilp"])
LIMITS = Limits(work=20.0, time_limit_s=60.0)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "load": {"objective": "load"},
    "cross": {"objective": "cross", "dataflow": "context-coherent"},
    "copies": {"objective": "copies"},
    "node copies": {"objective": "copies", "copies_level": "node"},
    "step time": {},
    "coherent step time": {"dataflow": "context-coherent"},
}
SHAPES: dict[str, tuple[str, int, int, int]] = {  # topology, experts, layers, redundant
    "even": ("scale-up:2", 4, 2, 0),
    "nodes": ("scale-out:2x1", 5, 2, 0),
    "rails": ("scale-out:2x2", 4, 1, 0),
    "ring": ("torus:3", 4, 1, 0),
    "chain": ("scale-up:2", 2, 3, 0),
    "copies": ("scale-up:2", 3, 2, 1),
    "more copies": ("scale-up:3", 3, 1, 2),
}


def tiny(shape: str, seed: int, **options: Any) -> Problem:
    """Return a problem small enough to try every placement."""
    spec, experts, layers, redundant = SHAPES[shape]
    topology = spec if spec.startswith("torus") else slow_topology(spec)
    trace = make_trace(seed, tokens=25, experts=experts, layers=layers, ranks=2 if seed % 2 else None)
    return make_problem(trace, topology, redundant=redundant, **options)


def best_value(problem: Problem) -> float:
    """Least objective over all placements within the cap; infinite where none is."""
    best = math.inf
    for placement in every_placement(problem):
        over = problem.load_cap is not None and (
            max_over_mean(placement, problem.stats.load) > problem.load_cap * (1 + 1e-9)
        )
        if not np.any(over):
            best = min(best, objective_value(problem, placement))
    return best


@both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), cap=st.sampled_from([None, 1.1, 1.4]))
def test_the_optimum_is_the_one_of_brute_force(
    name: str, shape: str, objective: str, seed: int, cap: float | None
) -> None:
    """Both solvers find and prove the least of all placements; a cap that none keeps is proved infeasible."""
    problem = tiny(shape, seed, load_cap=cap, **OBJECTIVES[objective])
    best = best_value(problem)
    answer = Run(problem, LIMITS, Report(), name)  # size, floor and start, which must hold for themselves
    assert answer.floor <= best * (1 + 1e-9)
    found = _answer(problem, name)
    known = not (objective.endswith("copies") and shape.endswith("copies"))
    if math.isinf(best):
        assert found is None or not known
        return
    if found is None:
        assert not known
        return
    assert found.objective >= best * (1 - 1e-9)
    assert found.bound is not None
    assert found.bound <= best * (1 + 2e-6) + 1e-12
    if known:
        assert (found.status, found.stop_reason) == (Status.OPTIMAL, StopReason.PROVEN)
        assert found.objective == pytest.approx(best, rel=2e-6)


@pytest.mark.parametrize(("shape", "seed"), [("ring", 4), ("ring", 28), ("ring", 34), ("ring", 132)])
def test_no_presolve_step_proves_what_is_not_so(shape: str, seed: int) -> None:
    """Models on which OR-Tools 9.15 "proves" a value above the optimum, with all of its presolve, are solved right."""
    problem = tiny(shape, seed)
    assert solve(problem, "cpsat", LIMITS).objective == pytest.approx(best_value(problem))


def _answer(problem: Problem, name: str) -> Any:
    """Solve without the checks of the cap that come before; None where it is said that there is nothing."""
    found = load_solver(name).solve(problem, LIMITS, Report())
    if found.placement is None:
        assert found.status in (Status.INFEASIBLE, Status.UNKNOWN)
        if problem.objective != "copies" or problem.num_slots == problem.num_experts:
            assert (found.status, found.stop_reason) == (Status.INFEASIBLE, StopReason.PROVEN)
        return None
    verify(problem, found)
    if problem.load_cap is not None:
        assert (max_over_mean(found.placement, problem.stats.load) <= problem.load_cap * (1 + 1e-9)).all()
    return found


@both
def test_it_agrees_with_the_dynamic_programme(name: str) -> None:
    """Least traffic between GPUs is that of the exact solver, with and without a load cap; other bounds lie below."""
    trace = make_trace(3, tokens=300, experts=6, layers=3)
    problem = make_problem(trace, "scale-up:3", **OBJECTIVES["cross"])
    even = solve(problem.replace(objective="load"), "balance").placement
    assert even is not None
    for cap in (None, 1.05 * max_over_mean(even, problem.stats.load)):
        capped = problem.replace(load_cap=cap)
        found, exact = solve(capped, name, LIMITS), solve(capped, "exact")
        assert (found.status, exact.status) == (Status.OPTIMAL, Status.OPTIMAL)
        assert found.objective == pytest.approx(exact.objective)
        assert cross_bound(capped) <= found.objective * (1 + 1e-9)
        pairs = problem.stats.transition
        assert pairs is not None
        most_load = None if cap is None else cap * problem.stats.load.sum(axis=1) / 3
        sdp = ChainSDP(pairs, problem.stats.load, most_load, 3)
        least = max(1 - most / pairs.sum() for _, most in bounds(sdp, 60, 20, lambda: False))
        assert least <= found.objective * (1 + 1e-9)


@both
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_interrupted_run_keeps_its_start(name: str, objective: str) -> None:
    """Stopped before it begins a solver returns the given start, and says who stopped it."""
    problem = make_problem(make_trace(1, tokens=60, experts=8), slow_topology("scale-out:2x2"), **OBJECTIVES[objective])
    start = random_placement(5, problem.slots_per_gpu, 2, 8)
    limits = Limits()
    limits.stop.set()
    answer = solve(problem.replace(start=start), name, limits)
    assert answer.stop_reason is StopReason.INTERRUPTED
    assert answer.placement is not None
    assert answer.objective == objective_value(problem, start)


@both
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_answer_is_never_worse_than_its_start(name: str, objective: str) -> None:
    """With next to no work the start is what is left, renamed GPUs and all."""
    problem = make_problem(make_trace(1, tokens=60, experts=8), "scale-up:4", redundant=4, **OBJECTIVES[objective])
    start = random_placement(5, problem.slots_per_gpu, 2, 8)
    answer = solve(problem.replace(start=start), name, Limits(work=1e-3, time_limit_s=20))
    assert answer.objective <= objective_value(problem, start) * (1 + 1e-9)


@both
def test_slots_of_the_whole_model(name: str) -> None:
    """Slots counted over all layers let a layer crowd one GPU: traffic vanishes where the memory allows it."""
    problem = make_problem(make_trace(2, tokens=60, experts=2), "scale-up:2", whole_model=True, **OBJECTIVES["cross"])
    best = min(objective_value(problem, p) for p in _whole_model_placements(problem))
    answer = solve(problem, name, LIMITS)
    assert answer.status is Status.OPTIMAL
    assert answer.objective == pytest.approx(best)


def _whole_model_placements(problem: Problem) -> list[Any]:
    roomy = problem.replace(whole_model=False, slots_per_gpu=problem.slots_per_gpu * problem.num_layers)
    fitting = []
    for placement in every_placement(roomy):
        if (placement.used_slots().sum(axis=0) <= roomy.slots_per_gpu).all():
            fitting.append(placement)
    return fitting


def test_what_is_not_solved_is_refused_with_numbers() -> None:
    """Normal kernels and programmes that are too large are refused: what, the rule, what to do instead."""
    trace = make_trace(0, experts=4)
    with pytest.raises(ProblemError, match="normal ones") as caught:
        solve(make_problem(trace, "scale-up:2", phase="prefill"), "ilp")
    assert caught.value.hint
    large = make_problem(make_trace(0, tokens=900, experts=128, top_k=8), "scale-up:64", **OBJECTIVES["cross"])
    with pytest.raises(ProblemError, match=r"[\d,]+ terms.*at most 1,000,000"):
        solve(large, "cpsat")
    counts = make_problem(trace, "scale-up:2", phase="prefill")
    stats = counts.stats.replace(sample=None, transition=None, coactivation=None)
    assert solve(counts.replace(stats=stats), "cpsat").placement is not None  # counts are timed as low-latency kernels


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", ["even", "nodes", "ring", "copies"])
def test_sizes_are_known_beforehand(objective: str, shape: str) -> None:
    """The estimate of a programme's terms is within a factor of three of what is built."""
    problem = tiny(shape, 1, **OBJECTIVES[objective])
    decision, _ = Run(problem, LIMITS, Report(), "ilp")._build()
    assert num_terms(problem) / 3 <= decision.model.num_terms <= 3 * num_terms(problem)


@given(seed=st.integers(0, 99), objective=st.sampled_from(sorted(OBJECTIVES)))
@settings(deadline=None)
def test_renaming_interchangeable_gpus_changes_nothing(seed: int, objective: str) -> None:
    """GPUs of a class may be exchanged, and the start is renamed to a placement of the same value."""
    problem = make_problem(
        make_trace(seed, tokens=25, experts=5, ranks=2 if seed % 2 else None),
        slow_topology(("scale-up:3", "scale-out:2x2", "scale-out:2x2")[seed % 3]).replace(
            spine_oversubscription=2.0 if seed % 3 == 2 else 1.0
        ),
        redundant=seed % 2,
        **OBJECTIVES[objective],
    )
    placement = random_placement(seed, problem.slots_per_gpu, 2, 5)
    value = objective_value(problem, placement)
    sets = classes(problem)
    assert sorted(g for members in sets for g in members) == list(range(problem.num_gpus))
    renamed = named(problem, placement, 1 if (placement.replicas() == 1).all() else 2)
    if objective.endswith("copies") and (placement.replicas() > 1).any():
        return  # which copy serves a token goes by slots
    assert objective_value(problem, renamed) == pytest.approx(value)


def test_classes_of_gpus() -> None:
    """Switched domains have one class, nodes one each where traffic tells them apart, rings none."""
    trace = make_trace(0, experts=8)
    assert classes(make_problem(trace, "scale-up:4")) == [[0, 1, 2, 3]]
    assert classes(make_problem(trace, "scale-out:2x2")) == [[0, 1], [2, 3]]
    assert classes(make_problem(trace, "scale-up:4", slots_per_gpu=[3, 2, 3, 2])) == [[0, 2], [1, 3]]
    assert not by_layer(make_problem(trace, "scale-up:4", **OBJECTIVES["cross"]))


def test_a_layer_by_itself_costs_what_it_costs_among_others() -> None:
    """Problems of single layers add up to the whole where nothing joins the layers."""
    problem = make_problem(make_trace(0, tokens=50, ranks=2), slow_topology("scale-out:2x1"), load_cap=2.0)
    placement = random_placement(0, problem.slots_per_gpu, 2, 6)
    times = mean_step_times(problem, placement)
    for layer in range(2):
        alone = one_layer(problem, layer)
        value = objective_value(alone, placement.replace(slots=placement.slots[layer : layer + 1]))
        assert value == pytest.approx(times.compute[layer] + times.dispatch[layer] + times.combine[layer])


def test_incumbents_are_told() -> None:
    """Improvements are told with the objective's unit and a bound that never passes them."""
    problem = make_problem(make_trace(3, tokens=300, experts=6, layers=3), "scale-up:3", **OBJECTIVES["cross"])
    report = Report()
    start = random_placement(1, problem.slots_per_gpu, 3, 6)
    solve(problem.replace(start=start), "cpsat", LIMITS, report)
    told = [entry for entry in report.history if entry.source == "cpsat"]
    assert [entry.objective for entry in told] == sorted((entry.objective for entry in told), reverse=True)
    assert all(entry.unit == "share of pairs" and (entry.bound or 0) <= entry.objective + 1e-9 for entry in told)


def test_counts_of_patterns_are_exact() -> None:
    """The programme's objective at a placement is the metric's, tokens of equal choices being counted together."""
    problem = make_problem(make_trace(0, tokens=200, experts=4), "scale-up:2", objective="copies")
    run = Run(problem, LIMITS, Report(), "ilp")
    decision, part = run._build()
    assert decision.model.start is not None
    assert decision.model.objective_of(decision.model.start) / part.scale == pytest.approx(run.value)
