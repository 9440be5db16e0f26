"""The three tensors that DeepSeek's EPLB returns, as npz.

``physical_to_logical_map`` int64 [MoE layer, slot], ``logical_to_physical_map`` int64 [MoE layer, expert, most
copies], -1 where an expert has fewer, and ``expert_count`` int64 [MoE layer, expert]. Only the first has to be there
when it is read; the others are checked against it. What the file cannot carry: empty slots, GPUs of different sizes,
the number of GPUs (``--num-gpus``), layer numbers, where the placement comes from.
"""

from __future__ import annotations

import io
import zipfile
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import InputError, Location
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import flat_rows, model_layers, number_ordinals, placement_of, refuse
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "DeepSeek EPLB's three tensors: physical_to_logical_map, logical_to_physical_map, expert_count (.npz)"
SUFFIXES = (".npz",)
FLAG = "numpy.load(FILE): what rebalance_experts returns"
MAP, INVERSE, COUNT = "physical_to_logical_map", "logical_to_physical_map", "expert_count"
STACK = Stack(
    name="EPLB",
    tolerated=("duplicate",),
    consequences={
        "missing": "EPLB never makes such a map: that expert's tokens have nowhere to go",
        "duplicate": "EPLB itself can make such a map: the second copy on a GPU takes memory and serves nothing",
        "indivisible": "EPLB asserts that slots divide by GPUs",
        "inverse": "what reads one tensor sends tokens elsewhere than what reads the other",
    },
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of archive members, so that equal placements are equal files


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write the three tensors."""
    model_layers(document, target.model)
    rows = np.array(flat_rows(document, STACK), np.int64)
    arrays = {MAP: rows, **_derived(rows, document.placement.num_experts)}
    refuse(_inspected(arrays, target))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), content.getvalue(), zipfile.ZIP_DEFLATED)


def sniff(data: bytes) -> bool:
    """Whether a file is an archive with the map's array."""
    return data.startswith(b"PK") and f"{MAP}.npy".encode() in data


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read the map.

    Raises
    ------
    InputError, PlacementError
        Not such an archive, a broken map, or an unknown number of GPUs.
    """
    return placement_of(check(data, name, target), name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in (MAP, INVERSE, COUNT) if key in archive}
    except Exception as error:  # damaged archives raise almost anything
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise InputError(f"is not a whole npz file: {reason}", where=Location(file=name)) from error
    return _inspected(arrays, target)


def _derived(rows: npt.NDArray[np.int64], experts: int) -> dict[str, npt.NDArray[np.int64]]:
    """The other two tensors: slots of each expert, lowest first, and how many."""
    layers, width = rows.shape
    count = np.zeros((layers, experts), np.int64)
    np.add.at(count, (np.arange(layers)[:, None], rows), 1)
    order = np.argsort(rows, axis=1, kind="stable")
    expert = np.take_along_axis(rows, order, axis=1)
    first = np.cumsum(count, axis=1) - count
    rank = np.arange(width)[None] - np.take_along_axis(first, expert, axis=1)
    inverse = np.full((layers, experts, int(count.max())), -1, np.int64)
    inverse[np.arange(layers)[:, None], expert, rank] = order
    return {INVERSE: inverse, COUNT: count}


def _inspected(arrays: dict[str, npt.NDArray[Any]], target: Target) -> Inspection:
    inspection = Inspection(STACK, target)
    if not inspection.keys(arrays, (), (MAP,), strict=False):
        return inspection
    rows = arrays[MAP]
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in "iu":
        inspection.say("type", f"{MAP} of shape {rows.shape} and type {rows.dtype}", "integers [MoE layer, slot]")
        return inspection
    inspection.flat(rows.tolist(), [f"row {layer}" for layer in range(len(rows))])
    number_ordinals(inspection, len(rows))
    if not any(fault.kind in ("negative", "range") for fault in inspection.errors):
        _check_others(inspection, rows.astype(np.int64), arrays)
    return inspection


def _check_others(inspection: Inspection, rows: npt.NDArray[np.int64], arrays: dict[str, npt.NDArray[Any]]) -> None:
    for name, wanted in _derived(rows, inspection.num_experts).items():
        given = arrays.get(name)
        if given is None:
            continue
        # copies may come in any order, and the last axis may be wider than need be
        same = given.ndim == wanted.ndim and given.shape[:2] == wanted.shape[:2]
        if same and name == INVERSE:
            wide = max(given.shape[2], wanted.shape[2])
            given, wanted = (_sorted_to(wide, array) for array in (given, wanted))
        if not same or not np.array_equal(given, wanted):
            inspection.say("inverse", f"{name} does not say what {MAP} says", f"{name} follows from {MAP}")


def _sorted_to(width: int, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.sort(np.pad(array, ((0, 0), (0, 0), (0, width - array.shape[2])), constant_values=-1))
