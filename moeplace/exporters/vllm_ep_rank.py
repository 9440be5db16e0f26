"""The file of vLLM pull request #34811 (``--expert-placement-file``, strategy ``custom``), which is not merged.

``{"expert_to_ep_rank": [rank of each expert]}``, the same for every layer. What the file cannot carry: copies, layers
that differ, empty slots, the order of slots (experts come sorted), the number of layers, where the placement comes
from.
"""

from __future__ import annotations

from typing import IO, Any

import numpy as np

from moeplace.errors import PlacementError
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import an_object, compact, filled, model_layers, parse_json, placement_of, refuse
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "vLLM PR #34811 (open), --expert-placement-file: the rank of each expert, alike in all layers (.json)"
SUFFIXES = (".json",)
FLAG = "--expert-placement-strategy custom --expert-placement-file FILE (with PR #34811)"
KEY = "expert_to_ep_rank"
STACK = Stack(
    name="vLLM PR #34811",
    consequences={
        "missing-key": "vLLM with PR #34811 stops at start: it has no map",
        "type": "vLLM with PR #34811 stops at start: ranks are integers",
        "width": "vLLM with PR #34811 has no copies of experts: redundant ones must be 0",
        "uneven": "vLLM makes as many experts on every rank, so weights and map disagree",
        "experts": "vLLM with PR #34811 has a rank for each expert or stops",
        "ranks": "vLLM has no such rank: the tokens of those experts have nowhere to go",
    },
)


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write the rank of each expert.

    Raises
    ------
    PlacementError
        Layers differ, or an expert has copies.
    """
    model_layers(document, target.model)
    slots = filled(document, STACK)
    hint = "--format vllm-mapping and vllm-expert-map carry copies and differing layers"
    if slots[0].size != document.placement.num_experts:
        what = f"{slots[0].size} slots for {document.placement.num_experts} experts"
        raise PlacementError(what, rule=f"{STACK.name} has one rank for each expert, no copies", hint=hint)
    ranks = np.empty((len(slots), slots[0].size), np.int64)
    np.put_along_axis(ranks, slots.reshape(len(slots), -1), np.arange(slots[0].size)[None] // slots.shape[2], axis=1)
    differs = np.flatnonzero((ranks != ranks[0]).any(axis=1))
    if differs.size:
        what = f"layer {document.layer_ids[differs[0]]} is placed otherwise than layer {document.layer_ids[0]}"
        raise PlacementError(what, rule=f"{STACK.name} places every layer alike", hint=hint)
    value = {KEY: ranks[0].tolist()}
    refuse(_inspected(value, target))
    file.write(f"{compact(value)}\n".encode())


def sniff(data: bytes) -> bool:
    """Whether a file is an object with such a key."""
    return data.lstrip().startswith(b"{") and f'"{KEY}"'.encode() in data


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read the ranks: as many layers as the model has, one without a model.

    Raises
    ------
    InputError, PlacementError
        Not JSON, or a broken map.
    """
    return placement_of(check(data, name, target), name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file."""
    return _inspected(parse_json(data, name), target)


def _inspected(value: Any, target: Target) -> Inspection:
    inspection = Inspection(STACK, target)
    if not an_object(value, inspection) or not inspection.keys(value, [KEY], [KEY], strict=False):
        return inspection
    ranks = value[KEY]
    if not isinstance(ranks, list) or not ranks or any(type(rank) is not int for rank in ranks):
        inspection.say("type", f"{KEY} is not a list of integers", "a rank for each expert")
        return inspection
    model = target.model
    if model and len(ranks) != model.num_experts:
        inspection.say("experts", f"{len(ranks)} ranks", f"one for each of the {model.num_experts} experts")
        return inspection
    gpus = target.num_gpus or max(ranks) + 1
    beyond = [expert for expert, rank in enumerate(ranks) if not 0 <= rank < gpus]
    if beyond:
        inspection.say("ranks", f"expert {beyond[0]} is on rank {ranks[beyond[0]]}", f"ranks lie in 0..{gpus - 1}")
        return inspection
    held: list[list[int]] = [[] for _ in range(gpus)]
    for expert, rank in enumerate(ranks):
        held[rank].append(expert)
    ids = model.moe_layer_ids if model else (0,)
    inspection.nested([held] * len(ids), [f"layer {layer}" for layer in ids])
    inspection.layer_ids = tuple(ids)
    return inspection
