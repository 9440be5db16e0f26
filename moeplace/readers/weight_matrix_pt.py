"""Weight matrices of EPLB-style balancers as PyTorch or safetensors files: how much work each expert had, per layer.

A tensor ``[layer, expert]`` or ``[step, layer, expert]``, alone, in a list with one tensor per layer or step, or in a
dict under one of the usual names. ``.pt`` files are loaded with ``weights_only=True`` alone.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.files import InputFile
from moeplace.readers._common import ReaderOptions
from moeplace.readers._counts import checked_counts
from moeplace.readers._extras import is_safetensors, load_safetensors
from moeplace.readers._torch import is_pt, load_pt, to_numpy
from moeplace.trace import Counts

NAME = "weight-matrix-pt"
DESCRIPTION = "EPLB weight matrix in .pt or .safetensors: [layer, expert] or [step, layer, expert]"

_KEYS = ("logical_count", "counts", "weight", "weights", "workload", "expert_load", "logical_expert_load")
_PLACEMENTS = ("physical_to_logical_map", "logical_to_physical_map", "phy2log", "log2phy", "expert_map")
_FLOATS = re.compile(rb"(Float|Double|Half|BFloat16)Storage")
_RULE = "a tensor [layer, expert] or [step, layer, expert]"


def sniff(head: bytes, name: str) -> int:
    """Score PyTorch and safetensors files low: what they hold is known only after loading, other readers go first."""
    if is_safetensors(head):
        return 30
    if not is_pt(head):
        return 0
    # recorders count in integers: the same name with floats is a balancer's weights
    return (50 if _FLOATS.search(head) else 40) if b"logical_count" in head else 20


def open(source: InputFile, options: ReaderOptions) -> Counts:
    """Read a weight matrix as counts.

    Raises
    ------
    MissingExtraError
        PyTorch, or the package safetensors, is not installed.
    TraceError
        The file holds no such tensor, or several; a weight is negative or not whole.
    """
    value = load_safetensors(source) if is_safetensors(source.head()) else load_pt(source)
    key, matrix = _found(value, source.name)
    return checked_counts(matrix, key, source.name, {}, options)


def _found(value: Any, file: str) -> tuple[str, npt.NDArray[Any]]:
    """Find the one tensor that is the weights."""
    if not isinstance(value, dict):
        return "weight", _array(value, "weight", file)
    for name in _PLACEMENTS:
        if name in value:
            where = Location(file=file, element=name)
            hint = "a placement is scored against a trace; weights count how often each expert was chosen"
            raise TraceError("holds a placement, not weights", rule=_RULE, hint=hint, where=where)
    names = [name for name in _KEYS if name in value] or list(value)
    if len(names) != 1 and names[0] not in _KEYS:
        hint = (
            f"it holds {', '.join(sorted(map(str, names))[:12]) or 'nothing'}; save the weights alone or as {_KEYS[0]}"
        )
        raise TraceError(f"{len(names)} entries and no {_KEYS[0]}", rule=_RULE, hint=hint, where=Location(file=file))
    return str(names[0]), _array(value[names[0]], str(names[0]), file)


def _array(value: Any, key: str, file: str) -> npt.NDArray[Any]:
    value = to_numpy(value)
    if isinstance(value, list | tuple) and value:
        parts = [to_numpy(part) for part in value]
        shapes = {np.shape(part) if isinstance(part, np.ndarray | list | tuple) else () for part in parts}
        if len(shapes) == 1:
            try:
                value = np.array(parts)
            except ValueError:
                value = None
    if not isinstance(value, np.ndarray) or value.ndim not in (2, 3):
        shown = f"shape {list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise TraceError(shown, rule=_RULE, where=Location(file=file, element=key))
    return value
