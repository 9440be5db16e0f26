"""Laws of :mod:`moeplace.fingerprint`: a digest tells what tokens a trace holds, and nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import cut, make_trace
from trace_cases import traces

from moeplace.fingerprint import SMALL_COLUMNS, TraceDigest, hashed, token_hashes
from moeplace.trace import Trace


def digest_of(*blocks: Trace) -> str:
    """Digest of blocks, each hashed by itself and then merged."""
    total = TraceDigest()
    for block in blocks:
        part = TraceDigest()
        part.update(block)
        total.merge(part)
    return total.hexdigest()


@given(traces(), st.lists(st.integers(0, 9), max_size=4), st.integers(0, 99))
def test_a_digest_is_that_of_the_tokens(trace: Trace, sizes: list[int], seed: int) -> None:
    """Neither cutting, shuffling nor merging parts in another order changes a digest."""
    shuffled = trace.take(np.random.default_rng(seed).permutation(trace.num_tokens))
    assert digest_of(*cut(shuffled, sizes).blocks()) == trace.digest()


@given(traces(), st.integers(0, 10**6))
def test_one_other_value_is_another_digest(trace: Trace, seed: int) -> None:
    """Changing any value of any token, dropping a token or a column, or repeating a token changes the digest."""
    rng = np.random.default_rng(seed)
    row = rng.integers(trace.num_tokens)
    known = trace.digest()
    for name in SMALL_COLUMNS:
        column = getattr(trace, name)
        if column is not None:
            other = column.copy()
            other[row] = 1 - other[row] if name == "phase" else other[row] ^ 1
            assert trace.replace(**{name: other}).digest() != known, name
            if name in ("step", "rank", "domain"):
                assert trace.replace(**{name: None}).digest() != known, name
    rows = np.arange(trace.num_tokens)
    assert trace.take(np.append(rows, row)).digest() != known
    assert trace.take(rows != row).digest() != known
    if trace.meta.num_experts > trace.meta.top_k:
        experts = trace.experts.copy()
        layer, k = rng.integers(trace.meta.num_layers), rng.integers(trace.meta.top_k)
        unused = np.setdiff1d(np.arange(trace.meta.num_experts), experts[row, layer])
        experts[row, layer, k] = rng.choice(unused)
        assert trace.replace(experts=experts).digest() != known


def test_the_type_of_ids_does_not_matter() -> None:
    """Ids below 256 hash alike in 8 and 16 bits; swapping two ids, two layers or two columns does not."""
    trace = make_trace(0, tokens=20, layers=3, experts=7, top_k=2)
    wide = trace.replace(meta=trace.meta.replace(num_experts=300))
    assert wide.experts.dtype == np.uint16
    assert np.array_equal(token_hashes(wide), token_hashes(trace))
    for other in (
        trace.replace(experts=trace.experts[:, :, ::-1]),
        trace.replace(experts=trace.experts[:, ::-1]),
        trace.replace(request=trace.position, position=trace.request),
    ):
        assert not (token_hashes(other) == token_hashes(trace)).all()


def test_hashes_are_spread() -> None:
    """Every bit of the hashes of consecutive numbers is set about half of the time, and seeds are unrelated."""
    for seed in (0, 1, -3):
        bits = np.unpackbits(hashed(np.arange(10_000), seed).view(np.uint8).reshape(-1, 8), axis=1)
        assert (np.abs(bits.mean(axis=0) - 0.5) < 0.03).all()
    assert not (hashed(np.arange(100), 0) == hashed(np.arange(100), 1)).any()
