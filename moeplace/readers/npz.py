"""Native npz: expert ids as one array, streamed out of the archive block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._arrays import DAMAGE, Archive, ColumnReader, small_arrays
from moeplace.readers._blocks import KeptBlocks
from moeplace.readers._common import (
    NO_PHASE,
    NO_POSITION,
    NO_REQUEST,
    BadRow,
    BadRows,
    Columns,
    ReaderOptions,
    RunningNumbers,
    frozen_columns,
    top_k_problem,
    trace_bytes,
)
from moeplace.readers._meta import Declared, Shape
from moeplace.trace import DECODE, MAX_EXPERTS, Trace, TraceMeta

NAME = "npz"
DESCRIPTION = "NumPy archive with expert_ids [token, MoE layer, k]"

_COLUMNS = ("request", "phase", "position", "token_pos", "step", "rank", "domain")
_NAMES = ("layer_ids", "num_experts", "top_k", "model_id", "domains", "request_names", "assumptions")


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` (with the archive's member names) looks like a native npz trace."""
    if not head.startswith(b"PK"):
        return 0
    if b"expert_ids.npy" in head:
        return 95
    return 10 if b".npy" in head or name.endswith(".npz") else 0


def open(source: InputFile, options: ReaderOptions) -> NpzStream:
    """Open an npz trace as a stream.

    Raises
    ------
    TraceError
        The archive is damaged, or an array in it breaks the format.
    """
    return NpzStream(source, options)


class _Header(NamedTuple):
    """The stored array: ``stored`` may lack the layer axis, ``shape`` never does."""

    stored: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.stored[0], self.stored[1] if len(self.stored) == 3 else 1, self.stored[-1])


class NpzStream:
    """An npz trace, block by block; the expert ids are never in memory as a whole unless they fit the cache."""

    def __init__(self, source: InputFile, options: ReaderOptions) -> None:
        self._source, self._options = source, options
        self._skipped: tuple[str, ...] = ()
        with source.seekable() as handle:
            archive = Archive(handle, source.name)
            with _opened_ids(archive) as (_, header):
                self._header = header
            self._values = ColumnReader(source.name, small_arrays(archive, (*_COLUMNS, *_NAMES)))
        if self._header.dtype.kind == "f":
            raise self._float_error()
        self._shape = self._shaped()
        self._columns, self._domains, self._request_names = self._read_columns()
        self._kept_ids: KeptBlocks[npt.NDArray[Any]] | None = None
        if self._shape.num_experts is None:
            self._kept_ids = KeptBlocks(self._ids, lambda ids: int(ids.nbytes), options.cache_bytes)
            self._shape.set_num_experts(max(map(_largest_id, self._kept_ids)))
        self._blocks = KeptBlocks(self._tokens, trace_bytes, options.cache_bytes)
        next(iter(self._blocks), None)

    @property
    def meta(self) -> TraceMeta:
        """The model's shape; skipped rows are counted once the blocks have been walked."""
        return self._shape.build(extra=self._skipped, domains=self._domains, request_names=self._request_names)

    def blocks(self) -> Iterator[Trace]:
        """Yield consecutive blocks of tokens."""
        yield from self._blocks
        if self._blocks.complete:
            self._kept_ids = None

    def _shaped(self) -> Shape:
        values, (_, num_layers, top_k) = self._values, self._header.shape
        declared = Declared(
            num_experts=values.integer("num_experts"),
            top_k=values.integer("top_k"),
            layer_ids=values.layer_ids(),
            model_id=values.string("model_id"),
            domains=values.strings("domains"),
            request_names=values.strings("request_names"),
            assumptions=values.strings("assumptions"),
        )
        shape = Shape(self._source.name, declared, self._options.model, values.where("expert_ids"))
        shape.set_top_k(top_k)
        shape.set_layers(num_layers)
        return shape

    def _read_columns(self) -> tuple[Columns, tuple[str, ...], tuple[str, ...]]:
        """Read the small columns and fill in those that are not given."""
        values, declared, length = self._values, self._shape.declared, self._header.shape[0]
        request, request_names = values.labels("request", declared.request_names, length, "token")
        domain, domains = values.labels("domain", declared.domains, length, "token")
        if request is None:
            self._shape.assume(NO_REQUEST)
            request = np.zeros(length, np.int64)
        position = values.integers("position" if "position" in values.values else "token_pos", length, "token")
        if position is None:
            self._shape.assume(NO_POSITION)
            position = RunningNumbers().number(request)
        columns: Columns = {"request": request, "position": position, "phase": self._phases(length)}
        optional = {name: values.integers(name, length, "token") for name in ("step", "rank")}
        columns.update((name, column) for name, column in (*optional.items(), ("domain", domain)) if column is not None)
        return frozen_columns([columns]), domains, request_names

    def _phases(self, length: int) -> npt.NDArray[np.uint8]:
        phases = self._values.integers("phase", length, "token")
        if phases is None:
            self._shape.assume(NO_PHASE)
            return np.full(length, DECODE, np.uint8)
        wrong = (phases < 0) | (phases > DECODE)
        if wrong.any():
            at = int(wrong.argmax())
            where = self._values.where(f"phase[{at}]")
            raise TraceError(f"phase {phases[at]}", rule="phase is 0 (prefill) or 1 (decode)", where=where)
        return phases.astype(np.uint8)

    def _ids(self) -> Iterator[npt.NDArray[Any]]:
        """Yield blocks of expert ids as they are stored, out of the archive."""
        with self._source.seekable() as handle:
            archive = Archive(handle, self._source.name)
            with _opened_ids(archive) as (member, header):
                yield from _id_blocks(archive, member, header, self._options.block_bytes)

    def _tokens(self) -> Iterator[Trace]:
        start, good_tokens = 0, 0
        bad = BadRows(self._options.skip_bad)
        for ids in self._ids() if self._kept_ids is None else self._kept_ids:
            columns = {name: column[start : start + len(ids)] for name, column in self._columns.items()}
            try:
                block = Trace(meta=self.meta, experts=ids, **columns)
            except TraceError:
                good = self._screen(ids, start, bad)
                bad.check()
                columns = {name: column[good] for name, column in columns.items()}
                block = Trace(meta=self.meta, experts=ids[good], **columns)
            start += len(ids)
            good_tokens += block.num_tokens
            if block.num_tokens:
                yield block
        self._skipped = bad.sentence()
        if not good_tokens:
            raise TraceError("every token is bad", where=self._values.where("expert_ids"))

    def _screen(self, ids: npt.NDArray[Any], start: int, bad: BadRows) -> npt.NDArray[np.bool_]:
        """Tally the bad tokens of a block and return which are good."""
        limit = self._shape.limit
        ordered = np.sort(ids, axis=-1)
        outside = (ordered[..., 0] < 0) | (ordered[..., -1] >= limit.num_experts)
        wrong = outside | (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
        for token in np.flatnonzero(wrong.any(axis=1)).tolist():
            layer = int(wrong[token].argmax())
            problem = top_k_problem(ids[token, layer].tolist(), limit)
            if problem is not None:
                i, what, rule, hint = problem
                index = f"{start + token}, {layer}, {i}" if len(self._header.stored) == 3 else f"{start + token}, {i}"
                where = self._values.where(f"expert_ids[{index}]")
                bad.add(BadRow(what=what, rule=rule, hint=hint, where=where))
            if bad.full:
                break
        return np.asarray(~wrong.any(axis=1))

    def _float_error(self) -> TraceError:
        """Error for ids that are floats: the first value that is not an id at all, or else the type."""
        start = 0
        for ids in self._ids():
            odd = ~np.isfinite(ids) | (ids != np.floor(ids))
            if odd.any():
                token, layer, i = (int(x) for x in np.argwhere(odd)[0])
                where = self._values.where(f"expert_ids[{start + token}, {layer}, {i}]")
                return TraceError(f"expert id {ids[token, layer, i]}", rule="expert ids are integers", where=where)
            start += len(ids)
        return TraceError(
            f"expert_ids is {self._header.dtype}",
            rule="expert ids are integers",
            hint="all values are whole numbers: save expert_ids.astype(numpy.uint16)",
            where=self._values.where("expert_ids"),
        )


@contextlib.contextmanager
def _opened_ids(archive: Archive) -> Iterator[tuple[IO[bytes], _Header]]:
    """Open the member with the expert ids and read its header."""
    if "expert_ids" not in archive:
        shown = ", ".join(archive.keys[:12]) or "nothing"
        rule, hint = "an npz trace has expert_ids [token, MoE layer, k]", f"the archive holds {shown}"
        raise TraceError("no expert_ids", rule=rule, hint=hint, where=Location(file=archive.file))
    where = archive.where("expert_ids")
    with archive.open("expert_ids") as member:
        try:
            version = np.lib.format.read_magic(member)
            parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            stored, fortran, dtype = parse(member)
        except DAMAGE as exc:
            raise archive.damaged("expert_ids", exc) from exc
        if dtype.hasobject:
            raise archive.damaged("expert_ids", ValueError("Object arrays"))
        if dtype.kind not in "iuf":
            hint = "save it as numpy.uint8 or numpy.uint16"
            raise TraceError(f"expert_ids is {dtype}", rule="expert ids are integers", hint=hint, where=where)
        if len(stored) not in (2, 3):
            raise TraceError(f"shape {list(stored)}", rule="expert_ids is [token, MoE layer, k]", where=where)
        if 0 in stored:
            raise TraceError(f"holds no routed tokens: shape {list(stored)}", rule="at least one token", where=where)
        yield member, _Header(stored, dtype, fortran)


def _id_blocks(archive: Archive, member: IO[bytes], header: _Header, block_bytes: int) -> Iterator[npt.NDArray[Any]]:
    num_tokens, num_layers, top_k = header.shape
    token_bytes = num_layers * top_k * header.dtype.itemsize
    rows = max(1, block_bytes // (num_layers * top_k * min(2, header.dtype.itemsize)))
    if header.fortran:
        # the tokens of one block lie all over the member, so it has to be read as a whole
        data = _read_exactly(archive, member, num_tokens * token_bytes, 0)
        whole = np.frombuffer(data, header.dtype).reshape(header.stored[::-1]).T.reshape(header.shape)
        _expect_end(archive, member)
        for start in range(0, num_tokens, rows):
            yield np.ascontiguousarray(whole[start : start + rows])
        return
    for start in range(0, num_tokens, rows):
        count = min(rows, num_tokens - start)
        data = _read_exactly(archive, member, count * token_bytes, start)
        if start + count == num_tokens:
            _expect_end(archive, member)
        yield np.frombuffer(data, header.dtype).reshape(count, num_layers, top_k)


def _read_exactly(archive: Archive, member: IO[bytes], size: int, token: int) -> bytes:
    element = f"expert_ids[{token}, …]"
    try:
        data = member.read(size)
    except DAMAGE as exc:
        raise archive.damaged(element, exc) from exc
    if len(data) < size:
        raise archive.damaged(element, EOFError("the array ends early"))
    return data


def _expect_end(archive: Archive, member: IO[bytes]) -> None:
    # reading past the last byte is also what makes zipfile compare the checksum
    try:
        extra = member.read(1)
    except DAMAGE as exc:
        raise archive.damaged("expert_ids", exc) from exc
    if extra:
        raise archive.damaged("expert_ids", ValueError("the member is longer than its header says"))


def _largest_id(ids: npt.NDArray[Any]) -> int:
    if ids.dtype.itemsize > 1 or ids.dtype.kind == "i":
        ids = ids[(ids >= 0) & (ids < MAX_EXPERTS)]
    return int(ids.max()) if ids.size else 0
