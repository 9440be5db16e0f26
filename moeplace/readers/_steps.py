"""One request of the per-request JSON: a list of steps, each a dict of layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.readers._nested import collector_paused, ids_array, json_value, row_problem
from moeplace.readers._request import Request, at_step

RULE = 'a request is a JSON list of steps, each {"<layer>": [[expert ids] per token] or null for a dense layer}'


def parse_request(data: bytes, file: str) -> Request:
    """Parse the JSON of one request.

    Raises
    ------
    TraceError
        It is not JSON, or not such a list; says the step, layer and token.
    """
    with collector_paused():
        steps = json_value(data, file, RULE)
        layers = _layers(steps, file)
        names = [name for name, _ in layers]
        try:
            values = [step[name] for step in steps for name in names]
            sizes = np.fromiter(map(len, values), np.int64, len(values)).reshape(len(steps), len(names))
            ids = ids_array(list(chain.from_iterable(values)), data)
            same = all(len(step) == len(steps[0]) for step in steps) and _dense_agree(steps, names)
        except (TypeError, KeyError):
            ids, same, sizes = None, False, np.zeros((1, 1), np.int64)
        if ids is None or not same or (sizes != sizes[:, :1]).any():
            raise _first_problem(steps, layers, file)
    tokens = tuple(sizes[:, 0].tolist())
    return Request(
        layer_ids=tuple(i for _, i in layers), experts=_by_token(ids, tokens, len(names)), step_tokens=tokens
    )


def _by_token(
    ids: npt.NDArray[np.unsignedinteger[Any]], tokens: Sequence[int], num_layers: int
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Bring rows ordered by step, layer and token into ``[token, layer, k]``."""
    top_k, first = ids.shape[1], tokens[0] * num_layers
    prefill = ids[:first].reshape(num_layers, tokens[0], top_k).transpose(1, 0, 2)
    if set(tokens[1:]) <= {1}:
        return np.concatenate([prefill, ids[first:].reshape(-1, num_layers, top_k)])
    parts, start = [prefill], first
    for size in tokens[1:]:
        end = start + size * num_layers
        parts.append(ids[start:end].reshape(num_layers, size, top_k).transpose(1, 0, 2))
        start = end
    return np.concatenate(parts)


def _layers(steps: Any, file: str) -> list[tuple[str, int]]:
    """Return the names and numbers of the MoE layers of the first step, by number."""
    where = Location(file=file)
    if not isinstance(steps, list) or not steps:
        what = "no steps" if isinstance(steps, list) else f"a JSON {type(steps).__name__} in place of the list of steps"
        raise TraceError(what, rule=RULE, where=where)
    first = steps[0]
    if not isinstance(first, dict):
        raise TraceError(f"a {type(first).__name__} in place of a step", rule=RULE, where=at_step(file, 0))
    odd = next((name for name in first if not (name.isascii() and name.isdecimal())), None)
    if odd is not None:
        raise TraceError(f"layer {odd!r}", rule="layers are keyed by their number", where=at_step(file, 0))
    layers = sorted(((name, int(name)) for name, value in first.items() if value is not None), key=lambda item: item[1])
    if not layers:
        raise TraceError("every layer is null", rule="null marks dense layers; some layer has experts", where=where)
    if len({number for _, number in layers}) < len(layers):
        raise TraceError("a layer stands twice", rule="layers are keyed by their number", where=at_step(file, 0))
    return layers


def _dense_agree(steps: Sequence[dict[str, Any]], names: Sequence[str]) -> bool:
    dense = steps[0].keys() - set(names)
    return all(step[name] is None for step in steps for name in dense)


def _first_problem(steps: Sequence[Any], layers: Sequence[tuple[str, int]], file: str) -> TraceError:
    """Find the first place that breaks the format, by step, layer and token."""
    rows: Any = next((value for _, value in _values(steps[:1], layers)), None)
    top_k = len(rows[0]) if isinstance(rows, list) and rows and isinstance(rows[0], list) else None
    for number, step in enumerate(steps):
        if not isinstance(step, dict):
            return TraceError(f"a {type(step).__name__} in place of a step", rule=RULE, where=at_step(file, number))
        problem = _step_problem(step, steps[0], layers, top_k)
        if problem is not None:
            element, what, rule, hint = problem
            return TraceError(what, rule=rule, hint=hint, where=at_step(file, number, element))
    return TraceError("no tokens in any step", rule="a request has at least one token", where=Location(file=file))


def _values(steps: Sequence[Any], layers: Sequence[tuple[str, int]]) -> list[tuple[str, Any]]:
    return [(name, step.get(name)) for step in steps if isinstance(step, dict) for name, _ in layers]


def _step_problem(
    step: dict[str, Any], first: dict[str, Any], layers: Sequence[tuple[str, int]], top_k: int | None
) -> tuple[str, str, str, str | None] | None:
    """Return the element of a step that is wrong, what, rule and hint."""
    names = {name for name, _ in layers}
    tokens = None
    for name, number in layers:
        rows = step.get(name)
        element = f"layer {number}"
        if name not in step or rows is None:
            what = "no such layer" if name not in step else "null"
            return element, what, "every step has the MoE layers of the first", "was the recording cut off?"
        if not isinstance(rows, list):
            return element, f"a {type(rows).__name__} in place of the tokens", RULE, None
        if tokens is not None and len(rows) != tokens:
            rule = "all layers of a step have the same tokens"
            return element, f"{len(rows)} tokens, but layer {layers[0][1]} has {tokens}", rule, None
        tokens = len(rows)
        for token, row in enumerate(rows):
            problem = row_problem(row, top_k)
            if problem is not None:
                return f"{element}, token {token}", *problem
    other = next((name for name, value in step.items() if name not in names and value is not None), None)
    if other is not None:
        rule = "a layer is dense (null) in every step or in none"
        return f"layer {other}", "experts in a layer that the first step does not have", rule, None
    if step.keys() != first.keys():
        odd = sorted(step.keys() ^ first.keys())
        return f"layer {odd[0]}", "the first step has other layers", "all steps have the same layers", None
    return None
