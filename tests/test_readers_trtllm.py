"""TensorRT-LLM expert statistics: ranks summed, iterations as steps, absolute layers, and what is wrong with files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import FakeModel, counts_of, error_of

from moeplace.errors import Location, MissingExtraError
from moeplace.readers import open_trace
from moeplace.readers.trtllm_statistics import sniff

META = {"num_experts": 3, "num_experts_per_token": 2}
RANK0 = {"100_3": [2, 1, 1], "100_10": [0, 4, 0], "101_3": [1, 1, 0], "101_10": [2, 0, 0]}
RANK1 = {"100_3": [0, 0, 2], "100_10": [1, 1, 0], "101_3": [4, 0, 0], "101_10": [0, 2, 2]}


def header_of(*names: str) -> bytes:
    """Return the beginning of a safetensors file with these arrays."""
    header = json.dumps({name: {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]} for name in names}).replace(
        " ", ""
    )
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.fixture
def save(tmp_path: Path):
    """Write a folder of statistics and return its path."""
    numpy = pytest.importorskip("safetensors.numpy", reason="the extra formats is not installed")

    def write(*ranks: dict[str, Any], meta: Any = META, names: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / "statistics"
        folder.mkdir(exist_ok=True)
        for i, arrays in enumerate(ranks):
            name = names[i] if names else f"rank{i}.safetensors"
            numpy.save_file({key: np.array(value) for key, value in arrays.items()}, folder / name)
        if meta is not None:
            (folder / "meta_info.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
        return folder

    return write


def test_ranks_are_summed(save) -> None:
    """Counts are the sum over ranks; iterations are steps in order; layers keep their absolute numbers."""
    counts = counts_of(save(RANK0, RANK1))
    assert counts.counts.tolist() == [[[2, 1, 3], [1, 5, 0]], [[5, 1, 0], [2, 2, 2]]]
    assert counts.meta.layer_ids == (3, 10)
    assert (counts.meta.num_experts, counts.meta.top_k) == (3, 2)
    assert counts.meta.assumptions == ()


def test_one_rank_alone(save) -> None:
    """One rank's file is read with the top-k of the meta file beside it, and what it lacks is said."""
    counts = counts_of(save(RANK0, RANK1) / "rank1.safetensors")
    assert counts.counts.tolist() == [[[0, 0, 2], [1, 1, 0]], [[4, 0, 0], [0, 2, 2]]]
    assert counts.meta.top_k == 2
    assert "one rank's file" in " ".join(counts.meta.assumptions)


def test_other_files_of_the_folder_are_ignored(save) -> None:
    """Raw routing dumps and other files beside the ranks are not read."""
    folder = save(RANK0, RANK1, {"x": [1.5]}, names=("rank0.safetensors", "rank1.safetensors", "rank0_raw.safetensors"))
    assert counts_of(folder).counts.sum() == sum(map(sum, [*RANK0.values(), *RANK1.values()]))


def test_missing_ranks_and_iterations_are_said(save) -> None:
    """Gaps in the ranks, iterations cut off before their last layer, and layers a rank lacks are assumptions."""
    cut = RANK0 | {"102_3": [1, 1, 0]}
    folder = save(cut, {"100_3": [0, 0, 2]}, names=("rank0.safetensors", "rank2.safetensors"))
    counts = counts_of(folder)
    assert counts.num_steps == 2
    said = " ".join(counts.meta.assumptions)
    assert "no files of ranks 1" in said
    assert "iterations 102 lack layers" in said
    assert "rank2.safetensors lacks layers or iterations" in said


def test_without_the_meta_file(save) -> None:
    """Without meta_info.json the arrays say how many experts there are, and the model how many a token chooses."""
    counts = counts_of(save(RANK0, meta=None))
    assert (counts.meta.num_experts, counts.meta.top_k) == (3, 1)
    assert "no meta_info.json" in " ".join(counts.meta.assumptions)
    assert counts_of(save(RANK0, meta=None), model=FakeModel("m", 3, 2, (3, 10))).meta.top_k == 2


def test_the_model_must_agree(save) -> None:
    """Experts, top-k and layers must be the model's."""
    assert "num_experts is 3, but model toy has 8" in str(error_of(save(RANK0), model=FakeModel()))
    assert "top_k is 2, but model m has 4" in str(error_of(save(RANK0), model=FakeModel("m", 3, 4, (3, 10))))
    assert "layers 3..10" in str(error_of(save(RANK0), model=FakeModel("m", 3, 2, (0, 1))))


@pytest.mark.parametrize(
    ("arrays", "element", "what"),
    [
        ({"100_3": [1, 2, 3], "layer_3": [1, 2, 3]}, "layer_3", "array 'layer_3'"),
        ({"100_3": [1, 2, 3], "100_None": [1, 2, 3]}, "100_None", "array '100_None'"),
        ({"100_3": [1, 2]}, "100_3", "2 counts"),
        ({"100_3": [1, -2, 3]}, "100_3[1]", "count -2"),
        ({"100_3": [[1, 2, 3]]}, "100_3", "shape [1, 3] of int64"),
        ({"100_3": [1.0, 2.0, 3.0]}, "100_3", "shape [3] of float64"),
        ({}, None, "holds no arrays"),
    ],
)
def test_wrong_arrays_are_located(save, arrays: dict[str, Any], element: str | None, what: str) -> None:
    """Arrays that are not one count per expert of an iteration and layer are named by file and element."""
    folder = save(RANK0, arrays)
    error = error_of(folder)
    assert error.what == what
    assert error.where == Location(file=str(folder / "rank1.safetensors"), element=element)


def test_broken_files_are_located(save, tmp_path: Path) -> None:
    """A cut rank file, a wrong meta file, and a recording without one whole iteration are errors that name the file."""
    folder = save(RANK0, meta={"num_experts": 0, "num_experts_per_token": 2})
    assert error_of(folder).where == Location(file=str(folder / "meta_info.json"))
    folder = save(RANK0, meta='{"num_experts": 3,')
    assert "not JSON" in str(error_of(folder))
    folder = save({"100_3": [1, 2, 3], "101_4": [1, 2, 3]})
    assert "no iteration has all layers" in str(error_of(folder))
    save(RANK0)
    data = (folder / "rank0.safetensors").read_bytes()
    (folder / "rank0.safetensors").write_bytes(data[:-5])
    assert "is not a whole safetensors file" in str(error_of(folder))
    (tmp_path / "none").mkdir()
    assert "no rank*.safetensors" in str(error_of(tmp_path / "none", format="trtllm-statistics"))


def test_what_is_sniffed() -> None:
    """Arrays named by iteration and layer are statistics; other safetensors files are not."""
    assert sniff(header_of("100_3", "100_4"), "rank0.safetensors") == 90
    assert sniff(header_of("weight"), "rank0.safetensors") == 0
    assert sniff(b'{"100_3":{}}', "x") == 0


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package safetensors the error names the command that installs it."""
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    path = tmp_path / "rank0.safetensors"
    path.write_bytes(header_of("100_3") + bytes(24))
    with pytest.raises(MissingExtraError, match=r"pip install 'moeplace\[formats\]'"):
        open_trace(path)


@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 4))
def test_the_split_over_ranks_does_not_matter(seed: int, ranks: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """However the counts are split over ranks, the sum is the same."""
    numpy = pytest.importorskip("safetensors.numpy", reason="the extra formats is not installed")
    rng = np.random.default_rng(seed)
    parts = rng.integers(0, 9, (ranks, 2, 3, 5)) + (np.arange(5) == 0)
    folder = tmp_path_factory.mktemp("trtllm")
    for rank, part in enumerate(parts):
        cells = {f"{i + 7}_{layer}": np.ascontiguousarray(part[i, layer]) for i in range(2) for layer in range(3)}
        numpy.save_file(cells, folder / f"rank{rank}.safetensors")
    assert np.array_equal(counts_of(folder).counts, parts.sum(axis=0))
