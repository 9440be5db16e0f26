"""What a trace's routing statistics do not hold, in one walk: phases, domains, chunks, consecutive tokens, loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace import measures
from moeplace.affinity import RoutingStats, RoutingTally, count_routing, grouped_load
from moeplace.counting import count_visits
from moeplace.drift import ChunkLoads
from moeplace.fingerprint import Hashes, hashed, token_hashes
from moeplace.frozen import Floats, Ints
from moeplace.loops import LoopTally
from moeplace.merging import Array, RowSample, grown, summed
from moeplace.parts import CHUNK_TOKENS
from moeplace.trace import PHASES, PREFILL, Counts, Trace, TraceMeta, TraceStream

MOST_DOMAINS = 128  # told apart; those after them are one
REQUEST_GROUPS = 64  # random groups of requests between which the spread of the load is measured
FOLLOWING_TOKENS = 20_000  # pairs of consecutive tokens kept
COMPILE_FROM_SELECTIONS = 50_000_000  # about half a second of NumPy


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceProfile:
    """What one walk over a trace adds to its :class:`~moeplace.affinity.RoutingStats`.

    Attributes
    ----------
    tokens
        ``[phase, domain]`` tokens; one column where the trace records no domains. Those after the first
        :data:`MOST_DOMAINS` are one.
    load
        ``[phase, domain, layer, expert]`` selections; the phase of counts is prefill.
    group_tokens, group_load
        ``[group]`` and ``[group, layer, expert]`` of :data:`REQUEST_GROUPS` random groups of requests; zero for counts.
    drift, drift_noise
        ``[chunk - 1]`` total variation between consecutive chunks of :data:`CHUNK_TOKENS` or more, and what independent
        tokens would show by chance; means over layers.
    following
        ``[layer, 2]`` successor share of consecutive tokens of a request in one layer, and the independent share.
    loops
        Requests that repeat themselves.
    """

    meta: TraceMeta
    tokens: Ints
    load: Ints
    group_tokens: Ints
    group_load: Ints
    drift: Floats
    drift_noise: Floats
    following: Floats
    loops: LoopTally

    @property
    def has_domains(self) -> bool:
        """Whether tokens carry their domain."""
        return self.tokens.shape[1] > 1


def profile_trace(source: TraceStream | Counts) -> TraceProfile:
    """Walk a trace once, block by block.

    Complexity: O(tokens·layers·k) time; memory O((domains + 320)·layers·experts), whatever the length of the trace.
    """
    if isinstance(source, Counts):
        return _profile_counts(source)
    tally = ProfileTally(source.meta)
    for block in source.blocks():
        tally.add(block, token_hashes(block))
    return tally.result(source.meta)


def count_and_profile(source: TraceStream | Counts, **options: Any) -> tuple[RoutingStats, TraceProfile]:
    """Count a trace and profile it in one walk; ``options`` are :func:`~moeplace.affinity.count_routing`'s.

    With several threads the next block is profiled while the last one is counted.
    """
    if isinstance(source, Counts):
        return count_routing(source, **options), _profile_counts(source)
    routing, profile = RoutingTally(source.meta, **options), ProfileTally(source.meta)
    routing.add_all(source.blocks(), profile.add)
    # names, and what was skipped, are known once the trace has been walked
    return routing.result(source.meta), profile.result(source.meta)


class ProfileTally:
    """Running tables of a :class:`TraceProfile`. Tallies of a trace's parts merge into that of the whole.

    Parameters
    ----------
    meta
        The model's shape; a part may know fewer experts than the whole has.
    compiled
        Use compiled loops; default: once the work is large.
    """

    def __init__(self, meta: TraceMeta, *, compiled: bool | None = None) -> None:
        layers, experts = meta.num_layers, meta.num_experts
        self.meta, self._compiled, self._seen = meta, compiled, 0
        self._tables = {
            "tokens": np.zeros((len(PHASES), max(1, len(_named(meta)))), np.int64),
            "load": np.zeros((len(PHASES), max(1, len(_named(meta))), layers, experts), np.int64),
            "group_tokens": np.zeros(REQUEST_GROUPS, np.int64),
            "group_load": np.zeros((REQUEST_GROUPS, layers, experts), np.int64),
        }
        self.chunks = ChunkLoads()
        self._following, self._edge = RowSample(FOLLOWING_TOKENS), None
        self._loops = LoopTally.empty()

    _edge: tuple[Trace, Hashes] | None

    def add(self, block: Trace, hashes: Hashes, chunk: int | None = None) -> None:
        """Add tokens: ``hashes`` are their token hashes, ``chunk`` the one they belong to (default: by their number).

        Tokens that follow each other from block to block of one tally are seen as such.
        """
        if block.num_tokens == 0:
            return
        compiled = self._compiled
        if compiled is None:
            compiled = (self._seen + block.num_tokens) * block.experts[0].size > COMPILE_FROM_SELECTIONS
        bucket = (hashed(block.request, 0) % np.uint64(REQUEST_GROUPS)).astype(np.int64)
        self._add("group_load", _grouped(block, bucket, REQUEST_GROUPS, compiled))
        self._add("group_tokens", np.bincount(bucket, minlength=REQUEST_GROUPS))
        for number, piece in _pieces(block, self._seen) if chunk is None else [(chunk, block)]:
            self.chunks.add(number, self._add_parts(piece, compiled), piece.num_tokens)
        self._follow(block, hashes)
        self._loops.add(block)
        self._seen += block.num_tokens

    def merge(self, other: ProfileTally) -> None:
        """Add the tokens of another tally of the same model; tokens on the two sides are not seen as consecutive."""
        for name, table in other._tables.items():
            self._add(name, table)
        self.chunks.merge(other.chunks)
        self._following.merge(other._following)
        self._loops.merge(other._loops)
        self._seen += other._seen

    def result(self, meta: TraceMeta | None = None) -> TraceProfile:
        """Return the profile of the tokens so far; ``meta`` is the whole trace's where the tally's is a part's."""
        meta = meta or self.meta
        meta = meta.replace(domains=_named(meta))
        shape = (meta.num_layers, meta.num_experts)
        tables = {
            name: grown(table, (*table.shape[:-2], *shape)) for name, table in self._tables.items() if "load" in name
        }
        drift, noise = self.chunks.drift(meta.top_k)
        return TraceProfile(
            meta=meta,
            tokens=self._tables["tokens"],
            group_tokens=self._tables["group_tokens"],
            drift=drift,
            drift_noise=noise,
            following=self._successors(meta),
            loops=self._loops,
            **tables,
        )

    def state(self) -> dict[str, Array]:
        """Return the tally as named arrays, for :meth:`restore`."""
        following = {f"following/{name}": column for name, column in self._following.state().items()}
        loops = {"loops/requests": self._loops.requests, "loops/tokens": np.array(self._loops.tokens)}
        return {**self._tables, "seen": np.array(self._seen), **self.chunks.state(), **following, **loops}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take on what :meth:`state` returned of a tally of the same model."""
        self._tables = {name: state[name] for name in self._tables}
        self._seen, self.chunks = int(state["seen"]), ChunkLoads.restored(state)
        prefix = "following/"
        kept = {name.removeprefix(prefix): column for name, column in state.items() if name.startswith(prefix)}
        self._following = RowSample.restored(FOLLOWING_TOKENS, kept)
        self._loops = LoopTally(state["loops/requests"], int(state["loops/tokens"]))

    def _add(self, name: str, table: Array) -> None:
        self._tables[name] = summed(self._tables[name], table)

    def _add_parts(self, piece: Trace, compiled: bool) -> Ints:
        """Add tokens by phase and domain; return their load ``[layer, expert]``."""
        domain = (
            np.zeros(piece.num_tokens, np.int64) if piece.domain is None else np.minimum(piece.domain, MOST_DOMAINS)
        )
        domains = max(int(domain.max()) + 1, self._tables["tokens"].shape[1])
        group = piece.phase.astype(np.int64) * domains + domain
        present, number = np.unique(group, return_inverse=True)
        table = _grouped(piece, number, len(present), compiled)
        load = grown(self._tables["load"], (len(PHASES), domains, *table.shape[1:]))
        load.reshape(-1, *table.shape[1:])[present] += table
        self._tables["load"] = load
        self._add("tokens", np.bincount(group, minlength=len(PHASES) * domains).reshape(len(PHASES), domains))
        return table.sum(axis=0)

    def _follow(self, block: Trace, hashes: Hashes) -> None:
        """Offer the pairs of consecutive tokens of one request that stand in the block or at its edge.

        In a trace recorded request by request these are all pairs, however the trace is cut into blocks.
        """
        ids, request, position = block.experts, block.request, block.position
        last = np.array([block.num_tokens - 1])
        edge, self._edge = self._edge, (block.take(last), hashes[last])
        if edge is not None:
            ids = np.concatenate([edge[0].experts, ids])
            request = np.concatenate([edge[0].request, request])
            position = np.concatenate([edge[0].position, position])
            hashes = np.concatenate([edge[1], hashes])
        order = np.lexsort((position, request))
        linked = (np.diff(request[order]) == 0) & (np.diff(position[order]) == 1)
        left, right = order[:-1][linked], order[1:][linked]
        priority = hashed(hashes[left], 1)
        keep = priority <= self._following.threshold  # of a long trace few: the ids of the others need no copy
        self._following.add(priority[keep], {"left": ids[left[keep]], "right": ids[right[keep]]})

    def _successors(self, meta: TraceMeta) -> Floats:
        """Return ``[layer, 2]`` successor shares, empty without pairs."""
        kept = self._following.columns()
        if not kept or not len(kept["left"]):
            return np.zeros((0, 2))
        left, right = kept["left"], kept["right"]
        tables = (measures.pair_table(left[:, i], right[:, i], meta.num_experts) for i in range(meta.num_layers))
        return np.array([measures.successor_concentration(table) for table in tables])


def _named(meta: TraceMeta) -> tuple[str, ...]:
    """Names of the domains that are told apart, and one for all others."""
    names = meta.domains
    return names if len(names) <= MOST_DOMAINS else (*names[:MOST_DOMAINS], f"{len(names) - MOST_DOMAINS:,} others")


def _grouped(block: Trace, group: Ints, count: int, compiled: bool) -> Ints:
    """``[group, layer, expert]`` selections, by histograms or, where there are many, in compiled loops."""
    if not compiled:
        return grouped_load(block, group, count)
    shape, layers = (count, block.meta.num_experts), range(block.meta.num_layers)
    tables = [count_visits(group, block.experts[:, i], shape, distinct=False, compiled=True) for i in layers]
    return np.stack(tables, axis=1)


def _profile_counts(counts: Counts) -> TraceProfile:
    meta, shape = counts.meta, counts.counts.shape[1:]
    domain = np.zeros(counts.num_steps, np.int64) if counts.domain is None else np.minimum(counts.domain, MOST_DOMAINS)
    meta = meta.replace(domains=_named(meta))
    load = np.zeros((len(PHASES), int(domain.max(initial=0)) + 1, *shape), np.int64)
    np.add.at(load[PREFILL], domain, counts.counts)
    drift, noise = _step_chunks(counts).drift(meta.top_k)
    return TraceProfile(
        meta=meta,
        tokens=load[:, :, 0].sum(axis=2) // meta.top_k,
        load=load,
        group_tokens=np.zeros(REQUEST_GROUPS, np.int64),
        group_load=np.zeros((REQUEST_GROUPS, *shape), np.int64),
        drift=drift,
        drift_noise=noise,
        following=np.zeros((0, 2)),
        loops=LoopTally.empty(),
    )


def _step_chunks(counts: Counts) -> ChunkLoads:
    """Join the recorded steps of counts into chunks; each ends with the step that fills it."""
    chunks, number, tokens = ChunkLoads(), 0, 0
    for step in counts.counts:
        held = int(step[0].sum()) // counts.meta.top_k
        chunks.add(number, step, held)
        tokens += held
        if tokens >= CHUNK_TOKENS:
            number, tokens = number + 1, 0
    return chunks


def _pieces(block: Trace, first: int) -> list[tuple[int, Trace]]:
    """Cut a block, whose first token is number ``first``, where chunks end; each piece with its chunk's number."""
    number = first // CHUNK_TOKENS
    edges = range(CHUNK_TOKENS - first % CHUNK_TOKENS, block.num_tokens, CHUNK_TOKENS)
    if not edges:
        return [(number, block)]
    parts = np.split(np.arange(block.num_tokens), edges)
    return [(number + i, block.take(rows)) for i, rows in enumerate(parts)]
