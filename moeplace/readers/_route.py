"""Tokens put together from one-line-per-token-and-layer rows, in whatever order an engine writes its layers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location
from moeplace.readers._common import BadRow, BadRows, Columns, changes
from moeplace.trace import IntArray, id_dtype

_EXTRAS = ("phase", "step", "rank", "domain")


@dataclass(slots=True)
class _Spans:
    """Integers as sorted half-open spans ``[start, end, start, end, …]``: small when they are mostly consecutive."""

    bounds: list[int] = field(default_factory=list)

    def __contains__(self, value: int) -> bool:
        return bisect_right(self.bounds, value) % 2 == 1

    def meets(self, start: int, end: int) -> bool:
        """Whether any of ``start..end-1`` is there."""
        return start in self or bisect_right(self.bounds, start) != bisect_left(self.bounds, end)

    def add(self, start: int, end: int) -> None:
        """Add ``start..end-1``, none of which is there yet."""
        bounds = self.bounds
        i = bisect_right(bounds, start)
        touches_left = i > 0 and bounds[i - 1] == start
        touches_right = i < len(bounds) and bounds[i] == end
        if touches_left and touches_right:
            del bounds[i - 1 : i + 1]
        elif touches_left:
            bounds[i - 1] = end
        elif touches_right:
            bounds[i] = start
        else:
            bounds[i:i] = [start, end]


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
        self._finished: dict[int, _Spans] = {}
        # by token: its columns, its ids [token, layer, k], the layers seen and how many are missing
        self._pending: Columns = {"line": np.zeros(0, np.int64)}

    def add(self, rows: Columns) -> Columns | None:
        """Take rows in and return the tokens that they complete; None when there are none.

        Complexity: O(n log n) for n rows and incomplete tokens, without a loop over them.
        """
        layer = np.searchsorted(np.asarray(self._layer_ids), rows["layer"])
        # the rows of a token side by side, and of these the ones of a layer in the order of the file
        order = np.lexsort((layer, rows["position"], rows["request"]))
        layer = layer[order]
        new = changes(rows["request"][order], rows["position"][order])
        slot = self._slots(rows, np.minimum.reduceat(order, np.flatnonzero(new)))[np.cumsum(new) - 1]
        cell = slot * len(self._layer_ids) + layer
        pending = self._pending
        seen = pending["seen"].reshape(-1)
        repeated = slot < 0
        repeated[~repeated] = seen[cell[~repeated]]
        repeated[1:] |= ~new[1:] & (layer[1:] == layer[:-1])
        if repeated.any():
            for row in np.sort(order[repeated]).tolist():
                self._repeated(rows, row)
            order, slot, cell = order[~repeated], slot[~repeated], cell[~repeated]
        top_k = rows["experts"].shape[2]
        pending["experts"].reshape(-1, top_k)[cell] = rows["experts"][order, 0]
        seen[cell] = True
        pending["missing"] -= np.bincount(slot, minlength=len(pending["missing"]))
        return self._completed(slot, order)

    def finish(self) -> None:
        """Count the tokens that never became complete as bad rows."""
        for token in np.argsort(self._pending["line"]).tolist():
            seen = self._pending["seen"][token].tolist()
            lacking = [i for i, there in zip(self._layer_ids, seen, strict=True) if not there]
            shown = ", ".join(map(str, lacking[:8])) + ("…" if len(lacking) > 8 else "")
            position, line = (int(self._pending[name][token]) for name in ("position", "line"))
            self._bad.add(
                BadRow(
                    what=f"token {position}, which starts here, lacks {len(lacking)} layers: {shown}",
                    rule=f"every token has a row for each of the {len(self._layer_ids)} layers",
                    hint="was the recording cut off? layers_logged in a meta line says which layers count",
                    where=Location(file=self._file, line=line, column=1),
                )
            )

    def _slots(self, rows: Columns, first: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Index among the pending tokens of those whose first rows are given, in the order of their keys.

        Tokens that are new are added; -1 stands for tokens that were complete before.
        """
        names = ("request", "position", "line", *(name for name in _EXTRAS if name in rows))
        heads = {name: rows[name][first] for name in names}
        num_layers, num_pending = len(self._layer_ids), len(self._pending["line"])
        slot = _found(heads, self._pending)
        new = np.flatnonzero(slot < 0)
        # complete tokens are forgotten but for their position, or a repeat would start the token anew
        new = new[~self._are_finished(heads["request"][new], heads["position"][new])]
        if not new.size:
            return slot
        slot[new] = num_pending + np.arange(new.size)
        added = {name: column[new] for name, column in heads.items()}
        added["experts"] = np.empty((new.size, num_layers, rows["experts"].shape[2]), self._dtype)
        added["seen"] = np.zeros((new.size, num_layers), np.bool_)
        added["missing"] = np.full(new.size, num_layers)
        if num_pending:
            added = {name: np.concatenate((self._pending[name], column)) for name, column in added.items()}
        self._pending = added
        return slot

    def _completed(self, slot: npt.NDArray[np.intp], order: npt.NDArray[np.intp]) -> Columns | None:
        """Take out the tokens that have become complete; ``slot`` and ``order`` are token and place of the rows."""
        complete = self._pending["missing"] == 0
        if not complete.any():
            return None
        starts = np.flatnonzero(changes(slot))
        last, slot = np.maximum.reduceat(order, starts), slot[starts]
        last, slot = last[complete[slot]], slot[complete[slot]]
        slot = slot[np.argsort(last)]
        columns = {name: c[slot] for name, c in self._pending.items() if name not in ("line", "seen", "missing")}
        self._pending = {name: column[~complete] for name, column in self._pending.items()}
        by_key = np.lexsort((columns["position"], columns["request"]))
        for request, start, end, _ in _runs(columns["request"][by_key], columns["position"][by_key]):
            self._finished.setdefault(request, _Spans()).add(start, end)
        return columns

    def _are_finished(self, request: IntArray, position: IntArray) -> npt.NDArray[np.bool_]:
        """Mark the tokens, in the order of their keys, that were complete before."""
        finished = np.zeros(len(request), np.bool_)
        for number, start, end, at in _runs(request, position):
            spans = self._finished.get(number)
            if spans is not None and spans.meets(start, end):
                finished[at : at + end - start] = [value in spans for value in range(start, end)]
        return finished

    def _repeated(self, rows: Columns, row: int) -> None:
        position, layer, line = (int(rows[name][row]) for name in ("position", "layer", "line"))
        self._bad.add(
            BadRow(
                what=f"token {position}, layer {layer}: the request has this row already",
                rule="one row per request, token and layer",
                hint="recorders log the engine's dummy profiling run before the first request: delete its rows "
                "(skipping repeated rows would keep the dummy ones)",
                where=Location(file=self._file, line=line, column=1),
            )
        )


def _runs(request: IntArray, position: IntArray) -> Iterator[tuple[int, int, int, int]]:
    """Yield the runs of consecutive positions of a request: it, the first, the one past the last, and the place."""
    starts = np.flatnonzero(changes(request, position - np.arange(len(position))))
    lengths = np.diff(starts, append=len(position)).tolist()
    columns = (request[starts].tolist(), position[starts].tolist(), lengths, starts.tolist())
    for number, first, length, at in zip(*columns, strict=True):
        yield number, first, first + length, at


def _found(heads: Columns, pending: Columns) -> npt.NDArray[np.intp]:
    """Index among ``pending`` of each token of ``heads``; -1 where it is not among them."""
    num_pending = len(pending["line"])
    slot = np.full(len(heads["line"]), -1)
    if num_pending:
        request, position = (np.concatenate((pending[name], heads[name])) for name in ("request", "position"))
        order = np.lexsort((position, request))
        # a token stands right behind the pending one that it is
        at = np.flatnonzero(~changes(request[order], position[order]))
        slot[order[at] - num_pending] = order[at - 1]
    return slot
