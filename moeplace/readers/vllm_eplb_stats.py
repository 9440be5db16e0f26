"""vLLM's EPLB load statistics (JSONL): load per physical slot, mapped back to logical experts.

Each ``eplb_load_stats`` record holds ``expert_load`` [MoE layer, slot] and the ``p2l_map`` [MoE layer, slot] in force:
the load of expert e is the sum over the slots that hold e. Rows are ordinals of the MoE layers. The format is that of
the proposal vllm-project/vllm#41141; records of other types are ignored, as its own tools do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._common import ReaderOptions
from moeplace.readers._counts import checked_counts
from moeplace.readers._jsonl_batch import batches
from moeplace.readers._jsonl_rows import RowError, column_of, parse_line
from moeplace.trace import MAX_EXPERTS, Counts

NAME = "vllm-eplb-stats"
DESCRIPTION = "vLLM EPLB load statistics (JSONL): eplb_load_stats records with expert_load and p2l_map per slot"

_STATS, _META = "eplb_load_stats", "eplb_load_meta"
_VERSION = 1


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like EPLB load statistics."""
    return 97 if b'"eplb_load_' in head and b'"record_type"' in head else 0


def open(source: InputFile, options: ReaderOptions) -> Counts:
    """Read load statistics as counts; every record is a step.

    Raises
    ------
    TraceError
        A record breaks the format: names line and column.
    """
    reading = _Reading(file=source.name)
    with source.stream() as stream:
        for batch in batches(stream, source.name):
            for number, line in zip(batch.numbers, batch.lines, strict=True):
                try:
                    text, record = parse_line(line, batch.cut and number == batch.numbers[-1])
                    reading.take(text, record)
                except RowError as exc:
                    where = Location(file=source.name, line=number, column=exc.column)
                    raise TraceError(exc.what, rule=exc.rule, hint=exc.hint, where=where) from exc
    if not reading.steps:
        hint = "was the recording stopped before the first step?"
        raise TraceError(f"no {_STATS} record", hint=hint, where=Location(file=source.name))
    return reading.counts(options)


@dataclass(slots=True, kw_only=True)
class _Reading:
    """What has been read: slots' loads by step, and the notes that go with them."""

    file: str
    steps: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = field(default_factory=list)
    model: str | None = None
    num_experts: int | None = None
    redundant: int | None = None
    others: set[str] = field(default_factory=set)
    largest: int = -1

    def take(self, text: str, record: dict[str, Any]) -> None:
        """Take one record in."""
        kind = record.get("record_type")
        if kind not in (_STATS, _META):
            return
        version = record.get("version", _VERSION)
        if version != _VERSION:
            at = column_of(text, ["version"])
            raise RowError(f"version {version!r}", f"version is {_VERSION}", "a newer vLLM wrote it", at)
        model = record.get("model")
        if isinstance(model, str):
            self.model = self.model if self.model is not None else model
            if model != self.model:
                self.others.add(model)
                return
        if kind == _META:
            redundant = record.get("num_redundant_experts")
            self.redundant = redundant if type(redundant) is int and redundant >= 0 else None
            return
        load, slots = (_matrix(text, record, key) for key in ("expert_load", "p2l_map"))
        self._check(text, load, slots)
        self.largest = max(self.largest, int(slots.max()))
        self.steps.append((load, slots))

    def _check(self, text: str, load: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> None:
        if load.shape != slots.shape:
            what = f"p2l_map is {list(slots.shape)}, expert_load is {list(load.shape)}"
            raise RowError(what, "both are [MoE layer, slot]", None, column_of(text, ["p2l_map"]))
        if self.steps and load.shape[0] != self.steps[0][0].shape[0]:
            what, rule = f"{load.shape[0]} layers", f"as many as in the first record: {self.steps[0][0].shape[0]}"
            raise RowError(what, rule, None, column_of(text, ["expert_load"]))
        limit = MAX_EXPERTS if self.redundant is None else load.shape[1] - self.redundant
        for key, wrong, values, rule in (
            ("expert_load", load < 0, load, "loads are not negative"),
            ("p2l_map", (slots < -1) | (slots >= limit), slots, f"slots hold experts 0..{limit - 1}, or -1 for none"),
            ("expert_load", (slots < 0) & (load > 0), load, "a slot that holds no expert (-1) has no load"),
        ):
            if wrong.any():
                layer, slot = (int(i) for i in np.argwhere(wrong)[0])
                what = f"{key}[{layer}][{slot}] is {values[layer, slot]}"
                raise RowError(what, rule, None, column_of(text, [key, layer, slot]))

    def counts(self, options: ReaderOptions) -> Counts:
        """Add the slots' loads up by expert."""
        width = self.steps[0][0].shape[1]
        num_experts = self.largest + 1 if self.redundant is None else width - self.redundant
        num_layers = self.steps[0][0].shape[0]
        counts = np.zeros((len(self.steps), num_layers, num_experts), np.int64)
        for step, (load, slots) in enumerate(self.steps):
            layers, at = np.nonzero(slots >= 0)
            np.add.at(counts[step], (layers, slots[layers, at]), load[layers, at])
        notes = ["layers are numbered as vLLM does: ordinals of the MoE layers"]
        if self.others:
            left_out = ", ".join(sorted(self.others))
            notes.append(f"records of {left_out} are left out: the file is read for {self.model}, its first model")
        fields = {"layer_ids": range(num_layers), "model_id": self.model, "assumptions": notes}
        return checked_counts(counts, "expert_load", self.file, fields, options)


def _matrix(text: str, record: dict[str, Any], key: str) -> npt.NDArray[np.int64]:
    """Read one [layer, slot] field; name the element that is not an integer or makes rows unequal."""
    rule = f"{key} is [MoE layer][slot] integers"
    if key not in record:
        raise RowError(f"no {key}", rule)
    rows = record[key]
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], list) or not rows[0]:
        raise RowError(f"{key} is not a matrix", rule, None, column_of(text, [key]))
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(rows[0]):
            what = f"{key}[{i}] has {len(row) if isinstance(row, list) else 'no'} values"
            raise RowError(what, f"rows are equally long: {len(rows[0])}", None, column_of(text, [key, i]))
        if set(map(type, row)) != {int}:
            j = next((j for j, value in enumerate(row) if not _is_whole(value)), None)
            if j is not None:
                raise RowError(f"{key}[{i}][{j}] is {row[j]!r}", rule, None, column_of(text, [key, i, j]))
    try:
        return np.array(rows).astype(np.int64)
    except OverflowError as exc:
        raise RowError(f"{key} holds an integer beyond 64 bits", rule, None, column_of(text, [key])) from exc


def _is_whole(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and value.is_integer())
