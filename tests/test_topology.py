"""Laws of :mod:`moeplace.topology`."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import TopologyError, UnknownNameError
from moeplace.hardware import Accelerator
from moeplace.topology import (
    FULL_MESH,
    MESH,
    TORUS,
    Topology,
    build_topology,
    list_topologies,
    load_topology,
    num_links_per_gpu,
)

DIRECT = [("torus", (4, 4, 4)), ("torus", (2, 3)), ("torus", (5,)), ("mesh", (3, 4)), ("full-mesh", (3, 2, 4))]


def neighbours(kind: str, dims: tuple[int, ...], place: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Positions one link away, from the definition of each network."""
    found = set()
    for axis, length in enumerate(dims):
        if kind == FULL_MESH:
            others = set(range(length)) - {place[axis]}
        else:
            steps = {place[axis] - 1, place[axis] + 1}
            others = {x % length for x in steps} if kind == TORUS else {x for x in steps if 0 <= x < length}
        found |= {(*place[:axis], x, *place[axis + 1 :]) for x in others if x != place[axis]}
    return found


def breadth_first(kind: str, dims: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """``[GPU, GPU]`` hops by breadth-first search."""
    places = list(np.ndindex(*dims))
    hops = np.full((len(places), len(places)), -1)
    for start in places:
        reached, queue = {start: 0}, deque([start])
        while queue:
            here = queue.popleft()
            for there in neighbours(kind, dims, here):
                if there not in reached:
                    reached[there] = reached[here] + 1
                    queue.append(there)
        for place, count in reached.items():
            hops[places.index(start), places.index(place)] = count
    return hops


@pytest.mark.parametrize(("kind", "dims"), DIRECT)
def test_hops_equal_a_search(kind: str, dims: tuple[int, ...], h100: Accelerator) -> None:
    """Closed-form hops of direct networks are shortest paths; links per GPU are the neighbours of an inner one."""
    topology = build_topology(kind, dims, h100)
    assert np.array_equal(topology.hops(), breadth_first(kind, dims))
    most = max(len(neighbours(kind, dims, place)) for place in np.ndindex(*dims))
    assert num_links_per_gpu(kind, dims) == most
    pairs = topology.pair_bandwidth_gb_per_s()
    assert pairs[0, 1] == pytest.approx(topology.link_gb_per_s / topology.hops()[0, 1])


@pytest.mark.parametrize(
    ("spec", "links"), [("torus:4x4x4", 6), ("full-mesh:4x4x4", 9), ("torus:8x8", 4), ("mesh:8x8", 4)]
)
def test_links_share_the_bandwidth(spec: str, links: int, h100: Accelerator) -> None:
    """A link of a direct network has the accelerator's usable scale-up bandwidth over the number of links."""
    assert load_topology(spec).link_gb_per_s == pytest.approx(h100.scale_up_effective_gb_per_s / links)


@given(st.sampled_from(["scale-up:5", "scale-out:2x3", "torus:3x4", "full-mesh:2x3", "mesh:2x3"]), st.integers(0, 99))
def test_pairs_are_symmetric(spec: str, seed: int) -> None:
    """Hops and pair bandwidths are symmetric, 0 and infinite on the diagonal, under any rank map."""
    topology = load_topology(spec)
    order = np.random.default_rng(seed).permutation(topology.num_gpus)
    plain = topology.hops()
    topology = topology.replace(coordinates=order)
    for pairs in (topology.hops(), topology.pair_bandwidth_gb_per_s()):
        assert np.array_equal(pairs, pairs.T)
    assert (np.diag(topology.hops()) == 0).all()
    assert np.isinf(np.diag(topology.pair_bandwidth_gb_per_s())).all()
    if topology.kind in (TORUS, MESH, FULL_MESH):
        assert np.array_equal(topology.hops(), plain[np.ix_(order, order)])


@pytest.mark.parametrize(
    ("spec", "kind", "dims", "nodes"),
    [
        ("scale-up:8", "scale-up", (8,), 1),
        ("scale-out:2x8", "scale-out", (2, 8), 2),
        ("scale-out:2×8", "scale-out", (2, 8), 2),
        ("scale-out:1X4", "scale-out", (1, 4), 1),
        ("torus:4x4x4", "torus", (4, 4, 4), 1),
        ("mesh:1x1", "mesh", (1, 1), 1),
    ],
)
def test_specs(spec: str, kind: str, dims: tuple[int, ...], nodes: int) -> None:
    """``KIND:DIMS`` gives the kind, the lengths, GPUs numbered node by node."""
    topology = load_topology(spec)
    assert (topology.kind, topology.dims, topology.num_nodes) == (kind, dims, nodes)
    assert topology.num_gpus == math.prod(dims) == nodes * topology.gpus_per_node
    assert topology.node_of_gpu().tolist() == [g // topology.gpus_per_node for g in range(topology.num_gpus)]


def test_effective_numbers(h100: Accelerator) -> None:
    """Bandwidths are the usable ones; latency over NICs is taken only where there are NICs."""
    inside, across = load_topology("scale-up:8"), load_topology("scale-out:2x8")
    assert inside.local_gb_per_s == pytest.approx(h100.scale_up_effective_gb_per_s)
    assert across.nic_gb_per_s == pytest.approx(h100.nic_effective_gb_per_s)
    assert (inside.low_latency_us, across.low_latency_us) == (h100.scale_up_latency_us, h100.nic_latency_us)
    assert load_topology("scale-out:1x8").low_latency_us == h100.scale_up_latency_us
    assert load_topology("scale-up:8", accelerator="h800").accelerator.name == "h800"
    pairs = across.pair_bandwidth_gb_per_s()
    assert (pairs[0, 1], pairs[0, 8]) == (across.local_gb_per_s, across.nic_gb_per_s)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("scale-out:8", "1 dimensions"),
        ("scale-up:2x4", "2 dimensions"),
        ("scale-up:", "whole numbers"),
        ("scale-up:0", "at least 1"),
        ("scale-up:-2", "at least 1"),
        ("torus:4xx4", "whole numbers"),
        ("torus:2x2x2x2", "4 dimensions"),
        ("scale-up", "no dimensions"),
        ("nowhere.toml", "cannot read"),
        ("custom:4", "pair_gb_per_s"),
    ],
)
def test_bad_specs_are_told(spec: str, words: str) -> None:
    """Wrong dimensions, lengths and files are named errors."""
    with pytest.raises(TopologyError, match=words):
        load_topology(spec)


@pytest.mark.parametrize(
    ("spec", "near"), [("scaleup:8", "scale-up"), ("torsu:4x4", "torus"), ("fullmesh:2x2", "full-mesh")]
)
def test_unknown_kinds_suggest(spec: str, near: str) -> None:
    """A misspelt kind is refused with the right one among the suggestions."""
    with pytest.raises(UnknownNameError, match=f"did you mean {near}"):
        load_topology(spec)


def test_presets_load() -> None:
    """Every preset of the folder builds under its own name; an unknown one lists them."""
    for name in list_topologies():
        assert load_topology(name).name == name
    with pytest.raises(UnknownNameError, match="scale-up:8"):
        load_topology("my-cluster")


def test_files(tmp_path: Path) -> None:
    """A TOML file gives what it says, whole numbers or not; the accelerator can be overridden."""
    path = tmp_path / "mine.toml"
    path.write_text('kind = "scale-out"\ndims = [2, 4]\naccelerator = "h800"\nnic_gb_per_s = {value = 25}\n')
    mine = load_topology(str(path))
    assert (mine.name, mine.dims, mine.nic_gb_per_s, mine.accelerator.name) == ("mine", (2, 4), 25.0, "h800")
    assert load_topology(str(path), accelerator="h100").accelerator.name == "h100"
    assert mine.digest() == mine.replace(nic_gb_per_s=25, name="other", dims=[2, 4]).digest()
    path.write_text('kind = "custom"\ndims = [2]\npair_gb_per_s = [[0, 5], [5.5, 0]]\nlow_latency_us = 1\n')
    custom = load_topology(str(path))
    assert custom.pair_bandwidth_gb_per_s().tolist() == [[math.inf, 5], [5.5, math.inf]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind = ", "not a TOML file"),
        ("dims = [2]", "kind or dims"),
        ('kind = "scale-up"\ndims = [2.5]', "kind or dims"),
        ('kind = "scale-up"\ndims = [2]\nnic_gb_per_s = "fast"', "nic_gb_per_s"),
        ('kind = "scale-up"\ndims = [2]\nnic_gb_s = 5', "nic_gb_per_s"),
        ('kind = "scale-up"\ndims = [2]\nlocal_gb_per_s = -5', "bandwidth -5"),
        ('kind = "scale-up"\ndims = [2]\nlow_latency_us = nan', "latency nan"),
        ('kind = "scale-up"\ndims = [2]\naccelerator = "h101"', "h100"),
        ('kind = "custom"\ndims = [2]\npair_gb_per_s = [[1, 2]]', "shape"),
        ('kind = "custom"\ndims = [2]\npair_gb_per_s = [[1, 2], [1]]', "rows of numbers"),
        ('kind = "custom"\ndims = [2]\npair_gb_per_s = [[1, 0], [1, 1]]', "not positive"),
        ('kind = "torus"\ndims = [2]\ncoordinates = [0, 0]', "permutation"),
        ('kind = "torus"\ndims = [2]\ncoordinates = [0.5, 1]', "integers"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, text: str, words: str) -> None:
    """Whatever is wrong with a file, one named error says what."""
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises((TopologyError, UnknownNameError), match=words):
        load_topology(str(path))


def test_digest_is_of_the_content(two_gpus: Topology) -> None:
    """The label does not count; everything else does, the accelerator too."""
    assert two_gpus.digest() == two_gpus.replace(name="x").digest()
    changed = [two_gpus.replace(**change) for change in ({"local_gb_per_s": 1}, {"low_latency_us": 1}, {"dims": (3,)})]
    changed.append(load_topology("scale-up:2", accelerator="h200"))
    assert len({topology.digest() for topology in [two_gpus, *changed]}) == 5
