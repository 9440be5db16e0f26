"""SGLang recorder dumps of every mode: slots become experts, ranks are joined; as JSON and, with torch, as .pt."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import FakeModel, assert_same, counts_of, error_of, read_tokens, real, streamed

from moeplace.errors import MissingExtraError
from moeplace.readers import read_trace

# layer 0 is dense; 4 experts in 6 slots of which 4 and 5 are copies
SLOTS = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 3], [0, 1, 2, 3, 2, 1]]
PREFILL = {
    "forward_pass_id": 10,
    "rank": 0,
    "gatherer_key": "primary",
    "input_ids": [5, 6, 7, 0],
    "positions": [0, 1, 0, 0],
    "extend_seq_lens": [2, 1],
    "forward_mode": 1,
    "topk_ids_of_layer": [
        [[-1, -1, -1]] * 4,
        [[0, 4, -1], [1, 2, -1], [5, 3, -1], [-1, -1, -1]],
        [[4, 5, -1], [0, 1, -1], [3, 2, -1], [-1, -1, -1]],
    ],
    "misc_objects": [],
}
DECODE = PREFILL | {
    "forward_pass_id": 11,
    "input_ids": [8, 9],
    "positions": [2, 1],
    "extend_seq_lens": None,
    "forward_mode": 2,
    "topk_ids_of_layer": [[[-1] * 3] * 2, [[0, 1, -1], [2, 3, -1]], [[0, 1, -1], [4, 3, -1]]],
}


def dump(*records: Any, slots: Any = SLOTS) -> dict[str, Any]:
    """A dump of records."""
    return {"records": list(records), "last_physical_to_logical_map": slots}


def counted(pass_id: int, counts: Any, rank: int = 0) -> dict[str, Any]:
    """A record of the mode per_pass."""
    return {"forward_pass_id": pass_id, "rank": rank, "gatherer_key": "primary", "global_physical_count": counts}


@pytest.fixture
def save(tmp_path: Path):
    """Write a dump as JSON and return its path."""

    def write(value: Any, name: str = "dump.json") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        return path

    return write


def test_a_tiny_per_token_dump_by_hand(save) -> None:
    """Slots become experts, padding and dense layers go, sequences of a pass are requests, modes are phases."""
    trace = streamed(save(dump(PREFILL, DECODE)))
    assert trace.experts.tolist() == [
        [[3, 0], [2, 1]],
        [[2, 1], [0, 1]],
        [[3, 0], [3, 2]],
        [[3, 2], [0, 1]],
        [[1, 0], [2, 3]],
    ]
    assert trace.request.tolist() == [0, 0, 1, 2, 3]
    assert trace.position.tolist() == [0, 1, 0, 2, 1]
    assert trace.phase.tolist() == [0, 0, 0, 1, 1]
    assert trace.step is not None
    assert trace.step.tolist() == [10, 10, 10, 11, 11]
    assert trace.rank is not None
    assert trace.rank.tolist() == [0] * 5
    assert (trace.meta.layer_ids, trace.meta.num_experts, trace.meta.top_k) == ((1, 2), 4, 2)
    assert [said for said in trace.meta.assumptions if "counts as a request of its own" in said]
    assert len(trace.meta.assumptions) == 1


def test_other_forward_modes(save) -> None:
    """Mixed passes split phases by sequence, verification passes are decode, sequences without lengths by position."""
    mixed = PREFILL | {"forward_mode": 3, "extend_seq_lens": [2, 1], "positions": [0, 1, 7, 0]}
    trace = read_tokens(save(dump(mixed)))
    assert trace.phase.tolist() == [0, 0, 1]
    assert "mix prefill and decode" in " ".join(trace.meta.assumptions)
    trace = read_tokens(save(dump(DECODE | {"forward_mode": 5})))
    assert trace.phase.tolist() == [1, 1]
    assert "forward modes beyond prefill and decode" in " ".join(trace.meta.assumptions)
    trace = read_tokens(save(dump(PREFILL | {"extend_seq_lens": None})))
    assert trace.request.tolist() == [0, 0, 1]


def test_ranks_of_a_folder(save, tmp_path: Path) -> None:
    """Each rank's own tokens are joined; a rank that recorded the same tokens as another is left out, and said."""
    save(dump(PREFILL), "run/x_0.json")
    save(dump(DECODE | {"rank": 1, "forward_pass_id": 10}), "run/x_1.json")
    save(dump(), "run/x_2.json")
    trace = streamed(tmp_path / "run")
    assert trace.rank is not None
    assert trace.rank.tolist() == [0, 0, 0, 1, 1]
    assert trace.request.tolist() == [0, 0, 1, 2, 3]
    save(dump(PREFILL | {"rank": 1}), "run/x_1.json")
    trace = read_tokens(tmp_path / "run")
    assert trace.num_tokens == 3
    assert any("x_1.json holds the same tokens as another rank" in said for said in trace.meta.assumptions)
    save(dump(counted(1, SLOTS)), "run/x_1.json")
    assert "all dumps of a folder are of one mode, here per_token" in str(error_of(tmp_path / "run"))
    save(dump(PREFILL, slots=[[0, 1, 2, 3, 4, 5]] * 3), "run/x_1.json")
    assert "all dumps are of one model" in str(error_of(tmp_path / "run"))


def test_per_pass_counts_are_summed_over_slots_and_ranks(save, tmp_path: Path) -> None:
    """Counts of an expert's slots, and of all ranks in one pass, add up; passes are steps in their order."""
    zero, one = [0] * 6, [1, 2, 3, 4, 5, 6]
    save(dump(counted(7, [zero, one, zero]), counted(5, [zero, zero, one])), "run/x_0.json")
    save(dump(counted(7, [zero, zero, one], 1), counted(5, [zero, one, one], 1)), "run/x_1.json")
    counts = counts_of(tmp_path / "run")
    layer_1, layer_2 = [4 + 5, 3, 2, 1 + 6], [1, 2 + 6, 3 + 5, 4]
    twice = [2 * count for count in layer_2]
    assert counts.counts.tolist() == [[layer_1, twice], [layer_1, layer_2]]
    assert counts.meta.layer_ids == (1, 2)
    assert "1 of 3 layers hold no counts: taken as dense layers" in counts.meta.assumptions
    model = FakeModel(num_experts=4, top_k=2, moe_layer_ids=(1, 2))
    assert counts_of(tmp_path / "run", model=model).meta.top_k == 2


@pytest.mark.parametrize("name", ["logical_count", "folder"])
def test_stat_counts_leave_out_the_empty_ring(save, tmp_path: Path, name: str) -> None:
    """Rows of the ring buffer that were never written are left out, and said."""
    ring = np.zeros((1000, 3, 4), int)
    ring[[0, 1, 999], 1:] = [[3, 2, 1, 0]]
    path = save({"rank": 0, "logical_count": ring.tolist(), "average_utilization_rate_over_window": None})
    if name == "folder":
        counts = counts_of(tmp_path, format="sglang-recorder")
        assert "order of its steps is not that of time" in " ".join(counts.meta.assumptions)
    else:
        counts = counts_of(path)
    assert counts.counts.shape == (3, 2, 4)
    assert counts.meta.layer_ids == (1, 2)
    assert "997 of 1000 steps hold no counts" in " ".join(counts.meta.assumptions)


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        (dump(PREFILL | {"positions": [0, 1]}), "records[0].positions", "2 positions"),
        (dump(DECODE, PREFILL | {"extend_seq_lens": [9]}), "records[1].extend_seq_lens", "[9]"),
        (dump(PREFILL | {"forward_mode": None}), "records[0]", "forward_mode is None"),
        (dump(PREFILL | {"forward_pass_id": "a"}), "records[0]", "forward_pass_id is 'a'"),
        (dump(DECODE | {"topk_ids_of_layer": [[[1]]]}), "records[0].topk_ids_of_layer", "shape [1, 1, 1]"),
        (dump(DECODE | {"topk_ids_of_layer": [[[0.5]]]}), "records[0].topk_ids_of_layer", "list of float64"),
        (
            dump(DECODE | {"topk_ids_of_layer": [[[-1] * 2] * 2, [[0, 1], [2, 6]], [[0, 1], [4, 3]]]}),
            "records[0].topk_ids_of_layer[1, 1, 1]",
            "slot 6",
        ),
        (
            dump(DECODE | {"topk_ids_of_layer": [[[-1] * 2] * 2, [[0, 1], [2, 3]], [[0, 1], [4, 2]]]}),
            "records[0].topk_ids_of_layer[2, 1]",
            "expert 2 stands twice",
        ),
        (
            dump(DECODE | {"topk_ids_of_layer": [[[-1] * 2] * 2, [[0, 1], [2, -1]], [[0, 1], [4, 3]]]}),
            "records[0].topk_ids_of_layer[1, 1]",
            "expert -1",
        ),
        (dump(DECODE, slots=[0, 1]), "last_physical_to_logical_map", "shape [2]"),
        (dump(counted(1, [[1]])), "records[0].global_physical_count", "shape [1, 1]"),
        (dump(counted(1, SLOTS[:1])), "records[0].global_physical_count", "shape [1, 6]"),
        (dump(), "records", "holds no passes"),
        ({"logical_count": [1, 2]}, "logical_count", "shape [2]"),
        ({"a": 1}, None, "is no recorder dump"),
    ],
)
def test_every_wrong_place_is_named(save, value: Any, where: str | None, what: str) -> None:
    """A value that breaks the format is an error with its record and index."""
    path = save(value)
    error = error_of(path, format="sglang-recorder")
    assert str(error.where) == (f"{path}: {where}" if where else str(path))
    assert what in error.what


def test_repeated_experts_tell_of_moved_ones(save) -> None:
    """A top-k that holds an expert twice after mapping hints at experts moved while recording; it can be skipped."""
    ids = [[[-1] * 2] * 2, [[0, 1], [2, 3]], [[0, 1], [4, 2]]]
    path = save(dump(DECODE | {"topk_ids_of_layer": ids}))
    assert "--enable-eplb" in (error_of(path).hint or "")
    trace = read_tokens(path, skip_bad=1)
    assert trace.num_tokens == 1
    assert "1 bad row skipped" in trace.meta.assumptions[-1]


@st.composite
def dumps(draw: st.DrawFn) -> tuple[dict[str, Any], list[Any]]:
    """Dumps with copies of experts on random slots, and their tokens as [layers, k] experts."""
    experts, copies, layers = draw(st.integers(2, 8)), draw(st.integers(0, 4)), draw(st.integers(1, 3))
    top_k = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots = [rng.permutation([*range(experts), *rng.integers(0, experts, copies)]) for _ in range(layers)]
    records, tokens = [], []
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 4))
        logical = [[rng.permutation(experts)[:top_k].tolist() for _ in range(layers)] for _ in range(size)]
        physical = [
            [
                [int(rng.choice(np.flatnonzero(slots[i] == e))) for e in token[i]] + [-1] * (8 - top_k)
                for token in logical
            ]
            for i in range(layers)
        ]
        fields = {"forward_pass_id": number, "positions": list(range(size)), "topk_ids_of_layer": physical}
        records.append(DECODE | fields)
        tokens += logical
    return dump(*records, slots=[row.tolist() for row in slots]), tokens


@given(dumps())
def test_what_was_routed_is_read(case: tuple[dict[str, Any], list[Any]]) -> None:
    """Whatever copy of an expert a token was sent to, the trace has the expert."""
    value, tokens = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d.json"
        path.write_text(json.dumps(value))
        trace = read_tokens(path)
    assert trace.experts.tolist() == tokens
    assert trace.request.tolist() == list(range(len(tokens)))


def test_without_torch_the_hint_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .pt without torch installed is an error with the pip command and a conversion in three lines."""
    import zipfile

    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02records forward_pass_id")
    with pytest.raises(MissingExtraError) as caught:
        read_trace(path)
    hint = caught.value.hint or ""
    assert "pip install 'moeplace[torch]'" in hint
    assert "weights_only=True" in hint
    assert hint.count("\n") == 3


def test_pt_files_read_as_their_json(save, tmp_path: Path) -> None:
    """A .pt with tensors and its JSON give the same trace and counts; the conversion of the hint is such a JSON."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")

    def tensors(value: dict[str, Any]) -> dict[str, Any]:
        keys = ("topk_ids_of_layer", "global_physical_count")
        records = [
            {key: torch.tensor(item, dtype=torch.int32) if key in keys else item for key, item in record.items()}
            for record in value["records"]
        ]
        return {"records": records, "last_physical_to_logical_map": torch.tensor(value["last_physical_to_logical_map"])}

    value = tensors(dump(PREFILL, DECODE))
    torch.save(value, tmp_path / "t.pt")
    assert_same(streamed(tmp_path / "t.pt"), read_tokens(save(dump(PREFILL, DECODE))))
    (tmp_path / "c.json").write_text(json.dumps(value, default=lambda tensor: tensor.tolist()))
    assert_same(read_tokens(tmp_path / "c.json"), read_tokens(tmp_path / "t.pt"))
    passes = dump(counted(7, SLOTS), counted(8, SLOTS))
    torch.save(tensors(passes), tmp_path / "p.pt")
    assert counts_of(tmp_path / "p.pt").digest() == counts_of(save(passes)).digest()
    stat = {"rank": 0, "logical_count": torch.tensor([SLOTS]), "average_utilization_rate_over_window": 0.5}
    torch.save(stat, tmp_path / "s.pt")
    assert counts_of(tmp_path / "s.pt").counts.tolist() == [SLOTS]
    torch.save({"records": {1}, "forward_pass_id": test_pt_files_read_as_their_json}, tmp_path / "code.pt")
    assert "weights_only=True" in str(error_of(tmp_path / "code.pt"))


@pytest.mark.parametrize("mode", ["stat", "per_pass"])
def test_real_counts(mode: str) -> None:
    """The real recorder's dumps: 12 prompt tokens and three decode steps of 5, 3 layers, top-8."""
    pytest.importorskip("torch", reason="needs PyTorch")
    counts = counts_of(real(f"format_samples/sglang_recorder/{mode}.pt"))
    assert counts.counts.shape == (4, 3, 16)
    assert counts.counts.sum(axis=2).tolist() == [[96] * 3, [40] * 3, [40] * 3, [40] * 3]


def test_real_tokens() -> None:
    """The real recorder's tokens; its slots are random, so that most tokens hold an expert twice and are refused."""
    pytest.importorskip("torch", reason="needs PyTorch")
    path = real("format_samples/sglang_recorder/per_token.pt")
    assert "stands twice" in str(error_of(path))
    trace = read_tokens(path, skip_bad=21)
    assert trace.experts.shape == (6, 3, 8)
    assert trace.step is not None
    assert trace.step.tolist() == [100, 100, 100, 101, 103, 103]
    assert trace.phase.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.experts[0, 0].tolist() == [11, 14, 10, 6, 7, 12, 0, 2]
