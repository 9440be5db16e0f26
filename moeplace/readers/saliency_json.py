"""Saliency JSON: expert counts per layer, beside the gate weights and saliencies that pruning uses.

``{"arch", "n_expert", "tokens", "layers": {"3": {"cnt": [E], "gate": [E], "sal": [E]}}}``; only the counts are read.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._common import ReaderOptions
from moeplace.readers._counts import checked_counts
from moeplace.readers._nested import json_value
from moeplace.trace import Counts

NAME = "saliency-json"
DESCRIPTION = "Saliency JSON: n_expert, tokens and layers with the counts (cnt) of each expert"

_RULE = "layers is {layer number: {cnt: [one count per expert]}}"


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like saliency JSON."""
    is_object = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    return 90 if is_object and b'"layers"' in head and re.search(rb'"cnt"\s*:\s*\[', head) else 0


def open(source: InputFile, options: ReaderOptions) -> Counts:
    """Read the counts; top-k is the choices per token when ``tokens`` is given.

    Raises
    ------
    TraceError
        A layer has no counts, or not one per expert.
    """
    with source.stream() as stream:
        value = json_value(stream.read(), source.name, _RULE)
    layers = value.get("layers") if isinstance(value, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise TraceError("no layers", rule=_RULE, where=Location(file=source.name, element="layers"))
    rows: dict[int, Any] = {}
    for name, layer in layers.items():
        counts = layer.get("cnt") if isinstance(layer, dict) else None
        where = Location(file=source.name, element=f"layers.{name}.cnt")
        if not re.fullmatch(r"\d{1,9}", name) or not isinstance(counts, list):
            raise TraceError("no counts of a numbered layer", rule=_RULE, where=where)
        odd = [count for count in counts if type(count) not in (int, float)]
        if odd:
            raise TraceError(f"{odd[0]!r} in place of a count", rule="counts are numbers", where=where)
        expected = value.get("n_expert") or len(next(iter(rows.values()), counts))
        if len(counts) != expected:
            raise TraceError(f"{len(counts)} counts", rule=f"one per expert: {expected}", where=where)
        rows[int(name)] = counts
    order = sorted(rows)
    fields = {"layer_ids": order, "num_experts": value.get("n_expert"), "tokens": value.get("tokens")}
    fields["model_id"] = value.get("arch")
    return checked_counts(np.array([rows[i] for i in order]), "cnt", source.name, fields, options)
