r"""A lower bound on copies at any size, by pairs of experts of a token that share a GPU.

A token with ``m`` of its experts on a GPU costs one copy there, and for every whole ``j ≥ 1``

    1[m ≥ 1]  ≥  2/(j+1)·m - 2/(j(j+1))·m(m-1)/2

(Dawson and Sankoff 1967). Summed over GPUs, all copies are at least a constant less a weight on pairs that share a GPU,
and what any partition keeps of that weight is at most half the largest eigenvalues allow (Donath and Hoffman 1973).
"""

from __future__ import annotations

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.patterns import Patterns


def pair_bound(patterns: Patterns, rooms: Ints) -> float:
    """Lower bound on the copies of all tokens, whatever the load cap.

    The better of all ``j`` that one GPU's slots and the token's experts allow. Complexity: O(patterns · k² + experts³).
    """
    sizes = np.sort(rooms[rooms > 0])[::-1]
    top = min(patterns.top_k, int(sizes[0]))
    together = pairs_of(patterns)
    most = _kept(together, sizes)
    selections = patterns.top_k * patterns.tokens
    bounds = [2.0 / (j + 1) * selections - 2.0 / (j * (j + 1)) * most for j in range(1, top + 1)]
    return max(0.0, *bounds) * (1 - 1e-9)


def pairs_of(patterns: Patterns) -> Floats:
    """``[expert, expert]`` tokens that chose both, symmetric, nothing on the diagonal."""
    experts = patterns.num_experts
    flat = np.zeros(experts * experts)
    for i in range(patterns.top_k):
        for j in range(i + 1, patterns.top_k):
            pair = patterns.experts[:, i] * experts + patterns.experts[:, j]
            flat += np.bincount(pair, patterns.weight, experts * experts)
    table = flat.reshape(experts, experts)
    return table + table.T


def _kept(together: Floats, sizes: Ints) -> float:
    """Most weight of pairs within groups of ``sizes``: by each expert's heaviest companions, and by eigenvalues."""
    experts = len(together)
    heaviest = -np.sort(-together, axis=1)[:, : int(sizes[0]) - 1].sum() / 2
    value = np.linalg.eigvalsh(together)[::-1][: len(sizes)]
    spectral = float(value @ sizes[: len(value)]) / 2
    if (sizes == sizes[0]).all() and experts > 1:
        # with equal groups the vector of ones is fixed: the rest lies in its complement
        centred = together - together.mean(axis=0) - together.mean(axis=1)[:, None] + together.mean()
        value = np.linalg.eigvalsh(centred)[::-1][: len(sizes) - 1]
        rest = float(value.sum()) * int(sizes[0])
        spectral = min(spectral, (float(together.sum()) / experts * int(sizes[0]) + rest) / 2)
    return float(min(heaviest, spectral))
