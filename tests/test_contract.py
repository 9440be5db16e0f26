"""The contract of every solver: answers to every kind of small problem are valid and bounded."""

from __future__ import annotations

import pytest
from contract import SHAPES, attempt, check, problem_of

from moeplace.problem import OBJECTIVES
from moeplace.solvers import list_solvers


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list_solvers())
def test_answers_are_valid_and_bounded(name: str, shape: str, objective: str) -> None:
    """A placement in its slots, the recomputed value, a bound below it, an honest status."""
    problem = problem_of(shape, objective=objective)
    check(name, problem, attempt(name, problem))
