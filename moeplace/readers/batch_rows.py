"""JSON Lines with one line per batch and layer: the experts of all tokens of the batch, and the rank of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._blocks import KeptBlocks
from moeplace.readers._columns import BlockBuilder, ColumnStream, tally
from moeplace.readers._common import NO_PHASE, BadRow, BadRows, Columns, Labels, ReaderOptions
from moeplace.readers._meta import Declared, Shape
from moeplace.readers._nested import collector_paused, ids_array, json_value, row_problem
from moeplace.trace import DECODE, MAX_EXPERTS

NAME = "batch-rows"
DESCRIPTION = "JSON Lines, one per batch and layer: layer, batch_id, topk_experts [token][k], optional origin_rows"

_RULE = 'a line is {"layer", "batch_id", "topk_experts": [[expert ids] per token], "origin_rows": [rank per token]}'
_NO_REQUEST = "request_id not given: each batch is taken as one request"
_DENSE = "layers {} are 0 for every token: taken as dense layers and left out"


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like lines of batches."""
    line = next((part for part in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if part.strip()), b"").lstrip()
    if not line.startswith(b"{") or b'"batch_id"' not in line or b'"layer"' not in line:
        return 0
    return 97 if b'"topk_experts"' in line or b'"origin_rows"' in line else 0


def open(source: InputFile, options: ReaderOptions) -> BatchStream:
    """Open lines of batches as a stream.

    Raises
    ------
    TraceError
        A line breaks the format, a batch lacks a layer, or the model disagrees.
    """
    return BatchStream(source, options)


@dataclass(frozen=True, slots=True)
class _Line:
    """One line: a batch's tokens in one layer."""

    number: int
    layer: int
    batch: int | str
    request: int | str | None
    experts: npt.NDArray[np.unsignedinteger[Any]]
    rows: npt.NDArray[np.int64] | None


class BatchStream(ColumnStream):
    """Batches in the order in which their last layer is met; memory is that of the batches still incomplete."""

    def __init__(self, source: InputFile, options: ReaderOptions) -> None:
        super().__init__(source, options, Shape(source.name, Declared(), options.model))
        self._file = source
        self._requests = Labels()
        self._line_bad = BadRows(options.skip_bad)
        self._lines = KeptBlocks(self._parsed, lambda line: int(line.experts.nbytes), self._keep_bytes)
        self._layers = self._scan_lines()
        self._start()

    def _names(self) -> dict[str, tuple[str, ...]]:
        return {"request_names": self._requests.names}

    def _scan_lines(self) -> dict[int, int]:
        """Walk the lines for the layers and the largest id; return the index of each layer that is kept."""
        used: dict[int, bool] = {}
        largest, top_k = 0, None
        for line in self._lines:
            if top_k is None:
                top_k = line.experts.shape[1]
                self._shape.set_top_k(top_k)
                self._per_request = line.request is not None
                self._stepped = not self._per_request or line.request != line.batch
                self._ranked = line.rows is not None
            most = int(line.experts.max(initial=0))
            used[line.layer] = used.get(line.layer, False) or most > 0
            largest = max(largest, most)
        routed = tuple(sorted(layer for layer, any_id in used.items() if any_id))
        if not routed:
            raise TraceError("holds no routed tokens", rule=_RULE, where=Location(file=self._file.name))
        dense = sorted(set(used) - set(routed))
        if dense:
            self._shape.assume(_DENSE.format(", ".join(map(str, dense[:12]))))
        self._shape.set_num_experts(min(largest, MAX_EXPERTS - 1))
        self._shape.set_layers(len(routed), routed)
        self._shape.assume(NO_PHASE)
        if not self._per_request:
            self._shape.assume(_NO_REQUEST)
        return {layer: i for i, layer in enumerate(routed)}

    def _parsed(self) -> Iterator[_Line]:
        bad = self._line_bad = BadRows(self._options.skip_bad)
        top_k: int | None = None
        with self._file.stream() as stream:
            for number, text in enumerate(stream, 1):
                if not text.strip():
                    continue
                try:
                    line = _line(text, number, self._file.name, top_k)
                except TraceError as exc:
                    tally(bad, exc, self._file.name)
                    continue
                top_k = top_k or line.experts.shape[1]
                yield line
        bad.check()

    def _rows(self) -> Iterator[Columns]:
        bad = self._row_bad = BadRows(self._options.skip_bad)
        builder, pending = BlockBuilder(self._options.block_bytes), _Pending(self._layers)
        next_position: dict[int, int] = {}
        for line in self._lines:
            if line.layer not in self._layers:
                continue
            try:
                batch = pending.add(line, self._file.name)
                columns = None if batch is None else self._columns(batch, next_position)
            except TraceError as exc:
                tally(bad, exc, self._file.name)
                continue
            block = None if columns is None else builder.add(columns)
            if block is not None:
                yield block
        for row in pending.incomplete(self._file.name):
            bad.add(row)
        self._row_bad = bad + self._line_bad
        self._row_bad.check()
        block = builder.rest()
        if block is not None:
            yield block

    def _columns(self, batch: list[_Line], next_position: dict[int, int]) -> Columns:
        first = batch[0]
        tokens = len(first.experts)
        label = first.request if self._per_request else first.batch
        numbers = self._requests.numbers([label]) if self._requests.accepts([label]) else None
        where = Location(file=self._file.name, line=first.number)
        if numbers is None or (self._ranked and first.rows is None):
            field = "request_id" if self._per_request else "batch_id"
            what = f"{field} {label!r}" if numbers is None else "no origin_rows"
            raise TraceError(what, rule="all lines have the fields of the first, of the same types", where=where)
        request = int(numbers[0])
        start = next_position.get(request, 0)
        next_position[request] = start + tokens
        columns: Columns = {
            "experts": np.stack([line.experts for line in batch], axis=1),
            "request": np.full(tokens, request, np.int64),
            "position": np.arange(start, start + tokens, dtype=np.int64),
            "phase": np.full(tokens, DECODE, np.uint8),
            "at_lines": np.tile(np.array([line.number for line in batch], np.int64), (tokens, 1)),
            "at_token": np.arange(tokens, dtype=np.int32),
        }
        if self._stepped and isinstance(first.batch, int):
            columns["step"] = np.full(tokens, first.batch, np.int64)
        if self._ranked and first.rows is not None:
            columns["rank"] = first.rows
        return columns

    def _place(self, columns: Columns, token: int, layer: int) -> Location:
        element = f"topk_experts[{int(columns['at_token'][token])}]"
        return Location(file=self._file.name, line=int(columns["at_lines"][token, layer]), element=element)


class _Pending:
    """Batches some of whose layers have been met."""

    def __init__(self, layers: dict[int, int]) -> None:
        self._layers = layers
        self._batches: dict[int | str, dict[int, _Line]] = {}
        self._done: set[int | str] = set()

    def add(self, line: _Line, file: str) -> list[_Line] | None:
        """Take a line in; return the lines of its batch by layer when it is complete."""
        where = Location(file=file, line=line.number)
        met = self._batches.setdefault(line.batch, {})
        if line.layer in met or line.batch in self._done:
            rule, hint = "one line per batch and layer", "are these several recordings in one file?"
            raise TraceError(f"batch {line.batch}, layer {line.layer} stands twice", rule=rule, hint=hint, where=where)
        first = next(iter(met.values()), line)
        if len(first.experts) != len(line.experts):
            what = f"{len(line.experts)} tokens, but line {first.number} has {len(first.experts)} of batch {line.batch}"
            raise TraceError(what, rule="all layers of a batch have the same tokens", where=where)
        met[line.layer] = line
        if len(met) < len(self._layers):
            return None
        del self._batches[line.batch]
        self._done.add(line.batch)
        return [met[layer] for layer in self._layers]

    def incomplete(self, file: str) -> Iterator[BadRow]:
        """Yield a bad row for each batch that never became complete."""
        for batch, met in self._batches.items():
            if met:
                lacking = [layer for layer in self._layers if layer not in met]
                shown = ", ".join(map(str, lacking[:8]))
                yield BadRow(
                    what=f"batch {batch}, which starts here, lacks {len(lacking)} layers: {shown}",
                    rule=f"every batch has a line for each of the {len(self._layers)} layers",
                    hint="was the recording cut off?",
                    where=Location(file=file, line=next(iter(met.values())).number),
                )


def _line(text: bytes, number: int, file: str, top_k: int | None) -> _Line:
    where = Location(file=file, line=number)
    with collector_paused():
        value = json_value(text, file, _RULE, number)
        if not isinstance(value, dict):
            raise TraceError(f"a JSON {type(value).__name__}", rule=_RULE, where=where)
        layer, batch, tokens = value.get("layer"), value.get("batch_id"), value.get("topk_experts")
        if type(layer) is not int or layer < 0:
            raise TraceError(f"layer {layer!r}", rule="layer is an integer of at least 0", where=where)
        if not _is_label(batch) or not (value.get("request_id") is None or _is_label(value["request_id"])):
            raise TraceError("batch_id or request_id of another type", rule="they are integers or strings", where=where)
        if not isinstance(tokens, list) or not tokens:
            raise TraceError("no topk_experts", rule=_RULE, where=where)
        ids = ids_array(tokens, text)
        if ids is None or ids.shape[1] != (top_k or ids.shape[1]):
            raise _token_problem(tokens, top_k, where)
    return _Line(number, layer, batch, value.get("request_id"), ids, _origins(value, len(tokens), where))


def _is_label(value: Any) -> TypeGuard[int | str]:
    return type(value) in (int, str)


def _token_problem(tokens: list[Any], top_k: int | None, where: Location) -> TraceError:
    width = top_k or (len(tokens[0]) if isinstance(tokens[0], list) else None)
    for i, row in enumerate(tokens):
        problem = row_problem(row, width)
        if problem is not None:
            what, rule, hint = problem
            place = Location(file=where.file, line=where.line, element=f"topk_experts[{i}]")
            return TraceError(what, rule=rule, hint=hint, where=place)
    return TraceError("topk_experts of another kind", rule=_RULE, where=where)


def _origins(value: dict[str, Any], tokens: int, where: Location) -> npt.NDArray[np.int64] | None:
    rows = value.get("origin_rows")
    if rows is None:
        return None
    if not isinstance(rows, list) or len(rows) != tokens or set(map(type, rows)) != {int}:
        place = Location(file=where.file, line=where.line, element="origin_rows")
        shown = f"{len(rows)} values" if isinstance(rows, list) else type(rows).__name__
        raise TraceError(shown, rule=f"one integer per token: {tokens}", where=place)
    return np.array(rows, np.int64)
