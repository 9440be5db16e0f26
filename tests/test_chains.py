"""Laws of :mod:`moeplace.chains`: annealing, repair, recombination, and bounds that hold for every placement."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moeplace.chains import Climb, Instance, Work
from moeplace.chains.anneal import Schedule, anneal
from moeplace.chains.duals import exact_matching, matching_bound, spectral_bound, symmetric_bound, transport_bound
from moeplace.chains.eigen import PositivePart, eigh
from moeplace.chains.recombine import recombine
from moeplace.chains.repair import repair
from moeplace.chains.sdp import ChainSDP, bounds
from moeplace.chains.triangles import VIOLATED, Triangles, violated
from moeplace.frozen import Floats, Ints
from moeplace.partitions import Divisions, best_chain

ANNEAL = importlib.import_module("moeplace.chains.anneal")


def _instance(seed: int, layers: int, experts: int, gpus: int, slack: float = 1.1) -> tuple[Instance, Ints]:
    """Return a random instance with topics, and a balanced state that keeps its caps."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, gpus, (layers, experts))
    load = rng.integers(50, 400, (layers, experts)).astype(np.float64)
    together = topic[:-1, :, None] == topic[1:, None, :]
    pairs = rng.poisson(np.where(together, 30, 8), (layers - 1, experts, experts))
    state = np.empty((layers, experts), np.int64)
    for layer in range(layers):
        order = np.argsort(-load[layer])
        turns = np.concatenate([np.arange(gpus), np.arange(gpus)[::-1]])
        state[layer, order] = np.resize(turns, experts)
    bare = Instance.of(pairs, load, np.full(layers, np.inf), gpus)
    cap = bare.gpu_load(state).max(axis=1) * slack
    return Instance.of(pairs, load, cap, gpus), state


def _sizes(instance: Instance, state: Ints) -> Ints:
    return np.stack([np.bincount(row, minlength=instance.num_gpus) for row in state])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_depends_on_its_seed_alone(seed: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, compiled, and in any number of threads: the same state, with as many experts on every GPU."""
    instance, start = _instance(seed, 5, 12, 3)
    plain = anneal(instance, start, Schedule(sweeps=40), seed)
    monkeypatch.setattr(ANNEAL, "THREADS_FROM_EXPERTS", 0)
    compiled = anneal(instance, start, Schedule(sweeps=40), seed, compiled=True, threads=threads)
    assert np.array_equal(plain, compiled)
    assert not np.array_equal(plain, anneal(instance, start, Schedule(sweeps=40), seed + 1))
    assert np.array_equal(_sizes(instance, plain), _sizes(instance, start))


def test_annealing_finds_the_topics() -> None:
    """Where every expert has its topic's GPU and caps are wide, annealing keeps nearly all that can be kept."""
    layers, experts, gpus = 6, 16, 4
    rng = np.random.default_rng(1)
    topic = np.stack([rng.permutation(np.repeat(np.arange(gpus), experts // gpus)) for _ in range(layers)])
    pairs = np.where(topic[:-1, :, None] == topic[1:, None, :], 100, 1)
    instance = Instance.of(pairs, np.ones((layers, experts)), np.full(layers, np.inf), gpus)
    start = np.tile(np.arange(experts) % gpus, (layers, 1))
    found = recombine(instance, [anneal(instance, start, Schedule(sweeps=400), seed) for seed in range(4)])
    assert instance.kept(found) >= 0.95 * instance.kept(topic)


def test_the_polish_never_leaves_the_caps() -> None:
    """From a state within the caps, the cold schedule ends within them."""
    for seed in range(5):
        instance, start = _instance(seed, 4, 12, 3, slack=1.0)
        end = anneal(instance, start, Schedule.polish(100), seed)
        assert not instance.excess(end).any()
        assert instance.kept(end) >= instance.kept(start)


def test_near_and_stays_agree() -> None:
    """What the table says of an expert's own GPU, over all experts, is twice what stays."""
    instance, start = _instance(3, 5, 12, 3)
    near = instance.near(start)
    own = np.take_along_axis(near, start[:, None, :], axis=1)
    assert int(own.sum()) == 2 * instance.kept(start)
    assert instance.kept(start) == sum(np.trace(instance.between(i, start[i], start[i + 1])) for i in range(4))


@pytest.mark.parametrize("seed", range(8))
def test_repair_ends_within_the_caps(seed: int) -> None:
    """Any state becomes one that keeps every cap, with as many experts on every GPU."""
    instance, start = _instance(seed, 5, 12, 3, slack=1.0 if seed % 2 else 1.05)
    rng = np.random.default_rng(seed)
    state, taken = repair(instance, rng.permuted(start, axis=1), start)
    assert not instance.excess(state).any()
    assert 0 <= taken <= 5
    assert np.array_equal(_sizes(instance, state), _sizes(instance, start))
    assert np.array_equal(repair(instance, start, start)[0], start)


def test_repair_takes_a_layer_back_where_swaps_do_not_help() -> None:
    """Loads that one division of two GPUs balances, out of reach of improving swaps: named for the traffic beside."""
    load = np.array([[1.0] * 8, [25.0, 83.0, 68.0, 92.0, 55.0, 64.0, 97.0, 75.0]])
    state = np.array([[0, 0, 0, 0, 1, 1, 1, 1]] * 2)
    fallback = np.array([state[0], [1, 1, 0, 0, 0, 0, 1, 1]])
    pairs = np.zeros((1, 8, 8), np.int64)
    pairs[0, 0, 0] = 10  # expert 0 of both layers is best on one GPU
    instance = Instance.of(pairs, load, np.array([4.0, 280.0]), 2)
    assert instance.excess(state)[1] > 0
    found, taken = repair(instance, state, fallback)
    assert taken == 1
    assert not instance.excess(found).any()
    assert found[1].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_recombination_is_the_best_chain_of_all(seed: int) -> None:
    """Over all choices of a state and of names for every layer, by force; never worse than any of the states."""
    instance, start = _instance(seed, 3, 6, 2)
    rng = np.random.default_rng(seed)
    states = [rng.permuted(start, axis=1) for _ in range(3)]
    found = recombine(instance, states)
    best = 0
    for choice in np.ndindex(3, 3, 3):
        for names in np.ndindex(2, 2, 2):
            rows = [states[c][i] ^ names[i] for i, c in enumerate(choice)]
            best = max(best, instance.kept(np.stack(rows)))
    assert instance.kept(found) == best


def test_gpus_of_unlike_size_keep_their_names() -> None:
    """Recombination renames GPUs only among those with equally many slots."""
    rng = np.random.default_rng(0)
    start = np.array([[0, 0, 0, 1, 1, 2, 2]] * 4)
    pairs = rng.integers(0, 50, (3, 7, 7))
    instance = Instance.of(pairs, np.ones((4, 7)), np.full(4, np.inf), 3)
    states = [rng.permuted(start, axis=1) for _ in range(4)]
    found = recombine(instance, states)
    assert np.array_equal(_sizes(instance, found), _sizes(instance, start))


def test_a_climb_keeps_the_caps_and_tells_every_improvement() -> None:
    """What it tells of grows, keeps the caps, and ends with the answer; stopped at once it returns its start."""
    instance, start = _instance(2, 5, 16, 4, slack=1.02)
    told: list[Ints] = []
    climb = Climb(instance, start, seed=1, threads=1, watch=lambda share: False)
    end = climb.run(Work(runs=2, sweeps=60, rounds=3, warm_sweeps=20), lambda source, state: told.append(state))
    kept = [instance.kept(state) for state in [start, *told]]
    assert kept == sorted(set(kept))
    assert not any(instance.excess(state).any() for state in told)
    assert instance.kept(end) == kept[-1] > kept[0]
    halted = Climb(instance, start, seed=1, threads=1, watch=lambda share: True)
    assert not instance.excess(halted.run(Work(runs=2, sweeps=60, rounds=3, warm_sweeps=20), lambda *_: None)).any()


def test_work_grows_with_its_scale() -> None:
    """Proposals are shared out: about the number asked for, at least one run."""
    instance, _ = _instance(0, 6, 64, 8)
    small, large = Work.of(instance, 0.01), Work.of(instance, 1.0)
    assert small.runs >= 1
    assert 20 < large.total / small.total < 400


def _optimum(instance: Instance, *, capped: bool) -> float:
    """Most pairs that stay, over all divisions of every layer."""
    experts = instance.load.shape[1]
    divisions = Divisions.of(experts, instance.num_gpus)
    busiest = divisions.busiest(instance.load)
    top = instance.cap[:, None] * (1 + 1e-9)
    cost = np.where(busiest <= top, 0.0, np.inf) if capped else np.zeros_like(busiest)
    found = best_chain(instance.pairs.astype(np.int64), divisions, cost)
    assert found is not None
    return float(instance.kept(found[0]))


@pytest.mark.parametrize(("experts", "gpus"), [(8, 2), (8, 4), (6, 3), (6, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_every_bound_is_above_the_optimum(seed: int, experts: int, gpus: int) -> None:
    """Degrees, spectra, and every iterate of the semidefinite programme, with and without caps."""
    instance, _ = _instance(seed, 4, experts, gpus, slack=1.02)
    pairs, slots = instance.pairs.astype(np.int64), experts // gpus
    free, within = _optimum(instance, capped=False), _optimum(instance, capped=True)
    exact = exact_matching(pairs, slots)
    assert free <= exact.sum() <= matching_bound(pairs, slots).sum() + 1e-6
    assert free <= spectral_bound(pairs, gpus, slots).sum() + 1e-6
    for cap, best in ((None, free), (instance.cap, within)):
        sdp = ChainSDP(pairs, instance.load, cap, gpus)
        values = [sdp.bound()]
        for _ in range(12):
            sdp.iterate(5)
            values.append(sdp.bound())
        assert min(values) >= best - 1e-6


def test_the_programme_is_tighter_than_matchings_and_tightened_by_caps() -> None:
    """On an instance of topics it ends below the best matching, and caps lower it further."""
    instance, _ = _instance(4, 5, 16, 4, slack=1.0)
    pairs = instance.pairs.astype(np.int64)
    free = min(value for _, value in bounds(ChainSDP(pairs, instance.load, None, 4), 200, 40, lambda: False))
    capped = min(value for _, value in bounds(ChainSDP(pairs, instance.load, instance.cap, 4), 200, 40, lambda: False))
    assert free < exact_matching(pairs, 4).sum()
    assert capped < free


def test_threads_do_not_change_the_bound() -> None:
    """The programme's iterates are the same in one thread and in two, with triangles too."""
    instance, _ = _instance(5, 4, 12, 3)
    values = []
    for threads in (1, 2):
        sdp = ChainSDP(instance.pairs.astype(np.int64), instance.load, instance.cap, 3, threads=threads)
        sdp.iterate(15)
        sdp.separate()
        sdp.iterate(15)
        values.append(sdp.bound())
    assert values[0] == values[1]


@pytest.mark.parametrize(("seed", "gpus"), [(0, 2), (1, 2), (2, 4), (3, 4)])
def test_triangles_tighten_the_bound_and_keep_it_valid(seed: int, gpus: int) -> None:
    """Against the proved optimum within the caps: never below it, and below the bound without them."""
    instance, _ = _instance(seed, 5, 8, gpus)
    pairs, best = instance.pairs.astype(np.int64), _optimum(instance, capped=True)
    plain, tight = (ChainSDP(pairs, instance.load, instance.cap, gpus) for _ in range(2))
    plain.iterate(500)
    lowest = min(value for _, value in bounds(tight, 500, 50, lambda: False))
    assert sum(len(triangles.price) for triangles in tight.triangles)
    assert best * (1 - 1e-9) <= lowest < plain.bound()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_triangles_are_those_that_are_violated(seed: int) -> None:
    """Every triple that is violated is found once, most violated first; weights are the derivative of its sum."""
    rng = np.random.default_rng(seed)
    size = 7
    block = rng.random((size, size))
    block = ((block + block.T) / 2).astype(np.float32)
    np.fill_diagonal(block, 1.0)
    all_of_them = {
        (i, min(j, k), max(j, k))
        for i, j, k in itertools.permutations(range(size), 3)
        if block[i, j] + block[i, k] - block[j, k] - 1 > VIOLATED
    }
    found, amount = violated(block)
    assert {(i, min(j, k), max(j, k)) for i, j, k in found.tolist()} == all_of_them
    assert len(found) == len(all_of_them)
    triangles = Triangles(size)
    triangles.separate(block, 3)
    assert len(triangles.corners) == min(3, len(found))
    if len(found) > 3:
        excess = [float(block[i, j] + block[i, k] - block[j, k] - 1) for i, j, k in triangles.corners]
        assert min(excess) >= np.sort(amount)[-3] - 1e-6
    weights = triangles.update(block, 0.1)
    i, j, k = triangles.corners.T
    total = float((triangles.price * (block[i, j] + block[i, k] - block[j, k])).sum())
    assert float((weights * block).sum()) == pytest.approx(total, abs=1e-6)
    triangles.separate(np.eye(size, dtype=np.float32), 3)
    assert (triangles.price > 0).all()


def test_iterating_stops_when_asked() -> None:
    """``stop`` is looked at before every step."""
    instance, _ = _instance(5, 4, 12, 3)
    sdp = ChainSDP(instance.pairs.astype(np.int64), instance.load, None, 3)
    assert sdp.iterate(10, lambda: True) == 0
    assert list(bounds(sdp, 10, 5, lambda: True)) == []


def _best_matching(table: Floats, slots: int, *, symmetric: bool) -> float:
    """The linear programme that the duals bound."""
    size = len(table)
    rows = np.kron(np.eye(size), np.ones(size))
    columns = np.kron(np.ones(size), np.eye(size))
    equal = [rows, columns]
    room = [np.full(size, slots)] * 2
    limits = [(0.0, 1.0)] * (size * size)
    if symmetric:
        for e in range(size):
            limits[e * size + e] = (1.0, 1.0)
            for f in range(e):
                one = np.zeros((1, size * size))
                one[0, e * size + f], one[0, f * size + e] = 1.0, -1.0
                equal.append(one)
                room.append(np.zeros(1))
    found = linprog(-table.ravel(), A_eq=np.concatenate(equal), b_eq=np.concatenate(room), bounds=limits)
    assert found.success
    return float(-found.fun)


@given(seed=st.integers(0, 10_000), size=st.integers(2, 7), data=st.data())
@settings(max_examples=40, deadline=None)
def test_duals_bound_their_programmes(seed: int, size: int, data: st.DataObject) -> None:
    """Tables of either sign: above the optimum, and not far."""
    slots = data.draw(st.integers(1, size - 1))
    table = np.random.default_rng(seed).normal(size=(size, size))
    best = _best_matching(table, slots, symmetric=False)
    assert best - 1e-7 <= transport_bound(table, slots) <= best + 0.5 * np.abs(table).sum()
    both = 0.5 * (table + table.T)
    assert symmetric_bound(both, slots) >= _best_matching(both, slots, symmetric=True) - 1e-7


def test_the_exact_matching_is_the_linear_optimum() -> None:
    """Minimum-cost flow agrees with linear programming."""
    pairs = np.random.default_rng(0).integers(0, 90, (3, 6, 6))
    found = exact_matching(pairs, 2)
    assert found.tolist() == [round(_best_matching(table.astype(float), 2, symmetric=False)) for table in pairs]


def test_eigenvectors_rebuild_their_matrix() -> None:
    """Values ascend, vectors are orthonormal, and the matrix is left as it was."""
    root = np.random.default_rng(0).normal(size=(40, 40))
    matrix = (root + root.T).astype(np.float32)
    kept = matrix.copy()
    values, vectors = eigh(matrix)
    assert np.array_equal(matrix, kept)
    assert (np.diff(values) >= 0).all()
    assert np.allclose((vectors * values) @ vectors.T, matrix, atol=1e-4)
    assert np.allclose(vectors.T @ vectors, np.eye(40), atol=1e-5)
    with pytest.raises(np.linalg.LinAlgError):
        eigh(np.full((5, 5), np.nan, np.float32))


def test_huge_counts_are_scaled() -> None:
    """More pairs than 32 bits hold are rounded to what they hold, in the same proportions."""
    pairs = np.array([[[2**40, 2**39], [0, 2**40]]])
    instance = Instance.of(pairs, np.ones((2, 2)), np.full(2, np.inf), 2)
    assert instance.pairs.dtype == np.int32
    assert instance.pairs[0, 0, 0] == pytest.approx(2 * instance.pairs[0, 0, 1], abs=2)
    assert instance.pairs.sum(dtype=np.int64) <= 2**30 + 4


@pytest.mark.parametrize("rank", [0, 5, 60, 250])
def test_positive_parts_are_followed(rank: int) -> None:
    """Of matrices that change a little from call to call, the part above 0 is near the exact one; few or many of it."""
    rng = np.random.default_rng(rank)
    size = 256
    turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
    values = np.concatenate([rng.uniform(1, 20, rank), rng.uniform(-10, 0.0, size - rank)])
    follow = PositivePart()
    for _ in range(8):
        values = values + 0.05 * rng.standard_normal(size)
        turn = np.linalg.qr(turn + 1e-4 * rng.standard_normal((size, size)))[0]
        matrix = ((turn * values) @ turn.T).astype(np.float32)
        matrix = (matrix + matrix.T) / 2
        exact = (turn * np.maximum(values, 0)) @ turn.T
        part = follow.of(matrix)
        assert np.linalg.norm(part - exact) <= 0.02 * max(10.0, np.linalg.norm(exact))
        assert np.linalg.eigvalsh(part.astype(float)).min() >= -1e-3
