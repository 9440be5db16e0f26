"""The contract of every solver, and of the look-up that verifies their answers."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
from moeplace.batches import BatchLaw, Steps, TokenIndex
from moeplace.bounds import load_floor, objective_bound
from moeplace.errors import InfeasibleError, InputError, MissingExtraError, ProblemError, SolverError, UnknownNameError
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value
from moeplace.placement import Placement
from moeplace.problem import OBJECTIVES, Problem
from moeplace.scoring import draw_steps
from moeplace.solution import Limits, Report, Solution, Status, StopReason
from moeplace.solvers import list_solvers, load_solver, solve

LIMITS = Limits(time_limit_s=20.0)
SHAPES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {  # a trace, a topology, a problem
    "tight": ({"seed": 0, "tokens": 80, "experts": 4}, "scale-up:2", {}),
    "nodes": ({"seed": 1, "tokens": 80, "experts": 8}, "scale-out:2x2", {}),
    "two nodes": ({"seed": 1, "tokens": 80, "experts": 4}, "scale-out:2x1", {}),
    "uneven": ({"seed": 2, "tokens": 80, "experts": 5}, "scale-up:2", {}),
    "copies": ({"seed": 3, "tokens": 80}, "scale-up:3", {"redundant": 4}),
    "one GPU": ({"seed": 4, "experts": 4}, "scale-up:1", {}),
    "one layer": ({"seed": 5, "layers": 1, "experts": 4, "top_k": 4}, "scale-up:4", {}),
}
CROSS = {"objective": "cross", "dataflow": "context-coherent"}
SUITED: dict[str, dict[str, Any]] = {  # what a method is made for, where it is not the step time of any trace
    "exact": CROSS,
    "exflow": {"top_k": 1},
    "fanout": {"objective": "copies", "routing": "fewest-gpus"},
    "kahypar": {"objective": "copies"},
    "nearby": {"objective": "remote", "routing": "topology-aware"},
    "prefill-dup": {"redundant": 4},
    "saa": {"sampled": True},
    "search": CROSS,
    "setpart": {"objective": "copies"},
    "swift": {"deployed": True},
    "transport": {"ranks": True},
}


def _problem(shape: str, **options: Any) -> Problem:
    """Build a problem of a shape; ``options``: its fields, and ``top_k``, ``ranks``, ``sampled``, ``deployed``."""
    traced, spec, own = SHAPES[shape]
    traced, topology = dict(traced), slow_topology(spec)
    traced["top_k"] = options.pop("top_k", traced.get("top_k", 2))
    if options.pop("ranks", False):
        traced["ranks"] = topology.num_gpus
    trace = make_trace(**traced)
    sampled, deployed = options.pop("sampled", False), options.pop("deployed", False)
    problem = make_problem(trace, topology, **{**own, **options})
    if sampled:
        problem = problem.replace(
            steps=draw_steps(trace, TokenIndex.of(trace), BatchLaw(phase="decode", requests=4, batches=8))
        )
    if deployed:
        where = random_placement(0, problem.slots_per_gpu, problem.num_layers, problem.num_experts)
        problem = problem.replace(baseline=where)
    return problem


def _suited(name: str, shape: str, **options: Any) -> Problem:
    """Build the problem of a shape that a method is made for."""
    return _problem(shape, **{**SUITED.get(name, {}), **options})


def _needed(name: str) -> None:
    """Skip where a method's extra is not installed."""
    try:
        load_solver(name)
    except ImportError as error:
        pytest.skip(f"{name} needs {error.name}")


def _attempt(name: str, problem: Problem, limits: Limits = LIMITS) -> Solution:
    """Solve, or skip where a method's extra is missing or it does not do this kind of problem."""
    _needed(name)
    try:
        return solve(problem, name, limits)
    except (ProblemError, InputError, MissingExtraError) as refusal:
        pytest.skip(f"{name} does not take this problem: {refusal.what}")


def _answer(name: str, problem: Problem, limits: Limits = LIMITS) -> Solution:
    """Solve a problem that a method must take; skip only where its extra is missing."""
    _needed(name)
    try:
        return solve(problem, name, limits)
    except MissingExtraError as refusal:
        pytest.skip(f"{name}: {refusal.what}")


def _check(name: str, problem: Problem, answer: Solution) -> None:
    assert answer.placement is not None
    answer.placement.check_fits(problem.slots_per_gpu, whole_model=problem.whole_model)
    assert answer.objective == objective_value(problem, answer.placement)
    if answer.bound is not None:
        assert 0 <= answer.bound <= answer.objective
    if answer.status is Status.OPTIMAL:
        assert answer.gap == pytest.approx(0, abs=1e-6)
    assert answer.status in (Status.OPTIMAL, Status.FEASIBLE)
    assert answer.solver == name
    assert answer.unit
    assert "load_max_over_mean_mean" in answer.terms


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list_solvers())
def test_answers_are_valid_and_bounded(name: str, shape: str, objective: str) -> None:
    """A placement in its slots, the recomputed value, a bound below it, an honest status."""
    problem = _problem(shape, objective=objective)
    _check(name, problem, _attempt(name, problem))


@pytest.mark.parametrize("shape", ["two nodes", "nodes"])
@pytest.mark.parametrize("name", list_solvers())
def test_every_method_takes_what_it_is_made_for(name: str, shape: str) -> None:
    """No method refuses its own kind of problem, and its answers to it keep the contract."""
    problem = _suited(name, shape)
    _check(name, problem, _answer(name, problem))


@pytest.mark.parametrize("name", list_solvers())
def test_same_seed_same_bytes(name: str) -> None:
    """The same problem, seed and work give the same placement, objective, bound and status, whatever the threads."""
    problem = _suited(name, "nodes")
    one, other = (_answer(name, problem, LIMITS.replace(seed=3, threads=threads)) for threads in (1, 2))
    assert one.placement is not None
    assert other.placement is not None
    assert one.placement.digest() == other.placement.digest()
    assert (one.objective, one.bound, one.status, one.stop_reason) == (
        other.objective,
        other.bound,
        other.status,
        other.stop_reason,
    )


@pytest.mark.parametrize("name", list_solvers())
@pytest.mark.parametrize("objective", ["load", "own"])
def test_renaming_experts_keeps_what_is_proved(name: str, objective: str) -> None:
    """A solver that reports OPTIMAL finds the same value when experts are renamed; bounds never depend on names."""
    order = np.random.default_rng(0).permutation(4)
    options = {} if objective == "own" else {"objective": objective}
    problem = _suited(name, "two nodes", **options)
    sample = problem.stats.sample
    assert sample is not None
    renamed = problem.replace(stats=count_routing(relabel_experts(sample, order)))
    if problem.steps is not None:
        assert isinstance(problem.steps, Steps)
        renamed = renamed.replace(steps=replace(problem.steps, trace=relabel_experts(problem.steps.trace, order)))
    if problem.baseline is not None:
        renamed = renamed.replace(baseline=relabel_placement(problem.baseline, order))
    found = [(_answer if objective == "own" else _attempt)(name, one) for one in (problem, renamed)]
    if found[0].status is Status.OPTIMAL and found[1].status is Status.OPTIMAL:
        assert found[1].objective == pytest.approx(found[0].objective)


@pytest.mark.parametrize("name", list_solvers())
@pytest.mark.parametrize("objective", [*OBJECTIVES, "own"])
def test_a_proof_is_a_proof(name: str, objective: str) -> None:
    """No placement of all there are is better than an answer called OPTIMAL, nor than any answer's bound."""
    problem = _suited(name, "two nodes") if objective == "own" else _problem("two nodes", objective=objective)
    answer = (_answer if objective == "own" else _attempt)(name, problem)
    best = min(objective_value(problem, placement) for placement in every_placement(problem))
    assert answer.objective >= best * (1 - 1e-9)
    if answer.bound is not None:
        assert answer.bound <= best * (1 + 1e-6) + 1e-9
    if answer.status is Status.OPTIMAL:
        assert answer.objective == pytest.approx(best)


@pytest.mark.parametrize("name", list_solvers())
def test_a_start_is_welcome(name: str) -> None:
    """A starting placement is accepted, whether the method uses it or not."""
    problem = _suited(name, "nodes")
    start = random_placement(0, problem.slots_per_gpu, 2, 8)
    assert _answer(name, problem.replace(start=start)).placement is not None


@pytest.mark.parametrize("name", list_solvers())
def test_no_answer_is_worse_than_its_start(name: str) -> None:
    """A method that uses its start never gives it up for a worse placement, be it its own best or a random one."""
    _needed(name)
    if not getattr(load_solver(name), "USES_START", False):
        return  # it is not asked to
    problem = _suited(name, "nodes")
    best = _answer(name, problem).placement
    for start in (best, random_placement(1, problem.slots_per_gpu, 2, 8)):
        assert start is not None
        again = _answer(name, problem.replace(start=start), LIMITS.replace(seed=5, work=0.05))
        assert again.objective <= objective_value(problem, start) * (1 + 1e-9)


@pytest.mark.parametrize("name", list_solvers())
def test_an_interrupt_still_answers(name: str) -> None:
    """With the stop flag set from the start a solver returns soon with a valid answer or says that it has none."""
    limits = Limits(time_limit_s=20.0)
    limits.stop.set()
    answer = _answer(name, _suited(name, "two nodes"), limits)
    assert (answer.placement is None) == (answer.status in (Status.UNKNOWN, Status.INFEASIBLE))


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
        solve(_problem("tight"), "liner")
    with pytest.raises(UnknownNameError):
        solve(_problem("tight"), "linear+")


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
    problem = _problem("tight")
    if lie == "doubles":
        problem = problem.replace(slots_per_gpu=[4, 4])
    with pytest.raises((SolverError, ProblemError, InputError), match=words):
        solve(problem, "fake")


def test_an_honest_answer_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up adds the certified bound, terms, unit and history to an honest answer, and proves what it can."""
    _install(monkeypatch, "fake", lambda problem, limits: _honest(problem))
    report = Report()
    answer = solve(_problem("tight"), "fake", report=report)
    assert answer.bound == pytest.approx(objective_bound(_problem("tight")))
    assert (answer.unit, answer.status) == ("µs", Status.FEASIBLE)
    assert [entry.objective for entry in answer.history] == [answer.objective]
    alone = solve(_problem("one GPU", objective="load"), "fake")
    assert (alone.status, alone.stop_reason, alone.gap) == (Status.OPTIMAL, StopReason.PROVEN, 0.0)


def test_a_proof_on_a_sample_says_so() -> None:
    """Copies are counted on a sample; a proof then names its size."""
    problem = _problem("one GPU", objective="copies")
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
    problem = _problem("tight")
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
    tight = solve(_problem("nodes"), "linear").placement
    assert tight is not None
    assert tight.slots.tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2
    spare = solve(_problem("one layer").replace(slots_per_gpu=[2, 2, 2, 0]), "linear").placement
    assert spare is not None
    assert spare.slots.tolist() == [[[0, 1], [2, 3], [0, 1], [-1, -1]]]
    full = solve(_problem("one GPU").replace(slots_per_gpu=[6]), "linear").placement
    assert full is not None
    assert full.slots.tolist() == [[[0, 1, 2, 3, -1, -1]]] * 2


def test_random_is_uniform_over_gpus() -> None:
    """Over 300 seeds an expert is on each GPU about equally often, and layers differ."""
    problem = _problem("nodes", objective="load")
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
