"""SGLang's expert-distribution recorder: dumps of the modes stat, stat_approx, per_pass and per_token.

A dump is a ``.pt`` file, or its JSON twin; per_pass and per_token write one per rank, which are read as a folder. Ids
of these two modes are physical slots and become logical experts through the dump's own map.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeplace.errors import InputError, Location, TraceError
from moeplace.files import InputFile, InputFolder
from moeplace.readers._columns import BlockBuilder, ColumnStream
from moeplace.readers._common import BadRows, Columns, ReaderOptions
from moeplace.readers._counts import checked_counts
from moeplace.readers._meta import Declared, Shape
from moeplace.readers._nested import json_value
from moeplace.readers._sglang import (
    MOVED_HINT,
    UNLINKED,
    Dump,
    logical_counts,
    logical_experts,
    recorded_layers,
    sequences,
    top_k_of,
)
from moeplace.readers._torch import is_pt, load_pt
from moeplace.trace import Counts, TraceStream

NAME = "sglang-recorder"
DESCRIPTION = "SGLang expert-distribution recorder: .pt (or JSON) of stat, per_pass or per_token; folders of rank files"

_RULE = "a recorder dump has logical_count, or records and last_physical_to_logical_map"
_RING = "the recorder's buffer is a ring: the order of its steps is not that of time"
_ENDINGS = (".pt", ".json", ".json.gz", ".json.zst")


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` (with the archive's member names) looks like a recorder dump."""
    if is_pt(head):
        if b"forward_pass_id" in head or b"average_utilization_rate" in head or b"last_physical_to_log" in head:
            return 92
        return 45 if b"logical_count" in head else 5 if head.startswith(b"PK") else 0
    return 92 if head.lstrip().startswith(b"{") and b'"records"' in head and b'"forward_pass_id"' in head else 0


def sniff_folder(folder: Path) -> int:
    """Score how much a folder's first ``.pt`` or JSON file looks like a recorder dump."""
    source = InputFolder(folder)
    names = [name for name in source.files if name.endswith(_ENDINGS)]
    if not names:
        return 0
    with contextlib.suppress(InputError), source.open(names[0]) as file:
        return sniff(file.head(), file.name)
    return 0


def open(source: InputFile, options: ReaderOptions) -> TraceStream | Counts:
    """Open a dump: per_token is a trace, the other modes are counts.

    Raises
    ------
    MissingExtraError
        PyTorch is not installed.
    TraceError
        A dump breaks its format, or the dumps of a folder are of several modes.
    """
    return _opened(source, options)


def open_folder(folder: Path, options: ReaderOptions) -> TraceStream | Counts:
    """Open the dumps of several ranks, summed per forward pass or one after another; errors as in :func:`open`."""
    return _opened(InputFolder(folder), options)


def _opened(source: InputFile | InputFolder, options: ReaderOptions) -> TraceStream | Counts:
    first = None
    for first in _dumps(source):
        if first.tells_mode:
            break
    if first is None:
        raise TraceError("no dump in the folder", rule="dumps end in .pt or .json", where=Location(file=source.name))
    if first.mode == "per_token":
        return PerTokenStream(source, options, first)
    if first.mode == "stat":
        counts, said = _concatenated(_dumps(source)), [_RING]
    else:
        counts, said = _summed_passes(_dumps(source)), []
    # rows are absolute layers; dense ones are never counted
    layers = np.flatnonzero(counts.any(axis=(0, 2)))
    if layers.size in (0, counts.shape[1]):
        layers = np.arange(counts.shape[1])
    else:
        said.append(
            f"{counts.shape[1] - layers.size} of {counts.shape[1]} layers hold no counts: taken as dense layers"
        )
    fields = {"layer_ids": layers, "assumptions": said or None}
    return checked_counts(counts[:, layers], first.counted, source.name, fields, options)


class PerTokenStream(ColumnStream):
    """The tokens of a per_token recording, pass by pass and rank by rank; ``step`` is the forward pass."""

    repeated_hint = MOVED_HINT

    def __init__(self, source: InputFile | InputFolder, options: ReaderOptions, first: Dump) -> None:
        declared = Declared(num_experts=first.num_experts)
        super().__init__(source, options, Shape(source.name, declared, options.model, first.where()))
        self._files: list[str] = []
        self._layers: npt.NDArray[np.int64] | None = None
        self._shape.assume(UNLINKED)
        self._start()

    def _rows(self) -> Iterator[Columns]:
        bad = self._row_bad = BadRows(self._options.skip_bad)
        builder, walk = BlockBuilder(self._options.block_bytes), _Walk()
        for dump in _dumps(self._source):
            dump.expect("per_token")
            if not dump.records:
                continue
            if not walk.is_new(dump):
                self._shape.assume(f"{dump.file} holds the same tokens as another rank: left out")
                continue
            walk.files.append(dump.file)
            self._files = walk.files
            if not self._settle(dump):
                continue
            for number in range(len(dump.records)):
                columns = self._columns(dump, number, walk)
                block = None if columns is None else builder.add(columns)
                if block is not None:
                    bad.check()
                    yield block
        block = builder.rest()
        if block is not None:
            yield block

    def _settle(self, dump: Dump) -> bool:
        """Learn the layers and top-k from the first dump with tokens, and hold the others to it."""
        layers = recorded_layers(dump)
        if not layers.size:
            return False
        if self._layers is None:
            self._layers = layers
            self._shape.set_top_k(top_k_of(dump, layers))
            self._shape.set_layers(len(layers), layers.tolist())
        if not np.array_equal(layers, self._layers) or dump.num_experts != self._shape.declared.num_experts:
            what = f"{len(layers)} MoE layers of {dump.num_experts} experts, others have {len(self._layers)} layers"
            raise TraceError(what, rule="all dumps are of one model", where=dump.where())
        return True

    def _columns(self, dump: Dump, number: int, walk: _Walk) -> Columns | None:
        layers = np.zeros(0, np.int64) if self._layers is None else self._layers
        experts, kept = logical_experts(dump, number, layers, self._shape.top_k or 1)
        if not kept.any():
            return None
        order, phase, positions, said = sequences(dump, number, kept)
        for sentence in said:
            self._shape.assume(sentence)
        record, tokens = dump.records[number], int(kept.sum())
        requests = walk.next_request + np.unique(order, return_inverse=True)[1]
        walk.next_request = int(requests.max()) + 1
        return {
            "experts": experts[kept],
            "request": requests.astype(np.int64),
            "position": positions,
            "phase": phase,
            "step": np.full(tokens, dump.integer(record, number, "forward_pass_id"), np.int64),
            "rank": np.full(tokens, dump.integer(record, number, "rank"), np.int64),
            "at_file": np.full(tokens, len(walk.files) - 1, np.int32),
            "at_record": np.full(tokens, number, np.int32),
            "at_token": np.flatnonzero(kept).astype(np.int32),
        }

    def _place(self, columns: Columns, token: int, layer: int) -> Location:
        record, row = int(columns["at_record"][token]), int(columns["at_token"][token])
        layer_id = layer if self._layers is None else int(self._layers[layer])
        element = f"records[{record}].topk_ids_of_layer[{layer_id}, {row}]"
        return Location(file=self._files[int(columns["at_file"][token])], element=element)


@dataclass(slots=True)
class _Walk:
    """What one walk over the dumps has met so far."""

    files: list[str] = field(default_factory=list)
    next_request: int = 0
    seen: set[bytes] = field(default_factory=set)

    def is_new(self, dump: Dump) -> bool:
        """True unless another rank recorded the same tokens: without data parallelism every rank sees all of them."""
        content = hashlib.sha256(np.ascontiguousarray(dump.slot_experts).data)
        for number, record in enumerate(dump.records):
            content.update(str(record.get("forward_pass_id")).encode())
            content.update(np.ascontiguousarray(dump.top_k_ids(number)).data)
        key = content.digest()
        new = key not in self.seen
        self.seen.add(key)
        return new


def _dumps(source: InputFile | InputFolder) -> Iterator[Dump]:
    if isinstance(source, InputFolder):
        for name in source.files:
            if name.endswith(_ENDINGS):
                with source.open(name) as file:
                    yield _dump(file)
    else:
        yield _dump(source)


def _dump(file: InputFile) -> Dump:
    if is_pt(file.head()):
        value = load_pt(file)
    else:
        with file.seekable() as stream:
            value = json_value(stream.read(), file.name, _RULE)
    if isinstance(value, dict) and "logical_count" in value:
        return Dump(file.name, value, "stat")
    if isinstance(value, dict) and isinstance(value.get("records"), list) and "last_physical_to_logical_map" in value:
        detailed = any(isinstance(record, dict) and "topk_ids_of_layer" in record for record in value["records"])
        return Dump(file.name, value, "per_token" if detailed else "per_pass")
    held = ", ".join(map(str, list(value)[:8])) if isinstance(value, dict) else type(value).__name__
    raise TraceError("is no recorder dump", rule=_RULE, hint=f"it holds {held}", where=Location(file=file.name))


def _concatenated(dumps: Iterator[Dump]) -> npt.NDArray[np.int64]:
    """Join the steps of stat dumps."""
    parts: list[npt.NDArray[np.int64]] = []
    for dump in dumps:
        dump.expect("stat")
        counts = dump.array("logical_count").astype(np.int64)
        counts = counts[None] if counts.ndim == 2 else counts
        if counts.ndim != 3 or (parts and counts.shape[1:] != parts[0].shape[1:]):
            rule = "logical_count is [step, layer, expert], of one model"
            raise TraceError(f"shape {list(counts.shape)}", rule=rule, where=dump.where("logical_count"))
        parts.append(counts)
    return np.concatenate(parts)


def _summed_passes(dumps: Iterator[Dump]) -> npt.NDArray[np.int64]:
    """Sum the counts of all ranks per forward pass."""
    passes: dict[int, npt.NDArray[np.int64]] = {}
    for dump in dumps:
        dump.expect("per_pass")
        for number, record in enumerate(dump.records):
            key, counts = dump.integer(record, number, "forward_pass_id"), logical_counts(dump, number)
            other = next(iter(passes.values()), counts)
            if other.shape != counts.shape:
                what = f"counts of shape {list(counts.shape)}, others are {list(other.shape)}"
                raise TraceError(what, rule="all dumps are of one model", where=dump.where(f"records[{number}]"))
            passes[key] = passes[key] + counts if key in passes else counts
        if not passes:
            raise TraceError("holds no passes", rule="at least one recorded pass", where=dump.where("records"))
    return np.stack([passes[key] for key in sorted(passes)])
