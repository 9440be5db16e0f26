"""Per-request JSON: one file per request, a list of steps, the first the prompt and then one decode token each.

The layout of ``core12345/MoE_expert_selection_trace`` ("Patterns behind Chaos", arXiv 2510.05497). Requests come as
single files, as folders of them, and as tar archives of them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moeplace.errors import InputError, Location, TraceError
from moeplace.files import InputFile, InputFolder
from moeplace.readers._bundle import Bundle, first_document, is_tar
from moeplace.readers._columns import BlockBuilder, ColumnStream, tally
from moeplace.readers._common import BadRows, Columns, Labels, ReaderOptions
from moeplace.readers._meta import Declared, Shape
from moeplace.readers._steps import Request, parse_request
from moeplace.trace import DECODE, PREFILL

NAME = "steps-json"
DESCRIPTION = "Per-request JSON: a list of steps {layer: [[ids] per token] or null}; files, folders or tar archives"

_SNIFFED_FILES = 8
_STEPS = re.compile(rb'\[\s*\{\s*"\d+"\s*:\s*(null\s*[,}]|\[\s*(\[|\]))')


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like a request's steps, or a tar archive of them."""
    if is_tar(head):
        return 92 if _looks(first_document(head)) else 5
    return 92 if _looks(head) else 0


def sniff_folder(folder: Path) -> int:
    """Score how much one of a folder's first JSON files looks like a request's steps: a corpus may hold bad ones."""
    source = InputFolder(folder)
    for name in Bundle(source).names[:_SNIFFED_FILES]:
        with contextlib.suppress(InputError), source.open(name) as file:
            if _looks(file.head()):
                return 92
    return 0


def open(source: InputFile, options: ReaderOptions) -> StepsStream:
    """Open a request, or a tar archive of requests, as a stream.

    Raises
    ------
    TraceError
        The first request breaks the format, or the model disagrees with it.
    """
    return StepsStream(source, options)


def open_folder(folder: Path, options: ReaderOptions) -> StepsStream:
    """Open a folder of requests; the errors are those of :func:`open`."""
    return StepsStream(InputFolder(folder), options)


class StepsStream(ColumnStream):
    """Requests in the order of the folder or archive, numbered by their sorted relative paths.

    A request that breaks the format counts as one bad row. A request's domain is the folder that it lies in.
    """

    def __init__(self, source: InputFile | InputFolder, options: ReaderOptions) -> None:
        super().__init__(source, options, Shape(source.name, Declared(), options.model))
        self._bundle = Bundle(source)
        self._layers: tuple[int, ...] | None = None
        self._requests = Labels(self._bundle.names)
        self._domains = Labels()
        if self._bundle.names:
            self._domains.numbers([self._bundle.folder(name) for name in self._bundle.names])
        if self._bundle.ignored:
            shown = ", ".join(self._bundle.ignored[:3])
            self._shape.assume(f"{len(self._bundle.ignored)} files that are not JSON left out: {shown}")
        self._start()

    def _names(self) -> dict[str, tuple[str, ...]]:
        domains = self._domains.names
        return {"request_names": self._requests.names, "domains": () if domains == ("",) else domains}

    def _rows(self) -> Iterator[Columns]:
        bad = self._row_bad = BadRows(self._options.skip_bad)
        builder = BlockBuilder(self._options.block_bytes)
        for name, data in self._bundle.documents():
            try:
                if isinstance(data, InputError):
                    raise data
                request = parse_request(data, self._bundle.file(name))
                self._settle(request, name)
            except InputError as exc:
                tally(bad, exc, self._bundle.file(name))
                continue
            block = builder.add(self._columns(request, name))
            if block is not None:
                bad.check()
                yield block
        bad.check()
        block = builder.rest()
        if block is not None:
            yield block

    def _settle(self, request: Request, name: str) -> None:
        """Learn the layers and top-k from the first request, and hold the others to it."""
        top_k = request.experts.shape[2]
        where = Location(file=self._bundle.file(name))
        if self._layers is None:
            self._shape.where = where
            self._shape.set_top_k(top_k)
            self._shape.set_layers(len(request.layer_ids), request.layer_ids)
            self._layers = request.layer_ids
        rule, hint = "all requests are of one model", "keep the requests of each model in a folder of its own"
        if request.layer_ids != self._layers:
            known = f"{len(self._layers)} layers {self._layers[0]}..{self._layers[-1]}"
            what = (
                f"{len(request.layer_ids)} layers {request.layer_ids[0]}..{request.layer_ids[-1]}, others have {known}"
            )
            raise TraceError(what, rule=rule, hint=hint, where=where)
        if top_k != self._shape.top_k:
            what = f"top-{top_k}, others have top-{self._shape.top_k}"
            raise TraceError(what, rule=rule, hint=hint, where=where)

    def _columns(self, request: Request, name: str) -> Columns:
        tokens = len(request.experts)
        steps = request.steps
        columns: Columns = {
            "experts": request.experts,
            "request": np.full(tokens, self._number(self._requests, name), np.int64),
            "position": np.arange(tokens, dtype=np.int64),
            "phase": np.where(steps == 0, PREFILL, DECODE).astype(np.uint8),
            "at_step": steps,
        }
        folder = self._bundle.folder(name)
        if folder or self._domains.names not in ((), ("",)):
            columns["domain"] = np.full(tokens, self._number(self._domains, folder), np.int64)
        return columns

    def _number(self, labels: Labels, name: str) -> int:
        numbers = labels.numbers([name])
        return 0 if numbers is None else int(numbers[0])

    def _place(self, columns: Columns, token: int, layer: int) -> Location:
        request, step = columns["request"], int(columns["at_step"][token])
        same = (request == request[token]) & (columns["at_step"] == step)
        name = self._requests.names[request[token]]
        layer_id = self._layers[layer] if self._layers else layer
        element = f"step {step}, layer {layer_id}, token {token - int(same.argmax())}"
        return Location(file=self._bundle.file(name), element=element)


def _looks(head: bytes) -> bool:
    return _STEPS.match(head.removeprefix(b"\xef\xbb\xbf").lstrip()) is not None
