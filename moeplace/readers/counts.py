"""Count-only inputs: how often each expert was chosen, per layer and, if recorded, per step."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._arrays import DAMAGE, Archive, ColumnReader, small_arrays
from moeplace.readers._common import ReaderOptions
from moeplace.readers._meta import Declared, Shape
from moeplace.trace import Counts

NAME = "counts"
DESCRIPTION = (
    "Expert counts only: JSON, npz or npy with logical_count or counts, [step, layer, expert] or [layer, expert]"
)

_ARRAYS = ("logical_count", "counts", "arr_0")
_FIELDS = ("layer_ids", "domain", "domains", "top_k", "num_experts", "tokens", "model_id", "assumptions")
_SHAPES = "counts are [layer, expert] or [step, layer, expert]"


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` (with an archive's member names) looks like expert counts."""
    if head.startswith(b"PK"):
        return 80 if re.search(rb"(?<!\w)(logical_count|counts)\.npy", head) else 40 if b"arr_0.npy" in head else 0
    if head.startswith(b"\x93NUMPY"):
        return 60
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):
        return 70 if b'"logical_count"' in text or b'"counts"' in text else 0
    return 50 if re.match(rb"\[\s*[\[\d-]", text) else 0


def open(source: InputFile, options: ReaderOptions) -> Counts:
    """Read expert counts.

    Raises
    ------
    TraceError
        A count is negative, not a number or not whole; rows differ in length; the model disagrees.
    """
    key, counts, values = _parsed(source)
    fields = ColumnReader(source.name, values)
    counts = whole_counts(counts, key, source.name)
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or 0 in counts.shape:
        raise TraceError(f"shape {list(counts.shape)}", rule=_SHAPES, where=fields.where(key))
    return settled_counts(counts, key, fields, options)


def settled_counts(counts: npt.NDArray[np.int64], key: str, fields: ColumnReader, options: ReaderOptions) -> Counts:
    """Settle what the file, its fields and the model say about whole counts ``[step, layer, expert]``."""
    num_steps, _, num_experts = counts.shape
    given = fields.integer("num_experts")
    if given not in (None, num_experts):
        what = f"counts of {num_experts} experts, but num_experts is {given}"
        raise TraceError(what, rule="the last axis counts logical experts", where=fields.where(key))
    declared = Declared(
        num_experts=num_experts,
        top_k=fields.integer("top_k"),
        layer_ids=fields.layer_ids(),
        model_id=fields.string("model_id"),
        assumptions=fields.strings("assumptions"),
    )
    shape = Shape(fields.file, declared, options.model, fields.where(key))
    domain, domains = fields.labels("domain", fields.strings("domains"), num_steps, "step")
    tokens = fields.values.get("tokens")
    _settle_top_k(shape, counts, tokens)
    kept_layers = _settle_layers(shape, counts)
    kept_steps = counts.any(axis=(1, 2))
    if not kept_steps.any():
        raise TraceError("all counts are 0", rule="at least one expert was chosen", where=fields.where(key))
    if not kept_steps.all():
        zero = num_steps - int(kept_steps.sum())
        shape.assume(f"{zero} of {num_steps} steps hold no counts: taken as never recorded and left out")
        counts, domain = counts[kept_steps], None if domain is None else domain[kept_steps]
    return Counts(meta=shape.build(domains=domains), counts=counts[:, kept_layers], domain=domain)


def _settle_top_k(shape: Shape, counts: npt.NDArray[np.int64], tokens: npt.NDArray[Any] | None) -> None:
    """Take top-k from the file, the model, or the choices per token when the tokens were counted too."""
    known = shape.declared.top_k if shape.declared.top_k is not None or shape.model is None else shape.model.top_k
    choices = counts.sum(axis=-1)
    seen = None if tokens is None else _choices_per_token(choices, tokens)
    if seen is not None:
        shape.set_top_k(seen)
        if known is None:
            shape.assume(f"top_k not given: {seen} = choices per token in every layer and step")
    elif known is not None:
        shape.top_k = known
    else:
        shape.assume("top_k not given: taken as 1; counts alone do not tell how many experts a token chooses")
        shape.top_k = 1


def _choices_per_token(choices: npt.NDArray[np.int64], tokens: npt.NDArray[Any]) -> int | None:
    """Return the one whole number of choices per token, if there is one; layers without counts are left out."""
    try:
        per_layer = np.broadcast_to(tokens.reshape(*tokens.shape, *(1,) * (2 - tokens.ndim)), choices.shape)
    except ValueError:
        return None
    recorded = (choices > 0) & (per_layer > 0)
    if tokens.dtype.kind not in "iu" or not recorded.any():
        return None
    ratios = np.unique(choices[recorded] / per_layer[recorded])
    whole = ratios.size == 1 and float(ratios[0]).is_integer()
    return int(ratios[0]) if whole else None


def _settle_layers(shape: Shape, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Settle the layer ids and return the mask of layers to keep: recorders also give dense layers a row, of zeros."""
    everything = np.ones(counts.shape[1], bool)
    if (ids := shape.declared.layer_ids) is not None and len(ids) < counts.shape[1]:
        # the ids then say which rows are MoE layers, if the others are empty
        named = np.isin(np.arange(counts.shape[1]), ids)
        if named.sum() == len(ids) and not counts[:, ~named].any():
            shape.set_layers(len(ids))
            return named
    recorded = np.asarray(counts.any(axis=(0, 2)))
    as_model = shape.model is not None and counts.shape[1] == len(shape.model.moe_layer_ids)
    if shape.declared.layer_ids is not None or as_model or recorded.all() or not recorded.any():
        shape.set_layers(counts.shape[1])
        return everything
    # with as many rows as the model has MoE layers, a row of zeros is an unused MoE layer instead
    dense = np.flatnonzero(~recorded)
    shape.assume(f"layers {', '.join(map(str, dense))} hold no counts: taken as dense layers and left out")
    shape.set_layers(int(recorded.sum()), tuple(map(int, np.flatnonzero(recorded))))
    return recorded


def _parsed(source: InputFile) -> tuple[str, npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
    """Return the name and array of the counts, and the fields beside them."""
    head = source.head()
    if head.startswith(b"PK"):
        with source.seekable() as handle:
            archive = Archive(handle, source.name)
            key = next((key for key in _ARRAYS if key in archive), None)
            if key is None:
                raise _no_counts(source.name, archive.keys)
            return key, archive.read(key), small_arrays(archive, _FIELDS)
    if head.startswith(b"\x93NUMPY"):
        with source.seekable() as handle:
            try:
                return "counts", np.lib.format.read_array(handle, allow_pickle=False), {}
            except DAMAGE as exc:
                hint = "save an array of integers" if "allow_pickle" in str(exc) else "copy it again"
                raise TraceError(f"is not a whole npy: {exc}", hint=hint, where=Location(file=source.name)) from exc
    with source.stream() as stream:
        return _from_json(_json_value(stream.read(), source.name), source.name)


def _json_value(data: bytes, file: str) -> Any:
    try:
        return orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as exc:
        # Python's parser reads NaN, so that the element can be named
        if b"NaN" in data or b"Infinity" in data:
            try:
                return json.loads(data)
            except ValueError:
                pass
        reason = str(exc).split(": line")[0]
        where = Location(file=file, line=exc.lineno, column=exc.colno)
        raise TraceError(f"not JSON: {reason}", rule=_SHAPES, where=where) from exc


def _from_json(value: Any, file: str) -> tuple[str, npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
    if isinstance(value, list):
        return "counts", matrix_of(value, "counts", file), {}
    key = next((key for key in _ARRAYS if key in value), None) if isinstance(value, dict) else None
    if key is None:
        raise _no_counts(file, list(value) if isinstance(value, dict) else [])
    fields = {name: matrix_of(value[name], name, file) for name in _FIELDS if value.get(name) is not None}
    content = value[key]
    if isinstance(content, dict) and content:
        rows = list(content.values())
        if all(isinstance(row, list) and row and isinstance(row[0], list) for row in rows):
            fields["domain"] = np.array(list(content))
            return key, matrix_of(rows, key, file), fields
        if not all(name.isdecimal() for name in content):
            where = Location(file=file, element=key)
            raise TraceError("names of layers", rule="counts by layer are keyed by the layer's number", where=where)
        order = sorted(content, key=int)
        fields["layer_ids"] = np.array([int(name) for name in order])
        return key, matrix_of([content[name] for name in order], key, file), fields
    return key, matrix_of(content, key, file), fields


def matrix_of(value: Any, key: str, file: str) -> npt.NDArray[Any]:
    """Turn nested lists into an array; name the element where they are ragged or hold something else."""
    odd = _first_odd(value, _lengths(value), ())
    if odd is not None:
        index, what, rule = odd
        element = f"{key}[{', '.join(map(str, index))}]" if index else key
        raise TraceError(what, rule=rule, where=Location(file=file, element=element))
    return np.array(value)


def _lengths(value: Any) -> tuple[int, ...]:
    return (len(value), *(_lengths(value[0]) if value else ())) if isinstance(value, list) else ()


def _first_odd(value: Any, lengths: Sequence[int], index: tuple[int, ...]) -> tuple[tuple[int, ...], str, str] | None:
    if not lengths:
        known = isinstance(value, int | float | str) and not isinstance(value, bool)
        return None if known else (index, json.dumps(value)[:40], "a number")
    if not isinstance(value, list) or len(value) != lengths[0]:
        size = f"{len(value)} values" if isinstance(value, list) else json.dumps(value)[:40]
        return index, size, f"rows are equally long: {lengths[0]} values"
    if len(lengths) == 1 and set(map(type, value)) in ({int}, {float}, {str}):
        return None
    return next((odd for i, item in enumerate(value) if (odd := _first_odd(item, lengths[1:], (*index, i)))), None)


def whole_counts(counts: npt.NDArray[Any], key: str, file: str) -> npt.NDArray[np.int64]:
    """Check that counts are whole, finite and not negative; floats are accepted when they are."""
    if counts.dtype.kind not in "iuf":
        where = Location(file=file, element=key)
        raise TraceError(f"{key} is {counts.dtype}", rule="counts are whole numbers", where=where)
    checks = [(counts < 0, "counts are not negative")]
    if counts.dtype.kind == "f":
        checks.insert(0, (~np.isfinite(counts), "counts are whole numbers"))
        checks.append((counts != np.floor(counts), "counts are whole numbers"))
    checks.append((counts >= 2**63, "counts fit 64-bit integers"))
    for wrong, rule in checks:
        if wrong.any():
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            value = "NaN" if counts[index] != counts[index] else counts[index]
            where = Location(file=file, element=f"{key}[{', '.join(map(str, index))}]")
            raise TraceError(f"count {value}", rule=rule, where=where)
    return counts.astype(np.int64)


def _no_counts(file: str, keys: Sequence[str]) -> TraceError:
    hint = f"it holds {', '.join(keys[:12]) or 'nothing'}"
    return TraceError(
        "no counts", rule="counts stand under logical_count or counts", hint=hint, where=Location(file=file)
    )
