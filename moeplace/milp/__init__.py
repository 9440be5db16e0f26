"""Mixed-integer linear models without a solver's name in them, and three solvers that take them.

Build a :class:`LinearModel`, choose a backend by name, read a :class:`MilpResult`. What a backend claims is not
believed: values are rounded, completed, checked and costed again by :mod:`moeplace.milp.model`.
"""

from __future__ import annotations

from moeplace.errors import unknown_name
from moeplace.milp.cbc import solve_cbc
from moeplace.milp.cpsat import solve_cpsat
from moeplace.milp.highs import solve_highs
from moeplace.milp.model import Backend, Budget, LinearModel, MilpResult, OnIncumbent

BACKENDS: dict[str, Backend] = {"cbc": solve_cbc, "cpsat": solve_cpsat, "highs": solve_highs}


def backend(name: str) -> Backend:
    """The backend called ``name``, one of :data:`BACKENDS`; raises :class:`~moeplace.errors.UnknownNameError`."""
    if name not in BACKENDS:
        raise unknown_name("backend", name, sorted(BACKENDS))
    return BACKENDS[name]


__all__ = [
    "BACKENDS",
    "Backend",
    "Budget",
    "LinearModel",
    "MilpResult",
    "OnIncumbent",
    "backend",
    "solve_cbc",
    "solve_cpsat",
    "solve_highs",
]
