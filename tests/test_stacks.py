"""Placement files of serving stacks: accepted by the stacks' rules, read back as they were, broken ones caught.

The acceptors below are written from the published rules of each stack's loader, not from the package: what a loader
takes, and what each rank then holds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dealt, random_placement, small_model

from moeplace.errors import InputError, MissingExtraError, OutputError, PlacementError
from moeplace.exporters import (
    Target,
    check_placement,
    list_placement_formats,
    load_exporter,
    parse_placement,
    read_placement,
    suffix_for,
    write_placement,
)
from moeplace.exporters.native import PlacementFile
from moeplace.model import ModelSpec, load_model
from moeplace.placement import Placement

Slots = npt.NDArray[Any]
FLAT = ("sglang", "trtllm", "vllm-mapping", "vllm-expert-map", "eplb")
LISTS = ("vllm-ascend", "mindie")
CASES = {
    "gpt-oss-20b": ("gpt-oss-20b", 8, 0),
    "maverick": ("llama-4-maverick", 16, 16),
    "deepseek-288-on-32": ("deepseek-v3", 32, 32),
    "deepseek-256-on-64": ("deepseek-v3", 64, 0),
    "mixtral": ("mixtral-8x7b", 8, 8),
}


def written(document: PlacementFile, name: str, target: Target, suffix: str = "") -> bytes:
    """What an exporter writes."""
    file = io.BytesIO()
    load_exporter(name).write(document, file, target, suffix)
    return file.getvalue()


# --- the stacks' own rules, from their loaders -----------------------------------------------------------------------


def sglang_takes(data: bytes, model: ModelSpec, gpus: int) -> Slots:
    """expert_location.py: one key, a rectangular tensor of all layers; every rank can reach every expert."""
    value = json.loads(data)
    assert list(value) == ["physical_to_logical_map"]
    table = np.array(value["physical_to_logical_map"], dtype=np.int64)
    assert table.shape[0] == model.num_layers
    assert table.shape[1] % gpus == 0
    for row in table:
        assert set(row.tolist()) == set(range(model.num_experts))
    dense = sorted(set(range(model.num_layers)) - set(model.moe_layer_ids))
    for layer in dense:
        assert table[layer].tolist() == [slot % model.num_experts for slot in range(table.shape[1])]
    return table[list(model.moe_layer_ids)].reshape(model.num_moe_layers, gpus, -1)


def trtllm_takes(data: bytes, model: ModelSpec, gpus: int) -> Slots:
    """MoeLoadBalancerConfig and interface.py: strict keys, a row of num_slots for each MoE layer, each a cover."""
    yaml = pytest.importorskip("yaml")
    value = yaml.safe_load(data)
    assert set(value) <= {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert value["num_slots"] % gpus == 0
    assert value["num_slots"] >= model.num_experts
    assert value.get("layer_updates_per_iter", 0) == 0
    rows = []
    for layer in model.moe_layer_ids:
        row = {int(key): row for key, row in value["initial_global_assignments"].items()}[layer]
        assert len(row) == value["num_slots"]
        assert set(row) == set(range(model.num_experts))
        rows.append(row)
    return np.array(rows).reshape(len(rows), gpus, -1)


def vllm_mapping_takes(data: bytes, model: ModelSpec, gpus: int) -> Slots:
    """PR #41141: the last record wins; version, slots, redundant experts, every MoE layer from 0, coverage."""
    record = [json.loads(line) for line in data.splitlines() if line.strip()][-1]
    assert record["record_type"] == "eplb_initial_mapping"
    assert record["version"] == 1
    assert record["num_slots"] == model.num_experts + record["num_redundant_experts"]
    rows = [record["initial_global_assignments"][str(layer)] for layer in range(model.num_moe_layers)]
    for row in rows:
        assert len(row) == record["num_slots"]
        assert all(type(expert) is int for expert in row)
        assert set(row) == set(range(model.num_experts))
    return np.array(rows).reshape(len(rows), gpus, -1)


def vllm_map_takes(data: bytes, model: ModelSpec, gpus: int) -> Slots:
    """PR #49572: a list per MoE layer; dimensions, range, coverage."""
    table = np.array(json.loads(data))
    assert table.shape[0] == model.num_moe_layers
    assert all(set(row.tolist()) == set(range(model.num_experts)) for row in table)
    return table.reshape(len(table), gpus, -1)


def ascend_takes(data: bytes, model: ModelSpec, gpus: int) -> Slots:
    """eplb_utils.py: by position; as many experts on each device, none twice on one."""
    layers = json.loads(data)["layer_list"]
    assert len(layers) == model.num_moe_layers == json.loads(data)["moe_layer_count"]
    table = np.array([[device["device_expert"] for device in layer["device_list"]] for layer in layers])
    assert table.shape[1] == gpus
    for layer in table:
        assert set(layer.ravel().tolist()) == set(range(model.num_experts))
        assert all(len(set(device)) == len(device) for device in layer.tolist())
    return table


def mindie_takes(data: bytes, model: ModelSpec, gpus: int) -> Slots:
    """moe_utils.py: every key there, counts right, every wanted layer_id present."""
    value = json.loads(data)
    assert value["moe_layer_count"] == len(value["layer_list"])
    assert [layer["layer_id"] for layer in value["layer_list"]] == list(range(model.num_moe_layers))
    for layer in value["layer_list"]:
        assert layer["device_count"] == len(layer["device_list"]) == gpus
        assert [device["device_id"] for device in layer["device_list"]] == list(range(gpus))
    return ascend_takes(data, model, gpus)


def omni_takes(data: bytes, model: ModelSpec, gpus: int) -> Slots:
    """expert_mapping.py: zeros and ones of a shape; coverage on top. Slots are the experts of a rank, ascending."""
    pattern = np.load(io.BytesIO(data), allow_pickle=False)
    assert pattern.shape == (gpus, model.num_moe_layers, model.num_experts)
    assert pattern.dtype.kind == "i"
    assert set(np.unique(pattern).tolist()) == {0, 1}
    assert pattern.any(axis=0).all()
    return np.array([[np.flatnonzero(pattern[g, i]) for g in range(gpus)] for i in range(pattern.shape[1])])


def eplb_gives(data: bytes, model: ModelSpec, gpus: int) -> Slots:
    """rebalance_experts: three tensors that say the same."""
    arrays = np.load(io.BytesIO(data), allow_pickle=False)
    table, where, count = (
        arrays[key] for key in ("physical_to_logical_map", "logical_to_physical_map", "expert_count")
    )
    assert {array.dtype for array in (table, where, count)} == {np.dtype(np.int64)}
    assert (where != -1).sum(axis=2).tolist() == count.tolist()
    for layer, expert in np.ndindex(count.shape):
        slots = where[layer, expert][where[layer, expert] != -1]
        assert (table[layer, slots] == expert).all()
    assert (count >= 1).all()
    return table.reshape(len(table), gpus, -1)


ACCEPTORS: dict[str, Callable[[bytes, ModelSpec, int], Slots]] = {
    "sglang": sglang_takes,
    "trtllm": trtllm_takes,
    "vllm-mapping": vllm_mapping_takes,
    "vllm-expert-map": vllm_map_takes,
    "vllm-ascend": ascend_takes,
    "mindie": mindie_takes,
    "omni-infer": omni_takes,
    "eplb": eplb_gives,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ACCEPTORS)
def test_exports_are_accepted_and_put_every_expert_where_it_was(name: str, case: str) -> None:
    """By the loader's own rules every file is taken, and every GPU of every layer holds what it was given."""
    preset, gpus, redundant = CASES[case]
    model = load_model(preset)
    document, target = dealt(model, gpus, redundant), Target(model=model, num_gpus=gpus, num_redundant=redundant)
    data = written(document, name, target)
    held = ACCEPTORS[name](data, model, gpus)
    wanted = document.placement.slots
    assert np.array_equal(held, np.sort(wanted, axis=2) if name == "omni-infer" else wanted)
    assert not load_exporter(name).check(data, "file", target).errors


@pytest.mark.parametrize("name", [*ACCEPTORS, "csv", "native", "lmdeploy"])
def test_a_large_file_is_written_and_checked_within_a_second(name: str, tmp_path: Path) -> None:
    """DeepSeek-V3 for 64 GPUs: 58 layers of 256 slots."""
    model = load_model("deepseek-v3")
    document, target = dealt(model, 64, 0), Target(model=model, num_gpus=64)
    start = time.perf_counter()
    path = tmp_path / f"map{load_exporter(name).SUFFIXES[0]}"
    write_placement(document, path, format=name, target=target)
    assert not check_placement(path, format=name, target=target)[1].faults
    assert time.perf_counter() - start < 1


# --- round trips -----------------------------------------------------------------------------------------------------


@st.composite
def even_files(draw: st.DrawFn) -> tuple[PlacementFile, ModelSpec]:
    """Placements without empty slots of models with and without dense layers, copies on distinct GPUs."""
    gpus, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = draw(st.integers(width, gpus * width))
    ids = tuple(sorted(draw(st.sets(st.integers(0, 6), min_size=1, max_size=4))))
    model = small_model(7, experts, 1, moe_layer_ids=ids)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    slots = np.zeros((len(ids), gpus, width), np.int64)
    for layer in slots:
        spare = rng.integers(0, experts, gpus * width - experts)
        order = np.sort(np.concatenate([np.arange(experts), spare]))
        layer[:] = order.reshape(width, gpus).T if max(np.bincount(order)) <= gpus else np.arange(gpus * width).reshape(
            width, gpus).T % experts  # fmt: skip
        layer[:] = rng.permutation(experts)[layer]
    return PlacementFile(placement=Placement(slots=slots, num_experts=experts), layer_ids=ids), model


@settings(deadline=None)
@given(even_files())
def test_every_format_reads_back_what_it_writes(case: tuple[PlacementFile, ModelSpec]) -> None:
    """Given the model and the GPUs, slots and layer numbers come back, and the bytes when written again.

    Not carried: omni-infer, the order of slots; vllm-ep-rank, copies and differing layers; lmdeploy, places.
    """
    document, model = case
    placement = document.placement
    target = Target(model=model, num_gpus=placement.num_gpus)
    for name in (*FLAT, *LISTS, "omni-infer", "csv", "native"):
        if name != "native" and placement.duplicates():
            continue
        suffixes = [suffix for suffix in load_exporter(name).SUFFIXES if suffix != ".pt"]
        for suffix in suffixes:
            details = {"model": {"num_experts": placement.num_experts}}
            own = PlacementFile(placement=placement, layer_ids=document.layer_ids, details=details)
            data = written(own, name, target, suffix)
            back = parse_placement(data, "file", target=target)
            assert back.layer_ids == document.layer_ids, name
            if name == "omni-infer":
                assert np.array_equal(back.placement.copies(), placement.copies())
            else:
                assert back.placement.digest() == placement.digest(), name
            assert written(back, name, target, suffix) == written(back, name, target, suffix)
            if name not in ("vllm-mapping", *LISTS, "native"):  # metadata takes up the model's name
                assert written(back, name, target, suffix) == data


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_ranks_of_experts_come_back_as_sets(gpus: int, width: int, seed: int) -> None:
    """vllm-ep-rank carries one placement for all layers, without copies and without the order of slots."""
    order = np.random.default_rng(seed).permutation(gpus * width).reshape(1, gpus, width)
    placement = Placement(slots=np.repeat(order, 3, axis=0), num_experts=gpus * width)
    model = small_model(4, gpus * width, 1, moe_layer_ids=(1, 2, 3))
    data = written(PlacementFile(placement=placement, layer_ids=(1, 2, 3)), "vllm-ep-rank", Target(model=model))
    back = parse_placement(data, "file", target=Target(model=model, num_gpus=gpus))
    assert np.array_equal(back.placement.copies(), placement.copies())
    assert back.layer_ids == (1, 2, 3)


def test_metadata_stays_where_a_format_ignores_what_it_does_not_know() -> None:
    """GPUs, layer numbers and provenance come back without a model; flat rows without metadata ask for GPUs."""
    document = dealt(load_model("gpt-oss-20b"), 8, 8)
    provenance = {"solver": "eplb", "seed": 3, "trace_digest": "ab", "limits": {}}
    document = PlacementFile(
        placement=document.placement,
        layer_ids=tuple(range(5, 29)),
        details={**document.details, "provenance": provenance},
    )
    for name in ("vllm-mapping", *LISTS):
        back = parse_placement(written(document, name, Target()), "file")
        assert back.placement.digest() == document.placement.digest()
        assert back.layer_ids == document.layer_ids
        assert back.details["provenance"] == {"solver": "eplb", "seed": 3, "trace_digest": "ab"}
        assert back.details["model"]["name"] == "gpt-oss-20b"
    for name in ("sglang", "trtllm", "vllm-expert-map", "eplb"):
        with pytest.raises(InputError, match="how many GPUs") as caught:
            parse_placement(written(document, name, Target()), "file")
        assert "--num-gpus" in str(caught.value)


def test_a_solved_problem_s_loads_and_a_placement_s_copies_go_to_lmdeploy() -> None:
    """Rows are all layers; the greedy rule of EPLB, given copies as loads, makes exactly as many copies."""
    model = load_model("deepseek-v3")
    document, target = dealt(model, 32, 32), Target(model=model)
    rows = np.array(json.loads(written(document, "lmdeploy", target)))
    assert rows.shape == (61, 256)
    copies = np.ones(256, np.int64)
    for _ in range(32):
        copies[np.argmax(rows[5] / copies)] += 1
    assert copies.tolist() == document.placement.replicas()[2].tolist()
    load = np.arange(58 * 256).reshape(58, 256)
    told = PlacementFile(placement=document.placement, layer_ids=document.layer_ids, load=load)
    assert json.loads(written(told, "lmdeploy", target))[3:] == load.tolist()
    with pytest.raises(InputError, match="loads of experts"):
        load_exporter("lmdeploy").read(b"[[1]]", "file", target)


# --- what formats refuse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FLAT, *LISTS, "vllm-ep-rank"])
def test_uneven_and_empty_slots_are_refused(name: str) -> None:
    """Stacks have as many slots everywhere: the message has the numbers, and the hint a number that works."""
    uneven = PlacementFile(placement=Placement.from_lists([[[0, 1, 2], [3]]], 4), layer_ids=(0,))
    with pytest.raises(PlacementError, match="1 to 3 experts") as caught:
        written(uneven, name, Target())
    assert "--num-redundant-experts 0" in str(caught.value)
    empty = PlacementFile(placement=Placement.from_lists([[[0, 1, -1], [2, 3, -1]]], 4), layer_ids=(0,))
    with pytest.raises(PlacementError, match="1 slots of every GPU are empty"):
        written(empty, name, Target())


@pytest.mark.parametrize("name", [*FLAT, *LISTS, "omni-infer"])
def test_two_copies_on_a_gpu_are_not_written(name: str) -> None:
    """A wasted slot at best, and at worst a slot the stack loses."""
    twice = PlacementFile(placement=Placement.from_lists([[[0, 0], [1, 0]]], 2), layer_ids=(0,))
    with pytest.raises(PlacementError, match="expert 0"):
        written(twice, name, Target(num_gpus=2))


def test_ranks_of_experts_refuse_copies_and_layers_that_differ() -> None:
    """vllm-ep-rank says one rank for each expert, alike in all layers."""
    copies = PlacementFile(placement=Placement.from_lists([[[0, 1], [1, 0]]], 2), layer_ids=(0,))
    with pytest.raises(PlacementError, match="4 slots for 2 experts"):
        written(copies, "vllm-ep-rank", Target())
    differ = PlacementFile(placement=Placement.from_lists([[[0], [1]], [[1], [0]]], 2), layer_ids=(4, 6))
    with pytest.raises(PlacementError, match="layer 6 is placed otherwise than layer 4"):
        written(differ, "vllm-ep-rank", Target())


def test_layers_counted_from_zero_take_the_model_s_numbers_and_others_are_refused() -> None:
    """A trace may number MoE layers from 0; any other numbering, or another model, is not this model's."""
    model = load_model("deepseek-v3")
    document = dealt(model, 32, 0)
    ordinal = PlacementFile(placement=document.placement, layer_ids=tuple(range(58)))
    assert written(ordinal, "trtllm", Target(model=model)) == written(document, "trtllm", Target(model=model))
    shifted = PlacementFile(placement=document.placement, layer_ids=tuple(range(1, 59)))
    with pytest.raises(PlacementError, match="layer 1 of the placement stands where deepseek-v3 has layer 3"):
        written(shifted, "trtllm", Target(model=model))
    with pytest.raises(PlacementError, match="24 layers of 32 experts"):
        written(dealt(load_model("gpt-oss-20b"), 8, 0), "sglang", Target(model=model))


def test_a_file_s_ending_is_what_the_stack_goes_by(tmp_path: Path) -> None:
    """SGLang takes a name that ends otherwise for JSON itself: such a name is refused, with one that works."""
    document = dealt(load_model("mixtral-8x7b"), 8, 0)
    with pytest.raises(OutputError, match=r"ends in \.txt") as caught:
        write_placement(document, tmp_path / "map.txt", format="sglang")
    assert "map.json" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert suffix_for("trtllm", "a.json") == ".json"
    assert suffix_for("trtllm", "-") == ".yaml"
    assert suffix_for("native", "any.name") == ".json"


def test_vllm_has_several_forms_each_named_for_what_it_is() -> None:
    """The bare name is no format: the hint lists those of the family."""
    with pytest.raises(InputError, match="vllm-expert-map, vllm-mapping"):
        load_exporter("vllm")
    assert not [name for name in list_placement_formats() if name.startswith("-")]


# --- broken files ----------------------------------------------------------------------------------------------------

TINY = small_model(5, 4, 1, moe_layer_ids=(1, 2, 4))
TINY_TARGET = Target(model=TINY, num_gpus=2, num_redundant=2)
ROWS = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 2, 3], [0, 2, 1, 3, 0, 2]]


def tiny(name: str) -> Any:
    """A right file of the tiny model, as Python values."""
    slots = np.array(ROWS).reshape(3, 2, 3)
    document = PlacementFile(placement=Placement(slots=slots, num_experts=4), layer_ids=(1, 2, 4))
    data = written(document, name, TINY_TARGET, ".json")
    if name == "omni-infer":
        return np.load(io.BytesIO(data))
    return dict(np.load(io.BytesIO(data))) if name == "eplb" else json.loads(data)


def encoded(name: str, value: Any) -> bytes:
    """The file of such values."""
    if name in ("omni-infer", "eplb"):
        file = io.BytesIO()
        if name == "eplb":
            np.savez(file, **value)
        else:
            np.save(file, value)
        return file.getvalue()
    return json.dumps(value).encode()


def rows_of(name: str, value: Any) -> Any:
    """The rows of a flat format, to be changed in place."""
    keys = {"sglang": "physical_to_logical_map", "eplb": "physical_to_logical_map"}
    if name == "vllm-expert-map":
        return value
    return value[keys.get(name, "initial_global_assignments")]


def first(name: str) -> Any:
    """Where the first MoE layer's row stands."""
    return {"sglang": 1, "trtllm": "1", "vllm-mapping": "0", "vllm-expert-map": 0, "eplb": 0}[name]


def kinds(name: str, value: Any, target: Target = TINY_TARGET) -> set[str]:
    """Kinds of errors of a file, each with the stack's consequence in words."""
    inspection = load_exporter(name).check(encoded(name, value), "file", target)
    for fault in inspection.errors:
        assert fault.rule, fault
        assert fault.consequence or name in ("csv", "native", "eplb"), fault
    return {fault.kind for fault in inspection.errors}


@pytest.mark.parametrize("name", FLAT)
def test_the_right_file_has_no_faults(name: str) -> None:
    """What is broken below is right before."""
    assert kinds(name, tiny(name)) == set()


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ([0, 1, 2, 0, 2, 1], "missing"),
        ([1, 2, 3, 1, 2, 3], "missing"),
        ([0, 1, 0, 3, 2, 1], "duplicate"),
        ([0, 1, 2, 3, -1, 1], "negative"),
        ([0, 1, 2, 3, 4, 1], "range"),
        ([0, 1, 2, 3, 0], "ragged"),
        ([0, 1, 2, 3, 0, 1, 2], "ragged"),
    ],
)
def test_broken_rows_are_caught_each_as_what_it_is(name: str, row: list[int], kind: str) -> None:
    """One broken row among right ones: a missing expert, two copies on a GPU, ids out of range, a wrong length."""
    value = tiny(name)
    if name == "eplb" and kind == "ragged":
        pytest.skip("an array cannot be ragged")
    rows_of(name, value)[first(name)] = np.array(row) if name == "eplb" else row
    assert kind in kinds(name, value)
    assert kinds(name, value) <= {
        kind,
        "inverse",
        "indivisible",
        "width",
        *(["duplicate"] if kind == "missing" else []),
    }


@pytest.mark.parametrize("name", ["sglang", "trtllm", "vllm-mapping", "vllm-expert-map"])
@pytest.mark.parametrize("bad", [1.5, True, "1", None, [1], 10**30])
def test_ids_that_are_no_integers_are_caught(name: str, bad: Any) -> None:
    """JSON has other values than integers."""
    value = tiny(name)
    rows_of(name, value)[first(name)][2] = bad
    assert kinds(name, value) == {"type"}
    with pytest.raises(InputError):
        load_exporter(name).read(encoded(name, value), "file", TINY_TARGET)


@pytest.mark.parametrize("name", FLAT)
def test_widths_are_those_of_gpus_and_redundant_experts(name: str) -> None:
    """Slots divide by GPUs, and are experts and the redundant ones the server is told of."""
    assert kinds(name, tiny(name), Target(model=TINY, num_gpus=4)) == {"indivisible"}
    assert kinds(name, tiny(name), Target(model=TINY, num_gpus=2, num_redundant=4)) == {"width"}


@pytest.mark.parametrize("name", [*FLAT, *LISTS])
def test_layers_that_are_missing_or_too_many_are_caught(name: str) -> None:
    """One layer fewer and one more than the model has."""
    for change in (-1, 1):
        value = tiny(name)
        if name in LISTS:
            layers = value["layer_list"]
            value["layer_list"] = layers[:-1] if change < 0 else [*layers, {**layers[0], "layer_id": 3}]
            value["moe_layer_count"] += change
        elif name == "eplb":
            table = value["physical_to_logical_map"]
            value = {"physical_to_logical_map": table[:-1] if change < 0 else np.concatenate([table, table[:1]])}
        elif isinstance(rows := rows_of(name, value), list):
            rows.append(rows[0]) if change > 0 else rows.pop()
        elif change > 0:
            rows["3"] = ROWS[0]
        else:
            rows.popitem()
        assert kinds(name, value) & {"layer-count", "layer-numbering"}, (name, change)


def test_layers_numbered_otherwise_than_the_stack_does_are_caught() -> None:
    """Zero-based keys for TensorRT-LLM, MoE layers alone or from row 0 for SGLang, absolute keys and rows elsewhere."""
    value = tiny("trtllm")
    value["initial_global_assignments"] = {str(layer): row for layer, row in enumerate(ROWS)}
    assert kinds("trtllm", value) == {"layer-numbering"}
    idle = [slot % 4 for slot in range(6)]
    assert kinds("sglang", {"physical_to_logical_map": ROWS}) == {"layer-numbering"}
    assert kinds("sglang", {"physical_to_logical_map": [ROWS[1], ROWS[1], ROWS[2], idle, idle]}) == {"layer-numbering"}
    value = tiny("vllm-mapping")
    value["initial_global_assignments"] = dict(zip("124", ROWS, strict=True))
    assert kinds("vllm-mapping", value) == {"layer-numbering"}
    assert kinds("vllm-expert-map", [idle, *ROWS, idle]) == {"layer-numbering"}
    for name in LISTS:
        value = tiny(name)
        for layer, number in zip(value["layer_list"], (1, 2, 4), strict=True):
            layer["layer_id"] = number
        assert kinds(name, value) == {"layer-numbering"}


def test_unknown_and_missing_keys_are_caught() -> None:
    """Strict stacks refuse keys they do not know; others ignore them. A key that is needed is missed everywhere."""
    for name in ("sglang", "trtllm"):
        assert kinds(name, {**tiny(name), "note": 1}) == {"unknown-key"}
        back = load_exporter(name).read(encoded(name, {**tiny(name), "note": 1}), "file", TINY_TARGET)
        assert back.placement.slots.reshape(3, 6).tolist() == ROWS
    for name in ("vllm-mapping", *LISTS):
        assert kinds(name, {**tiny(name), "note": 1}) == set()
    for name, key in (
        ("sglang", "physical_to_logical_map"),
        ("trtllm", "num_slots"),
        ("vllm-mapping", "version"),
        ("vllm-ascend", "layer_list"),
        ("mindie", "moe_layer_count"),
    ):
        value = tiny(name)
        del value[key]
        assert "missing-key" in kinds(name, value)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(
    ("experts", "kind"),
    [
        ([0, 1, 1], "duplicate"),
        ([0, 1, 4], "range"),
        ([0, 1, -1], "negative"),
        ([0, 1], "uneven"),
        ([0, 1, 2, 3], "uneven"),
        ([2, 0, 3], "missing"),
        ([0, 1, 2.0], "type"),
    ],
)
def test_broken_devices_are_caught(name: str, experts: list[Any], kind: str) -> None:
    """A device's list in JSON by device; two copies on one are never read as a placement."""
    value = tiny(name)
    value["layer_list"][1]["device_list"] = [
        {"device_id": 0, "device_expert": experts},
        {"device_id": 1, "device_expert": [0, 2, 3]},
    ]
    assert kind in kinds(name, value)
    with pytest.raises(InputError):
        load_exporter(name).read(encoded(name, value), "file", TINY_TARGET)


def test_mindie_wants_every_key_and_count_and_ascend_goes_by_position() -> None:
    """What vLLM-Ascend does not read MindIE refuses; ids that are not positions mislead everybody."""
    for path in (("layer_id",), ("device_count",)):
        value = tiny("mindie")
        del value["layer_list"][0][path[0]]
        assert kinds("mindie", value) == {"missing-key"}
        assert kinds("vllm-ascend", value) == set()
        assert parse_placement(encoded("mindie", value), "file", target=TINY_TARGET).placement.num_gpus == 2
    for name in LISTS:
        value = tiny(name)
        value["layer_list"][0]["device_count"] = 3
        assert kinds(name, value) == {"gpu-count"}
        value = tiny(name)
        value["layer_list"][0]["device_list"].reverse()
        assert kinds(name, value) == {"order"}
        value = tiny(name)
        value["layer_list"][0], value["layer_list"][1] = value["layer_list"][1], value["layer_list"][0]
        assert kinds(name, value) == {"order"}
        assert kinds(name, tiny(name), Target(model=TINY, num_gpus=4)) == {"gpu-count"}
    value = tiny("mindie")
    value["moe_layer_count"] = 4
    assert kinds("mindie", value) == {"layer-count"}


def test_broken_patterns_are_caught() -> None:
    """omni-infer: an expert on no rank, other numbers than 0 and 1, a wrong shape."""
    pattern = tiny("omni-infer")
    assert kinds("omni-infer", pattern) == set()
    missing = pattern.copy()
    missing[:, 1, 3] = 0
    assert kinds("omni-infer", missing) == {"missing"}
    assert {
        f.kind for f in load_exporter("omni-infer").check(encoded("omni-infer", missing), "f", Target()).errors
    } == {"missing"}
    two = pattern.copy()
    two[0, 0, 0] = 2
    assert kinds("omni-infer", two) == {"values"}
    assert kinds("omni-infer", pattern[:, :, :3]) == {"shape"}
    assert kinds("omni-infer", pattern[:, :2]) == {"layer-count"}
    assert kinds("omni-infer", pattern[:1]) >= {"gpu-count"}
    assert kinds("omni-infer", pattern[0]) == {"type"}
    assert kinds("omni-infer", pattern.astype(float)) == {"type"}


def test_tensors_that_disagree_and_records_of_other_versions_are_caught() -> None:
    """EPLB's second and third tensor follow from the first; vLLM's record has version 1 and counts that add up."""
    value = tiny("eplb")
    value["expert_count"] = value["expert_count"][:, ::-1]
    assert kinds("eplb", value) == {"inverse"}
    assert kinds("vllm-mapping", {**tiny("vllm-mapping"), "version": 2}) == {"version"}
    assert kinds("vllm-mapping", {**tiny("vllm-mapping"), "num_redundant_experts": 1}) == {"width"}
    assert kinds("trtllm", {**tiny("trtllm"), "num_slots": 8}) == {"width"}
    assert kinds("sglang", {"logical_count": [[1, 2, 3, 4]] * 5}) == {"loads"}
    assert kinds("lmdeploy", [[1, 2, 3, 4]] * 3) == {"layer-numbering"}
    assert kinds("lmdeploy", [[1, 2, 3]] * 5) == {"shape"}
    assert kinds("lmdeploy", [[1, 2, 3, -4]] * 5) == {"negative"}
    assert kinds("vllm-ep-rank", {"expert_to_ep_rank": [0, 0, 0, 1]}) >= {"uneven"}
    assert kinds("vllm-ep-rank", {"expert_to_ep_rank": [0, 0, 1, 2]}) >= {"ranks"}
    assert kinds("vllm-ep-rank", {"expert_to_ep_rank": [0, 0, 1]}) == {"experts"}


@pytest.mark.parametrize("name", list_placement_formats())
@pytest.mark.parametrize("data", [b"", b"{", b"[", b"null", b"1", b"{}", b"[]", b"PK\x03\x04", b"\x93NUMPY", b"a: [\n"])
def test_rubbish_is_an_input_error_in_every_format(name: str, data: bytes) -> None:
    """Reading and checking end in an error of the library or in faults, never in a fault of a parser."""
    exporter = load_exporter(name)
    with pytest.raises((InputError, MissingExtraError)):
        exporter.read(data, "file", TINY_TARGET)
    with contextlib.suppress(InputError, MissingExtraError):
        assert exporter.check(data, "file", TINY_TARGET).errors


@pytest.mark.parametrize("line", ["0,0,0", "0,0,0,x", "-1,0,0,0", "0,0,0,1\n0,0,0,2", "0,0,0,-2", "0,99999999,0,1"])
def test_bad_lines_of_csv_are_told_with_their_number(line: str) -> None:
    """A line is four integers, and each slot stands once."""
    with pytest.raises(InputError):
        parse_placement(f"layer,gpu,slot,expert\n{line}\n".encode(), "file")


# --- optional packages, and real files -------------------------------------------------------------------------------


def test_yaml_and_tensors_name_the_extra_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyyaml YAML is an error with the pip command and JSON is read; without torch .pt is one."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    document = dealt(load_model("mixtral-8x7b"), 8, 0)
    target = Target(num_gpus=8)
    with pytest.raises(MissingExtraError, match=r"moeplace\[formats\]"):
        parse_placement(written(document, "trtllm", target), "file", target=target)
    assert parse_placement(written(document, "trtllm", target, ".json"), "file", target=target).placement.num_gpus == 8
    with pytest.raises(MissingExtraError, match=r"moeplace\[torch\]"):
        written(document, "sglang", target, ".pt")
    with pytest.raises(MissingExtraError, match=r"moeplace\[torch\]"):
        parse_placement(b"PK\x03\x04data.pkl physical_to_logical_map", "file", target=target)


def test_pt_files_are_loaded_as_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One int64 tensor is saved; loading asks for weights_only, and anything beyond tensors is an input error."""
    saved: dict[str, Any] = {}

    def save(value: Any, file: io.BytesIO) -> None:
        saved.update(value)
        file.write(b"PK\x03\x04 data.pkl physical_to_logical_map")

    def load(file: io.BytesIO, *, map_location: str, weights_only: bool) -> Any:
        assert weights_only
        if b"physical" not in file.read():
            raise RuntimeError("Unsupported global")
        return dict(saved)

    fake = SimpleNamespace(int64="int64", tensor=lambda rows, dtype: np.array(rows, dtype), save=save, load=load)
    monkeypatch.setitem(sys.modules, "torch", fake)
    model = load_model("deepseek-v3")
    document, target = dealt(model, 32, 32), Target(model=model, num_gpus=32)
    data = written(document, "sglang", target, ".pt")
    assert list(saved) == ["physical_to_logical_map"]
    assert saved["physical_to_logical_map"].shape == (61, 288)
    assert parse_placement(data, "map.pt", target=target).placement.digest() == document.placement.digest()
    with pytest.raises(InputError, match="Unsupported global"):
        load_exporter("sglang").read(b"PK\x03\x04", "map.pt", target)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_tensors_come_back_from_pt_files(tmp_path: Path) -> None:
    """SGLang's .pt holds one int64 tensor."""
    model = load_model("deepseek-v3")
    document, target = dealt(model, 32, 32), Target(model=model, num_gpus=32)
    write_placement(document, tmp_path / "map.pt", format="sglang", target=target)
    assert read_placement(tmp_path / "map.pt", target=target).placement.digest() == document.placement.digest()


@pytest.mark.parametrize(
    ("head", "gpus"),
    [("DSV3_0427", 32), ("DSV3_baseline_8", 8), ("placement_pattern_2025", 16), ("placement_pattern_3d", 32)],
)
def test_deployed_patterns_are_read(head: str, gpus: int) -> None:
    """Patterns that omni-infer deployed for DeepSeek-V3: 58 layers of 256 experts, some GPUs with one more."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "omniinfer_dsv3_placements"
    files = sorted(folder.glob(f"{head}*.npz"))
    if not files:
        pytest.skip("the deployed patterns are not here")
    target = Target(model=load_model("deepseek-v3"), num_gpus=gpus)
    document = read_placement(files[0], target=target)
    assert document.placement.slots.shape[:2] == (58, gpus)
    assert document.layer_ids == tuple(range(3, 61))
    assert not check_placement(files[0], target=target)[1].faults
    pattern = np.load(files[0])["placement"]
    assert np.array_equal(document.placement.copies().transpose(1, 0, 2), pattern)


def test_random_placements_of_any_shape_go_to_omni_infer_and_csv() -> None:
    """GPUs of different sizes are carried by both."""
    placement = random_placement(3, [4, 2, 3], 2, 6)
    document = PlacementFile(placement=placement, layer_ids=(0, 1))
    for name in ("omni-infer", "csv"):
        back = parse_placement(written(document, name, Target()), "file")
        assert np.array_equal(back.placement.copies(), placement.copies())
