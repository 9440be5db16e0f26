"""Traces of one JSON file per request: single files, folders and tar archives of them, whatever a file looks like."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from moeplace.errors import InputError, Location, TraceError, UnreadableError
from moeplace.files import InputFile, InputFolder
from moeplace.frozen import Ints, digest
from moeplace.parts import CHUNK_TOKENS, MOST_CHUNKS, BadFile
from moeplace.readers._bundle import Bundle, Document, first_document, is_document, is_tar, printable, read_document
from moeplace.readers._columns import BlockBuilder, ColumnStream, tally
from moeplace.readers._common import SHOWN_BAD_ROWS, BadRows, Columns, IdLimit, Labels, ReaderOptions
from moeplace.readers._meta import Declared, Shape
from moeplace.readers._request import Request, RequestParser, RequestShape
from moeplace.readers._request_part import RequestFile, RequestPart, request_columns
from moeplace.trace import MAX_EXPERTS, Trace, TraceMeta

LOOKS, SNIFFED_FILES = 92, 8
SHAPE_FILES = 7  # the shape that most of the first ones have is the trace's
BAD_FILES_TO_GIVE_UP = 200  # the first ones, all bad
UNNAMED_EXPERTS = 1024  # the largest known model has half as many; tables grow with the square
MOST_BAD = 0.2  # share of bad files that are left out without being asked for
AS_THEY_COME = (
    "the archive came through a pipe: its requests are numbered as they come, so that its digest and its halves are "
    "not those of the file"
)


class RequestStream(ColumnStream):
    """Requests, one to a file, in the order of the folder or archive, numbered by their sorted relative paths.

    A request that breaks the format counts as one bad row. A request's domain is the folder that it lies in. The files
    of a folder, and of an archive that is not compressed, can be read part by part
    (:class:`~moeplace.parts.PartedTrace`): the whole is then walked only when its blocks are asked for.
    """

    def __init__(self, source: InputFile | InputFolder, options: ReaderOptions, parse: RequestParser) -> None:
        super().__init__(source, options, Shape(source.name, Declared(), options.model))
        self._bundle, self._parse = Bundle(source), parse
        self._common: RequestShape | None = None
        self._bytes_per_token, self._guessed_experts = 1.0, 1
        self._requests = Labels([printable(name) for name in self._bundle.names])
        self._domains = Labels()
        if self._bundle.names:
            self._domains.numbers([self._bundle.folder(name) for name in self._bundle.names])
        if self._bundle.ignored:
            shown = ", ".join(self._bundle.ignored[:3])
            self._shape.assume(f"{len(self._bundle.ignored)} files that are not JSON left out: {shown}")
        self._many = len(self._bundle.documents) != 1 or isinstance(source, InputFolder) or self._bundle.is_archive
        self._limit = options.bad_files if self._many else options.skip_bad
        self.bad_files: tuple[BadFile, ...] = ()
        self._started = False
        if self.can_part:
            self._find_shape()
        else:
            self._begin()

    @property
    def meta(self) -> TraceMeta:
        """The model's shape; names and skipped rows are complete once the blocks have been walked."""
        self._begin()
        return super().meta

    def blocks(self) -> Iterator[Trace]:
        """Yield consecutive blocks of tokens."""
        self._begin()
        yield from super().blocks()
        names = self._requests.names
        if not self._bundle.names and names != tuple(sorted(names)):
            self._shape.assume(AS_THEY_COME)

    def _begin(self) -> None:
        """Start to walk the whole, once."""
        if not self._started:
            self._started = True
            self._start()

    @property
    def can_part(self) -> bool:
        """Whether the files can be read apart from each other."""
        return self._bundle.has_random_access

    @property
    def identity(self) -> str:
        """Digest of the list of files, with sizes and times of change, and of the model they should be of."""
        model = self._options.model
        said = None if model is None else (model.num_experts, model.top_k, model.moe_layer_ids)
        documents = [(item.name, item.size_bytes, item.changed_ns, item.offset) for item in self._bundle.documents]
        source = os.path.abspath(self._source.name)
        return digest((self._parse.__module__, source, said, self._bundle.changed, documents))

    @property
    def bare_meta(self) -> TraceMeta:
        """The model's shape without names, with too many experts while their number is not known."""
        return self._shape.build()

    @property
    def file_bytes(self) -> Ints:
        """``[file]`` bytes of each file."""
        return np.array([document.size_bytes for document in self._bundle.documents], np.int64)

    @property
    def table_bytes(self) -> int:
        """Bytes of the statistics of one part, roughly: two tables of pairs of experts per layer."""
        return 16 * len(self._settled_shape.layer_ids) * self._guessed_experts**2

    def parts(self, part_bytes: int, files: Ints | None = None) -> Iterator[RequestPart]:
        """Yield parts of about ``part_bytes`` each, in order."""
        sizes = self.file_bytes
        chosen = np.arange(len(sizes)) if files is None else files
        stretch = max(2 * CHUNK_TOKENS * self._bytes_per_token, sizes.sum() / MOST_CHUNKS)
        chunks = ((np.cumsum(sizes) - sizes) / stretch).astype(np.int64)
        part = (np.cumsum(sizes[chosen]) - 1) // max(1, part_bytes)
        meta, source = self.bare_meta, os.path.abspath(self._source.name)  # workers may run in another folder
        # files that are already read leave holes, which no part reaches across: parts stay in order
        edges = np.flatnonzero((np.diff(part) > 0) | (np.diff(chosen) != 1)) + 1
        for places in np.split(chosen, edges) if len(chosen) else ():
            requests = tuple(self._file(place, int(chunks[place])) for place in places.tolist())
            yield RequestPart(parse=self._parse, source=source, requests=requests, shape=self._settled_shape, meta=meta)

    def settled(self, largest_id: int, bad: Sequence[BadFile]) -> TraceMeta:
        """Return the meta of the whole, from what its parts have shown."""
        files = len(self._bundle.documents)
        self._check_share(bad, files)
        self._shape.set_num_experts(largest_id)
        left_out = f"{len(bad):,} of {files:,} files {_trouble(bad)} and are left out"
        return self._shape.build(extra=(left_out,) if bad else (), **self._names())

    def _file(self, place: int, chunk: int) -> RequestFile:
        document = self._bundle.documents[place]
        name = document.name
        return RequestFile(
            document=document,
            shown=self._bundle.file(name),
            place=place,
            request=self._number(self._requests, name),
            domain=self._domain(name),
            chunk=chunk,
        )

    def _check_share(self, bad: Sequence[BadFile], files: int) -> None:
        """Raise where more files are bad than the user allows, or than a folder of this format has."""
        unasked = math.isinf(self._limit) and len(bad) > max(1.0, MOST_BAD * files)
        if len(bad) > self._limit or len(bad) == files or unasked:
            raise _too_many(bad, files, self._source.name)

    def _find_shape(self) -> None:
        """Learn the layers and top-k from the first requests that can be read: what most of them have."""
        bad: list[BadFile] = []
        found: list[tuple[str, Document, Request]] = []
        for document in self._bundle.documents:
            file = self._bundle.file(document.name)
            try:
                request = _parsed(self._parse, read_document(self._source.name, document), file)
                self._try(request, file)
            except InputError as exc:
                unreadable = isinstance(exc, UnreadableError)
                bad.append(BadFile(name=printable(document.name), reason=str(exc), unreadable=unreadable))
                if len(bad) == BAD_FILES_TO_GIVE_UP and not found:
                    break
                continue
            found.append((file, document, request))
            if len(found) == SHAPE_FILES:
                break
        if not found:
            raise _too_many(bad, len(self._bundle.documents), self._source.name)
        shapes = [(request.layer_ids, request.experts.shape[2]) for _, _, request in found]
        file, document, request = found[shapes.index(Counter(shapes).most_common(1)[0][0])]
        self._settle(request, file)
        self._bytes_per_token = max(1.0, document.size_bytes / len(request.experts))
        self._guessed_experts = self._shape.num_experts or 1 << int(request.experts.max()).bit_length()

    def _try(self, request: Request, file: str) -> None:
        """Raise where a request alone is not one of the model."""
        shape, top_k = Shape(file, Declared(), self._options.model, Location(file=file)), request.experts.shape[2]
        shape.set_top_k(top_k)
        shape.set_layers(len(request.layer_ids), request.layer_ids)
        RequestShape(layer_ids=request.layer_ids, top_k=top_k, limit=self._limit_of_ids).check(request, file)

    @property
    def _limit_of_ids(self) -> IdLimit:
        """The largest id there may be; where nobody says it, one that statistics still have room for."""
        limit = self._shape.limit
        if limit.num_experts < MAX_EXPERTS:
            return limit
        return IdLimit(num_experts=UNNAMED_EXPERTS, source="without --model a larger id is taken for damage")

    @property
    def _settled_shape(self) -> RequestShape:
        if self._common is None:
            raise TraceError("holds no routed tokens", where=Location(file=self._source.name))
        return self._common

    def _names(self) -> dict[str, tuple[str, ...]]:
        domains = self._domains.names
        return {"request_names": self._requests.names, "domains": () if domains == ("",) else domains}

    def _rows(self) -> Iterator[Columns]:
        bad = self._row_bad = BadRows(self._limit)
        builder = BlockBuilder(self._options.block_bytes)
        left_out: list[BadFile] = []
        files = 0
        for name, data in self._bundle.contents():
            file, files = self._bundle.file(name), files + 1
            try:
                request = _parsed(self._parse, data, file)
                self._settle(request, file)
            except InputError as exc:
                left_out.append(BadFile(name=printable(name), reason=str(exc)))
                tally(bad, exc, file)
                continue
            block = builder.add(request_columns(request, self._number(self._requests, name), self._domain(name)))
            if block is not None:
                bad.check()
                yield block
        bad.check()
        if self._many and left_out:
            self._check_share(left_out, files)
        self.bad_files = tuple(left_out) if self._many else ()
        block = builder.rest()
        if block is not None:
            yield block

    def _settle(self, request: Request, file: str) -> None:
        """Learn the layers and top-k from the first request, and hold the others to it."""
        top_k = request.experts.shape[2]
        if self._common is None:
            self._try(request, file)
            self._shape.where = Location(file=file)
            self._shape.set_top_k(top_k)
            self._shape.set_layers(len(request.layer_ids), request.layer_ids)
            self._common = RequestShape(layer_ids=request.layer_ids, top_k=top_k, limit=self._limit_of_ids)
        self._common.check(request, file)

    def _domain(self, name: str) -> int | None:
        folder = self._bundle.folder(name)
        return self._number(self._domains, folder) if folder or self._domains.names not in ((), ("",)) else None

    def _number(self, labels: Labels, name: str) -> int:
        numbers = labels.numbers([printable(name)])
        return 0 if numbers is None else int(numbers[0])

    def _place(self, columns: Columns, token: int, layer: int) -> Location:
        # requests were checked as they were read, so that this is never needed to say where one is bad
        return Location(file=self._source.name)


def _parsed(parse: RequestParser, data: bytes | InputError, file: str) -> Request:
    if isinstance(data, InputError):
        raise data
    return parse(data, file)


def _trouble(bad: Sequence[BadFile]) -> str:
    """What is the matter with bad files."""
    unreadable = sum(file.unreadable for file in bad)
    if not unreadable:
        return "break the format"
    return "cannot be read" if unreadable == len(bad) else "break the format or cannot be read"


def _too_many(bad: Sequence[BadFile], files: int, folder: str) -> TraceError:
    """The error for more bad files than may be left out, with the first few."""
    hint = "--skip-bad N leaves out up to N of them" if len(bad) < files else "is it a folder of another format?"
    return TraceError(
        f"{len(bad):,} of {files:,} files {_trouble(bad)}",
        rule="every file is one request",
        hint=hint,
        where=Location(file=folder),
        others=[str(file) for file in bad[:SHOWN_BAD_ROWS]],
    )


def looks_in_head(head: bytes, looks: Callable[[bytes], bool]) -> int:
    """Score of a file, or of a tar archive by its first document, whose beginning ``looks`` like a request."""
    if is_tar(head):
        return LOOKS if looks(first_document(head)) else 5
    return LOOKS if looks(head) else 0


def looks_in_folder(folder: Path, looks: Callable[[bytes], bool]) -> int:
    """Score of a folder by its first JSON files, some of which may be bad."""
    source = InputFolder(folder)
    for name in [name for name in source.files if is_document(name)][:SNIFFED_FILES]:
        with contextlib.suppress(InputError), source.open(name) as file:
            if looks(file.head()):
                return LOOKS
    return 0
