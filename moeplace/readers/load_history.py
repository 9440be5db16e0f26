"""Load histories of the EPLB benchmarks: ``{"load_history": [{"logical_expert_load": [[…] per layer]}, …]}``.

Each entry is a step; other fields of an entry are ignored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._common import ReaderOptions
from moeplace.readers._counts import checked_counts, nested_array
from moeplace.readers._nested import collector_paused, json_value
from moeplace.trace import Counts

NAME = "load-history"
DESCRIPTION = "Load history (JSON): load_history, a list of steps with logical_expert_load [layer][expert]"

_RULE = "load_history is a list of {logical_expert_load: [layer][expert]}"


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like a load history."""
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return 0
    return 90 if b'"load_history"' in head else 60 if b'"logical_expert_load"' in head else 0


def open(source: InputFile, options: ReaderOptions) -> Counts:
    """Read a load history as counts; every entry is a step.

    Raises
    ------
    TraceError
        An entry has no logical_expert_load, or one of another shape; a load is negative or not whole.
    """
    with source.stream() as stream, collector_paused():
        value = json_value(stream.read(), source.name, _RULE)
    history = value.get("load_history") if isinstance(value, dict) else None
    if not isinstance(history, list) or not history:
        where = Location(file=source.name, element="load_history")
        raise TraceError("no steps", rule=_RULE, where=where)
    steps: list[npt.NDArray[Any]] = []
    for i, entry in enumerate(history):
        key = f"load_history[{i}].logical_expert_load"
        where = Location(file=source.name, element=key)
        load = entry.get("logical_expert_load") if isinstance(entry, dict) else None
        if not isinstance(load, list):
            raise TraceError("no logical_expert_load", rule=_RULE, where=where)
        matrix = nested_array(load, key, source.name)
        if matrix.ndim != 2 or matrix.dtype.kind not in "iuf" or (steps and matrix.shape != steps[0].shape):
            what = f"shape {list(matrix.shape)} of {matrix.dtype}"
            rule = (
                f"[layer][expert] numbers, as many as in the first step{f': {list(steps[0].shape)}' if steps else ''}"
            )
            raise TraceError(what, rule=rule, where=where)
        steps.append(matrix)
    return checked_counts(np.stack(steps), "logical_expert_load", source.name, {}, options)
