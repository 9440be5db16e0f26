"""Some requests of a folder or archive of one file per request, to be read wherever it suits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from moeplace.errors import InputError, UnreadableError
from moeplace.parts import TOKENS_PER_FILE, BadFile, Chunk, PartTokens
from moeplace.readers._bundle import Document, printable, read_document
from moeplace.readers._common import Columns, frozen_columns
from moeplace.readers._nested import collector_paused
from moeplace.readers._request import Request, RequestParser, RequestShape
from moeplace.trace import DECODE, PREFILL, Trace, TraceMeta, assembled, id_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFile:
    """One request of a part.

    Attributes
    ----------
    document
        Where it is.
    shown
        What errors call it.
    place
        Its place in the recorded order.
    request, domain
        Its numbers in the whole trace; the domain is None where there are none.
    chunk
        Number of the stretch of the trace that it belongs to.
    """

    document: Document
    shown: str
    place: int
    request: int
    domain: int | None
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPart:
    """Requests of a folder or archive.

    Attributes
    ----------
    parse
        How a file is read.
    source
        The folder or archive.
    requests
        What the part holds, in recorded order.
    shape
        What every request is held to.
    meta
        The whole trace's, without names; with too many experts where their number is not known yet.
    """

    parse: RequestParser
    source: str
    requests: tuple[RequestFile, ...]
    shape: RequestShape
    meta: TraceMeta

    @property
    def files(self) -> tuple[int, ...]:
        """Places of the files in the recorded order."""
        return tuple(file.place for file in self.requests)

    def read(self) -> PartTokens:
        """Read the files. Memory: that of the ids, and of one file's JSON."""
        with collector_paused():
            return self._read()

    def _read(self) -> PartTokens:
        bad: list[BadFile] = []
        chunks: list[Chunk] = []
        for number, files in groupby(self.requests, key=lambda file: file.chunk):
            read: list[tuple[RequestFile, Request]] = []
            for file in files:
                try:
                    read.append((file, self._request(file)))
                except InputError as exc:
                    unreadable, name = isinstance(exc, UnreadableError), printable(file.document.name)
                    bad.append(BadFile(name=name, reason=str(exc), place=file.place, unreadable=unreadable))
            if read:
                chunks.append(self._chunk(number, read))
        return PartTokens(chunks=tuple(chunks), bad=tuple(bad))

    def _request(self, file: RequestFile) -> Request:
        data = read_document(self.source, file.document)
        if isinstance(data, InputError):
            raise data
        request = self.parse(data, file.shown)
        self.shape.check(request, file.shown)
        return request

    def _chunk(self, number: int, read: list[tuple[RequestFile, Request]]) -> Chunk:
        columns = frozen_columns([request_columns(request, file.request, file.domain) for file, request in read])
        del columns["at_step"]
        experts = columns["experts"]
        known = min(self.meta.num_experts, max(self.meta.top_k, int(experts.max()) + 1))
        columns["experts"] = experts.astype(id_dtype(known), copy=False)
        # the ids were held to their rules file by file
        tokens: Trace = assembled(self.meta.replace(num_experts=known), columns)
        return Chunk(tokens=tokens, first=read[0][0].place * TOKENS_PER_FILE, number=number)


def request_columns(request: Request, number: int, domain: int | None) -> Columns:
    """Return the columns of a request's tokens, and ``at_step``, the step of each."""
    tokens = len(request.experts)
    steps = request.steps
    columns: Columns = {
        "experts": request.experts,
        "request": np.full(tokens, number, np.int64),
        "position": np.arange(request.first_position, request.first_position + tokens, dtype=np.int64),
        "phase": np.where(steps == 0, PREFILL, DECODE).astype(np.uint8),
        "at_step": steps,
    }
    if domain is not None:
        columns["domain"] = np.full(tokens, domain, np.int64)
    return columns
