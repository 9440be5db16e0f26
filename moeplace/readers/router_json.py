"""Per-request JSON with ``router_data``: the generated tokens of one request, each a dict of layers.

The layout of GPT-OSS-MoE-ExpertFingerprinting: ``{"router_data": [{"token_146": {"layer_0": {"selected_experts": [31,
21, 22, 6], "selected_probs": […]}, …}}, …], …}``. Requests come as single files, folders or tar archives of them.
"""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile, InputFolder
from moeplace.readers._common import ReaderOptions
from moeplace.readers._nested import collector_paused, ids_array, json_value, row_problem
from moeplace.readers._request import Request
from moeplace.readers._request_stream import RequestStream, looks_in_folder, looks_in_head

NAME = "router-json"
DESCRIPTION = (
    "Per-request JSON with router_data: [{token_N: {layer_L: {selected_experts}}}]; files, folders or tar archives"
)

_RULE = 'router_data is a list of {"token_<position>": {"layer_<id>": {"selected_experts": [ids]}}}'
_HEAD = re.compile(rb'\s*\{.*?"(router_data|full_text|generated_only|original_prompt)"\s*:', re.DOTALL)
_LOOKED_AT = 4096


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like a request with router data, or a tar archive of them."""
    return looks_in_head(head, _looks)


def sniff_folder(folder: Path) -> int:
    """Score how much one of a folder's first JSON files looks like a request with router data."""
    return looks_in_folder(folder, _looks)


def open(source: InputFile, options: ReaderOptions) -> RequestStream:
    """Open a request, or a tar archive of requests, as a stream.

    Raises
    ------
    TraceError
        The first request breaks the format, or the model disagrees with it.
    """
    return RequestStream(source, options, parse_router_data)


def open_folder(folder: Path, options: ReaderOptions) -> RequestStream:
    """Open a folder of requests; the errors are those of :func:`open`."""
    return RequestStream(InputFolder(folder), options, parse_router_data)


def parse_router_data(data: bytes, file: str) -> Request:
    """Parse the JSON of one request.

    Raises
    ------
    TraceError
        It is not JSON, or has no such list; says the token and layer.
    """
    with collector_paused():
        document = json_value(data, file, _RULE)
        tokens = document.get("router_data") if isinstance(document, dict) else None
        if not isinstance(tokens, list) or not tokens:
            what = "no router_data" if tokens is None else "router_data without tokens"
            raise TraceError(what, rule=_RULE, where=Location(file=file))
        names, first = _layers(tokens[0], file)
        try:
            # one dict of one token each, all with the layers of the first
            values = [value for token in tokens for value in token.values()]
            ids = ids_array([value[name]["selected_experts"] for value in values for name in names], data)
            same = all(len(value) == len(names) for value in values) and len(values) == len(tokens)
            same &= [*chain(*tokens)] == [f"token_{first + i}" for i in range(len(tokens))]
        except (AttributeError, KeyError, TypeError):
            ids, same = None, False
        if ids is None or not same:
            raise _first_problem(tokens, names, first, file)
    return Request(
        layer_ids=tuple(_number(name) for name in names),
        experts=ids.reshape(len(tokens), len(names), -1),
        step_tokens=(0, *[1] * len(tokens)),
        first_position=first,
    )


def _layers(token: Any, file: str) -> tuple[list[str], int]:
    """Return the names of the layers of the first token, by number, and its position."""
    where = Location(file=file, element="router_data[0]")
    if not isinstance(token, dict) or len(token) != 1:
        raise TraceError("the first token is no dict of one token", rule=_RULE, where=where)
    ((name, layers),) = token.items()
    numbered = isinstance(layers, dict) and layers and all(re.fullmatch(r"layer_\d+", layer) for layer in layers)
    if not numbered or not re.fullmatch(r"token_\d+", name):
        raise TraceError(f"{name!r} does not name a token and its layers", rule=_RULE, where=where)
    return sorted(layers, key=_number), _number(name)


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _first_problem(tokens: list[Any], names: list[str], first: int, file: str) -> TraceError:
    """Find the first place that breaks the format, by token and layer."""
    top_k: int | None = None
    for i, token in enumerate(tokens):
        name = f"token_{first + i}"
        layers = token.get(name) if isinstance(token, dict) and len(token) == 1 else None
        if not isinstance(layers, dict):
            rule = "tokens follow each other, one dict of layers each"
            return TraceError(f"no {name}", rule=rule, where=Location(file=file, element=f"router_data[{i}]"))
        if layers.keys() != set(names):
            odd = sorted(layers.keys() ^ set(names))[0]
            rule = "every token has the layers of the first"
            return TraceError(f"{odd} in one token only", rule=rule, where=Location(file=file, element=name))
        for layer in names:
            value = layers[layer]
            row = value.get("selected_experts") if isinstance(value, dict) else None
            problem = row_problem(row, top_k)
            if problem is not None:
                what, rule, hint = problem
                where = Location(file=file, element=f"{name}, {layer}")
                return TraceError(what, rule=rule, hint=hint, where=where)
            top_k = len(row or ())
    return TraceError("router_data breaks its format", rule=_RULE, where=Location(file=file))


def _looks(head: bytes) -> bool:
    beginning = head.removeprefix(b"\xef\xbb\xbf")[:_LOOKED_AT]
    return _HEAD.match(beginning) is not None and (b"router_data" in head or b"generated_only" in head)
