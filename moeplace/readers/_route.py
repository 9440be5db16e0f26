"""Tokens put together from one-line-per-token-and-layer rows, in whatever order an engine writes its layers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moeplace.errors import Location
from moeplace.readers._common import BadRow, BadRows, Columns
from moeplace.trace import id_dtype

_EXTRAS = ("phase", "step", "rank", "domain")


@dataclass(slots=True)
class _Token:
    """A token some of whose layers have been read; ``extras`` are those of its first row."""

    line: int
    missing: int
    rows: list[bytes | None]
    extras: tuple[int, ...]


@dataclass(slots=True)
class _Spans:
    """Integers as sorted half-open spans ``[start, end, start, end, …]``: small when they are mostly consecutive."""

    bounds: list[int] = field(default_factory=list)

    def __contains__(self, value: int) -> bool:
        return bisect_right(self.bounds, value) % 2 == 1

    def add(self, value: int) -> None:
        """Add a value that is not there yet."""
        bounds = self.bounds
        i = bisect_right(bounds, value)
        touches_left = i > 0 and bounds[i - 1] == value
        touches_right = i < len(bounds) and bounds[i] == value + 1
        if touches_left and touches_right:
            del bounds[i - 1 : i + 1]
        elif touches_left:
            bounds[i - 1] = value + 1
        elif touches_right:
            bounds[i] = value
        else:
            bounds[i:i] = [value, value + 1]


class TokenAssembler:
    """Collects rows of one layer each and gives out tokens in the order in which they become complete.

    Memory is that of the incomplete tokens, plus the spans of finished positions of each request.

    Parameters
    ----------
    file
        Name for errors.
    layer_ids
        Layer numbers as the rows have them, increasing.
    num_experts
        Experts per layer; gives the ids' type.
    bad
        Tally for repeated and incomplete tokens.
    """

    def __init__(self, file: str, layer_ids: Sequence[int], num_experts: int, bad: BadRows) -> None:
        self._file, self._layer_ids, self._bad = file, tuple(layer_ids), bad
        self._dtype = np.dtype(id_dtype(num_experts))
        self._pending: dict[tuple[int, int], _Token] = {}
        self._finished: dict[int, _Spans] = {}

    def add(self, rows: Columns) -> Columns | None:
        """Take rows in and return the tokens that they complete; None when there are none."""
        names = [name for name in _EXTRAS if name in rows]
        row_bytes = rows["experts"].shape[2] * self._dtype.itemsize
        data = rows["experts"].astype(self._dtype, copy=False).tobytes()
        keys = list(zip(rows["request"].tolist(), rows["position"].tolist(), strict=True))
        layers = np.searchsorted(np.asarray(self._layer_ids), rows["layer"]).tolist()
        extras = list(zip(*(rows[name].tolist() for name in names), strict=True)) if names else [()] * len(keys)
        lines = rows["line"].tolist()
        num_layers = len(self._layer_ids)
        done: list[tuple[tuple[int, int], _Token]] = []
        for i, (key, layer) in enumerate(zip(keys, layers, strict=True)):
            token = self._pending.get(key)
            if token is None:
                # completed tokens are forgotten but for their position, or a repeat would start the token anew
                if key[0] in self._finished and key[1] in self._finished[key[0]]:
                    self._repeated(key, layer, lines[i])
                    continue
                token = self._pending[key] = _Token(lines[i], num_layers, [None] * num_layers, extras[i])
            if token.rows[layer] is not None:
                self._repeated(key, layer, lines[i])
                continue
            token.rows[layer] = data[i * row_bytes : (i + 1) * row_bytes]
            token.missing -= 1
            if not token.missing:
                del self._pending[key]
                self._finished.setdefault(key[0], _Spans()).add(key[1])
                done.append((key, token))
        return self._joined(done, names, rows["experts"].shape[2]) if done else None

    def finish(self) -> None:
        """Count the tokens that never became complete as bad rows."""
        for (_, position), token in self._pending.items():
            lacking = [i for i, row in zip(self._layer_ids, token.rows, strict=True) if row is None]
            shown = ", ".join(map(str, lacking[:8])) + ("…" if len(lacking) > 8 else "")
            self._bad.add(
                BadRow(
                    what=f"token {position}, which starts here, lacks {len(lacking)} layers: {shown}",
                    rule=f"every token has a row for each of the {len(self._layer_ids)} layers",
                    hint="was the recording cut off? layers_logged in a meta line says which layers count",
                    where=Location(file=self._file, line=token.line, column=1),
                )
            )

    def _joined(self, done: list[tuple[tuple[int, int], _Token]], names: list[str], top_k: int) -> Columns:
        data = b"".join(row for _, token in done for row in token.rows if row is not None)
        experts = np.frombuffer(data, self._dtype).reshape(len(done), len(self._layer_ids), top_k)
        request, position = np.array([key for key, _ in done], np.int64).T
        columns: Columns = {"experts": experts, "request": request, "position": position}
        for j, name in enumerate(names):
            columns[name] = np.array([token.extras[j] for _, token in done], np.int64)
        return columns

    def _repeated(self, key: tuple[int, int], layer: int, line: int) -> None:
        self._bad.add(
            BadRow(
                what=f"token {key[1]}, layer {self._layer_ids[layer]}: the request has this row already",
                rule="one row per request, token and layer",
                hint="recorders log the engine's dummy profiling run before the first request: delete its rows "
                "(skipping repeated rows would keep the dummy ones)",
                where=Location(file=self._file, line=line, column=1),
            )
        )
