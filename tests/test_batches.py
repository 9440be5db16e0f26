"""Laws of :mod:`moeplace.batches`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cut, make_trace, traces

from moeplace.batches import BatchLaw, TokenIndex, default_law, draw, gather
from moeplace.errors import InputError
from moeplace.trace import PHASES, Trace, TraceMeta

DECODE_LAW = BatchLaw(phase="decode", requests=2)


def lengths(trace: Trace, phase: str) -> dict[int, int]:
    """Count tokens of one phase per request, in plain Python."""
    found: dict[int, int] = {}
    for request, number in zip(trace.request.tolist(), trace.phase.tolist(), strict=True):
        if number == PHASES.index(phase):
            found[request] = found.get(request, 0) + 1
    return found


@given(traces(tokens=30), st.sampled_from(PHASES), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_steps_follow_the_law(trace: Trace, phase: str, requests: int, tokens: int, seed: int) -> None:
    """A step holds distinct requests long enough, each with consecutive tokens of the phase in order of position."""
    shuffled = trace.take(np.random.default_rng(seed).permutation(trace.num_tokens))
    index = TokenIndex.of(cut(shuffled, [0, 7, 9]))
    law = BatchLaw(phase=phase, requests=requests, tokens=tokens, batches=6, seed=seed)
    long_enough = {name for name, count in lengths(shuffled, phase).items() if count >= tokens}
    if len(long_enough) < requests:
        have = f"only {len(long_enough)} requests have" if long_enough else "no request has"
        with pytest.raises(InputError, match=f"{have} {tokens}") as caught:
            draw(index, law)
        assert caught.value.hint is not None
        assert ("--batch-requests" if long_enough else "--batch-tokens") in caught.value.hint
        return
    picked = draw(index, law)
    assert picked.shape == (6, law.step_tokens)
    assert np.array_equal(picked, draw(index, law))
    assert law.turns().tolist() == [turn for turn in range(requests) for _ in range(tokens)]
    for batch in picked.reshape(6, requests, tokens):
        owners = shuffled.request[batch]
        assert (owners == owners[:, :1]).all()
        assert len(set(owners[:, 0].tolist())) == requests
        assert set(owners[:, 0].tolist()) <= long_enough
        assert (shuffled.phase[batch] == PHASES.index(phase)).all()
        assert (np.diff(shuffled.position[batch], axis=1) == 1).all()


def test_steps_are_uniform() -> None:
    """Every eligible request is as likely as any other, and so is every start in it."""
    trace = make_trace(0, tokens=60, requests=5, prompt=0)
    index = TokenIndex.of(trace)
    known = index.by_request("decode")
    rows, first, length = known.rows, known.first, known.length
    picked = draw(index, BatchLaw(phase="decode", requests=2, tokens=3, batches=6000))
    starts = picked[:, ::3].ravel()
    owners, counts = np.unique(trace.request[starts], return_counts=True)
    assert len(owners) == int((length >= 3).sum())
    expected = 2 * 6000 / len(owners)
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)
    for begin, size in zip(first, length, strict=True):
        seen = np.isin(starts, rows[begin : begin + size - 2])
        _, per_start = np.unique(starts[seen], return_counts=True)
        assert len(per_start) == size - 2
        assert np.abs(per_start - per_start.mean()).max() < 6 * np.sqrt(per_start.mean())


def test_seeds_differ_and_more_batches_extend() -> None:
    """Another seed draws other steps; asking for more steps keeps the first ones."""
    index = TokenIndex.of(make_trace(1, tokens=200, requests=20))
    few = draw(index, DECODE_LAW.replace(batches=5))
    many = draw(index, DECODE_LAW.replace(batches=9))
    assert np.array_equal(many[:5], few)
    assert not np.array_equal(few, draw(index, DECODE_LAW.replace(batches=5, seed=1)))


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 3))
def test_mixed_steps_hold_both_phases(seed: int, requests: int, chunks: int) -> None:
    """A mixed step decodes some requests and takes chunks of others' prompts, in the order of its turns."""
    trace = make_trace(seed, tokens=300, requests=12, prompt=6)
    index = TokenIndex.of(trace)
    law = BatchLaw(phase="mixed", requests=requests, prefill_requests=chunks, prefill_tokens=3, batches=4, seed=seed)
    picked = draw(index, law)
    assert picked.shape == (4, requests + 3 * chunks) == (4, law.step_tokens)
    for batch in picked:
        owners, turns = trace.request[batch], law.turns()
        assert trace.phase[batch].tolist() == [1] * requests + [0] * 3 * chunks
        assert (
            len({*zip(owners.tolist(), turns.tolist(), strict=True)}) == requests + chunks == len(set(owners.tolist()))
        )
        chunk = trace.position[batch][requests:].reshape(chunks, 3)
        assert (np.diff(chunk, axis=1) == 1).all()


@given(st.integers(0, 99), st.integers(1, 6))
def test_consecutive_arrivals_are_neighbours(seed: int, requests: int) -> None:
    """With consecutive arrival a step's requests follow each other as they first appear, around the end if need be."""
    trace = make_trace(seed, tokens=120, requests=9, prompt=0)
    order = np.random.default_rng(seed).permutation(np.unique(trace.request))
    shuffled = trace.take(np.concatenate([np.flatnonzero(trace.request == name) for name in order]))
    law = BatchLaw(phase="decode", requests=min(requests, len(order)), batches=20, arrival="consecutive", seed=seed)
    for batch in draw(TokenIndex.of(shuffled), law):
        place = [order.tolist().index(name) for name in shuffled.request[batch].tolist()]
        assert place == [(place[0] + i) % len(order) for i in range(len(place))]


@given(traces(), st.lists(st.integers(0, 9), max_size=4), st.integers(0, 9))
def test_gather_reads_exactly_what_is_named(trace: Trace, sizes: list[int], seed: int) -> None:
    """The gathered trace holds each named token once, and every number points at its token."""
    named = np.random.default_rng(seed).integers(0, trace.num_tokens, (3, 2))
    found, where = gather(cut(trace, sizes), named)
    assert found.num_tokens == len(np.unique(named))
    assert np.array_equal(found.experts[where], trace.experts[named])


def test_default_laws(small_trace: Trace) -> None:
    """Defaults are 256 × 1 for decode and 64 × 128 for prefill, lowered to what the trace has."""
    index = TokenIndex.of(small_trace)
    decode = default_law(index, "decode")
    assert (decode.requests, decode.tokens, decode.batches, decode.seed) == (
        len(lengths(small_trace, "decode")),
        1,
        300,
        0,
    )
    prefill = default_law(index, "prefill")
    assert (prefill.requests, prefill.tokens) == (8, 2)
    assert default_law(index, "prefill", requests=99, tokens=7).step_tokens == 99 * 7
    large = TokenIndex.of(make_trace(0, tokens=80_000, layers=1, experts=1, top_k=1, requests=400, prompt=150))
    assert (default_law(large, "decode").requests, default_law(large, "decode").tokens) == (256, 1)
    assert (default_law(large, "prefill").requests, default_law(large, "prefill").tokens) == (64, 128)
    assert index.phases() == ["decode", "prefill"]
    mixed = default_law(index, "mixed")
    assert draw(index, mixed).shape == (300, mixed.step_tokens)
    assert (mixed.requests + mixed.prefill_requests, mixed.prefill_tokens) == (decode.requests, prefill.tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"requests": 0},
        {"tokens": 0},
        {"batches": -1},
        {"phase": "training"},
        {"arrival": "rush"},
        {"prefill_requests": 1},
        {"phase": "mixed"},
    ],
)
def test_bad_laws_are_refused(changes: dict[str, object]) -> None:
    """Every number of a law is at least 1, its phase known."""
    with pytest.raises(InputError):
        DECODE_LAW.replace(**changes)


def test_nothing_to_draw_from(small_trace: Trace) -> None:
    """A stream without tokens, or without tokens of the phase, is an error, not an empty answer."""
    with pytest.raises(InputError, match="no tokens"):
        TokenIndex.of(small_trace.take(np.zeros(60, bool)))
    only_prefill = TokenIndex.of(small_trace.take(small_trace.phase == 0))
    assert only_prefill.phases() == ["prefill"]
    with pytest.raises(InputError, match="no decode tokens"):
        default_law(only_prefill, "decode")
    with pytest.raises(InputError, match="no request has"):
        draw(only_prefill, DECODE_LAW)


def test_one_request_one_token() -> None:
    """The smallest trace gives steps of its one token."""
    meta = TraceMeta(num_experts=1, top_k=1, layer_ids=(0,))
    trace = Trace(meta=meta, experts=[[[0]]], request=[5], position=[0], phase=[1])
    law = default_law(TokenIndex.of(trace), "decode")
    assert draw(TokenIndex.of(trace), law.replace(batches=2)).tolist() == [[0], [0]]
