"""Laws of :mod:`moeplace.bounds`: no placement is better than a bound, by exhaustive enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import every_placement, make_problem, make_trace, random_placement, slow_topology

from moeplace.affinity import count_routing
from moeplace.bounds import hottest_copy, load_floor, objective_bound, step_time_bound
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value
from moeplace.problem import OBJECTIVES, Problem
from moeplace.topology import Topology, load_topology
from moeplace.trace import Counts

# slots per GPU for four experts: tight, uneven, spare, a GPU without slots, everything everywhere
SLOTS = [[2, 2], [3, 1], [3, 2], [4, 0], [4, 4], [2, 1, 2], [2, 2, 2], [0, 3, 2]]


def optimum(problem: Problem) -> float:
    """Least objective of any placement."""
    return min(objective_value(problem, placement) for placement in every_placement(problem))


def _custom(gpus: int) -> Topology:
    pairs = np.random.default_rng(gpus).uniform(1, 5, (gpus, gpus))
    pairs[:, 0] = 0.02  # a placement may leave the slow receiver alone
    return slow_topology(f"scale-up:{gpus}").replace(kind="custom", pair_gb_per_s=pairs)


def _topologies(gpus: int) -> list[Topology]:
    found = [slow_topology(f"scale-up:{gpus}"), slow_topology(f"scale-out:{gpus}x1"), _custom(gpus)]
    unlike = slow_topology(f"scale-up:{gpus}").replace(gpu_speed=np.linspace(0.5, 1, gpus))
    return [*found, unlike, *([slow_topology("scale-out:2x1")] if gpus == 2 else [])]


@pytest.mark.parametrize("slots", SLOTS, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bound_is_below_the_optimum(slots: list[int], objective: str) -> None:
    """One layer: for every objective, phase, dataflow, network and source of homes the bound is at most the optimum."""
    for seed, ranks, phase in itertools.product(range(2), (None, 2), ("decode", "prefill")):
        trace = make_trace(seed, tokens=30, layers=1, experts=4, top_k=1 + seed, ranks=ranks)
        for topology in (
            _topologies(len(slots)) if objective == "step-time" else [load_topology(f"scale-up:{len(slots)}")]
        ):
            problem = make_problem(trace, topology, slots_per_gpu=slots, objective=objective, phase=phase, requests=30)
            bound = objective_bound(problem)
            assert bound <= optimum(problem) * (1 + 1e-9)
            assert bound > 0 or objective in ("cross", "remote")  # one layer has no next one, one node no other


@pytest.mark.parametrize("slots", [[2, 2], [3, 1], [3, 2], [4, 0]], ids=str)
@pytest.mark.parametrize("dataflow", ["dispatch-combine", "context-coherent"])
def test_bound_over_two_layers(slots: list[int], dataflow: str) -> None:
    """Two layers together, where context-coherent placements of layers depend on each other."""
    trace = make_trace(2, tokens=20, layers=2, experts=4, top_k=2)
    places = [slow_topology(f"{kind}:{dims}") for kind, dims in (("scale-up", 2), ("scale-out", "2x1"), ("torus", 2))]
    for objective, topology in itertools.product(OBJECTIVES, [*places, _custom(2)]):
        problem = make_problem(
            trace, topology, slots_per_gpu=slots, objective=objective, dataflow=dataflow, requests=40
        )
        bound = objective_bound(problem)
        assert bound <= optimum(problem) * (1 + 1e-9)


@pytest.mark.parametrize("spec", ["scale-out:2x2", "torus:2x2", "full-mesh:2x2", "mesh:2x2"])
def test_moving_is_bounded_by_what_must_cross(spec: str) -> None:
    """Where tokens move between experts, traffic that must cross GPUs and nodes lifts the bound."""
    trace = make_trace(4, tokens=20, layers=2, experts=4, top_k=2)
    slow = slow_topology(spec, **({"nic_gb_per_s": 0.2} if "out" in spec else {"link_gb_per_s": 0.2}))
    problem = make_problem(trace, slow, dataflow="context-coherent", requests=400)
    quick = problem.replace(topology=slow.replace(local_gb_per_s=1e9, nic_gb_per_s=1e9, link_gb_per_s=1e9))
    assert objective_bound(quick) < objective_bound(problem) <= optimum(problem) * (1 + 1e-9)
    known = step_time_bound(problem, {"gpu": 1.0 * problem.stats.transition.sum()})
    assert known >= step_time_bound(problem)


@pytest.mark.parametrize("level", ["gpu", "node"])
def test_crossing_is_bounded_at_each_level(level: str) -> None:
    """Pairs that cross nodes are bounded as those of GPUs as large as nodes."""
    for seed in range(3):
        trace = make_trace(seed, tokens=30, layers=2, experts=4, top_k=2)
        problem = make_problem(
            trace, "scale-out:2x2", objective="cross", copies_level=level, dataflow="context-coherent"
        )
        assert 0 < objective_bound(problem) <= optimum(problem) * (1 + 1e-9)


@pytest.mark.parametrize("slots", [[2, 2], [3, 2], [4, 0], [4, 4]], ids=str)
@pytest.mark.parametrize("kind", ["scale-up", "custom"])
def test_bound_on_counts(slots: list[int], kind: str) -> None:
    """On counts, in both phases, with the prefill kernels' latency far above what counts are timed with."""
    topology = _custom(2) if kind == "custom" else slow_topology("scale-up:2")
    trace = make_trace(3, tokens=30, layers=1, experts=4)
    counts = count_routing(Counts(meta=trace.meta, counts=count_routing(trace).load[None]))
    for phase in ("decode", "prefill"):
        problem = make_problem(
            trace, topology.replace(normal_latency_us=1e4), slots_per_gpu=slots, phase=phase
        ).replace(stats=counts)
        assert step_time_bound(problem) <= optimum(problem) * (1 + 1e-9)


@pytest.mark.parametrize("slots", [[1, 1], [2, 1], [2, 0]], ids=str)
def test_bound_with_slots_over_the_whole_model(slots: list[int]) -> None:
    """Where slots are counted over all layers together a layer may be lopsided, and the bounds still hold."""
    trace = make_trace(4, tokens=20, layers=2, experts=2, top_k=1)
    room = np.array(slots) * 2
    for objective in ("load", "step-time", "copies"):
        problem = make_problem(
            trace, slow_topology("scale-up:2"), slots_per_gpu=slots, objective=objective, whole_model=True
        )
        bound = objective_bound(problem)
        values = [
            objective_value(problem, placement)
            for placement in every_placement(problem.replace(slots_per_gpu=room))
            if (placement.used_slots().sum(axis=0) <= room).all()
        ]
        assert bound <= min(values) * (1 + 1e-9)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_load_floor_holds_layer_by_layer(seed: int, room: list[int]) -> None:
    """No placement has a layer whose max/mean is below that layer's floor, and no floor is below 1."""
    room[0] += max(0, 6 - sum(room))
    trace = make_trace(seed % 7)
    problem = make_problem(trace, f"scale-up:{len(room)}", slots_per_gpu=room)
    floor = load_floor(problem)
    assert (floor >= 1).all()
    placement = random_placement(seed, room, 2, 6)
    assert (max_over_mean(placement, problem.stats.load) >= floor * (1 - 1e-12)).all()


def test_floors_that_are_reached() -> None:
    """Floors are exact where they should be: a hot expert alone, beside the coldest, split over copies, fewer GPUs."""
    load = np.array([[80, 10, 6, 4]])
    for slots, floor in (
        ([1, 1, 1, 1], 80 / 25),
        ([2, 2], 84 / 50),
        ([2, 1, 1, 1], 40 / 25),
        ([2, 2, 0], 84 * 3 / 100),
        ([4, 4], 1.0),
        ([4, 0], 2.0),
    ):
        trace = make_trace(0, layers=1, experts=4, top_k=1)
        problem = make_problem(trace, f"scale-up:{len(slots)}", slots_per_gpu=slots, objective="load")
        stats = count_routing(Counts(meta=trace.meta, counts=load[None]))
        problem = problem.replace(stats=stats)
        assert load_floor(problem)[0] == pytest.approx(floor)
        assert optimum(problem) == pytest.approx(floor)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(0, 6), st.integers(1, 4))
def test_hottest_copy_is_the_best_split(load: list[int], spare: int, most: int) -> None:
    """No other way of dealing spare copies, at most ``most`` of each expert, makes the hottest copy colder."""
    found = float(hottest_copy(np.array([load], float), spare, most)[0])
    ways = itertools.product(range(1, most + 1), repeat=len(load))
    best = min(
        max(one / copies for one, copies in zip(load, way, strict=True))
        for way in ways
        if sum(way) <= len(load) + spare
    )
    assert found <= best + 1e-9
    if len(load) + spare <= most * len(load):
        assert found == pytest.approx(best)


def test_bounds_are_not_empty() -> None:
    """On an even instance the step-time bound is within 1 % of the optimum: it says something."""
    trace = make_trace(0, tokens=4, layers=1, experts=4, top_k=4)
    problem = make_problem(trace, slow_topology("scale-up:2"))
    assert step_time_bound(problem) == pytest.approx(optimum(problem), rel=0.01)


def test_unlike_gpus_tighten_the_bound() -> None:
    """GPUs of half the speed raise the bound on compute to twice; one slow GPU of two raises it by a third."""
    trace = make_trace(0, tokens=4, layers=1, experts=4, top_k=4)
    alike = make_problem(trace, load_topology("scale-up:2").replace(link_gb_per_s=1e9))
    one, both = (
        step_time_bound(alike.replace(topology=alike.topology.replace(gpu_speed=np.array(speed))))
        for speed in ([1.0, 0.5], [0.5, 0.5])
    )
    fixed = step_time_bound(alike.replace(topology=alike.topology.replace(gpu_speed=np.full(2, 1e12))))
    whole = step_time_bound(alike) - fixed
    assert both - fixed == pytest.approx(2 * whole)
    assert one - fixed == pytest.approx(4 / 3 * whole)


@pytest.mark.parametrize("spec", ["torus:3", "torus:3:one-shot", "full-mesh:3", "mesh:3x1", "torus:3:valiant"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_direct_networks_are_bounded_too(spec: str, phase: str) -> None:
    """On tori and meshes no placement beats the bound, which holds more than latencies where links are slow."""
    trace = make_trace(1, tokens=30, layers=1, experts=5, top_k=2)
    slow = load_topology(spec).replace(link_gb_per_s=0.5)
    problem = make_problem(trace, slow, slots_per_gpu=[2, 2, 2], phase=phase)
    bound, best = step_time_bound(problem), optimum(problem)
    assert bound <= best * (1 + 1e-9)
    free = step_time_bound(problem.replace(topology=slow.replace(link_gb_per_s=1e9)))
    assert (bound > free * 1.05) == (phase == "decode")


@pytest.mark.parametrize(
    ("top_k", "slots", "level", "bound"), [(3, [2, 2], "gpu", 2), (3, [4, 4], "gpu", 1), (3, [2, 2], "node", 1)]
)
def test_copies_bound(top_k: int, slots: list[int], level: str, bound: float) -> None:
    """A token with k distinct experts needs ⌈k/S⌉ GPUs of S slots, or nodes of all their GPUs' slots."""
    trace = make_trace(0, layers=1, experts=4, top_k=top_k)
    problem = make_problem(trace, "scale-out:1x2", slots_per_gpu=slots, objective="copies", copies_level=level)
    assert objective_bound(problem) == bound
