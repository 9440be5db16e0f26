"""Responses of serving engines: where their routed experts stand, and what they decode to."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moeplace.errors import InputError, Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._arrays import DAMAGE
from moeplace.readers._common import ModelLike
from moeplace.readers._nested import json_value

RULE = "a response has routed_experts in meta_info, sglext or its choices"
_ASK = "were they asked for? --enable-return-routed-experts, and return_routed_experts in SGLang's requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The routed experts of one request as they were sent, and what its response counts."""

    value: Any
    name: str | None
    prompt_tokens: int | None
    total_tokens: int | None


def responses(source: InputFile) -> Iterator[tuple[int | None, Any]]:
    """Yield the responses of a JSON or JSONL file with their lines; a line that is not JSON as its error."""
    with source.stream() as stream:
        number, line = next(((i, line) for i, line in enumerate(stream, 1) if line.strip()), (0, b""))
        try:
            first = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except orjson.JSONDecodeError:
            value = json_value(b"\n" * (number - 1) + line + stream.read(), source.name, RULE)
            yield from ((None, item) for item in _each(value))
            return
        yield from ((number, item) for item in _each(first))
        for following, text in enumerate(stream, number + 1):
            if text.strip():
                try:
                    value = json_value(text, source.name, RULE, following)
                except TraceError as exc:
                    yield following, exc
                else:
                    yield from ((following, item) for item in _each(value))


def routed_in(response: Any, where: Location) -> list[Routed]:
    """Find the routed experts of a response: one per choice that has them.

    Raises
    ------
    TraceError
        The response has none.
    """
    if isinstance(response, InputError):
        raise response
    if not isinstance(response, dict):
        raise TraceError(f"a JSON {type(response).__name__} in place of a response", rule=RULE, where=where)
    wrapped = response.get("response")
    if isinstance(wrapped, dict) and isinstance(wrapped.get("body"), dict):
        response = {"id": response.get("custom_id")} | wrapped["body"] if response.get("custom_id") else wrapped["body"]
    meta, usage = _dict(response, "meta_info"), _dict(response, "usage")
    prompt = _count(meta, "prompt_tokens") or _count(usage, "prompt_tokens")
    completion = _count(meta, "completion_tokens") or _count(usage, "completion_tokens")
    choices = [choice for choice in response.get("choices") or () if isinstance(choice, dict)]
    found = [value for part in (response, *choices) if (value := _value(part)) is not None]
    if not found:
        raise TraceError("no routed_experts", rule=RULE, hint=_ASK, where=where)
    # the usage of several choices is their sum
    total = None if prompt is None or completion is None or len(choices) > 1 else prompt + completion
    name = next((item for item in (response.get("id"), meta.get("id"), response.get("rid")) if item is not None), None)
    return [
        Routed(
            value=value,
            name=None if name is None else f"{name}#{i}" if len(found) > 1 else str(name),
            prompt_tokens=prompt,
            total_tokens=total,
        )
        for i, value in enumerate(found)
    ]


def decoded(value: Any, model: ModelLike | None, where: Location) -> npt.NDArray[np.integer[Any]]:
    """Decode routed experts to ``[token, layer, k]``.

    Raises
    ------
    TraceError
        They are not base64 of an array of integers, or their shape is not known without a model.
    """
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as exc:
            raise TraceError(f"not base64: {exc}", rule="routed_experts are base64", where=where) from exc
        ids = _npy(data, where) if data.startswith(b"\x93NUMPY") else _raw(data, model, where)
    else:
        try:
            ids = np.asarray(value)
        except ValueError:
            ids = np.zeros(0, object)
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or 0 in ids.shape[1:]:
        what = f"{ids.dtype} of shape {list(ids.shape)}"
        raise TraceError(what, rule="routed_experts are integers [token, layer, k]", where=where)
    largest, least = int(ids.max(initial=0)), int(ids.min(initial=0))
    if least < 0 or largest > np.iinfo(np.uint16).max:
        return ids
    return ids.astype(np.uint8 if largest <= np.iinfo(np.uint8).max else np.uint16, copy=False)


def _npy(data: bytes, where: Location) -> npt.NDArray[Any]:
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except DAMAGE as exc:
        raise TraceError(f"not a whole npy: {exc}", hint="was the response cut off?", where=where) from exc


def _raw(data: bytes, model: ModelLike | None, where: Location) -> npt.NDArray[Any]:
    """Shape raw int32 by the model: SGLang does not send a shape."""
    if model is None:
        rule = "raw int32 [token, layer, k] is sent without its shape"
        hint = "name the model that was recorded with --model: it says layers and top-k"
        raise TraceError(f"{len(data)} bytes of unknown shape", rule=rule, hint=hint, where=where)
    layers = int(getattr(model, "num_layers", 0) or model.moe_layer_ids[-1] + 1)
    row = 4 * layers * model.top_k
    if len(data) % row:
        what = f"{len(data)} bytes, which {layers} layers of top-{model.top_k} do not divide"
        rule = f"{row} bytes of int32 per token of model {model.name}"
        raise TraceError(what, rule=rule, hint="is --model the model that was recorded?", where=where)
    return np.frombuffer(data, "<i4").reshape(-1, layers, model.top_k)


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _value(part: dict[str, Any]) -> Any:
    for holder in (_dict(part, "meta_info"), _dict(part, "sglext"), _dict(part, "sgl_ext"), part):
        if holder.get("routed_experts") is not None:
            return holder["routed_experts"]
    return None


def _dict(value: dict[str, Any], key: str) -> dict[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _count(value: dict[str, Any], key: str) -> int | None:
    number = value.get(key)
    return number if type(number) is int and number >= 0 else None
