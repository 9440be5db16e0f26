"""Trace → RoutingStats: per-layer load, within-layer co-activation and cross-layer transitions, counted exactly.

Every pair counts with weight 1: a token that chooses ``k`` experts in layer ``l`` and ``k`` in layer ``l+1`` adds 1 to
each of the ``k·k`` entries ``transition[l, e, f]``, and 1 to each of the ``k·(k-1)/2`` unordered pairs of
``coactivation[l]``. Gate weights play no part: what moves over the network does not shrink with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.counting import PairCounter
from moeplace.errors import ProblemError, TraceError
from moeplace.frozen import digest, frozen_array, replaced, seal
from moeplace.trace import PHASES, Counts, Trace, TraceDigest, TraceMeta, TraceStream, concatenate

DEFAULT_SAMPLE_TOKENS = 200_000
MAX_SOURCE_RANKS = 1024  # a table of every rank's load stays small; larger rank numbers are not ranks of one engine


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingStats:
    """What a trace says about where tokens go, in a size that does not depend on its length.

    Attributes
    ----------
    meta
        The model's shape.
    load
        ``[layer, expert]`` int64 selections.
    num_tokens, num_requests
        Tokens and distinct requests counted (requests are 0 when unknown).
    transition
        ``[layer-1, expert, next expert]`` int64, or None when the trace holds only counts.
    coactivation
        ``[layer, expert, expert]`` int64, symmetric, the load on the diagonal; None for counts.
    sample
        Up to :data:`DEFAULT_SAMPLE_TOKENS` tokens drawn uniformly (all of them when there are fewer); None for counts.
    step_load
        ``[step, layer, expert]`` recorded counts per step, for counts only.
    source_load
        ``[rank, layer, expert]`` selections by the rank that held the request, when the trace records ranks (all
        below :data:`MAX_SOURCE_RANKS`).
    trace_digest
        Sha256 of the tokens or counts these statistics come from.
    """

    meta: TraceMeta
    load: npt.NDArray[np.int64]
    num_tokens: int
    num_requests: int
    transition: npt.NDArray[np.int64] | None = None
    coactivation: npt.NDArray[np.int64] | None = None
    sample: Trace | None = None
    step_load: npt.NDArray[np.int64] | None = None
    source_load: npt.NDArray[np.int64] | None = None
    trace_digest: str = ""

    def __post_init__(self) -> None:
        layers, experts = self.meta.num_layers, self.meta.num_experts
        shapes = {
            "load": (layers, experts),
            "transition": (layers - 1, experts, experts),
            "coactivation": (layers, experts, experts),
        }
        for name, shape in shapes.items():
            if (value := getattr(self, name)) is None:
                continue
            array = np.asarray(value)
            if array.shape != shape or (array < 0).any():
                raise ProblemError(f"{name} of shape {array.shape}", rule=f"{shape}, no negative count")
            seal(self, **{name: frozen_array(array, np.int64)})
        for name in ("step_load", "source_load"):
            if getattr(self, name) is not None:
                seal(self, **{name: frozen_array(getattr(self, name), np.int64)})
        if (self.load.sum(axis=1) == 0).any():
            empty = self.meta.layer_ids[int(np.argmin(self.load.sum(axis=1)))]
            raise TraceError(
                f"no token was routed in layer {empty}",
                rule="every layer has tokens",
                hint="the selection may be empty",
            )
        if self.transition is not None:
            leaving, arriving = self.transition.sum(axis=2), self.transition.sum(axis=1)
            k = self.meta.top_k
            if (leaving != k * self.load[:-1]).any() or (arriving != k * self.load[1:]).any():
                raise ProblemError("transitions disagree with loads", rule="row sums are k times the load")

    @property
    def has_tokens(self) -> bool:
        """Whether token-level structure (affinity, copies) is known, not only counts."""
        return self.sample is not None

    @property
    def selections_per_token(self) -> npt.NDArray[np.float64]:
        """``[layer, expert]`` mean selections of each expert per token; each row sums to top-k."""
        total = self.load.sum(axis=1, keepdims=True)
        return self.load * (self.meta.top_k / total)

    def replace(self, **changes: object) -> RoutingStats:
        """Copy with some fields changed."""
        return replaced(self, **changes)

    def digest(self) -> str:
        """Sha256 of every count."""
        return digest(self)


def count_routing(
    source: TraceStream | Counts, *, sample_tokens: int = DEFAULT_SAMPLE_TOKENS, seed: int = 0, threads: int = 1
) -> RoutingStats:
    """Count a trace, block by block.

    Parameters
    ----------
    source
        A trace, a stream, a selection, or counts.
    sample_tokens
        Most tokens kept for token-level terms (copies), at least 1; a uniform sample beyond it.
    seed
        Of the sample only; the counts are exact.
    threads
        Threads of the counting loops; the result does not depend on it.

    Returns
    -------
    RoutingStats
        Complexity: O(tokens · layers · k²) time, O(layers · experts² + sample_tokens · layers · k) memory.
    """
    if isinstance(source, Counts):
        return _from_counts(source)
    if sample_tokens < 1:
        raise ProblemError(f"a sample of {sample_tokens} tokens", rule="at least 1")
    meta = source.meta
    counter = PairCounter(meta.num_layers, meta.num_experts, threads=threads)
    sampler = TokenSampler(sample_tokens, seed)
    hasher, requests, sources = TraceDigest(), _DistinctValues(), _SourceLoad(meta)
    tokens = 0
    for block in _read_ahead(source) if threads > 1 else source.blocks():
        if block.num_tokens == 0:
            continue
        counter.add(block.experts)
        sampler.add(block, tokens)
        hasher.update(block)
        requests.add(block.request)
        sources.add(block)
        tokens += block.num_tokens
    if tokens == 0:
        raise TraceError("no tokens", rule="a trace holds at least one token", hint="the selection may be empty")
    tables = counter.tables
    together = tables.together + tables.together.transpose(0, 2, 1)
    diagonal = np.arange(meta.num_experts)
    together[:, diagonal, diagonal] = tables.load
    return RoutingStats(
        meta=meta,
        load=tables.load,
        num_tokens=tokens,
        num_requests=len(requests),
        transition=tables.transition,
        coactivation=together,
        sample=sampler.result(meta),
        source_load=sources.result(),
        trace_digest=hasher.hexdigest(),
    )


def _read_ahead(source: TraceStream) -> Iterator[Trace]:
    """Yield the blocks of a source, the next one being read while the last one is counted."""
    blocks = iter(source.blocks())
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, blocks, None)
        while (block := following.result()) is not None:
            following = reader.submit(next, blocks, None)
            yield block


def load_by_phase(source: TraceStream) -> npt.NDArray[np.int64]:
    """``[phase, layer, expert]`` selections, phases in the order of ``trace.PHASES``."""
    meta = source.meta
    table = np.zeros((len(PHASES), meta.num_layers, meta.num_experts), np.int64)
    for block in source.blocks():
        table += grouped_load(block, block.phase.astype(np.int64), len(PHASES))
    return table


def load_by_request(source: TraceStream) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Request numbers ``[request]``, sorted, and their loads ``[request, layer, expert]``.

    Memory: 8 bytes · requests · layers · experts.
    """
    tables: dict[int, npt.NDArray[np.int64]] = {}
    for block in source.blocks():
        names, which = np.unique(block.request, return_inverse=True)
        for name, table in zip(names.tolist(), grouped_load(block, which, len(names)), strict=True):
            tables[name] = tables[name] + table if name in tables else table.copy()
    order = sorted(tables)
    return np.array(order, np.int64), np.stack([tables[name] for name in order])


def grouped_load(block: Trace, group: npt.NDArray[Any], num_groups: int) -> npt.NDArray[np.int64]:
    """``[group, layer, expert]`` selections of the tokens of each group (``group`` [token], 0..num_groups-1)."""
    layers, experts = block.meta.num_layers, block.meta.num_experts
    table = np.empty((num_groups, layers, experts), np.int64)
    offset = group.astype(np.int64)[:, None] * experts
    for layer in range(layers):
        flat = (offset + block.experts[:, layer]).ravel()
        table[:, layer] = np.bincount(flat, minlength=num_groups * experts).reshape(num_groups, experts)
    return table


def hashed(index: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint64]:
    """Well-mixed 64-bit value of each index (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    value = index.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class TokenSampler:
    """Uniform sample of at most ``size`` tokens of a stream, independent of how it is cut into blocks.

    Each token has a hashed priority; the ``size`` smallest are kept, in recorded order.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._parts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64], Trace]] = []
        self._held = 0
        self._threshold = np.iinfo(np.uint64).max

    def add(self, block: Trace, first_index: int) -> None:
        """Offer the tokens of ``block``, numbered from ``first_index``."""
        index = np.arange(first_index, first_index + block.num_tokens)
        priority = hashed(index, self._seed)
        keep = priority <= self._threshold
        self._parts.append((index[keep], priority[keep], block if keep.all() else block.take(keep)))
        self._held += int(keep.sum())
        if self._held > 2 * self._size:
            self._prune(block.meta)

    def _prune(self, meta: TraceMeta) -> None:
        if self._held <= self._size:
            return
        priority = np.concatenate([part[1] for part in self._parts])
        self._threshold = np.partition(priority, self._size - 1)[self._size - 1]
        index = np.concatenate([part[0] for part in self._parts])
        keep = priority <= self._threshold
        tokens = concatenate([part[2] for part in self._parts], meta).take(keep)
        self._parts = [(index[keep], priority[keep], tokens)]
        self._held = tokens.num_tokens

    def result(self, meta: TraceMeta) -> Trace:
        """Return the sample, in recorded order."""
        self._prune(meta)
        return concatenate([part[2] for part in self._parts], meta)


class _DistinctValues:
    def __init__(self) -> None:
        self._seen = np.zeros(0, np.int64)

    def add(self, values: npt.NDArray[np.int64]) -> None:
        self._seen = np.union1d(self._seen, values)

    def __len__(self) -> int:
        return len(self._seen)


class _SourceLoad:
    def __init__(self, meta: TraceMeta) -> None:
        self._meta = meta
        self._table: npt.NDArray[np.int64] | None = np.zeros((0, meta.num_layers, meta.num_experts), np.int64)

    def add(self, block: Trace) -> None:
        ranks = block.rank
        if ranks is None or self._table is None or ranks.min() < 0 or ranks.max() >= MAX_SOURCE_RANKS:
            self._table = None
            return
        grown = np.zeros((max(len(self._table), int(ranks.max()) + 1), *self._table.shape[1:]), np.int64)
        grown[: len(self._table)] = self._table
        self._table = grown + grouped_load(block, ranks, len(grown))

    def result(self) -> npt.NDArray[np.int64] | None:
        return self._table


def _from_counts(counts: Counts) -> RoutingStats:
    load = counts.counts.sum(axis=0)
    return RoutingStats(
        meta=counts.meta,
        load=load,
        num_tokens=int(load[0].sum()) // counts.meta.top_k,
        num_requests=0,
        step_load=counts.counts,
        trace_digest=counts.digest(),
    )
