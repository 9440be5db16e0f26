"""The contract of every solver on the problem it is made for: proofs, starts, seeds, names, interrupts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from contract import LIMITS, answer_of, attempt, check, needed, problem_of, suited
from strategies import (
    every_placement,
    random_placement,
    relabel_experts,
    relabel_placement,
)

from moeplace.affinity import count_routing
from moeplace.batches import Steps
from moeplace.objective import objective_value
from moeplace.problem import OBJECTIVES
from moeplace.solution import Limits, Status
from moeplace.solvers import list_solvers, load_solver


@pytest.mark.parametrize("shape", ["two nodes", "nodes"])
@pytest.mark.parametrize("name", list_solvers())
def test_every_method_takes_what_it_is_made_for(name: str, shape: str) -> None:
    """No method refuses its own kind of problem, and its answers to it keep the contract."""
    problem = suited(name, shape)
    check(name, problem, answer_of(name, problem))


@pytest.mark.parametrize("name", list_solvers())
def test_same_seed_same_bytes(name: str) -> None:
    """The same problem, seed and work give the same placement, objective, bound and status, whatever the threads."""
    problem = suited(name, "nodes")
    one, other = (answer_of(name, problem, LIMITS.replace(seed=3, threads=threads)) for threads in (1, 2))
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
    problem = suited(name, "two nodes", **options)
    sample = problem.stats.sample
    assert sample is not None
    renamed = problem.replace(stats=count_routing(relabel_experts(sample, order)))
    if problem.steps is not None:
        assert isinstance(problem.steps, Steps)
        renamed = renamed.replace(steps=replace(problem.steps, trace=relabel_experts(problem.steps.trace, order)))
    if problem.baseline is not None:
        renamed = renamed.replace(baseline=relabel_placement(problem.baseline, order))
    found = [(answer_of if objective == "own" else attempt)(name, one) for one in (problem, renamed)]
    if found[0].status is Status.OPTIMAL and found[1].status is Status.OPTIMAL:
        assert found[1].objective == pytest.approx(found[0].objective)


@pytest.mark.parametrize("name", list_solvers())
@pytest.mark.parametrize("objective", [*OBJECTIVES, "own"])
def test_a_proof_is_a_proof(name: str, objective: str) -> None:
    """No placement of all there are is better than an answer called OPTIMAL, nor than any answer's bound."""
    problem = suited(name, "two nodes") if objective == "own" else problem_of("two nodes", objective=objective)
    answer = (answer_of if objective == "own" else attempt)(name, problem)
    best = min(objective_value(problem, placement) for placement in every_placement(problem))
    assert answer.objective >= best * (1 - 1e-9)
    if answer.bound is not None:
        assert answer.bound <= best * (1 + 1e-6) + 1e-9
    if answer.status is Status.OPTIMAL:
        assert answer.objective == pytest.approx(best)


@pytest.mark.parametrize("name", list_solvers())
def test_a_start_is_welcome(name: str) -> None:
    """A starting placement is accepted, whether the method uses it or not."""
    problem = suited(name, "nodes")
    start = random_placement(0, problem.slots_per_gpu, 2, 8)
    assert answer_of(name, problem.replace(start=start)).placement is not None


@pytest.mark.parametrize("name", list_solvers())
def test_no_answer_is_worse_than_its_start(name: str) -> None:
    """A method that uses its start never gives it up for a worse placement, be it its own best or a random one."""
    needed(name)
    if not getattr(load_solver(name), "USES_START", False):
        return  # it is not asked to
    problem = suited(name, "nodes")
    best = answer_of(name, problem).placement
    for start in (best, random_placement(1, problem.slots_per_gpu, 2, 8)):
        assert start is not None
        again = answer_of(name, problem.replace(start=start), LIMITS.replace(seed=5, work=0.05))
        assert again.objective <= objective_value(problem, start) * (1 + 1e-9)


@pytest.mark.parametrize("name", list_solvers())
def test_an_interrupt_still_answers(name: str) -> None:
    """With the stop flag set from the start a solver returns soon with a valid answer or says that it has none."""
    limits = Limits(time_limit_s=20.0)
    limits.stop.set()
    answer = answer_of(name, suited(name, "two nodes"), limits)
    assert (answer.placement is None) == (answer.status in (Status.UNKNOWN, Status.INFEASIBLE))
