"""CSV for people and spreadsheets: a line per slot, with ``layer,gpu,slot,expert``; -1 is an empty slot.

Any placement can be written. What the file cannot carry: where the placement comes from.
"""

from __future__ import annotations

from typing import IO

from moeplace.errors import InputError, Location, PlacementError
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import model_layers, number_absolute, placement_of
from moeplace.exporters.native import PlacementFile
from moeplace.placement import EMPTY

DESCRIPTION = "CSV of any placement: layer,gpu,slot,expert, -1 an empty slot (.csv)"
SUFFIXES = (".csv",)
FLAG = ""
HEAD = ("layer", "gpu", "slot", "expert")
STACK = Stack(name="csv", even=False, tolerated=("duplicate", "negative"))
MAX_INDEX = 1 << 20  # of GPUs and slots: a stray number must not ask for gigabytes


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write a line per slot, empty ones too."""
    lines = [",".join(HEAD)]
    for layer, gpus in zip(model_layers(document, target.model), document.placement.to_lists(), strict=True):
        lines += [f"{layer},{g},{s},{expert}" for g, gpu in enumerate(gpus) for s, expert in enumerate(gpu)]
    file.write(("\n".join(lines) + "\n").encode())


def sniff(data: bytes) -> bool:
    """Whether a file has the head."""
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].replace(b" ", b"").strip() == ",".join(HEAD).encode()


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read the lines, in any order; slots without a line are empty.

    Raises
    ------
    InputError, PlacementError
        A line that is not four integers, a slot told twice, or a broken placement.
    """
    return placement_of(check(data, name, target), name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file; a line that cannot be read is an error with its number."""
    cells: dict[tuple[int, int, int], int] = {}
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines()[1:], 2):
        if line.strip():
            layer, gpu, slot, expert = _values(line, name, number)
            if (layer, gpu, slot) in cells:
                what = f"layer {layer}, GPU {gpu}, slot {slot} stands here again"
                raise InputError(what, rule="a line for each slot", where=Location(file=name, line=number))
            cells[layer, gpu, slot] = expert
    if not cells:
        raise InputError("has no slots", rule=f"lines of {','.join(HEAD)} below the head", where=name)
    layers = sorted({layer for layer, _, _ in cells})
    gpus, width = (max(place[axis] for place in cells) + 1 for axis in (1, 2))
    if len(layers) * gpus * width > 4 * len(cells) + MAX_INDEX:
        raise PlacementError(f"GPUs to {gpus - 1}, slots to {width - 1}", rule="both are counted from 0", where=name)
    slots = [[[cells.get((i, g, s), EMPTY) for s in range(width)] for g in range(gpus)] for i in layers]
    inspection = Inspection(STACK, target)
    used = [[[expert for expert in gpu if expert != EMPTY] for gpu in layer] for layer in slots]
    inspection.nested(used, [f"layer {layer}" for layer in layers])
    inspection.slots = slots
    number_absolute(inspection, layers)
    return inspection


def _values(line: str, name: str, number: int) -> tuple[int, int, int, int]:
    parts = [part.strip() for part in line.split(",")]
    where = Location(file=name, line=number)
    try:
        layer, gpu, slot, expert = (int(part) for part in parts)
    except ValueError as error:
        raise InputError(f"{line[:60]!r}", rule=f"four integers: {','.join(HEAD)}", where=where) from error
    if not (0 <= layer < MAX_INDEX and 0 <= gpu < MAX_INDEX and 0 <= slot < MAX_INDEX and EMPTY <= expert < 2**15):
        raise InputError(f"{line[:60]!r}", rule="counted from 0; -1 is an empty slot", where=where)
    return layer, gpu, slot, expert
