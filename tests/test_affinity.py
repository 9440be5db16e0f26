"""Laws of :mod:`moeplace.affinity`."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Blocks, cut, divided, make_trace, traces

from moeplace.affinity import (
    MAX_SOURCE_RANKS,
    RoutingStats,
    RoutingTally,
    TokenSampler,
    count_routing,
    grouped_load,
    load_by_phase,
)
from moeplace.errors import ProblemError, TraceError
from moeplace.fingerprint import token_hashes
from moeplace.trace import Counts, Trace, TraceMeta


def test_counts_by_hand(four_tokens: Trace) -> None:
    """Four tokens counted on paper: loads, one transition row, and co-activation with the load on its diagonal."""
    stats = count_routing(four_tokens)
    assert stats.load.tolist() == [[4, 2, 1, 1], [1, 1, 4, 2]]
    assert stats.transition is not None
    assert stats.transition[0].tolist() == [[1, 1, 4, 2], [0, 0, 2, 2], [1, 0, 1, 0], [0, 1, 1, 0]]
    assert stats.coactivation is not None
    assert stats.coactivation[0].tolist() == [[4, 2, 1, 1], [2, 2, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert (stats.num_tokens, stats.num_requests) == (4, 2)
    assert stats.selections_per_token.tolist() == [[1, 0.5, 0.25, 0.25], [0.25, 0.25, 1, 0.5]]


@given(traces(ranks=True), st.lists(st.integers(0, 9), max_size=4), st.integers(1, 3))
def test_statistics_do_not_depend_on_blocks_or_threads(trace: Trace, sizes: list[int], threads: int) -> None:
    """Cutting a trace into blocks, empty ones too, or counting on several threads changes no bit of the result."""
    whole = count_routing(trace, sample_tokens=7)
    pieces = count_routing(cut(trace, sizes), sample_tokens=7, threads=threads)
    assert pieces.digest() == whole.digest()


@given(traces(ranks=True), st.integers(1, 5), st.integers(0, 99), st.integers(1, 40))
def test_tallies_of_parts_merge(trace: Trace, num_parts: int, seed: int, sample_tokens: int) -> None:
    """Parts counted apart, kept as arrays, and merged in any order give the statistics of the whole, sample and all."""
    whole = count_routing(trace, sample_tokens=sample_tokens)
    total = RoutingTally(trace.meta.replace(num_experts=trace.meta.top_k), sample_tokens=sample_tokens)
    if seed % 2 == 0:
        total = RoutingTally(trace.meta, sample_tokens=sample_tokens)
    for first, part in divided(trace, num_parts, seed):
        tally, place = RoutingTally(part.meta, sample_tokens=sample_tokens), first
        for block in cut(part, [seed % 7]).blocks():
            tally.add(block, first=place)
            place += block.num_tokens
        again = RoutingTally(part.meta, sample_tokens=sample_tokens)
        again.restore(tally.state())
        total.merge(again)
    assert total.result(trace.meta).digest() == whole.digest()


@given(traces())
def test_identities_of_pairs(trace: Trace) -> None:
    """Rows and columns of transitions are k times the loads; a row of co-activation sums to k times the load."""
    stats, k = count_routing(trace), trace.meta.top_k
    assert stats.transition is not None
    assert stats.coactivation is not None
    assert np.array_equal(stats.transition.sum(axis=2), k * stats.load[:-1])
    assert np.array_equal(stats.transition.sum(axis=1), k * stats.load[1:])
    assert np.array_equal(stats.coactivation.sum(axis=2), k * stats.load)
    assert np.array_equal(stats.coactivation, stats.coactivation.transpose(0, 2, 1))
    assert stats.selections_per_token.sum(axis=1) == pytest.approx(np.full(trace.meta.num_layers, k))


@given(traces(ranks=True), st.lists(st.integers(0, 9), max_size=4))
def test_slices_equal_plain_loops(trace: Trace, sizes: list[int]) -> None:
    """Loads by phase, by request and by source rank are what a loop over tokens counts, and sum to the load."""
    stream, stats = cut(trace, sizes), count_routing(cut(trace, sizes))
    by_phase: Counter[tuple[int, int, int]] = Counter()
    by_rank: Counter[tuple[int, int, int]] = Counter()
    assert trace.rank is not None
    for token in range(trace.num_tokens):
        for layer, chosen in enumerate(trace.experts[token].tolist()):
            for expert in chosen:
                by_phase[int(trace.phase[token]), layer, expert] += 1
                by_rank[int(trace.rank[token]), layer, expert] += 1
    phases = load_by_phase(stream)
    assert all(phases[index] == by_phase[index] for index in np.ndindex(*phases.shape))  # type: ignore[index]
    assert stats.source_load is not None
    assert all(stats.source_load[index] == by_rank[index] for index in np.ndindex(*stats.source_load.shape))  # type: ignore[index]
    for table in (phases, stats.source_load):
        assert np.array_equal(table.sum(axis=0), stats.load)


def test_source_load_needs_every_rank(small_trace: Trace) -> None:
    """Without ranks, with unknown (negative) ones in any block, or with absurd ones, no source load is claimed."""
    ranks = np.zeros(60, np.int64)
    assert count_routing(small_trace).source_load is None
    for wrong in (-1, MAX_SOURCE_RANKS, 2**40):
        part = small_trace.replace(rank=np.where(np.arange(60) == 50, wrong, ranks))
        assert count_routing(cut(part, [20, 20])).source_load is None
    stream = Blocks(small_trace.meta, [small_trace.replace(rank=ranks), small_trace])
    assert count_routing(stream).source_load is None


def _sampled(size: int, seed: int, sizes: list[int], tokens: int = 200) -> list[int]:
    trace = make_trace(0, tokens=tokens, layers=1).replace(position=np.arange(tokens))
    sampler, first = TokenSampler(size, seed), 0
    for block in cut(trace, sizes).blocks():
        sampler.add(block, token_hashes(block), first)
        first += block.num_tokens
    return sampler.result(trace.meta).position.tolist()


@given(st.integers(1, 250), st.integers(0, 5), st.lists(st.integers(0, 80), max_size=5))
def test_sample_is_bounded_ordered_and_independent_of_blocks(size: int, seed: int, sizes: list[int]) -> None:
    """The sample has min(size, tokens) distinct tokens in recorded order, the same for any blocks."""
    sample = _sampled(size, seed, sizes)
    assert len(sample) == min(size, 200)
    assert sample == sorted(set(sample))
    assert sample == _sampled(size, seed, [])


def test_sample_is_uniform() -> None:
    """Over 400 seeds every token is drawn about equally often: chi-square of 50 cells within six deviations."""
    drawn = np.zeros(50)
    for seed in range(400):
        drawn[_sampled(10, seed, [17], tokens=50)] += 1
    expected = 400 * 10 / 50
    # draws without replacement scatter less than independent ones: variance times 1 - 10/50
    chi = float(((drawn - expected) ** 2).sum() / (expected * 0.8))
    assert abs(chi - 50) < 6 * np.sqrt(2 * 50)


def test_seeds_give_different_samples() -> None:
    """The seed chooses the sample, and nothing else of the statistics."""
    trace = make_trace(3, tokens=100)
    one, other = (count_routing(trace, sample_tokens=20, seed=seed) for seed in (0, 1))
    assert one.sample is not None
    assert other.sample is not None
    assert one.sample.digest() != other.sample.digest()
    assert one.replace(sample=None).digest() == other.replace(sample=None).digest()
    with pytest.raises(ProblemError, match="sample of 0"):
        count_routing(trace, sample_tokens=0)


def test_counts_are_summed_over_steps() -> None:
    """Counts give load and steps, and admit that they know no tokens, pairs or requests."""
    meta = TraceMeta(num_experts=3, top_k=2, layer_ids=(0, 1))
    stats = count_routing(Counts(meta=meta, counts=[[[2, 1, 1], [1, 1, 2]], [[0, 3, 3], [2, 2, 2]]]))
    assert stats.load.tolist() == [[2, 4, 4], [3, 3, 4]]
    assert (stats.num_tokens, stats.num_requests, stats.has_tokens) == (5, 0, False)
    assert stats.transition is None
    assert stats.step_load is not None
    assert stats.step_load.shape == (2, 2, 3)


def test_empty_and_inconsistent_statistics_are_refused(small_trace: Trace) -> None:
    """No tokens, a layer without tokens, negative or contradicting counts are errors that say so."""
    with pytest.raises(TraceError, match="no tokens"):
        count_routing(small_trace.take(np.zeros(60, bool)))
    meta = TraceMeta(num_experts=2, top_k=1, layer_ids=(4, 9))
    with pytest.raises(TraceError, match="layer 9"):
        RoutingStats(meta=meta, load=[[1, 1], [0, 0]], num_tokens=2, num_requests=0)
    with pytest.raises(ProblemError, match="load of shape"):
        RoutingStats(meta=meta, load=[[1, 1], [3, -1]], num_tokens=2, num_requests=0)
    with pytest.raises(ProblemError, match="disagree"):
        RoutingStats(meta=meta, load=[[1, 1], [1, 1]], num_tokens=2, num_requests=0, transition=[[[2, 0], [0, 0]]])


def test_grouped_load_of_empty_groups(four_tokens: Trace) -> None:
    """A group without tokens has zeros."""
    table = grouped_load(four_tokens, np.array([2, 2, 0, 0]), 4)
    assert table[[1, 3]].sum() == 0
    assert table[2, 0].tolist() == [2, 1, 1, 0]
