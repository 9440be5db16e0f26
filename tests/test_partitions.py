"""Laws of :mod:`moeplace.partitions` and of the solver ``exact``: the optimum of all placements, proved."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from strategies import every_placement, make_problem, make_trace

from moeplace.errors import InputError, ProblemError
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value
from moeplace.partitions import Divisions, best_chain, num_divisions
from moeplace.problem import Problem
from moeplace.solution import Limits, Status, StopReason
from moeplace.solvers import solve


def _problem(seed: int, layers: int, experts: int, gpus: int, **options: object) -> Problem:
    trace = make_trace(seed, tokens=60, layers=layers, experts=experts, top_k=2)
    return make_problem(trace, f"scale-up:{gpus}", objective="cross", dataflow="context-coherent", **options)


@pytest.mark.parametrize(("layers", "experts", "gpus"), [(3, 4, 2), (2, 6, 3), (3, 3, 3), (2, 6, 2), (2, 4, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_exact_is_the_best_of_all(seed: int, layers: int, experts: int, gpus: int) -> None:
    """No placement crosses less, and the answer says that it is proved."""
    problem = _problem(seed, layers, experts, gpus)
    answer = solve(problem, "exact")
    best = min(objective_value(problem, placement) for placement in every_placement(problem))
    assert answer.objective == pytest.approx(best)
    assert (answer.status, answer.stop_reason, answer.gap) == (Status.OPTIMAL, StopReason.PROVEN, 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_caps_are_kept_exactly(seed: int) -> None:
    """With a cap it is the best of the placements within; a cap below the best balance has no answer."""
    bare = _problem(seed, 2, 4, 2)
    within = {p: max_over_mean(placement, bare.stats.load) for p, placement in enumerate(every_placement(bare))}
    least = np.min(list(within.values()), axis=0)
    problem = bare.replace(load_cap=least * 1.05)
    answer = solve(problem, "exact")
    best = min(
        objective_value(bare, placement)
        for p, placement in enumerate(every_placement(bare))
        if (within[p] <= problem.load_cap * (1 + 1e-9)).all()
    )
    assert answer.objective == pytest.approx(best)
    assert answer.status is Status.OPTIMAL


def test_a_cap_that_cannot_be_kept_is_infeasible() -> None:
    """Where no division keeps the cap although the floor allows it, there is proven to be no answer."""
    for seed in range(40):
        bare = _problem(seed, 2, 6, 2)
        least = np.min([max_over_mean(p, bare.stats.load) for p in every_placement(bare)], axis=0)
        from moeplace.bounds import load_floor

        between = (load_floor(bare) + least) / 2
        if (least > between * 1.001).any():
            answer = solve(bare.replace(load_cap=np.maximum(between, 1.0)), "exact")
            assert answer.placement is None
            assert answer.status is Status.INFEASIBLE
            return
    pytest.fail("no seed has room between the floor and the best balance")


@given(st.integers(0, 1000), st.sampled_from([2, 3, 4, 5, 6]), st.integers(2, 5))
def test_one_expert_per_gpu_is_a_chain_of_assignments(seed: int, experts: int, layers: int) -> None:
    """With one expert per GPU the optimum is the sum of exactly ``layers - 1`` assignments."""
    pairs = np.random.default_rng(seed).integers(0, 50, (layers - 1, experts, experts))
    divisions = Divisions.of(experts, experts)
    found = best_chain(pairs, divisions, np.zeros((layers, 1)))
    assert found is not None
    best = sum(int(table[linear_sum_assignment(-table)].sum()) for table in pairs)
    assert found[1] == best
    gpu = found[0]
    stay = sum(table[gpu[i][:, None] == gpu[i + 1]].sum() for i, table in enumerate(pairs))
    assert stay == best


@given(st.integers(0, 1000), st.sampled_from([(4, 2), (6, 3), (6, 2)]))
def test_costs_of_divisions_are_paid(seed: int, shape: tuple[int, int]) -> None:
    """The value is what stays less what the chosen divisions cost, and no chain of divisions has more."""
    experts, gpus = shape
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, 50, (2, experts, experts))
    divisions = Divisions.of(experts, gpus)
    cost = rng.uniform(0, 40, (3, num_divisions(experts, gpus)))
    found = best_chain(pairs, divisions, cost)
    assert found is not None

    def stays(table: np.ndarray, p: int, q: int) -> float:
        between = divisions.members @ table @ divisions.members.T
        own = between[np.ix_(divisions.groups[p], divisions.groups[q])]
        return max(sum(own[g, h] for g, h in enumerate(order)) for order in itertools.permutations(range(gpus)))

    arcs = [[[stays(table, p, q) for q in range(cost.shape[1])] for p in range(cost.shape[1])] for table in pairs]
    best = max(
        arcs[0][a][b] + arcs[1][b][c] - cost[0, a] - cost[1, b] - cost[2, c]
        for a, b, c in itertools.product(range(cost.shape[1]), repeat=3)
    )
    assert found[1] == pytest.approx(best)


def test_many_groups_are_matched_by_assignment() -> None:
    """Six groups of two are too many orders to try: the value is that of all orders all the same."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 50, (1, 12, 12))
    divisions = Divisions.of(12, 6)
    few = np.full((2, len(divisions.groups)), math.inf)
    few[0, :3] = few[1, 5:8] = 0.0
    found = best_chain(pairs, divisions, few)
    assert found is not None
    best = 0.0
    for p, q in itertools.product(range(3), range(5, 8)):
        between = divisions.members @ pairs[0] @ divisions.members.T
        table = between[np.ix_(divisions.groups[p], divisions.groups[q])]
        best = max(best, table[linear_sum_assignment(-table)].sum())
    assert found[1] == best


def test_a_price_trades_traffic_for_balance() -> None:
    """A dearer load is a lower busiest load and more traffic, never both worse; with a price nothing is claimed."""
    problem = _problem(1, 3, 6, 3)
    answers = [solve(problem, "exact", Limits(options={"price": price})) for price in ("0", "0.05", "10")]
    loads = [max_over_mean(a.placement, problem.stats.load).mean() for a in answers if a.placement is not None]
    crossing = [answer.objective for answer in answers]
    assert loads == sorted(loads, reverse=True)
    assert crossing == sorted(crossing)
    assert answers[1].status is Status.FEASIBLE


@pytest.mark.parametrize(
    ("experts", "gpus", "options", "words"),
    [
        (5, 2, {}, "equally many"),
        (4, 2, {"redundant": 2}, "no spare slot"),
        (24, 4, {}, "ways to divide"),
        (4, 2, {"objective": "load"}, "share of pairs"),
    ],
)
def test_other_problems_are_refused(experts: int, gpus: int, options: dict[str, object], words: str) -> None:
    """Uneven or spare slots, too many divisions, another objective: the message says what it is for."""
    trace = make_trace(0, tokens=30, layers=2, experts=experts, top_k=2)
    problem = make_problem(trace, f"scale-up:{gpus}", **{"objective": "cross", **options})
    with pytest.raises(ProblemError, match=words):
        solve(problem, "exact")
    with pytest.raises(InputError, match="at least 0"):
        solve(_problem(0, 2, 4, 2), "exact", Limits(options={"price": "-1"}))


@pytest.mark.parametrize(("experts", "gpus"), [(8, 4), (8, 2), (6, 3), (4, 4), (6, 1)])
def test_every_division_is_listed_once(experts: int, gpus: int) -> None:
    """As many as the formula says, all different, each a division."""
    divisions = Divisions.of(experts, gpus)
    assert len(divisions.groups) == num_divisions(experts, gpus) == len({tuple(g) for g in divisions.groups.tolist()})
    assert (divisions.members[divisions.groups].sum(axis=1) == 1).all()


def test_auto_proves_what_is_small() -> None:
    """Where layers can be divided in few ways ``auto`` answers with a proof, and says why it tries what it tries."""
    answer = solve(_problem(0, 3, 8, 4))
    assert answer.status is Status.OPTIMAL
    assert any("105 ways to divide a layer" in note for note in answer.notes)
