"""The configuration bound: never above the optimum, exact in its pricing, and no weaker than what it starts from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_problem, make_trace

from moeplace.bounds import crowding_floor, load_floor
from moeplace.packing import configuration_floor
from moeplace.packing.configurations import _Search
from moeplace.problem import Problem
from moeplace.solution import Limits, Status
from moeplace.solvers import solve

ROOMS = [[3, 3, 3], [4, 4], [3, 3, 2], [2, 2, 2, 2], [4, 3], [4, 1, 3], [2, 1, 2], [1, 1, 1], [4, 0, 4]]
Holdings = tuple[tuple[int, ...], ...]


def least_busiest(load: list[int], room: tuple[int, ...]) -> int:
    """Least load of the busiest GPU, by trying every set of experts on the first GPU, and so on."""
    if not room:
        return 0
    everyone = range(len(load))
    best = sum(load)
    for held in itertools.combinations(everyone, room[0]):
        own = sum(load[e] for e in held)
        if own < best:
            rest = [load[e] for e in everyone if e not in held]
            best = min(best, max(own, least_busiest(rest, room[1:])))
    return best


@given(st.integers(0, 10**6), st.sampled_from(ROOMS))
@settings(max_examples=40, deadline=None)
def test_it_is_never_above_the_optimum(seed: int, room: list[int]) -> None:
    """The bound is at most the exact optimum, at least the one it starts from, and the optimum for pairs."""
    load = np.rint(np.random.default_rng(seed).lognormal(0, 1.2, sum(room)) * 60).astype(np.int64)
    best = least_busiest(load.tolist(), tuple(room))
    known = int(np.ceil(crowding_floor(load[None].astype(np.float64), np.array(room))[0] - 1e-9))
    found = configuration_floor(load, np.array(room), floor=known)
    assert known <= found <= best
    if max(room) <= 2:
        assert found == best


@given(st.integers(0, 10**6), st.sampled_from([3, 4]))
@settings(deadline=None)
def test_pricing_is_exact(seed: int, width: int) -> None:
    """The dearest configuration is that of all sets of the width within the load; None where there is none."""
    rng = np.random.default_rng(seed)
    weight, price = rng.integers(0, 100, 9), rng.integers(-50, 50, 9)
    most = int(rng.integers(0, 60 * width))
    costs = [
        int(price[list(held)].sum())
        for held in itertools.combinations(range(9), width)
        if weight[list(held)].sum() <= most
    ]
    dearest, found = _Search(weight, 3, width).dearest(price, most)
    assert dearest == max(costs, default=None)
    for held in found:
        assert len(set(held)) == width
        assert weight[list(held)].sum() <= most


def test_what_it_does_not_do_keeps_the_floor() -> None:
    """More than four slots, or spare ones, leave the floor as it was; so does a stop."""
    load = np.arange(1, 11)
    assert configuration_floor(load, np.array([5, 5]), floor=7) == 7
    assert configuration_floor(load, np.array([4, 4, 4]), floor=7) == 7
    assert configuration_floor(load[:9], np.array([3, 3, 3]), floor=7, stop=lambda: True) == 7
    assert configuration_floor(load[:9], np.array([3, 3, 3]), floor=7, rounds=0) == 7


def _skewed() -> Problem:
    """Return a problem with a structural floor that exchanges meet in no layer."""
    trace = make_trace(5, tokens=4000, experts=48, layers=3, top_k=4)
    return make_problem(trace, "scale-up:16", objective="load")


def test_balance_raises_its_floors() -> None:
    """With ``bound=configurations`` the bound of balance is no lower and not above the value."""
    problem = _skewed()
    simple = solve(problem, "balance")
    raised = solve(problem, "balance", Limits(options={"bound": "configurations"}))
    assert simple.bound is not None
    assert raised.bound is not None
    assert float(load_floor(problem).mean()) <= simple.bound <= raised.bound <= raised.objective
    assert raised.objective == pytest.approx(simple.objective)
    assert raised.status in (Status.OPTIMAL, Status.FEASIBLE)


def test_an_unknown_bound_is_refused() -> None:
    """The names of bounds are told."""
    with pytest.raises(Exception, match="simple, configurations"):
        solve(_skewed(), "balance", Limits(options={"bound": "best"}))
