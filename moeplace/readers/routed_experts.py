"""Routed experts that serving engines return with each request: SGLang's and vLLM's responses as JSON or JSONL.

SGLang sends base64 of raw int32 without a shape (``meta_info`` or ``sglext``), vLLM base64 of an ``.npy`` (per choice);
both are ``[token, layer, k]`` over all layers, dense ones as zeros. The last token of a request is never routed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import InputError, Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._columns import BlockBuilder, ColumnStream, tally, within
from moeplace.readers._common import NO_PHASE, BadRows, Columns, ReaderOptions
from moeplace.readers._meta import Declared, Shape
from moeplace.readers._responses import Routed, decoded, responses, routed_in
from moeplace.trace import DECODE, PREFILL

NAME = "routed-experts"
DESCRIPTION = (
    "Responses with routed_experts of SGLang (base64 int32, needs --model) or vLLM (base64 npy), JSON or JSONL"
)

_SAME_MODEL = "all responses are of one model"


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like responses with routed experts."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith((b"{", b"[")) or b'"routed_experts"' not in head:
        return 0
    engine = any(key in head for key in (b'"meta_info"', b'"sglext"', b'"choices"', b'"output_ids"'))
    return 96 if engine else 60


def open(source: InputFile, options: ReaderOptions) -> RoutedStream:
    """Open responses as a stream.

    Raises
    ------
    TraceError
        A response breaks the format, or the model disagrees with it.
    """
    return RoutedStream(source, options)


class RoutedStream(ColumnStream):
    """Requests in the order of the file, each named by its response's id; a bad response counts as one bad row."""

    def __init__(self, source: InputFile, options: ReaderOptions) -> None:
        super().__init__(source, options, Shape(source.name, Declared(), options.model))
        self._file = source
        self._request_names: dict[str, None] = {}  # in order, without repeats
        self._width: tuple[int, int] | None = None
        self._layers: npt.NDArray[np.int64] | None = None
        self._routed: npt.NDArray[np.bool_] = np.zeros(0, bool)
        self._start()

    def _names(self) -> dict[str, tuple[str, ...]]:
        return {"request_names": tuple(self._request_names)}

    def _rows(self) -> Iterator[Columns]:
        bad = self._row_bad = BadRows(self._options.skip_bad)
        builder, number = BlockBuilder(self._options.block_bytes), 0
        for line, response in responses(self._file):
            where = Location(file=self._file.name, line=line)
            try:
                entries = routed_in(response, where)
            except InputError as exc:
                tally(bad, exc, self._file.name)
                continue
            for entry in entries:
                try:
                    columns = self._columns(entry, number, where)
                except TraceError as exc:
                    tally(bad, exc, self._file.name)
                    continue
                self._name(entry, number)
                number += 1
                block = builder.add(columns)
                if block is not None:
                    bad.check()
                    yield block
        bad.check()
        block = builder.rest()
        if block is not None:
            yield block

    def _columns(self, entry: Routed, number: int, where: Location) -> Columns:
        where = within(where, "routed_experts")
        ids = decoded(entry.value, self._options.model, where)
        self._settle(ids.shape[1:], where)
        rows, total = len(ids), entry.total_tokens
        if total is not None and rows > total:
            what = f"{rows} tokens, but prompt_tokens + completion_tokens = {total}"
            raise TraceError(what, rule="at most one row per token", where=where)
        # a response may leave out the first tokens of the prompt
        first = 0 if total is None else max(0, total - 1 - rows)
        position = np.arange(first, first + rows, dtype=np.int64)
        phase = np.full(rows, DECODE, np.uint8)
        if entry.prompt_tokens is None:
            self._shape.assume(NO_PHASE)
        else:
            phase[position < entry.prompt_tokens] = PREFILL
        return {
            "experts": ids if self._options.model is None else ids[:, self._layers],
            "request": np.full(rows, number, np.int64),
            "position": position,
            "phase": phase,
            "at_line": np.full(rows, where.line or 0, np.int64),
            "at_row": np.arange(rows, dtype=np.int32),
        }

    def _settle(self, width: tuple[int, ...], where: Location) -> None:
        """Learn the layers and top-k of the first response, and hold the others to them."""
        layers, top_k = width
        if self._width is None:
            self._shape.where = where
            self._shape.set_top_k(top_k)
            model = self._options.model
            if model is not None:
                ids = model.moe_layer_ids
                if layers <= ids[-1] and layers != len(ids):
                    what = f"{layers} layers, but the MoE layers of model {model.name} are {ids[0]}..{ids[-1]}"
                    hint = "is --model the model that was recorded?"
                    raise TraceError(what, rule="a row per layer of the model", hint=hint, where=where)
                self._layers = np.array(ids if layers > ids[-1] else range(layers))
                self._shape.set_layers(len(ids), ids)
            self._width = (layers, top_k)
        if (layers, top_k) != self._width:
            what = f"{layers} layers of top-{top_k}, others have {self._width[0]} of top-{self._width[1]}"
            raise TraceError(what, rule=_SAME_MODEL, where=where)

    def _scan(self, columns: Columns) -> None:
        routed = np.asarray(columns["experts"].any(axis=(0, 2)))
        self._routed = np.asarray(self._routed | routed) if self._routed.size else routed

    def _settle_scan(self) -> None:
        """Drop the layers that are 0 for every token: without a model nothing else tells that they are dense."""
        if not self._routed.any():
            raise TraceError("all expert ids are 0", rule="dense layers are 0", where=Location(file=self._file.name))
        self._layers = np.flatnonzero(self._routed)
        dense = np.flatnonzero(~self._routed).tolist()
        if dense:
            shown = ", ".join(map(str, dense[:12]))
            self._shape.assume(f"layers {shown} are 0 for every token: taken as dense layers and left out")
        self._shape.set_layers(len(self._layers), self._layers.tolist())

    def _selected(self, columns: Columns) -> Columns:
        if self._options.model is not None or self._routed.all():
            return columns
        return columns | {"experts": columns["experts"][:, self._layers]}

    def _name(self, entry: Routed, number: int) -> None:
        """Name a request on the first walk; names are unique, so that a copy of the trace keeps requests apart."""
        if number < len(self._request_names):
            return
        name = wanted = entry.name or str(number)
        repeat = 1
        while name in self._request_names:
            repeat += 1
            name = f"{wanted} ({repeat})"
        self._request_names[name] = None

    def _place(self, columns: Columns, token: int, layer: int) -> Location:
        layer_id: Any = layer if self._layers is None else int(self._layers[layer])
        element = f"routed_experts[{int(columns['at_row'][token])}, {layer_id}]"
        return Location(file=self._file.name, line=int(columns["at_line"][token]) or None, element=element)
