"""The joint problem by CP-SAT: all layers in one integer programme, for small instances.

Every objective, with load caps, uneven and spare slots; see :mod:`moeplace.joint` for the programme and what it leaves
out. CP-SAT starts from the balanced or given placement, tells its incumbents and bounds, and stops within a moment.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeplace.joint import solve_jointly
from moeplace.milp import solve_cpsat
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution

DESCRIPTION = "all layers in one integer programme by CP-SAT (OR-Tools): small instances to proof, any objective"
USES_START = True
OPTIONS: Mapping[str, str] = {}


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Solve the joint programme with CP-SAT."""
    return solve_jointly(problem, limits, report, "cpsat", solve_cpsat)
