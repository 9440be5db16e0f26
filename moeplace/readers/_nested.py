"""Nested JSON lists of expert ids into arrays: the fast way for good rows, and where it goes wrong for bad ones."""

from __future__ import annotations

import contextlib
import gc
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moeplace.errors import Location, TraceError
from moeplace.readers._common import IdLimit, top_k_problem


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector: parsed JSON has no cycles, and walking its many lists takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def json_value(data: bytes, file: str, rule: str, line: int | None = None) -> Any:
    """Parse JSON; ``line`` is the place of a JSON line in its file.

    Raises
    ------
    TraceError
        It is not JSON, with the line and column.
    """
    try:
        return orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as exc:
        cut = exc.pos >= len(data.decode(errors="replace").rstrip())
        raise TraceError(
            f"not JSON: {str(exc).split(': line')[0]}",
            rule=rule,
            hint="the recording or the copy was cut off" if cut else None,
            where=Location(file=file, line=exc.lineno if line is None else line, column=exc.colno),
        ) from exc


def ids_array(rows: Sequence[Any], data: bytes) -> npt.NDArray[np.unsignedinteger[Any]] | None:
    """Turn rows of ids into ``[row, k]``; None when a row is not k small integers (:func:`row_problem` says which).

    ``data`` is the text of the rows: without ``true`` and ``false`` in it, the types of the ids need no look.

    Complexity: O(ids), about 10 ns each.
    """
    try:
        lengths = set(map(len, rows))
        flat = list(chain.from_iterable(rows))
    except TypeError:
        return None
    if len(lengths) != 1 or 0 in lengths:
        return None
    if (b"true" in data or b"false" in data) and set(map(type, flat)) != {int}:
        return None
    ids: npt.NDArray[np.unsignedinteger[Any]]
    try:
        ids = np.frombuffer(bytes(flat), np.uint8)
    except (ValueError, TypeError):
        try:
            ids = np.frombuffer(array("H", flat), np.uint16)
        except (OverflowError, TypeError):
            return None
    return ids.reshape(-1, lengths.pop())


def row_problem(row: Any, top_k: int | None) -> tuple[str, str, str | None] | None:
    """Say what is wrong with one row of ids: what, rule and hint; None when it is ``top_k`` small integers."""
    expected = "k" if top_k is None else str(top_k)
    if not isinstance(row, list):
        return f"{_shown(row)} in place of a token's experts", f"a list of {expected} expert ids", None
    if not row or (top_k is not None and len(row) != top_k):
        return f"{len(row)} experts: {_shown(row)}", f"every token chooses {expected} experts in every layer", None
    odd = next((item for item in row if type(item) is not int), None)
    if odd is not None:
        return f"expert id {_shown(odd)}", "expert ids are integers", None
    limit = IdLimit()
    if any(not 0 <= item < limit.num_experts for item in row):
        problem = top_k_problem(row, limit)
        return None if problem is None else problem[1:]
    return None


def _shown(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 40 else text[:39] + "…"
