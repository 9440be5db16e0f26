"""Records of SGLang's expert-distribution recorder: physical slots to logical experts, passes to sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.readers._torch import to_numpy
from moeplace.trace import DECODE, PREFILL, IntArray

EXTEND, DECODE_PASS, MIXED, IDLE = 1, 2, 3, 4

UNLINKED = (
    "SGLang records forward passes, not requests: each sequence of a prefill pass and each token of a decode pass "
    "counts as a request of its own"
)
MOVED_HINT = (
    "the dump's map is the last one: experts that were moved while it recorded (--enable-eplb) cannot be told apart; "
    "record without moving them, or leave such tokens out with --skip-bad"
)
_SPECULATIVE = "passes of forward modes beyond prefill and decode are taken as decode, every token as a request"
_MIXED = "in passes that mix prefill and decode, sequences of one token after position 0 are taken as decode"


@dataclass(frozen=True)
class Dump:
    """One dump as it was saved, with its file's name."""

    file: str
    value: dict[str, Any]
    mode: Literal["stat", "per_pass", "per_token"]

    def where(self, element: str | None = None) -> Location:
        """Location of an element of the dump."""
        return Location(file=self.file, element=element)

    @property
    def tells_mode(self) -> bool:
        """False for a dump without records: a rank that was idle."""
        return self.mode == "stat" or bool(self.records)

    def expect(self, mode: str) -> None:
        """Refuse a dump of another mode than the first of its folder."""
        if self.mode != mode and (self.tells_mode or mode == "stat"):
            what, rule = f"a dump of mode {self.mode}", f"all dumps of a folder are of one mode, here {mode}"
            raise TraceError(what, rule=rule, where=self.where())

    @property
    def counted(self) -> str:
        """Name of the counts."""
        return "logical_count" if self.mode == "stat" else "global_physical_count"

    @property
    def records(self) -> list[dict[str, Any]]:
        """The recorded passes."""
        records: list[dict[str, Any]] = self.value["records"]
        return records

    @cached_property
    def slot_experts(self) -> npt.NDArray[np.int64]:
        """``[layer, physical slot]`` logical expert."""
        slots = self.array("last_physical_to_logical_map")
        if slots.ndim != 2 or not slots.size or (slots < 0).any():
            rule = "last_physical_to_logical_map is [layer, slot] of expert ids"
            raise TraceError(f"shape {list(slots.shape)}", rule=rule, where=self.where("last_physical_to_logical_map"))
        return slots.astype(np.int64)

    @cached_property
    def num_experts(self) -> int:
        """Logical experts per layer: all of them stand in the map."""
        return int(self.slot_experts.max()) + 1

    def array(self, key: str) -> IntArray:
        """A tensor of the dump."""
        return _integers(self.value[key], self.where(key))

    def integer(self, record: Any, number: int, key: str) -> int:
        """An integer of a record."""
        value = record.get(key) if isinstance(record, dict) else None
        if type(value) is not int:
            raise TraceError(f"{key} is {value!r}", rule=f"{key} is an integer", where=self.where(f"records[{number}]"))
        return value

    def top_k_ids(self, number: int) -> IntArray:
        """``[layer, token, width]`` physical slots of a record, -1 where there is none."""
        where, record = self.where(f"records[{number}].topk_ids_of_layer"), self.records[number]
        ids = _integers(record.get("topk_ids_of_layer") if isinstance(record, dict) else None, where)
        if ids.size == 0:
            return np.zeros((self.slot_experts.shape[0], 0, 1), np.int64)
        if ids.ndim != 3 or ids.shape[0] != self.slot_experts.shape[0]:
            rule = f"topk_ids_of_layer is [layer, token, k] with {self.slot_experts.shape[0]} layers as in the map"
            raise TraceError(f"shape {list(ids.shape)}", rule=rule, where=where)
        record["topk_ids_of_layer"] = ids  # lists of a JSON twin are converted once
        return ids


def logical_counts(dump: Dump, number: int) -> npt.NDArray[np.int64]:
    """``[layer, expert]`` counts of a record: those of an expert's slots summed."""
    slots, where = dump.slot_experts, dump.where(f"records[{number}].global_physical_count")
    record = dump.records[number]
    counts = _integers(record.get("global_physical_count") if isinstance(record, dict) else None, where)
    if counts.shape != slots.shape:
        what, rule = f"shape {list(counts.shape)}", f"one count per slot of the map: {list(slots.shape)}"
        raise TraceError(what, rule=rule, where=where)
    logical = np.zeros((len(slots), dump.num_experts), np.int64)
    np.add.at(logical, (np.arange(len(slots))[:, None], slots), counts)
    return logical


def recorded_layers(dump: Dump) -> npt.NDArray[np.int64]:
    """Layers with experts in some record: dense ones are all -1, or all 0 where the buffer was never written."""
    routed = np.zeros(dump.slot_experts.shape[0], bool)
    for number in range(len(dump.records)):
        ids = dump.top_k_ids(number)
        if ids.shape[1]:
            routed |= (ids > 0).any(axis=(1, 2)) | ((ids == 0).any(axis=(1, 2)) & (ids < 0).any(axis=(1, 2)))
    return np.flatnonzero(routed)


def top_k_of(dump: Dump, layers: npt.NDArray[np.int64]) -> int:
    """Experts per token: the most ids that a token has, as the recorder pads to a width of 8."""
    return max(int((dump.top_k_ids(i)[layers] >= 0).sum(axis=2).max(initial=0)) for i in range(len(dump.records)))


def logical_experts(
    dump: Dump, number: int, layers: npt.NDArray[np.int64], top_k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return ``[token, MoE layer, k]`` logical experts of a record, and which tokens are real.

    An expert that is missing is -1; a token without any is padding.
    """
    slots, physical = dump.slot_experts, dump.top_k_ids(number)[layers]
    outside = physical >= slots.shape[1]
    if outside.any():
        layer, token, i = (int(x) for x in np.argwhere(outside)[0])
        raise TraceError(
            f"slot {physical[layer, token, i]}",
            rule=f"physical slots lie in 0..{slots.shape[1] - 1}",
            hint="fused shared experts do this: record with --disable-shared-experts-fusion",
            where=dump.where(f"records[{number}].topk_ids_of_layer[{layers[layer]}, {token}, {i}]"),
        )
    experts = np.where(physical < 0, -1, slots[layers[:, None, None], np.maximum(physical, 0)])
    return experts[:, :, :top_k].transpose(1, 0, 2), np.asarray((physical >= 0).any(axis=(0, 2)))


def sequences(
    dump: Dump, number: int, kept: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], IntArray, Sequence[str]]:
    """Return the sequence number, phase and position of a record's real tokens, and what was assumed."""
    record, tokens = dump.records[number], len(kept)
    mode = dump.integer(record, number, "forward_mode")
    where = dump.where(f"records[{number}].positions")
    positions = _integers(record.get("positions"), where)
    if positions.shape != (tokens,):
        raise TraceError(f"{positions.size} positions", rule=f"one position per token: {tokens}", where=where)
    order, phase = np.arange(tokens), np.full(tokens, DECODE, np.uint8)
    said: list[str] = []
    if mode in (EXTEND, MIXED):
        order = _extended(dump, number, positions)
        phase[:] = PREFILL
        if mode == MIXED:
            said.append(_MIXED)
            phase[(np.bincount(order)[order] == 1) & (positions > 0)] = DECODE
    elif mode not in (DECODE_PASS, IDLE):
        said.append(_SPECULATIVE)
    return order[kept], phase[kept], positions[kept], said


def _extended(dump: Dump, number: int, positions: IntArray) -> npt.NDArray[np.int64]:
    """Number the sequences of a prefill pass by their lengths, or where positions start anew."""
    lengths = dump.records[number].get("extend_seq_lens")
    if lengths is None:
        return np.cumsum(np.diff(positions, prepend=positions[:1] - 1) != 1)
    where = dump.where(f"records[{number}].extend_seq_lens")
    sizes = _integers(lengths, where)
    if sizes.ndim != 1 or (sizes < 0).any() or sizes.sum() > len(positions):
        rule = f"lengths of sequences that add up to the {len(positions)} tokens of the pass"
        raise TraceError(f"{sizes.tolist()}"[:60], rule=rule, where=where)
    # what is left over is padding
    sizes = np.append(sizes, len(positions) - sizes.sum())
    return np.repeat(np.arange(len(sizes)), sizes)


def _integers(value: Any, where: Location) -> IntArray:
    try:
        array = np.asarray(to_numpy(value))
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in "iu" and array.size:
        shown = "nothing" if value is None else f"{type(value).__name__} of {array.dtype}"
        raise TraceError(f"{shown}", rule="a tensor of integers", where=where)
    return array if array.size else array.astype(np.int64)
