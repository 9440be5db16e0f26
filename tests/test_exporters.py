"""Placement files: every format writes the same bytes for the same document and reads its own back."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from strategies import make_problem, placements, random_placement

import moeplace
from moeplace.errors import InfeasibleError, InputError, MoeplaceError, NothingFoundError, PlacementError
from moeplace.exporters import Target, load_exporter, read_placement, write, write_placement
from moeplace.exporters.native import PlacementFile, document_of, ragged
from moeplace.placement import Placement
from moeplace.problem import Problem
from moeplace.solution import Limits, Solution, Stage, Status, StopReason
from moeplace.solvers import solve
from moeplace.trace import Trace

CONTRACT = {
    "schema",
    "model",
    "topology",
    "dataflow",
    "routing",
    "layer_ids",
    "slots",
    "objective",
    "bound",
    "gap",
    "status",
    "stop_reason",
    "terms",
    "provenance",
}


def _bytes(document: PlacementFile, name: str = "native") -> bytes:
    file = io.BytesIO()
    load_exporter(name).write(document, file, Target())
    return file.getvalue()


@pytest.fixture(scope="module")
def solved(toy_problem: Problem) -> Solution:
    """EPLB's answer to the toy problem."""
    return solve(toy_problem, "eplb")


def test_the_native_file_has_the_contracts_keys(toy_problem: Problem, solved: Solution) -> None:
    """The keys are those of the contract, no more and no fewer, and sorted; the values are the solution's."""
    document = json.loads(_bytes(document_of(toy_problem, solved, Limits(seed=4, options={"policy": "global"}))))
    assert set(document) == CONTRACT
    assert list(document) == sorted(document)
    assert document["schema"] == "moeplace/placement/1"
    assert document["model"] == {"name": "toy", "num_moe_layers": 2, "num_experts": 6, "top_k": 2}
    topology = toy_problem.topology
    assert document["topology"] == {"name": "scale-up:2", "num_nodes": 1, "num_gpus": 2, "digest": topology.digest()}
    assert document["objective"] == {"name": "step-time", "unit": "µs", "value": round(solved.objective, 9)}
    assert document["bound"] <= document["objective"]["value"]
    assert document["gap"] == round(solved.gap or 0.0, 9)
    assert (document["dataflow"], document["routing"]) == ("dispatch-combine", "even")
    assert (document["status"], document["stop_reason"]) == (str(solved.status), str(solved.stop_reason))
    assert document["layer_ids"] == [0, 1]
    assert {"version", "trace_digest", "solver", "seed", "limits"} <= set(document["provenance"])
    assert document["provenance"]["trace_digest"] == toy_problem.stats.trace_digest
    for term in document["terms"].values():
        assert {"value", "unit"} <= set(term) <= {"value", "unit", "bound"}
    assert document["terms"]["load_max_over_mean_mean"]["bound"] >= 1


def test_nothing_in_the_file_differs_between_equal_runs(toy_problem: Problem, solved: Solution) -> None:
    """A second run gives the same bytes: no time, host or path; a run without a clock has no time limit."""
    again = solve(toy_problem, "eplb", Limits(threads=2))
    assert _bytes(document_of(toy_problem, again)) == _bytes(document_of(toy_problem, solved))
    endless = document_of(toy_problem, solved, Limits(time_limit_s=math.inf))
    assert json.loads(_bytes(endless))["provenance"]["limits"]["time_limit_s"] is None


def test_a_baseline_adds_its_terms(small_trace: Trace) -> None:
    """With a baseline the terms hold moved copies and bytes."""
    problem = make_problem(small_trace, "scale-up:2", baseline=random_placement(3, [3, 3], 2, 6))
    terms = json.loads(_bytes(document_of(problem, solve(problem, "linear"))))["terms"]
    assert terms["moved_copies"]["unit"] == "copies"
    assert terms["moved_bytes"]["value"] == terms["moved_copies"]["value"] * problem.model.expert_weight_bytes


def test_stages_and_notes_stand_in_the_provenance(toy_problem: Problem, solved: Solution) -> None:
    """Sub-problems keep their own objective, bound, gap, status and stop reason."""
    stage = Stage(
        name="clusters",
        objective=4.0,
        bound=3.0,
        unit="tokens",
        status=Status.FEASIBLE,
        stop_reason=StopReason.TIME_LIMIT,
    )
    document = json.loads(_bytes(document_of(toy_problem, solved.replace(stages=(stage,), notes=("read me",)))))
    assert document["provenance"]["notes"] == ["read me"]
    assert document["provenance"]["stages"] == [
        {
            "name": "clusters",
            "objective": 4.0,
            "bound": 3.0,
            "gap": 0.25,
            "unit": "tokens",
            "status": "feasible",
            "stop_reason": "time limit",
        }
    ]


def test_no_placement_is_an_error_of_its_kind(toy_problem: Problem, solved: Solution) -> None:
    """Proven infeasible exits with 3 and nothing found with 4, each with the last note as the reason."""
    none = solved.replace(placement=None, notes=("first", "the cap is too tight"))
    with pytest.raises(InfeasibleError, match="the cap is too tight"):
        document_of(toy_problem, none.replace(status=Status.INFEASIBLE))
    with pytest.raises(NothingFoundError, match=r"the cap is too tight \(stopped: time limit\)"):
        document_of(toy_problem, none.replace(status=Status.UNKNOWN, stop_reason=StopReason.TIME_LIMIT))


@given(placements())
def test_our_own_formats_read_back_what_they_write(placement: Placement) -> None:
    """Formats of ours take any placement and restore it and its layer ids, byte for byte when written again."""
    layer_ids = tuple(range(3, 3 + placement.num_layers))
    document = PlacementFile(
        placement=placement, layer_ids=layer_ids, details={"model": {"num_experts": placement.num_experts}}
    )
    for name in ("native", "csv"):
        exporter = load_exporter(name)
        data = _bytes(document, name)
        assert exporter.sniff(data)
        back = exporter.read(data, "file", Target())
        assert back.placement.digest() == placement.digest()
        assert back.layer_ids == layer_ids
        assert _bytes(back, name) == data


def test_padding_is_left_out_and_room_is_kept() -> None:
    """GPUs with fewer slots list fewer; where even the fullest GPU has empty slots, they are part of the placement."""
    uneven = Placement.from_lists([[[0, 1, 2], [3]], [[0, 1, 2], [3]]], 4)
    assert ragged(uneven) == [[[0, 1, 2], [3]], [[0, 1, 2], [3]]]
    roomy = Placement.from_lists([[[0, 1, -1], [2, 3, -1]]], 4)
    assert ragged(roomy) == [[[0, 1, -1], [2, 3, -1]]]


def test_files_are_written_whole_or_not_at_all(toy_problem: Problem, solved: Solution, tmp_path: Path) -> None:
    """An existing file is replaced by a whole one, and stays when there is nothing to write."""
    path = tmp_path / "p.json"
    path.write_text("kept")
    with pytest.raises(MoeplaceError):
        write(toy_problem, solved.replace(placement=None), path)
    assert path.read_text() == "kept"
    moeplace.write(toy_problem, solved, path)
    document = read_placement(path)
    assert solved.placement is not None
    assert document.placement.digest() == solved.placement.digest()
    write_placement(document, tmp_path / "q.json")
    assert (tmp_path / "q.json").read_bytes() == path.read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["p.json", "q.json"]


GOOD: dict[str, Any] = {"schema": "moeplace/placement/1", "model": {"num_experts": 4}, "slots": [[[0, 1], [2, 3]]]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "moeplace/placement/9"}, "schema 'moeplace/placement/9'"),
        ({"slots": "x"}, "slots or model.num_experts"),
        ({"slots": [[[0, 1.5], [2, 3]]]}, "slots or model.num_experts"),
        ({"slots": [[[0, True], [2, 3]]]}, "slots or model.num_experts"),
        ({"slots": [[[0, 10**30], [2, 3]]]}, "slots or model.num_experts"),
        ({"slots": []}, "every layer lists the same GPUs"),
        ({"slots": [[[0, 1], [2, 3]], [[0, 1, 2, 3]]]}, "every layer lists the same GPUs"),
        ({"slots": [[[0, 1], [2, 4]]]}, "expert 4 in slot 1 of GPU 1, layer 0"),
        ({"slots": [[[0, 1], [2, 2]]]}, "expert 3 of layer 0 is on no GPU"),
        ({"model": {}}, "slots or model.num_experts"),
        ({"model": []}, "slots or model.num_experts"),
        ({"model": {"num_experts": 10**9}}, "1000000000 experts"),
        ({"layer_ids": [1, 2]}, "one for each of the 1 layers"),
        ({"layer_ids": "a"}, "layer_ids is"),
        ({"layer_ids": ["a"]}, "layer_ids is"),
    ],
)
def test_broken_native_files_name_the_file_and_the_rule(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """A wrong schema, type, id or shape is an input error that starts with the file's name."""
    path = tmp_path / "p.json"
    path.write_text(json.dumps(GOOD))
    assert read_placement(path).layer_ids == (0,)
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(InputError) as caught:
        read_placement(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"hello", "is not a placement file"),
        (b"[1]", "is not a placement file"),
        (b'{"slots": [[[0,', "not JSON"),
        (b'{"slots": ' + b"[" * 100_000, "not JSON"),
        (b'{"slots": "\xff"}', "not JSON"),
    ],
)
def test_files_that_are_no_placements(tmp_path: Path, data: bytes, words: str) -> None:
    """Anything else is refused with the file's name, never with a fault of the parser."""
    path = tmp_path / "p.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        read_placement(path)
    assert str(path) in str(caught.value)


def test_compressed_files_are_read(tmp_path: Path) -> None:
    """A placement may be gzipped: it is known by its content."""
    import gzip

    (tmp_path / "p").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert read_placement(tmp_path / "p").placement.num_experts == 4


def test_unknown_formats_are_suggested() -> None:
    """A typo in a format's name names the nearest one."""
    with pytest.raises(InputError, match="did you mean native"):
        load_exporter("nativ")


def test_a_placement_without_copies_of_an_expert_is_never_written(toy_problem: Problem) -> None:
    """The constructor refuses it, so no format can write it."""
    with pytest.raises(PlacementError):
        Placement.from_lists([[[0, 1, 2], [3, 4, 4]]], 6)
