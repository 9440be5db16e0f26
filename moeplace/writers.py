"""Native trace files: JSON Lines, npz, and JSON for counts; the same content always gives the same bytes."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import orjson

from moeplace.errors import Location, OutputError
from moeplace.files import atomic_output, zstd_module
from moeplace.trace import PHASES, SCHEMA, Counts, Trace, TraceMeta, TraceStream, id_dtype

FORMATS = ("jsonl", "npz", "json")
MOST_LAYERS = 1024  # larger layer ids count something else: a row for each number up to them would be mostly zeros

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".npz": "npz", ".json": "json"}
_SMALL_COLUMNS = ("request", "position", "phase", "step", "rank", "domain")
_LINES_PER_WRITE = 4096
_ZSTD_LEVEL = 9


def write_trace(
    trace: Trace | TraceStream | Counts, path: str | os.PathLike[str], *, format: str | None = None
) -> None:
    """Write a trace or counts in a native format.

    The path's suffix chooses the format: ``.jsonl`` or ``.npz`` for a trace, ``.json`` or ``.npz`` for counts; after
    ``.jsonl`` or ``.json``, ``.gz`` and ``.zst`` compress. The file appears when it is complete, and its bytes depend
    on the content alone. A stream is walked twice: names and sizes stand in front of what they describe.

    Parameters
    ----------
    trace
        What to write.
    path
        The target; ``-`` is standard output.
    format
        One of :data:`FORMATS`; None goes by the suffix, and is JSON Lines (JSON for counts) on standard output.

    Raises
    ------
    OutputError
        The target cannot be written, or the format does not fit what is written.
    """
    write_traces([(trace, path)], format=format)


def write_traces(
    parts: Sequence[tuple[Trace | TraceStream | Counts, str | os.PathLike[str]]], *, format: str | None = None
) -> None:
    """Write several traces or counts, each as :func:`write_trace` does; no file appears before all are complete."""
    for trace, path in parts:
        _form(trace, os.fspath(path), format)
    with trace_outputs([path for _, path in parts], format=format) as outputs:
        for (trace, _), output in zip(parts, outputs, strict=True):
            output.write(trace)


@contextlib.contextmanager
def trace_outputs(
    paths: Sequence[str | os.PathLike[str]], *, format: str | None = None, formats: Sequence[str] = FORMATS
) -> Iterator[tuple[TraceOutput, ...]]:
    """Open files for traces or counts before there is anything to write; they appear, complete, when the context ends.

    So an output that cannot be written is found before a long trace is read.

    Parameters
    ----------
    paths, format
        As for :func:`write_trace`.
    formats
        Names of formats that can be asked for in place of a suffix, for the hint of an error.

    Raises
    ------
    OutputError
        A file cannot be written, or its name tells no format; when the context ends, what is in place of a file cannot
        be replaced.
    """
    names = [os.fspath(path) for path in paths]
    for name in names:
        _compression(name, format or format_of(name, "jsonl", formats))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(atomic_output(name)) for name in names]
        yield tuple(TraceOutput(name, raw, format) for name, raw in zip(names, files, strict=True))


class TraceOutput:
    """A file that waits for a trace or counts; see :func:`trace_outputs`."""

    def __init__(self, name: str, raw: BinaryIO, format: str | None) -> None:
        self._name, self._raw, self._format = name, raw, format

    def write(self, trace: Trace | TraceStream | Counts) -> None:
        """Write what the file is for, once.

        Raises
        ------
        OutputError
            The format does not fit what is written, or a write fails.
        """
        kind, compression = _form(trace, self._name, self._format)
        with _compressed(self._raw, compression) as out:
            if isinstance(trace, Counts):
                _write_counts(trace, kind, out)
            elif kind == "npz":
                _write_npz(trace, out)
            else:
                _write_jsonl(trace, out)


def _form(trace: Trace | TraceStream | Counts, name: str, format: str | None) -> tuple[str, str | None]:
    """Format and compression of an output; an error where they do not fit what is written."""
    kind = format or format_of(name, "json" if isinstance(trace, Counts) else "jsonl")
    fitting = ("json", "npz") if isinstance(trace, Counts) else ("jsonl", "npz")
    if kind not in fitting:
        what = f"{'counts' if isinstance(trace, Counts) else 'a trace'} cannot be written as {kind}"
        raise OutputError(what, hint=f"name it .{' or .'.join(fitting)}", where=Location(file=name))
    return kind, _compression(name, kind)


def _compression(name: str, kind: str) -> str | None:
    """Suffix of the compression that an output's name asks for; an error where the format has its own."""
    suffix = next((suffix for suffix in (".gz", ".zst") if name.endswith(suffix)), None)
    if suffix and kind == "npz":
        hint = "name it .npz"
        raise OutputError("npz is compressed already", rule=f"no {suffix} after .npz", hint=hint, where=name)
    return suffix


def format_of(name: str, default: str, formats: Sequence[str] = FORMATS) -> str:
    """Format that an output's name tells, one of :data:`FORMATS`; ``default`` for standard output.

    Parameters
    ----------
    name, default
        The output, and the format of standard output.
    formats
        Names of formats that can be asked for in place of a suffix, for the hint of an error.

    Raises
    ------
    OutputError
        The name's suffix tells none.
    """
    if name == "-":
        return default
    suffix = os.path.splitext(re.sub(r"\.(gz|zst)$", "", name))[1].lower()
    if suffix not in _SUFFIXES:
        what = f"suffix {suffix!r} names no format" if suffix else "the name has no suffix to tell the format"
        hint = f"use {', '.join(_SUFFIXES)}" + (f" or name the format: {', '.join(formats)}" if formats else "")
        raise OutputError(what, hint=hint, where=Location(file=name))
    return _SUFFIXES[suffix]


@contextlib.contextmanager
def _compressed(raw: BinaryIO, compression: str | None) -> Iterator[BinaryIO]:
    if compression == ".gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream:
            yield cast(BinaryIO, stream)
    elif compression == ".zst":
        with zstd_module().ZstdFile(raw, "wb", level=_ZSTD_LEVEL) as stream:
            yield stream
    else:
        yield raw


class _FirstAppearance:
    """Whether names are numbered in the order in which they first appear, so that a reader numbers them alike."""

    def __init__(self) -> None:
        self._next, self._ordered = 0, True

    def add(self, numbers: npt.NDArray[np.int64]) -> None:
        values, first = np.unique(numbers, return_index=True)
        new = values[np.argsort(first)]
        new = new[new >= self._next]
        expected = np.arange(self._next, self._next + new.size)
        self._ordered = self._ordered and bool((values >= 0).all()) and np.array_equal(new, expected)
        self._next += int(new.size)

    def holds(self, names: tuple[str, ...]) -> bool:
        return self._ordered and self._next == len(names)


@dataclass(slots=True)
class _Survey:
    """What a first walk over a trace finds: the final meta, sizes, the small columns, and the order of the names."""

    meta: TraceMeta
    num_tokens: int = 0
    columns: dict[str, list[npt.NDArray[Any]]] = field(default_factory=dict)
    order: dict[str, _FirstAppearance] = field(
        default_factory=lambda: {"request": _FirstAppearance(), "domain": _FirstAppearance()}
    )

    def names(self, column: str) -> tuple[str, ...]:
        """Names that the column's numbers index."""
        return self.meta.request_names if column == "request" else self.meta.domains

    def check(self, column: str, largest: int) -> None:
        """Refuse numbers beyond the names."""
        names = self.names(column)
        if names and largest >= len(names):
            raise OutputError(f"{column} {largest} has no name", rule=f"the trace names {len(names)}")


def _surveyed(trace: Trace | TraceStream, keep_columns: bool) -> _Survey:
    survey = _Survey(trace.meta)
    largest = {"request": -1, "domain": -1}
    for block in trace.blocks():
        survey.num_tokens += block.num_tokens
        for name in _SMALL_COLUMNS:
            column = getattr(block, name)
            if column is None or not column.size:
                continue
            if keep_columns:
                survey.columns.setdefault(name, []).append(column)
            if name in survey.order:
                survey.order[name].add(column)
                largest[name] = max(largest[name], int(column.max()))
    survey.meta = trace.meta
    for name, number in largest.items():
        survey.check(name, number)
    return survey


def _write_jsonl(trace: Trace | TraceStream, out: BinaryIO) -> None:
    survey = _surveyed(trace, keep_columns=False)
    out.write(orjson.dumps(_meta_line(survey), option=orjson.OPT_APPEND_NEWLINE))
    option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    for block in trace.blocks():
        lines = []
        for row in _rows(block, survey.meta):
            lines.append(orjson.dumps(row, option=option))
            if len(lines) == _LINES_PER_WRITE:
                out.write(b"".join(lines))
                lines = []
        out.write(b"".join(lines))


def _meta_line(survey: _Survey) -> dict[str, Any]:
    meta = survey.meta
    line: dict[str, Any] = {"type": "meta", "schema": SCHEMA, "model_id": meta.model_id}
    line |= {"num_experts": meta.num_experts, "top_k": meta.top_k, "moe_layer_ids": meta.layer_ids}
    # names in the order of appearance need no list: any reader numbers them alike, whatever form they came from
    if not survey.order["domain"].holds(meta.domains):
        line["domains"] = meta.domains
    if not survey.order["request"].holds(meta.request_names):
        line["request_names"] = meta.request_names
    line["assumptions"] = meta.assumptions
    return {key: value for key, value in line.items() if value not in (None, ())}


def _rows(block: Trace, meta: TraceMeta) -> Iterator[dict[str, Any]]:
    """Yield the lines of a block, their fields in the documented order."""
    fields: dict[str, list[Any]] = {
        "req_id": _named(block.request, meta.request_names),
        "token_idx": block.position.tolist(),
        "phase": [PHASES[phase] for phase in block.phase.tolist()],
    }
    for name in ("step", "rank"):
        column = getattr(block, name)
        if column is not None:
            fields[name] = column.tolist()
    if block.domain is not None:
        fields["domain"] = _named(block.domain, meta.domains)
    names = (*fields, "topk_ids")
    for values in zip(*fields.values(), block.experts, strict=True):
        yield dict(zip(names, values, strict=True))


def _named(numbers: npt.NDArray[np.int64], names: tuple[str, ...]) -> list[Any]:
    return [names[number] for number in numbers.tolist()] if names else numbers.tolist()


def _write_npz(trace: Trace | TraceStream, out: BinaryIO) -> None:
    survey = _surveyed(trace, keep_columns=True)
    meta = survey.meta
    dtype = np.dtype(id_dtype(meta.num_experts))
    with zipfile.ZipFile(out, "w") as archive:
        with _member(archive, "expert_ids") as member:
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": (survey.num_tokens, meta.num_layers, meta.top_k),
            }
            np.lib.format.write_array_header_1_0(member, header)
            for block in trace.blocks():
                member.write(np.ascontiguousarray(block.experts).data)
        for name, parts in survey.columns.items():
            _write_array(archive, name, np.concatenate(parts))
        _write_fields(archive, {**_meta_fields(meta), "request_names": meta.request_names})


def _meta_fields(meta: TraceMeta) -> dict[str, Any]:
    return {
        "layer_ids": meta.layer_ids,
        "num_experts": meta.num_experts,
        "top_k": meta.top_k,
        "model_id": meta.model_id,
        "domains": meta.domains,
        "assumptions": meta.assumptions,
    }


def _write_counts(counts: Counts, kind: str, out: BinaryIO) -> None:
    fields = _meta_fields(counts.meta)
    if kind == "json":
        domain = None if counts.domain is None else _named(counts.domain, counts.meta.domains)
        content = {key: value for key, value in {**fields, "domain": domain}.items() if value not in (None, ())}
        content["logical_count"] = _row_per_layer(counts)
        option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
        out.write(orjson.dumps(content, option=option))
        return
    with zipfile.ZipFile(out, "w") as archive:
        _write_array(archive, "logical_count", counts.counts)
        if counts.domain is not None:
            _write_array(archive, "domain", counts.domain)
        _write_fields(archive, fields)


def _row_per_layer(counts: Counts) -> npt.NDArray[np.int64]:
    """Counts with a row for every layer up to the last, of zeros for those that are not MoE layers.

    So SGLang's ``--init-expert-location`` takes them: its rows are all layers of the model. Steps are left out where
    there is one.
    """
    ids, table = counts.meta.layer_ids, counts.counts
    if ids[0] >= 0 and ids[-1] < MOST_LAYERS:
        table = np.zeros((counts.num_steps, ids[-1] + 1, counts.meta.num_experts), np.int64)
        table[:, ids] = counts.counts
    return table[0] if counts.num_steps == 1 and counts.domain is None else table


def _write_fields(archive: zipfile.ZipFile, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if value not in (None, ()):
            _write_array(archive, name, np.array(value))


def _write_array(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with _member(archive, name) as member:
        np.lib.format.write_array(member, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # the time, the system and the mode would otherwise differ from run to run and machine to machine
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system, info.external_attr = 3, 0o600 << 16
    return archive.open(info, "w", force_zip64=True)
