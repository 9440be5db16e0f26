"""What every solver is tested on: small problems, the kind each is made for, and what an answer must be."""

from __future__ import annotations

from typing import Any

import pytest
from strategies import (
    make_problem,
    make_trace,
    random_placement,
    slow_topology,
)

from moeplace.batches import BatchLaw, TokenIndex
from moeplace.errors import InputError, MissingExtraError, ProblemError
from moeplace.objective import objective_value
from moeplace.problem import Problem
from moeplace.scoring import draw_steps
from moeplace.solution import Limits, Solution, Status
from moeplace.solvers import load_solver, solve

LIMITS = Limits(time_limit_s=20.0)
WORK = {"search": 0.05}  # where all of the usual work takes long on the smallest problems
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


def problem_of(shape: str, **options: Any) -> Problem:
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


def suited(name: str, shape: str, **options: Any) -> Problem:
    """Build the problem of a shape that a method is made for."""
    return problem_of(shape, **{**SUITED.get(name, {}), **options})


def needed(name: str) -> None:
    """Skip where a method's extra is not installed."""
    try:
        load_solver(name)
    except ImportError as error:
        pytest.skip(f"{name} needs {error.name}")


def attempt(name: str, problem: Problem, limits: Limits = LIMITS) -> Solution:
    """Solve, or skip where a method's extra is missing or it does not do this kind of problem."""
    needed(name)
    try:
        return solve(problem, name, limits.replace(work=limits.work * WORK.get(name, 1.0)))
    except (ProblemError, InputError, MissingExtraError) as refusal:
        pytest.skip(f"{name} does not take this problem: {refusal.what}")


def answer_of(name: str, problem: Problem, limits: Limits = LIMITS) -> Solution:
    """Solve a problem that a method must take; skip only where its extra is missing."""
    needed(name)
    try:
        return solve(problem, name, limits.replace(work=limits.work * WORK.get(name, 1.0)))
    except MissingExtraError as refusal:
        pytest.skip(f"{name}: {refusal.what}")


def check(name: str, problem: Problem, answer: Solution) -> None:
    """Assert what holds of every answer with a placement."""
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
