"""Gain by moved copies: curves are what placements are worth, the budget is shared as well as can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import every_placement, make_problem, make_trace, random_placement

from moeplace.batches import BatchLaw, TokenIndex, expert_rows
from moeplace.metrics import max_over_mean
from moeplace.moving import MoveLimits, arriving_copies
from moeplace.objective import objective_value, step_values
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.sampled import StepTables, relink
from moeplace.sampled.curves import Curve, gain_curves, share_moves
from moeplace.sampled.improve import Search
from moeplace.scoring import draw_steps
from moeplace.solution import Limits
from moeplace.trace import Counts


def _problem(seed: int, *, layers: int = 1, experts: int = 6, redundant: int = 0) -> Problem:
    trace = make_trace(seed, tokens=120, layers=layers, experts=experts, top_k=2)
    law = BatchLaw(phase="decode", requests=2, tokens=3, batches=12)
    problem = make_problem(trace, "scale-up:3", objective="load", redundant=redundant)
    steps = draw_steps(trace, TokenIndex.of(trace), law)
    # as counts, whose copies share rows evenly
    return problem.replace(law=law, steps=Counts(meta=trace.meta, counts=np.moveaxis(expert_rows(steps), 2, 0)))


def _search(problem: Problem, cap: float = np.inf) -> Search:
    return Search(
        load=problem.stats.load.astype(np.float64), cap=np.full(problem.num_layers, cap), room=problem.slots_per_gpu,
        kicks=0, budget=1, seed=0, threads=1, stop=lambda: False,
    )  # fmt: skip


@given(seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_a_curve_is_the_best_of_all_placements_of_a_small_layer(seed: int) -> None:
    """For every number of moved copies, with a wide beam: none is below the least of all, and the least is found."""
    problem = _problem(seed)
    base = random_placement(seed, problem.slots_per_gpu, 1, 6)
    (curve,) = gain_curves(StepTables.of(problem), base, _search(problem), most=4, width=200)
    least = np.full(5, np.inf)
    for one in every_placement(problem):
        moved = int(arriving_copies(base.copies(), one.copies()).sum())
        if (one.used_slots() == 2).all() and moved <= 4:
            least[moved] = min(least[moved], step_values(problem, one).mean())
    assert curve.values == pytest.approx(least, rel=1e-5)


@given(seed=st.integers(0, 1000), redundant=st.sampled_from([0, 3]), capped=st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_curve_is_worth_what_it_says(seed: int, redundant: int, capped: bool) -> None:
    """Its slots have its values and move as many copies; no GPU gets an expert twice or more than the cap lets it."""
    problem = _problem(seed, redundant=redundant)
    base = random_placement(seed, problem.slots_per_gpu, 1, 6)
    cap = float(max_over_mean(base, problem.stats.load)[0] * problem.stats.load.sum() / 3) if capped else np.inf
    (curve,) = gain_curves(StepTables.of(problem), base, _search(problem, cap), most=5, width=3)
    assert curve.values[0] == pytest.approx(objective_value(problem, base), rel=1e-5)
    for moved, (value, slots) in enumerate(zip(curve.values, curve.slots, strict=True)):
        if slots is None:
            assert np.isinf(value)
            continue
        one = Placement(slots=slots[None], num_experts=6)
        assert step_values(problem, one).mean() == pytest.approx(value, rel=1e-5)
        assert arriving_copies(base.copies(), one.copies()).sum() == moved
        assert (one.copies().sum(axis=1) == base.copies().sum(axis=1)).all()
        assert set(one.duplicates()) <= set(base.duplicates())
        assert one.gpu_load(problem.stats.load.astype(np.float64)).max() <= cap * (1 + 1e-9)


@given(
    values=st.lists(st.lists(st.floats(0, 9) | st.just(np.inf), min_size=1, max_size=4), min_size=1, max_size=3),
    budget=st.integers(0, 7),
)
def test_the_budget_is_shared_as_well_as_can_be(values: list[list[float]], budget: int) -> None:
    """Against all ways to share it; what is not known takes no part; a further move has no negative price."""
    curves = [Curve(np.array([1.0, *row]), (None,) * (1 + len(row))) for row in values]
    shares, price = share_moves(curves, budget)
    ways = itertools.product(*(range(len(curve.values)) for curve in curves))
    best = min(sum(c.values[m] for c, m in zip(curves, way, strict=True)) for way in ways if sum(way) <= budget)
    assert sum(shares) <= budget
    assert sum(curve.values[m] for curve, m in zip(curves, shares, strict=True)) == pytest.approx(best)
    assert price >= 0


@pytest.mark.slow
def test_compiled_curves_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without compilation."""
    problem = _problem(3, layers=2, experts=9)
    base, found = random_placement(3, problem.slots_per_gpu, 2, 9), []
    for limit in (10**18, 0):
        monkeypatch.setattr("moeplace.sampled.curves.COMPILE_FROM", limit)
        curves = gain_curves(StepTables.of(problem), base, _search(problem), most=5, width=4)
        found.append([[None if slots is None else slots.tolist() for slots in curve.slots] for curve in curves])
    assert found[0] == found[1]


def test_more_moves_never_gain_less() -> None:
    """Nothing moves where nothing may; a budget is kept, and a larger one gives no worse a placement."""
    problem = _problem(5, layers=3, experts=9)
    base, target = (random_placement(seed, problem.slots_per_gpu, 3, 9) for seed in (5, 6))
    values = [objective_value(problem, base)]
    for budget in (0, 2, 4, 9):
        limited = problem.replace(baseline=base, moves=MoveLimits(max_copies=budget))
        found = relink(limited, target, Limits(work=0.2))
        assert arriving_copies(base.copies(), found.copies()).sum() <= budget
        values.append(objective_value(problem, found))
    assert values[0] == values[1]
    assert values == sorted(values, reverse=True)
