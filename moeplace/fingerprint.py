"""Hashes of tokens: a digest of a trace, and an even chance for each token, that no order or cut can change.

A token's hash covers its experts and every column it has. A trace's digest adds the hashes up, so that parts of it can
be read in any order, by anyone, and still tell whether two traces hold the same tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moeplace.frozen import digest

Hashes = npt.NDArray[np.uint64]

SMALL_COLUMNS = ("request", "position", "phase", "step", "rank", "domain")
_ROWS_AT_ONCE = 4096  # of a block: what is worked on then stays in the processor's cache
_WORD = 8
_MASK = (1 << 64) - 1


class Tokens(Protocol):
    """What is hashed: a :class:`~moeplace.trace.Trace`, whose other columns are :data:`SMALL_COLUMNS`."""

    @property
    def experts(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """``[token, MoE layer, k]`` chosen experts."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""


def mixed(value: Hashes) -> Hashes:
    """Well-mixed 64 bits of each value (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def hashed(index: npt.NDArray[Any], seed: int) -> Hashes:
    """Well-mixed 64-bit value of each index, another one for every seed."""
    return mixed(index.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & _MASK))


def token_hashes(block: Tokens) -> Hashes:
    """``[token]`` hash of all that a trace says of each token, whatever type its ids are kept in.

    Every eight ids and every column is mixed with a key of its place, and the results are added. Complexity: O(ids).
    """
    tokens = block.num_tokens
    result = np.empty(tokens, np.uint64)
    for start in range(0, tokens, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        result[rows] = _ids_hash(block.experts[rows].reshape(len(block.experts[rows]), -1))
    for number, name in enumerate(SMALL_COLUMNS):
        column = getattr(block, name)
        if column is not None:
            result += hashed(column, -2 - number)
    return mixed(result)


def _ids_hash(ids: npt.NDArray[np.unsignedinteger[Any]]) -> Hashes:
    """``[token]`` sum of mixed words of ``[token, layer·k]`` ids: low bytes, and high bytes where there are any."""
    count = ids.shape[1]
    total = _words_hash(ids if ids.dtype == np.uint8 else (ids & np.array(0xFF, ids.dtype)).astype(np.uint8), 0)
    if ids.dtype != np.uint8:
        high = (ids >> np.array(8, ids.dtype)).astype(np.uint8)
        if high.any():
            total += _words_hash(high, count)
    return total


def _words_hash(low: npt.NDArray[np.uint8], first: int) -> Hashes:
    words = -(-low.shape[1] // _WORD)
    padded = np.zeros((len(low), words * _WORD), np.uint8)
    padded[:, : low.shape[1]] = low
    value = padded.view("<u8").astype(np.uint64, copy=False)
    # a word of zeros adds nothing: high bytes that are all 0 are the same as none
    value = np.where(value == 0, np.uint64(0), mixed(value + hashed(np.arange(first, first + words), 0)))
    summed: Hashes = value.sum(axis=1, dtype=np.uint64)
    return summed


class TraceDigest:
    """Running digest of a trace's tokens, independent of their order and of how the trace is cut into parts.

    It is the sha256 of the trace's shape, the number of tokens that have each column, and two 64-bit sums over tokens.
    """

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self.totals = np.zeros(2 + len(SMALL_COLUMNS) + 1, np.uint64)

    def update(self, block: Tokens, hashes: Hashes | None = None) -> None:
        """Add the tokens of ``block``; ``hashes`` are its :func:`token_hashes`, if they are at hand."""
        self._shape = block.experts.shape[1:]
        hashes = token_hashes(block) if hashes is None else hashes
        columns = [block.num_tokens * (getattr(block, name) is not None) for name in SMALL_COLUMNS]
        sums = [hashes.sum(dtype=np.uint64), hashed(hashes, 1).sum(dtype=np.uint64)]
        self.totals += np.array([*sums, block.num_tokens, *columns], np.uint64)

    def merge(self, other: TraceDigest) -> None:
        """Add the tokens of another digest."""
        self._shape = self._shape or other._shape
        self.totals += other.totals

    def restore(self, totals: Hashes, shape: tuple[int, int]) -> None:
        """Take on the totals of a digest of a trace of as many layers and choices a layer."""
        self._shape, self.totals = shape, totals

    def hexdigest(self) -> str:
        """Return the digest of all tokens so far."""
        return digest([self._shape, self.totals])
