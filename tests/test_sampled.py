"""Sampled steps: the evaluator's own values, sound floors, and swaps that lower what they say they lower."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shell import Shell
from strategies import every_placement, make_problem, make_trace, random_placement, slow_topology

from moeplace.affinity import count_routing
from moeplace.batches import BatchLaw, TokenIndex, expert_rows
from moeplace.bounds import objective_bound, worst_weights
from moeplace.errors import InfeasibleError, ProblemError
from moeplace.metrics import copies_per_token, max_over_mean
from moeplace.objective import objective_value, step_values
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.reduction import counts_of
from moeplace.sampled import (
    Costs,
    Search,
    StepTables,
    Wire,
    improve_joint,
    improve_joint_tail,
    improve_mean,
    joint_values,
)
from moeplace.sampled import kernel as kernels
from moeplace.sampled.improve import LayerItems
from moeplace.sampled.joint_kernel import descend_joint
from moeplace.sampled.tables import layer_times
from moeplace.scoring import draw_steps, score
from moeplace.solution import Limits, Status
from moeplace.solvers import choose, solve
from moeplace.tails import RISKS, cvar, risk_value

BRIEF = Limits(work=0.01)


def _problem(seed: int = 0, *, batches: int = 40, risk: str = "p95", topology: str = "scale-up:2", **o: Any) -> Problem:
    shape = {name: o.pop(name) for name in ("layers", "experts", "top_k", "tokens") if name in o}
    trace = make_trace(seed, **({"tokens": 160, "layers": 2, "experts": 6, "top_k": 2} | shape))
    index = TokenIndex.of(trace)
    law = BatchLaw(phase=index.phases()[0], requests=4, tokens=2, batches=batches, seed=seed)
    problem = make_problem(trace, slow_topology(topology), **({"objective": "load"} | o))
    return problem.replace(law=law, steps=draw_steps(trace, index, law), risk=risk)


@pytest.mark.parametrize("risk", RISKS)
@pytest.mark.parametrize("dataflow", ["dispatch-combine", "context-coherent"])
def test_the_objective_is_what_the_evaluator_says(risk: str, dataflow: str) -> None:
    """Step time and load of every step, and their risk, are those of a score on the same steps."""
    trace = make_trace(3, tokens=160, layers=2, experts=6, top_k=2)
    problem = _problem(3, risk=risk, dataflow=dataflow, objective="step-time")
    placement = random_placement(1, problem.slots_per_gpu, 2, 6)
    told = score(
        trace, {"it": placement}, problem.topology, problem.model, phase=problem.law.phase, requests=4, tokens=2,
        batches=40, seed=3, dataflow=dataflow,
    )[0]  # fmt: skip
    assert objective_value(problem, placement) == told.simulation.summary[risk].value
    load = problem.replace(objective="load")
    assert risk_value(told.simulation.step_max_over_mean, risk) == objective_value(load, placement)
    assert told.to_dict()["load"]["step_max_over_mean"][risk]["value"] == pytest.approx(
        objective_value(load, placement)
    )


@pytest.mark.parametrize("objective", ["load", "step-time"])
@pytest.mark.parametrize("slots", [[2, 2], [3, 2], [4, 0]], ids=str)
def test_no_placement_is_below_the_floor(objective: str, slots: list[int]) -> None:
    """By trying all placements of four experts in one layer, whatever the risk, with slow GPUs too."""
    for seed, risk in enumerate(RISKS):
        problem = _problem(
            seed, batches=9, risk=risk, objective=objective, layers=1, experts=4, tokens=40, slots_per_gpu=slots,
            phase=("decode", "prefill")[seed % 2],
        )  # fmt: skip
        unlike = problem.topology.replace(gpu_speed=np.array([0.5, 1.0]))
        for one in (problem, problem.replace(topology=unlike)):
            least = min(objective_value(one, placement) for placement in every_placement(one))
            assert 0 < objective_bound(one) <= least * (1 + 1e-9)


@given(seed=st.integers(0, 500), batches=st.integers(1, 45))
@settings(max_examples=20, deadline=None)
def test_weights_of_the_worst_steps_are_those_of_the_tail(seed: int, batches: int) -> None:
    """They add up to one, none above 1/(0.05·B) or one, and weigh to CVaR95; more steps of the same keep the bound."""
    sample = np.random.default_rng(seed).random(batches)
    weights = worst_weights(sample)
    assert weights.sum() == pytest.approx(1.0)
    assert weights.max() <= min(1.0, 1 / (0.05 * batches)) + 1e-12
    assert weights @ sample == pytest.approx(cvar(sample))


def test_the_tail_has_a_floor_above_that_of_its_steps() -> None:
    """Weighted by what is worst, layers are bounded together; no placement of a small layer is below."""
    for seed in range(6):
        problem = _problem(seed, batches=25, risk="cvar95", layers=1, experts=4, tokens=60, slots_per_gpu=[2, 2])
        least = min(objective_value(problem, placement) for placement in every_placement(problem))
        bound = objective_bound(problem)
        assert objective_bound(problem.replace(risk="mean")) <= bound + 1e-12
        assert bound <= least * (1 + 1e-9)


def test_counts_are_steps_too() -> None:
    """Recorded counts are the steps themselves; the floor holds and saa takes them."""
    trace = make_trace(2, tokens=200, layers=2, experts=6, top_k=2)
    counts = counts_of(trace)
    problem = make_problem(trace, "scale-up:2", objective="load").replace(
        stats=count_routing(counts), steps=counts, risk="cvar95"
    )
    answer = solve(problem, "saa", BRIEF)
    assert answer.placement is not None
    assert answer.bound is not None
    assert answer.bound <= answer.objective <= solve(problem, "linear").objective


def _value(problem: Problem, placement: Placement, weights: np.ndarray) -> float:
    return float((step_values(problem, placement) * weights).sum())


def _search(problem: Problem, **changes: Any) -> Search:
    load = problem.stats.load.astype(np.float64)
    values: dict[str, Any] = {
        "load": load, "cap": np.full(len(load), np.inf), "room": problem.slots_per_gpu, "kicks": 4, "budget": 2000,
        "seed": 0, "threads": 1, "stop": lambda: False,
    }  # fmt: skip
    return Search(**(values | changes))


@given(seed=st.integers(0, 1000), redundant=st.sampled_from([0, 3]))
@settings(max_examples=15, deadline=None)
def test_the_tables_are_the_loads_of_the_steps(seed: int, redundant: int) -> None:
    """Sums of rows are what the evaluator counts; without copies the layers' times add up to its values."""
    problem = _problem(seed, topology="scale-up:3", redundant=redundant)
    tables = StepTables.of(problem)
    assert problem.steps is not None
    assert (expert_rows(problem.steps).sum(axis=1) == 4 * 2 * 2).all()
    if redundant:
        return
    placement = random_placement(seed, problem.slots_per_gpu, 2, 6)
    total = np.zeros(40)
    for layer, slots in enumerate(placement.slots):
        usage = tables.base(3)
        work = tables.work(layer, np.arange(6), np.ones(6, int))
        for g, row in enumerate(slots):
            usage[g] += work[row[row >= 0]].sum(axis=0)
        total += layer_times(usage)
    assert total == pytest.approx(step_values(problem, placement), rel=1e-5)


@given(seed=st.integers(0, 1000), phase=st.sampled_from(["decode", "prefill"]), nodes=st.sampled_from([1, 2, 4]))
@settings(max_examples=12, deadline=None)
def test_step_times_of_the_search_are_those_of_the_evaluator(seed: int, phase: str, nodes: int) -> None:
    """Compute and copies of every step over the links of one domain or several, by either kernel; after swaps too."""
    topology = "scale-up:4" if nodes == 1 else f"scale-out:{nodes}x{4 // nodes}"
    problem = _problem(
        seed, topology=topology, objective="step-time", phase=phase, experts=8, batches=12, slots_per_gpu=[2] * 4
    )
    steps = np.arange(12)
    costs = Costs(replace(StepTables.of(problem), port_us=0.0), Wire.of(problem, steps))
    assert costs.wire is not None
    start, search = random_placement(seed, problem.slots_per_gpu, 2, 8), _search(problem, budget=300)
    better, tail = improve_joint(costs, start, search)[0], improve_joint_tail(costs, start, 0.5, search)
    for placement in (start, better, tail):
        values = step_values(problem, placement)
        assert joint_values(costs, placement, search) == pytest.approx(values, rel=1e-5)
    assert step_values(problem, better).mean() <= step_values(problem, start).mean() * (1 + 1e-6)


def test_a_copies_cap_is_kept_and_weighed_against_the_tail() -> None:
    """Fewer copies than the balanced placement has, at more load; none that cannot be; only with load and tokens."""
    problem = _problem(11, layers=2, experts=8, topology="scale-up:4", risk="p99", batches=60, tokens=400)
    free = solve(problem, "saa", BRIEF).placement
    assert free is not None
    cap = copies_per_token(problem.stats, free, problem.topology) * 0.97
    capped = problem.replace(copies_cap=cap)
    answer = solve(capped, "saa", BRIEF)
    assert answer.placement is not None
    assert copies_per_token(problem.stats, answer.placement, problem.topology) <= cap
    assert solve(capped, "auto", BRIEF).objective <= answer.objective
    with pytest.raises(InfeasibleError, match="need 2 GPUs"):
        solve(_problem(0, top_k=2, slots_per_gpu=[1] * 6, topology="scale-up:6").replace(copies_cap=1.5), "saa")
    balanced = solve(problem.replace(copies_cap=1.0001), "saa", BRIEF)
    assert balanced.placement is None
    assert any("no placement within the cap" in note for note in balanced.notes)
    for wrong in ({"copies_cap": 0.5}, {"copies_cap": 1.5, "objective": "step-time"}):
        with pytest.raises(ProblemError):
            problem.replace(**wrong)


@pytest.mark.parametrize("redundant", [0, 2])
def test_swaps_lower_the_mean_to_the_optimum_of_a_small_layer(redundant: int) -> None:
    """Never worse than the start; without copies, the best of all placements is found."""
    problem = _problem(4, risk="mean", layers=1, redundant=redundant)
    weights = np.full(40, 1 / 40)
    start = random_placement(0, problem.slots_per_gpu, 1, 6)
    found = improve_mean(StepTables.of(problem), start, weights, _search(problem, kicks=20, budget=20_000))
    found.check_fits(problem.slots_per_gpu)
    assert _value(problem, found, weights) <= _value(problem, start, weights) + 1e-6
    if not redundant:
        best = min(_value(problem, one, weights) for one in every_placement(problem) if (one.used_slots() == 3).all())
        assert _value(problem, found, weights) == pytest.approx(best, rel=1e-5)


@given(seed=st.integers(0, 1000), objective=st.sampled_from(["load", "step-time"]))
@settings(max_examples=20, deadline=None)
def test_a_swap_is_turned_down_only_where_it_does_not_help(seed: int, objective: str) -> None:
    """Judged by the steps of its busiest GPUs first: what is taken has its true change, what is not is no less."""
    problem = _problem(seed, layers=1, experts=8, topology="scale-up:4", objective=objective, batches=12)
    start = random_placement(seed, problem.slots_per_gpu, 1, 8)
    tables, weights = StepTables.of(problem), np.random.default_rng(seed).random(12)
    state = LayerItems(start.slots[0], problem.slots_per_gpu, tables, 0, problem.stats.load[0].astype(np.float64))
    work, usage, _, _ = state.arrays()
    groups = 1 if objective == "load" else 2
    top, who = np.zeros((groups, 3, 12), np.float32), np.zeros((groups, 3, 12), np.int16)
    tops = (top, who, np.zeros((groups, 5), np.int64), np.zeros((groups, 12), np.int64), np.zeros((groups, 4)))
    kernels._retop(usage, weights, tops)
    before = float(layer_times(usage) @ weights)
    for first, second in itertools.combinations(range(8), 2):
        g, h = state.where[first], state.where[second]
        if g == h:
            continue
        after = usage.copy()
        after[g] += work[second] - work[first]
        after[h] -= work[second] - work[first]
        true = float(layer_times(after) @ weights) - before
        two, all_of_them = (tuple(array.copy() for array in tops) for _ in range(2))
        kernels._retop_two(g, h, after, weights, two)
        kernels._retop(after, weights, all_of_them)
        assert (two[0] == all_of_them[0]).all()
        assert two[4].sum() == pytest.approx(all_of_them[4].sum())
        for most in (-1e-7 * before, -0.02 * before):
            told = kernels._change(first, second, work, state.where, usage, weights, tops, most)
            assert told == pytest.approx(true, abs=1e-5 * before) if told < most else true >= most - 1e-5 * before


def test_the_tail_is_lowered_where_it_is_asked_for() -> None:
    """All weight on the worst steps: their mean falls and never rises."""
    problem = _problem(5, layers=3, experts=8, topology="scale-up:4", risk="cvar95", batches=60)
    start = solve(problem, "linear").placement
    assert start is not None
    found = improve_joint_tail(Costs(StepTables.of(problem), None), start, 1.0, _search(problem, budget=3000))
    assert cvar(step_values(problem, found)) < cvar(step_values(problem, start))


def test_caps_hold_and_copies_stay_apart() -> None:
    """Under a cap on mean load no swap exceeds it; no GPU gets two copies of an expert."""
    problem = _problem(6, layers=2, experts=8, topology="scale-up:4", redundant=4)
    start = solve(problem.replace(steps=None, risk="mean"), "balance").placement
    assert start is not None
    load = problem.stats.load.astype(np.float64)
    cap = start.gpu_load(load).max(axis=1) * 1.02
    for found in (
        improve_mean(StepTables.of(problem), start, np.full(40, 1 / 40), _search(problem, cap=cap)),
        improve_joint_tail(Costs(StepTables.of(problem), None), start, 0.5, _search(problem, cap=cap)),
        improve_joint(Costs(StepTables.of(problem), None), start, _search(problem, cap=cap))[0],
    ):
        assert (found.gpu_load(load).max(axis=1) <= cap * (1 + 1e-9)).all()
        assert not found.duplicates()


def test_what_is_done_in_seconds_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By layers, steps, swaps and words of tokens, not by the budget alone; much work is compiled."""
    compiled: list[str] = []

    def ask(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(name)
        return plain

    monkeypatch.setattr("moeplace.sampled.improve.compiled_mean", partial(ask, "mean", kernels.descend_and_kick))
    monkeypatch.setattr("moeplace.sampled.joint.compiled_joint", partial(ask, "joint", descend_joint))
    problem = _problem(8, risk="p99", layers=1, experts=4, batches=16)
    assert solve(problem, "saa", Limits(work=0.001)).placement is not None
    assert not compiled
    start = random_placement(0, problem.slots_per_gpu, 1, 4)
    wide = _search(problem, kicks=10**6, budget=10**6, stop=lambda: True)
    costs = Costs(StepTables.of(problem), Wire.of(problem, np.arange(16), price=0.01))
    improve_mean(costs.tables, start, np.full(16, 1 / 16), wide)
    improve_joint(costs, start, wide)
    assert compiled == ["mean", "joint"]


@pytest.mark.slow
def test_compiled_loops_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without compilation, mean and tail, one channel and three."""
    for objective in ("load", "step-time"):
        problem = _problem(7, layers=2, experts=8, topology="scale-up:4", objective=objective)
        start = random_placement(0, problem.slots_per_gpu, 2, 8)
        found = []
        for limit in (10**18, 0):
            with monkeypatch.context() as patch:
                patch.setattr("moeplace.sampled.improve.COMPILE_FROM", limit)
                mean = improve_mean(StepTables.of(problem), start, np.full(40, 1 / 40), _search(problem))
                patch.setattr("moeplace.sampled.joint.COMPILE_FROM", limit)
                patch.setattr("moeplace.sampled.tokens.COMPILE_FROM", limit)
                costs = Costs(StepTables.of(problem), Wire.of(problem, np.arange(40), price=0.01))
                tail = improve_joint_tail(costs, mean, 0.5, _search(problem))
                found.append((mean.digest(), tail.digest()))
        assert found[0] == found[1]
    assert kernels.compiled_mean() is kernels.compiled_mean()


@pytest.mark.parametrize(("risk", "objective"), [("mean", "load"), ("p99", "load"), ("cvar95", "step-time")])
def test_saa_is_not_worse_than_its_start(risk: str, objective: str) -> None:
    """From balance, on the steps themselves; its figures are recomputed, its note tells of steps kept apart."""
    problem = _problem(8, layers=2, experts=8, topology="scale-up:4", risk=risk, objective=objective)
    start, answer = solve(problem, "balance"), solve(problem, "balance+saa", BRIEF)
    assert answer.objective <= start.objective
    assert answer.status in (Status.FEASIBLE, Status.OPTIMAL)
    assert any("kept apart" in note for note in answer.notes)


def test_the_result_does_not_depend_on_threads() -> None:
    """One seed, one answer."""
    problem = _problem(9, layers=3, experts=8, topology="scale-up:4", risk="p99")
    one, two = (solve(problem, "saa", BRIEF.replace(threads=threads)).placement for threads in (1, 2))
    assert one is not None
    assert two is not None
    assert one.digest() == two.digest()


def test_a_cap_is_kept_and_a_stop_is_heeded() -> None:
    """A hard cap holds on the whole trace; a stopped run returns what it has."""
    problem = _problem(10, layers=2, experts=8, topology="scale-up:4")
    balanced = solve(problem.replace(steps=None, risk="mean"), "balance").placement
    assert balanced is not None
    cap = max_over_mean(balanced, problem.stats.load) * 1.05
    answer = solve(problem.replace(load_cap=cap), "saa", BRIEF)
    assert answer.placement is not None
    assert (max_over_mean(answer.placement, problem.stats.load) <= cap * (1 + 1e-9)).all()
    limits = Limits()
    limits.stop.set()
    assert solve(problem, "saa", limits).placement is not None


def test_what_has_no_tail_is_refused() -> None:
    """A tail without steps, of copies, and solvers for the mean step."""
    plain = _problem(0).replace(steps=None, risk="mean")
    with pytest.raises(ProblemError, match="without steps"):
        plain.replace(risk="p99")
    with pytest.raises(ProblemError, match="risk p95 of copies"):
        _problem(0).replace(objective="copies")
    refused: list[Callable[[], Any]] = [lambda: solve(plain, "saa"), lambda: solve(_problem(0), "ilp")]
    for call in refused:
        with pytest.raises(ProblemError):
            call()
    assert "saa" in [candidate.name for candidate in choose(_problem(0))[0]]


def test_the_command_line_draws_steps(shell: Shell) -> None:
    """--risk draws them, and says what the answer is of."""
    done = shell(
        "solve t.npz -t scale-up:4 --risk p99 --objective load --batch-requests 8 --risk-batches 40 --work 0.01 --json"
    )
    assert done.json["provenance"]["solver"] in ("saa", "balance", "eplb", "linear")
    assert done.json["bound"] <= done.json["objective"]["value"]
    shell.fails("solve t.npz -t scale-up:4 --risk p99 --objective copies", "risk p99 of copies")
    capped = "solve t.npz -t scale-up:4 --objective load --risk-batches 40 --work 0.01 --json --copies-cap"
    plain = "solve t.npz -t scale-up:4 --objective load --risk-batches 40 --solver eplb --json"
    told = shell(plain).json["terms"]["copies_per_token_gpu"]["value"]
    assert shell(f"{capped} eplb-1%").json["terms"]["copies_per_token_gpu"]["value"] <= told * 0.99 + 1e-9
    shell.fails(f"{capped} eplb-x", "eplb-6%")
