"""Laws of :mod:`moeplace.split`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cut, make_trace, traces

from moeplace.errors import InputError, TraceError, UnknownNameError
from moeplace.split import Selection, Split, parse_split, select
from moeplace.trace import Counts, Trace, TraceMeta, concatenate


def _tokens(selected: object) -> Trace:
    assert isinstance(selected, Trace | Selection)
    return concatenate(selected.blocks(), selected.meta)


@given(traces(tokens=20), st.integers(0, 9), st.lists(st.integers(0, 9), max_size=3))
def test_half_is_the_documented_law(trace: Trace, seed: int, sizes: list[int]) -> None:
    """Fit is the first half, rounded down, of ``default_rng(seed).permutation(unique(request))``."""
    names = np.unique(trace.request)
    if len(names) < 2:
        with pytest.raises(InputError, match="fit part of half"):
            select(trace, split=Split(kind="half", seed=seed))
        return
    law = set(np.random.default_rng(seed).permutation(names)[: len(names) // 2].tolist())
    stream, split = cut(trace, sizes), Split(kind="half", seed=seed)
    fit, test = (_tokens(select(stream, split=split, part=part)) for part in ("fit", "test"))
    assert set(fit.request.tolist()) == law
    assert set(test.request.tolist()) == set(names.tolist()) - law
    assert fit.num_tokens + test.num_tokens == trace.num_tokens


@given(traces(tokens=25), st.floats(0.01, 0.99))
def test_time_takes_the_first_requests(trace: Trace, fraction: float) -> None:
    """Fit is the given share, rounded down, of the requests in order of first appearance; test is the rest."""
    shuffled = trace.take(np.random.default_rng(0).permutation(trace.num_tokens))
    order = list(dict.fromkeys(shuffled.request.tolist()))
    count = int(len(order) * fraction + 1e-9)
    split = Split(kind="time", fraction=fraction)
    if count == 0:
        with pytest.raises(InputError, match="fit part"):
            select(shuffled, split=split)
        return
    stream = cut(shuffled, [4, 4])
    assert set(_tokens(select(stream, split=split)).request.tolist()) == set(order[:count])
    assert set(_tokens(select(stream, split=split, part="test")).request.tolist()) == set(order[count:])


def test_a_fraction_is_not_lost_to_rounding() -> None:
    """29 % of 100 steps are 29 steps, though 0.29·100 is below 29 in floating point."""
    meta = TraceMeta(num_experts=1, top_k=1, layer_ids=(0,))
    counts = Counts(meta=meta, counts=np.ones((100, 1, 1), np.int64))
    fit = select(counts, split=parse_split("time:0.29"))
    assert isinstance(fit, Counts)
    assert fit.num_steps == 29


def test_domains_take_whole_requests() -> None:
    """A request with a token of a chosen domain is fit, all of its tokens; the others are test."""
    trace = make_trace(0, tokens=12, requests=4)
    trace = trace.replace(
        meta=trace.meta.replace(domains=("code", "law", "math")),
        request=np.repeat([1, 2, 3, 4], 3),
        domain=np.array([0, 0, 0, 1, 1, 0, 2, 2, 2, 1, 1, 1]),
    )
    split = parse_split("domain:code, math")
    assert split.domains == ("code", "math")
    assert sorted(set(_tokens(select(trace, split=split)).request.tolist())) == [1, 2, 3]
    assert sorted(set(_tokens(select(cut(trace, [4]), split=split, part="test")).request.tolist())) == [4]


def test_phase_is_taken_after_the_split(small_trace: Trace) -> None:
    """The split is of all requests; the phase only filters tokens, so no request moves between parts."""
    split = Split(kind="half", seed=1)
    both = _tokens(select(small_trace, split=split))
    decode = _tokens(select(small_trace, split=split, phase="decode"))
    assert decode.num_tokens == int((both.phase == 1).sum())
    assert set(decode.request.tolist()) <= set(both.request.tolist())
    assert _tokens(select(small_trace, phase="prefill")).num_tokens == int((small_trace.phase == 0).sum())
    assert select(small_trace) is small_trace


def test_counts_are_split_by_step() -> None:
    """Steps of counts are dealt like requests: half by the same law, time by order, domain by label."""
    meta = TraceMeta(num_experts=2, top_k=1, layer_ids=(0,), domains=("a", "b"))
    counts = Counts(meta=meta, counts=np.arange(14).reshape(7, 1, 2), domain=[0, 1, 0, 1, 0, 1, 1])

    def steps(text: str, part: str) -> list[int]:
        chosen = select(counts, split=parse_split(text), part=part)  # type: ignore[arg-type]
        assert isinstance(chosen, Counts)
        return (chosen.counts[:, 0, 0] // 2).tolist()

    assert steps("half:3", "fit") == sorted(np.random.default_rng(3).permutation(7)[:3].tolist())
    assert steps("half:3", "fit") + steps("half:3", "test") != []
    assert sorted(steps("half:3", "fit") + steps("half:3", "test")) == list(range(7))
    assert (steps("time:0.5", "fit"), steps("time:0.5", "test")) == ([0, 1, 2], [3, 4, 5, 6])
    assert (steps("domain:b", "fit"), steps("domain:b", "test")) == ([1, 3, 5, 6], [0, 2, 4])
    with pytest.raises(InputError, match="phases"):
        select(counts, phase="decode")


@pytest.mark.parametrize("text", ["half:0", "half:12", "time:0.5", "time:0.1234567890123", "domain:a,b c"])
def test_splits_print_as_they_parse(text: str) -> None:
    """Reading what a split prints gives the same split, to the last digit."""
    split = parse_split(text)
    assert str(split) == text
    assert parse_split(str(split)) == split


@pytest.mark.parametrize(
    "text", ["half:x", "half:-1", "half:1.5", "time:", "time:0", "time:1", "time:nan", "time:2", "domain:", "domain: ,"]
)
def test_bad_arguments_are_refused(text: str) -> None:
    """A bad argument is an error that repeats the text and gives the rule."""
    with pytest.raises(InputError) as caught:
        parse_split(text)
    assert repr(text) in caught.value.what
    assert caught.value.rule


def test_missing_names_are_told(small_trace: Trace) -> None:
    """An unknown kind, phase or domain suggests the right one; a trace without domains says so."""
    with pytest.raises(UnknownNameError, match="did you mean half"):
        parse_split("halv:0")
    with pytest.raises(UnknownNameError, match="did you mean decode"):
        select(small_trace, phase="decoding")
    with pytest.raises(TraceError, match="names its domains"):
        select(small_trace, split=parse_split("domain:math"))
    named = small_trace.replace(meta=small_trace.meta.replace(domains=("math",)))
    with pytest.raises(UnknownNameError, match="did you mean math"):
        select(named, split=parse_split("domain:maths"))
    with pytest.raises(TraceError, match="records no domains"):
        select(named, split=parse_split("domain:math"))


def test_a_trace_can_be_given_its_model_s_name(tmp_path: Path) -> None:
    """A named stream keeps its tokens and carries the name into the file it is written to."""
    import moeplace
    from moeplace.split import named

    trace = moeplace.read_trace(Path(__file__).parents[1] / "traces" / "hand.jsonl")
    assert named(trace, None) is trace
    moeplace.write_trace(named(trace, "gpt-oss-20b"), tmp_path / "named.npz")
    again = moeplace.read_trace(tmp_path / "named.npz")
    assert again.meta.model_id == "gpt-oss-20b"
    assert again.digest() == trace.digest()
