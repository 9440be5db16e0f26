"""The list of vLLM pull request #49572 (``eplb_config.initial_expert_map_path``), which is not merged.

JSON: a list of slots for all layers, or one list per MoE layer. Written is the latter. What the file cannot carry:
empty slots, GPUs of different sizes, the number of GPUs (``--num-gpus``), layer numbers, where the placement comes
from.
"""

from __future__ import annotations

from typing import IO, Any

from moeplace.exporters._faults import Inspection, Stack, Target, shown
from moeplace.exporters._maps import (
    flat_rows,
    model_layers,
    number_ordinals,
    parse_json,
    placement_of,
    refuse,
    row_lines,
)
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "vLLM PR #49572 (open), eplb_config.initial_expert_map_path: a list of slots per MoE layer (.json)"
SUFFIXES = (".json",)
FLAG = "--eplb-config.initial_expert_map_path FILE (with PR #49572)"
_STOPS = "vLLM with PR #49572 stops at start, as its author says: it checks "
STACK = Stack(
    name="vLLM PR #49572",
    consequences={
        "type": f"{_STOPS}that the file is a list of integers, or of such lists",
        "ragged": f"{_STOPS}the dimensions",
        "width": f"{_STOPS}the dimensions",
        "negative": f"{_STOPS}the range of ids",
        "range": f"{_STOPS}the range of ids",
        "missing": f"{_STOPS}that every expert is there",
        "duplicate": "vLLM accepts it, and the second copy on a GPU takes memory and serves nothing",
        "layer-count": f"{_STOPS}the dimensions",
        "layer-numbering": f"{_STOPS}the dimensions: rows are the MoE layers alone",
        "indivisible": "vLLM stops at start: slots must divide by the expert-parallel size",
    },
)


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write a list of rows, a line each."""
    model_layers(document, target.model)
    rows = flat_rows(document, STACK)
    refuse(_inspected(rows, target))
    file.write(f"{row_lines(rows)}\n".encode())


def sniff(data: bytes) -> bool:
    """Whether a file is a list of lists; the form for all layers has to be named."""
    return b"".join(data[:64].split()).startswith(b"[[")


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read either form.

    Raises
    ------
    InputError, PlacementError
        Not JSON, a broken map, or an unknown number of GPUs.
    """
    return placement_of(check(data, name, target), name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file."""
    return _inspected(parse_json(data, name), target)


def _inspected(value: Any, target: Target) -> Inspection:
    inspection = Inspection(STACK, target)
    if not isinstance(value, list) or not value:
        inspection.say("type", f"the file is {shown(value)}", "a list of slots, or one per MoE layer")
        return inspection
    rows, names = value, [f"row {layer}" for layer in range(len(value))]
    if not any(isinstance(row, list) for row in value):
        rows = [value] * (target.model.num_moe_layers if target.model else 1)
        names = ["the list"] * len(rows)
    inspection.flat(rows, names)
    number_ordinals(inspection, len(rows))
    return inspection
