"""The joint problem as a mixed-integer linear programme, by CBC or HiGHS: all layers together, for small instances.

Every objective, with load caps, uneven and spare slots; see :mod:`moeplace.joint` for the programme and what it leaves
out. Linear relaxations make its bounds; its sister ``cpsat`` solves the same programme by clauses.

CBC is the default: it takes the start, tells incumbents, keeps them when it is stopped, and was quicker on six of eight
instances of 2 to 4 layers of 8 experts. HiGHS proved one of load with copies that CBC did not within 20 s.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeplace.joint import solve_jointly
from moeplace.milp import backend
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution

DESCRIPTION = "all layers in one integer programme by CBC or HiGHS: small instances to proof, any objective"
USES_START = True
OPTIONS: Mapping[str, str] = {"backend": "cbc (PuLP's, default), highs (SciPy's) or cpsat (OR-Tools)"}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Solve the joint programme with the backend that is asked for."""
    return solve_jointly(problem, limits, report, "ilp", backend(limits.options.get("backend", "cbc")))
