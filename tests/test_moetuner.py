"""MoETuner: both integer programmes against brute force, their bounds, starts and honesty."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_problem, make_trace

from moeplace.affinity import count_routing
from moeplace.errors import InputError, ProblemError, UnknownNameError
from moeplace.frozen import Floats, Ints
from moeplace.milp import BACKENDS, Backend, Budget
from moeplace.moetuner.bounds import pair_bounds
from moeplace.moetuner.chain import Chain, bottleneck_assignment, improve, level_start
from moeplace.moetuner.clusters import Layer, balanced_start, clustering_model, deviation_bound, even_sizes, improved
from moeplace.moetuner.gpus import mapping_model, memory_model
from moeplace.moetuner.nodes import shortest_chain, two_levels
from moeplace.problem import Problem
from moeplace.solution import Limits, Report, Solution, Stage, Status, StopReason
from moeplace.solvers.moetuner import solve
from moeplace.topology import load_topology
from moeplace.trace import Counts

both = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
PROVE = Budget(work=20)
COSTS = {
    "uniform": lambda: uniform(3),
    "nodes": lambda: 1 / load_topology("scale-out:2x2").pair_bandwidth_gb_per_s(),
    "line": lambda: np.abs(np.subtract.outer(np.arange(3.0), np.arange(3.0))),
    "directed": lambda: np.random.default_rng(3).random((3, 3)) * (1 - np.eye(3)),
}


def uniform(gpus: int) -> Floats:
    """Cost of one switched domain."""
    return 1.0 - np.eye(gpus)


def chain(cost: Floats, seed: int, layers: int = 3, **fields: Any) -> Chain:
    """Random traffic on a network; one expert in every cluster unless ``sizes`` are given."""
    gpus = len(cost)
    traffic = np.random.default_rng(seed).integers(0, 30, (layers - 1, gpus, gpus)).astype(np.float64)
    sizes = np.asarray(fields.pop("sizes", np.ones((layers, gpus), np.int64)))
    share = np.full(gpus, int(sizes.sum()) // gpus)
    values = {"room": np.full(gpus, int(sizes.max())), "total_lower": share, "total_upper": share} | fields
    return Chain(traffic=traffic, cost=cost, sizes=sizes, **values)


def assignments(instance: Chain) -> Iterator[Ints]:
    """Every assignment that keeps the memory rows."""
    orders = list(itertools.permutations(range(instance.num_gpus)))
    for chosen in itertools.product(orders, repeat=instance.num_layers):
        if instance.admits(gpu := np.array(chosen)):
            yield gpu


def cheapest(instance: Chain) -> float:
    """Optimum of ILP2 by brute force; infinite where nothing keeps the memory rows."""
    return min((float(instance.layer_costs(gpu).sum()) for gpu in assignments(instance)), default=float("inf"))


def clusterings(layer: Layer) -> Iterator[Ints]:
    """Every clustering within the limits."""
    for chosen in itertools.product(range(layer.num_clusters), repeat=len(layer.load)):
        size = np.bincount(chosen, minlength=layer.num_clusters)
        if (layer.lower <= size).all() and (size <= layer.upper).all():
            cluster = np.array(chosen)
            if layer.cluster_load(cluster).max() <= layer.cap:
                yield cluster


def random_layer(seed: int) -> Layer:
    """Six or seven experts in two or three clusters, sizes fixed, within limits or only not empty."""
    rng = np.random.default_rng(seed)
    experts, clusters = int(rng.integers(6, 8)), int(rng.integers(2, 4))
    load = (rng.pareto(1.2, experts) * 100).astype(np.int64) + 1
    lower, upper = even_sizes(experts, rng.permutation([experts - 1, 3, 2])[:clusters] + 2)
    if seed % 3 == 0:
        lower, upper = np.ones(clusters, np.int64), np.full(clusters, experts)
    return Layer(load=load, lower=lower, upper=upper)


def attempt(problem: Problem, **options: str) -> Solution:
    """Solve with little work, to proven optima where not said otherwise."""
    return solve(problem, Limits(work=0.5, options={"tolerance": "0"} | options), Report())


def stages(answer: Solution) -> dict[str, Stage]:
    """Stages by name."""
    return {stage.name: stage for stage in answer.stages}


@both
@pytest.mark.parametrize("seed", range(6))
def test_ilp1_finds_the_best_clusters(backend: Backend, seed: int) -> None:
    """ILP1's optimum is the least deviation over all clusterings; its bound and arithmetic's do not pass it."""
    layer = random_layer(seed)
    best = min(layer.deviation(cluster) for cluster in clusterings(layer))
    start = balanced_start(layer)
    built = clustering_model(layer, start)
    answer = backend(built.model, PROVE, None)
    assert answer.values is not None
    assert answer.status is Status.OPTIMAL
    found = built.clusters(answer.values)
    assert layer.deviation(found) == pytest.approx(best)
    assert deviation_bound(layer) <= best + 1e-9 <= layer.deviation(start) + 2e-9
    size = np.bincount(found, minlength=layer.num_clusters)
    assert (layer.lower <= size).all()
    assert (size <= layer.upper).all()


@both
def test_ilp1_keeps_the_load_cap(backend: Backend) -> None:
    """With a cap on cluster load ILP1 finds the best clustering within it, or proves that there is none."""
    load = np.array([50, 40, 30, 20, 10, 10])
    limits = {"load": load, "lower": np.array([3, 3]), "upper": np.array([3, 3])}
    for cap, value in ((80.0, 0.0), (79.0, None)):
        layer = Layer(**limits, cap=cap)
        answer = backend(clustering_model(layer, balanced_start(layer)).model, PROVE, None)
        assert answer.objective == value
        assert answer.status is (Status.INFEASIBLE if value is None else Status.OPTIMAL)


@given(st.integers(0, 10**6))
def test_the_start_keeps_the_sizes_and_the_bound_holds(seed: int) -> None:
    """Greedy clusters respect every limit, and arithmetic's bound is below their deviation."""
    layer = random_layer(seed)
    start = balanced_start(layer)
    size = np.bincount(start, minlength=layer.num_clusters)
    assert (layer.lower <= size).all()
    assert (size <= layer.upper).all()
    assert deviation_bound(layer) <= layer.deviation(start) + 1e-9


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 30))
def test_sizes_are_as_even_as_room_allows(room: list[int], total: int) -> None:
    """Limits admit the total, stay within the room, and differ by at most one where room does not bind."""
    if total > sum(room):
        with pytest.raises(ProblemError):
            even_sizes(total, np.array(room))
        return
    lower, upper = even_sizes(total, np.array(room))
    assert lower.sum() <= total <= upper.sum()
    assert (upper <= room).all()
    assert (upper - lower <= 1).all()
    free = upper < room
    if free.any():
        assert upper.max() - lower[free].min() <= 1


@both
@pytest.mark.parametrize("network", COSTS)
@pytest.mark.parametrize("seed", range(2))
def test_ilp2_finds_the_best_assignment(backend: Backend, network: str, seed: int) -> None:
    """The linear model's optimum is the published min-max objective's, over all permutations of all layers."""
    instance = chain(COSTS[network](), seed)
    best, bounds = cheapest(instance), pair_bounds(instance)
    start = improve(instance, level_start(instance))
    assert bounds.sum() <= best + 1e-9 <= instance.layer_costs(start).sum() + 2e-9
    identity = np.tile(np.arange(instance.num_gpus), (3, 1))
    for begin in (identity, start):
        built = mapping_model(instance, bounds, begin, float(bounds.sum()))
        answer = backend(built.model, PROVE, None)
        assert answer.status is Status.OPTIMAL
        assert answer.values is not None
        assert answer.objective == pytest.approx(best)
        assert instance.layer_costs(built.gpus(answer.values)).sum() == pytest.approx(best)


@both
@pytest.mark.parametrize("seed", range(3))
def test_ilp2_keeps_the_memory_rows(backend: Backend, seed: int) -> None:
    """With clusters of different sizes every GPU holds equally many experts over all layers, at the least cost."""
    sizes = [[1, 2, 3], [3, 1, 2], [2, 2, 2]]
    instance = chain(uniform(3), seed, sizes=sizes)
    start = level_start(instance)
    assert instance.admits(start)
    assert not instance.is_level
    bounds = pair_bounds(instance)
    built = mapping_model(instance, bounds, start, float(bounds.sum()))
    answer = backend(built.model, PROVE, None)
    assert answer.values is not None
    gpu = built.gpus(answer.values)
    assert instance.totals(gpu).tolist() == [6, 6, 6]
    assert instance.layer_costs(gpu).sum() == pytest.approx(cheapest(instance))
    assert answer.status is Status.OPTIMAL


@both
def test_memory_is_relaxed_by_the_least(backend: Backend) -> None:
    """Where no assignment evens the totals the least miss is found and proved; without spare room, infeasibility."""
    instance = chain(uniform(3), 0, layers=2, sizes=[[1, 1, 4], [1, 1, 4]])
    start = level_start(instance)
    least = min(
        instance.excess(np.array([a, b])) for a, b in itertools.product(itertools.permutations(range(3)), repeat=2)
    )
    answer = backend(memory_model(instance, start, np.full(3, 12)).model, PROVE, None)
    assert (answer.objective, answer.status) == (least, Status.OPTIMAL)
    assert backend(memory_model(instance, start, np.full(3, 4)).model, PROVE, None).status is Status.INFEASIBLE
    relaxed = instance.relaxed(least, np.full(3, 12))
    assert any(True for _ in assignments(relaxed))
    assert not any(True for _ in assignments(instance.relaxed(least - 1, np.full(3, 12))))


@pytest.mark.parametrize("spec", ["scale-up:4", "scale-out:2x2", "scale-out:4x1", "scale-up:3"])
@pytest.mark.parametrize("seed", range(2))
def test_two_levels_are_solved_exactly(spec: str, seed: int) -> None:
    """On one and two levels the dynamic programme is brute force's optimum, and each pair bound that pair's."""
    instance = chain(1 / load_topology(spec).pair_bandwidth_gb_per_s(), seed)
    levels = two_levels(instance.cost)
    assert levels is not None
    gpu = shortest_chain(instance, levels)
    assert instance.admits(gpu)
    assert instance.layer_costs(gpu).sum() == pytest.approx(cheapest(instance))
    for bound, traffic in zip(pair_bounds(instance), instance.traffic, strict=True):
        pair = chain(instance.cost, 0, layers=2)
        assert bound == pytest.approx(cheapest(pair.__class__(**_fields(pair) | {"traffic": traffic[None]})))


def _fields(instance: Chain) -> dict[str, Any]:
    return {name: getattr(instance, name) for name in instance.__slots__}


@pytest.mark.parametrize("spec", ["torus:2x3", "mesh:2x3", "scale-out:2x3", "scale-out:3x2"])
def test_pair_bounds_hold_on_every_network(spec: str) -> None:
    """No assignment of a pair of layers costs less than its bound, on random and on improved assignments."""
    instance = chain(1 / load_topology(spec).pair_bandwidth_gb_per_s(), 1, layers=6)
    bounds, rng = pair_bounds(instance), np.random.default_rng(0)
    for _ in range(5):
        gpu = improve(instance, np.array([rng.permutation(6) for _ in range(6)]))
        assert (bounds <= instance.layer_costs(gpu) + 1e-12).all()


def test_levels_are_recognised() -> None:
    """Only equal nodes of consecutive GPUs with two costs are two levels."""
    levels = two_levels(1 / load_topology("scale-out:2x4").pair_bandwidth_gb_per_s())
    assert levels is not None
    assert (levels.nodes, levels.gpus_per_node, levels.num_partitions) == (2, 4, 35)
    assert two_levels(1 / load_topology("torus:3x3").pair_bandwidth_gb_per_s()) is None
    shuffled = (1 / load_topology("scale-out:2x2").pair_bandwidth_gb_per_s())[:, [0, 2, 1, 3]][[0, 2, 1, 3]]
    assert two_levels(shuffled) is None


@given(st.integers(0, 10**6))
def test_bottleneck_assignment_is_exact(seed: int) -> None:
    """The matching's largest cost is the least over all permutations of allowed places; None where none is allowed."""
    rng = np.random.default_rng(seed)
    costs, allowed = rng.integers(0, 9, (4, 4)).astype(np.float64), rng.random((4, 4)) < 0.7
    rows = np.arange(4)
    best = min(
        (costs[rows, order].max() for order in itertools.permutations(range(4)) if allowed[rows, order].all()),
        default=None,
    )
    found = bottleneck_assignment(costs, allowed)
    assert (found is None) == (best is None)
    if found is not None:
        assert allowed[rows, found].all()
        assert costs[rows, found].max() == best


def small(topology: str = "scale-out:2x2", **options: Any) -> Problem:
    """Three layers of eight experts."""
    trace = make_trace(3, tokens=80, layers=3, experts=8)
    return make_problem(trace, topology, **({"objective": "load"} | options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole_model", [False, True])
def test_both_stages_are_proven_on_small_problems(backend: str, whole_model: bool) -> None:
    """On small problems both programmes are solved to proven optimality and both memory rules are kept."""
    problem = small(whole_model=whole_model)
    answer = attempt(problem, backend=backend)
    assert answer.placement is not None
    assert {name: stage.status for name, stage in stages(answer).items()} == dict.fromkeys(
        ("ILP1", "ILP2"), Status.OPTIMAL
    )
    assert answer.status is Status.FEASIBLE
    answer.placement.check_fits(problem.slots_per_gpu, whole_model=whole_model)
    assert answer.placement.used_slots().sum(axis=0).tolist() == [6, 6, 6, 6]


@pytest.mark.parametrize("whole_model", [False, True])
def test_backends_agree_on_both_stages(whole_model: bool) -> None:
    """All backends prove the same value of ILP1, and of ILP2 where ILP1 leaves one choice of clusters."""
    first = [stages(attempt(small(whole_model=whole_model), backend=name))["ILP1"].objective for name in BACKENDS]
    assert first == pytest.approx([first[0]] * len(first))
    single = make_problem(make_trace(1, tokens=60, layers=4, experts=4), "scale-out:2x2", objective="load")
    costs = [stages(attempt(single, backend=name))["ILP2"].objective for name in BACKENDS]
    assert costs == pytest.approx([costs[0]] * len(costs))


def test_uneven_slots_and_spare_slots() -> None:
    """Clusters fit the slots of the GPU they are put on; spare slots stay empty, and the answer says so."""
    tight = small(slots_per_gpu=np.array([3, 1, 3, 1]))
    answer = attempt(tight)
    assert answer.placement is not None
    assert (answer.placement.used_slots() == [3, 1, 3, 1]).all()
    spare = attempt(small(slots_per_gpu=np.array([1, 4, 4, 4])))
    assert spare.placement is not None
    assert (spare.placement.used_slots() <= [1, 4, 4, 4]).all()
    assert (spare.placement.replicas() == 1).all()
    assert any("does not replicate" in note for note in spare.notes)


def test_counts_alone_balance_load() -> None:
    """Without transitions ILP2 is skipped with a note and ILP1 still answers."""
    problem = small()
    stats = count_routing(Counts(meta=problem.stats.meta, counts=problem.stats.load[None]))
    answer = attempt(problem.replace(stats=stats))
    assert answer.placement is not None
    assert list(stages(answer)) == ["ILP1"]
    assert any("ILP2 is skipped" in note for note in answer.notes)


def test_a_load_cap_out_of_reach_is_infeasible() -> None:
    """Without spare slots a proof that ILP1 has no clusters within the cap is a proof for the problem."""
    problem = small(load_cap=np.full(3, 1.0))
    answer = attempt(problem)
    assert (answer.placement, answer.status, answer.stop_reason) == (None, Status.INFEASIBLE, StopReason.PROVEN)
    assert stages(answer)["ILP1"].status is Status.INFEASIBLE
    spare = attempt(small(load_cap=np.full(3, 1.0), slots_per_gpu=np.full(4, 3)))
    assert (spare.placement, spare.status) == (None, Status.UNKNOWN)


def test_memory_out_of_reach_is_said() -> None:
    """Clusters that cannot be levelled over the whole model are called INFEASIBLE, and an answer is still given."""
    trace = make_trace(5, tokens=60, layers=1, experts=8)
    tight = make_problem(trace, "scale-up:4", objective="load", whole_model=True)
    answer = attempt(tight)
    assert answer.placement is not None
    assert answer.placement.used_slots().tolist() == [[2, 2, 2, 2]]
    assert any(note.startswith("INFEASIBLE as published") for note in answer.notes)
    assert list(stages(answer)) == ["ILP1", "ILP1 again"]
    roomy = attempt(tight.replace(slots_per_gpu=np.full(4, 5)))
    assert roomy.placement is not None
    assert sorted(roomy.placement.used_slots()[0].tolist()) == [1, 1, 3, 3]
    assert stages(roomy)["memory"].objective == stages(roomy)["memory"].bound == 1
    assert any("INFEASIBLE as published" in note and "by 1 experts" in note for note in roomy.notes)


def hard(layers: int = 8) -> Problem:
    """32 experts of similar load on two nodes of four GPUs: too many clusterings for any proof."""
    rng = np.random.default_rng(0)
    score = rng.normal(0, 0.5, (layers, 32)) + rng.gumbel(size=(2000, layers, 32))
    trace = make_trace(0, tokens=2000, layers=layers, experts=32, top_k=4)
    trace = trace.replace(experts=np.argsort(-score, axis=2)[:, :, :4])
    return make_problem(trace, "scale-out:2x4", objective="load")


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_same_bytes(backend: str) -> None:
    """A rerun with the same seed and work gives the same placement and the same stages."""
    problem = hard(layers=2)
    limits = Limits(work=0.02, seed=3, options={"backend": backend})
    one, other = (solve(problem, limits, Report()) for _ in range(2))
    assert one.placement is not None
    assert other.placement is not None
    assert stages(one)["ILP1"].status is Status.FEASIBLE
    assert one.placement.digest() == other.placement.digest()
    assert one.stages == other.stages


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_are_kept_and_the_best_is_returned(backend: str) -> None:
    """Cut by the clock or by the user, MoETuner returns a valid placement in time and says why it stopped."""
    problem = hard()
    started = time.monotonic()
    late = solve(problem, Limits(work=1e5, time_limit_s=2.0, options={"backend": backend}), Report())
    assert time.monotonic() - started <= 1.1 * 2.0 + 1
    assert late.stop_reason is StopReason.TIME_LIMIT
    limits = Limits(work=1e5, options={"backend": backend})
    threading.Timer(1.0, limits.stop.set).start()
    cut = solve(problem, limits, Report())
    assert cut.stop_reason is StopReason.INTERRUPTED
    for answer in (late, cut):
        assert answer.placement is not None
        answer.placement.check_fits(problem.slots_per_gpu)
        assert all(stage.bound is not None and stage.bound <= stage.objective for stage in answer.stages)


def test_an_ilp1_cut_is_never_called_optimal() -> None:
    """Interrupted before it begins, every stage is FEASIBLE with a bound, unless arithmetic proves it."""
    limits = Limits()
    limits.stop.set()
    answer = solve(small(), limits, Report())
    assert answer.placement is not None
    assert all((stage.status is Status.OPTIMAL) == (stage.stop_reason is StopReason.PROVEN) for stage in answer.stages)
    assert stages(answer)["ILP2"].stop_reason is StopReason.INTERRUPTED


def test_improvements_are_reported_in_order() -> None:
    """Each stage's reported objective never rises and is never below its bound."""
    report = Report()
    problem = make_problem(make_trace(2, tokens=600, layers=3, experts=16, top_k=4), "torus:2x2", objective="load")
    solve(problem, Limits(work=0.5, options={"tolerance": "0"}), report)
    for name in ("ILP1", "ILP2"):
        told = [entry for entry in report.history if entry.source.startswith(name)]
        assert told
        assert [e.objective for e in told] == sorted((e.objective for e in told), reverse=True)
        assert all(e.bound is not None and e.bound <= e.objective * (1 + 1e-9) for e in told)


def test_options_are_checked() -> None:
    """Unknown backends and tolerances that are no share are refused by name."""
    with pytest.raises(UnknownNameError, match="cpsat"):
        attempt(small(), backend="cp-sat")
    for tolerance in ("much", "1.5", "-1%"):
        with pytest.raises(InputError, match="tolerance"):
            attempt(small(), tolerance=tolerance)
    assert attempt(small(), tolerance="2.5%").placement is not None


@pytest.mark.parametrize("topology", ["scale-up:1", "scale-up:8"])
def test_degenerate_shapes(topology: str) -> None:
    """One GPU, and as many GPUs as experts, are ordinary problems."""
    answer = attempt(small(topology))
    assert answer.placement is not None
    assert stages(answer)["ILP1"].status is Status.OPTIMAL


@given(st.integers(0, 10**6), st.sampled_from([(3, 4), (8, 2), (10, 3)]))
def test_swaps_never_raise_the_deviation(seed: int, shape: tuple[int, int]) -> None:
    """Swaps of experts and of pairs keep the sizes, leave the start as it was, and end no further from the mean."""
    size, clusters = shape
    rng = np.random.default_rng(seed)
    room = np.full(clusters, size)
    layer = Layer(load=rng.integers(1, 1000, size * clusters), lower=room, upper=room)
    start = rng.permutation(np.repeat(np.arange(clusters), size))
    before = start.copy()
    found = improved(layer, start)
    assert (start == before).all()
    assert np.bincount(found).tolist() == room.tolist()
    assert deviation_bound(layer) - 1e-9 <= layer.deviation(found) <= layer.deviation(start)
