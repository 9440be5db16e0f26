"""One walk over a trace for what its routing statistics do not hold: phases, domains, chunks, consecutive tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace import measures
from moeplace.affinity import RoutingStats, count_routing, grouped_load, hashed
from moeplace.counting import count_visits
from moeplace.frozen import Floats, Ints
from moeplace.trace import PHASES, PREFILL, Counts, Trace, TraceMeta, TraceStream

CHUNK_TOKENS = 25_000  # drift is the distance of consecutive chunks of this many tokens
REQUEST_GROUPS = 64  # random groups of requests between which the spread of the load is measured
FOLLOWING_TOKENS = 20_000  # pairs of consecutive tokens kept
COMPILE_FROM_SELECTIONS = 50_000_000  # about half a second of NumPy


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceProfile:
    """What one walk over a trace adds to its :class:`~moeplace.affinity.RoutingStats`.

    Attributes
    ----------
    tokens
        ``[phase, domain]`` tokens; one column where the trace records no domains.
    load
        ``[phase, domain, layer, expert]`` selections; the phase of counts is prefill.
    group_tokens, group_load
        ``[group]`` and ``[group, layer, expert]`` of :data:`REQUEST_GROUPS` random groups of requests; zero for counts.
    drift, drift_noise
        ``[chunk - 1]`` total variation between consecutive chunks of :data:`CHUNK_TOKENS`, and what independent tokens
        would show by chance; means over layers.
    following
        ``[layer, 2]`` successor share of consecutive tokens of a request in one layer, and the independent share.
    """

    meta: TraceMeta
    tokens: Ints
    load: Ints
    group_tokens: Ints
    group_load: Ints
    drift: Floats
    drift_noise: Floats
    following: Floats

    @property
    def has_domains(self) -> bool:
        """Whether tokens carry their domain."""
        return self.tokens.shape[1] > 1


def profile_trace(source: TraceStream | Counts) -> TraceProfile:
    """Walk a trace once, block by block.

    Complexity: O(tokens·layers·k) time; memory O((domains + 64)·layers·experts), whatever the length of the trace.
    """
    if isinstance(source, Counts):
        return _profile_counts(source)
    profiler = _Profiler(source.meta)
    for block in source.blocks():
        profiler.add(block)
    return profiler.result()


def count_and_profile(source: TraceStream | Counts, **options: Any) -> tuple[RoutingStats, TraceProfile]:
    """Count a trace and profile it in one walk; ``options`` are :func:`~moeplace.affinity.count_routing`'s.

    With several threads the next block is profiled while the last one is counted.
    """
    if isinstance(source, Counts):
        return count_routing(source, **options), _profile_counts(source)
    profiler = _Profiler(source.meta)
    return count_routing(_Watched(source, profiler), **options), profiler.result()


@dataclass(frozen=True, slots=True)
class _Watched:
    """A stream whose blocks are profiled on their way."""

    source: TraceStream
    profiler: _Profiler

    @property
    def meta(self) -> TraceMeta:
        """The source's."""
        return self.source.meta

    def blocks(self) -> Iterator[Trace]:
        """Yield the source's blocks."""
        for block in self.source.blocks():
            self.profiler.add(block)
            yield block


class _Profiler:
    """Running tables of a :class:`TraceProfile`."""

    def __init__(self, meta: TraceMeta) -> None:
        self._meta = meta
        self._groups = np.zeros((REQUEST_GROUPS, meta.num_layers, meta.num_experts), np.int64)
        self._group_tokens = np.zeros(REQUEST_GROUPS, np.int64)
        self._parts, self._drift, self._following = _Parts(meta), DriftMeter(meta), _Following(meta)
        self._seen = 0

    def add(self, block: Trace) -> None:
        """Add a block of tokens."""
        if block.num_tokens == 0:
            return
        compiled = (self._seen + block.num_tokens) * block.experts[0].size > COMPILE_FROM_SELECTIONS
        bucket = (hashed(block.request, 0) % np.uint64(REQUEST_GROUPS)).astype(np.int64)
        self._groups += _grouped(block, bucket, REQUEST_GROUPS, compiled)
        self._group_tokens += np.bincount(bucket, minlength=REQUEST_GROUPS)
        for piece in _pieces(block, self._seen):
            self._drift.add(self._parts.add(piece, compiled), piece.num_tokens)
        self._following.add(block, self._seen)
        self._seen += block.num_tokens

    def result(self) -> TraceProfile:
        """Return the profile of the tokens so far."""
        return TraceProfile(
            meta=self._meta,
            tokens=self._parts.tokens,
            load=self._parts.load,
            group_tokens=self._group_tokens,
            group_load=self._groups,
            drift=np.array(self._drift.distance),
            drift_noise=np.array(self._drift.noise),
            following=self._following.result(),
        )


def _grouped(block: Trace, group: Ints, count: int, compiled: bool) -> Ints:
    """``[group, layer, expert]`` selections, by histograms or, where there are many, in compiled loops."""
    if not compiled:
        return grouped_load(block, group, count)
    shape, layers = (count, block.meta.num_experts), range(block.meta.num_layers)
    tables = [count_visits(group, block.experts[:, i], shape, distinct=False, compiled=True) for i in layers]
    return np.stack(tables, axis=1)


def _profile_counts(counts: Counts) -> TraceProfile:
    meta, shape = counts.meta, counts.counts.shape[1:]
    domain = np.zeros(counts.num_steps, np.int64) if counts.domain is None else counts.domain
    load = np.zeros((len(PHASES), int(domain.max(initial=0)) + 1, *shape), np.int64)
    np.add.at(load[PREFILL], domain, counts.counts)
    drift = DriftMeter(meta)
    for step in counts.counts:
        drift.add(step, int(step[0].sum()) // meta.top_k)
    return TraceProfile(
        meta=meta,
        tokens=load[:, :, 0].sum(axis=2) // meta.top_k,
        load=load,
        group_tokens=np.zeros(REQUEST_GROUPS, np.int64),
        group_load=np.zeros((REQUEST_GROUPS, *shape), np.int64),
        drift=np.array(drift.distance),
        drift_noise=np.array(drift.noise),
        following=np.zeros((0, 2)),
    )


def _pieces(block: Trace, first: int) -> list[Trace]:
    """Cut a block, whose first token is number ``first``, where chunks end."""
    edges = range(CHUNK_TOKENS - first % CHUNK_TOKENS, block.num_tokens, CHUNK_TOKENS)
    if not edges:
        return [block]
    return [block.take(rows) for rows in np.split(np.arange(block.num_tokens), edges)]


class _Parts:
    """Loads by phase and domain; grows with the domains it meets."""

    def __init__(self, meta: TraceMeta) -> None:
        domains = max(1, len(meta.domains))
        self.tokens = np.zeros((len(PHASES), domains), np.int64)
        self.load = np.zeros((len(PHASES), domains, meta.num_layers, meta.num_experts), np.int64)

    def add(self, piece: Trace, compiled: bool) -> Ints:
        """Add tokens; return their load ``[layer, expert]``."""
        domain = np.zeros(piece.num_tokens, np.int64) if piece.domain is None else piece.domain
        grown = int(domain.max()) + 1 - self.tokens.shape[1]
        if grown > 0:
            self.tokens = np.pad(self.tokens, ((0, 0), (0, grown)))
            self.load = np.pad(self.load, ((0, 0), (0, grown), (0, 0), (0, 0)))
        group = piece.phase * self.tokens.shape[1] + domain
        present, number = np.unique(group, return_inverse=True)
        table = _grouped(piece, number, len(present), compiled)
        self.load.reshape(-1, *table.shape[1:])[present] += table
        self.tokens += np.bincount(group, minlength=self.tokens.size).reshape(self.tokens.shape)
        return table.sum(axis=0)


class DriftMeter:
    """Distance between the loads of consecutive chunks of at least :data:`CHUNK_TOKENS` tokens."""

    def __init__(self, meta: TraceMeta) -> None:
        self._meta = meta
        self._last: tuple[Ints, int] | None = None
        self._load, self._tokens = np.zeros((meta.num_layers, meta.num_experts), np.int64), 0
        self.distance: list[float] = []
        self.noise: list[float] = []

    def add(self, load: Ints, tokens: int) -> None:
        """Add the load ``[layer, expert]`` of the next tokens; a chunk ends once it is full."""
        self._load, self._tokens = self._load + load, self._tokens + tokens
        if self._tokens < CHUNK_TOKENS:
            return
        chunk = (self._load, self._tokens)
        if self._last is not None:
            before, count = self._last
            pairs = list(zip(before, self._load, strict=True))
            self.distance.append(float(np.mean([measures.total_variation(a, b) for a, b in pairs])))
            chosen = [(a + b) * (self._meta.top_k / (a + b).sum()) for a, b in pairs]
            noise = [measures.sampling_variation(np.minimum(q, 1), count, self._tokens) for q in chosen]
            self.noise.append(float(np.mean(noise)))
        self._last = chunk
        self._load, self._tokens = np.zeros_like(self._load), 0


class _Following:
    """A uniform sample of pairs of consecutive tokens of one request, those that stand in one block (or at its edge).

    In a trace recorded request by request these are all pairs, however the trace is cut into blocks.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self._meta = meta
        self._edge: Trace | None = None
        self._kept: list[tuple[npt.NDArray[np.uint64], Any, Any]] = []
        self._held, self._threshold = 0, np.iinfo(np.uint64).max

    def add(self, block: Trace, first: int) -> None:
        """Offer the pairs of a block whose first token is number ``first``."""
        ids, request, position = block.experts, block.request, block.position
        if self._edge is not None:
            ids = np.concatenate([self._edge.experts, ids])
            request = np.concatenate([self._edge.request, request])
            position = np.concatenate([self._edge.position, position])
            first -= 1
        self._edge = block.take(np.array([block.num_tokens - 1]))
        order = np.lexsort((position, request))
        linked = (np.diff(request[order]) == 0) & (np.diff(position[order]) == 1)
        left, right = order[:-1][linked], order[1:][linked]
        priority = hashed(first + left, 1)
        keep = priority <= self._threshold
        self._kept.append((priority[keep], ids[left[keep]], ids[right[keep]]))
        self._held += int(keep.sum())
        if self._held > 2 * FOLLOWING_TOKENS:
            self._prune()

    def _prune(self) -> None:
        priority, left, right = (np.concatenate(part) for part in zip(*self._kept, strict=True))
        order = np.argsort(priority, kind="stable")[:FOLLOWING_TOKENS]
        self._kept = [(priority[order], left[order], right[order])]
        self._held = len(order)
        if self._held == FOLLOWING_TOKENS:
            self._threshold = int(priority[order[-1]])

    def result(self) -> Floats:
        """Return ``[layer, 2]`` successor shares, empty without pairs."""
        if self._held == 0:
            return np.zeros((0, 2))
        self._prune()
        _, left, right = self._kept[0]
        shares = [
            measures.successor_concentration(
                measures.pair_table(left[:, layer], right[:, layer], self._meta.num_experts)
            )
            for layer in range(self._meta.num_layers)
        ]
        return np.array(shares)
