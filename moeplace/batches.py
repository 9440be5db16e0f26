"""The batch law: which requests and tokens form one engine step.

A step holds ``requests`` distinct requests that have at least ``tokens`` tokens of the phase, drawn uniformly; in each,
a uniform start and ``tokens`` consecutive tokens. One token per request is a decode step; more are a window of decode
or a prefill chunk. The same law is used when a placement is chosen and when it is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import InputError
from moeplace.frozen import replaced
from moeplace.trace import DECODE, PHASES, PREFILL, Trace, TraceStream, concatenate

DEFAULT_REQUESTS = {DECODE: 256, PREFILL: 64}
DEFAULT_PREFILL_TOKENS = 128
DEFAULT_BATCHES = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLaw:
    """How steps are drawn.

    Attributes
    ----------
    phase
        ``prefill`` or ``decode``.
    requests, tokens
        Distinct requests in a step over all ranks, and consecutive tokens of each.
    batches, seed
        Number of steps drawn, and the seed of the draw.
    """

    phase: str
    requests: int
    tokens: int = 1
    batches: int = DEFAULT_BATCHES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise InputError(f"phase {self.phase!r}", rule="prefill or decode")
        if min(self.requests, self.tokens, self.batches) < 1:
            raise InputError(
                f"{self.batches} batches of {self.requests} requests × {self.tokens} tokens", rule="each is at least 1"
            )

    @property
    def step_tokens(self) -> int:
        """Tokens in one step, over all ranks."""
        return self.requests * self.tokens

    def replace(self, **changes: object) -> BatchLaw:
        """Copy with some fields changed."""
        return replaced(self, **changes)


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

    def by_request(self, phase: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token numbers of one phase sorted by request and position, and each request's first entry and length."""
        rows = np.flatnonzero(self.phase == PHASES.index(phase))
        rows = rows[np.lexsort((rows, self.position[rows], self.request[rows]))]
        _, first, length = np.unique(self.request[rows], return_index=True, return_counts=True)
        return rows, first.astype(np.int64), length.astype(np.int64)


def default_law(index: TokenIndex, phase: str, *, requests: int | None = None, tokens: int | None = None) -> BatchLaw:
    """Return the law for a trace: 256 requests × 1 token for decode, 64 × 128 for prefill, as far as the trace goes.

    Prefill chunks are halved until half of the requests are long enough; the number of requests is lowered to what the
    trace has. Numbers given are taken as they are.
    """
    _, _, length = index.by_request(phase)
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
    """``[batch, request, token]`` token numbers of the steps of ``law``.

    Raises
    ------
    InputError
        Fewer requests are long enough than a step holds.
    """
    rows, first, length = index.by_request(law.phase)
    eligible = np.flatnonzero(length >= law.tokens)
    if len(eligible) < law.requests:
        have = f"only {len(eligible)} requests have" if len(eligible) else "no request has"
        fewer = f"--batch-requests {len(eligible)} or fewer, or a smaller --batch-tokens"
        longest = f"--batch-tokens {length.max(initial=1)} or less: no request is longer"
        raise InputError(
            f"{have} {law.tokens} or more {law.phase} tokens",
            rule=f"a step holds {law.requests} distinct ones",
            hint=fewer if len(eligible) else longest,
        )
    rng = np.random.default_rng(law.seed)
    picked = np.empty((law.batches, law.requests, law.tokens), np.int64)
    for batch in range(law.batches):
        chosen = eligible[rng.choice(len(eligible), law.requests, replace=False)]
        start = first[chosen] + rng.integers(0, length[chosen] - law.tokens + 1)
        picked[batch] = rows[start[:, None] + np.arange(law.tokens)]
    return picked


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
