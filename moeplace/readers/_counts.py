"""Counts out of any format: the rules of :mod:`moeplace.readers.counts` for an array that was read elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import TraceError
from moeplace.readers._arrays import ColumnReader
from moeplace.readers._common import ReaderOptions
from moeplace.readers.counts import matrix_of, settled_counts, whole_counts
from moeplace.trace import Counts

__all__ = ["checked_counts", "nested_array"]

nested_array = matrix_of  # nested lists → array, or an error that names the odd element


def checked_counts(
    counts: npt.NDArray[Any], key: str, file: str, fields: Mapping[str, Any], options: ReaderOptions
) -> Counts:
    """Check counts and settle the model's shape from them.

    Parameters
    ----------
    counts
        ``[layer, expert]`` or ``[step, layer, expert]``, whole numbers.
    key
        The array's name, for errors.
    file
        Name for errors.
    fields
        What the file says besides: any of ``layer_ids``, ``top_k``, ``num_experts``, ``tokens`` (per step, or per step
        and layer: gives top-k), ``model_id``, ``domain``, ``domains``, ``assumptions``; None where it says nothing.
    options
        The model, if the user names one.

    Raises
    ------
    TraceError
        A count is negative or not whole; shapes disagree; the model disagrees.
    """
    values = {name: np.array(value) for name, value in fields.items() if value is not None}
    reader = ColumnReader(file, values)
    whole = whole_counts(counts, key, file)
    if whole.ndim == 2:
        whole = whole[None]
    if whole.ndim != 3 or 0 in whole.shape:
        rule = "counts are [layer, expert] or [step, layer, expert]"
        raise TraceError(f"shape {list(counts.shape)}", rule=rule, where=reader.where(key))
    return settled_counts(whole, key, reader, options)
