"""Megatron-LM's router traces: passes put together from records, ranks read as a folder, bad records located."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import FakeModel, assert_same, error_of, give_stdin, lines, read_tokens, streamed

from moeplace.errors import Location


def record(step: int, layer: int, ids: Any, rank: int = 0, **fields: Any) -> dict[str, Any]:
    """One record, as the tracer writes it."""
    value = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
    return value | {"num_tokens": len(ids), "topk": len(ids[0]), "top_indices": ids} | fields


PREFILL = [record(0, 1, [[0, 3], [2, 1]]), record(0, 2, [[3, 2], [0, 1]])]
DECODE = [record(1, 1, [[1, 2]]), record(1, 2, [[2, 0]])]


@pytest.fixture
def save(tmp_path: Path):
    """Write records as one rank's file and return the path."""

    def write(*records: Any, name: str = "router_trace_rank0.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lines(*records))
        return path

    return write


def test_passes_are_put_together(save) -> None:
    """The layers of a step are one pass; a pass is a request, its rows are positions; ids keep their order."""
    trace = streamed(save(*PREFILL, *DECODE))
    assert trace.experts.tolist() == [[[0, 3], [3, 2]], [[2, 1], [0, 1]], [[1, 2], [2, 0]]]
    assert trace.meta.layer_ids == (1, 2)
    assert trace.request.tolist() == [0, 0, 1]
    assert trace.position.tolist() == [0, 1, 0]
    assert trace.step is not None
    assert trace.step.tolist() == [0, 0, 1]
    assert trace.rank is not None
    assert trace.rank.tolist() == [0, 0, 0]
    said = " ".join(trace.meta.assumptions)
    assert "request ids not given: each recorded forward pass" in said
    assert "phase not given" in said


def test_older_records_have_no_block(save, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records without stage and block are decoder records; standard input reads the same."""
    old = [{k: v for k, v in row.items() if k not in ("stage", "block")} for row in (*PREFILL, *DECODE)]
    expected = read_tokens(save(*PREFILL, *DECODE))
    assert_same(read_tokens(save(*old, name="old.jsonl")), expected)
    give_stdin(monkeypatch, lines(*old))
    assert_same(read_tokens(Path("-")), expected)


def test_repeated_layers_of_a_step_are_micro_batches(save) -> None:
    """In training a layer fires once per micro-batch: the n-th records of the layers are one pass."""
    trace = streamed(save(PREFILL[0], PREFILL[1], record(0, 1, [[1, 2]]), record(0, 2, [[2, 0]])))
    assert trace.experts.tolist() == [[[0, 3], [3, 2]], [[2, 1], [0, 1]], [[1, 2], [2, 0]]]
    assert trace.request.tolist() == [0, 0, 1]


def test_layers_that_predict_ahead_are_left_out(save) -> None:
    """MTP records share layer numbers with the decoder: they are left out, and it is said."""
    mtp = record(0, 1, [[3, 0]], block="mtp", mtp_idx=0)
    trace = read_tokens(save(*PREFILL, mtp, *DECODE))
    assert_same(trace, read_tokens(save(*PREFILL, *DECODE)))
    assert "MTP layers are left out" in " ".join(trace.meta.assumptions)


def test_a_folder_holds_the_ranks(save, tmp_path: Path) -> None:
    """Ranks are read in the order of their numbers; a pass that two ranks recorded alike is taken once."""
    save(*PREFILL, *DECODE, name="t/router_trace_rank0.jsonl")
    save(*(row | {"rank": 2} for row in PREFILL), name="t/router_trace_rank2.jsonl")
    save(record(0, 1, [[1, 0]], 10), record(0, 2, [[3, 0]], 10), name="t/router_trace_rank10.jsonl")
    (tmp_path / "t" / "hidden_states_rank0.bin").write_bytes(b"\0\1")
    trace = streamed(tmp_path / "t")
    assert trace.rank is not None
    assert trace.rank.tolist() == [0, 0, 0, 10]
    assert trace.request.tolist() == [0, 0, 1, 2]
    assert "recorded alike are taken once" in " ".join(trace.meta.assumptions)


@pytest.mark.parametrize(
    ("row", "value", "what"),
    [
        (record(1, 1, [[1, 2]]) | {"top_indices": [[1, 2], [3, 4, 5]], "num_tokens": 2}, "[3, 4", None),
        (record(1, 1, [[1, "2"]]), '[1, "2"', 'expert id "2"'),
        (record(1, 1, [[1, True]]), "[1, true", "expert id true"),
        (record(1, 1, [[1, -1]]), "[1, -1", "expert -1"),
        (record(1, 1, [[1, 2, 3]]), "[1, 2, 3", "3 experts: [1,2,3]"),
        (record(1, 1, [[1, 2]], num_tokens=3), "[[1, 2]]", "1 tokens, but num_tokens is 3"),
        (record(1, 1, [[1, 2]]) | {"top_indices": None}, "null", "no top_indices"),
        (record(1, 1, [[1, 2]]) | {"layer": "1"}, '"1"', "layer is '1'"),
        (record(-1, 1, [[1, 2]]), "-1", "step is -1"),
        ('{"step": 1, ', None, None),
    ],
)
def test_bad_records_are_located(save, row: Any, value: str | None, what: str | None) -> None:
    """A bad record is named by line and column."""
    path = save(*PREFILL, row)
    error = error_of(path)
    assert isinstance(error.where, Location)
    assert (error.where.file, error.where.line) == (str(path), 3)
    assert what is None or error.what == what
    if value is not None:
        assert error.where.column is not None
        assert path.read_text().splitlines()[2][error.where.column - 1 :].startswith(value)


def test_repeated_and_foreign_ids_are_located(save) -> None:
    """An expert twice in a top-k, or beyond the model's, is named by line and row."""
    path = save(*PREFILL, DECODE[0], record(1, 2, [[2, 2]]))
    error = error_of(path)
    assert error.where == Location(file=str(path), line=4, element="top_indices[0]")
    assert "stands twice" in error.what
    error = error_of(save(*PREFILL), model=FakeModel(num_experts=3))
    assert isinstance(error.where, Location)
    assert (error.what, error.where.line) == ("expert 3", 1)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (DECODE[:1], "step 1 of rank 0 has the layers [1]"),
        ([*DECODE, record(1, 3, [[0, 1]])], "step 1 of rank 0 has the layers [1, 2, 3]"),
        ([*DECODE, DECODE[0]], "step 1 of rank 0 has 1 to 2 records per layer"),
        ([DECODE[0], record(1, 2, [[2, 0], [1, 0]])], "step 1 of rank 0: layers have 1 to 2 tokens"),
    ],
)
def test_incomplete_passes_are_located(save, rows: list[Any], what: str) -> None:
    """A pass that lacks layers, micro-batches or tokens is named by its first line, and may be skipped."""
    path = save(*PREFILL, *rows)
    error = error_of(path)
    assert error.what == what
    assert error.where == Location(file=str(path), line=3, column=1)
    trace = read_tokens(path, skip_bad=1)
    assert trace.num_tokens == 2
    assert "1 bad row skipped" in " ".join(trace.meta.assumptions)


def test_a_bad_record_costs_its_step(save) -> None:
    """Skipping a bad record leaves its step out and counts once."""
    trace = read_tokens(
        save(*PREFILL, DECODE[0], record(1, 2, [[2, -1]]), record(2, 1, [[0, 1]]), record(2, 2, [[0, 1]])), skip_bad=1
    )
    assert trace.step is not None
    assert trace.step.tolist() == [0, 0, 2]


def test_folders_and_files_without_decoder_records(save, tmp_path: Path) -> None:
    """A trace of MTP records alone, or of nothing, holds no tokens; a folder needs files of ranks."""
    assert "holds no routed tokens" in str(error_of(save(record(0, 1, [[1, 2]], block="mtp"))))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert "no trace of a rank" in str(error_of(tmp_path / "empty", format="megatron-router"))


@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_any_passes_read_back(seed: int, sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the passes, the ids read back in order, also in small blocks that are not kept."""
    from moeplace.files import open_input
    from moeplace.readers import ReaderOptions
    from moeplace.readers.megatron_router import RouterStream
    from moeplace.trace import concatenate

    rng = np.random.default_rng(seed)
    passes = [np.stack([[rng.permutation(300)[:3] for _ in (0, 4)] for _ in range(size)]) for size in sizes]
    rows = [record(i, layer, ids[:, j].tolist()) for i, ids in enumerate(passes) for j, layer in enumerate((0, 4))]
    path = tmp_path_factory.mktemp("megatron") / "trace.jsonl"
    path.write_bytes(lines(*rows))
    stream = RouterStream(open_input(path), ReaderOptions(block_bytes=8, cache_bytes=16))
    for _ in range(2):
        trace = concatenate(stream.blocks(), stream.meta)
        assert np.array_equal(trace.experts, np.concatenate(passes))
        assert trace.request.tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()
