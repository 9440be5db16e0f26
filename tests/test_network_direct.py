"""Laws of :mod:`moeplace.network.direct`: who carries what on tori, full meshes and meshes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.errors import TopologyError, UnknownNameError
from moeplace.network import LOW_LATENCY, NORMAL, Traffic, exchange, stages_us
from moeplace.network.direct import ONE_SHOT_CONGESTION, move
from moeplace.topology import ALL_TO_ALLS, Topology, load_topology

SMALL = ["torus:3", "torus:4", "torus:2x3", "torus:4x2", "torus:3x2x2"]
SMALL += ["full-mesh:4", "full-mesh:2x3", "full-mesh:2x2x2"]
MESHES = ["mesh:2x3", "mesh:4x1"]


def network(spec: str, algorithm: str | None = None, **changes: Any) -> Topology:
    """A topology of 1 GB/s links without latency: 1,000 bytes take 1 µs over a link."""
    values = {"link_gb_per_s": 1.0, "low_latency_us": 0.0, "normal_latency_us": 0.0, "hop_latency_us": 0.0}
    topology = load_topology(spec).replace(**(values | changes))
    return topology if algorithm is None else topology.replace(all_to_all=algorithm)


def random_copies(seed: int, gpus: int) -> npt.NDArray[np.int64]:
    """A matrix of a few copies, some of them at home."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, (gpus, gpus)) * (rng.random((gpus, gpus)) < 0.5)


def ways(kind: str, length: int, a: int, b: int) -> list[tuple[float, list[tuple[int, str]]]]:
    """Ways along one line of GPUs: share and links, each link by its position and name."""
    if a == b:
        return [(1.0, [])]
    if kind == "full-mesh":
        return [(1.0, [(a, f"+{(b - a) % length}")])]
    up, down = (b - a) % length, (a - b) % length
    if kind == "torus" and length == 2:
        down = 99  # a ring of two has one link
    if kind == "mesh":
        up, down = (b - a, 99) if b > a else (99, a - b)
    found = []
    for hops, sign, name in ((up, 1, "+"), (down, -1, "-")):
        if hops == min(up, down):
            found.append((0.5 if up == down else 1.0, [((a + sign * i) % length, name) for i in range(hops)]))
    return found


def carried(topology: Topology, copies: npt.NDArray[Any], order: list[int]) -> dict[tuple[str, int], float]:
    """Copies over each link in dimension order, message by message and hop by hop."""
    load: dict[tuple[str, int], float] = defaultdict(float)
    for source, target in itertools.product(range(topology.num_gpus), repeat=2):
        here = list(np.unravel_index(source, topology.dims))
        there = np.unravel_index(target, topology.dims)
        for dim in order:
            for share, links in ways(topology.kind, topology.dims[dim], int(here[dim]), int(there[dim])):
                for position, name in links:
                    at = [*here[:dim], position, *here[dim + 1 :]]
                    gpu = int(np.ravel_multi_index([int(i) for i in at], topology.dims))
                    load[f"link {name}{'xyz'[dim]}", gpu] += share * copies[source, target]
            here[dim] = there[dim]
    return load


def as_dict(links: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Loads of :func:`move` by link, without the idle ones."""
    return {(name, gpu): float(load) for name, row in links.items() for gpu, load in enumerate(row) if load > 1e-12}


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([*SMALL, *MESHES]))
def test_one_shot_loads_are_those_of_every_message(seed: int, spec: str) -> None:
    """Each message hop by hop gives each link's load; the time is the busiest one's, on a torus with congestion."""
    topology = network(spec, "one-shot")
    copies = random_copies(seed, topology.num_gpus)
    expected = carried(topology, copies, list(range(len(topology.dims))))
    moved = move(topology, copies)
    assert as_dict(moved.links) == pytest.approx({key: load for key, load in expected.items() if load > 0})
    congestion = ONE_SHOT_CONGESTION if topology.kind == "torus" else 1
    assert float(moved.busiest) == pytest.approx(congestion * max(expected.values(), default=0.0))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(SMALL))
def test_adaptive_loads_are_means_over_orders(seed: int, spec: str) -> None:
    """Spread over every order of the dimensions, a link carries the mean of what each order puts on it."""
    topology = network(spec, "adaptive")
    copies = random_copies(seed, topology.num_gpus)
    orders = [list(order) for order in itertools.permutations(range(len(topology.dims)))]
    expected: dict[tuple[str, int], float] = defaultdict(float)
    for order in orders:
        for key, load in carried(topology, copies, order).items():
            expected[key] += load / len(orders)
    moved = move(topology, copies)
    assert as_dict(moved.links) == pytest.approx({key: load for key, load in expected.items() if load > 0})
    assert float(moved.busiest) == pytest.approx(max(expected.values(), default=0.0))


def half_ring_rounds(topology: Topology, dim: int, flows: dict[tuple[int, int], float]) -> float:
    """Sum over rounds of the busiest link when flows (from GPU, to coordinate) move along one dimension in step."""
    kind, length = topology.kind, topology.dims[dim]
    rounds: dict[int, dict[tuple[str, int], float]] = defaultdict(lambda: defaultdict(float))
    for (gpu, to), amount in flows.items():
        here = list(np.unravel_index(gpu, topology.dims))
        for share, links in ways(kind, length, int(here[dim]), to):
            for number, (position, name) in enumerate(links):
                at = [int(i) for i in [*here[:dim], position, *here[dim + 1 :]]]
                rounds[number][name, int(np.ravel_multi_index(at, topology.dims))] += share * amount
    return sum(max(loads.values()) for loads in rounds.values())


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(SMALL))
def test_schedule_is_that_of_chunks_in_rotation(seed: int, spec: str) -> None:
    """Chunks carried dimension by dimension, phase by phase and round by round, take what the model says."""
    topology = network(spec)
    copies, dims = random_copies(seed, topology.num_gpus), topology.dims
    where = [{(s, t): copies[s, t] / len(dims) for s, t in np.ndindex(*copies.shape)} for _ in dims]
    total = 0.0
    for phase in range(len(dims)):
        times = []
        for chunk in range(len(dims)):
            dim = (chunk + phase) % len(dims)
            flows: dict[tuple[int, int], float] = defaultdict(float)
            moved: dict[tuple[int, int], float] = defaultdict(float)
            for (at, target), amount in where[chunk].items():
                to = int(np.unravel_index(target, dims)[dim])
                flows[at, to] += amount
                place = [int(i) for i in np.unravel_index(at, dims)]
                place[dim] = to
                moved[int(np.ravel_multi_index(place, dims)), target] += amount
            where[chunk] = moved
            times.append(half_ring_rounds(topology, dim, flows))
        total += max(times)
    assert float(move(topology, copies).busiest) == pytest.approx(total)
    assert all(at == target for chunk in where for (at, target), amount in chunk.items() if amount)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([*SMALL, *MESHES]), st.sampled_from(ALL_TO_ALLS))
def test_bytes_on_links_are_bytes_times_hops(seed: int, spec: str, algorithm: str) -> None:
    """Minimal algorithms carry every copy over as many links as it has hops; Valiant over those of both legs."""
    topology = network(spec, algorithm)
    copies = random_copies(seed, topology.num_gpus)
    total = sum(float(load.sum()) for load in move(topology, copies).links.values())
    hops, apart = topology.hops(), copies * ~np.eye(topology.num_gpus, dtype=bool)
    expected = float((copies * hops).sum())
    if algorithm == "valiant":
        mean = hops.mean(axis=1)
        expected = float(apart.sum(axis=1) @ mean + apart.sum(axis=0) @ mean)
    assert total == pytest.approx(expected)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([*SMALL, *MESHES]), st.sampled_from(ALL_TO_ALLS), st.integers(0, 99))
def test_shifting_and_renumbering_change_nothing(seed: int, spec: str, algorithm: str, shift: int) -> None:
    """On tori and full meshes a shift of all positions, and anywhere a rank map with ranks renamed, leaves the time."""
    topology = network(spec, algorithm)
    gpus, copies = topology.num_gpus, random_copies(seed, topology.num_gpus)
    time = float(move(topology, copies).busiest)
    order = np.random.default_rng(shift).permutation(gpus)
    renamed = topology.replace(coordinates=order)
    moved = move(renamed, copies[np.ix_(order, order)])
    assert float(moved.busiest) == pytest.approx(time)
    plain = move(topology, copies)
    for name, load in moved.links.items():
        assert load == pytest.approx(plain.links[name][order])
    if topology.kind != "mesh":
        grid = np.stack(np.unravel_index(np.arange(gpus), topology.dims))
        moved_grid = (grid + shift) % np.array(topology.dims)[:, None]
        places = np.ravel_multi_index(tuple(moved_grid), topology.dims)
        assert float(move(topology, copies[np.ix_(places, places)]).busiest) == pytest.approx(time)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([*SMALL, *MESHES]), st.sampled_from(ALL_TO_ALLS), st.floats(1, 8))
def test_more_bandwidth_is_never_slower(seed: int, spec: str, algorithm: str, factor: float) -> None:
    """Faster links never lengthen an exchange, more copies never shorten it, and the way back is the transpose."""
    topology = network(spec, algorithm, hop_latency_us=0.5, low_latency_us=2.0)
    copies = random_copies(seed, topology.num_gpus)

    def time(place: Topology, matrix: npt.NDArray[Any], **way: bool) -> float:
        traffic = Traffic(copies=matrix)
        return float(exchange(place, traffic, kernel=LOW_LATENCY, bytes_per_copy=1000, **way).time_us)

    assert time(topology.replace(link_gb_per_s=factor), copies) <= time(topology, copies) + 1e-9
    assert time(topology, copies + 1) >= time(topology, copies) - 1e-9
    assert time(topology, copies, returning=True) == pytest.approx(time(topology, copies.T))


def test_two_gpus_one_token() -> None:
    """One copy over the one link: its bytes, the fixed time of the kernel, and one hop."""
    copies = np.array([[0, 1], [0, 5]])
    for spec in ("torus:2", "full-mesh:2", "mesh:2x1"):
        topology = network(spec, "one-shot", low_latency_us=2.0, normal_latency_us=3.0, hop_latency_us=0.25)
        slow = ONE_SHOT_CONGESTION if spec == "torus:2" else 1.0
        for kernel, fixed in ((LOW_LATENCY, 2.0), (NORMAL, 3.0)):
            timed = exchange(topology, Traffic(copies=copies), kernel=kernel, bytes_per_copy=1000)
            assert timed.time_us == pytest.approx(fixed + 0.25 + slow)
    timed = exchange(network("full-mesh:2"), Traffic(copies=copies), kernel=LOW_LATENCY, bytes_per_copy=1000)
    names, busiest = timed.bottleneck()
    assert names[int(busiest)] == "link +1x of GPU 0"


@pytest.mark.parametrize(
    ("spec", "load"),
    [("torus:4x4x4", 8192), ("torus:8x8x4", 16384), ("full-mesh:4x4x4", 4096), ("full-mesh:8x8x4", 4096)],
)
def test_uniform_link_loads(spec: str, load: float) -> None:
    """Each GPU sends 16,384 flits to all, itself included: the busiest link's as published, within 0.1 %."""
    topology = network(spec)
    moved = move(topology, np.full((topology.num_gpus, topology.num_gpus), 16384 / topology.num_gpus))
    assert float(moved.busiest) == pytest.approx(load, rel=1e-3)
    assert max(float(links.max()) for links in moved.links.values()) <= load * (1 + 1e-9)


def test_equal_bandwidth_per_gpu() -> None:
    """64 GPUs of equal bandwidth, uniform traffic: switches 0.984, full mesh 2.25, torus 3.0 of M/B."""
    share = np.full((64, 64), 16384 / 64)
    times = {}
    for spec in ("scale-up:64", "full-mesh:4x4x4", "torus:4x4x4"):
        topology = load_topology(spec)
        speed = topology.local_gb_per_s
        free = {"low_latency_us": 0.0, "hop_latency_us": 0.0}
        timed = exchange(topology.replace(**free), Traffic(copies=share), kernel=LOW_LATENCY, bytes_per_copy=1)
        times[spec] = float(timed.time_us) / (16384 * 1e-3 / speed)
    assert list(times.values()) == pytest.approx([0.984, 2.25, 3.0], abs=1e-3)
    assert times["torus:4x4x4"] / times["full-mesh:4x4x4"] == pytest.approx(4 / 3)


def test_a_centre_link_of_a_mesh_carries_a_quarter() -> None:
    """Uniform traffic on a line of L GPUs: M·L/4 over the centre link, less towards the rim, nothing beyond it."""
    topology = network("mesh:8x8")
    links = move(topology, np.full((64, 64), 1.0)).links
    rows = links["link +y"].reshape(8, 8)
    assert rows.max() == rows[0, 3] == pytest.approx(64 * 8 / 4)
    assert rows[:, 7].max() == 0


def test_imbalance_costs_less_where_paths_are_shared() -> None:
    """One hot receiver slows a switched domain by its whole excess, a full mesh by less, a torus by less still."""
    rng = np.random.default_rng(0)
    weight = rng.lognormal(0, 0.25, 64)
    hot = np.tile(weight / weight.mean(), (64, 1))
    slowdown = []
    for spec in ("scale-up:64", "full-mesh:4x4x4", "torus:4x4x4"):
        topology = load_topology(spec).replace(low_latency_us=0.0, hop_latency_us=0.0)
        times = [
            float(exchange(topology, Traffic(copies=copies), kernel=LOW_LATENCY, bytes_per_copy=1).time_us)
            for copies in (hot, np.ones((64, 64)))
        ]
        slowdown.append(times[0] / times[1])
    assert slowdown[0] > slowdown[1] > slowdown[2] > 1


def test_a_bad_algorithm_is_refused() -> None:
    """Unknown algorithms are named with their neighbours, and switched networks have none."""
    with pytest.raises(UnknownNameError, match="valiant"):
        load_topology("torus:2x2:valliant")
    with pytest.raises(TopologyError, match="scale-up"):
        load_topology("scale-up:2:valiant")
    assert load_topology("torus:2x2:valiant").name == "torus:2x2:valiant"
    assert load_topology("mesh:2x2").all_to_all == "one-shot"


@given(st.integers(0, 99), st.sampled_from([*ALL_TO_ALLS, "switched"]), st.booleans())
def test_stages_add_up_to_the_time(seed: int, algorithm: str, returning: bool) -> None:
    """The linear stages of an exchange, put together by their maxima and sums, are its time without the latency."""
    topology = load_topology("scale-out:2x3") if algorithm == "switched" else network("torus:2x3", algorithm)
    copies = np.random.default_rng(seed).integers(0, 9, (2, 6, 6)).astype(np.float64)
    busy = exchange(topology, Traffic(copies=copies), kernel=LOW_LATENCY, bytes_per_copy=100.0, returning=returning)
    total = np.zeros(2)
    for chunks in stages_us(topology, copies, bytes_per_copy=100.0, returning=returning):
        total += np.max([loads.max(axis=-1).sum(axis=-1) for loads in chunks], axis=0)
    assert total == pytest.approx(busy.time_us - busy.latency_us)
