from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import small_model

from moeplace import measures
from moeplace.affinity import count_routing
from moeplace.checks import check_trace
from moeplace.cli.synth import Amount, synth_command
from moeplace.errors import InputError
from moeplace.insight import measure_trace
from moeplace.model import ModelSpec, load_model
from moeplace.profile import profile_trace
from moeplace.readers import open_trace
from moeplace.synth import SyntheticTrace, SynthSpec, synthesise
from moeplace.synth.calibrate import measured
from moeplace.synth.routers import AliasTable, Knobs, LayerRouter, balanced, expected_choices, normal_scores
from moeplace.synth.spec import TOLERANCES
from moeplace.trace import Counts, Trace, concatenate

KNOBS = Knobs(popularity=0.5, domain=0.8, topic=2.5, agreement=0.8, wander=0.5)
TOY = small_model(3, 16, 3)


def stream(model: ModelSpec = TOY, *, tokens: int = 5000, seed: int = 0, **fields: Any) -> SyntheticTrace:
    """An uncalibrated trace."""
    spec = fields.pop("spec", SynthSpec(request_tokens=64))
    return SyntheticTrace(model=model, spec=spec, num_tokens=tokens, seed=seed, knobs=KNOBS, **fields)


def whole(source: SyntheticTrace) -> Trace:
    """All its tokens."""
    return concatenate(source.blocks(), source.meta)


# --- drawing --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 20), st.floats(0, 4), st.integers(0, 10**6))
def test_alias_tables_hold_the_distribution_exactly(rows: int, columns: int, spread: float, seed: int) -> None:
    """Kept and given-away shares of the columns add up to each weight's share."""
    weights = np.exp(np.random.default_rng(seed).normal(0, spread, (rows, columns)))
    table = AliasTable.build(weights)
    assert ((table.keep >= 0) & (table.keep <= 1)).all()
    share = table.keep.astype(np.float64)
    for row in range(rows):
        np.add.at(share[row], table.other[row], 1 - table.keep[row].astype(np.float64))
    assert share / columns == pytest.approx(weights / weights.sum(axis=1, keepdims=True), abs=1e-6)


def drawn(router: LayerRouter, top_k: int, tokens: int = 40_000, seed: int = 5) -> np.ndarray:
    """Choices of many tokens of one state."""
    return router.choose(np.zeros(tokens, np.int64), top_k, np.arange(tokens), seed)


def test_experts_are_drawn_one_after_the_other_by_weight() -> None:
    """First choices follow the weights, and second ones the weights of what is left: w_b/(1 − w_a)."""
    weights = np.array([0.6, 0.25, 0.1, 0.05])
    chosen = drawn(LayerRouter.build(weights[None]), 2)
    expected = weights[:, None] * weights / (1 - weights[:, None])
    np.fill_diagonal(expected, 0)
    counted = measures.pair_table(chosen[:, :1], chosen[:, 1:], 4) / len(chosen)
    assert counted == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("spread", [0.0, 8.0])
def test_choices_are_distinct_even_where_one_expert_takes_nearly_all(spread: float) -> None:
    """All k experts of a token differ, up to all there are, also when repetitions are nearly certain."""
    weights = np.exp(spread * np.arange(6.0))[None]
    chosen = drawn(LayerRouter.build(weights), 6, tokens=500)
    assert (np.sort(chosen, axis=1) == np.arange(6)).all()
    if spread:
        assert (chosen == np.arange(5, -1, -1)).mean() > 0.95


def test_groups_limit_where_a_token_goes() -> None:
    """A token's experts lie in at most M groups; groups are drawn by the sum of their weights."""
    model = small_model(1, 16, 4, num_groups=4, groups_per_token=2)
    weights = np.exp(np.random.default_rng(0).normal(0, 1, (1, 16)))
    chosen = drawn(LayerRouter.build(weights, model), 4)
    groups = [len(set(row)) for row in (chosen // 4).tolist()]
    assert max(groups) <= 2
    assert (np.diff(np.sort(chosen, axis=1), axis=1) > 0).all()
    mass = weights.reshape(4, 4).sum(axis=1) / weights.sum()
    used = [np.mean((chosen // 4 == group).any(axis=1)) for group in range(4)]
    assert np.array_equal(np.argsort(used), np.argsort(mass))


@given(st.integers(2, 9), st.integers(2, 12), st.integers(0, 10**6))
def test_balancing_keeps_rows_and_columns(rows: int, columns: int, seed: int) -> None:
    """Rows sum to what a token chooses, columns average to each expert's share of it."""
    rng = np.random.default_rng(seed)
    target = expected_choices(rng.normal(0, 0.5, columns), 1, 0)
    table = balanced(np.exp(rng.normal(0, 0.5, (rows, columns))), target, 1)
    assert table.sum(axis=1) == pytest.approx(np.ones(rows), abs=1e-3)
    assert table.mean(axis=0) == pytest.approx(target, abs=0.02)


def test_expected_choices_sum_to_k_and_keep_the_hot_one() -> None:
    """Probabilities sum to k, none beyond 0.97; the hot expert gets its multiple of the mean."""
    plain = expected_choices(3 * normal_scores(16), 4, 0)
    assert plain.sum() == pytest.approx(4)
    assert plain.max() <= 0.97
    hot = expected_choices(0.2 * normal_scores(64), 1, 16)
    assert hot.sum() == pytest.approx(1)
    assert hot.max() == pytest.approx(16 / 64)
    assert normal_scores(9).std() == pytest.approx(1)


# --- the stream -----------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 4000), st.integers(1, 3))
def test_blocks_and_threads_do_not_matter(tokens: int, block: int, threads: int) -> None:
    """Any block size and number of threads gives the same tokens, in blocks of that size but the last."""
    plain = stream(tokens=tokens)
    other = plain.replace(block_tokens=block, threads=threads)
    sizes = [part.num_tokens for part in other.blocks()]
    assert sum(sizes) == tokens
    assert all(size == block for size in sizes[:-1])
    assert whole(other).digest() == whole(plain).digest()


def test_a_longer_trace_begins_like_a_shorter_one() -> None:
    """Length cuts the trace and changes nothing in it; another seed changes everything."""
    long, short = whole(stream(tokens=9000)), whole(stream(tokens=700))
    assert long.take(np.arange(700)).digest() == short.digest()
    assert whole(stream(tokens=700, seed=1)).digest() != short.digest()


def test_requests_domains_and_phases_are_as_specified() -> None:
    """Requests of one length follow one another, one domain each, all domains alike; the first part is prefill."""
    trace = whole(stream(tokens=64 * 128, spec=SynthSpec(request_tokens=64, domains=4, prompt_share=0.25)))
    assert np.array_equal(trace.request, np.arange(64 * 128) // 64)
    assert np.array_equal(trace.position, np.arange(64 * 128) % 64)
    assert np.array_equal(trace.phase, (trace.position >= 16).astype(np.uint8))
    assert trace.domain is not None
    by_request = trace.domain.reshape(128, 64)
    assert (by_request == by_request[:, :1]).all()
    assert np.bincount(by_request[:, 0]).tolist() == [32] * 4
    assert trace.meta.domains == ("domain0", "domain1", "domain2", "domain3")
    assert trace.meta.layer_ids == TOY.moe_layer_ids


def test_group_limited_models_stay_in_their_groups() -> None:
    """Every token of a DeepSeek-V3-like trace uses at most its groups, in every layer."""
    model = small_model(2, 32, 4, num_groups=8, groups_per_token=2)
    trace = whole(stream(model, tokens=2000))
    groups = np.sort(trace.experts // 4, axis=2)
    assert (np.diff(groups, axis=2) > 0).sum(axis=2).max() <= 1


def test_a_trace_raises_no_warning() -> None:
    """The project's own checks find nothing wrong with a synthetic trace."""
    trace = whole(stream(tokens=20_000, spec=SynthSpec(request_tokens=256)))
    findings = check_trace(trace, count_routing(trace), profile_trace(trace).loops)
    assert [finding.check for finding in findings if finding.level == "warning"] == []


# --- calibration ----------------------------------------------------------------------------------------------------


def held(trace: Trace, spec: SynthSpec) -> dict[str, float]:
    """Values that are further from what was asked for than the tolerance."""
    reached = measured(trace, spec)
    return {name: getattr(reached, name) for name in TOLERANCES if reached.error(spec, name) > 1}


SPECS = {
    "default": SynthSpec(),
    "mild": SynthSpec(sigma=0.2, mutual_information=0.4, domain_distance=0.25, drift=0.06),
    "one domain": SynthSpec(sigma=1.1, domains=1, mutual_information=0.6, drift=0.2),
    "apart": SynthSpec(sigma=0.8, domains=10, domain_distance=0.5, drift=0.25, rank_correlation=0.6),
}


@pytest.mark.parametrize("name", SPECS)
def test_what_is_asked_for_is_measured(name: str) -> None:
    """A trace of 100,000 tokens measures within the tolerances of what was asked for, all five values at once."""
    model = small_model(4, 48, 4)
    source = synthesise(model, SPECS[name], 100_000, 3)
    assert held(whole(source.replace(threads=2)), SPECS[name]) == {}


def test_insight_shows_the_values_of_a_gpt_oss_shape() -> None:
    """The library's own report of a gpt-oss-20b trace: spread, bits, drift, domains, phases, successor share."""
    model, spec = load_model("gpt-oss-20b"), SynthSpec()
    trace = whole(synthesise(model, spec, 100_000, 0).replace(threads=2))
    insight = measure_trace(count_routing(trace, threads=2), profile_trace(trace))
    bits = np.median([pair.mutual_information - pair.information_bias for pair in insight.affinity])
    assert bits == pytest.approx(spec.mutual_information, rel=0.1)
    assert np.median([row.sigma for row in insight.skew]) == pytest.approx(spec.sigma, rel=0.1)
    assert np.mean(insight.pair_distances) == pytest.approx(spec.domain_distance, rel=0.1)
    assert np.mean(insight.drift) == pytest.approx(spec.drift, abs=0.02)
    assert insight.phases is not None
    assert np.median(insight.phases.rank_correlation) == pytest.approx(0.8, abs=0.06)
    successors = np.median([pair.successor_share for pair in insight.affinity])
    assert 0.45 <= successors <= 0.60
    assert successors == pytest.approx(spec.expected_successor_share, abs=0.06)


def test_top_1_models_get_a_hot_expert() -> None:
    """A top-1 model is skewed more, has one bit of affinity, and one expert of about sixteen times the mean."""
    model = small_model(6, 128, 1)
    spec = SynthSpec.of_model(model)
    assert (spec.sigma, spec.mutual_information, spec.hot) == (1.6, 1.0, 16.0)
    trace = whole(synthesise(model, spec, 100_000, 0))
    assert held(trace, spec) == {}
    hottest = [row.max() / row.mean() for row in count_routing(trace).load]
    assert np.median(hottest) == pytest.approx(16, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olmoe-1b-7b", "gpt-oss-20b", "deepseek-v3", "qwen3-30b-a3b", "llama-4-maverick"])
@pytest.mark.parametrize("seed", [0, 1])
def test_published_shapes_measure_as_asked(name: str, seed: int) -> None:
    """Whole traces of published shapes, all layers, by default and mild."""
    model = load_model(name)
    for spec in (SynthSpec.of_model(model), SynthSpec(sigma=0.2)):
        source = synthesise(model, spec, 100_000, seed).replace(threads=2)
        assert held(whole(source), spec) == {}


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (small_model(2, 4, 4), {}, "top-4 of 4"),
        (small_model(2, 8, 2), {"hot": 5.0}, "at most 3.9"),
        (small_model(2, 4, 2), {"mutual_information": 3.0}, "out of reach"),
    ],
)
def test_what_cannot_be_had_is_refused(model: ModelSpec, fields: dict[str, float], words: str) -> None:
    """An error says what was asked for and what is nearest or possible."""
    with pytest.raises(InputError, match=words):
        synthesise(model, SynthSpec(**fields), 1000, 0)


@pytest.mark.parametrize("field", ["sigma", "drift", "prompt_share", "domains", "request_tokens", "rank_correlation"])
def test_values_outside_their_range_are_refused(field: str) -> None:
    """A specification is checked when it is made, also for values that are no number."""
    for value in (-1, 1e9, float("nan")):
        with pytest.raises(InputError, match=field.replace("_", " ")):
            SynthSpec(**{field: value})


def test_one_layer_one_phase_one_domain_will_do() -> None:
    """What cannot be measured is not asked for."""
    spec = SynthSpec(domains=1, prompt_share=0.0, drift=0.0)
    source = synthesise(small_model(1, 12, 2), spec, 2000, 0)
    reached = source.reached
    assert reached is not None
    assert (reached.domain_distance, reached.mutual_information, reached.rank_correlation) == (None, None, None)
    assert whole(source).num_tokens == 2000


def test_empty_traces_are_refused() -> None:
    """A trace has at least one token."""
    with pytest.raises(InputError, match="tokens 0"):
        stream(tokens=0)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_librarys_trace(tmp_path: Path) -> None:
    """``moeplace synth`` writes what ``synthesise`` gives, the same bytes each time, and says what it measured."""
    runner = CliRunner()
    shape = {"num_layers": 3, "num_experts": 16, "top_k": 2, "hidden": 64, "expert_inner": 32}
    toml = tmp_path / "toy.toml"
    toml.write_text("".join(f"{key} = {value}\n" for key, value in shape.items()))
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for threads, path in enumerate(paths, 1):
        words = [str(toml), "-o", str(path), "--tokens", "2k", "--mi", "0.2", "--threads", str(threads), "--json"]
        result = runner.invoke(synth_command, words, catch_exceptions=False)
        assert result.exit_code == 0
        document = json.loads(result.stdout)
        assert document["asked"]["mutual_information"] == 0.2
        assert document["measured"]["mutual_information"] == pytest.approx(0.2, abs=0.03)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    model = load_model(toml)
    spec = SynthSpec.of_model(model).replace(mutual_information=0.2)
    read = open_trace(paths[0], format="npz")
    assert not isinstance(read, Counts)
    assert concatenate(read.blocks(), read.meta).digest() == whole(synthesise(model, spec, 2000, 0)).digest()
    assert read.meta.model_id == model.name


@pytest.mark.parametrize(("text", "number"), [("60k", 60_000), ("1.5M", 1_500_000), ("7", 7), ("60_000", 60_000)])
def test_amounts_are_read(text: str, number: int) -> None:
    """Thousands and millions may be written short."""
    assert Amount().convert(text, None, None) == number


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "k", "ten", "1e3", ""])
def test_wrong_amounts_are_refused(text: str) -> None:
    """Anything that is not a whole number of at least 1 is a usage error."""
    with pytest.raises(Exception, match="is not an amount"):
        Amount().convert(text, None, None)
