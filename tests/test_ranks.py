"""Laws of :mod:`moeplace.ranks`: loads stay, traffic gets cheaper, and the optimum where ways cost the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_problem, make_trace, random_placement, slow_topology

from moeplace.metrics import cross_shares
from moeplace.objective import objective_value
from moeplace.placement import Placement
from moeplace.ranks import chain_cost, map_ranks, name_layers, rename_gpus, swap_while_better
from moeplace.solvers import solve
from moeplace.topology import load_topology


def _tables(seed: int, layers: int, gpus: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, (layers - 1, gpus, gpus)).astype(float)


@given(st.integers(0, 10**6), st.integers(2, 3))
def test_naming_layers_in_turn_is_optimal_where_ways_cost_the_same(seed: int, gpus: int) -> None:
    """Exactly layers - 1 assignment problems: no names of any layer are better, by trying all."""
    tables = _tables(seed, 3, gpus)
    cost = 1.0 - np.eye(gpus)
    order = name_layers(tables, cost, np.ones((gpus, gpus), bool))
    names = [np.array(names) for names in itertools.permutations(range(gpus))]
    best = min(chain_cost(tables, cost, np.array(chosen)) for chosen in itertools.product(names, repeat=3))
    assert chain_cost(tables, cost, order) == pytest.approx(best)


@pytest.mark.parametrize("spec", ["scale-out:2x2", "scale-out:2x3", "torus:2x2x2", "mesh:2x3"])
def test_names_never_cost_more(spec: str) -> None:
    """Where ways differ: no exchange of two names in one layer helps, and never above the names as they were."""
    cost = 1 / load_topology(spec).pair_bandwidth_gb_per_s()
    gpus = len(cost)
    tables = _tables(0, 5, gpus)
    every = np.ones((gpus, gpus), bool)
    order = name_layers(tables, cost, every)
    assert (np.sort(order, axis=1) == np.arange(gpus)).all()
    before = np.tile(np.arange(gpus), (5, 1))
    assert chain_cost(tables, cost, order) <= chain_cost(tables, cost, before)
    for layer, swap in itertools.product(range(5), itertools.combinations(range(gpus), 2)):
        other = order.copy()
        other[layer, list(swap)] = other[layer, list(swap[::-1])]
        assert chain_cost(tables, cost, other) >= chain_cost(tables, cost, order) * (1 - 1e-9)


@given(st.integers(0, 10**6), st.sampled_from(["torus:2x3", "full-mesh:2x3", "mesh:2x3", "scale-out:2x3"]))
def test_no_exchange_of_ranks_helps_any_more(seed: int, spec: str) -> None:
    """The rank map is a local optimum of the sum over ways, and not worse than none."""
    cost = 1 / load_topology(spec).pair_bandwidth_gb_per_s()
    table = _tables(seed, 2, 6)[0]

    def value(order: np.ndarray) -> float:
        return float((table[np.ix_(order, order)] * (cost + cost.T) / 2).sum())

    order = map_ranks(table, cost, np.ones((6, 6), bool))
    assert value(order) <= value(np.arange(6)) * (1 + 1e-12)
    for p, q in itertools.combinations(range(6), 2):
        other = order.copy()
        other[[p, q]] = other[[q, p]]
        assert value(other) >= value(order) * (1 - 1e-6)


def test_gpus_of_unlike_size_keep_their_names() -> None:
    """Only GPUs with equally many slots swap names."""
    tables, cost = _tables(1, 4, 4), 1 / load_topology("scale-out:2x2").pair_bandwidth_gb_per_s()
    room = np.array([3, 2, 3, 2])
    same = room[:, None] == room[None, :]
    for order in (*name_layers(tables, cost, same), map_ranks(tables[0], cost, same)):
        assert (room[order] == room).all()


@pytest.mark.parametrize("objective", ["step-time", "cross"])
@pytest.mark.parametrize("spec", ["scale-up:4", "scale-out:2x2", "torus:2x2", "full-mesh:2x2", "mesh:2x2"])
def test_renaming_keeps_loads_and_lowers_what_is_minimised(spec: str, objective: str) -> None:
    """Copies too: every GPU's experts stay together in their layer, and the objective is never worse."""
    trace = make_trace(1, tokens=200, layers=4, experts=8, top_k=2)
    problem = make_problem(
        trace, slow_topology(spec), redundant=4, objective=objective, dataflow="context-coherent", requests=400
    )
    gained = 0
    for seed in range(3):
        before = random_placement(seed, problem.slots_per_gpu, 4, 8)
        after = rename_gpus(problem, before, seed=0, tries=50, stop=lambda: False)
        assert objective_value(problem, after) <= objective_value(problem, before)
        gained += objective_value(problem, after) < objective_value(problem, before)
        for layer in range(4):
            held = [sorted(map(tuple, np.sort(one.slots[layer], axis=1).tolist())) for one in (before, after)]
            assert held[0] == held[1]
    assert gained


def test_renaming_for_gpus_lowers_pairs_across_nodes_too() -> None:
    """Of names that keep as many pairs on their GPU, those with less traffic between nodes are chosen."""
    trace = make_trace(3, tokens=300, layers=4, experts=8, top_k=2)
    problem = make_problem(trace, "scale-out:2x2", objective="cross", dataflow="context-coherent")
    balanced, renamed = solve(problem, "balance"), solve(problem, "balance+relabel")
    assert balanced.placement is not None
    assert renamed.placement is not None
    assert renamed.objective <= balanced.objective
    nodes = [cross_shares(problem.stats, one.placement, problem.topology) for one in (balanced, renamed)]
    assert nodes[0] is not None
    assert nodes[1] is not None
    assert nodes[1][1] < nodes[0][1]


def test_dispatch_combine_is_left_alone_and_said() -> None:
    """Where tokens return home nothing is renamed."""
    problem = make_problem(make_trace(0, experts=8), "scale-up:4")
    start = solve(problem, "balance").placement
    answer = solve(problem, "balance+relabel")
    assert start is not None
    assert answer.placement is not None
    assert answer.placement.digest() == start.digest()
    assert any("return to homes" in note for note in answer.notes)


def test_groups_go_to_the_ranks_that_choose_them() -> None:
    """With recorded homes: the best of all names of a layer, by trying them; loads stay."""
    trace = make_trace(2, tokens=300, layers=2, experts=6, top_k=2, ranks=3)
    problem = make_problem(trace, slow_topology("scale-up:3"), requests=300)
    sources = problem.stats.source_load
    assert sources is not None

    def at_home(placement: Placement) -> list[float]:
        share = placement.even_share()
        return [float((sources[:, layer] * share[layer]).sum()) for layer in range(2)]

    start = solve(problem, "balance").placement
    answer = solve(problem, "balance+relabel")
    assert start is not None
    assert answer.placement is not None
    assert answer.objective <= objective_value(problem, start)
    names = [np.array(names) for names in itertools.permutations(range(3))]
    best = [max(at_home(start.permute_gpus(order))[layer] for order in names) for layer in range(2)]
    assert at_home(answer.placement) == pytest.approx(best)
    assert not answer.notes


def test_exchanges_stop_when_asked_and_when_idle() -> None:
    """A stopped search returns what it has; tries bound the evaluations."""
    count = [0]

    def cost(order: np.ndarray) -> float:
        count[0] += 1
        return float(np.abs(order - np.arange(6)).sum())

    rng = np.random.default_rng(0)
    start = np.arange(6)[::-1].copy()
    every = np.ones((6, 6), bool)
    assert (swap_while_better(start, every, cost, rng=rng, tries=50, stop=lambda: True) == start).all()
    assert count[0] == 1
    end = swap_while_better(start, every, cost, rng=rng, tries=50, stop=lambda: False)
    assert count[0] <= 52
    assert cost(end) < cost(start)
