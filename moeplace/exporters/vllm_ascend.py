"""vLLM-Ascend's ``expert_map_path``: experts by device, MoE layers in order.

The reader (``vllm_ascend/eplb/core/eplb_utils.py``, 0.23.0) goes by the position in the lists and ignores keys it
does not know, so that where the placement comes from stays with it. Copies of an expert must sit on distinct devices:
it silently loses a slot otherwise. What the file cannot carry: empty slots, devices of different sizes.
"""

from __future__ import annotations

from typing import IO

from moeplace.exporters._devices import has_lists, inspect_lists, write_lists
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import parse_json, placement_of
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "vLLM-Ascend's eplb_config.expert_map_path: device_expert lists, MoE layers from 0 (.json)"
SUFFIXES = (".json",)
FLAG = """--additional-config '{"eplb_config": {"expert_map_path": "FILE"}}'"""
STACK = Stack(
    name="vLLM-Ascend 0.23.0",
    tolerated=("unknown-key",),
    consequences={
        "missing-key": "vLLM-Ascend stops at start with KeyError",
        "type": "vLLM-Ascend stops at start: it makes one tensor of the lists",
        "ragged": "vLLM-Ascend derives the redundant experts from the file, one number for all layers",
        "uneven": "vLLM-Ascend stops at start: all devices of a layer hold as many experts",
        "gpu-count": "vLLM-Ascend goes by position: ranks past the last device have no experts",
        "range": "vLLM-Ascend stops at start with IndexError",
        "negative": "vLLM-Ascend counts from the end: -1 is silently the last expert",
        "missing": "vLLM-Ascend stops only if the expert is not the last one; the last one's tokens then have "
        "nowhere to go",
        "duplicate": "vLLM-Ascend silently loses the slot and shifts the numbers of all later ones: tokens go to "
        "wrong experts",
        "layer-count": "vLLM-Ascend stops with Invalid EPLB Table at the first layer that is not there, or takes "
        "the default "
        "map where it is the next one",
        "layer-numbering": "vLLM-Ascend goes by position in layer_list: every layer gets another layer's map",
        "order": "vLLM-Ascend goes by position in the lists and does not read layer_id and device_id: maps are swapped",
        "width": "vLLM-Ascend stops at start where num_redundant_experts is set and is not what the file holds",
    },
)


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write the lists, a line per layer, and our metadata in a key of its own."""
    write_lists(document, file, target, STACK)


def sniff(data: bytes) -> bool:
    """Whether a file is an object with lists of experts by device."""
    return has_lists(data)


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read a map, also one that a server recorded.

    Raises
    ------
    InputError, PlacementError
        Not JSON, or a broken map.
    """
    return placement_of(check(data, name, target), name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file."""
    return inspect_lists(parse_json(data, name), target, STACK)
