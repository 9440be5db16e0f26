"""LMDeploy's expert statistics: loads of all layers, from which it makes the placement itself.

The loader (``lmdeploy/pytorch/nn/eplb.py``) takes a list [layer of the model][expert], asserts its shape, and runs
EPLB on it. ``moeplace solve --format lmdeploy`` writes the loads it counted. From a placement alone the numbers of
copies are written as loads: EPLB then makes exactly as many copies of each expert, and puts them where it likes. Rows
of dense layers are ones. What the file cannot carry: where any expert is. It cannot be read as a placement.
"""

from __future__ import annotations

import math
from typing import IO, Any

from moeplace.errors import InputError
from moeplace.exporters._faults import Inspection, Stack, Target, shown
from moeplace.exporters._maps import model_layers, parse_json, refuse, row_lines
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "LMDeploy's expert statistics: loads, a row per layer; it places the experts itself (.json)"
SUFFIXES = (".json",)
FLAG = "--enable-eplb with LMDEPLOY_EPLB_NUM_REDUNDANT_EXPERTS=R and LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE=FILE"
STACK = Stack(
    name="LMDeploy",
    consequences={
        "type": "LMDeploy stops at start: it makes one tensor of the loads",
        "ragged": "LMDeploy stops at start: it makes one tensor of the loads",
        "negative": "LMDeploy does not check it: its placement is balanced for a load that cannot be",
        "shape": "LMDeploy stops at start with AssertionError: it compares the shape with the model",
        "layer-count": "LMDeploy stops at start with AssertionError: it wants a row for each layer of the model",
        "layer-numbering": "LMDeploy stops at start with AssertionError: rows are layers of the model, dense "
        "ones included",
        "indivisible": "LMDeploy stops at start with AssertionError: slots must divide by the ranks",
        "no-load": "LMDeploy balances nothing in such a layer",
    },
)


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write the loads of a solved problem, or the numbers of copies of a placement."""
    placement = document.placement
    loads = placement.replicas() if document.load is None else document.load
    rows = dict(zip(model_layers(document, target.model), loads.tolist(), strict=True))
    count = target.model.num_layers if target.model else max(rows) + 1
    value = [rows.get(layer, [1] * placement.num_experts) for layer in range(count)]
    refuse(_inspected(value, target))
    file.write(f"{row_lines(value)}\n".encode())


def sniff(data: bytes) -> bool:
    """Never: loads are no placement."""
    return False


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Refuse: the file holds loads.

    Raises
    ------
    InputError
        Always.
    """
    raise InputError(
        "holds loads of experts, not where they are",
        rule="LMDeploy makes the placement itself, from these loads",
        hint="moeplace solve FILE --num-gpus G --solver eplb makes such a placement",
        where=name,
    )


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file."""
    return _inspected(parse_json(data, name), target)


def _inspected(value: Any, target: Target) -> Inspection:
    inspection, model = Inspection(STACK, target), target.model
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        inspection.say("type", f"the file is {shown(value)}", "a list of rows, one for each layer of the model")
        return inspection
    for layer, row in enumerate(value):
        odd = [item for item in row if type(item) not in (int, float) or not math.isfinite(item)]
        if odd:
            inspection.say("type", f"row {layer} holds {shown(odd[0])}", "loads are numbers")
            return inspection
    widths = {len(row) for row in value}
    if len(widths) > 1:
        inspection.say("ragged", f"rows of {min(widths)} to {max(widths)} experts", "rows of one length")
    elif model and widths != {model.num_experts}:
        inspection.say("shape", f"rows of {widths.pop()} experts", f"{model.name} has {model.num_experts}")
    if any(min(row) < 0 for row in value):
        inspection.say("negative", "a load is below 0", "loads are at least 0")
    if model and len(value) != model.num_layers:
        alone = len(value) == model.num_moe_layers
        rule = f"a row for each of the {model.num_layers} layers of {model.name}"
        inspection.say("layer-numbering" if alone else "layer-count", f"{len(value)} rows", rule)
    elif model and (idle := [layer for layer in model.moe_layer_ids if not any(value[layer])]):
        inspection.say("no-load", f"row {idle[0]} is all zeros", "an MoE layer has loads", level="warning")
    spare, gpus = target.num_redundant, target.num_gpus
    if model and gpus and spare is not None and (model.num_experts + spare) % gpus:
        told = f"{model.num_experts} experts and {spare} redundant ones on {gpus} GPUs"
        inspection.say("indivisible", told, "every GPU has as many slots")
    inspection.layer_ids = tuple(range(len(value)))
    return inspection
