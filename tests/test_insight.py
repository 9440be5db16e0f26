from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cut, divided, make_trace, relabel_experts, traces
from trace_cases import real

from moeplace import measures
from moeplace import profile as profile_module
from moeplace.affinity import count_routing
from moeplace.fingerprint import token_hashes
from moeplace.insight import TraceInsight, domain_distances, measure_trace, patterns
from moeplace.parts import CHUNK_TOKENS
from moeplace.profile import FOLLOWING_TOKENS, ProfileTally, count_and_profile, profile_trace
from moeplace.readers import open_trace
from moeplace.trace import Counts, Trace, TraceMeta, TraceStream, concatenate

loads = st.lists(st.integers(0, 50), min_size=2, max_size=9).filter(any)


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    """Square tables of small counts, at least one positive."""
    size = draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    table = rng.integers(0, 9, (size, size))
    table[rng.integers(size), rng.integers(size)] += 1
    return table


def insight_of(source: TraceStream | Counts) -> TraceInsight:
    """Every measure of a trace."""
    return measure_trace(count_routing(source), profile_trace(source))


def marked(trace: Trace, domains: int = 3) -> Trace:
    """The trace with a domain per request."""
    names = tuple(f"d{i}" for i in range(domains))
    return trace.replace(domain=trace.request // 3 % domains, meta=trace.meta.replace(domains=names))


# --- skew -----------------------------------------------------------------------------------------------------------


@given(loads)
def test_gini_is_the_mean_difference_of_all_pairs(load: list[int]) -> None:
    """Gini = Σ|x−y| / (2·E·Σx) over all ordered pairs; it lies in [0, 1 − 1/E]."""
    expected = sum(abs(a - b) for a, b in itertools.product(load, load)) / (2 * len(load) * sum(load))
    value = measures.gini(np.array(load))
    assert value == pytest.approx(expected, abs=1e-12)
    assert 0 <= value <= 1 - 1 / len(load) + 1e-12


@given(st.integers(1, 9), st.integers(1, 50))
def test_an_even_load_has_no_skew(experts: int, each: int) -> None:
    """Equal loads: max/mean 1, everything else 0, and the top tenth holds its number's share."""
    skew = measures.load_skew(np.full(experts, each))
    assert skew.max_over_mean == pytest.approx(1)
    assert (skew.variation, skew.gini, skew.sigma) == pytest.approx((0, 0, 0), abs=1e-12)
    assert skew.top_share == pytest.approx(max(1, round(experts / 10)) / experts)


def test_skew_by_hand() -> None:
    """Loads 1, 1, 2: mean 4/3, deviation √2/3, and ln spread ln2·√2/3."""
    skew = measures.load_skew(np.array([1, 2, 1]))
    assert skew.max_over_mean == pytest.approx(1.5)
    assert skew.variation == pytest.approx(math.sqrt(2) / 4)
    assert skew.gini == pytest.approx(1 / 6)
    assert skew.top_share == pytest.approx(0.5)
    assert skew.sigma == pytest.approx(math.log(2) * math.sqrt(2) / 3)


def test_a_load_of_nothing_is_refused() -> None:
    """No share of nothing is invented."""
    with pytest.raises(Exception, match="without selections"):
        measures.load_skew(np.zeros(3, int))


# --- affinity -------------------------------------------------------------------------------------------------------


@given(tables())
def test_information_is_the_entropies_difference_and_never_negative(table: np.ndarray) -> None:
    """I(X;Y) = H(X) + H(Y) − H(X,Y) ≥ 0."""

    def entropy(counts: np.ndarray) -> float:
        p = counts.ravel() / counts.sum()
        return -sum(x * math.log2(x) for x in p if x > 0)

    value = measures.mutual_information(table)
    expected = entropy(table.sum(axis=0)) + entropy(table.sum(axis=1)) - entropy(table)
    assert value >= 0
    assert value == pytest.approx(max(0.0, expected), abs=1e-9)


@given(loads, loads)
def test_independent_layers_share_nothing(left: list[int], right: list[int]) -> None:
    """A table of products has no information, no lift, and no more concentration than its margins give."""
    size = max(len(left), len(right))
    table = np.outer(np.resize(left, size), np.resize(right, size))
    if not table.any():
        return
    assert measures.mutual_information(table) == pytest.approx(0, abs=1e-9)
    assert measures.mean_lift(table) == pytest.approx(1)
    observed, independent = measures.pair_concentration(table)
    assert observed == pytest.approx(independent)
    observed, independent = measures.successor_concentration(table)
    assert observed == pytest.approx(independent)


@given(tables())
def test_pair_measures_against_brute_force(table: np.ndarray) -> None:
    """Lift, top pairs and top successors equal their definitions, entry by entry."""
    total, size = table.sum(), len(table)
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    cells = [(e, f) for e in range(size) for f in range(size) if table[e, f]]
    lift = sum((table[c] / total) ** 2 / (rows[c[0]] * columns[c[1]] / total**2) for c in cells)
    assert measures.mean_lift(table) == pytest.approx(max(1, lift))
    count = round(0.2 * size * size)
    assert measures.pair_concentration(table)[0] == pytest.approx(sum(sorted(table.ravel())[::-1][:count]) / total)
    count = max(1, round(0.2 * size))
    best = sum(sum(sorted(row)[::-1][:count]) for row in table.tolist())
    assert measures.successor_concentration(table)[0] == pytest.approx(best / total)


def mixed(ids: np.ndarray, seed: int) -> np.ndarray:
    """A layer's choices with its tokens in random order: popularity is kept, what links it to others is gone."""
    return ids[np.random.default_rng(seed).permutation(len(ids))]


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (16, 4), (24, 8)])
def test_bias_is_what_shuffled_tokens_still_show(experts: int, top_k: int) -> None:
    """For independent layers the plug-in estimate, the shuffled one and the bias formula agree within a quarter."""
    seen: list[tuple[float, float, float]] = []
    for seed in range(5):
        left, right = make_trace(seed, tokens=3000, layers=2, experts=experts, top_k=top_k).experts.transpose(1, 0, 2)
        table = measures.pair_table(left, right, experts)
        shuffled = measures.mutual_information(measures.pair_table(left, mixed(right, seed), experts))
        bias = measures.information_bias(table, 3000, top_k)
        seen.append((measures.mutual_information(table), shuffled, bias))
    plain, shuffled, bias = np.mean(seen, axis=0)
    assert plain == pytest.approx(bias, rel=0.25)
    assert shuffled == pytest.approx(bias, rel=0.25)


def test_bias_is_millers_for_single_choices() -> None:
    """A full table of k = 1 gives (A−1)(B−1)/(2N·ln 2); a table that cannot vary gives 0."""
    assert measures.information_bias(np.ones((4, 5)), 20, 1) == pytest.approx(12 / (40 * math.log(2)))
    assert measures.information_bias(np.ones((2, 2)), 20, 2) == 0


def test_a_copied_layer_tells_everything() -> None:
    """A layer that repeats the one before, top-1 and even, shares log2(E) bits."""
    ids = np.arange(64).reshape(-1, 1) % 8
    assert measures.mutual_information(measures.pair_table(ids, ids, 8)) == pytest.approx(3)
    assert measures.mutual_information(measures.pair_table(ids, mixed(ids, 0), 8)) < 1


@given(traces(experts=6, top_k=2))
def test_coactivation_against_brute_force(trace: Trace) -> None:
    """The busiest tenth of pairs of a layer, counted token by token."""
    pairs = dict.fromkeys(itertools.combinations(range(6), 2), 0)
    for row in trace.experts[:, 0].tolist():
        pairs[min(row), max(row)] += 1
    best = sorted(pairs.values())[::-1][: max(1, round(0.1 * len(pairs)))]
    table = count_routing(trace).coactivation
    assert table is not None
    assert measures.coactivation_concentration(table[0])[0] == pytest.approx(sum(best) / trace.num_tokens)


def test_coactivation_of_popularity_alone_and_of_single_choices() -> None:
    """Pairs as likely as their loads' product hold what popularity says; top-1 layers hold nothing."""
    load = np.array([4.0, 3.0, 2.0, 1.0])
    share, alone = measures.coactivation_concentration(np.ones((4, 4)))
    assert share == pytest.approx(alone) == pytest.approx(1 / 6)
    assert measures.coactivation_concentration(np.diag(load)) == (0.0, 0.0)


# --- distances and ranks --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=2, max_size=6))
def test_total_variation_is_a_metric(rows: list[tuple[int, int, int]]) -> None:
    """It is 0 for proportional loads, symmetric, at most 1, and obeys the triangle inequality."""
    a, b, c = (np.array(column) + (not any(column)) for column in zip(*rows, strict=True))
    ab, bc, ac = measures.total_variation(a, b), measures.total_variation(b, c), measures.total_variation(a, c)
    assert measures.total_variation(a, 3 * a) == pytest.approx(0, abs=1e-12)
    assert ab == pytest.approx(measures.total_variation(b, a))
    assert ab <= 1 + 1e-12
    assert ac <= ab + bc + 1e-12
    p, q = a / a.sum(), b / b.sum()
    assert ab == pytest.approx(max(sum(p[list(s)]) - sum(q[list(s)]) for s in subsets(len(p))), abs=1e-12)


def subsets(size: int) -> list[tuple[int, ...]]:
    """Every set of the numbers below ``size``."""
    return [s for count in range(size + 1) for s in itertools.combinations(range(size), count)]


@given(loads, st.integers(0, 10**6))
def test_rank_correlation_is_scipys(load: list[int], seed: int) -> None:
    """Spearman's ρ with mean ranks for ties equals SciPy's; 0 where one side is constant."""
    from scipy.stats import spearmanr

    other = np.random.default_rng(seed).integers(0, 5, len(load))
    constant = len(set(load)) == 1 or len(set(other.tolist())) == 1
    expected = 0.0 if constant else float(spearmanr(load, other)[0])
    assert measures.rank_correlation(np.array(load), other) == pytest.approx(expected, abs=1e-12)


@given(st.permutations(range(8)), st.permutations(range(8)), st.integers(1, 8))
def test_overlap_counts_common_members(left: list[int], right: list[int], count: int) -> None:
    """Without ties it is the share of common members of both top lists."""
    tops = [set(np.argsort(side)[::-1][:count].tolist()) for side in (left, right)]
    assert measures.top_overlap(np.array(left), np.array(right), count) == pytest.approx(len(tops[0] & tops[1]) / count)


def test_overlap_of_ties_is_the_mean_over_ways_to_break_them() -> None:
    """Two of four tied experts against a fixed pair: half of it is found on average."""
    assert measures.top_overlap(np.ones(4), np.array([4, 3, 0, 0]), 2) == pytest.approx(0.5)


def test_sampling_variation_is_what_samples_show() -> None:
    """Mean distance of two samples of one law agrees with the formula within a tenth."""
    rng = np.random.default_rng(0)
    law = np.array([0.4, 0.3, 0.2, 0.05, 0.05])
    pairs = [(rng.multinomial(400, law), rng.multinomial(900, law)) for _ in range(300)]
    seen = np.mean([measures.total_variation(a, b) for a, b in pairs])
    assert measures.sampling_variation(law, 400, 900) == pytest.approx(float(seen), rel=0.1)


def test_design_effect_of_independent_and_of_repeated_tokens() -> None:
    """Independent tokens count once; tokens that come in equal groups of ten count as one of them."""
    rng = np.random.default_rng(0)
    sizes = np.full(400, 20)
    alone = rng.multinomial(20, [0.5, 0.3, 0.2], 400)
    tens = 10 * rng.multinomial(2, [0.5, 0.3, 0.2], 400)
    assert measures.design_effect(alone, sizes) == pytest.approx(1, rel=0.15)
    assert measures.design_effect(tens, sizes) == pytest.approx(10, rel=0.15)
    assert measures.design_effect(alone[:1], sizes[:1]) is None


# --- whole traces ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(traces(), st.integers(0, 10**6))
def test_names_of_experts_do_not_matter(trace: Trace, seed: int) -> None:
    """Renaming the experts changes no measure (but the GPUs of contiguous experts, which are about names)."""
    order = np.random.default_rng(seed).permutation(trace.meta.num_experts).astype(np.uint8)
    same, other = (insight_of(marked(t)).to_dict() for t in (trace, relabel_experts(trace, order)))
    for document in (same, other):
        document.pop("gpu_max_over_min")
    assert same == approximately(other)


def approximately(value: Any) -> Any:
    """Compare nested numbers up to rounding."""
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return pytest.approx(value, abs=2e-6) if isinstance(value, float) else value


@settings(max_examples=30)
@given(traces(), st.lists(st.integers(0, 12), max_size=5))
def test_blocks_do_not_matter(trace: Trace, sizes: list[int]) -> None:
    """A stream cut anywhere has the profile of the whole trace."""
    whole = profile_trace(marked(trace))
    parts = profile_trace(cut(marked(trace), sizes))
    for name in ("tokens", "load", "group_tokens", "group_load", "drift", "following"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name


@given(traces(), st.integers(1, 4), st.integers(0, 99))
def test_profiles_of_parts_merge(trace: Trace, num_parts: int, seed: int) -> None:
    """Whole requests profiled apart, kept as arrays and merged in any order give the profile of the whole."""
    named = marked(trace)
    whole, total = profile_trace(named), ProfileTally(named.meta.replace(num_experts=named.meta.top_k))
    for _, part in divided(named, num_parts, seed):
        tally, again = ProfileTally(part.meta), ProfileTally(part.meta)
        tally.add(part, token_hashes(part), chunk=0)
        again.restore(tally.state())
        total.merge(again)
    merged = total.result(named.meta)
    for name in ("tokens", "load", "group_tokens", "group_load", "drift", "following"):
        assert np.array_equal(getattr(whole, name), getattr(merged, name)), name


def test_one_walk_and_compiled_loops_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting and profiling in one walk gives what two walks give, compiled or not, on any number of threads."""
    trace = cut(marked(make_trace(0, tokens=3000, requests=50)), [700, 1, 900])
    stats, profile = count_routing(trace), profile_trace(trace)
    monkeypatch.setattr(profile_module, "COMPILE_FROM_SELECTIONS", 5000)
    for threads in (1, 2):
        both = count_and_profile(trace, threads=threads)
        assert both[0].digest() == stats.digest()
        for name in ("tokens", "load", "group_tokens", "group_load", "drift", "following"):
            assert np.array_equal(getattr(both[1], name), getattr(profile, name)), name


@given(traces())
def test_profile_counts_every_token_once(trace: Trace) -> None:
    """Loads by phase and domain and by group add up to the load; each cell is counted by hand."""
    named = marked(trace)
    profile, load = profile_trace(named), count_routing(trace).load
    assert np.array_equal(profile.load.sum(axis=(0, 1)), load)
    assert np.array_equal(profile.group_load.sum(axis=0), load)
    assert profile.tokens.sum() == profile.group_tokens.sum() == trace.num_tokens
    for phase, domain in itertools.product((0, 1), range(3)):
        rows = (named.phase == phase) & (named.domain == domain)
        assert profile.tokens[phase, domain] == rows.sum()
        expected = np.bincount(named.experts[rows, 0].ravel(), minlength=named.meta.num_experts)
        assert np.array_equal(profile.load[phase, domain, 0], expected)


def long_trace(tokens: int, change_at: int) -> Trace:
    """One layer, top-1 of four: experts 0 and 1 first, 2 and 3 later; requests of 100 tokens."""
    number = np.arange(tokens)
    ids = (number % 2 + 2 * (number >= change_at)).reshape(-1, 1, 1)
    meta = TraceMeta(num_experts=4, top_k=1, layer_ids=(0,))
    phase = (number % 100 >= 50).astype(np.uint8)
    return Trace(meta=meta, experts=ids, request=number // 100, position=number % 100, phase=phase)


def test_drift_compares_consecutive_chunks() -> None:
    """Three full chunks give two distances: none before the change of experts, all of it at the change."""
    trace = long_trace(3 * CHUNK_TOKENS + 10, 2 * CHUNK_TOKENS)
    profile = profile_trace(cut(trace, [7_000, 30_000, 1, 20_000]))
    assert profile.drift.tolist() == pytest.approx([0, 1])
    assert 0 < profile.drift_noise[0] < 0.01


def test_following_tokens_are_those_of_one_request() -> None:
    """In a strict alternation the next token is certain; the sample stays bounded and ends at requests' ends."""
    trace = long_trace(3 * FOLLOWING_TOKENS, 10**9)
    share, alone = profile_trace(trace).following[0]
    assert (share, alone) == pytest.approx((1, 0.5), abs=0.02)
    single = trace.replace(request=np.arange(trace.num_tokens))
    assert profile_trace(single).following.size == 0


def test_short_traces_are_told_apart_from_long_ones() -> None:
    """Forty tokens are short for six experts; ten thousand independent ones are not; requests that repeat are fewer."""
    short = insight_of(make_trace(0, tokens=40))
    assert short.sample.warning is not None
    assert "40 tokens" in short.sample.warning
    long = insight_of(make_trace(0, tokens=10_000, requests=500))
    assert long.sample.warning is None
    assert long.sample.design_effect == pytest.approx(1, rel=0.4)
    stuck = make_trace(0, tokens=500, requests=500)
    again = stuck.take(np.repeat(np.arange(500), 20))
    assert insight_of(again).sample.effective_tokens == pytest.approx(500, rel=0.4)


def test_counts_have_no_tokens_but_domains_and_drift() -> None:
    """Counts give skew, domains and drift, and say what they do not hold."""
    steps = np.array([[[30_000, 0]], [[15_000, 15_000]], [[0, 30_000]]])
    meta = TraceMeta(num_experts=2, top_k=1, layer_ids=(3,), domains=("a", "b"))
    insight = insight_of(Counts(meta=meta, counts=steps, domain=np.array([0, 0, 1])))
    assert insight.drift == pytest.approx((0.5, 0.5))
    assert insight.domains == ("a", "b")
    assert insight.pair_distances == pytest.approx((0.75,))
    assert (insight.affinity, insight.coactivation, insight.phases) == ((), (), None)
    assert "does not hold" in patterns(insight)[0].here


def test_each_published_insight_has_a_line() -> None:
    """Six lines, numbered, each with this trace's figure and the published one; numbers are JSON."""
    insight = insight_of(marked(make_trace(0, tokens=400)))
    lines = patterns(insight)
    assert [line.number for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(any(c.isdigit() for c in line.here) for line in lines)
    assert all("(published: " in str(line) for line in lines)
    assert set(insight.to_dict()) == set(insight.__slots__)


# --- published figures ----------------------------------------------------------------------------------------------


def opened(path: str) -> TraceStream:
    """Open real tokens, or skip."""
    source = open_trace(real(path), format="npz")
    assert not isinstance(source, Counts)
    return source


def test_gpt_oss_figures() -> None:
    """gpt-oss-20b: load 2.52 (worst 3.8), top pairs 73.8 % against 57.8 %, 0.50 bit; medians over layers and pairs."""
    insight = insight_of(opened("gpt_oss_20b_fingerprinting/routing.npz"))
    skew = [row.max_over_mean for row in insight.skew]
    assert (round(float(np.median(skew)), 2), round(max(skew), 1)) == (2.52, 3.8)
    pairs = insight.affinity
    assert round(100 * float(np.median([pair.top_pair_share for pair in pairs])), 1) == 73.8
    assert round(100 * float(np.median([pair.top_pair_share_independent for pair in pairs])), 1) == 57.8
    assert round(float(np.median([pair.mutual_information for pair in pairs])), 2) == 0.50


def test_glm_figures() -> None:
    """GLM-5.2, all domains pooled: load max/mean 3.29, median over layers, 7.8 in the worst."""
    with np.load(real("glm52_expert_counts/counts.npz"), allow_pickle=False) as file:
        meta = TraceMeta(num_experts=256, top_k=8, layer_ids=tuple(file["layer_ids"].tolist()))
        counts = Counts(meta=meta, counts=file["counts"])
    skew = [row.max_over_mean for row in insight_of(counts).skew]
    assert (round(float(np.median(skew)), 2), round(max(skew), 1)) == (3.29, 7.8)


def test_tinymoe_figures() -> None:
    """tinymoe: ρ 0.86 (median over layers); prefill's top 5/10/20 hold 65/74/91 % of decode's (mean over layers)."""
    insight = insight_of(opened("tinymoe_trained_8x32_top4/routing.npz"))
    assert insight.phases is not None
    assert round(float(np.median(insight.phases.rank_correlation)), 2) == 0.86
    assert [round(100 * float(np.mean(row))) for row in insight.phases.overlap] == [65, 74, 91]
    assert len(insight.domains) == 8


def test_joined_blocks_are_the_trace() -> None:
    """The helper that cuts traces loses no token (what the block laws above rest on)."""
    trace = make_trace(0)
    assert concatenate(cut(trace, [3, 0, 9]).blocks(), trace.meta).digest() == trace.digest()


def test_names_that_come_late_are_in_the_profile() -> None:
    """A domain whose name is met after the first block has its name in what is told."""
    whole = make_trace(1, tokens=40)
    late = whole.meta.replace(domains=("art", "law"))

    class Stream:
        meta = whole.meta.replace(domains=("art",))

        def blocks(self) -> Iterator[Trace]:
            yield whole.take(np.arange(20)).replace(meta=self.meta, domain=np.zeros(20, np.int64))
            Stream.meta = late
            yield whole.take(np.arange(20, 40)).replace(meta=late, domain=np.ones(20, np.int64))

    stats, profile = count_and_profile(Stream())
    assert profile.meta.domains == stats.meta.domains == ("art", "law")
    assert domain_distances(profile)[0] == ("art", "law")


def test_chance_counts_whole_requests() -> None:
    """Where tokens of a request are alike, chance moves the load of chunks by as much more."""
    trace = long_trace(3 * CHUNK_TOKENS, 0)
    alike = trace.replace(experts=(trace.request % 4).reshape(-1, 1, 1))
    stats, profile = count_and_profile(alike)
    insight = measure_trace(stats, profile)
    design = insight.sample.design_effect
    assert design is not None
    assert design > 1
    assert insight.drift_noise == pytest.approx(profile.drift_noise * math.sqrt(design))
