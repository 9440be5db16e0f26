"""Weight matrices in .pt and .safetensors: plain tensors only, never code, and a conversion where torch is missing."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_cases import FakeModel, counts_of, error_of

from moeplace.errors import Location, MissingExtraError, TraceError
from moeplace.readers import open_trace, read_trace

STEPS = [[[4, 0, 2], [3, 3, 0]], [[1, 1, 0], [2, 0, 0]]]
NO_TORCH = "the extra torch is not installed"


@pytest.fixture
def save(tmp_path: Path):
    """Write a value with ``torch.save``, lists of numbers as tensors, and return the path."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)

    def tensors(value: Any, dtype: str) -> Any:
        if isinstance(value, dict):
            return {key: tensors(item, dtype) for key, item in value.items()}
        return torch.tensor(value, dtype=getattr(torch, dtype)) if isinstance(value, list) else value

    def write(value: Any, dtype: str = "int64", **options: Any) -> Path:
        path = tmp_path / "weights.pt"
        torch.save(tensors(value, dtype), path, **options)
        return path

    return write


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "value",
    [
        STEPS,
        {"weight": STEPS},
        {"logical_count": STEPS, "note": "recorded on Monday"},
        {"anything": STEPS},
    ],
)
def test_every_form_reads_the_same(save, value: Any, dtype: str) -> None:
    """A tensor alone, or in a dict under a usual name or as its only entry, of any number type: the same counts."""
    counts = counts_of(save(value, dtype))
    assert counts.counts.tolist() == STEPS
    assert counts.meta.layer_ids == (0, 1)


def test_one_matrix_and_older_files(save) -> None:
    """[layer, expert] is one step; files of torch before 1.6 are read too; a model numbers the layers."""
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        path = save(STEPS[0], **options)
        assert counts_of(path).counts.tolist() == [STEPS[0]]
        assert counts_of(path, model=FakeModel("m", 3, 2, (3, 4))).meta.layer_ids == (3, 4)


def test_lists_of_tensors_are_stacked(tmp_path: Path) -> None:
    """A list with one tensor per layer is a matrix."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    torch.save([torch.tensor(row) for row in STEPS[0]], tmp_path / "rows.pt")
    assert counts_of(tmp_path / "rows.pt").counts.tolist() == [STEPS[0]]
    torch.save([torch.tensor([1, 2]), torch.tensor([1])], tmp_path / "ragged.pt")
    assert "a list" in error_of(tmp_path / "ragged.pt").what


@pytest.mark.parametrize(
    ("value", "dtype", "element", "what"),
    [
        ([[1.5, 2.0]], "float32", "weight[0, 0]", "count 1.5"),
        ([[1.0, float("nan")]], "float32", "weight[0, 1]", "count NaN"),
        ([[1, -2]], "int64", "weight[0, 1]", "count -2"),
        ([1, 2, 3], "int64", "weight", "shape [3]"),
        ({"weight": [[[[1]]]]}, "int64", "weight", "shape [1, 1, 1, 1]"),
        ({"weight": "none"}, "int64", "weight", "a str"),
        ({"phy2log": [[0, 1, 2, 0]]}, "int64", "phy2log", "holds a placement, not weights"),
        ({"a": [[1]], "b": [[1]]}, "int64", None, "2 entries and no logical_count"),
        ({"weight": [[0, 0]]}, "int64", "weight", "all counts are 0"),
    ],
)
def test_wrong_weights_are_located(save, value: Any, dtype: str, element: str | None, what: str) -> None:
    """Weights that are no counts, other shapes and other contents are named by element."""
    path = save(value, dtype)
    error = error_of(path, format="weight-matrix-pt")
    assert error.what == what
    assert error.where == Location(file=str(path), element=element)


class Payload:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Write a file when unpickled."""
        return (open, (str(self.path), "w"))

    def __init__(self, path: Path) -> None:
        self.path = path


def test_code_never_runs(tmp_path: Path) -> None:
    """A file whose objects would run code is refused, in the zip form and as a plain pickle, and nothing runs."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    ran = tmp_path / "ran"
    torch.save({"weight": Payload(ran)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(ran), protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(TraceError):
            read_trace(tmp_path / name, format="weight-matrix-pt")
    assert not ran.exists()
    assert "weights_only=True" in str(error_of(tmp_path / "zip.pt", format="weight-matrix-pt"))


def test_a_cut_file_is_an_error(save) -> None:
    """A file that was cut off is no whole PyTorch file."""
    path = save(STEPS)
    path.write_bytes(path.read_bytes()[:-100])
    assert "is not a whole PyTorch file" in str(error_of(path, format="weight-matrix-pt"))


def test_without_torch_the_error_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch: the pip command, and three lines that convert the file where torch is installed."""
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps([1], protocol=2))
    with pytest.raises(MissingExtraError) as caught:
        open_trace(path, format="weight-matrix-pt")
    hint = caught.value.hint or ""
    assert "pip install 'moeplace[torch]'" in hint
    assert len(hint.splitlines()) == 4
    assert "weights_only=True" in hint


def test_the_conversion_works(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three lines write JSON that reads as the same counts."""
    path = save({"logical_count": STEPS})
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        with pytest.raises(MissingExtraError) as caught:
            open_trace(path)
    lines = (caught.value.hint or "").splitlines()[1:]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in lines), {})
    assert counts_of(tmp_path / "converted.json").counts.tolist() == STEPS


def test_safetensors_matrices(tmp_path: Path) -> None:
    """A matrix in a safetensors file is the same counts; sniffing needs no package."""
    numpy = pytest.importorskip("safetensors.numpy", reason="the extra formats is not installed")
    path = tmp_path / "weights.safetensors"
    numpy.save_file({"weight": np.array(STEPS, np.float32)}, path)
    assert counts_of(path).counts.tolist() == STEPS
    numpy.save_file({"a": np.ones((2, 2)), "b": np.ones((2, 2))}, path)
    assert "it holds a, b" in str(error_of(path))
