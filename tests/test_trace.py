"""Laws of :mod:`moeplace.trace`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cut, traces

from moeplace.errors import TraceError
from moeplace.trace import Counts, Trace, TraceDigest, TraceMeta, concatenate, first_bad_row

META = TraceMeta(num_experts=4, top_k=2, layer_ids=(0,))


def _one(**changes: Any) -> Trace:
    fields: dict[str, Any] = {"experts": [[[0, 1]]], "request": [0], "position": [0], "phase": [0]}
    return Trace(meta=META, **(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": [[[0, 4]]]}, "expert 4"),
        ({"experts": [[[0, -1]]]}, "expert -1"),
        ({"experts": [[[70000, 1]]]}, "expert 70000"),
        ({"experts": [[[2, 2]]]}, "stands twice"),
        ({"experts": [[[0, 1.5]]]}, "whole"),
        ({"experts": [[[0.0, float("nan")]]]}, "whole"),
        ({"experts": [[["0", "1"]]]}, "whole"),
        ({"experts": [[0, 1]]}, "shape"),
        ({"experts": [[[0, 1, 2]]]}, "shape"),
        ({"request": [0, 1]}, "request has shape"),
        ({"rank": [[0]]}, "rank has shape"),
        ({"phase": [2]}, "phase 2"),
        ({"phase": [-1]}, "phase -1"),
        ({"phase": [256]}, "phase 256"),
        ({"position": [0.5]}, "whole"),
    ],
)
def test_bad_traces_are_refused(changes: dict[str, Any], message: str) -> None:
    """Every broken column is refused with its value; nothing is silently cast, wrapped or truncated."""
    with pytest.raises(TraceError, match=message):
        _one(**changes)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 4, "top_k": 0, "layer_ids": (0,)},
        {"num_experts": 4, "top_k": 5, "layer_ids": (0,)},
        {"num_experts": 4, "top_k": 1, "layer_ids": ()},
        {"num_experts": 4, "top_k": 1, "layer_ids": (1, 1)},
        {"num_experts": 40_000, "top_k": 1, "layer_ids": (0,)},
    ],
)
def test_bad_shapes_are_refused(fields: dict[str, Any]) -> None:
    """top-k lies in 1..experts, layer ids increase strictly, and ids fit a placement's 16 bits."""
    with pytest.raises(TraceError):
        TraceMeta(**fields)


@pytest.mark.parametrize(("experts", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (32_767, np.uint16)])
def test_ids_take_the_smallest_type(experts: int, dtype: type) -> None:
    """Up to 256 experts are one byte an id, more are two, and the largest id survives."""
    meta = TraceMeta(num_experts=experts, top_k=1, layer_ids=(0,))
    trace = Trace(meta=meta, experts=[[[experts - 1]]], request=[2**62], position=[0], phase=[1])
    assert trace.experts.dtype == dtype
    assert int(trace.experts[0, 0, 0]) == experts - 1
    assert int(trace.request[0]) == 2**62


def test_a_trace_keeps_its_own_data() -> None:
    """Changing the arrays a trace was made from does not change the trace, and its arrays cannot be written."""
    ids = np.array([[[0, 1]]])
    trace = _one(experts=ids)
    ids[0, 0, 0] = 3
    assert trace.experts.tolist() == [[[0, 1]]]
    with pytest.raises(ValueError, match="read-only"):
        trace.request[0] = 5


@given(st.integers(0, 10**6))
def test_the_first_bad_row_is_found(seed: int) -> None:
    """The reported place is a bad one, and no id before it in token order is out of range."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5, (6, 2, 2))
    found = first_bad_row(ids, 4)
    bad_ids = ids >= 4
    if not (bad_ids.any() or (ids[..., 0] == ids[..., 1]).any()):
        assert found is None
        return
    assert found is not None
    index = found[0]
    if bad_ids.any():
        assert index == tuple(np.argwhere(bad_ids)[0])
    else:
        assert ids[index[0], index[1], 0] == ids[index[0], index[1], 1]


@given(traces(ranks=True), st.lists(st.integers(0, 7), max_size=6))
def test_cutting_and_joining_restores_a_trace(trace: Trace, sizes: list[int]) -> None:
    """Blocks of any size join to the same tokens, and the running digest does not depend on the cuts."""
    stream = cut(trace, sizes)
    joined = concatenate(stream.blocks(), trace.meta)
    assert joined.digest() == trace.digest()
    assert joined.experts.tolist() == trace.experts.tolist()
    running = TraceDigest()
    for block in stream.blocks():
        running.update(block)
    assert running.hexdigest() == trace.digest()


@given(traces(), st.randoms(use_true_random=False))
def test_take_follows_its_rows(trace: Trace, random: Any) -> None:
    """Rows come in the order asked for, every column with them; a mask keeps recorded order."""
    rows = np.array([random.randrange(trace.num_tokens) for _ in range(5)])
    taken = trace.take(rows)
    assert taken.experts.tolist() == trace.experts[rows].tolist()
    assert taken.position.tolist() == trace.position[rows].tolist()
    mask = trace.phase == 1
    assert trace.take(mask).num_tokens == int(mask.sum())


def test_nothing_joins_to_an_empty_trace() -> None:
    """No blocks make a trace without tokens."""
    empty = concatenate([], META)
    assert (empty.num_tokens, empty.num_requests, empty.experts.shape) == (0, 0, (0, 1, 2))


def test_the_digest_sees_every_column(four_tokens: Trace) -> None:
    """Another expert, request, phase or rank gives another digest."""
    changed = [
        four_tokens.replace(experts=four_tokens.experts[::-1]),
        four_tokens.replace(request=[7, 7, 9, 8]),
        four_tokens.replace(phase=[0, 1, 0, 0]),
        four_tokens.replace(rank=[0, 0, 1, 1]),
    ]
    assert len({trace.digest() for trace in [four_tokens, *changed]}) == 5


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[[1, -1, 0, 0]]], "count -1"),
        ([[[1.0, float("nan"), 0, 0]]], "whole"),
        ([[[0.5, 1, 0, 0]]], "whole"),
        ([[1, 2, 3, 4]], "shape"),
        ([[[1, 2, 3]]], "shape"),
    ],
)
def test_bad_counts_are_refused(counts: Any, message: str) -> None:
    """Counts are whole, not negative and of the model's shape."""
    with pytest.raises(TraceError, match=message):
        Counts(meta=META, counts=counts)


def test_counts_keep_their_steps() -> None:
    """Steps can be taken by mask or number; domains go with them and must be one per step."""
    counts = Counts(meta=META.replace(domains=("a", "b")), counts=[[[1, 1, 0, 0]], [[0, 0, 2, 2]]], domain=[0, 1])
    late = counts.take(np.array([False, True]))
    assert (late.num_steps, late.counts[0, 0].tolist()) == (1, [0, 0, 2, 2])
    assert late.domain is not None
    assert late.domain.tolist() == [1]
    assert counts.digest() != late.digest()
    with pytest.raises(TraceError, match="domain"):
        Counts(meta=counts.meta, counts=counts.counts, domain=[0])
