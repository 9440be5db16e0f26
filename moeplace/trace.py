"""Traces: who was routed where, per token and MoE layer.

Three values live here. A :class:`Trace` holds routed tokens; :class:`Counts` holds only how often each expert was
chosen; a :class:`TraceStream` yields a long trace block by block so that memory does not grow with its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.fingerprint import TraceDigest
from moeplace.frozen import digest, frozen_array, replaced, seal

PREFILL, DECODE = 0, 1
PHASES = ("prefill", "decode")
COLUMNS = ("experts", "request", "position", "phase", "step", "rank", "domain")

IntArray: TypeAlias = npt.NDArray[np.signedinteger[Any]]
BLOCK_BYTES = 8 << 20
SCHEMA = "moeplace/trace/1"
MAX_EXPERTS = 32_767  # ids are kept in 16 bits, a placement's signed


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceMeta:
    """What a trace says about the model it was recorded on.

    Attributes
    ----------
    num_experts, top_k
        Routed experts per layer, and how many of them each token chooses.
    layer_ids
        One id per MoE layer: absolute layer numbers when the trace gives them, otherwise ordinals ``0..L-1``.
    model_id
        The recorder's name for the model, if any.
    domains
        Names that ``Trace.domain`` indexes.
    request_names
        The recorder's request ids where they are not integers; ``Trace.request`` indexes them.
    assumptions
        What had to be inferred, one sentence each, to be shown to the user.
    """

    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    model_id: str | None = None
    domains: tuple[str, ...] = ()
    request_names: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise TraceError(
                f"top-k {self.top_k} of {self.num_experts} experts", rule="1 ≤ top-k ≤ number of experts per layer"
            )
        if self.num_experts > MAX_EXPERTS:
            raise TraceError(f"{self.num_experts} experts per layer", rule=f"at most {MAX_EXPERTS}")
        if not self.layer_ids or any(b <= a for a, b in zip(self.layer_ids, self.layer_ids[1:], strict=False)):
            raise TraceError(f"layer ids {list(self.layer_ids)}", rule="layer ids increase strictly, at least one")

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.layer_ids)

    def replace(self, **changes: object) -> TraceMeta:
        """Copy with some fields changed."""
        return replaced(self, **changes)


def id_dtype(num_experts: int) -> type[np.unsignedinteger[Any]]:
    """Smallest unsigned type that holds every expert id."""
    return np.uint8 if num_experts <= 256 else np.uint16


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Routed tokens of one model, in recorded order.

    Attributes
    ----------
    meta
        The model's shape and names.
    experts
        ``[token, MoE layer, k]`` chosen expert ids, uint8 or uint16, in the router's order.
    request
        ``[token]`` request number, int64.
    position
        ``[token]`` position of the token in its request, int64.
    phase
        ``[token]`` :data:`PREFILL` or :data:`DECODE`, uint8.
    step, rank, domain
        Optional ``[token]``: engine step, data-parallel rank that held the request, index into ``meta.domains``.

    Raises
    ------
    TraceError
        Shapes disagree, an id is outside ``0..num_experts-1``, or an expert stands twice in one top-k.
    """

    meta: TraceMeta
    experts: npt.NDArray[np.unsignedinteger[Any]]
    request: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    phase: npt.NDArray[np.uint8]
    step: npt.NDArray[np.int64] | None = None
    rank: npt.NDArray[np.int64] | None = None
    domain: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        raw = np.asarray(self.experts)
        expected = (self.meta.num_layers, self.meta.top_k)
        if raw.ndim != 3 or raw.shape[1:] != expected:
            raise TraceError(
                f"expert ids of shape {raw.shape}",
                rule=f"[token, MoE layer, k] with {expected[0]} layers and top-{expected[1]}",
            )
        _check_whole("expert ids", raw)
        check_expert_ids(raw, self.meta.num_experts)
        seal(self, experts=frozen_array(raw, id_dtype(self.meta.num_experts)))
        for name, dtype in (("request", np.int64), ("position", np.int64), ("phase", np.uint8)):
            self._seal_column(name, dtype)
        for name in ("step", "rank", "domain"):
            if getattr(self, name) is not None:
                self._seal_column(name, np.int64)

    def _seal_column(self, name: str, dtype: type[np.generic]) -> None:
        column = np.asarray(getattr(self, name))
        if column.shape != (self.num_tokens,):
            raise TraceError(f"{name} has shape {column.shape}", rule=f"one value per token ({self.num_tokens})")
        _check_whole(name, column)
        if name == "phase" and column.size and not ((column == PREFILL) | (column == DECODE)).all():
            wrong = column[(column != PREFILL) & (column != DECODE)][0]
            raise TraceError(f"phase {wrong}", rule="phase is 0 (prefill) or 1 (decode)")
        seal(self, **{name: frozen_array(column, dtype)})

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return int(self.experts.shape[0])

    @property
    def num_requests(self) -> int:
        """Number of distinct requests."""
        return int(np.unique(self.request).size)

    def take(self, rows: npt.NDArray[Any]) -> Trace:
        """Return the tokens of ``rows`` (a boolean mask or indices), in that order. Complexity: O(result)."""
        return assembled(self.meta, {n: v[rows] for n in COLUMNS if (v := getattr(self, n)) is not None})

    def blocks(self) -> Iterator[Trace]:
        """Yield the trace itself: a trace in memory is a stream of one block."""
        yield self

    def replace(self, **changes: object) -> Trace:
        """Copy with some fields changed."""
        return replaced(self, **changes)

    def digest(self) -> str:
        """Digest of the tokens; the same for any order of them, block size and file format."""
        hasher = TraceDigest()
        hasher.update(self)
        return hasher.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How often each expert was chosen, per recorded step: enough to balance load, not to see affinity.

    Attributes
    ----------
    meta
        The model's shape; ``top_k`` is the file's or the model's, else the choices per counted token, else 1.
    counts
        ``[step, MoE layer, expert]`` int64, non-negative. Steps are the batches of a tail.
    domain
        Optional ``[step]`` index into ``meta.domains``.
    """

    meta: TraceMeta
    counts: npt.NDArray[np.int64]
    domain: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts)
        shape = (self.meta.num_layers, self.meta.num_experts)
        if counts.ndim != 3 or counts.shape[1:] != shape:
            raise TraceError(f"counts of shape {counts.shape}", rule=f"[step, layer, expert] with {shape} per step")
        _check_whole("counts", counts)
        seal(self, counts=frozen_array(counts, np.int64))
        if (self.counts < 0).any():
            where = tuple(int(i) for i in np.argwhere(self.counts < 0)[0])
            raise TraceError(f"count {self.counts[where]} at {list(where)}", rule="counts are not negative")
        if self.domain is not None:
            if np.shape(self.domain) != (self.num_steps,):
                shape = np.shape(self.domain)
                raise TraceError(f"domain has shape {shape}", rule=f"one value per step ({self.num_steps})")
            seal(self, domain=frozen_array(self.domain, np.int64))

    @property
    def num_steps(self) -> int:
        """Number of recorded steps."""
        return int(self.counts.shape[0])

    def take(self, steps: npt.NDArray[Any]) -> Counts:
        """Return only the given steps (a boolean mask or indices)."""
        domain = None if self.domain is None else self.domain[steps]
        return Counts(meta=self.meta, counts=self.counts[steps], domain=domain)

    def digest(self) -> str:
        """Sha256 of the counts."""
        return digest((self.meta.layer_ids, self.counts))


def _check_whole(name: str, values: npt.NDArray[Any]) -> None:
    # a cast to integers would silently turn 1.5 into 1 and NaN into -2⁶³
    if values.dtype.kind in "iub" or values.size == 0:
        return
    if values.dtype.kind != "f" or not (np.isfinite(values).all() and (values == np.trunc(values)).all()):
        raise TraceError(f"{name} of type {values.dtype} that are not whole numbers", rule=f"{name} are integers")


class TraceStream(Protocol):
    """A trace that can be walked block by block, as often as needed."""

    @property
    def meta(self) -> TraceMeta:
        """The model's shape, known before the first block."""

    def blocks(self) -> Iterator[Trace]:
        """Yield consecutive blocks of about :data:`BLOCK_BYTES` of expert ids each."""


def check_expert_ids(experts: npt.NDArray[Any], num_experts: int, where: Location | str | None = None) -> None:
    """Raise :class:`TraceError` at the first id out of range or repeated within one top-k.

    Complexity: O(tokens · layers · k²) byte comparisons, vectorised.
    """
    bad = first_bad_row(experts, num_experts)
    if bad is None:
        return
    index, what, rule = bad
    raise TraceError(f"expert_ids[{', '.join(map(str, index))}]: {what}", rule=rule, where=where)


def first_bad_row(experts: npt.NDArray[Any], num_experts: int) -> tuple[tuple[int, ...], str, str] | None:
    """Find the first bad id: its ``(token, layer, k)``, what is wrong with it, and the rule; None when all are good."""
    if experts.size == 0:
        return None
    bad = (experts >= num_experts) | (experts < 0) if experts.dtype.kind != "u" else experts >= num_experts
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        return index, f"expert {experts[index]}", f"ids lie in 0..{num_experts - 1}"
    by_rank = np.ascontiguousarray(np.moveaxis(experts, -1, 0))
    for j in range(1, experts.shape[-1]):
        for i in range(j):
            same = by_rank[i] == by_rank[j]
            if same.any():
                token, layer = (int(x) for x in np.argwhere(same)[0])
                what = f"expert {experts[token, layer, j]} stands twice in the top-k {experts[token, layer].tolist()}"
                return (token, layer, j), what, "the k experts of a token differ"
    return None


def concatenate(blocks: Iterable[Trace], meta: TraceMeta) -> Trace:
    """Join blocks of one model's tokens into one trace in memory. Complexity: O(total size)."""
    parts = list(blocks)
    if not parts:
        none = np.zeros(0, np.int64)
        experts = np.zeros((0, meta.num_layers, meta.top_k), id_dtype(meta.num_experts))
        return Trace(meta=meta, experts=experts, request=none, position=none, phase=none.astype(np.uint8))
    shape = (meta.num_experts, meta.top_k, meta.num_layers)
    if any((part.meta.num_experts, part.meta.top_k, part.meta.num_layers) != shape for part in parts):
        raise TraceError("blocks of different models", rule="blocks of a trace agree in experts, layers and top-k")
    whole = [name for name in COLUMNS if all(getattr(part, name) is not None for part in parts)]
    if len(parts) == 1:
        return assembled(meta, {name: getattr(parts[0], name) for name in whole})
    return assembled(meta, {name: np.concatenate([getattr(part, name) for part in parts]) for name in whole})


def assembled(meta: TraceMeta, columns: dict[str, npt.NDArray[Any]]) -> Trace:
    """Return a trace of columns that other traces held: what they hold was checked there, once, and is taken over."""
    trace = object.__new__(Trace)
    for column in columns.values():
        column.setflags(write=False)
    seal(trace, meta=meta, **(dict.fromkeys(COLUMNS) | columns))
    return trace
