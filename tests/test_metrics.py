"""Laws of :mod:`moeplace.metrics`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_trace, random_placement, relabel_experts, relabel_placement, traces

from moeplace import metrics
from moeplace.affinity import count_routing
from moeplace.metrics import cross_shares, max_over_mean, token_metrics, traffic_metrics
from moeplace.placement import Placement
from moeplace.routing import Router
from moeplace.topology import load_topology
from moeplace.trace import Counts, Trace


def served(trace: Trace, placement: Placement) -> list[list[list[int]]]:
    """``[token][layer][k]`` GPU of each selection, one choice at a time."""
    router, home = Router.of(placement, load_topology(f"scale-up:{placement.num_gpus}")), np.array([0])
    return [
        [
            (router.choose(layer, np.array([chosen]), np.array([token]), home)[0] // placement.max_slots).tolist()
            for layer, chosen in enumerate(trace.experts[token].tolist())
        ]
        for token in range(trace.num_tokens)
    ]


@given(traces(experts=5), st.integers(0, 9), st.sampled_from(["scale-up:3", "scale-out:2x2", "scale-out:3x1"]))
def test_token_metrics_equal_a_plain_loop(trace: Trace, seed: int, spec: str) -> None:
    """Copies per token are distinct GPUs and nodes; locality is the share of choices on a GPU used a layer before."""
    topology = load_topology(spec)
    placement = random_placement(seed, [2, 3, 2, 1][: topology.num_gpus], trace.meta.num_layers, 5)
    gpus = nodes = local = choices = 0
    for token in served(trace, placement):
        for layer, targets in enumerate(token):
            gpus += len(set(targets))
            nodes += len({target // topology.gpus_per_node for target in targets})
            if layer:
                local += sum(target in token[layer - 1] for target in targets)
                choices += len(targets)
    cells = trace.num_tokens * trace.meta.num_layers
    expected = (gpus / cells, nodes / cells, local / choices if choices else None)
    assert token_metrics(trace, placement, topology) == pytest.approx(expected)


def test_many_gpus_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 64 GPUs take several words of bits; the block size does not matter."""
    trace = make_trace(0, tokens=50, layers=2, experts=80, top_k=6)
    placement, topology = random_placement(0, [1] * 80, 2, 80), load_topology("scale-out:10x8")
    whole = token_metrics(trace, placement, topology)
    assert whole[0] == 6.0
    monkeypatch.setattr(metrics, "BLOCK_TOKENS", 7)
    assert token_metrics(trace, placement, topology) == whole


@given(traces(layers=3, experts=5), st.integers(0, 9))
def test_cross_shares_equal_a_plain_loop(trace: Trace, seed: int) -> None:
    """A pair crosses with the probability that evenly chosen copies of its experts sit on different GPUs, nodes."""
    topology, placement = load_topology("scale-out:2x2"), random_placement(seed, [2, 3, 2, 1], 3, 5)
    where: list[dict[int, list[int]]] = []
    for layer in placement.to_lists():
        copies: dict[int, list[int]] = {}
        for gpu, held in enumerate(layer):
            for expert in held:
                copies.setdefault(expert, []).append(gpu)
        where.append(copies)
    crossing, pairs = [0.0, 0.0], 0
    for token in trace.experts.tolist():
        for layer in range(2):
            for one, other in itertools.product(token[layer], token[layer + 1]):
                places = list(itertools.product(where[layer][one], where[layer + 1][other]))
                crossing[0] += sum(a != b for a, b in places) / len(places)
                crossing[1] += sum(a // 2 != b // 2 for a, b in places) / len(places)
                pairs += 1
    expected = (crossing[0] / pairs, crossing[1] / pairs)
    assert cross_shares(count_routing(trace), placement, topology) == pytest.approx(expected)


def test_by_hand(four_tokens: Trace) -> None:
    """Experts 0, 1 on GPU 0 and 2, 3 on GPU 1: copies, locality, crossings and balance counted on paper."""
    placement = Placement(slots=np.array([[[0, 1], [2, 3]]] * 2), num_experts=4)
    found = traffic_metrics(count_routing(four_tokens), placement, load_topology("scale-out:2x1"))
    # tokens visit GPUs {0}{1}, {0,1}{0,1}, {0}{1}, {0,1}{0,1}
    assert found.copies_per_token_gpu == found.copies_per_token_node == 12 / 8
    assert found.remote_copies_per_token == (1 + 2 + 1 + 2) / 8  # a token at home on either GPU: half of its visits
    assert found.next_layer_locality == (0 + 2 + 0 + 2) / 8
    assert found.cross_gpu_share == found.cross_node_share == (4 + 2 + 4 + 2) / 16
    assert max_over_mean(placement, count_routing(four_tokens).load).tolist() == [6 / 4, 6 / 4]


@given(st.integers(0, 99))
def test_renaming_experts_changes_no_metric(seed: int) -> None:
    """Experts renamed in trace and placement alike leave every metric as it was, copies included."""
    trace, topology = make_trace(seed, tokens=60), load_topology("scale-out:2x2")
    placement = random_placement(seed, [2, 2, 3, 2], 2, 6)
    order = np.random.default_rng(seed).permutation(6)
    plain = traffic_metrics(count_routing(trace), placement, topology)
    renamed = traffic_metrics(
        count_routing(relabel_experts(trace, order)), relabel_placement(placement, order), topology
    )
    for name in plain.__slots__:
        assert getattr(renamed, name) == pytest.approx(getattr(plain, name))


@given(st.integers(0, 99))
def test_everything_together_crosses_nothing(seed: int) -> None:
    """On one GPU there is one copy per token, full locality, no crossing; a GPU without slots only lowers the mean."""
    trace = make_trace(seed)
    stats = count_routing(trace)
    placement = random_placement(seed, [6, 0], 2, 6)
    found: Any = traffic_metrics(stats, placement, load_topology("scale-out:2x1"))
    assert [getattr(found, name) for name in found.__slots__] == pytest.approx([0, 0, 1, 1, 0.5, 1])
    assert max_over_mean(placement, stats.load).tolist() == [2.0, 2.0]


def test_what_a_trace_does_not_tell_is_none(four_tokens: Trace) -> None:
    """Counts know no copies or crossings; a single layer has no next one."""
    placement, topology = random_placement(0, [2, 2], 2, 4), load_topology("scale-up:2")
    counts = count_routing(Counts(meta=four_tokens.meta, counts=count_routing(four_tokens).load[None]))
    nothing = traffic_metrics(counts, placement, topology)
    assert [getattr(nothing, name) for name in nothing.__slots__] == [None] * 6
    single = make_trace(0, layers=1, experts=4)
    found = traffic_metrics(count_routing(single), random_placement(0, [2, 2], 1, 4), topology)
    assert (found.cross_gpu_share, found.next_layer_locality) == (None, None)
    assert found.copies_per_token_gpu is not None
