"""Laws of :mod:`moeplace.counting`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cut, make_trace, traces

from moeplace import counting
from moeplace.counting import PairCounter, Tables
from moeplace.trace import Trace


def brute_force(trace: Trace) -> Tables:
    """Count in plain Python, pair by pair."""
    tables = Tables.zeros(trace.meta.num_layers, trace.meta.num_experts)
    for token in trace.experts.tolist():
        for layer, chosen in enumerate(token):
            for expert in chosen:
                tables.load[layer, expert] += 1
            for one, other in itertools.combinations(chosen, 2):
                tables.together[layer, one, other] += 1
            if layer + 1 < len(token):
                for one, other in itertools.product(chosen, token[layer + 1]):
                    tables.transition[layer, one, other] += 1
    return tables


def _same(counter: PairCounter, expected: Tables) -> bool:
    found = counter.tables
    unordered = [t.together + t.together.transpose(0, 2, 1) for t in (found, expected)]
    return (
        np.array_equal(found.load, expected.load)
        and np.array_equal(found.transition, expected.transition)
        and np.array_equal(*unordered)
    )


@given(traces(), st.integers(1, 4), st.lists(st.integers(0, 9), max_size=4))
def test_counts_equal_a_plain_loop(trace: Trace, threads: int, sizes: list[int]) -> None:
    """Histograms count what a loop counts, whatever the blocks and threads."""
    counter = PairCounter(trace.meta.num_layers, trace.meta.num_experts, threads=threads, compiled=False)
    for block in cut(trace, sizes).blocks():
        counter.add(block.experts)
    assert _same(counter, brute_force(trace))


@pytest.mark.parametrize("experts", [5, 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_loops_agree(experts: int, threads: int) -> None:
    """The compiled loop counts what the histograms count, for one-byte and two-byte ids."""
    trace = make_trace(1, tokens=200, layers=3, experts=experts, top_k=3)
    fast = PairCounter(3, experts, threads=threads, compiled=True)
    fast.add(trace.experts[:120])
    fast.add(trace.experts[120:])
    slow = PairCounter(3, experts, compiled=False)
    slow.add(trace.experts)
    assert _same(fast, slow.tables)


def test_long_traces_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work beyond the limit switches to the compiled loop in mid-trace without changing a count."""
    monkeypatch.setattr(counting, "COMPILE_FROM_PAIRS", 100)
    called: list[int] = []
    real = counting._compiled_loop()
    monkeypatch.setattr(counting, "_compiled_loop", lambda: lambda *a: (called.append(1), real(*a)))
    trace = make_trace(2, tokens=40)
    counter = PairCounter(2, 6)
    for block in cut(trace, [5, 10, 10]).blocks():
        counter.add(block.experts)
    assert 0 < len(called) < 4
    assert _same(counter, brute_force(trace))


def test_one_layer_and_one_expert() -> None:
    """A single layer has no transitions, a single expert no pairs."""
    counter = PairCounter(1, 1, threads=8)
    counter.add(np.zeros((5, 1, 1), np.uint8))
    assert counter.tables.load.tolist() == [[5]]
    assert counter.tables.transition.shape == (0, 1, 1)
    assert counter.tables.together.tolist() == [[[0]]]
