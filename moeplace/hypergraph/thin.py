"""A sample of a layer's tokens to anneal on while it is hot.

A move costs time in proportion to the tokens that chose its expert, and while the temperature is high most moves are
taken. What a sample says of a move is then as good as what all tokens say: its error is well below the temperature. All
tokens are needed only to settle.
"""

from __future__ import annotations

import numpy as np

from moeplace.hypergraph.patterns import Patterns

CHOICES = 240  # of each expert, on average, in the sample
WORTH = 3  # times the sample's tokens that distinct patterns must number


def worth_thinning(patterns: Patterns, choices: int | None = None) -> bool:
    """Whether a sample leaves out enough tokens to be worth its error."""
    return len(patterns.weight) >= WORTH * _sampled(patterns, choices)


def thinned(patterns: Patterns, seed: int, choices: int | None = None) -> Patterns:
    """Return the patterns of tokens drawn at random without replacement, each expert chosen by ``choices`` on average.

    Complexity: O(patterns).
    """
    tokens = min(_sampled(patterns, choices), patterns.tokens)
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(patterns.weight, tokens, method="marginals")
    kept = np.flatnonzero(drawn)
    return Patterns(experts=patterns.experts[kept], weight=drawn[kept], num_experts=patterns.num_experts)


def _sampled(patterns: Patterns, choices: int | None) -> int:
    return max(1, (CHOICES if choices is None else choices) * patterns.num_experts // patterns.top_k)
