r"""Set partitioning: columns that cover every expert once, at the least cost.

    min Σ_S c_S·x_S   subject to  Σ_{S∋e} x_S = 1 for every expert e,  Σ_{|S|=s} x_S = n_s for every size s

HiGHS, through SciPy, solves its relaxation and the integer programme: on the same columns CP-SAT with one worker took
1.6 to over 500 times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.columns import Pool

SLACK = 1e-6  # of an integer programme's bound, in tokens


@dataclass(frozen=True, slots=True)
class Relaxation:
    """Optimum of the relaxation over some columns: its value, and the dual prices ``[expert]``, ``[size class]``."""

    value: float
    price: Floats


@dataclass(frozen=True, slots=True)
class Choice:
    """What an integer programme came to: the columns chosen (None: none found), a lower bound, and whether it ended."""

    rows: Ints | None
    bound: float
    complete: bool


class Master:
    """The rows of a layer's set partitioning.

    Parameters
    ----------
    num_experts
        Experts of the layer.
    groups
        Size → how many GPUs hold that many experts.
    dear
        Cost of leaving an expert out of the relaxation, which keeps it feasible.
    """

    def __init__(self, num_experts: int, groups: Mapping[int, int], dear: float) -> None:
        self.num_experts, self.groups, self.dear = num_experts, dict(groups), dear
        # with one size the number of columns follows from the experts they cover
        self.classes = sorted(groups) if len(groups) > 1 else []
        self.right = np.array([1.0] * num_experts + [float(groups[size]) for size in self.classes])

    def _matrix(self, pool: Pool) -> tuple[Ints, Ints]:
        column, place = np.nonzero(pool.members >= 0)
        row = pool.members[column, place]
        for number, size in enumerate(self.classes):
            own = np.flatnonzero(pool.sizes == size)
            row = np.append(row, np.full(len(own), self.num_experts + number))
            column = np.append(column, own)
        return row, column

    def relax(self, pool: Pool) -> Relaxation:
        """Solve the relaxation over the columns of ``pool``."""
        from scipy.optimize import linprog
        from scipy.sparse import csc_matrix

        rows, count = len(self.right), len(pool)
        row, column = self._matrix(pool)
        row = np.concatenate([row, np.arange(rows)])
        column = np.concatenate([column, count + np.arange(rows)])
        unit = max(1.0, self.dear / 4)  # costs near 1 suit HiGHS's tolerances
        cost = np.concatenate([pool.cost, np.full(rows, self.dear)]) / unit
        matrix = csc_matrix((np.ones(len(row)), (row, column)), shape=(rows, count + rows))
        result = linprog(cost, A_eq=matrix, b_eq=self.right, bounds=(0, None), method="highs")
        if result.status != 0:  # never where it is feasible and bounded, as it always is
            return Relaxation(np.inf, np.zeros(self.num_experts))
        return Relaxation(float(result.fun) * unit, result.eqlin.marginals[: self.num_experts] * unit)

    def bound(self, price: Floats, least: Mapping[int, float]) -> float:
        """Lower bound on every partition by prices and the least reduced cost of each size (Lagrange).

        Valid for any prices; the rounding of sums of float64 is taken off.
        """
        total = float(price.sum()) + sum(count * least[size] for size, count in self.groups.items())
        scale = float(np.abs(price).sum()) + sum(count * abs(least[size]) for size, count in self.groups.items())
        return total - 1e-11 * scale if np.isfinite(total) else total

    def choose(self, pool: Pool, *, nodes: int, seconds: float, gap: float = 0.0) -> Choice:
        """Choose columns that partition the experts at the least cost.

        Parameters
        ----------
        pool
            Columns to choose from.
        nodes
            Most nodes of the search: the answer does not depend on the clock where these are what ends it.
        seconds
            Safety stop.
        gap
            Relative gap at which to stop.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csc_matrix

        if not len(pool):
            return Choice(None, np.inf, True)
        row, column = self._matrix(pool)
        matrix = csc_matrix((np.ones(len(row)), (row, column)), shape=(len(self.right), len(pool)))
        result = milp(
            pool.cost.astype(np.float64),
            integrality=np.ones(len(pool)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, self.right, self.right),
            options={"mip_rel_gap": gap, "node_limit": nodes, "time_limit": max(0.01, seconds)},
        )
        if result.status == 2:
            return Choice(None, np.inf, True)
        bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) - SLACK
        rows = None if result.x is None else np.flatnonzero(result.x > 0.5)
        if rows is not None and not self.covers(pool.take(rows)):
            rows = None
        return Choice(rows, bound, result.status == 0)

    def covers(self, chosen: Pool) -> bool:
        """Whether columns cover every expert once and have the right sizes."""
        held = np.sort(chosen.members[chosen.members >= 0])
        right = np.array_equal(held, np.arange(self.num_experts))
        return right and all(int((chosen.sizes == size).sum()) == count for size, count in self.groups.items())
