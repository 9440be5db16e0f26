"""Robust placements: scenarios, worst mixtures, and the method that loses least on what is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from shell import Shell
from strategies import make_trace

from moeplace.batches import expert_rows
from moeplace.build import Choices
from moeplace.errors import InputError
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value
from moeplace.reduction import counts_of
from moeplace.robust import (
    METHODS,
    Method,
    _run,
    rooted,
    sampled_problem,
    scenarios_of,
    solve_robust,
    union,
    worst_mixture,
)
from moeplace.solution import Limits, Report
from moeplace.trace import Counts

BRIEF = Limits(work=0.005)
CHOICES = Choices(topology="scale-up:4", objective="load", risk_batches=20, batch_requests=2)


@given(
    values=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=6),
    radius=st.floats(0.0, 1.0),
)
def test_the_worst_mixture_is_the_optimum_of_its_programme(values: list[float], radius: float) -> None:
    """Largest mean over weights within a total variation of equal ones, against a linear programme."""
    n = len(values)
    # weights and distances: max v·q, Σq = 1, |q - 1/n| ≤ d, Σd ≤ 2·radius
    cost = np.concatenate([-np.array(values), np.zeros(n)])
    eye = np.eye(n)
    most = np.block([[eye, -eye], [-eye, -eye], [np.zeros((1, n)), np.ones((1, n))]])
    limit = np.concatenate([np.full(n, 1 / n), np.full(n, -1 / n), [2 * radius]])
    ones = np.concatenate([np.ones(n), np.zeros(n)])[None]
    best = linprog(cost, A_ub=most, b_ub=limit, A_eq=ones, b_eq=[1.0], bounds=(0, None))
    assert worst_mixture(np.array(values), radius) == pytest.approx(-best.fun, rel=1e-6)


def test_the_method_that_loses_least_answers() -> None:
    """Its worst ratio left out is the least of all; regrets are what the objective says, never negative."""
    sources = {name: make_trace(seed, tokens=120, layers=2, experts=8, top_k=2) for seed, name in enumerate("abc")}
    problem, solution, regrets = solve_robust(sources, CHOICES, BRIEF)
    assert regrets.names == ("a", "b", "c")
    worst = {method: ratio.max() for method, ratio in regrets.left_out.items()}
    assert worst[regrets.chosen] == min(worst.values()) <= 1.0
    assert set(worst) == {str(method) for method in METHODS}
    assert solution.placement is not None
    for row, name in zip(regrets.rows(), sources, strict=True):
        value = objective_value(sampled_problem(sources[name], CHOICES), solution.placement)
        assert row[1] == value
        assert row[2] >= 0
    assert any(regrets.chosen in note for note in solution.notes)
    assert solution.objective == pytest.approx(objective_value(problem, solution.placement))


@given(seed=st.integers(0, 1000), counted=st.booleans())
@settings(max_examples=20, deadline=None)
def test_roots_keep_the_order_of_experts_and_shrink_their_ratios(seed: int, counted: bool) -> None:
    """Of tokens' steps as of counts: the ratio of two experts is the root of what it was, and nothing stays nothing."""
    trace = make_trace(seed, tokens=60, layers=2, experts=6, top_k=2)
    steps = counts_of(trace) if counted else sampled_problem(trace, CHOICES).steps
    assert steps is not None
    rows, found = expert_rows(steps), np.moveaxis(rooted(steps).counts, 0, 2)
    assert ((found > 0) == (rows > 0)).all()
    assert found.sum(axis=1) == pytest.approx(np.full(found.sum(axis=1).shape, 1 << 20), abs=6)
    some = rows[:, :1] > 0
    ratio = np.divide(rows, rows[:, :1], out=np.zeros(rows.shape), where=some)
    changed = np.divide(found, found[:, :1], out=np.zeros(rows.shape), where=some)
    assert changed == pytest.approx(np.sqrt(ratio), rel=1e-4)


def test_roots_are_left_out_where_more_than_load_counts() -> None:
    """A cap on copies needs tokens: the method does not take part; a cap on load is kept by it."""
    sources = {name: make_trace(seed, tokens=120, layers=2, experts=8, top_k=2) for seed, name in enumerate("ab")}
    _, _, regrets = solve_robust(sources, replace(CHOICES, copies_cap="2.0"), BRIEF)
    assert not any("roots" in method for method in regrets.left_out)
    problem = sampled_problem(sources["a"], replace(CHOICES, load_cap="eplb"))
    answer = _run(problem, Method("saa", roots=True), BRIEF, Report())
    assert answer.placement is not None
    assert answer.objective == objective_value(problem, answer.placement)
    assert problem.load_cap is not None
    assert (max_over_mean(answer.placement, problem.stats.load) <= problem.load_cap * (1 + 1e-9)).all()


def test_domains_and_counts_are_scenarios_too() -> None:
    """Domains of one trace; counts; the union holds all of them; what is too little or mixed is refused."""
    trace = make_trace(3, tokens=120, layers=2, experts=8, top_k=2)
    counts = counts_of(trace)
    both = {"a": counts, "b": counts_of(make_trace(4, tokens=120, layers=2, experts=8, top_k=2))}
    joined = union(list(both.values()))
    assert isinstance(joined, Counts)
    assert joined.counts.sum() == sum(one.counts.sum() for one in both.values())
    assert set(scenarios_of(both)) == {"a", "b"}
    parted = Counts(
        meta=counts.meta.replace(domains=("x", "y")),
        counts=np.concatenate([one.counts for one in both.values()]),
        domain=np.repeat([0, 1], [counts.num_steps, both["b"].num_steps]),
    )
    assert set(scenarios_of({"one": parted})) == {"x", "y"}
    for wrong in ({"a": counts}, {"a": counts, "b": trace}):
        with pytest.raises(InputError):
            scenarios_of(wrong)
    with pytest.raises(InputError, match="robust placement with objective copies"):
        solve_robust(both, Choices(objective="copies"), BRIEF)


def test_the_command_line_takes_several_traces(shell: Shell) -> None:
    """Several are for --robust alone, which chooses its solver."""
    line = "solve t.npz t.npz -t scale-up:4 --objective load --batch-requests 2 --risk-batches 20 --work 0.005"
    told = shell(f"{line} --robust --json")
    assert told.json["provenance"]["solver"].startswith("robust (")
    assert "left out" in told.out
    assert "several are for --robust" in shell(line, 2).err
    assert "leave out --solver" in shell(f"{line} --robust --solver eplb", 2).err
