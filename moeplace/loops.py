"""Repetition loops: requests whose generation is caught in a loop visit the same experts again and again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplace.fingerprint import hashed
from moeplace.frozen import Ints
from moeplace.merging import DistinctNumbers
from moeplace.trace import Trace

WINDOW, SHARE, LONGEST = 128, 0.75, 64


class LoopTally:
    """Requests in loops, and the tokens there, of the blocks added; tallies of parts merge.

    Parameters
    ----------
    requests
        Numbers of the first requests with a loop, sorted, each once.
    tokens
        Tokens in loops.
    """

    def __init__(self, requests: Ints, tokens: int = 0) -> None:
        self._requests, self.tokens = DistinctNumbers(requests), tokens

    @classmethod
    def empty(cls) -> LoopTally:
        """Return the tally of no tokens."""
        return cls(np.zeros(0, np.int64))

    @property
    def requests(self) -> Ints:
        """Numbers of the requests with a loop, sorted."""
        return self._requests.values()

    def add(self, block: Trace) -> None:
        """Add a block; a request cut by its edge is looked at in two parts. Complexity: O(64) per token."""
        inside = loop_rows(block)
        if inside.any():
            self.merge(LoopTally(np.unique(block.request[inside]), int(inside.sum())))

    def merge(self, other: LoopTally) -> None:
        """Add another tally."""
        self._requests.merge(other._requests)
        self.tokens += other.tokens


def loop_rows(block: Trace) -> npt.NDArray[np.bool_]:
    """``[token]`` True in windows that repeat.

    Over 128 tokens of a request, three quarters choose the same experts in the first two layers as the token p before,
    for some p ≤ 64. Complexity: O(64) per token.
    """
    size = block.num_tokens
    order = np.lexsort((block.position, block.request))
    request = block.request[order]
    signature = np.zeros(size, np.uint64)
    for layer in range(min(2, block.meta.num_layers)):
        signature += hashed(block.experts[order, layer], layer).sum(axis=1, dtype=np.uint64)
    inside = np.zeros(size, bool)
    for lag in range(1, min(LONGEST, size - WINDOW) + 1):
        same = (signature[lag:] == signature[:-lag]) & (request[lag:] == request[:-lag])
        if np.count_nonzero(same) < SHARE * WINDOW:
            continue
        total = np.concatenate([[0], np.cumsum(same)])
        begins = np.flatnonzero(
            (total[WINDOW:] - total[:-WINDOW] >= SHARE * WINDOW)
            & (request[lag + WINDOW - 1 :] == request[: size - lag - WINDOW + 1])
        )
        if begins.size:
            steps = np.zeros(size + 1, np.int64)
            np.add.at(steps, begins + lag, 1)
            np.add.at(steps, begins + lag + WINDOW, -1)
            inside |= np.cumsum(steps[:-1]) > 0
    result = np.empty(size, bool)
    result[order] = inside
    return result
