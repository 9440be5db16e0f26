"""Counts inside other JSON: load histories, saliency files, and the bare matrix that LMDeploy takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_cases import FakeModel, counts_of, error_of, real

from moeplace.errors import Location

STEPS = [[[4, 0, 2], [3, 3, 0]], [[1, 1, 0], [2, 0, 0]]]


@pytest.fixture
def save(tmp_path: Path):
    """Write a JSON value and return the path."""

    def write(value: Any) -> Path:
        path = tmp_path / "load.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def history(*loads: Any) -> dict[str, Any]:
    """Return a load history of the given steps."""
    return {"load_history": [{"step": i, "logical_expert_load": load} for i, load in enumerate(loads)]}


def saliency(**layers: Any) -> dict[str, Any]:
    """Return a saliency file of three experts and three tokens."""
    return {"arch": "toy", "n_expert": 3, "tokens": 3, "layers": {name[1:]: layer for name, layer in layers.items()}}


def test_every_entry_of_a_history_is_a_step(save) -> None:
    """The loads of a history are the counts, step by step."""
    counts = counts_of(save(history(*STEPS)))
    assert counts.counts.tolist() == STEPS
    assert counts.meta.layer_ids == (0, 1)
    assert counts_of(save(history(*STEPS)), model=FakeModel("m", 3, 2, (3, 4))).meta.layer_ids == (3, 4)


@pytest.mark.parametrize(
    ("value", "element", "what"),
    [
        (history(STEPS[0], [[1, 1], [2, 0]]), "load_history[1].logical_expert_load", "shape [2, 2] of int64"),
        (history(STEPS[0], [[1, 1, 0], [2, 0]]), "load_history[1].logical_expert_load[1]", "2 values"),
        (history(STEPS[0], [[1, 1, 0], [2, 0, None]]), "load_history[1].logical_expert_load[1, 2]", "null"),
        (history(STEPS[0], [[1, 1, 0], [2, 0, -3]]), "logical_expert_load[1, 1, 2]", "count -3"),
        (history([[0.5, 1.0]]), "logical_expert_load[0, 0, 0]", "count 0.5"),
        ({"load_history": [{"logical_expert_load": STEPS[0]}, {}]}, "load_history[1].logical_expert_load", None),
        ({"load_history": []}, "load_history", "no steps"),
    ],
)
def test_wrong_loads_are_located(save, value: Any, element: str, what: str | None) -> None:
    """Entries without loads, ragged loads and loads that are no counts are named by element."""
    path = save(value)
    error = error_of(path)
    assert error.where == Location(file=str(path), element=element)
    assert what is None or error.what == what


def test_saliency_counts_by_layer(save) -> None:
    """The counts of a saliency file are one step; layers keep their numbers; tokens give top-k."""
    layers = {"_10": {"cnt": [3, 3, 0], "gate": [0.5, 0.1, 0.0]}, "_9": {"cnt": [4, 0, 2], "sal": [1.0, 0.0, 2.0]}}
    counts = counts_of(save(saliency(**layers)))
    assert counts.counts.tolist() == [STEPS[0]]
    assert counts.meta.layer_ids == (9, 10)
    assert (counts.meta.top_k, counts.meta.model_id, counts.meta.num_experts) == (2, "toy", 3)


@pytest.mark.parametrize(
    ("layers", "element", "what"),
    [
        ({"_3": {"cnt": [1, 2]}}, "layers.3.cnt", "2 counts"),
        ({"_3": {"cnt": [1, 2, 3]}, "_x": {"cnt": [1, 2, 3]}}, "layers.x.cnt", "no counts of a numbered layer"),
        ({"_3": {"cnt": [1, 2, 3]}, "_4": {"gate": [1]}}, "layers.4.cnt", "no counts of a numbered layer"),
        ({"_3": {"cnt": [1, "2", 3]}}, "layers.3.cnt", "'2' in place of a count"),
        ({"_3": {"cnt": [True, 2, 3]}}, "layers.3.cnt", "True in place of a count"),
        ({"_3": {"cnt": [1, -2, 3]}}, "cnt[0, 1]", "count -2"),
    ],
)
def test_wrong_saliency_counts_are_located(save, layers: dict[str, Any], element: str, what: str) -> None:
    """Layers without numbers or counts, and counts that are not one per expert, are named by element."""
    path = save(saliency(**layers))
    error = error_of(path)
    assert error.what == what
    assert error.where == Location(file=str(path), element=element)


def test_broken_json_is_located(save) -> None:
    """Broken JSON is located by line and column."""
    path = save('{"load_history": [\n {"logical_expert_load": [[1, }')
    error = error_of(path)
    assert isinstance(error.where, Location)
    assert error.where.line == 2


def test_lmdeploys_bare_matrix_is_counts(save) -> None:
    """LMDeploy's statistics, a matrix with rows of zeros for dense layers, are counts as they are."""
    counts = counts_of(save([[0, 0, 0], *STEPS[0]]))
    assert counts.counts.tolist() == [STEPS[0]]
    assert counts.meta.layer_ids == (1, 2)


def test_the_glm_sample() -> None:
    """The real saliency file has layers 3..77 of 256 experts, and is top-8 by its tokens."""
    counts = counts_of(real("format_samples/glm_saliency_json/sal_math_calib_00.json"))
    assert counts.counts.shape == (1, 75, 256)
    assert counts.meta.layer_ids == tuple(range(3, 78))
    assert (counts.meta.top_k, counts.meta.model_id) == (8, "glm-dsa")
    assert np.unique(counts.counts.sum(axis=-1)).tolist() == [8 * 26522]
