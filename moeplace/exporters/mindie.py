"""MindIE-LLM's ``eplb.expert_map_file``: the form of vLLM-Ascend, with every key required.

The reader (``atb_llm/utils/moe_utils.py``) returns nothing, and the server its own placement, where a count or a key
is wrong. What the file cannot carry: empty slots, devices of different sizes, and a device that holds expert 0 alone,
which stands for one of the shared experts.
"""

from __future__ import annotations

from typing import IO

from moeplace.exporters._devices import has_lists, inspect_lists, write_lists
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import parse_json, placement_of
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "MindIE-LLM's eplb.expert_map_file: as vllm-ascend, every key and count required (.json)"
SUFFIXES = (".json",)
FLAG = '"eplb": {"level": 1, "expert_map_file": "FILE"} in the model\'s part of config.json'
_IGNORES = "MindIE silently ignores the file and keeps its default placement"
STACK = Stack(
    name="MindIE-LLM",
    tolerated=("unknown-key",),
    consequences={
        "missing-key": _IGNORES,
        "type": _IGNORES,
        "layer-count": _IGNORES,
        "layer-numbering": f"{_IGNORES}: it looks MoE layers up by layer_id, from 0",
        "gpu-count": _IGNORES,
        "order": "MindIE reads layer_id but takes devices by position: maps are swapped",
        "ragged": "MindIE makes as many slots in every layer: weights and map disagree",
        "uneven": "MindIE makes as many slots on every device: weights and map disagree",
        "missing": "MindIE does not check it: that expert's tokens have nowhere to go",
        "range": "MindIE does not check it: the slot loads weights that do not exist",
        "negative": "MindIE does not check it: the slot loads weights that do not exist",
        "duplicate": "MindIE does not check it: a device can hold an expert once, and the second slot is lost",
        "width": "MindIE takes the redundant experts from the file: they must be those the server is set up for",
        "shared": "MindIE takes a device that holds expert 0 alone for one of the shared experts",
    },
)


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write the lists, a line per layer, and our metadata in a key of its own."""
    write_lists(document, file, target, STACK)


def sniff(data: bytes) -> bool:
    """Whether a file has the form that MindIE and vLLM-Ascend share."""
    return has_lists(data)


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read a map.

    Raises
    ------
    InputError, PlacementError
        Not JSON, or a broken map.
    """
    return placement_of(check(data, name, target), name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file."""
    inspection = inspect_lists(parse_json(data, name), target, STACK, every_key=True)
    for i, layer in enumerate(inspection.slots or ()):
        if [0] in layer:
            told = f"layer {i}: device {layer.index([0])} holds expert 0 alone"
            inspection.say("shared", told, "a device of routed experts holds other experts too", level="warning")
            break
    return inspection
