"""The registry of solvers, and the look-up that verifies their answers."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract import problem_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    every_placement,
    make_problem,
    make_trace,
    random_placement,
    relabel_experts,
    relabel_placement,
    slow_topology,
)

from moeplace import solvers
from moeplace.affinity import count_routing
from moeplace.bounds import load_floor, objective_bound
from moeplace.errors import InfeasibleError, InputError, ProblemError, SolverError, UnknownNameError
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution, Status, StopReason
from moeplace.solvers import list_solvers, load_solver, solve


@given(st.integers(0, 99))
def test_bounds_do_not_depend_on_names(seed: int) -> None:
    """Experts renamed leave every bound and floor as it was."""
    trace = make_trace(seed, tokens=50)
    order = np.random.default_rng(seed).permutation(6)
    for objective in ("load", "step-time", "copies"):
        one, other = (
            make_problem(t, slow_topology("scale-up:2"), redundant=2, objective=objective)
            for t in (trace, relabel_experts(trace, order))
        )
        assert objective_bound(one) == pytest.approx(objective_bound(other))
        assert load_floor(one) == pytest.approx(load_floor(other))


def test_the_folder_is_the_registry() -> None:
    """Methods are listed by file, sorted; an unknown one suggests a near one."""
    names = list_solvers()
    assert list(names) == sorted(set(names))
    assert {"linear", "random", "eplb"} <= set(names)
    with pytest.raises(UnknownNameError, match="did you mean linear"):
        solve(problem_of("tight"), "liner")
    with pytest.raises(UnknownNameError):
        solve(problem_of("tight"), "linear+")


def _install(monkeypatch: pytest.MonkeyPatch, name: str, answer: Callable[[Problem, Limits], Solution]) -> None:
    module: Any = types.ModuleType(f"moeplace.solvers.{name}")
    module.DESCRIPTION, module.OPTIONS = "made for a test", {"depth": "how deep"}
    module.solve = lambda problem, limits, report: answer(problem, limits)
    monkeypatch.setitem(sys.modules, f"moeplace.solvers.{name}", module)
    known = list_solvers()
    monkeypatch.setattr(solvers, "list_solvers", lambda: (*known, name))


def _honest(problem: Problem, placement: Placement | None = None) -> Solution:
    placement = placement or random_placement(0, problem.slots_per_gpu, problem.num_layers, problem.num_experts)
    return Solution(
        placement=placement,
        objective=objective_value(problem, placement),
        unit="",
        status=Status.FEASIBLE,
        stop_reason=StopReason.EXHAUSTED,
        solver="fake",
    )


LIES: dict[str, tuple[Callable[[Problem], Solution], str]] = {
    "value": (lambda p: _honest(p).replace(objective=_honest(p).objective * 0.999), "claims"),
    "bound": (lambda p: _honest(p).replace(bound=_honest(p).objective * 1.01), "bound"),
    "optimal without bound": (lambda p: _honest(p).replace(status=Status.OPTIMAL), "optimal"),
    "optimal with gap": (
        lambda p: _honest(p).replace(status=Status.OPTIMAL, bound=_honest(p).objective * 0.9),
        "optimal",
    ),
    "too few layers": (lambda p: _honest(p, random_placement(0, p.slots_per_gpu, 1, p.num_experts)), "1 layers"),
    "too many slots": (
        lambda p: _honest(p, random_placement(0, p.slots_per_gpu + 2, p.num_layers, p.num_experts)),
        "slots",
    ),
    "doubles": (
        lambda p: _honest(p, Placement(slots=np.tile([[[0, 0, 1, 2], [3, 3, 3, 3]]], (2, 1, 1)), num_experts=4)),
        "twice",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_caught(monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """A wrong value, an impossible bound, an unproved optimum and a placement that breaks a rule do not get through."""
    tell, words = LIES[lie]
    _install(monkeypatch, "fake", lambda problem, limits: tell(problem))
    problem = problem_of("tight")
    if lie == "doubles":
        problem = problem.replace(slots_per_gpu=[4, 4])
    with pytest.raises((SolverError, ProblemError, InputError), match=words):
        solve(problem, "fake")


def test_an_honest_answer_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up adds the certified bound, terms, unit and history to an honest answer, and proves what it can."""
    _install(monkeypatch, "fake", lambda problem, limits: _honest(problem))
    report = Report()
    answer = solve(problem_of("tight"), "fake", report=report)
    assert answer.bound == pytest.approx(objective_bound(problem_of("tight")))
    assert (answer.unit, answer.status) == ("µs", Status.FEASIBLE)
    assert [entry.objective for entry in answer.history] == [answer.objective]
    alone = solve(problem_of("one GPU", objective="load"), "fake")
    assert (alone.status, alone.stop_reason, alone.gap) == (Status.OPTIMAL, StopReason.PROVEN, 0.0)


def test_a_proof_on_a_sample_says_so() -> None:
    """Copies are counted on a sample; a proof then names its size."""
    problem = problem_of("one GPU", objective="copies")
    sampled = problem.replace(stats=count_routing(make_trace(4, experts=4), sample_tokens=10))
    answer = solve(sampled, "linear")
    assert answer.status is Status.OPTIMAL
    assert answer.notes[-1] == "proved for a sample of 10 of 40 tokens"
    assert not any("sample" in note for note in solve(problem, "linear").notes)


def test_composition_passes_the_placement_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """``a+b`` starts b from a's placement; each gets only its own options; an option of neither is refused."""
    seen: list[tuple[Placement | None, dict[str, str]]] = []

    def answer(problem: Problem, limits: Limits) -> Solution:
        seen.append((problem.start, dict(limits.options)))
        return _honest(problem, problem.start)

    _install(monkeypatch, "fake", answer)
    problem = problem_of("tight")
    first = solve(problem, "eplb", Limits(options={"policy": "global"}))
    both = solve(problem, "eplb+fake", Limits(options={"policy": "global", "depth": "3"}))
    assert first.placement is not None
    assert both.placement is not None
    assert seen[0][0] is not None
    assert seen[0][0].digest() == first.placement.digest() == both.placement.digest()
    assert seen[0][1] == {"depth": "3"}
    assert both.solver == "eplb+fake"
    with pytest.raises(InputError, match="no option 'polcy'") as caught:
        solve(problem, "eplb+fake", Limits(options={"polcy": "global"}))
    assert "depth, policy" in str(caught.value)


def test_auto_takes_the_best_within_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default reports who won and why; a cheaper answer that exceeds the cap does not win."""
    monkeypatch.setattr(
        solvers, "choose", lambda problem: ((solvers.Candidate("linear"), solvers.Candidate("eplb")), "for a test")
    )
    trace = make_trace(0, tokens=4, layers=1, experts=4, top_k=1).replace(
        experts=np.array([0, 0, 1, 1, 2, 3]).reshape(6, 1, 1)[:4]
    )
    stats = count_routing(trace.replace(experts=np.array([0, 1, 0, 1]).reshape(4, 1, 1)))
    problem = make_problem(trace, slow_topology("scale-up:2"), objective="cross").replace(stats=stats)
    free = solve(problem)
    assert (free.solver, free.placement is not None) == ("linear", True)
    assert "auto tried linear, eplb" in free.notes[-1]
    capped = solve(problem.replace(load_cap=1.0))
    assert capped.solver == "eplb"
    assert capped.placement is not None
    assert max_over_mean(capped.placement, stats.load).max() == 1.0
    assert solve(problem, "auto", Limits(options={"policy": "global"})).placement is not None


def test_a_cap_below_the_floor_is_infeasible() -> None:
    """The error names every layer with its cap and floor, and carries the exit code of proven infeasibility."""
    problem = make_problem(make_trace(0, experts=4), "scale-up:4", load_cap=1.0)
    floor = load_floor(problem)
    with pytest.raises(InfeasibleError) as caught:
        solve(problem, "linear")
    assert caught.value.exit_code == 3
    for layer in np.flatnonzero(floor > 1):
        assert f"layer {layer} (cap 1.0000, floor {floor[layer]:.4f})" in caught.value.what
    assert caught.value.hint


def test_an_answer_above_the_cap_is_no_answer() -> None:
    """A method that ignores a cap it could have met loses its placement, and a note says by whom and where."""
    problem = make_problem(make_trace(0, tokens=80, experts=4, layers=1), "scale-up:2", objective="load")
    ratio = objective_value(problem, solve(problem, "linear").placement)  # type: ignore[arg-type]
    best = min(objective_value(problem, placement) for placement in every_placement(problem))
    assert best < ratio
    answer = solve(problem.replace(load_cap=best), "linear")
    assert (answer.placement, answer.status) == (None, Status.UNKNOWN)
    assert "linear exceeds the load cap in 1 layers, first layer 0" in answer.notes[-1]


def test_linear_is_contiguous() -> None:
    """Experts in order, spare slots repeating the first ones, no expert twice on a GPU."""
    tight = solve(problem_of("nodes"), "linear").placement
    assert tight is not None
    assert tight.slots.tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2
    spare = solve(problem_of("one layer").replace(slots_per_gpu=[2, 2, 2, 0]), "linear").placement
    assert spare is not None
    assert spare.slots.tolist() == [[[0, 1], [2, 3], [0, 1], [-1, -1]]]
    full = solve(problem_of("one GPU").replace(slots_per_gpu=[6]), "linear").placement
    assert full is not None
    assert full.slots.tolist() == [[[0, 1, 2, 3, -1, -1]]] * 2


def test_random_is_uniform_over_gpus() -> None:
    """Over 300 seeds an expert is on each GPU about equally often, and layers differ."""
    problem = problem_of("nodes", objective="load")
    found = [load_solver("random").solve(problem, Limits(seed=seed), Report()).placement for seed in range(300)]
    where = np.array([p.copies()[:, :, 0].argmax(axis=1) for p in found if p is not None])
    counts = np.bincount(where[:, 0], minlength=4)
    assert np.abs(counts - 75).max() < 6 * np.sqrt(75)
    assert (where[:, 0] != where[:, 1]).any()


def test_renamed_placements_cost_the_same() -> None:
    """The objective the look-up recomputes does not depend on the names of experts."""
    trace = make_trace(6, tokens=60)
    order = np.random.default_rng(6).permutation(6)
    problem, renamed = (
        make_problem(t, slow_topology("scale-up:3"), redundant=3) for t in (trace, relabel_experts(trace, order))
    )
    answer = solve(problem, "eplb")
    assert answer.placement is not None
    assert objective_value(renamed, relabel_placement(answer.placement, order)) == pytest.approx(answer.objective)


def test_auto_never_answers_worse_than_what_it_names() -> None:
    """With redundant slots auto tries filling them and leaving them empty, and keeps the better one."""
    import moeplace

    trace = moeplace.read_trace(Path(__file__).parents[1] / "traces" / "tinymoe_8x32_top4.npz")
    problem = moeplace.build_problem(trace, topology="scale-out:2x4", redundant=8, batch_requests=8)
    best = moeplace.solve(problem)
    for options in ({}, {"policy": "global"}, {"policy": "global", "copies": "none"}):
        rival = moeplace.solve(problem, "eplb", moeplace.Limits(options=options))
        assert best.objective <= rival.objective * (1 + 1e-9)
    assert any("copies=none" in note for note in best.notes)


def test_a_method_that_cannot_start_from_another_says_so() -> None:
    """``a+b`` notes when b does not use a's placement."""
    import moeplace

    trace = moeplace.read_trace(Path(__file__).parents[1] / "traces" / "hand.jsonl")
    problem = moeplace.build_problem(trace, topology="scale-up:2")
    answer = moeplace.solve(problem, "linear+eplb")
    assert answer.solver == "linear+eplb"
    assert any("eplb does not start from another placement" in note for note in answer.notes)
