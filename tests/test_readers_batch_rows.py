"""Lines of one batch and layer: any order of lines is one trace, and a bad line is named."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import FakeModel, assert_same, error_of, lines, read_tokens, streamed

from moeplace.files import open_input
from moeplace.readers import ReaderOptions
from moeplace.readers.batch_rows import BatchStream, sniff
from moeplace.trace import concatenate

IDS = {(12, 3): [[3, 1], [0, 2]], (12, 5): [[4, 0], [1, 3]], (13, 3): [[2, 1]], (13, 5): [[0, 4]]}


def row(layer: Any, batch: Any, ids: Any = None, **fields: Any) -> dict[str, Any]:
    """One line."""
    return {"layer": layer, "batch_id": batch, "topk_experts": IDS[batch, layer] if ids is None else ids} | fields


ROWS = [row(3, 12), row(3, 13), row(5, 12), row(5, 13)]


@pytest.fixture
def save(tmp_path: Path):
    """Write lines and return the path."""

    def write(*rows: Any) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_bytes(lines(*rows))
        return path

    return write


def test_a_tiny_trace_by_hand(save) -> None:
    """Layers of a batch are joined; a batch is a step and, without request ids, a request; rows are ranks."""
    rows = [
        row | {"origin_rows": [7, 9][: len(row["topk_experts"])], "topk_weights": [], "source_file": "untrue.npz"}
        for row in ROWS
    ]
    trace = streamed(save(*rows))
    assert trace.experts.tolist() == [[[3, 1], [4, 0]], [[0, 2], [1, 3]], [[2, 1], [0, 4]]]
    assert (trace.meta.layer_ids, trace.meta.top_k, trace.meta.num_experts) == ((3, 5), 2, 5)
    assert trace.request.tolist() == [12, 12, 13]
    assert trace.position.tolist() == [0, 1, 0]
    assert trace.step is not None
    assert trace.step.tolist() == [12, 12, 13]
    assert trace.rank is not None
    assert trace.rank.tolist() == [7, 9, 7]
    said = " ".join(trace.meta.assumptions)
    for part in ("each batch is taken as one request", "phase not given", "num_experts not given: 5"):
        assert part in said


def test_request_ids(save) -> None:
    """Requests go on over batches; a batch that is a request is no step; names are kept."""
    rows = [row | {"request_id": "r"} for row in ROWS]
    trace = streamed(save(*rows))
    assert trace.position.tolist() == [0, 1, 2]
    assert trace.meta.request_names == ("r",)
    assert trace.step is not None
    rows = [row | {"request_id": row["batch_id"]} for row in ROWS]
    trace = read_tokens(save(*rows))
    assert trace.request.tolist() == [12, 12, 13]
    assert trace.step is None


def test_dense_layers_and_the_model(save) -> None:
    """Layers that are 0 for every token are left out; the model says the experts and must have the layers."""
    dense = [row(0, 12, [[0, 0], [0, 0]]), row(0, 13, [[0, 0]])]
    model = FakeModel(num_experts=8, moe_layer_ids=(3, 4, 5))
    trace = read_tokens(save(*dense, *ROWS), model=model)
    assert trace.meta.layer_ids == (3, 5)
    assert trace.meta.num_experts == 8
    assert "layers 0 are 0 for every token" in " ".join(trace.meta.assumptions)
    assert "are 7..8" in str(error_of(save(*ROWS), model=FakeModel(moe_layer_ids=(7, 8))))


@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    num_experts=st.sampled_from([3, 300]),
    block_bytes=st.sampled_from([1, 1 << 20]),
    cache_bytes=st.sampled_from([0, 1 << 20]),
)
def test_the_order_of_lines_does_not_matter(
    seed: int, sizes: list[int], num_experts: int, block_bytes: int, cache_bytes: int
) -> None:
    """Shuffled lines give the same tokens, batch by batch, in any block and cache size, on every walk."""
    rng = np.random.default_rng(seed)
    layers = sorted(rng.choice(60, 3, replace=False).tolist())
    ids = [[[(1 + rng.permutation(num_experts - 1)[:2]).tolist() for _ in layers] for _ in range(n)] for n in sizes]
    rows = [
        row(layer, batch, [token[i] for token in tokens])
        for batch, tokens in enumerate(ids)
        for i, layer in enumerate(layers)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.jsonl"
        path.write_bytes(lines(*(rows[i] for i in rng.permutation(len(rows)))))
        stream = BatchStream(open_input(path), ReaderOptions(block_bytes=block_bytes, cache_bytes=cache_bytes))
        first, second = (concatenate(list(stream.blocks()), stream.meta) for _ in range(2))
    assert_same(first, second)
    for batch, tokens in enumerate(ids):
        assert first.take(first.request == batch).experts.tolist() == tokens


@pytest.mark.parametrize(
    ("bad", "where", "what"),
    [
        ("{", ":5:", "not JSON"),
        ([1], ":5", "a JSON list"),
        (row("3", 14, [[1, 2]]), ":5", "layer '3'"),
        (row(3, None, [[1, 2]]), ":5", "batch_id or request_id of another type"),
        (row(3, 14, [[1, 2]], request_id=1.5), ":5", "batch_id or request_id of another type"),
        (row(3, 14, []), ":5", "no topk_experts"),
        (row(3, 14, [[1, 2], [1]]), ":5: topk_experts[1]", "1 experts: [1]"),
        (row(3, 14, [[1, 2], [1, -1]]), ":5: topk_experts[1]", "expert -1"),
        (row(3, 14, [[1, 2], [1, True]]), ":5: topk_experts[1]", "expert id true"),
        (row(3, 14, [[1, 2, 3]]), ":5: topk_experts[0]", "3 experts"),
        (row(3, 14, [[1, 2]], origin_rows=[1, 2]), ":5: origin_rows", "2 values"),
        (row(3, 14, [[1, 2]]), ":5", "batch 14, which starts here, lacks 1 layers: 5"),
        (row(3, 12, [[1, 2]]), ":5", "batch 12, layer 3 stands twice"),
    ],
)
def test_every_bad_line_is_named(save, bad: Any, where: str, what: str) -> None:
    """A line that breaks the format is an error with its number, and can be skipped."""
    path = save(*ROWS, bad)
    error = error_of(path)
    assert str(error).split("(rule")[0].startswith(f"{path}{where}")
    assert what in error.what
    trace = read_tokens(path, skip_bad=1)
    assert trace.num_tokens == 3
    assert "1 bad row skipped" in trace.meta.assumptions[-1]


def test_bad_tokens_are_named_by_line(save) -> None:
    """A token with an expert twice is named by its line and index, and only it is skipped."""
    path = save(*ROWS[:2], row(5, 12, [[4, 0], [3, 3]]), ROWS[3])
    error = error_of(path)
    assert str(error.where) == f"{path}:3: topk_experts[1]"
    assert read_tokens(path, skip_bad=1).num_tokens == 2


def test_batches_whose_layers_disagree(save) -> None:
    """Layers of a batch with different tokens are refused with both lines; so are fields that come and go."""
    error = error_of(save(*ROWS[:3], row(5, 13, [[1, 2], [3, 4]])))
    assert "2 tokens, but line 2 has 1 of batch 13" in str(error)
    rows = [ROWS[0] | {"origin_rows": [1, 2]}, ROWS[2], ROWS[1], ROWS[3]]
    assert "no origin_rows" in str(error_of(save(*rows)))
    rows = [ROWS[0], ROWS[2], ROWS[1] | {"batch_id": "x"}, ROWS[3] | {"batch_id": "x"}]
    assert "batch_id 'x'" in str(error_of(save(*rows)))


def test_what_is_taken_for_batches(save) -> None:
    """Lines of tokens have no batch_id; a first line cut off by the head is known by its fields."""
    assert sniff(lines(*ROWS), "x") == 97
    assert sniff(b'{"layer": 0, "batch_id": 12, "origin_rows": [0, 0', "x") == 97
    assert sniff(b'{"layer": 0, "token_idx": 1, "topk_experts": [0]}', "x") == 0
    assert "holds no routed tokens" in str(error_of(save(row(3, 1, [[0, 0]]))))
