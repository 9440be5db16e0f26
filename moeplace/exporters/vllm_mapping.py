"""The JSONL record of vLLM pull request #41141 (``eplb_config.initial_mapping_path``), which is not merged.

One line, ``record_type`` ``eplb_initial_mapping``, version 1; the last such line of a file wins. Keys of the map are
MoE layers counted from 0. Other keys are ignored, so that where the placement comes from stays with it. What the file
cannot carry: empty slots, GPUs of different sizes.
"""

from __future__ import annotations

import json
from typing import IO, Any

from moeplace.errors import InputError, Location
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import (
    METADATA,
    compact,
    flat_rows,
    metadata_of,
    model_layers,
    number_ordinals,
    placement_of,
    refuse,
    take_metadata,
)
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "vLLM PR #41141 (open), eplb_config.initial_mapping_path: a JSONL record, MoE layers from 0 (.jsonl)"
SUFFIXES = (".jsonl",)
FLAG = "--eplb-config.initial_mapping_path FILE (with PR #41141)"
RECORD, MAP, MAX_REPLICAS = "eplb_initial_mapping", "initial_global_assignments", 1024
KEYS = ("record_type", "version", "num_redundant_experts", "num_slots", MAP)
_STOPS = "vLLM with PR #41141 stops at start with an error: it checks "
STACK = Stack(
    name="vLLM PR #41141",
    consequences={
        "missing-key": f"{_STOPS}version, slots, redundant experts and map",
        "version": f"{_STOPS}that the version is 1",
        "type": f"{_STOPS}that ids are integers",
        "ragged": f"{_STOPS}the length of every row",
        "width": f"{_STOPS}that num_slots is experts and redundant experts",
        "negative": f"{_STOPS}the range of ids",
        "range": f"{_STOPS}the range of ids",
        "missing": f"{_STOPS}that every expert is there",
        "replicas": f"{_STOPS}that no expert has more than {MAX_REPLICAS} copies",
        "duplicate": "vLLM accepts it, and the second copy on a GPU takes memory and serves nothing",
        "layer-count": f"{_STOPS}that every MoE layer is there",
        "layer-numbering": "vLLM looks MoE layers up from 0: with the model's own numbers it stops at the first "
        "that is not "
        "there, and would give the others the map of another layer",
        "indivisible": "vLLM stops at start: slots must divide by the expert-parallel size",
    },
)


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write the record, with our metadata in a key of its own."""
    model_layers(document, target.model)
    rows = flat_rows(document, STACK)
    record = {
        "record_type": RECORD,
        "version": 1,
        "num_redundant_experts": len(rows[0]) - document.placement.num_experts,
        "num_slots": len(rows[0]),
        MAP: {str(layer): row for layer, row in enumerate(rows)},
    }
    refuse(_inspected(record, target))
    file.write(f"{compact({**record, METADATA: metadata_of(document)})}\n".encode())


def sniff(data: bytes) -> bool:
    """Whether a file holds such a record."""
    return data.lstrip().startswith(b"{") and f'"{RECORD}"'.encode() in data


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read the last record; the number of GPUs is that of our metadata, where nobody says.

    Raises
    ------
    InputError, PlacementError
        No such record, a broken map, or an unknown number of GPUs.
    """
    return placement_of(check(data, name, target), name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of the last record."""
    found = None
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"not JSON: {getattr(error, 'msg', error)}"
            raise InputError(what, rule="a JSON object on each line", where=Location(file=name, line=number)) from error
        if isinstance(value, dict) and value.get("record_type") == RECORD:
            found = value
    if found is None:
        raise InputError(f"has no line of record_type {RECORD!r}", rule="the last such line is the map", where=name)
    return _inspected(found, target)


def _inspected(record: dict[str, Any], target: Target) -> Inspection:
    told = record.get(METADATA)
    gpus = told.get("num_gpus") if isinstance(told, dict) else None
    if target.num_gpus is None and type(gpus) is int and gpus > 0:
        target = Target(model=target.model, num_gpus=gpus, num_redundant=target.num_redundant)
    inspection = Inspection(STACK, target)
    take_metadata(inspection, told)
    if not inspection.keys(record, KEYS, KEYS, strict=False):
        return inspection
    if record["version"] != 1:
        inspection.say("version", f"version {record['version']!r}", "version 1")
    spare, width = inspection.number(record, "num_redundant_experts"), inspection.number(record, "num_slots", low=1)
    table = record[MAP]
    if not isinstance(table, dict) or not table or not all(key.isascii() and key.isdigit() for key in table):
        inspection.say("type", f"{MAP} is not a map from layers to rows", "MoE layers from 0, each with its slots")
        return inspection
    rows = dict(sorted((int(layer), row) for layer, row in table.items()))
    inspection.flat(list(rows.values()), [f"layer {layer}" for layer in rows])
    _check_layers(inspection, list(rows))
    _check_counts(inspection, rows, spare, width)
    return inspection


def _check_layers(inspection: Inspection, layers: list[int]) -> None:
    if layers == list(range(len(layers))):
        number_ordinals(inspection, len(layers))
        return
    inspection.layer_ids = tuple(layers)
    rule = "MoE layers are counted from 0, without a gap"
    kind = "layer-numbering" if layers[0] else "layer-count"
    lacking = next(i for i, layer in enumerate(layers) if i != layer)
    inspection.say(kind, f"layers {layers[0]} to {layers[-1]}, and none for MoE layer {lacking}", rule)


def _check_counts(inspection: Inspection, rows: dict[int, Any], spare: int | None, width: int | None) -> None:
    if inspection.slots is None or spare is None or width is None:
        return
    sizes = {len(row) for row in rows.values()}
    if len(sizes) == 1 and sizes != {width}:
        inspection.say(
            "width", f"rows of {sizes.pop()} slots, but num_slots is {width}", "num_slots entries in each row"
        )
    if width != inspection.num_experts + spare:
        told = f"num_slots {width}, num_redundant_experts {spare}, {inspection.num_experts} experts"
        inspection.say("width", told, "slots are experts and redundant experts")
    for layer, row in rows.items():
        most = max(map(row.count, set(row)))
        if most > MAX_REPLICAS:
            inspection.say("replicas", f"layer {layer} has {most} copies of an expert", f"at most {MAX_REPLICAS}")
