"""SGLang's ``--init-expert-location``: ``physical_to_logical_map``, a row per layer of the model, dense ones too.

The loader (``sglang/srt/eplb/expert_location.py``, 0.5.23) passes the keys on as arguments, so that any other is a
TypeError; it compares neither rows nor width with the model. Rows of dense layers are filled with slot mod E, as the
server's own default is. A row cannot say how many GPUs there are, nor which rows have experts: ``--num-gpus`` and
``--model`` do. What the file cannot carry: empty slots, GPUs of different sizes, where the placement comes from.
"""

from __future__ import annotations

import importlib
import io
from typing import IO, Any

from moeplace.errors import InputError, Location, MissingExtraError
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import (
    an_object,
    flat_rows,
    model_layers,
    parse_json,
    placement_of,
    refuse,
    row_lines,
)
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "SGLang's --init-expert-location: physical_to_logical_map, a row per layer, dense ones too (.json, .pt)"
SUFFIXES = (".json", ".pt")
FLAG = "--init-expert-location FILE --ep-num-redundant-experts R"
KEY = "physical_to_logical_map"
STACK = Stack(
    name="SGLang 0.5.23",
    consequences={
        "unknown-key": "SGLang stops at start with TypeError: its loader takes no key but physical_to_logical_map",
        "loads": "SGLang makes a placement itself, by its --eplb-algorithm",
        "missing-key": "SGLang stops at start with NotImplementedError: Unknown init_expert_location format",
        "type": "SGLang stops at start: the map is turned into one tensor of integers",
        "ragged": "SGLang stops at start with ValueError: the map is turned into one tensor",
        "range": "SGLang stops at start with IndexError",
        "negative": "SGLang accepts it and counts from the end: -1 is silently the last expert",
        "missing": "SGLang stops with ZeroDivisionError under static dispatch (every all-to-all backend); under "
        "dynamic "
        "dispatch it accepts the file and that expert's tokens have nowhere to go",
        "duplicate": "SGLang accepts it, and the second copy on a GPU takes memory and serves nothing",
        "layer-count": "SGLang does not count rows: layers past the last one silently get the identity map, "
        "which is not "
        "where their weights are",
        "layer-numbering": "SGLang accepts it and gives every layer another layer's map: rows are layers of the model, "
        "dense ones included",
        "width": "SGLang does not compare the width with --ep-num-redundant-experts: weights and map disagree, and it "
        "crashes at the first token or answers wrongly",
        "indivisible": "SGLang stops at start with AssertionError: slots must divide by the expert-parallel size",
    },
)


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write compact JSON with a line per layer, or with suffix ``.pt`` what ``torch.save`` makes of the tensor."""
    rows = _rows(document, target)
    refuse(_inspected({KEY: rows}, target))
    if suffix == ".pt":
        torch = _torch("writing a .pt file")
        torch.save({KEY: torch.tensor(rows, dtype=torch.int64)}, file)
        return
    file.write(f'{{"{KEY}": {row_lines(rows)}}}\n'.encode())


def sniff(data: bytes) -> bool:
    """Whether a file is an object, or a PyTorch archive, with the map's name."""
    named = KEY.encode() in data
    return named and (data.lstrip().startswith(b"{") or (data.startswith(b"PK") and b"data.pkl" in data))


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read the map; without a model every row counts as an MoE layer.

    Raises
    ------
    InputError, PlacementError
        Neither JSON nor a PyTorch file, a broken map, or an unknown number of GPUs.
    MissingExtraError
        A ``.pt`` file, and PyTorch is not installed.
    """
    inspection, model = _inspected(_loaded(data, name), target), target.model
    if model and inspection.slots and len(inspection.slots) == model.num_layers:
        ids = model.moe_layer_ids
        inspection.slots, inspection.layer_ids = [inspection.slots[layer] for layer in ids], ids
    return placement_of(inspection, name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file."""
    return _inspected(_loaded(data, name), target)


def _rows(document: PlacementFile, target: Target) -> list[list[int]]:
    ids = model_layers(document, target.model)
    rows = dict(zip(ids, flat_rows(document, STACK), strict=True))
    width, experts = len(rows[ids[0]]), document.placement.num_experts
    dense = [slot % experts for slot in range(width)]
    return [rows.get(layer, dense) for layer in range(target.model.num_layers if target.model else ids[-1] + 1)]


def _inspected(value: Any, target: Target) -> Inspection:
    inspection = Inspection(STACK, target)
    if isinstance(value, dict) and "logical_count" in value and KEY not in value:
        inspection.say("loads", "holds logical_count, loads of experts, and no map", f"the map is {KEY}")
        return inspection
    if not an_object(value, inspection) or not inspection.keys(value, [KEY], [KEY], strict=True):
        return inspection
    rows = value[KEY]
    if not isinstance(rows, list) or not rows:
        inspection.say("type", f"{KEY} is not a list of rows", "a row per layer")
        return inspection
    inspection.flat(rows, [f"row {layer}" for layer in range(len(rows))])
    inspection.layer_ids = tuple(range(len(rows)))
    _check_layers(inspection, rows)
    return inspection


def _check_layers(inspection: Inspection, rows: list[Any]) -> None:
    model, count = inspection.target.model, len(rows)
    if model is None:
        return
    rule = f"a row for each of the {model.num_layers} layers of {model.name}, dense ones too"
    if count == model.num_moe_layers != model.num_layers:
        inspection.say("layer-numbering", f"{count} rows, those of the MoE layers alone", rule)
    elif count != model.num_layers:
        inspection.say("layer-count", f"{count} rows", rule)
    elif inspection.slots and count > model.num_moe_layers:
        # rows put down from 0 on, and the rest filled as dense rows are: right in number, wrong in place
        idle = [row == [slot % model.num_experts for slot in range(len(row))] for row in rows]
        dense = set(range(count)) - set(model.moe_layer_ids)
        if all(idle[model.num_moe_layers :]) and not all(idle[layer] for layer in dense):
            inspection.say(
                "layer-numbering", "the MoE layers' maps stand in the first rows, dense layers' included", rule
            )


def _loaded(data: bytes, name: str) -> Any:
    if not data.startswith(b"PK"):
        return parse_json(data, name)
    torch = _torch(f"{name} is a PyTorch file: reading it")
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        reason = str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
        raise InputError(f"is not a whole PyTorch file of tensors: {reason}", where=Location(file=name)) from error
    if not isinstance(value, dict):
        return value
    return {key: item.tolist() if hasattr(item, "tolist") else item for key, item in value.items()}


def _torch(what: str) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        hint = "pip install 'moeplace[torch]', or use a .json file, which SGLang takes as well"
        raise MissingExtraError(f"{what} needs torch, which is not installed", hint=hint) from error
