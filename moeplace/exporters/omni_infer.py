"""omni-infer's placement pattern: 0 or 1 by rank, MoE layer and expert.

The loader (``omni_planner/expert_mapping.py``) checks the shape and not the coverage. Ranks and layers may hold
different numbers of experts. What the file cannot carry: the order of slots (experts come sorted), empty slots, two
copies of an expert on a rank, layer numbers, where the placement comes from. Read is also an ``.npz`` with the array
``placement``.
"""

from __future__ import annotations

import io
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import InputError, Location, PlacementError
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import model_layers, number_ordinals, placement_of, refuse
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "omni-infer's pattern_path: 0 or 1 [rank, MoE layer, expert] (.npy)"
SUFFIXES = (".npy",)
FLAG = "pattern_path: FILE in the placement config.yaml"
MEMBER = "placement"
STACK = Stack(
    name="omni-infer",
    even=False,
    consequences={
        "type": "omni-infer stops at start: a pattern has three axes",
        "shape": "omni-infer stops at start: it compares the shape with ranks, MoE layers and experts",
        "gpu-count": "omni-infer stops at start: it compares the first axis with the ranks",
        "layer-count": "omni-infer stops at start: it compares the second axis with the MoE layers",
        "layer-numbering": "omni-infer stops at start: the second axis is the MoE layers alone",
        "values": "omni-infer takes any number for a copy: the slots it counts are not those of its weights",
        "missing": "omni-infer does not check it: that expert's tokens have nowhere to go",
    },
)


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write the pattern as int32.

    Raises
    ------
    PlacementError
        A GPU holds an expert twice.
    """
    model_layers(document, target.model)
    pattern = document.placement.copies().transpose(1, 0, 2).astype(np.int32)
    if pattern.max() > 1:
        layer, gpu, expert = document.placement.duplicates()[0]
        what = f"GPU {gpu} holds expert {expert} of layer {document.layer_ids[layer]} twice"
        raise PlacementError(what, rule="a pattern says 0 or 1", hint="solve again: no solver of moeplace does that")
    refuse(_inspected(pattern, target))
    np.save(file, pattern, allow_pickle=False)


def sniff(data: bytes) -> bool:
    """Whether a file is an array, or an archive with the array ``placement``."""
    return data.startswith(b"\x93NUMPY") or (data.startswith(b"PK") and f"{MEMBER}.npy".encode() in data)


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read a pattern; experts of a rank come sorted.

    Raises
    ------
    InputError, PlacementError
        Not an array, or a broken pattern.
    """
    return placement_of(check(data, name, target), name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file."""
    try:
        value = np.load(io.BytesIO(data), allow_pickle=False)
        array = value if isinstance(value, np.ndarray) else value[MEMBER]
    except Exception as error:  # damaged archives raise almost anything
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise InputError(f"is not a whole NumPy array: {reason}", where=Location(file=name)) from error
    return _inspected(array, target)


def _inspected(pattern: npt.NDArray[Any], target: Target) -> Inspection:
    inspection, model = Inspection(STACK, target), target.model
    if pattern.ndim != 3 or 0 in pattern.shape or pattern.dtype.kind not in "iub":
        rule = "integers [rank, MoE layer, expert]"
        inspection.say("type", f"an array of shape {pattern.shape} and type {pattern.dtype}", rule)
        return inspection
    odd = np.argwhere((pattern != 0) & (pattern != 1))
    if odd.size:
        rank, layer, expert = (int(i) for i in odd[0])
        told = f"rank {rank}, layer {layer}, expert {expert}: {pattern[rank, layer, expert]}"
        inspection.say("values", told, "0 or 1")
        return inspection
    ranks, layers, experts = pattern.shape
    if model and experts != model.num_experts:
        inspection.say("shape", f"{experts} experts", f"{model.name} has {model.num_experts}")
        return inspection
    held = [[np.flatnonzero(pattern[g, i]).tolist() for g in range(ranks)] for i in range(layers)]
    inspection.nested(held, [f"layer {i}" for i in range(layers)])
    if not model and (lacking := np.argwhere(~pattern.any(axis=0))).size and inspection.num_experts < experts:
        # without a model the highest id counts the experts, but here the shape does
        layer, expert = (int(i) for i in lacking[0])
        inspection.say("missing", f"layer {layer} lacks expert {expert}", "every expert of every layer is in a slot")
    number_ordinals(inspection, layers)
    return inspection
