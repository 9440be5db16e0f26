"""Laws of :mod:`moeplace.traffic`."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeplace.counting import first_visits
from moeplace.network import LOW_LATENCY, NORMAL
from moeplace.topology import load_topology
from moeplace.traffic import chain_traffic, dispatch_traffic


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_first_visits_are_the_distinct_places(seed: int, top_k: int) -> None:
    """The marked entries of a token are its distinct places, each at its first appearance."""
    places = np.random.default_rng(seed).integers(0, 4, (20, top_k))
    for row, first in zip(places.tolist(), first_visits(places), strict=True):
        assert [place for place, new in zip(row, first, strict=True) if new] == list(dict.fromkeys(row))


@given(st.integers(0, 10**6), st.sampled_from(["scale-up:4", "scale-out:2x3"]), st.integers(1, 4))
def test_dispatch_equals_a_plain_loop(seed: int, spec: str, top_k: int) -> None:
    """V_sel counts selections, V_gpu distinct GPUs and V_node distinct nodes of each token, per batch and home."""
    topology, rng = load_topology(spec), np.random.default_rng(seed)
    gpus, batches = topology.num_gpus, 3
    gpu = rng.integers(0, gpus, (25, top_k))
    home, batch = rng.integers(0, gpus, 25), rng.integers(0, batches, 25)
    selections = np.zeros((batches, gpus, gpus), int)
    distinct, nodes = np.zeros_like(selections), np.zeros((batches, gpus, topology.num_nodes), int)
    for token in range(25):
        for target in gpu[token].tolist():
            selections[batch[token], home[token], target] += 1
        for target in set(gpu[token].tolist()):
            distinct[batch[token], home[token], target] += 1
        for node in {target // topology.gpus_per_node for target in gpu[token].tolist()}:
            nodes[batch[token], home[token], node] += 1
    low = dispatch_traffic(gpu, home, (batch, batches), topology, LOW_LATENCY)
    assert np.array_equal(low.copies, selections)
    assert low.node_copies is None
    normal = dispatch_traffic(gpu, home, (batch, batches), topology, NORMAL)
    assert np.array_equal(normal.copies, distinct)
    assert np.array_equal(normal.node_copies, nodes)


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_chain_equals_a_plain_loop(seed: int, top_k: int) -> None:
    """All k·k pairs of a token between two layers are counted, from GPU to GPU, per batch."""
    rng = np.random.default_rng(seed)
    here, there, batch = rng.integers(0, 3, (20, top_k)), rng.integers(0, 3, (20, top_k)), rng.integers(0, 2, 20)
    expected = np.zeros((2, 3, 3), int)
    for token in range(20):
        for source in here[token]:
            for target in there[token]:
                expected[batch[token], source, target] += 1
    assert np.array_equal(chain_traffic(here, there, (batch, 2), 3).copies, expected)
