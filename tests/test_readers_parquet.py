"""Parquet traces: one file per layer, row t of each is token t, and what is wrong with columns and files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import FakeModel, error_of, read_tokens, streamed

from moeplace.errors import Location, MissingExtraError
from moeplace.readers import open_trace

IDS = np.array([[[5, 2], [4, 0]], [[0, 1], [3, 5]], [[1, 3], [2, 4]]])
MISSING = "the extra formats is not installed"


def write(path: Path, ids: Any, *, column: str = "indices", kind: Any = None, **options: Any) -> Path:
    """Write one layer's file as FLAME-MoE has it: scores and ids as lists."""
    arrow = pytest.importorskip("pyarrow", reason=MISSING)
    parquet = pytest.importorskip("pyarrow.parquet", reason=MISSING)
    rows = ids.tolist() if isinstance(ids, np.ndarray) else ids
    scores = arrow.array([[0.5] * 2] * len(rows), arrow.list_(arrow.float32()))
    table = arrow.table({"scores": scores, column: arrow.array(rows, kind or arrow.list_(arrow.int16()))})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the files of layers 2 and 10, in row groups of different sizes."""
    write(tmp_path / "iter_5" / "layer_02.parquet", IDS[:, 0], row_group_size=1)
    write(tmp_path / "iter_5" / "layer_10.parquet", IDS[:, 1], row_group_size=2)
    return tmp_path / "iter_5"


def test_layers_are_put_together(folder: Path) -> None:
    """Row t of every file is token t; layers keep their numbers; what the files do not say is said."""
    trace = streamed(folder)
    assert np.array_equal(trace.experts, IDS)
    assert trace.meta.layer_ids == (2, 10)
    assert trace.meta.num_experts == 6
    assert trace.position.tolist() == [0, 1, 2]
    assert trace.request.tolist() == [0, 0, 0]
    said = " ".join(trace.meta.assumptions)
    for sentence in ("request ids not given", "phase not given", "num_experts not given"):
        assert sentence in said


def test_one_layer_alone(folder: Path, tmp_path: Path) -> None:
    """One file is one layer, numbered by its name; without a number it is layer 0, or the model's first."""
    trace = streamed(folder / "layer_10.parquet")
    assert np.array_equal(trace.experts, IDS[:, 1:])
    assert trace.meta.layer_ids == (10,)
    path = write(tmp_path / "ids.parquet", IDS[:, 0])
    assert read_tokens(path).meta.layer_ids == (0,)
    trace = read_tokens(path, model=FakeModel(moe_layer_ids=(3, 4)))
    assert trace.meta.layer_ids == (3,)
    assert "taken as the model's first MoE layer" in " ".join(trace.meta.assumptions)


def test_fixed_lists_and_other_names(tmp_path: Path) -> None:
    """Fixed-size lists, other integer types and the usual other column names read the same."""
    arrow = pytest.importorskip("pyarrow", reason=MISSING)
    for name, kind in (("topk_ids", arrow.list_(arrow.uint8(), 2)), ("expert_ids", arrow.large_list(arrow.int64()))):
        path = write(tmp_path / "layer_1.parquet", IDS[:, 0], column=name, kind=kind)
        assert np.array_equal(read_tokens(path).experts, IDS[:, :1])


def test_a_layer_in_several_files(tmp_path: Path) -> None:
    """Shards of a layer follow each other in the order of their names."""
    write(tmp_path / "s" / "layer_02-00000-of-00002.parquet", IDS[:1, 0])
    write(tmp_path / "s" / "layer_02-00001-of-00002.parquet", IDS[1:, 0])
    write(tmp_path / "s" / "layer_03.parquet", IDS[:, 1])
    assert np.array_equal(streamed(tmp_path / "s").experts, IDS)


def test_several_checkpoints_are_refused(folder: Path) -> None:
    """A folder of several checkpoints is refused; the hint names one of them."""
    write(folder.parent / "iter_10" / "layer_02.parquet", IDS[:, 0])
    error = error_of(folder.parent)
    assert "layer files in 2 folders: iter_10, iter_5" in error.what
    assert "iter_5" in (error.hint or "")


def test_the_model_must_agree(folder: Path) -> None:
    """Experts, top-k and layers must be the model's."""
    assert read_tokens(folder, model=FakeModel(moe_layer_ids=(2, 5, 10))).meta.num_experts == 8
    assert "model toy has 3 experts per token" in str(error_of(folder, model=FakeModel(top_k=3)))
    assert "layers 2..10" in str(error_of(folder, model=FakeModel(moe_layer_ids=(2, 3))))
    error = error_of(folder, model=FakeModel(num_experts=5, moe_layer_ids=(2, 10)))
    assert error.where == Location(file=str(folder / "layer_10.parquet"), element="indices[1]")


@pytest.mark.parametrize(
    ("rows", "element", "what"),
    [
        ([[5, 2], [1, 1], [0, 3]], "indices[1]", "expert 1 stands twice in the top-k [1, 1]"),
        ([[5, 2], [1, -1], [0, 3]], "indices[1]", "expert -1"),
        ([[5, 2], [1, 0], None], "indices[2]", "null"),
        ([[5, 2], [1, 0], [1, None]], "indices[2]", "null"),
        ([[5, 2], [1, 0], [1]], "indices[2]", "1 ids"),
    ],
)
def test_bad_tokens_are_located(folder: Path, rows: list[Any], element: str, what: str) -> None:
    """Nulls, ids out of range or repeated and lists of other lengths are named by file and row."""
    path = write(folder / "layer_10.parquet", rows)
    error = error_of(folder)
    assert error.what == what
    assert error.where == Location(file=str(path), element=element)


def test_bad_tokens_may_be_skipped(folder: Path) -> None:
    """A token that is bad in one layer is left out of all."""
    write(folder / "layer_10.parquet", [[4, 0], [3, 3], [2, 4]])
    trace = read_tokens(folder, skip_bad=1)
    assert np.array_equal(trace.experts, IDS[[0, 2]])


def test_files_that_do_not_fit_together(folder: Path, tmp_path: Path) -> None:
    """Layers of different lengths or top-k, other columns or types, and files cut off are errors naming the file."""
    arrow = pytest.importorskip("pyarrow", reason=MISSING)
    path = write(folder / "layer_10.parquet", IDS[:2, 1])
    error = error_of(folder)
    assert error.what == "layer 10 has 2 tokens, layer 2 has more"
    assert error.where == Location(file=str(path))
    write(path, [[1], [2], [3]])
    assert "1 ids per token" in error_of(folder).what
    write(path, IDS[:, 1], column="tokens")
    assert "it has the columns scores, tokens" in str(error_of(folder))
    write(path, [1, 2, 3], kind=arrow.int64())
    assert "indices is int64" in error_of(folder).what
    write(path, [[0.5, 1.0]], kind=arrow.list_(arrow.float32()))
    assert "indices is list<" in error_of(folder).what
    path.write_bytes(path.read_bytes()[:-20])
    assert "is not a whole Parquet file" in error_of(folder).what
    write(path, [])
    assert "has 0 tokens" in error_of(folder).what
    assert "holds no routed tokens" in error_of(write(tmp_path / "none.parquet", [])).what
    (tmp_path / "other").mkdir()
    assert "no layer_NN.parquet" in str(error_of(tmp_path / "other", format="parquet"))


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow the error names the command that installs it."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "layer_02.parquet").write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    for path in (tmp_path, tmp_path / "layer_02.parquet"):
        with pytest.raises(MissingExtraError, match=r"pip install 'moeplace\[formats\]'"):
            open_trace(path)


@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 40), sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_row_groups_do_not_matter(
    seed: int, tokens: int, sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However each layer's file is cut into row groups, the tokens are the same, also in blocks that are not kept."""
    from moeplace.files import InputFolder
    from moeplace.readers import ReaderOptions
    from moeplace.readers.parquet import ParquetStream
    from moeplace.trace import concatenate

    rng = np.random.default_rng(seed)
    ids = np.stack([[rng.permutation(300)[:2] for _ in sizes] for _ in range(tokens)])
    folder = tmp_path_factory.mktemp("parquet")
    for layer, size in enumerate(sizes):
        write(folder / f"layer_{layer:02d}.parquet", ids[:, layer], row_group_size=size)
    stream = ParquetStream(InputFolder(folder), ReaderOptions(block_bytes=8, cache_bytes=16))
    for _ in range(2):
        assert np.array_equal(concatenate(stream.blocks(), stream.meta).experts, ids)
