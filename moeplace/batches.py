"""The batch law: which requests and tokens form one engine step.

A step holds ``requests`` distinct requests that have at least ``tokens`` tokens of the phase, drawn uniformly; in each,
a uniform start and ``tokens`` consecutive tokens. One token per request is a decode step; more are a window of decode
or a prefill chunk. A ``mixed`` step holds chunks of other requests' prompts besides, as with chunked prefill. With
``consecutive`` arrival the requests of a step are neighbours in the trace, as those of one time of day are. The same
law is used when a placement is chosen and when it is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import InputError, unknown_name
from moeplace.frozen import replaced
from moeplace.trace import DECODE, PHASES, PREFILL, Counts, Trace, TraceStream, concatenate

DEFAULT_REQUESTS = {DECODE: 256, PREFILL: 64}
DEFAULT_PREFILL_TOKENS = 128
DEFAULT_MIXED_PREFILLS = 16
DEFAULT_BATCHES = 300
MIXED = "mixed"
STEP_PHASES = (*PHASES, MIXED)
UNIFORM, CONSECUTIVE = "uniform", "consecutive"
ARRIVALS = (UNIFORM, CONSECUTIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLaw:
    """How steps are drawn.

    Attributes
    ----------
    phase
        ``prefill``, ``decode`` or ``mixed``.
    requests, tokens
        Distinct requests in a step over all ranks, and consecutive tokens of each; of ``mixed``, those that decode.
    prefill_requests, prefill_tokens
        Of ``mixed`` only: the other requests, whose prompts are in the step, and consecutive tokens of each.
    batches, seed
        Number of steps drawn, and the seed of the draw.
    arrival
        ``uniform``: any requests together; ``consecutive``: neighbours in the trace.
    """

    phase: str
    requests: int
    tokens: int = 1
    batches: int = DEFAULT_BATCHES
    seed: int = 0
    prefill_requests: int = 0
    prefill_tokens: int = 0
    arrival: str = UNIFORM

    def __post_init__(self) -> None:
        if self.phase not in STEP_PHASES:
            raise InputError(f"phase {self.phase!r}", rule=", ".join(STEP_PHASES))
        if self.arrival not in ARRIVALS:
            raise unknown_name("arrival", self.arrival, ARRIVALS)
        chunks = min(self.prefill_requests, self.prefill_tokens)
        if (chunks < 1) if self.phase == MIXED else (self.prefill_requests or self.prefill_tokens):
            what = f"{self.prefill_requests} prefill requests × {self.prefill_tokens} tokens in a {self.phase} step"
            raise InputError(what, rule="a mixed step has at least one of each, others none")
        if min(self.requests, self.tokens, self.batches) < 1:
            raise InputError(
                f"{self.batches} batches of {self.requests} requests × {self.tokens} tokens", rule="each is at least 1"
            )

    @property
    def step_tokens(self) -> int:
        """Tokens in one step, over all ranks."""
        return self.requests * self.tokens + self.prefill_requests * self.prefill_tokens

    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """Phase, requests and tokens of each, of what a step is made of."""
        if self.phase != MIXED:
            return ((self.phase, self.requests, self.tokens),)
        return (
            (PHASES[DECODE], self.requests, self.tokens),
            (PHASES[PREFILL], self.prefill_requests, self.prefill_tokens),
        )

    def turns(self) -> npt.NDArray[np.int64]:
        """``[step token]`` number of the request in its step that each token is of."""
        sizes = [size for _, requests, tokens in self.parts() for size in [tokens] * requests]
        return np.repeat(np.arange(len(sizes)), sizes)

    def replace(self, **changes: object) -> BatchLaw:
        """Copy with some fields changed."""
        return replaced(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Routed tokens of many steps, ready to be placed.

    Attributes
    ----------
    trace
        The distinct tokens.
    rows
        ``[batch, step token]`` row of each token in ``trace``, in the order of the law's turns.
    law
        The law they were drawn by.
    opening
        The first tokens of their requests, for homes that go by them; None where nothing does.
    """

    trace: Trace
    rows: npt.NDArray[np.int64]
    law: BatchLaw
    opening: Trace | None = None

    @property
    def num_batches(self) -> int:
        """Number of steps."""
        return int(self.rows.shape[0])

    def part(self, batches: npt.NDArray[Any]) -> Steps:
        """Return some of the steps, by their numbers."""
        return Steps(trace=self.trace, rows=self.rows[batches], law=self.law.replace(batches=len(batches)))


def expert_rows(steps: Steps | Counts) -> npt.NDArray[np.int32]:
    """``[layer, expert, batch]`` selections in every step. Complexity: O(batches · tokens · layers · k)."""
    if isinstance(steps, Counts):
        return np.moveaxis(steps.counts, 0, 2).astype(np.int32)
    meta, batches = steps.trace.meta, steps.num_batches
    rows = np.empty((meta.num_layers, meta.num_experts, batches), np.int32)
    batch = np.arange(batches)[:, None, None] * meta.num_experts
    for layer in range(meta.num_layers):
        chosen = batch + steps.trace.experts[:, layer][steps.rows]
        counted = np.bincount(chosen.ravel(), minlength=batches * meta.num_experts)
        rows[layer] = counted.reshape(batches, meta.num_experts).T
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIndex:
    """Where the tokens of each request stand in a stream, per phase, without their expert ids.

    Attributes
    ----------
    request, phase, position
        ``[token]`` columns of the stream, in its order.
    """

    request: npt.NDArray[np.int64]
    phase: npt.NDArray[np.uint8]
    position: npt.NDArray[np.int64]

    @classmethod
    def of(cls, source: TraceStream) -> TokenIndex:
        """Read the columns of a stream. Memory: 17 bytes a token."""
        blocks = [(block.request, block.phase, block.position) for block in source.blocks() if block.num_tokens]
        if not blocks:
            raise InputError("no tokens", rule="a trace holds at least one token", hint="the selection may be empty")
        request, phase, position = (np.concatenate(column) for column in zip(*blocks, strict=True))
        return cls(request=request, phase=phase, position=position)

    def phases(self) -> list[str]:
        """Phases that occur, decode first."""
        return [PHASES[number] for number in (DECODE, PREFILL) if (self.phase == number).any()]

    def first_tokens(self, count: int) -> npt.NDArray[np.int64]:
        """Numbers of the first ``count`` tokens of every request, whatever their phase."""
        order = np.lexsort((np.arange(len(self.request)), self.position, self.request))
        request = self.request[order]
        first = np.flatnonzero(np.diff(request, prepend=request[:1] - 1))
        turn = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
        return np.sort(order[turn < count])

    def by_request(self, phase: str) -> PhaseIndex:
        """Token numbers of one phase sorted by request and position, and where each request's stand."""
        rows = np.flatnonzero(self.phase == PHASES.index(phase))
        rows = rows[np.lexsort((rows, self.position[rows], self.request[rows]))]
        name, first, length = np.unique(self.request[rows], return_index=True, return_counts=True)
        seen = np.minimum.reduceat(rows, first) if len(rows) else rows
        return PhaseIndex(rows=rows, request=name, first=first, length=length, seen=seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseIndex:
    """Tokens of one phase by request.

    Attributes
    ----------
    rows
        ``[token]`` numbers of the tokens, sorted by request and position.
    request, first, length
        ``[request]`` number, first entry in ``rows`` and tokens of each.
    seen
        ``[request]`` number of the token that each was first seen with.
    """

    rows: npt.NDArray[np.int64]
    request: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    seen: npt.NDArray[np.int64]


def default_law(index: TokenIndex, phase: str, *, requests: int | None = None, tokens: int | None = None) -> BatchLaw:
    """Return the law for a trace: 256 requests × 1 token for decode, 64 × 128 for prefill, as far as the trace goes.

    A mixed step has decode's and 16 chunks of prefill's. Prefill chunks are halved until half of the requests are long
    enough; the number of requests is lowered to what the trace has. Numbers given are taken as they are.
    """
    if phase == MIXED:
        decode = default_law(index, PHASES[DECODE], requests=requests, tokens=tokens)
        prefill = default_law(index, PHASES[PREFILL])
        chunks = max(1, min(DEFAULT_MIXED_PREFILLS, prefill.requests // 2))
        left = decode.requests if requests is not None else max(1, decode.requests - chunks)
        return decode.replace(phase=MIXED, requests=left, prefill_requests=chunks, prefill_tokens=prefill.tokens)
    length = index.by_request(phase).length
    if len(length) == 0:
        raise InputError(f"the trace has no {phase} tokens", hint="use the other phase, or leave --phase out")
    number = PHASES.index(phase)
    if tokens is None:
        tokens = 1 if number == DECODE else DEFAULT_PREFILL_TOKENS
        while tokens > 1 and 2 * int((length >= tokens).sum()) < len(length):
            tokens //= 2
    eligible = int((length >= tokens).sum())
    if requests is None:
        requests = min(DEFAULT_REQUESTS[number], max(1, eligible))
    return BatchLaw(phase=phase, requests=requests, tokens=tokens)


def draw(index: TokenIndex, law: BatchLaw) -> npt.NDArray[np.int64]:
    """``[batch, step token]`` token numbers of the steps of ``law``, request by request as in :meth:`BatchLaw.turns`.

    Raises
    ------
    InputError
        Fewer requests are long enough than a step holds.
    """
    rng = np.random.default_rng(law.seed)
    picked: list[npt.NDArray[np.int64]] = []
    taken: list[npt.NDArray[np.int64]] | None = None
    for phase, requests, tokens in law.parts():
        known = index.by_request(phase)
        eligible = np.flatnonzero(known.length >= tokens)
        if law.arrival == CONSECUTIVE:
            eligible = eligible[np.argsort(known.seen[eligible], kind="stable")]
        _check_enough(len(eligible), known.length, (phase, requests, tokens))
        part = np.empty((law.batches, requests, tokens), np.int64)
        chosen_in: list[npt.NDArray[np.int64]] = []
        for batch in range(law.batches):
            free = eligible
            if taken is not None:
                # a request that decodes has its prompt behind it
                free = eligible[~np.isin(known.request[eligible], taken[batch])]
                _check_enough(len(free), known.length, (phase, requests, tokens))
            chosen = free[_together(rng, len(free), requests, law.arrival)]
            start = known.first[chosen] + rng.integers(0, known.length[chosen] - tokens + 1)
            part[batch] = known.rows[start[:, None] + np.arange(tokens)]
            chosen_in.append(known.request[chosen])
        picked.append(part.reshape(law.batches, -1))
        taken = chosen_in
    return np.concatenate(picked, axis=1)


def _together(rng: np.random.Generator, count: int, requests: int, arrival: str) -> npt.NDArray[np.int64]:
    """Draw the requests of a step out of ``count``: any, or neighbours."""
    if arrival == UNIFORM:
        return rng.choice(count, requests, replace=False)
    return (rng.integers(count) + np.arange(requests)) % count


def _check_enough(found: int, length: npt.NDArray[np.int64], part: tuple[str, int, int]) -> None:
    phase, requests, tokens = part
    if found >= requests:
        return
    have = f"only {found} requests have" if found else "no request has"
    fewer = f"--batch-requests {found} or fewer, or a smaller --batch-tokens"
    longest = f"--batch-tokens {length.max(initial=1)} or less: no request is longer"
    raise InputError(
        f"{have} {tokens} or more {phase} tokens",
        rule=f"a step holds {requests} distinct ones",
        hint=fewer if found else longest,
    )


def gather(source: TraceStream, token_numbers: npt.NDArray[Any]) -> tuple[Trace, npt.NDArray[np.int64]]:
    """Read only the named tokens of a stream: a trace of the distinct ones, and each number's row in it.

    Complexity: one pass over the stream; memory of the tokens asked for.
    """
    wanted, where = np.unique(token_numbers, return_inverse=True)
    parts, first = [], 0
    for block in source.blocks():
        low, high = np.searchsorted(wanted, [first, first + block.num_tokens])
        if high > low:
            parts.append(block.take(wanted[low:high] - first))
        first += block.num_tokens
    return concatenate(parts, source.meta), where.reshape(token_numbers.shape)
