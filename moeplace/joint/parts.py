"""What the objectives have in common: a sum to minimise, and variables that a placement determines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moeplace.frozen import Floats
from moeplace.joint.decision import Terms
from moeplace.milp import LinearModel
from moeplace.placement import Placement

WIDER = 1 + 1e-6  # bounds of epigraphs are computed in float64


@dataclass(slots=True, kw_only=True)
class Part:
    """An objective's share of the model.

    Attributes
    ----------
    costs
        Terms to minimise.
    scale
        The sum of ``costs`` is ``scale`` times the problem's objective.
    complete
        Write the values of the part's variables for a placement into a point.
    """

    costs: Terms
    scale: float
    complete: Callable[[Floats, Placement], None]


@dataclass(slots=True)
class Epigraphs:
    """Continuous variables that are at least some sums, and at their least at an optimum.

    They are kept in the order in which they were made, so that one may stand in the sums of a later one.
    """

    model: LinearModel
    made: list[tuple[int, list[tuple[Terms, float]]]] = field(default_factory=list)

    def at_least(self, name: str, sums: list[tuple[Terms, float]]) -> int:
        """Return a new variable ``≥ Σ terms + constant`` for each of ``sums``, of binaries and earlier epigraphs.

        Its upper bound is the most that any of the sums can be, its lower bound the least that all can.
        """
        lower = upper = 0.0
        for terms, constant in sums:
            low, high = self._range(terms)
            lower, upper = max(lower, low + constant), max(upper, high + constant)
        variable = self.model.continuous(name, lower / WIDER, upper * WIDER)
        for terms, constant in sums:
            if terms:
                self.model.add([(variable, 1.0), *((v, -a) for v, a in terms)], constant)
        self.made.append((variable, sums))
        return variable

    def _range(self, terms: Terms) -> tuple[float, float]:
        low = high = 0.0
        for v, a in terms:
            ends = a * self.model.lower[v], a * self.model.upper[v]
            low, high = low + min(ends), high + max(ends)
        return low, high

    def complete(self, point: Floats) -> None:
        """Give each variable the largest of its sums."""
        for variable, sums in self.made:
            most = max((sum(a * point[v] for v, a in terms) + constant for terms, constant in sums), default=0.0)
            point[variable] = max(self.model.lower[variable], most)

    def tighten(self, most: float, point: Floats, costs: Terms) -> None:
        """Lower the upper bounds of variables that cost: no optimum costs more than ``most``."""
        least = sum(a * self.model.lower[v] for v, a in costs)
        for v, a in costs:
            upper = (most - least) / a + self.model.lower[v]
            self.model.upper[v] = max(min(self.model.upper[v], upper * WIDER), float(np.nextafter(point[v], np.inf)))
