"""Megatron-LM's router tracer (JSONL): one record per step, layer and rank, with the top-k of each token.

``--moe-routing-trace-path`` leaves one ``router_trace_rank{r}.jsonl`` per rank, in the order of the steps. A record is
``{"step", "stage", "block": "decoder" | "mtp", "layer", "rank", "num_tokens", "topk", "top_indices": [[k ids]]}``
(``stage`` and ``block`` only in newer versions). Records of one layer and step that repeat are its micro-batches. The
tracer does not say which request a token belongs to.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile, InputFolder
from moeplace.readers._columns import BlockBuilder, ColumnStream
from moeplace.readers._common import NO_PHASE, BadRow, BadRows, Columns, ReaderOptions
from moeplace.readers._jsonl_batch import batches
from moeplace.readers._jsonl_rows import RowError, column_of, parse_line
from moeplace.readers._meta import Declared, Shape
from moeplace.readers._nested import collector_paused, ids_array, row_problem
from moeplace.trace import DECODE

NAME = "megatron-router"
DESCRIPTION = (
    "Megatron-LM router trace (JSONL): records of step, layer and rank with top_indices; folders of rank files"
)

_RANK_FILE = re.compile(r"router_trace_rank(\d+)\.jsonl(\.gz|\.zst)?")
_REQUESTS = "request ids not given: each recorded forward pass of a rank is taken as one request"
_MTP = "records of MTP layers are left out: they predict ahead and have layer numbers of their own"
_LAYERS_HINT = "pipeline stages number their layers from 0 each: give the ranks of one stage"
_WHOLE_NUMBERS = ("step", "layer", "rank")


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like a router trace."""
    keys = (b'"step"', b'"layer"', b'"rank"', b'"num_tokens"')
    line = head.lstrip().split(b"\n", 1)[0]
    return 96 if line.startswith(b"{") and all(key in line for key in keys) and b'"top' in line else 0


def sniff_folder(folder: Path) -> int:
    """Score how much a folder looks like the traces of several ranks."""
    return 95 if any(_RANK_FILE.fullmatch(path.name) for path in folder.iterdir()) else 0


def open(source: InputFile, options: ReaderOptions) -> RouterStream:
    """Open a rank's trace as a stream.

    Raises
    ------
    TraceError
        More records of the first block than may be skipped are bad.
    """
    return RouterStream(source, options)


def open_folder(folder: Path, options: ReaderOptions) -> RouterStream:
    """Open the traces of several ranks, one after another; the errors are those of :func:`open`."""
    return RouterStream(InputFolder(folder), options)


@dataclass(slots=True)
class _Step:
    """The records of one step of one rank: per layer, the micro-batches in order, each with its line."""

    step: int
    rank: int
    layers: dict[int, list[tuple[npt.NDArray[Any], int]]] = field(default_factory=dict)
    tainted: bool = False


class RouterStream(ColumnStream):
    """Forward passes of all ranks, rank by rank; passes that several ranks recorded alike are taken once."""

    repeated_hint = "padding does this: leave padding tokens out"

    def __init__(self, source: InputFile | InputFolder, options: ReaderOptions) -> None:
        super().__init__(source, options, Shape(source.name, Declared(), options.model))
        self._files = _rank_files(source) if isinstance(source, InputFolder) else [source.name]
        if not self._files:
            rule = "router_trace_rank*.jsonl per rank"
            raise TraceError("no trace of a rank", rule=rule, where=Location(file=source.name))
        self._names_of_files = [self._shown(name) for name in self._files]
        self._layers: tuple[int, ...] | None = None
        self._shape.assume(_REQUESTS)
        self._shape.assume(NO_PHASE)
        self._start()

    def _rows(self) -> Iterator[Columns]:
        bad = self._row_bad = BadRows(self._options.skip_bad)
        builder, seen, passes = BlockBuilder(self._options.block_bytes), set[bytes](), 0
        for number in range(len(self._files)):
            for step in self._steps(number, bad):
                bad.check()
                for columns in self._passes(step, number, bad):
                    content = hashlib.sha256(f"{step.step} {columns['experts'].shape}".encode())
                    content.update(np.ascontiguousarray(columns["experts"]).data)
                    if content.digest() in seen:
                        self._shape.assume("passes that several ranks recorded alike are taken once")
                        continue
                    if len(self._files) > 1:
                        seen.add(content.digest())
                    columns["request"] = np.full(len(columns["experts"]), passes, np.int64)
                    passes += 1
                    if block := builder.add(columns):
                        yield block
        if block := builder.rest():
            yield block

    def _place(self, columns: Columns, token: int, layer: int) -> Location:
        file = self._names_of_files[int(columns["at_file"][token])]
        element = f"top_indices[{int(columns['position'][token])}]"
        return Location(file=file, line=int(columns["at_line"][token, layer]), element=element)

    def _shown(self, name: str) -> str:
        return f"{self._source.name.rstrip('/')}/{name}" if isinstance(self._source, InputFolder) else name

    def _steps(self, number: int, bad: BadRows) -> Iterator[_Step]:
        """Group a rank's records by step; bad records taint the step they stand in."""
        source, current = self._source, None
        file = source.open(self._files[number]) if isinstance(source, InputFolder) else source
        with file.stream() as stream:
            for batch in batches(stream, file.name):
                for line_number, line in zip(batch.numbers, batch.lines, strict=True):
                    try:
                        record, ids = self._record(line, batch.cut and line_number == batch.numbers[-1])
                    except RowError as exc:
                        where = Location(file=file.name, line=line_number, column=exc.column)
                        bad.add(BadRow(what=exc.what, rule=exc.rule, hint=exc.hint, where=where))
                        if bad.full:
                            bad.check()
                        if current is not None:
                            current.tainted = True
                        continue
                    if record.get("block", "decoder") != "decoder":
                        self._shape.assume(_MTP)
                        continue
                    if current is not None and (record["step"], record["rank"]) != (current.step, current.rank):
                        yield current
                        current = None
                    current = current or _Step(record["step"], record["rank"])
                    current.layers.setdefault(record["layer"], []).append((ids, line_number))
        if current is not None:
            yield current

    def _record(self, line: bytes, cut: bool) -> tuple[dict[str, Any], npt.NDArray[Any]]:
        """Parse a record and its ids, or say what is wrong with it."""
        with collector_paused():
            text, record = parse_line(line, cut)
            for name in _WHOLE_NUMBERS:
                if type(record.get(name)) is not int or record[name] < 0:
                    at = column_of(text, [name]) if name in record else 1
                    raise RowError(f"{name} is {record.get(name)!r}", f"{name} is an integer", None, at)
            rows = record.get("top_indices")
            if not isinstance(rows, list) or not rows:
                at = column_of(text, ["top_indices"]) if "top_indices" in record else 1
                raise RowError("no top_indices", "top_indices is [[k ids] per token]", None, at)
            if record.get("num_tokens", len(rows)) != len(rows):
                what = f"{len(rows)} tokens, but num_tokens is {record['num_tokens']}"
                raise RowError(what, "one row of ids per token", None, column_of(text, ["top_indices"]))
            ids = ids_array(rows, line)
        top_k = self._shape.top_k
        if ids is None or (top_k is not None and ids.shape[1] != top_k):
            raise self._bad_ids(text, rows, top_k)
        if self._layers is None and top_k is None:
            self._shape.set_top_k(ids.shape[1])
        return record, ids

    def _bad_ids(self, text: str, rows: list[Any], top_k: int | None) -> RowError:
        known = top_k if top_k is not None or not isinstance(rows[0], list) else len(rows[0])
        for i, row in enumerate(rows):
            if (problem := row_problem(row, known)) is not None:
                what, rule, hint = problem
                return RowError(what, rule, hint, column_of(text, ["top_indices", i]))
        return RowError("rows of ids that cannot be joined", "top_indices is [[k ids] per token]")

    def _passes(self, step: _Step, file: int, bad: BadRows) -> Iterator[Columns]:
        """Put the layers of each micro-batch of a step together."""
        if step.tainted or not step.layers:
            return
        if self._layers is None:
            self._layers = tuple(sorted(step.layers))
            self._shape.set_layers(len(self._layers), self._layers)
        line = min(line for records in step.layers.values() for _, line in records)
        where = Location(file=self._names_of_files[file], line=line, column=1)
        if tuple(sorted(step.layers)) != self._layers:
            what = f"step {step.step} of rank {step.rank} has the layers {sorted(step.layers)}"
            rule = f"every step and rank has the layers of the first: {list(self._layers)}"
            bad.add(BadRow(what=what, rule=rule, hint=_LAYERS_HINT, where=where))
            return
        if len(counts := {len(records) for records in step.layers.values()}) != 1:
            what = f"step {step.step} of rank {step.rank} has {min(counts)} to {max(counts)} records per layer"
            hint = "was the recording cut off?"
            bad.add(BadRow(what=what, rule="every layer has every micro-batch", hint=hint, where=where))
            return
        for parts in zip(*(step.layers[layer] for layer in self._layers), strict=True):
            sizes = [len(ids) for ids, _ in parts]
            if len(set(sizes)) != 1:
                what = f"step {step.step} of rank {step.rank}: layers have {min(sizes)} to {max(sizes)} tokens"
                rule = "a forward pass has the same tokens in every layer"
                bad.add(BadRow(what=what, rule=rule, hint="was token dropping on?", where=where))
                continue
            experts = np.stack([ids for ids, _ in parts], axis=1)
            yield {
                "experts": experts,
                "position": np.arange(len(experts), dtype=np.int64),
                "step": np.full(len(experts), step.step, np.int64),
                "rank": np.full(len(experts), step.rank, np.int64),
                "phase": np.full(len(experts), DECODE, np.uint8),
                "at_file": np.full(len(experts), file, np.int32),
                "at_line": np.tile(np.array([line for _, line in parts], np.int64), (len(experts), 1)),
            }


def _rank_files(folder: InputFolder) -> list[str]:
    found = {int(match[1]): name for name in folder.files if (match := _RANK_FILE.fullmatch(name))}
    return [found[rank] for rank in sorted(found)]
