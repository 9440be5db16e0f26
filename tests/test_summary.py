"""What a trace says at a glance, checked by hand and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from strategies import make_trace, traces

from moeplace.affinity import count_routing
from moeplace.insight import layer_affinity, measure_trace
from moeplace.measures import coactivation_concentration, gini, pair_concentration
from moeplace.profile import profile_trace
from moeplace.summary import summarise_trace
from moeplace.trace import Counts, Trace, TraceMeta


def test_figures_counted_by_hand(four_tokens: Trace) -> None:
    """Loads 4 2 1 1 and 1 1 4 2, on two GPUs of two experts each."""
    summary = summarise_trace(count_routing(four_tokens), 2)
    first, second = summary.layers
    assert (first.layer_id, second.layer_id) == (3, 4)
    assert count_routing(four_tokens).load.tolist() == [[4, 2, 1, 1], [1, 1, 4, 2]]
    assert first.expert_max_over_mean == pytest.approx(2.0)
    assert first.variation == pytest.approx(np.std([4, 2, 1, 1]) / 2)
    assert first.top_expert_share == pytest.approx(0.5)
    assert first.gpu_max_over_mean == pytest.approx(6 / 4)
    assert first.gpu_balancedness == pytest.approx(4 / 6)
    assert first.gini == pytest.approx(5 / 16)
    assert second.gpu_max_over_mean == pytest.approx(6 / 4)
    assert second.top_pair_share is None


@given(traces(layers=3))
def test_figures_are_what_a_loop_counts(trace: Trace) -> None:
    """Hottest expert, spread and pair shares equal a count over tokens, one by one."""
    experts, layers = trace.meta.num_experts, trace.meta.num_layers
    summary = summarise_trace(count_routing(trace), 2)
    assert (summary.num_tokens, summary.top_k) == (trace.num_tokens, trace.meta.top_k)
    for layer in range(layers):
        load = [sum(int(e == x) for token in trace.experts for x in token[layer]) for e in range(experts)]
        row = summary.layers[layer]
        assert row.expert_max_over_mean == pytest.approx(max(load) / np.mean(load))
        assert row.variation == pytest.approx(np.std(load) / np.mean(load))
        if layer + 1 < layers:
            pairs = np.zeros((experts, experts))
            for token in trace.experts:
                for e in token[layer]:
                    for f in token[layer + 1]:
                        pairs[e, f] += 1
            top = sorted(pairs.ravel(), reverse=True)[: round(0.2 * experts**2)]
            assert row.top_pair_share == pytest.approx(sum(top) / pairs.sum())


@given(traces(layers=3))
def test_affinity_is_each_layer_s_with_the_next(trace: Trace) -> None:
    """Every figure is the measure of that layer's table; the last layer has no next one, top-1 no co-activation."""
    stats = count_routing(trace)
    assert stats.coactivation is not None
    summary = summarise_trace(stats, 2)
    for layer, row in enumerate(summary.layers):
        assert row.gini == gini(stats.load[layer])
        assert row.gpu_balancedness * row.gpu_max_over_mean == pytest.approx(1)
        pair = layer_affinity(stats)[layer] if layer < 2 else None
        for name in (
            "mutual_information",
            "information_bias",
            "lift",
            "successor_share",
            "successor_share_independent",
        ):
            assert getattr(row, name) == (None if pair is None else getattr(pair, name))
        together = coactivation_concentration(stats.coactivation[layer]) if trace.meta.top_k > 1 else (None, None)
        assert (row.coactivation_share, row.coactivation_share_independent) == together
    assert summarise_trace(stats, 2, measure_trace(stats, profile_trace(trace))) == summary


def test_independent_layers_show_no_affinity() -> None:
    """Where transitions are the product of the loads, both pair shares agree; where they are diagonal, they differ."""
    load = np.array([8, 4, 2, 2])
    assert pair_concentration(np.outer(load, load)) == pytest.approx([pair_concentration(np.outer(load, load))[0]] * 2)
    measured, independent = pair_concentration(np.diag(load))
    assert measured > independent


def test_counts_have_loads_and_no_pairs() -> None:
    """Counts are summarised without affinity, and the document holds null for it."""
    meta = TraceMeta(num_experts=4, top_k=2, layer_ids=(0, 1))
    counts = Counts(meta=meta, counts=np.array([[[4, 2, 1, 1], [2, 2, 2, 2]]]))
    document = summarise_trace(count_routing(counts), 2).to_dict()
    assert document["schema"] == "moeplace/stats/1"
    for name in ("top_pair_share", "mutual_information", "lift", "coactivation_share"):
        assert [row[name] for row in document["per_layer"]] == [None, None]
    assert document["per_layer"][1]["expert_max_over_mean"] == 1.0


def test_the_document_repeats() -> None:
    """The same trace gives the same document; the digest names the trace."""
    first, again, other = (summarise_trace(count_routing(make_trace(s)), 2).to_dict() for s in (0, 0, 1))
    assert first == again
    assert first["trace_digest"] != other["trace_digest"]
