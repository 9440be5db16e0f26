"""Laws of :mod:`moeplace.subset`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cut, make_trace, traces

from moeplace.errors import InputError, UnknownNameError
from moeplace.split import all_requests, parse_split, select
from moeplace.subset import (
    IDENTICAL_ROWS,
    Behind,
    Sized,
    Subset,
    dummy_run,
    identical_rows,
    named_requests,
    narrowed,
    parse_requests,
    sample_requests,
)
from moeplace.trace import Counts, Trace, TraceMeta, TraceStream, concatenate

META = TraceMeta(num_experts=4, top_k=1, layer_ids=(0,))
NAMED = META.replace(request_names=("math-1", "math-2", "law-1", "10-19", "7"))
NUMBERS = np.array([1, 4, 7, 10, 13])


def tokens_of(source: TraceStream | Counts) -> Trace:
    """All tokens of a stream."""
    assert not isinstance(source, Counts)
    return concatenate(source.blocks(), source.meta)


def kept(trace: Trace, sizes: list[int] = [], **fields: Any) -> Trace:  # noqa: B006 # read only
    """The tokens that a subset keeps of a trace cut into blocks."""
    return tokens_of(narrowed(cut(trace, sizes), Subset(**fields)))


@given(traces(tokens=25), st.data(), st.lists(st.integers(0, 9), max_size=3))
def test_kept_and_left_out_are_everything(trace: Trace, data: st.DataObject, sizes: list[int]) -> None:
    """What ``requests`` keeps and what ``without`` leaves are the whole trace, each token once, in recorded order."""
    everything = np.unique(trace.request).tolist()
    chosen = data.draw(st.sets(st.sampled_from(everything), min_size=1))
    items = tuple(map(str, sorted(chosen)))
    inside = kept(trace, sizes, requests=items)
    assert inside.digest() == trace.take(np.isin(trace.request, list(chosen))).digest()
    if len(chosen) == len(everything):
        with pytest.raises(InputError, match="none of the requests"):
            kept(trace, sizes, without=items)
        return
    outside = kept(trace, sizes, without=items)
    assert outside.digest() == trace.take(~np.isin(trace.request, list(chosen))).digest()
    assert inside.num_tokens + outside.num_tokens == trace.num_tokens


@given(traces(tokens=25), st.floats(0.01, 1), st.integers(0, 99), st.lists(st.integers(0, 9), max_size=3))
def test_a_sample_is_of_whole_requests_in_order(trace: Trace, share: float, seed: int, sizes: list[int]) -> None:
    """A sample has the size asked for, holds all tokens of its requests in recorded order, whatever the blocks."""
    everything = np.unique(trace.request)
    size = max(1, round(share * len(everything)))
    sample = kept(trace, sizes, sample=share, seed=seed)
    assert sample.num_requests == size
    assert sample.digest() == trace.take(np.isin(trace.request, np.unique(sample.request))).digest()
    assert sample.digest() == kept(trace, sample=size, seed=seed).digest()


@given(st.sets(st.integers(-50, 50), min_size=2), st.integers(0, 99), st.data())
def test_samples_of_one_seed_are_nested(numbers: set[int], seed: int, data: st.DataObject) -> None:
    """The same seed gives the same sample; a larger one holds every smaller one; all of them is everything."""
    requests = np.array(sorted(numbers))
    large = data.draw(st.integers(1, len(requests)))
    small = data.draw(st.integers(1, large))
    samples = [sample_requests(requests, size, seed).tolist() for size in (small, large, large)]
    assert samples[1] == samples[2]
    assert set(samples[0]) <= set(samples[1])
    assert sample_requests(requests, 1.0, seed).tolist() == requests.tolist()


def test_samples_are_uniform() -> None:
    """Over seeds, every request is drawn about equally often."""
    drawn = np.bincount(np.concatenate([sample_requests(np.arange(10), 3, seed) for seed in range(2000)]))
    assert np.abs(drawn - 600).max() < 5 * np.sqrt(600 * 0.7)


@pytest.mark.parametrize("size", [6, 0, -1, 0.0, 1.5, float("nan")])
def test_samples_that_cannot_be_drawn_are_refused(size: float) -> None:
    """More requests than there are, none, and shares outside (0, 1] are errors."""
    with pytest.raises(InputError, match="a sample of"):
        sample_requests(NUMBERS, size)


@pytest.mark.parametrize(
    ("items", "numbers"),
    [
        (("4",), [4]),
        (("4", "13", "4"), [4, 13]),
        (("4-9",), [4, 7]),
        (("5 - 7", "13"), [7, 13]),
        (("0..99",), [1, 4, 7, 10, 13]),
        ((), []),
    ],
)
def test_numbers_and_ranges(items: tuple[str, ...], numbers: list[int]) -> None:
    """Items are united; a range takes the requests there are in it, both ends included."""
    assert named_requests(META, NUMBERS, items).tolist() == numbers


def test_names_win_over_numbers_and_ranges() -> None:
    """A name that looks like a range or a number is a name first; other numbers count requests from 0."""
    everything = np.arange(5)
    assert named_requests(NAMED, everything, ["law-1", "math-1"]).tolist() == [0, 2]
    assert named_requests(NAMED, everything, ["10-19"]).tolist() == [3]
    assert named_requests(NAMED, everything, ["7"]).tolist() == [4]
    assert named_requests(NAMED, everything, ["1", "3-4"]).tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("meta", "everything", "items", "words"),
    [
        (META, NUMBERS, ("8",), ("unknown request '8'", "the trace has 5 requests", "did you mean 7 or 10?")),
        (META, NUMBERS, ("99",), ("unknown request '99'", "numbered 1 to 13")),
        (META, NUMBERS, ("1", "5-6"), ("unknown request '5-6'",)),
        (META, NUMBERS, ("a", "b", "c", "d"), ("unknown requests 'a', 'b', 'c', … (4 in all)",)),
        (META, NUMBERS, ("9-4",), ("a range goes up", "write 4-9")),
        (NAMED, np.arange(5), ("maths-1",), ("did you mean math-1", "from 'math-1' to '7'")),
        (NAMED, np.array([0, 1]), ("law-1",), ("unknown request 'law-1'", "the trace has 2 requests")),
        (META, np.zeros(0, np.int64), ("1",), ("the trace has 0 requests",)),
    ],
)
def test_unknown_requests_are_told(meta: TraceMeta, everything: Any, items: tuple[str, ...], words: Any) -> None:
    """An item that names no request is an error with near matches, how many requests there are, and their numbers."""
    with pytest.raises(InputError) as caught:
        named_requests(meta, everything, items)
    for word in words:
        assert word in str(caught.value)


def test_lists_come_from_the_command_line_or_a_file(tmp_path: Path) -> None:
    """Commas or lines set items apart; blank ones are left out; no item at all is an error."""
    assert parse_requests(" a, b c ,,10-19 ") == ("a", "b c", "10-19")
    (tmp_path / "list.txt").write_text("a, b\n\n  10-19\n")
    assert parse_requests(f"@{tmp_path}/list.txt") == ("a, b", "10-19")
    (tmp_path / "empty.txt").write_text("\n")
    for text in (f"@{tmp_path}/empty.txt", "", " , "):
        with pytest.raises(InputError, match="no requests in"):
            parse_requests(text)
    with pytest.raises(InputError, match="no such file"):
        parse_requests(f"@{tmp_path}/none.txt")


@given(traces(tokens=25), st.integers(0, 5), st.integers(0, 5), st.lists(st.integers(0, 9), max_size=3))
def test_fields_act_in_their_order(trace: Trace, split: int, seed: int, sizes: list[int]) -> None:
    """One subset is the subsets of its fields, one after another, and no request moves between fit and test."""
    rule = parse_split(f"half:{split}")
    if trace.num_requests < 2:
        return
    fit, test = (kept(trace, sizes, split=rule, part=part, sample=0.5, seed=seed) for part in ("fit", "test"))
    for part, name in ((fit, "fit"), (test, "test")):
        whole = tokens_of(select(trace, split=rule, part=name))  # type: ignore[arg-type]
        assert part.digest() == kept(whole, sample=0.5, seed=seed).digest()
    assert not set(fit.request.tolist()) & set(test.request.tolist())


def test_a_sample_is_drawn_from_the_requests_that_are_left() -> None:
    """The phase comes before the sample: as many requests are kept as were asked for, all with tokens of the phase."""
    trace = make_trace(0, tokens=60, requests=12, prompt=4)
    decode = np.unique(trace.request[trace.phase == 1])
    assert 2 < len(decode) < trace.num_requests
    sample = kept(trace, phase="decode", sample=len(decode) - 1)
    assert sample.num_requests == len(decode) - 1
    assert (sample.phase == 1).all()


def test_a_part_without_the_requests_named_is_an_error() -> None:
    """Requests are looked up in the whole trace; if a part of a split has none of them, that is said."""
    trace = make_trace(0, tokens=30, requests=4)
    rule = parse_split("half:0")
    test = np.unique(tokens_of(select(trace, split=rule, part="test")).request)
    with pytest.raises(InputError, match="in the fit part of half:0"):
        kept(trace, split=rule, requests=tuple(map(str, test)))
    with pytest.raises(UnknownNameError):
        kept(trace, split=rule, requests=("999",))


@given(st.integers(0, 80), st.lists(st.integers(0, 90), max_size=3))
def test_a_dummy_run_is_dropped_whatever_the_blocks(length: int, sizes: list[int]) -> None:
    """From 32 identical rows on, exactly they are left out; a shorter run may be an accident and stays."""
    trace = make_trace(0, tokens=50, layers=3, experts=7)
    run = trace.take(np.zeros(length, int))
    both = concatenate([run, trace], trace.meta)
    same = length + identical_rows(trace)
    assert dummy_run(cut(both, sizes)) == (same if same >= IDENTICAL_ROWS else 0)
    left = kept(both, sizes, drop_dummy_run=True)
    assert left.digest() == both.take(np.arange(dummy_run(both), both.num_tokens)).digest()


def test_a_trace_of_nothing_but_its_dummy_run_is_refused() -> None:
    """Where every row is the same nothing is left, and every further choice says so."""
    trace = make_trace(0).take(np.zeros(40, int))
    assert isinstance(narrowed(trace, Subset(drop_dummy_run=True)), Behind)
    for more in ({"sample": 1}, {"requests": ("1",)}, {"split": parse_split("half:0")}):
        with pytest.raises(InputError):
            kept(trace, drop_dummy_run=True, **more)
    with pytest.raises(InputError, match="no tokens are left"):
        list(Sized(Behind(source=trace, rows=40)).blocks())


@given(traces(tokens=25), st.lists(st.integers(0, 9), max_size=3))
def test_sizes_are_those_of_the_last_walk(trace: Trace, sizes: list[int]) -> None:
    """A walk passes every block on and counts tokens and distinct requests; a second walk counts afresh."""
    sized = Sized(cut(trace, sizes))
    assert sized.num_tokens == 0
    for _ in range(2):
        assert concatenate(sized.blocks(), sized.meta).digest() == trace.digest()
        assert (sized.num_tokens, sized.num_requests) == (trace.num_tokens, trace.num_requests)


def test_counts_can_be_split_and_nothing_else() -> None:
    """Counts give their steps to a split; what needs tokens is refused by the option's name."""
    counts = Counts(meta=META, counts=np.arange(16).reshape(4, 1, 4))
    part = narrowed(counts, Subset(split=parse_split("time:0.5"), part="test"))
    assert isinstance(part, Counts)
    assert part.counts.tolist() == counts.counts[2:].tolist()
    for fields, flag in (
        ({"drop_dummy_run": True}, "--drop-dummy-run"),
        ({"requests": ("1",)}, "--requests"),
        ({"without": ("1",)}, "--without-requests"),
        ({"sample": 1}, "--sample"),
        ({"phase": "decode"}, "--phase"),
    ):
        with pytest.raises(InputError, match=f"{flag}.* on counts"):
            narrowed(counts, Subset(**fields))  # type: ignore[arg-type]


def test_all_requests_are_found_once() -> None:
    """Requests are sorted and distinct, however often they come back."""
    trace = make_trace(0, tokens=30, requests=6).replace(request=np.arange(30) * 7 % 11)
    assert all_requests(cut(trace, [3, 3])).tolist() == list(range(11))
