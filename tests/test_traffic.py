"""Laws of :mod:`moeplace.traffic`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_placement

from moeplace import traffic
from moeplace.balance import least_busy_split
from moeplace.counting import count_visits, first_visits
from moeplace.network import LOW_LATENCY, NORMAL
from moeplace.routing import POLICIES, Router
from moeplace.topology import load_topology
from moeplace.traffic import StepTokens, chain_traffic, dispatch_traffic, step_quotas, visit


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


LOOPED = [policy for policy in POLICIES if policy != "fewest-gpus"]  # that one chooses for the whole token beforehand


def random_tokens(seed: int, tokens: int = 40, gpus: int = 4) -> StepTokens:
    """Tokens of three steps over 20 rows of ids."""
    rng = np.random.default_rng(seed)
    group = np.sort(rng.integers(0, 3, tokens))
    return StepTokens(row=rng.integers(0, 20, tokens), group=group, num_groups=3, home=rng.integers(0, gpus, tokens))


def random_ids(seed: int, experts: int, top_k: int) -> np.ndarray:
    """Distinct experts of 20 rows."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:top_k] for _ in range(20)]).astype(np.uint8)


@given(
    st.integers(0, 10**6),
    st.sampled_from([policy for policy in LOOPED if policy != "lp"]),
    st.sampled_from(["scale-up:4", "scale-out:2x2", "torus:2x2"]),
    st.sampled_from([LOW_LATENCY, NORMAL]),
)
def test_the_loop_visits_as_numpy_does(seed: int, policy: str, spec: str, kernel: str) -> None:
    """Token by token or in whole arrays, rows, copies and copies per node are the same, and none is lost."""
    topology, experts = load_topology(spec), 5
    placement = random_placement(seed, [3, 2, 3, 2], 1, experts)
    load = np.random.default_rng(seed).integers(1, 9, (1, experts))
    router, tokens, ids = Router.of(placement, topology, policy, load), random_tokens(seed), random_ids(seed, 5, 3)
    plain = visit(ids, tokens, router, 0, (topology, kernel))
    looped = traffic._by_loop(ids, tokens, router, 0, (topology, kernel))
    for found in (plain, looped):
        assert found.rows.sum() == 3 * len(tokens.row)
        assert np.array_equal(found.rows, plain.rows)
        assert np.array_equal(found.traffic.copies, plain.traffic.copies)
        assert (found.traffic.node_copies is None) == (kernel == LOW_LATENCY)
        if kernel == NORMAL:
            assert np.array_equal(found.traffic.node_copies, plain.traffic.node_copies)


def test_the_compiled_loop_visits_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, the loop gives the same for every policy and kernel."""
    topology = load_topology("scale-out:2x2")
    placement = random_placement(1, [3, 2, 3, 2], 1, 5)
    tokens, ids = random_tokens(1, 500), random_ids(1, 5, 3)
    for policy in LOOPED:
        router = Router.of(placement, topology, policy, np.array([[5, 1, 2, 3, 1]]))
        for kernel in (LOW_LATENCY, NORMAL):
            monkeypatch.setattr(traffic, "COMPILE_FROM_SELECTIONS", 10**9)
            plain = traffic._by_loop(ids, tokens, router, 0, (topology, kernel))
            monkeypatch.setattr(traffic, "COMPILE_FROM_SELECTIONS", 1)
            compiled = visit(ids, tokens, router, 0, (topology, kernel))
            assert np.array_equal(plain.rows, compiled.rows)
            assert np.array_equal(plain.traffic.copies, compiled.traffic.copies)


@given(st.integers(0, 10**6))
def test_every_step_is_split_as_evenly_as_can_be(seed: int) -> None:
    """Under lp each step's busiest GPU has what the flow optimum gives it, up to one token for each split expert."""
    topology, experts = load_topology("scale-up:4"), 5
    placement = random_placement(seed, [3, 2, 3, 2], 1, experts)
    router, tokens, ids = Router.of(placement, topology, "lp"), random_tokens(seed, 200), random_ids(seed, 5, 2)
    found = visit(ids, tokens, router, 0, (topology, LOW_LATENCY))
    load = count_visits(tokens.group, ids[tokens.row], (3, experts), distinct=False).astype(float)
    _, least = least_busy_split(load, router.table.gpu[0], router.table.count[0], 4)
    busiest = found.rows.sum(axis=2).max(axis=1)
    split = int((router.table.count[0] > 1).sum())
    assert (busiest >= least - 1e-9).all()
    assert (busiest <= least + split).all()
    quota = step_quotas(ids, tokens, router, 0, 4)
    assert np.array_equal(quota[:, :, -1], load)
