"""Robust placements: scenarios, worst mixtures, and the method that loses least on what is left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from shell import Shell
from strategies import make_trace

from moeplace.build import Choices
from moeplace.errors import InputError
from moeplace.objective import objective_value
from moeplace.reduction import counts_of
from moeplace.robust import METHODS, sampled_problem, scenarios_of, solve_robust, union, worst_mixture
from moeplace.solution import Limits
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
