"""vLLM's EPLB load statistics: loads of slots added up by expert, and bad records by line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import FakeModel, counts_of, error_of, lines

from moeplace.errors import Location

META = {
    "record_type": "eplb_load_meta",
    "version": 1,
    "model": "org/model",
    "num_ranks": 2,
    "num_groups": 1,
    "num_nodes": 1,
    "num_layers": 2,
    "num_redundant_experts": 1,
}
FIRST = [[0, 1, 2, 0], [2, 1, 0, 1]]
THEN = [[0, 1, 2, 2], [2, 1, 0, 0]]


def stats(step: int, load: Any, slots: Any = FIRST, **fields: Any) -> dict[str, Any]:
    """One record of a step."""
    record = {"record_type": "eplb_load_stats", "version": 1, "step": step, "expert_load": load, "p2l_map": slots}
    return record | {"num_ranks": 2, "num_layers": 2, "model": "org/model"} | fields


@pytest.fixture
def save(tmp_path: Path):
    """Write records and return the path."""

    def write(*records: Any) -> Path:
        path = tmp_path / "stats.jsonl"
        path.write_bytes(lines(*records))
        return path

    return write


GOOD = stats(4, [[5, 1, 0, 2], [1, 2, 3, 4]])


def test_slots_are_added_up_by_expert(save) -> None:
    """A record is a step; its own map says which slots hold an expert; rows are MoE-layer ordinals."""
    counts = counts_of(save(META, GOOD, {"record_type": "bench_run_start"}, stats(8, [[1] * 4, [2] * 4], THEN)))
    assert counts.counts.tolist() == [[[7, 1, 0], [3, 6, 1]], [[1, 1, 2], [4, 2, 2]]]
    assert counts.meta.layer_ids == (0, 1)
    assert counts.meta.model_id == "org/model"
    assert counts.meta.num_experts == 3


def test_without_a_meta_record_the_map_says_the_experts(save) -> None:
    """The largest expert of the map is the last one; whole floats are counts."""
    counts = counts_of(save(stats(0, [[5.0, 1.0, 0.0, 2.0], [1.0, 2.0, 3.0, 4.0]])))
    assert counts.counts.tolist() == [[[7, 1, 0], [3, 6, 1]]]


def test_ordinals_become_the_models_layers(save) -> None:
    """With a model, row i is its i-th MoE layer."""
    counts = counts_of(save(META, GOOD), model=FakeModel("m", 3, 2, (3, 4)))
    assert counts.meta.layer_ids == (3, 4)
    assert counts.meta.top_k == 2
    assert "num_experts is 3, but model toy has 8" in str(error_of(save(META, GOOD), model=FakeModel()))


def test_empty_slots_and_steps_without_load(save) -> None:
    """Slots that hold no expert (-1) count nothing; steps without load are left out, and it is said."""
    idle = stats(5, [[0] * 4, [0] * 4])
    counts = counts_of(save(META, stats(4, [[5, 1, 0, 0], [1, 2, 3, 4]], [[0, 1, 2, -1], FIRST[1]]), idle))
    assert counts.counts.tolist() == [[[5, 1, 0], [3, 6, 1]]]
    assert "1 of 2 steps hold no counts" in " ".join(counts.meta.assumptions)


def test_a_second_model_is_left_out(save) -> None:
    """A file of several models (a drafter beside its target) is read for the first, and it is said."""
    other = stats(4, [[9]], [[0]], model="org/drafter")
    counts = counts_of(save(META, GOOD, other))
    assert counts.num_steps == 1
    assert "records of org/drafter are left out" in " ".join(counts.meta.assumptions)


@pytest.mark.parametrize(
    ("record", "value", "what"),
    [
        (stats(5, [[5, 1, 0, 2], [1, 2, 3, -4]]), "-4", "expert_load[1][3] is -4"),
        (stats(5, [[5, 1, 0, 2], [1, 2, 3, 4]], [[0, 1, 2, 0], [2, 3, 0, 1]]), "3, 0, 1]", "p2l_map[1][1] is 3"),
        (
            stats(5, [[5, 1, 0, 2], [1, 2, 3, 4]], [[0, 1, 2, -1], [2, 1, 0, 1]]),
            "2], [1, 2, 3",
            "expert_load[0][3] is 2",
        ),
        (stats(5, [[5, 1, 0, 2], [1, 2, 3]]), "[1, 2, 3]", "expert_load[1] has 3 values"),
        (stats(5, [[5, 1, 0, 2], [1, 2, 3, None]]), "null", "expert_load[1][3] is None"),
        (stats(5, [[5, 1, 0, 2], [1, 2, 3, 2.5]]), "2.5", "expert_load[1][3] is 2.5"),
        (stats(5, [[5, 1, 0, 2]], FIRST), "[[0, 1", "p2l_map is [2, 4], expert_load is [1, 4]"),
        (stats(5, [[5, 1, 0, 2]], FIRST[:1]), "[[5, 1", "1 layers"),
        (stats(5, 7), "7,", "expert_load is not a matrix"),
        (stats(5, [[5, 1, 0, 2], [1, 2, 3, 4]], version=2), '2, "step', "version 2"),
        ({"record_type": "eplb_load_stats", "p2l_map": FIRST}, "{", "no expert_load"),
        ('{"record_type": "eplb_load_stats", ', None, None),
    ],
)
def test_bad_records_are_located(save, record: Any, value: str | None, what: str | None) -> None:
    """Negative, fractional and ragged loads, and maps that do not fit them, are named by line and column."""
    path = save(META, GOOD, record)
    error = error_of(path)
    assert isinstance(error.where, Location)
    assert (error.where.file, error.where.line) == (str(path), 3)
    if value is not None:
        assert error.what == what
        text = path.read_text().splitlines()[2]
        assert error.where.column is not None
        assert text[error.where.column - 1 :].startswith(value)


def test_files_without_steps_are_refused(save) -> None:
    """A file that ends after its meta record holds nothing; statistics without load are all 0."""
    assert "no eplb_load_stats record" in str(error_of(save(META)))
    assert "all counts are 0" in str(error_of(save(META, stats(1, [[0] * 4, [0] * 4]))))


@given(seed=st.integers(0, 2**32), num_steps=st.integers(1, 3), num_slots=st.integers(3, 9))
def test_no_load_is_lost(seed: int, num_steps: int, num_slots: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the maps, every layer's load is that of its slots, and every expert's that of the slots that hold it."""
    rng = np.random.default_rng(seed)
    load = rng.integers(1, 50, (num_steps, 2, num_slots))
    slots = np.stack([[rng.permutation(np.arange(num_slots) % 3) for _ in range(2)] for _ in range(num_steps)])
    path = tmp_path_factory.mktemp("eplb") / "stats.jsonl"
    records = [stats(i, load[i].tolist(), slots[i].tolist()) for i in range(num_steps)]
    path.write_bytes(lines(META | {"num_redundant_experts": num_slots - 3}, *records))
    counts = counts_of(path).counts
    for expert in range(3):
        assert np.array_equal(counts[..., expert], (load * (slots == expert)).sum(axis=-1))
