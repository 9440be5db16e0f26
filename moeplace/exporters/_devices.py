"""The JSON that vLLM-Ascend and MindIE share: layers, their devices, and the experts of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import (
    METADATA,
    an_object,
    compact,
    filled,
    metadata_of,
    model_layers,
    number_ordinals,
    refuse,
    take_metadata,
)
from moeplace.exporters.native import PlacementFile

LAYERS, COUNT, DEVICES, EXPERTS = "layer_list", "moe_layer_count", "device_list", "device_expert"


def has_lists(data: bytes) -> bool:
    """Whether a file is an object with lists of experts by device."""
    return data.lstrip().startswith(b"{") and f'"{EXPERTS}"'.encode() in data


def write_lists(document: PlacementFile, file: IO[bytes], target: Target, stack: Stack) -> None:
    """Write the form that vLLM-Ascend and MindIE share."""
    model_layers(document, target.model)
    layers = [
        {
            "layer_id": i,
            "device_count": len(gpus),
            DEVICES: [{"device_id": g, EXPERTS: experts} for g, experts in enumerate(gpus)],
        }
        for i, gpus in enumerate(filled(document, stack).tolist())
    ]
    value = {COUNT: len(layers), LAYERS: layers}
    refuse(inspect_lists(value, target, stack))
    lines = ",\n".join(map(compact, layers))
    told = compact(metadata_of(document))
    file.write(f'{{"{COUNT}": {len(layers)},\n"{METADATA}": {told},\n"{LAYERS}": [\n{lines}\n]}}\n'.encode())


def inspect_lists(value: Any, target: Target, stack: Stack, *, every_key: bool = False) -> Inspection:
    """Inspect the form that vLLM-Ascend and MindIE share; ``every_key``: ids and counts must be there too."""
    inspection = Inspection(stack, target)
    if not an_object(value, inspection) or not inspection.keys(value, (), (COUNT, LAYERS), strict=False):
        return inspection
    take_metadata(inspection, value.get(METADATA))
    layers, count = value[LAYERS], inspection.number(value, COUNT)
    if not isinstance(layers, list) or not layers:
        inspection.say("type", f"{LAYERS} is not a list of layers", "one entry for each MoE layer")
        return inspection
    if count is not None and count != len(layers):
        inspection.say("layer-count", f"{len(layers)} layers, but {COUNT} is {count}", f"{COUNT} entries")
    extra = ("device_count", "layer_id") if every_key else ()
    lists = []
    for i, layer in enumerate(layers):
        devices = _entries(inspection, layer, f"layer {i}", (DEVICES, *extra), DEVICES)
        if devices is None:
            return inspection
        extra_device = ("device_id",) if every_key else ()
        held = [
            _entries(inspection, device, f"layer {i}, device {g}", (EXPERTS, *extra_device), EXPERTS)
            for g, device in enumerate(devices)
        ]
        if None in held:
            return inspection
        lists.append(held)
        if layer.get("device_count", len(devices)) != len(devices):
            told = f"layer {i} has {len(devices)} devices, but device_count is {layer['device_count']!r}"
            inspection.say("gpu-count", told, "device_count entries")
    _check_order(inspection, layers)
    inspection.nested(lists, [f"layer {i}" for i in range(len(lists))])
    number_ordinals(inspection, len(lists))
    return inspection


def _entries(inspection: Inspection, entry: Any, name: str, keys: Sequence[str], wanted: str) -> list[Any] | None:
    if not isinstance(entry, dict) or not isinstance(entry.get(wanted, []), list):
        inspection.say("type", f"{name} is not an object with the list {wanted}", f"keys {', '.join(keys)}")
        return None
    lacking = [key for key in keys if key not in entry]
    if lacking:
        inspection.say("missing-key", f"{name} has no {' and no '.join(lacking)}", f"keys {', '.join(keys)}")
        return None
    found: list[Any] = entry[wanted]
    return found


def _check_order(inspection: Inspection, layers: Sequence[dict[str, Any]]) -> None:
    """Ids that are there must be the positions: that is what a person who reads the file goes by."""
    ids = [layer.get("layer_id", i) for i, layer in enumerate(layers)]
    wrong = [i for i, number in enumerate(ids) if number != i]
    if wrong:
        told = f"entry {wrong[0]} of {LAYERS} has layer_id {ids[wrong[0]]!r}"
        shifted = len(wrong) == len(ids) and all(type(number) is int for number in ids) and sorted(ids) == ids
        inspection.say("layer-numbering" if shifted else "order", told, "MoE layers in order, counted from 0")
    for i, layer in enumerate(layers):
        for g, device in enumerate(layer[DEVICES]):
            if device.get("device_id", g) != g:
                told = f"layer {i}: entry {g} of {DEVICES} has device_id {device['device_id']!r}"
                inspection.say("order", told, "devices in order, counted from 0")
                return
