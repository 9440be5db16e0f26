from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cut, make_trace, relabel_experts, small_model
from trace_cases import real

from moeplace.affinity import RoutingStats, count_routing
from moeplace.checks import (
    FEW_REQUESTS,
    Finding,
    always_chosen,
    check_stats,
    check_trace,
    constant_layers,
    dominated_layers,
    few_requests,
    identical_start,
    layer_numbers,
    repeated_layers,
    repetition_loops,
    top_k_order,
    uneven_rows,
    unused_experts,
)
from moeplace.loops import WINDOW, LoopTally
from moeplace.model import load_model
from moeplace.profile import count_and_profile
from moeplace.readers import open_trace
from moeplace.subset import IDENTICAL_ROWS
from moeplace.trace import Counts, Trace, TraceMeta, TraceStream

Check = Callable[[RoutingStats], list[Finding]]


def healthy(seed: int = 0, **shape: int) -> Trace:
    """A trace of mildly skewed, ranked choices that no check finds fault with."""
    size = {"tokens": 2000, "layers": 3, "experts": 8, "top_k": 2, "requests": 100} | shape
    rng = np.random.default_rng(seed)
    taste = rng.normal(0, 0.5, (size["layers"], size["experts"]))
    noise = rng.gumbel(size=(size["tokens"], size["layers"], size["experts"]))
    trace = make_trace(seed, **size)
    return trace.replace(experts=np.argsort(-(taste + noise), axis=2)[:, :, : size["top_k"]])


def changed(trace: Trace, layers: Any, ids: Any) -> Trace:
    """The trace with other choices in some layers."""
    experts = trace.experts.copy()
    experts[:, layers] = ids
    return trace.replace(experts=experts)


def names(findings: Any) -> list[str]:
    """Names of the checks that found something wrong."""
    return [finding.check for finding in findings if finding.level == "warning"]


def only(findings: list[Finding]) -> Finding:
    """The one finding."""
    assert len(findings) == 1
    assert findings[0].sentence
    assert findings[0].hint
    return findings[0]


def found_in(source: TraceStream) -> tuple[Finding, ...]:
    """Findings of every check."""
    stats, profile = count_and_profile(source)
    return check_trace(source, stats, profile.loops)


def loops_of(source: TraceStream) -> list[Finding]:
    """Findings of the check for repetition loops."""
    tally = LoopTally.empty()
    for block in source.blocks():
        tally.add(block)
    return repetition_loops(tally, count_routing(source))


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_trace_passes_every_check(seed: int) -> None:
    """Random routing of many requests raises no warning."""
    trace = healthy(seed)
    assert names(found_in(trace)) == []


def test_a_dummy_run_at_the_start_is_found() -> None:
    """Exactly the rows that repeat the first one are counted, also over the edges of blocks and alone in the trace."""
    trace = healthy()
    first = trace.take(np.zeros(100, int))
    both = trace.replace(
        experts=np.concatenate([first.experts, trace.experts[1:]]),
        **{n: np.resize(getattr(trace, n), 2099) for n in ("request", "position", "phase")},
    )
    same = int((trace.experts[1:] != trace.experts[0]).any(axis=(1, 2)).argmax())
    for source in (both, cut(both, [7, 0, 60]), cut(both, [150])):
        assert f"first {100 + same} rows" in only(identical_start(source)).sentence
    assert only(identical_start(first)).level == "warning"
    assert identical_start(trace.take(np.zeros(IDENTICAL_ROWS - 1, int))) == []


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 10**6))
def test_loops_are_found_at_every_lag(lag: int, seed: int) -> None:
    """A request that repeats its last ``lag`` tokens is found, the others are not, and its tail is what is counted."""
    trace = healthy(seed, tokens=900, requests=1, experts=16, top_k=4)
    request, position = np.arange(900) // 300, np.arange(900) % 300
    experts = trace.experts.copy()
    experts[300 + 100 : 600] = experts[300 + 100 - lag + np.arange(200) % lag]
    looping = trace.replace(experts=experts, request=request, position=position)
    assert loops_of(trace.replace(request=request, position=position)) == []
    finding = only(loops_of(looping))
    assert "1 of 3 requests" in finding.sentence
    share = float(finding.sentence.split("(")[1].split(" ")[0])
    assert 100 * (200 - lag) / 900 <= share <= 100 * 260 / 900


def test_loops_shorter_than_the_window_are_no_loops() -> None:
    """A request of fewer tokens than the window cannot be told to loop."""
    trace = healthy(tokens=WINDOW, requests=1)
    assert loops_of(trace.take(np.zeros(WINDOW, int))) == []
    assert loops_of(cut(trace, [0, 1, 2])) == []


def test_repeated_layers_are_named() -> None:
    """A layer that holds another layer's choices is found whatever their order; equal loads alone are not enough."""
    trace = healthy()
    copied = changed(trace, 2, trace.experts[:, 0, ::-1])
    assert "layer 2 repeats 0" in only(repeated_layers(count_routing(copied))).sentence
    shuffled = changed(trace, 2, np.random.default_rng(0).permutation(trace.experts[:, 0]))
    assert repeated_layers(count_routing(shuffled)) == []
    counts = Counts(
        meta=TraceMeta(num_experts=3, top_k=1, layer_ids=(4, 6, 8)), counts=[[[1, 2, 3], [3, 2, 1]] * 1 + [[1, 2, 3]]]
    )
    assert "layer 8 repeats 4" in only(repeated_layers(count_routing(counts))).sentence


def test_experts_of_every_token_are_found() -> None:
    """One id in every top-k of every layer is a NaN router's; in one layer it is a dominated layer."""
    trace = healthy()
    free = np.where(trace.experts[:, :, :1] == 3, 4, trace.experts[:, :, :1])
    always = np.concatenate([np.full_like(free, 3), free], axis=2)
    assert "expert 3 in every layer" in only(always_chosen(count_routing(trace.replace(experts=always)))).sentence
    assert dominated_layers(count_routing(trace.replace(experts=always))) == []
    once = count_routing(changed(trace, 1, always[:, 1]))
    assert always_chosen(once) == []
    assert "in layer 1 one expert" in only(dominated_layers(once)).sentence
    whole = count_routing(trace.replace(experts=np.broadcast_to([0, 1], trace.experts.shape)))
    assert names(check_stats(whole)) == ["always-chosen"]


def test_constant_layers_are_found() -> None:
    """A layer whose tokens all choose the same k experts is a dense layer's record."""
    stats = count_routing(changed(healthy(), 0, [5, 6]))
    assert "in layer 0 all tokens" in only(constant_layers(stats)).sentence
    assert names(check_stats(stats)) == ["constant-layers"]
    assert dominated_layers(stats) == []


def test_layers_with_fewer_rows_are_found() -> None:
    """Counts of layers that missed steps are named with their share."""
    meta = TraceMeta(num_experts=2, top_k=1, layer_ids=(3, 4, 5))
    counts = Counts(meta=meta, counts=[[[60, 40], [30, 20], [55, 45]]])
    finding = only(uneven_rows(count_routing(counts)))
    assert "layer 4" in finding.sentence
    assert "50 %" in finding.sentence


def test_unused_ids_hint_at_an_offset() -> None:
    """Ids that start at 1 leave 0 unused; a number of experts too large leaves the last ones."""
    trace = healthy()
    wide = trace.meta.replace(num_experts=10)
    shifted = count_routing(trace.replace(experts=trace.experts + 1, meta=wide))
    assert "0, 9 of 10" in only(unused_experts(shifted)).sentence
    exact = count_routing(trace.replace(experts=trace.experts + 1, meta=wide.replace(num_experts=9)))
    assert "count from 1" in only(unused_experts(exact)).hint
    declared = only(unused_experts(count_routing(trace.replace(meta=wide))))
    assert "8, 9 of 10" in declared.sentence
    assert "--model" in declared.hint
    assert unused_experts(count_routing(make_trace(0, tokens=3, experts=50))) == []


def test_order_of_a_top_k_is_told() -> None:
    """Routed order looks ranked, sorted order is sorted, shuffled order is neither."""
    trace = make_trace(0, tokens=4000, layers=3, experts=16, top_k=4)
    rng = np.random.default_rng(0)
    orders = {
        "ranked": trace.experts,
        "sorted by id": np.sort(trace.experts, axis=2),
        "no visible order": rng.permuted(trace.experts, axis=2),
    }
    for words, experts in orders.items():
        finding = only(top_k_order(count_routing(trace.replace(experts=experts))))
        assert words in finding.sentence
        assert finding.level == "note"
    assert top_k_order(count_routing(healthy(top_k=1))) == []


def test_few_requests_are_few() -> None:
    """The number of requests is judged where it is known."""
    assert only(few_requests(count_routing(healthy(requests=4)))).level == "warning"
    assert few_requests(count_routing(healthy(tokens=20 * FEW_REQUESTS, requests=4 * FEW_REQUESTS))) == []
    counts = Counts(meta=TraceMeta(num_experts=2, top_k=1, layer_ids=(0,)), counts=[[[1, 1]]])
    assert few_requests(count_routing(counts)) == []


def test_layers_are_compared_with_the_models() -> None:
    """Equal ids say nothing; dense layers included, missing layers and offsets each say what they are."""
    model = load_model("deepseek-v3")

    def found(ids: range) -> list[Finding]:
        trace = make_trace(0, layers=len(ids))
        return layer_numbers(count_routing(trace.replace(meta=trace.meta.replace(layer_ids=tuple(ids)))), model)

    assert found(range(3, 61)) == []
    assert "as many as" in only(found(range(61))).sentence
    assert "58 MoE" not in only(found(range(4))).sentence
    assert (only(found(range(4))).level, only(found(range(58))).level) == ("warning", "note")
    assert "4..61" in only(found(range(4, 62))).sentence
    trace = healthy()
    assert check_stats(count_routing(trace), small_model(3, 8, 2)) == check_stats(count_routing(trace))


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_names_of_experts_do_not_change_warnings(seed: int) -> None:
    """Renaming experts leaves the warnings that are not about names."""
    trace = changed(healthy(seed % 7), 1, [5, 6])
    order = np.random.default_rng(seed).permutation(8).astype(np.uint8)
    other = relabel_experts(trace, order)
    assert names(found_in(trace)) == names(found_in(other))


def test_warnings_come_first_and_read_as_sentences() -> None:
    """Warnings stand before notes, and a finding prints as sentence and hint."""
    trace = changed(healthy(requests=4), 0, [5, 6])
    findings = found_in(trace)
    levels = [finding.level for finding in findings]
    assert levels == sorted(levels, reverse=True)
    assert set(levels) == {"note", "warning"}
    assert str(findings[0]) == f"{findings[0].sentence} ({findings[0].hint})"


def test_vllms_dummy_run_is_found() -> None:
    """The head of a vLLM route log is its profiling run, all of it."""
    rows = [json.loads(line) for line in real("format_samples/vllm_moe_routes_jsonl/moe_routes_head.jsonl").open()]
    ids = [row["topk_ids"] for row in rows if row.get("type") == "route" and row["layer"] == 0]
    width = len(ids[0])
    meta = TraceMeta(num_experts=1 + max(map(max, ids)), top_k=width, layer_ids=(0,))
    zero = np.zeros(len(ids), int)
    trace = Trace(meta=meta, experts=np.array(ids)[:, None], request=zero, position=np.arange(len(ids)), phase=zero)
    assert "dummy profiling run" in only(identical_start(trace)).sentence


def test_gpt_oss_loops_are_found() -> None:
    """Part of what the authors flag as repetition loops for 128 tokens; hardly any other request does."""
    source = open_trace(real("gpt_oss_20b_fingerprinting/routing.npz"), format="npz")
    assert not isinstance(source, Counts)
    finding = only(loops_of(source))
    looping = int(finding.sentence.split(" ")[0])
    assert 40 <= looping <= 100
    assert finding.level == "warning"
