"""Count-only inputs: any of the documented forms, and every wrong count by its element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_cases import FakeModel, counts_of, error_of, real

from moeplace.errors import Location
from moeplace.readers import open_trace
from moeplace.trace import Counts

STEPS = np.array([[[4, 0, 2], [3, 3, 0]], [[1, 1, 0], [2, 0, 0]]])


@pytest.fixture
def save(tmp_path: Path):
    """Write a JSON value, an array (npy) or arrays (npz) and return the path."""

    def write(value: Any) -> Path:
        path = tmp_path / "counts.dat"
        if isinstance(value, np.ndarray):
            with path.open("wb") as stream:
                np.save(stream, value)
        elif isinstance(value, dict) and any(isinstance(item, np.ndarray) for item in value.values()):
            with path.open("wb") as stream:
                np.savez_compressed(stream, **value)
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


@pytest.mark.parametrize(
    "value",
    [
        STEPS.tolist(),
        {"logical_count": STEPS.tolist(), "rank": 0, "average_utilization_rate_over_window": None},
        {"counts": STEPS.astype(float).tolist()},
        {"counts": dict(enumerate(STEPS.tolist())) | {}},
        STEPS,
        STEPS.astype(np.float32),
        {"logical_count": STEPS.astype(np.uint64)},
        {"counts": np.asfortranarray(STEPS)},
        {"arr_0": STEPS},
    ],
)
def test_every_form_reads_the_same(save, value: Any) -> None:
    """JSON, npz and npy, bare or named, whole floats or integers: the same counts."""
    counts = counts_of(save(value))
    assert counts.counts.tolist() == STEPS.tolist()
    assert counts.meta.layer_ids == (0, 1)
    assert counts.meta.num_experts == 3
    assert "top_k not given: taken as 1" in " ".join(counts.meta.assumptions)


def test_one_matrix_is_one_step(save) -> None:
    """Counts of [layer, expert] are one step; opening gives the counts themselves."""
    assert counts_of(save(STEPS[0].tolist())).num_steps == 1
    assert isinstance(open_trace(save(STEPS[0])), Counts)


def test_matrices_by_layer_and_by_domain(save) -> None:
    """An object may hold a row per layer number, or a matrix per domain."""
    counts = counts_of(save({"counts": {"10": [1, 2, 0], "9": [4, 5, 6]}}))
    assert counts.meta.layer_ids == (9, 10)
    assert counts.counts.tolist() == [[[4, 5, 6], [1, 2, 0]]]
    counts = counts_of(save({"counts": {"code": STEPS[1].tolist(), "math": STEPS[0].tolist()}}))
    assert counts.meta.domains == ("code", "math")
    assert counts.domain is not None
    assert counts.domain.tolist() == [0, 1]
    assert "keyed by the layer's number" in str(error_of(save({"counts": {"a": [1], "b": [2]}})))


def test_fields_beside_the_counts(save) -> None:
    """Layer ids, top-k, model and domains (names or numbers) stand beside the counts."""
    fields = {"layer_ids": [3, 7], "top_k": 2, "model_id": "m", "num_experts": 3, "domain": ["b", "a"]}
    for value in ({"counts": STEPS.tolist()} | fields, {"counts": STEPS} | fields):
        counts = counts_of(save(value))
        assert counts.meta.layer_ids == (3, 7)
        assert (counts.meta.top_k, counts.meta.model_id, counts.meta.domains) == (2, "m", ("b", "a"))
        assert counts.domain is not None
        assert counts.domain.tolist() == [0, 1]
        assert counts.meta.assumptions == ()
    counts = counts_of(save({"counts": STEPS, "domain": np.array([1, 0]), "domains": np.array(["x", "y"])}))
    assert counts.meta.domains == ("x", "y")


@pytest.mark.parametrize("tokens", [[3, 1], [[3, 3], [1, 1]]])
def test_top_k_follows_from_the_tokens(save, tokens: Any) -> None:
    """When the tokens are counted too, top-k is the choices per token, if it is one whole number."""
    counts = counts_of(save({"counts": STEPS.tolist(), "tokens": tokens}))
    assert counts.meta.top_k == 2
    assert counts_of(save({"counts": STEPS[:1].tolist(), "tokens": 3})).meta.top_k == 2
    assert counts_of(save({"counts": STEPS.tolist(), "tokens": [3, 2]})).meta.top_k == 1
    error = error_of(save({"counts": STEPS.tolist(), "tokens": tokens, "top_k": 3}))
    assert "tokens choose 2 experts per layer, but top_k is 3" in str(error)
    assert counts_of(save(STEPS), model=FakeModel("m", 3, 2, (5, 6))).meta.top_k == 2


def test_unwritten_steps_are_left_out(save) -> None:
    """Steps of zeros, which ring buffers leave, are dropped with their domain, and it is said."""
    steps = np.concatenate([np.zeros((3, 2, 3), int), STEPS])
    counts = counts_of(save({"counts": steps, "domain": np.array([0, 0, 0, 1, 2])}))
    assert counts.counts.tolist() == STEPS.tolist()
    assert counts.domain is not None
    assert counts.domain.tolist() == [1, 2]
    assert "3 of 5 steps hold no counts" in " ".join(counts.meta.assumptions)
    assert "all counts are 0" in str(error_of(save(np.zeros((2, 3), int))))


def test_dense_layers_are_left_out(save) -> None:
    """Rows of zeros are dense layers that recorders number too; the others keep their numbers."""
    with_dense = np.concatenate([np.zeros((2, 3, 3), int), STEPS], axis=1)
    for model in (None, FakeModel("m", 3, 2, (3, 4))):
        counts = counts_of(save(with_dense), model=model)
        assert counts.counts.tolist() == STEPS.tolist()
        assert counts.meta.layer_ids == (3, 4)
        assert "layers 0, 1, 2 hold no counts" in " ".join(counts.meta.assumptions)
    assert counts_of(save({"counts": with_dense, "layer_ids": np.arange(5)})).meta.num_layers == 5


def test_layer_ids_may_name_the_rows_that_are_moe_layers(save) -> None:
    """Fewer ids than rows pick their rows, silently, where all others are zero; a row with counts is no dense layer."""
    rows = np.concatenate([np.zeros((2, 3, 3), int), STEPS, np.zeros((2, 2, 3), int)], axis=1)
    counts = counts_of(save({"counts": rows, "layer_ids": np.array([3, 4]), "top_k": np.array(2)}))
    assert counts.counts.tolist() == STEPS.tolist()
    assert (counts.meta.layer_ids, counts.meta.assumptions) == ((3, 4), ())
    assert counts_of(save({"counts": rows, "layer_ids": np.array([2, 3, 4])})).meta.num_layers == 3
    for ids in ([2, 3], [3, 99]):
        error = error_of(save({"counts": rows, "layer_ids": np.array(ids)}))
        assert "7 layers, but 2 layer ids" in str(error)


def test_a_wrong_model_is_named(save) -> None:
    """Experts and layers must be the model's; the error names both."""
    assert "num_experts is 3, but model toy has 8" in str(error_of(save(STEPS), model=FakeModel()))
    assert "model toy has 5 MoE layers" in str(
        error_of(save(STEPS), model=FakeModel(num_experts=3, moe_layer_ids=tuple(range(5))))
    )
    assert "num_experts is 9" in str(error_of(save({"counts": STEPS, "num_experts": np.array(9)})))


@pytest.mark.parametrize(
    ("value", "element", "what"),
    [
        (np.where(STEPS == 4, np.nan, STEPS), "counts[0, 0, 0]", "count NaN"),
        ('{"logical_count": [[1, NaN], [2, 3]]}', "logical_count[0, 1]", "count NaN"),
        ('{"logical_count": [[1, 0], [2, Infinity]]}', "logical_count[1, 1]", "count inf"),
        (STEPS - 1, "counts[0, 0, 1]", "count -1"),
        ([[1, 2], [3.5, 1]], "counts[1, 0]", "count 3.5"),
        ([[1, 2], [3]], "counts[1]", "1 values"),
        ([[1, 2], 3], "counts[1]", "3"),
        ({"counts": [[[1, 2]], [[1, 2], [3, 4]]]}, "counts[1]", "2 values"),
        ([[1, 2], [3, None]], "counts[1, 1]", "null"),
        ([[1, 2], [True, 4]], "counts[1, 0]", "true"),
        ({"counts": [["1", "2"]]}, "counts", "counts is <U1"),
        ([1, 2, 3], "counts", "shape [3]"),
        ({"counts": STEPS[None]}, "counts", "shape [1, 2, 2, 3]"),
        ({"counts": []}, "counts", "shape [0]"),
        ({"counts": STEPS, "domain": np.array([1])}, "domain", "shape [1]"),
        ({"counts": STEPS.astype(object)}, "counts", "holds Python objects"),
        ({"counts": STEPS.tolist(), "layer_ids": "3"}, "layer_ids", "'3' (<U1)"),
    ],
)
def test_wrong_counts_are_located(save, value: Any, element: str, what: str) -> None:
    """NaN, negative, fractional, ragged and foreign values are named by element."""
    path = save(value)
    error = error_of(path)
    assert error.where == Location(file=str(path), element=element)
    assert error.what == what


def test_other_broken_files(save, tmp_path: Path) -> None:
    """Broken JSON is located by line and column; other content says what it holds; a cut npy is an error."""
    path = save('{"logical_count": [[1, 2],\n [3, }')
    assert error_of(path).where == Location(file=str(path), line=2, column=6)
    assert "it holds a, b" in str(error_of(save({"a": 1, "b": 2}), format="counts"))
    whole = save(STEPS).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-9])
    assert "is not a whole npy" in str(error_of(tmp_path / "cut.npy"))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    assert "is not a whole npy" in str(error_of(tmp_path / "objects.npy"))


def test_glm_counts_read_as_they_are() -> None:
    """The recorded GLM counts have 80 steps of 75 layers and 256 experts, and are top-8 by their token counts."""
    counts = counts_of(real("glm52_expert_counts/counts.npz"))
    assert counts.counts.shape == (80, 75, 256)
    assert counts.meta.top_k == 8
    assert counts.meta.layer_ids == tuple(range(3, 78))
    assert len(counts.meta.domains) == 10
    assert counts.domain is not None
    assert np.bincount(counts.domain).tolist() == [8] * 10
