"""Between placements and the rows of serving stacks: slots cut by GPU, layers numbered, metadata kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import InputError, Location, PlacementError
from moeplace.exporters._faults import Inspection, Stack, shown
from moeplace.exporters.native import PlacementFile
from moeplace.model import ModelSpec
from moeplace.placement import EMPTY, Placement

METADATA = "moeplace"  # the one key of ours, in formats that ignore what they do not know
PROVENANCE = ("seed", "solver", "trace_digest", "version")


def parse_json(data: bytes, name: str) -> Any:
    """Read JSON; any damage is an error with its place."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        where = Location(file=name, line=getattr(error, "lineno", None), column=getattr(error, "colno", None))
        what = "not JSON" if isinstance(error, UnicodeDecodeError) else f"not JSON: {getattr(error, 'msg', error)}"
        raise InputError(what, rule="the file is JSON", where=where) from error


def compact(value: Any) -> str:
    """JSON without spaces, keys in the order given."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def row_lines(rows: Sequence[Any]) -> str:
    """A JSON list with a line for each row."""
    return "[\n" + ",\n".join(compact(row) for row in rows) + "\n]"


def filled(document: PlacementFile, stack: Stack) -> npt.NDArray[np.int64]:
    """``[MoE layer, GPU, slot]`` ids of a placement without empty slots.

    Raises
    ------
    PlacementError
        A slot is empty: the stack has as many slots on every GPU and an expert in each.
    """
    placement = document.placement
    used = placement.used_slots()
    if (placement.slots != EMPTY).all():
        return placement.slots.astype(np.int64)
    experts, gpus = placement.num_experts, placement.num_gpus
    spare = -(-int(used.sum(axis=1).max()) // gpus) * gpus - experts
    hint = f"moeplace solve … --num-redundant-experts {spare}, or another --format (native and csv take any placement)"
    rule = f"{stack.name} has as many slots on every GPU and an expert in each"
    layer, low, high = document.layer_ids[int(used.min(axis=1).argmin())], int(used.min()), int(used.max())
    if low == high:
        raise PlacementError(f"{placement.max_slots - low} slots of every GPU are empty", rule=rule, hint=hint)
    what = f"GPUs hold {low} to {high} experts (layer {layer}: GPU {int(used.min(axis=0).argmin())} holds the fewest)"
    raise PlacementError(what, rule=rule, hint=hint)


def flat_rows(document: PlacementFile, stack: Stack) -> list[list[int]]:
    """``[MoE layer][slot]``: slot p on GPU p // (slots per GPU)."""
    slots = filled(document, stack)
    rows: list[list[int]] = slots.reshape(len(slots), -1).tolist()
    return rows


def model_layers(document: PlacementFile, model: ModelSpec | None) -> tuple[int, ...]:
    """The model's own number of each layer of a placement.

    A placement made from a trace that numbers MoE layers from 0 takes the model's numbers.

    Raises
    ------
    PlacementError
        The placement is not of this model: other layers, or other experts.
    """
    if model is None:
        return document.layer_ids
    placement, ids = document.placement, model.moe_layer_ids
    if placement.num_experts != model.num_experts or placement.num_layers != len(ids):
        raise PlacementError(
            f"the placement has {placement.num_layers} layers of {placement.num_experts} experts",
            rule=f"{model.name} has {len(ids)} MoE layers of {model.num_experts} experts",
            hint="--model names the model the placement was made for",
        )
    if document.layer_ids not in (ids, tuple(range(len(ids)))):
        wrong = next(i for i, (a, b) in enumerate(zip(document.layer_ids, ids, strict=True)) if a != b)
        raise PlacementError(
            f"layer {document.layer_ids[wrong]} of the placement stands where {model.name} has layer {ids[wrong]}",
            rule=f"layers of a placement are numbered as in the model, or from 0 to {len(ids) - 1}",
            hint="--model names the model the placement was made for",
        )
    return ids


def metadata_of(document: PlacementFile) -> dict[str, Any]:
    """What is kept of a placement where a format ignores what it does not know."""
    told = document.details.get("provenance")
    provenance = {key: told[key] for key in PROVENANCE if key in told} if isinstance(told, Mapping) else {}
    model = document.details.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    return {
        "layer_ids": list(document.layer_ids),
        "model": name if isinstance(name, str) else None,
        "num_experts": document.placement.num_experts,
        "num_gpus": document.placement.num_gpus,
        "provenance": provenance,
    }


def take_metadata(inspection: Inspection, value: Any) -> None:
    """Take up what :func:`metadata_of` kept, where it is whole."""
    if not isinstance(value, dict):
        return
    if isinstance(value.get("model"), str):
        inspection.details["name"] = value["model"]
    if isinstance(value.get("provenance"), dict):
        inspection.details["provenance"] = value["provenance"]
    ids = value.get("layer_ids")
    if isinstance(ids, list) and all(type(number) is int for number in ids):
        inspection.details["layer_ids"] = tuple(ids)


def number_ordinals(inspection: Inspection, count: int) -> None:
    """Number rows that are the MoE layers in order, and check their count."""
    model, told = inspection.target.model, inspection.details.get("layer_ids", ())
    if model and count != model.num_moe_layers:
        rule = f"a row for each of the {model.num_moe_layers} MoE layers of {model.name}"
        kind = "layer-numbering" if count == model.num_layers else "layer-count"
        what = f"{count} rows" + (", one for each layer, dense ones too" if kind == "layer-numbering" else "")
        inspection.say(kind, what, rule)
    if model and count == model.num_moe_layers:
        inspection.layer_ids = model.moe_layer_ids
    else:
        inspection.layer_ids = told if len(told) == count else tuple(range(count))


def number_absolute(inspection: Inspection, ids: Sequence[int]) -> None:
    """Take layer ids that should be the model's own numbers of its MoE layers, and check them."""
    inspection.layer_ids = tuple(ids)
    model = inspection.target.model
    if model is None or tuple(sorted(ids)) == model.moe_layer_ids:
        return
    from_zero = sorted(ids) == list(range(model.num_moe_layers))
    rule = f"the MoE layers of {model.name} are {_span(model.moe_layer_ids)}"
    if from_zero:
        inspection.say("layer-numbering", f"MoE layers are numbered from 0: {_span(tuple(sorted(ids)))}", rule)
        return
    lacking = sorted(set(model.moe_layer_ids) - set(ids))
    extra = sorted(set(ids) - set(model.moe_layer_ids))
    if lacking:
        inspection.say("layer-count", f"{len(ids)} layers, none for {_span(tuple(lacking))}", rule)
    if extra:
        inspection.say("layer-numbering", f"a map for {_span(tuple(extra))}, which has no experts to place", rule)


def refuse(inspection: Inspection, name: str | None = None, *, tolerated: Sequence[str] = ()) -> None:
    """Raise the first error of an inspection, and say how many there are.

    Raises
    ------
    PlacementError
        There is an error of a kind that is not ``tolerated``.
    """
    errors = [fault for fault in inspection.errors if fault.kind not in tolerated]
    if not errors:
        return
    first, stack = errors[0], inspection.stack
    more = f"; {len(errors) - 1} more" if len(errors) > 1 else ""
    hint = f"{first.consequence}{'; ' if first.consequence else ''}moeplace check tells all{more}"
    raise PlacementError(first.what, rule=f"{first.rule} ({stack.name})", hint=hint, where=name)


def placement_of(inspection: Inspection, name: str) -> PlacementFile:
    """Make a placement of what an inspection found.

    Raises
    ------
    PlacementError
        The file breaks a rule that a placement needs.
    InputError
        The file does not say how many GPUs there are, and nothing else does.
    """
    target, slots = inspection.target, inspection.slots
    refuse(inspection, name, tolerated=inspection.stack.tolerated)
    if not inspection.cut and target.num_gpus is None:
        raise InputError(
            "does not say how many GPUs its slots are on",
            rule="slot p of a layer is on GPU p // (slots per GPU)",
            hint="give --num-gpus",
            where=name,
        )
    if not slots:
        raise PlacementError("has no layers", rule="at least one MoE layer", where=name)
    try:
        placement = Placement.from_lists(slots, inspection.num_experts)
    except PlacementError as error:
        raise PlacementError(error.what, rule=error.rule, hint=error.hint, where=name) from error
    told = inspection.details
    model_name = target.model.name if target.model else told.get("name")
    model = {"num_experts": placement.num_experts, "num_moe_layers": placement.num_layers}
    details: dict[str, Any] = {"model": model if model_name is None else {"name": model_name, **model}}
    if told.get("provenance"):
        details["provenance"] = told["provenance"]
    return PlacementFile(placement=placement, layer_ids=inspection.layer_ids, details=details)


def an_object(value: Any, inspection: Inspection) -> bool:
    """Whether a file's value is an object; a fault where it is not."""
    if isinstance(value, dict):
        return True
    inspection.say("type", f"the file is {shown(value)}", "an object with keys")
    return False


def _span(ids: Sequence[int]) -> str:
    """``3 to 60`` of consecutive numbers, else the first few."""
    if len(ids) == 1:
        return f"layer {ids[0]}"
    if tuple(ids) == tuple(range(ids[0], ids[-1] + 1)):
        return f"{ids[0]} to {ids[-1]}"
    return ", ".join(map(str, ids[:4])) + (f", … {ids[-1]}" if len(ids) > 4 else "")
