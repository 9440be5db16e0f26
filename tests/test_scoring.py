"""Laws of :mod:`moeplace.scoring`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from strategies import cut, make_trace, random_placement, slow_topology, small_model

from moeplace.affinity import count_routing
from moeplace.errors import InputError, ProblemError
from moeplace.metrics import max_over_mean, traffic_metrics
from moeplace.scoring import counts_law, excess_removed, law_for, score, scores_to_dict
from moeplace.simulate import simulate_counts
from moeplace.tails import summarise
from moeplace.topology import Topology
from moeplace.trace import Counts, Trace, TraceMeta

MODEL = small_model()
ONE, OTHER = random_placement(0, [3, 3], 2, 6), random_placement(1, [4, 4], 2, 6)
PLACE = slow_topology("scale-up:2")


def _document(source: Any, **options: Any) -> dict[str, Any]:
    entries = score(source, {"one": ONE}, PLACE, MODEL, batches=20, **options)
    document: dict[str, Any] = json.loads(json.dumps(scores_to_dict(entries), allow_nan=False))
    return document


def test_the_document_has_the_contracts_keys(small_trace: Trace) -> None:
    """Every key other programs rely on is there, and only a few more, which are documented."""
    document = _document(small_trace)
    assert set(document) == {"schema", "dataflow", "scores"} | {"trace_digest"}
    assert (document["schema"], document["dataflow"]) == ("moeplace/score/1", "dispatch-combine")
    for entry in document["scores"]:
        assert set(entry) == {
            "placement",
            "topology",
            "phase",
            "batch",
            "execution",
            "attention_us",
            "step_time_us",
            "noise_floor",
            "naive_us",
            "load",
            "traffic",
            "per_layer",
            "link_utilisation",
            "bottlenecks",
            "excess_removed",
        }
        assert set(entry["batch"]) == {"requests", "tokens", "batches", "seed", "arrival"}
        assert list(entry["step_time_us"]) == ["mean", "p50", "p95", "p99", "cvar95"]
        for estimate in entry["step_time_us"].values():
            assert set(estimate) == {"value", "interval"}
            low, high = estimate["interval"]
            assert low <= estimate["value"] <= high
        load = {"max_over_mean_mean", "max_over_mean_median", "max_over_mean_worst", "balancedness", "imbalance_ratio"}
        of_steps = {"step_max_over_mean_mean", "step_max_over_mean", "step_excess_over_noise_floor"}
        assert set(entry["load"]) == load | of_steps
        assert list(entry["load"]["step_max_over_mean"]) == list(entry["step_time_us"])
        assert set(entry["traffic"]) == {
            "cross_gpu_share",
            "cross_node_share",
            "copies_per_token_gpu",
            "copies_per_token_node",
            "remote_copies_per_token",
            "next_layer_locality",
        }
        assert [row["layer"] for row in entry["per_layer"]] == [0, 1]


def test_load_and_traffic_are_of_the_whole_trace(small_trace: Trace) -> None:
    """Max over mean, balancedness and traffic are of every token of the scored trace, not of the drawn steps."""
    entry = _document(small_trace, phase="decode")["scores"][0]
    stats = count_routing(small_trace)
    ratio = max_over_mean(ONE, stats.load)
    assert entry["load"]["max_over_mean_mean"] == pytest.approx(ratio.mean())
    assert entry["load"]["max_over_mean_median"] == pytest.approx(np.median(ratio))
    assert entry["load"]["max_over_mean_worst"] == pytest.approx(ratio.max())
    assert entry["load"]["balancedness"] == pytest.approx((1 / ratio).mean())
    assert entry["load"]["imbalance_ratio"] == pytest.approx((ratio - 1).mean())
    assert [row["trace_max_over_mean"] for row in entry["per_layer"]] == pytest.approx(ratio.tolist())
    expected = traffic_metrics(stats, ONE, PLACE)
    assert entry["traffic"] == pytest.approx({name: getattr(expected, name) for name in expected.__slots__})


def test_scores_stand_side_by_side(small_trace: Trace) -> None:
    """By phase, then topology, then placement; all on the same steps, so equal placements score equally."""
    faster = slow_topology("scale-up:2", local_gb_per_s=400).replace(name="faster")
    entries = score(small_trace, {"a": ONE, "b": OTHER, "a2": ONE}, [PLACE, faster], MODEL, batches=5)
    labels = [(entry.law.phase, entry.topology, entry.placement) for entry in entries]
    names = ["a", "b", "a2"]
    assert labels == [(p, t, n) for p in ("decode", "prefill") for t in (PLACE.name, "faster") for n in names]
    assert entries[0].simulation.step_us.tolist() == entries[2].simulation.step_us.tolist()
    assert (entries[3].simulation.step_us <= entries[0].simulation.step_us).all()


def test_scores_repeat_and_do_not_depend_on_blocks(small_trace: Trace) -> None:
    """The same input and seed give the same bytes, read in blocks or at once; another seed gives other steps."""
    assert _document(small_trace) == _document(small_trace) == _document(cut(small_trace, [7, 0, 20]), threads=2)
    assert _document(small_trace, seed=1) != _document(small_trace)


def test_the_law_can_be_given(small_trace: Trace) -> None:
    """Requests, tokens, steps and seed asked for are those used and shown."""
    entry = _document(small_trace, phase="decode", requests=3, tokens=2, seed=5)["scores"][0]
    assert entry["batch"] == {"requests": 3, "tokens": 2, "batches": 20, "seed": 5, "arrival": "uniform"}
    assert law_for(small_trace, 2, phase="prefill", requests=3, tokens=1).step_tokens == 3
    assert law_for(small_trace, 2).phase == "decode"
    with pytest.raises(InputError, match="only"):
        score(small_trace, {"one": ONE}, PLACE, MODEL, phase="decode", requests=999)


@pytest.mark.parametrize("dataflow", ["dispatch-combine", "context-coherent"])
def test_the_dataflow_is_said(small_trace: Trace, dataflow: str) -> None:
    """A score names its dataflow."""
    document = _document(small_trace, dataflow=dataflow)
    assert document["dataflow"] == dataflow


def _counts(seed: int = 0, steps: int = 4, scale: int = 100) -> Counts:
    meta = TraceMeta(num_experts=6, top_k=2, layer_ids=(5, 7))
    return Counts(meta=meta, counts=np.random.default_rng(seed).integers(1, scale, (steps, 2, 6)))


def test_counts_are_scored_step_by_step() -> None:
    """Each recorded step is a batch; the tail is over them; copies and crossings are null."""
    counts = _counts()
    entry = _document(counts)["scores"][0]
    run = simulate_counts(counts, ONE, PLACE, MODEL, phase=entry["phase"])
    assert entry["step_time_us"]["p95"]["value"] == pytest.approx(summarise(run.step_us)["p95"].value)
    assert entry["batch"]["batches"] == 4
    assert set(entry["traffic"].values()) == {None}
    assert [row["layer"] for row in entry["per_layer"]] == [5, 7]
    with pytest.raises(InputError, match="context-coherent"):
        score(counts, {"one": ONE}, PLACE, MODEL, dataflow="context-coherent")


def test_the_phase_of_counts_is_guessed_from_their_size() -> None:
    """Steps of 128 tokens a GPU and more are taken for prefill, unless told."""
    small, large = _counts(scale=20), _counts(scale=1000)
    assert counts_law(small, 2).phase == "decode"
    assert counts_law(large, 2).phase == "prefill"
    assert counts_law(large, 2, "decode").phase == "decode"
    edge = Counts(meta=small.meta, counts=np.full((1, 2, 6), 256))
    assert [counts_law(edge, gpus).phase for gpus in (6, 7)] == ["prefill", "decode"]
    assert law_for(large, 2).phase == "prefill"
    assert counts_law(small, 2).step_tokens == round(small.counts.sum(axis=2).mean() / 2)


def test_mistakes_are_told(small_trace: Trace) -> None:
    """Unknown options and dataflows, other shapes and empty selections are errors."""
    with pytest.raises(TypeError, match="batch_size"):
        score(small_trace, {"one": ONE}, PLACE, MODEL, batch_size=3)
    with pytest.raises(ProblemError, match="dataflow"):
        score(small_trace, {"one": ONE}, PLACE, MODEL, dataflow="both")
    with pytest.raises(ProblemError, match="2 GPUs"):
        score(small_trace, {"one": ONE}, slow_topology("scale-up:4"), MODEL)
    with pytest.raises(InputError, match="no tokens"):
        law_for(small_trace.take(np.zeros(60, bool)), 2)


def test_a_better_network_scores_better() -> None:
    """More bandwidth of either kind lowers no quantile of the step time."""
    trace = make_trace(2, tokens=120, requests=10)
    placement = random_placement(2, [2, 2, 2, 2], 2, 6)
    base: Topology = slow_topology("scale-out:2x2", local_gb_per_s=0.2, nic_gb_per_s=0.1)
    plain = score(trace, {"p": placement}, base, MODEL, batches=30)
    for change in ({"local_gb_per_s": 1.0}, {"nic_gb_per_s": 1.0}):
        better = score(trace, {"p": placement}, base.replace(**change), MODEL, batches=30)
        for one, other in zip(plain, better, strict=True):
            for name, estimate in one.simulation.summary.items():
                assert other.simulation.summary[name].value <= estimate.value + 1e-9


def test_the_share_of_the_excess_removed_is_against_the_first() -> None:
    """None of its own; as much as the load falls, over what lies above the noise floor; in the document of several."""
    trace = make_trace(2, tokens=300, layers=2, experts=6, top_k=2)
    places = {"one": ONE, "two": random_placement(7, [3, 3], 2, 6)}
    one, two = score(trace, places, PLACE, MODEL, batches=40, phase="decode", requests=4)
    assert set(excess_removed(one, one)["step_max_over_mean"].values()) <= {0.0, None}
    above, ours = (entry.simulation.step_max_over_mean.mean() - one.simulation.noise_floor for entry in (one, two))
    told = scores_to_dict([one, two])["scores"][1]["excess_removed"]
    assert told["against"] == "one"
    expected = (above - ours) / above if above > 0 else None
    assert told["step_max_over_mean"]["mean"] == (None if expected is None else pytest.approx(expected, abs=1e-8))
