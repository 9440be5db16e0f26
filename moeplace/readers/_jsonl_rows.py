"""One JSONL line at a time: the names a field may have, the rules of a row, and where in the line a rule is broken.

This is the slow path. Whole batches go through :mod:`moeplace.readers._jsonl_batch`, which comes here only for lines
that are not as the fast path expects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from moeplace.readers._common import IdLimit, top_k_problem

PHASE_NUMBERS: dict[object, int] = {"prefill": 0, "decode": 1, 0: 0, 1: 1}
ROW_TYPES = frozenset({"route", "token"})

ALIASES: dict[str, tuple[str, ...]] = {
    "ids": ("topk_ids", "expert_ids", "topk_experts", "selected_experts", "experts", "indices"),
    "request": ("req_id", "request_id", "rid", "request"),
    "position": ("token_idx", "token_pos", "position", "token"),
    "phase": ("phase",),
    "step": ("step",),
    "rank": ("rank",),
    "domain": ("domain",),
    "layer": ("layer", "layer_id", "layer_idx"),
    "layers": ("layers",),
    "type": ("type",),
}


class Layout(NamedTuple):
    """The key under which a line holds each field; None where it has none."""

    ids: str | None
    request: str | None
    position: str | None
    phase: str | None
    step: str | None
    rank: str | None
    domain: str | None
    layer: str | None
    layers: str | None
    type: str | None

    @property
    def columns(self) -> frozenset[str]:
        """The fields that are there, apart from the line's type."""
        return frozenset(name for name, key in self._asdict().items() if key is not None and name != "type")


def layout_of(keys: Iterable[str]) -> Layout:
    """Find the fields of a line among its keys; the first alias wins."""
    present = set(keys)
    return Layout(**{name: next((a for a in known if a in present), None) for name, known in ALIASES.items()})


@dataclass(slots=True, kw_only=True)
class RowShape:
    """What all rows of a file have in common; fields fill in from the first good row.

    ``columns`` names the fields every row has; ``kinds`` the type of request and domain labels; ``known_layers`` the
    layer numbers that rows of one layer may have.
    """

    num_layers: int | None = None
    top_k: int | None = None
    columns: frozenset[str] | None = None
    layers: list[int] | None = None
    kinds: dict[str, type] = field(default_factory=dict)
    num_domains: int | None = None
    known_layers: tuple[int, ...] | None = None

    @property
    def per_layer(self) -> bool:
        """True for one line per token and layer."""
        return self.columns is not None and "layer" in self.columns


class RowError(Exception):
    """A line that breaks a rule; ``column`` counts from 1."""

    def __init__(self, what: str, rule: str | None = None, hint: str | None = None, column: int = 1) -> None:
        super().__init__(what)
        self.what, self.rule, self.hint, self.column = what, rule, hint, column


def column_of(text: str, path: Sequence[str | int]) -> int:
    """Column, from 1, at which the value at ``path`` starts in the JSON ``text``."""
    decode = json.JSONDecoder().raw_decode
    space = re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        match = space.match(text, at)
        return match.end() if match else at

    at = skip(0)
    for key in path:
        at = skip(at + 1)
        index = 0
        while True:
            if isinstance(key, str):
                name, at = decode(text, at)
                at = skip(skip(at) + 1)
                found = name == key
            else:
                found = index == key
            if found:
                break
            at = skip(skip(decode(text, at)[1]) + 1)
            index += 1
    return at + 1


def parse_line(line: bytes, cut: bool) -> tuple[str, dict[str, Any]]:
    """Decode one line to its text and object; ``cut`` says that the file ends without a newline after it.

    Raises
    ------
    RowError
        Not UTF-8, not JSON, or not an object.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as exc:
        at = len(line[: exc.start].decode()) + 1
        hint = "write the trace as UTF-8"
        raise RowError(f"byte 0x{line[exc.start]:02x} is not UTF-8", "JSON Lines is UTF-8", hint, at) from exc
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as exc:
        raise _not_json(text, exc, cut) from exc
    if not isinstance(value, dict):
        raise RowError(f"a line that is a {_kind(value)}", "every line is one JSON object")
    return text, value


def check_line(line: bytes, shape: RowShape, limit: IdLimit, meta: dict[str, Any], cut: bool) -> dict[str, Any] | None:
    """Check one line against every rule and return its fields under their own names; None for a repeated meta line.

    Raises
    ------
    RowError
        The first rule the line breaks, with its column.
    """
    text, value = parse_line(line, cut)
    kind = value.get("type")
    if kind == "meta":
        _check_repeated_meta(text, value, meta)
        return None
    if kind is not None and kind not in ROW_TYPES:
        raise RowError(f"type {kind!r}", "a line is of type meta or route", None, column_of(text, ["type"]))
    layout = layout_of(key for key, item in value.items() if item is not None)
    _check_presence(value, layout, shape)
    row = {name: value[key] for name, key in layout._asdict().items() if key is not None and name != "type"}
    for name in ("request", "position", "phase", "step", "rank", "domain", "layer"):
        if name in row:
            _check_field(text, name, getattr(layout, name), row[name], shape)
    rows = [row["ids"]] if "layer" in row else row["ids"]
    prefix: list[str | int] = [layout.ids or "ids"]
    if "layers" in row:
        _check_layers(text, row["layers"], shape)
    _check_row_count(text, prefix, rows, row, shape)
    top_k = shape.top_k or (len(rows[0]) if isinstance(rows[0], list) else 0)
    for i, ids in enumerate(rows):
        _check_top_k(text, prefix if "layer" in row else [*prefix, i], ids, top_k, limit)
    return row


def _not_json(text: str, exc: orjson.JSONDecodeError, cut: bool) -> RowError:
    at = min(exc.pos, len(text))
    start = at - (text[at - 1 : at] == "-")
    word = re.match(r"-?(NaN|Infinity|inf|nan)", text[start:])
    if word:
        return RowError(f"{word[0]} is not JSON", "expert ids are integers", "write the row without it", start + 1)
    column = at + 1
    if cut:
        hint = "the file ends inside this line: the copy or the recording was cut off; skipping 1 bad row drops it"
        return RowError("the last line is incomplete", "one JSON object per line", hint, column)
    reason = str(exc).split(": line")[0]
    return RowError(f"not JSON: {reason}", "one JSON object per line", None, column)


def _check_repeated_meta(text: str, value: dict[str, Any], meta: dict[str, Any]) -> None:
    for key in ("num_experts", "top_k", "moe_layer_ids", "layers_logged"):
        if key in value and key in meta and value[key] != meta[key]:
            hint = "are these two traces joined into one file? read them one by one"
            what = f"a second meta line says {key} {value[key]}, the first {meta[key]}"
            raise RowError(what, "one model per trace", hint, column_of(text, [key]))


def _check_presence(value: dict[str, Any], layout: Layout, shape: RowShape) -> None:
    if layout.ids is None:
        hint = f"the line has {', '.join(map(str, value)) or 'no keys'}"
        raise RowError("no expert ids", f"a row has one of {', '.join(ALIASES['ids'])}", hint)
    # told apart by shape, so that the message can say which of the two forms was probably meant
    flat = isinstance(value[layout.ids], list) and not any(isinstance(item, list) for item in value[layout.ids])
    if flat and layout.layer is None:
        hint = f"name it {', '.join(ALIASES['layer'])}; or give [[ids], …], one list per MoE layer"
        raise RowError("ids of one layer without the layer's number", "a per-layer row has a layer", hint)
    if shape.columns is None:
        return
    for name in sorted(shape.columns ^ layout.columns):
        state = "no" if name in shape.columns else "a"
        first = "has one" if name in shape.columns else "has none"
        rule = f"{' or '.join(ALIASES[name])} stands on every line or on none; the first row {first}"
        raise RowError(f"{state} {name}", rule)


def _check_field(text: str, name: str, key: str, value: Any, shape: RowShape) -> None:
    label = name in ("request", "domain")
    if name == "phase":
        known = type(value) in (str, int) and value in PHASE_NUMBERS
        what, rule = f"{key} {value!r}", "phase is prefill or decode"
    elif label and type(value) is str:
        known = shape.kinds.get(name, str) is str
        what, rule = f"{key} {value!r} among integers", f"{key} is an integer on every line, or a string on every line"
    else:
        known = type(value) is int and -(1 << 63) <= value < 1 << 63
        what, rule = f"{key} {_shown(value)}", f"{key} is an integer" + (" or a string" if label else "")
        if known and label and shape.kinds.get(name, int) is not int:
            known, what = False, f"{key} {value} among strings"
        if known and name == "layer" and shape.known_layers is not None and value not in shape.known_layers:
            known, rule = False, f"the meta line names the layers {_short(list(shape.known_layers))}"
        if known and name == "domain" and shape.num_domains is not None and not 0 <= value < shape.num_domains:
            known, rule = False, f"domain indexes the {shape.num_domains} domains of the meta line"
    if not known:
        raise RowError(what, rule, None, column_of(text, [key]))


def _check_layers(text: str, layers: Any, shape: RowShape) -> None:
    if not isinstance(layers, list) or any(type(i) is not int for i in layers):
        raise RowError(
            "layers is not a list of integers",
            "layers lists the layer ids of the rows",
            None,
            column_of(text, ["layers"]),
        )
    if shape.layers is not None and layers != shape.layers:
        hint = "leave out tokens that were not recorded in all layers, or write one line per layer"
        what = f"layers {_short(layers)} differ from {_short(shape.layers)} of the first token"
        raise RowError(what, "every token has the same layers", hint, column_of(text, ["layers"]))


def _check_row_count(text: str, path: list[str | int], rows: Any, row: dict[str, Any], shape: RowShape) -> None:
    if not isinstance(rows, list) or not rows:
        what = f"{path[0]} is {_shown(rows)}"
        raise RowError(what, "expert ids are [[k ids] per MoE layer]", None, column_of(text, path))
    expected = shape.num_layers if "layer" not in row else 1
    if "layers" in row and len(row["layers"]) != len(rows):
        expected = len(row["layers"])
    if expected is not None and len(rows) != expected:
        what = f"the token has ids for {len(rows)} layers"
        hint = "leave out tokens that were not recorded in all layers"
        raise RowError(what, f"{expected} layers for every token", hint, column_of(text, path))


def _check_top_k(text: str, path: list[str | int], ids: Any, top_k: int, limit: IdLimit) -> None:
    if not isinstance(ids, list) or not ids:
        what = f"{_shown(ids)} in place of a list of ids"
        raise RowError(what, "expert ids are [[k ids] per MoE layer]", None, column_of(text, path))
    for i, expert in enumerate(ids):
        if type(expert) is not int:
            hint = f"write {int(expert)}" if isinstance(expert, float) and expert.is_integer() else None
            raise RowError(f"expert id {_shown(expert)}", "expert ids are integers", hint, column_of(text, [*path, i]))
    if len(ids) != top_k:
        hint = "every layer chooses the same number of experts; does the recorder leave out dropped choices?"
        what = f"{len(ids)} ids in one layer: {_short(ids)}"
        raise RowError(what, f"top-{top_k} in every row", hint, column_of(text, path))
    problem = top_k_problem(ids, limit)
    if problem is not None:
        i, what, rule, hint = problem
        raise RowError(what, rule, hint, column_of(text, [*path, i]))


def _short(values: list[Any]) -> str:
    return str(values) if len(values) <= 16 else f"[{values[0]}, {values[1]}, … {values[-1]}] ({len(values)})"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f"{text if len(text) <= 40 else text[:40] + '…'} ({_kind(value)})"


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", float: "float", int: "integer"}
    return "null" if value is None else kinds[type(value)]
