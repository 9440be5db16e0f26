"""Trace → RoutingStats: per-layer load, within-layer co-activation and cross-layer transitions, counted exactly.

Every pair counts with weight 1: a token that chooses ``k`` experts in layer ``l`` and ``k`` in layer ``l+1`` adds 1 to
each of the ``k·k`` entries ``transition[l, e, f]``, and 1 to each of the ``k·(k-1)/2`` unordered pairs of
``coactivation[l]``. Gate weights play no part: what moves over the network does not shrink with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.counting import PairCounter, Tables
from moeplace.errors import ProblemError, TraceError
from moeplace.fingerprint import Hashes, TraceDigest, hashed, token_hashes
from moeplace.frozen import digest, frozen_array, replaced, seal
from moeplace.merging import Array, DistinctNumbers, RowSample, packed, summed
from moeplace.trace import COLUMNS, PHASES, Counts, Trace, TraceMeta, TraceStream, assembled, id_dtype

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
    tally = RoutingTally(source.meta, sample_tokens=sample_tokens, seed=seed, threads=threads)
    tally.add_all(source.blocks())
    return tally.result()


class RoutingTally:
    """Running counts of a trace. Tallies of its parts merge into that of the whole, in any order.

    Parameters
    ----------
    meta
        The model's shape. A tally of a part may know fewer experts than the whole has.
    sample_tokens, seed, threads
        As for :func:`count_routing`.
    compiled
        Use the compiled counting loops; default: once the work is large.
    """

    def __init__(
        self,
        meta: TraceMeta,
        *,
        sample_tokens: int = DEFAULT_SAMPLE_TOKENS,
        seed: int = 0,
        threads: int = 1,
        compiled: bool | None = None,
    ) -> None:
        if sample_tokens < 1:
            raise ProblemError(f"a sample of {sample_tokens} tokens", rule="at least 1")
        self.meta, self._threads = meta, threads
        self._counter = PairCounter(meta.num_layers, meta.num_experts, threads=threads, compiled=compiled)
        self._sampler = TokenSampler(sample_tokens, seed)
        self._digest, self._sources = TraceDigest(), _SourceLoad(meta)
        self._requests = DistinctNumbers()
        self.num_tokens = 0

    @property
    def num_experts(self) -> int:
        """Experts per layer that are known so far."""
        return self._counter.tables.load.shape[1]

    def add(self, block: Trace, hashes: Hashes | None = None, first: int | None = None) -> None:
        """Add the tokens of a block.

        Parameters
        ----------
        block
            Tokens of the model.
        hashes
            Their :func:`~moeplace.fingerprint.token_hashes`, if they are at hand.
        first
            Place of the first token in the whole trace; default: behind the tokens added before.
        """
        if block.num_tokens == 0:
            return
        hashes = token_hashes(block) if hashes is None else hashes
        self._counter.add(block.experts)
        self._sampler.add(block, hashes, self.num_tokens if first is None else first)
        self._digest.update(block, hashes)
        self._requests.add(np.unique(block.request))
        self._sources.add(block)
        self.num_tokens += block.num_tokens

    def add_all(self, blocks: Iterator[Trace], watch: Callable[[Trace, Hashes], None] | None = None) -> None:
        """Add every block; ``watch`` sees each with its hashes. With threads the next is read while one is counted."""

        def prepared() -> Iterator[tuple[Trace, Hashes]]:
            for block in blocks:
                if block.num_tokens:
                    hashes = token_hashes(block)
                    if watch is not None:
                        watch(block, hashes)
                    yield block, hashes

        for block, hashes in _read_ahead(prepared()) if self._threads > 1 else prepared():
            self.add(block, hashes)

    def merge(self, other: RoutingTally) -> None:
        """Add the tokens of another tally of the same model."""
        mine, theirs = self._counter.tables, other._counter.tables
        self._counter.tables = Tables(
            load=summed(mine.load, theirs.load),
            transition=summed(mine.transition, theirs.transition),
            together=summed(mine.together, theirs.together),
        )
        self._sampler.merge(other._sampler)
        self._digest.merge(other._digest)
        self._requests.merge(other._requests)
        self._sources.merge(other._sources)
        self.num_tokens += other.num_tokens

    def result(self, meta: TraceMeta | None = None) -> RoutingStats:
        """Return the statistics of all tokens so far; ``meta`` is the whole trace's where the tally's is a part's.

        Raises
        ------
        TraceError
            No token was added.
        """
        meta = meta or self.meta
        if self.num_tokens == 0:
            raise TraceError("no tokens", rule="a trace holds at least one token", hint="the selection may be empty")
        load, square = (meta.num_layers, meta.num_experts), (meta.num_experts, meta.num_experts)
        tables = self._counter.tables
        together = summed(np.zeros((meta.num_layers, *square), np.int64), tables.together)
        together += together.transpose(0, 2, 1).copy()
        diagonal = np.arange(meta.num_experts)
        counted = summed(np.zeros(load, np.int64), tables.load)
        together[:, diagonal, diagonal] = counted
        return RoutingStats(
            meta=meta,
            load=counted,
            num_tokens=self.num_tokens,
            num_requests=len(self._requests.values()),
            transition=summed(np.zeros((meta.num_layers - 1, *square), np.int64), tables.transition),
            coactivation=together,
            sample=self._sampler.result(meta),
            source_load=self._sources.result(meta),
            trace_digest=self._digest.hexdigest(),
        )

    def state(self) -> dict[str, Array]:
        """Return the tally as named arrays, for :meth:`restore`."""
        tables = self._counter.tables
        known = {} if self._sources.table is None else {"sources": self._sources.table}
        return {
            "load": tables.load,
            "transition": packed(tables.transition),
            "together": packed(tables.together),
            "requests": self._requests.values(),
            "tokens": np.array(self.num_tokens),
            "digest": self._digest.totals,
            **known,
            **{f"sample/{name}": column for name, column in self._sampler.kept.state().items()},
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take on what :meth:`state` returned of a tally of the same model and sample."""
        self._counter.tables = Tables(**{name: state[name] for name in ("load", "transition", "together")})
        self._requests, self.num_tokens = DistinctNumbers(state["requests"]), int(state["tokens"])
        self._digest.restore(state["digest"], (self.meta.num_layers, self.meta.top_k))
        self._sources.table = state.get("sources")
        sample = {name.removeprefix("sample/"): column for name, column in state.items() if name.startswith("sample/")}
        self._sampler.kept = RowSample.restored(self._sampler.kept.size, sample)


def _read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield items, the next one being made while the last one is used."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, items, None)
        while (item := following.result()) is not None:
            following = reader.submit(next, items, None)
            yield item


def load_by_phase(source: TraceStream) -> npt.NDArray[np.int64]:
    """``[phase, layer, expert]`` selections, phases in the order of ``trace.PHASES``."""
    meta = source.meta
    table = np.zeros((len(PHASES), meta.num_layers, meta.num_experts), np.int64)
    for block in source.blocks():
        table += grouped_load(block, block.phase.astype(np.int64), len(PHASES))
    return table


def grouped_load(block: Trace, group: npt.NDArray[Any], num_groups: int) -> npt.NDArray[np.int64]:
    """``[group, layer, expert]`` selections of the tokens of each group (``group`` [token], 0..num_groups-1)."""
    layers, experts = block.meta.num_layers, block.meta.num_experts
    table = np.empty((num_groups, layers, experts), np.int64)
    offset = group.astype(np.int64)[:, None] * experts
    for layer in range(layers):
        flat = (offset + block.experts[:, layer]).ravel()
        table[:, layer] = np.bincount(flat, minlength=num_groups * experts).reshape(num_groups, experts)
    return table


class TokenSampler:
    """Uniform sample of at most ``size`` tokens of a trace, independent of how it is cut into parts.

    Each token's hash, mixed with the seed, is its priority; the ``size`` smallest are kept, in recorded order.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._seed = seed
        self.kept = RowSample(size)

    def add(self, block: Trace, hashes: Hashes, first: int) -> None:
        """Offer the tokens of ``block``, whose first has the place ``first`` in the recorded order."""
        columns = {name: column for name in COLUMNS if (column := getattr(block, name)) is not None}
        self.kept.add(hashed(hashes, self._seed), {**columns, "order": np.arange(first, first + block.num_tokens)})

    def merge(self, other: TokenSampler) -> None:
        """Offer another sample's tokens."""
        self.kept.merge(other.kept)

    def result(self, meta: TraceMeta) -> Trace:
        """Return the sample, in recorded order."""
        columns = self.kept.columns()
        rows = np.argsort(columns.pop("order"), kind="stable")
        columns["experts"] = columns["experts"].astype(id_dtype(meta.num_experts), copy=False)
        return assembled(meta, {name: column[rows] for name, column in columns.items()})


class _SourceLoad:
    """``[rank, layer, expert]`` selections by source rank; no table once a token has none that can be one."""

    def __init__(self, meta: TraceMeta) -> None:
        self.table: Array | None = np.zeros((0, meta.num_layers, meta.num_experts), np.int64)

    def add(self, block: Trace) -> None:
        ranks = block.rank
        if ranks is None or self.table is None or ranks.min() < 0 or ranks.max() >= MAX_SOURCE_RANKS:
            self.table = None
            return
        self.table = summed(self.table, grouped_load(block, ranks, int(ranks.max()) + 1))

    def merge(self, other: _SourceLoad) -> None:
        self.table = None if self.table is None or other.table is None else summed(self.table, other.table)

    def result(self, meta: TraceMeta) -> Array | None:
        if self.table is None:
            return None
        return summed(np.zeros((len(self.table), meta.num_layers, meta.num_experts), np.int64), self.table)


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
