"""The solver ``search``: within caps, never below the optimum, the optimum where it is known, the same from a seed."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_placement, make_problem, make_trace, random_placement, slow_topology

from moeplace.errors import InputError, ProblemError
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value
from moeplace.placement import EMPTY, Placement
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Status, StopReason
from moeplace.solvers import choose, solve
from moeplace.topology import Topology, load_topology

SHORT = Limits(work=0.002)


def _problem(seed: int, layers: int, experts: int, topology: str, **options: Any) -> Problem:
    trace = make_trace(seed, tokens=200, layers=layers, experts=experts, top_k=2)
    return make_problem(trace, topology, objective="cross", dataflow="context-coherent", **options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gpus", [2, 4])
def test_small_instances_end_at_the_optimum(seed: int, gpus: int) -> None:
    """Against the exact solver, with and without a load cap; the bound is never above it."""
    bare = _problem(seed, 5, 8, f"scale-up:{gpus}")
    balanced = solve(bare.replace(objective="load"), "balance").placement
    assert balanced is not None
    cap = max_over_mean(balanced, bare.stats.load) * 1.05
    for problem in (bare, bare.replace(load_cap=cap)):
        best, answer = solve(problem, "exact"), solve(problem, "search", SHORT)
        assert answer.bound is not None
        assert answer.bound <= best.objective * (1 + 1e-9) <= answer.objective * (1 + 2e-9)
        assert answer.objective <= best.objective * 1.02
        assert answer.placement is not None
        if problem.load_cap is not None:
            assert (max_over_mean(answer.placement, problem.stats.load) <= problem.load_cap * (1 + 1e-9)).all()


@pytest.mark.parametrize("slots", [[3, 2], [3, 1], [4, 4]], ids=str)
def test_uneven_and_spare_slots(slots: list[int]) -> None:
    """Experts use any slot; no better division without copies exists, and no bound is above it."""
    problem = _problem(1, 2, 4, "scale-up:2", slots_per_gpu=slots)
    answer = solve(problem, "search", SHORT)
    assert answer.placement is not None
    assert (answer.placement.replicas() == 1).all()
    best = min(objective_value(problem, one) for one in every_placement(problem) if (one.replicas() == 1).all())
    assert answer.objective == pytest.approx(best)
    assert answer.bound is not None
    assert answer.bound <= best * (1 + 1e-9)
    assert any("unlike slots" in note for note in answer.notes) == (slots[0] != slots[1])


@given(seed=st.integers(0, 500), slots=st.integers(3, 5), gpus=st.integers(2, 3))
def test_copies_that_share_evenly_never_lower_crossing(seed: int, slots: int, gpus: int) -> None:
    """Each expert has a copy that may take all its tokens at no more crossing: why search places experts once."""
    problem = _problem(seed % 8, 3, 6, f"scale-up:{gpus}", slots_per_gpu=[slots] * gpus)
    placement = random_placement(seed, [slots] * gpus, 3, 6)
    allowed = objective_value(problem, placement)
    for layer in range(3):
        for expert in range(6):
            held = placement.slots[layer] == expert
            options = []
            for gpu in np.flatnonzero(held.any(axis=1)):
                kept = held & (np.arange(gpus)[:, None] == gpu)
                one = placement.slots.copy()
                one[layer][held & ~kept] = EMPTY
                options.append(Placement(slots=one, num_experts=6))
            placement = min(options, key=lambda option: objective_value(problem, option))
            assert objective_value(problem, placement) <= allowed + 1e-12


def test_one_seed_one_answer_in_any_number_of_threads() -> None:
    """Threads change the time alone; the seed changes the answer's history."""
    problem = _problem(3, 6, 16, "scale-up:4")
    one, two = (solve(problem, "search", SHORT.replace(threads=threads)) for threads in (1, 2))
    assert one.placement is not None
    assert two.placement is not None
    assert np.array_equal(one.placement.slots, two.placement.slots)
    assert one.bound == two.bound


def test_a_given_start_is_not_made_worse() -> None:
    """``exact+search`` keeps the optimum; a start with copies is not taken."""
    problem = _problem(5, 4, 8, "scale-up:4")
    best = solve(problem, "exact").objective
    assert solve(problem, "exact+search", SHORT).objective == pytest.approx(best)


def test_captured_share_is_told() -> None:
    """Beside the gap stands the share of the gain over EPLB that the bound leaves possible."""
    problem = _problem(6, 5, 16, "scale-up:4")
    answer = solve(problem, "search", SHORT)
    eplb = solve(problem, "eplb", SHORT)
    assert answer.bound is not None
    expected = (eplb.objective - answer.objective) / (eplb.objective - answer.bound)
    assert answer.terms["captured_share"].value == pytest.approx(expected)
    assert eplb.terms["captured_share"].value == pytest.approx(0.0)


def test_a_stopped_run_returns_what_it_has() -> None:
    """Ctrl-C or no time: a valid placement within the cap, a valid bound, and the reason."""
    problem = _problem(7, 6, 16, "scale-up:4")
    stop = threading.Event()
    stop.set()
    answer = solve(problem, "search", SHORT.replace(stop=stop))
    assert answer.placement is not None
    assert answer.stop_reason is StopReason.INTERRUPTED
    cut = solve(problem, "search", Limits(time_limit_s=0.0))
    assert cut.placement is not None
    assert cut.stop_reason is StopReason.TIME_LIMIT


def test_a_gap_ends_the_bounding() -> None:
    """With a wide gap allowed, the reason is the gap."""
    answer = solve(_problem(8, 4, 16, "scale-up:4"), "search", SHORT.replace(gap=0.9))
    assert answer.stop_reason is StopReason.GAP
    assert answer.gap is not None
    assert answer.gap <= 0.9


def test_the_matching_bound_is_weaker_and_valid() -> None:
    """``bound=matching`` gives the same placement; with a cap the programme bounds it more tightly."""
    problem = _problem(9, 5, 16, "scale-up:4")
    problem = problem.replace(load_cap=max_over_mean(solve(problem, "eplb").placement, problem.stats.load))
    tight, weak = (
        solve(problem, "search", SHORT.replace(options={"bound": kind}, work=work))
        for kind, work in (("sdp", 0.01), ("matching", 0.01))
    )
    assert tight.objective == weak.objective
    assert tight.bound is not None
    assert weak.bound is not None
    assert weak.bound <= tight.bound <= tight.objective


def test_what_it_does_not_do_is_said() -> None:
    """Other objectives, slots over the whole model, an unknown bound."""
    problem = _problem(0, 3, 8, "scale-up:2")
    with pytest.raises(ProblemError, match="pairs that cross"):
        solve(problem.replace(objective="load"), "search")
    with pytest.raises(ProblemError, match="pairs that cross"):
        solve(problem.replace(whole_model=True), "search")
    with pytest.raises(InputError, match="one of sdp, matching"):
        solve(problem, "search", Limits(options={"bound": "none"}))


def test_a_cap_no_start_keeps_has_no_answer() -> None:
    """Between the certified floor and what balancing finds the run says what the best it found has."""
    for seed in range(60):
        bare = _problem(seed, 2, 6, "scale-up:2")
        least = np.min([max_over_mean(one, bare.stats.load) for one in every_placement(bare)], axis=0)
        cap = least * (1 - 1e-6)
        try:
            answer = solve(bare.replace(load_cap=np.maximum(cap, 1.0)), "search", SHORT)
        except Exception as error:  # the floor proves it
            assert "floor" in str(error)  # noqa: PT017
            continue
        if (least > 1.0 + 1e-5).any():
            assert answer.placement is None
            assert answer.status is Status.UNKNOWN
            assert "no balanced start" in answer.notes[0]
            return
    pytest.fail("no instance has a floor below its optimum")


def test_improvements_are_told_in_order() -> None:
    """The history falls to the answer's value."""
    report = Report()
    answer = solve(_problem(2, 6, 16, "scale-up:4"), "search", SHORT, report)
    values = [entry.objective for entry in report.history if entry.source.startswith("search,")]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(answer.objective)


def test_auto_takes_it_where_divisions_are_many() -> None:
    """Auto names it and why."""
    problem = _problem(2, 4, 16, "scale-up:4")
    candidates, why = choose(problem)
    assert [candidate.name for candidate in candidates] == ["linear", "search"]
    assert "bounded" in why


@pytest.mark.parametrize("capped", [False, True])
def test_pairs_across_nodes_are_minimised_and_bounded(capped: bool) -> None:
    """With --copies-level node only pairs that leave their node count; the optimum is found, the bound is below it."""
    problem = _problem(5, 2, 4, "scale-out:2x2", copies_level="node")
    if capped:
        balanced = solve(problem.replace(objective="load"), "balance").placement
        assert balanced is not None
        problem = problem.replace(load_cap=max_over_mean(balanced, problem.stats.load) * 1.1)
    answer = solve(problem, "search", SHORT)
    kept = [one for one in every_placement(problem) if (one.used_slots() == 1).all()]
    if problem.load_cap is not None:
        kept = [one for one in kept if (max_over_mean(one, problem.stats.load) <= problem.load_cap).all()]
    best = min(objective_value(problem, one) for one in kept)
    assert answer.objective == pytest.approx(best)
    assert answer.bound is not None
    assert answer.bound <= best * (1 + 1e-9)


@pytest.mark.parametrize(
    ("spec", "phase"), [("scale-up:4", "decode"), ("scale-out:2x2", "prefill"), ("torus:2x2", "prefill")]
)
def test_step_time_is_minimised_where_tokens_move(spec: str, phase: str) -> None:
    """Never worse than balance alone, with any topology; the bound is below; a given cap is kept."""
    problem = _problem(7, 4, 8, spec, phase=phase).replace(objective="step-time", topology=_slow(spec))
    other = min(solve(problem, name).objective for name in ("eplb", "balance", "balance+relabel"))
    brief = SHORT.replace(work=0.0005)
    answer = solve(problem, "search", brief)
    assert answer.bound is not None
    assert answer.bound <= answer.objective <= other * (1 + 1e-3)
    balanced = solve(problem.replace(objective="load"), "balance").placement
    assert balanced is not None
    cap = max_over_mean(balanced, problem.stats.load) * 1.02
    held = solve(problem.replace(load_cap=cap), "search", brief)
    assert held.placement is not None
    assert (max_over_mean(held.placement, problem.stats.load) <= cap * (1 + 1e-9)).all()


def _slow(spec: str) -> Topology:
    values = {"link_gb_per_s": 1.0} if load_topology(spec).is_direct else {}
    return slow_topology(spec, **values)
