r"""Tokens that visit as few GPUs as the copies of their experts allow, and spread over the ways to do so by load.

Of a token's experts those with one copy fix GPUs. The others are served there where they have a copy; for the rest the
fewest further GPUs are taken that hold a copy of each (a smallest hitting set, found by branching over the copies of
the first expert that is not served: a token has few experts). Among smallest sets one is drawn with probability in
proportion to the product of its GPUs' weights, and among the copies on visited GPUs one by its GPU's weight. How many
GPUs a token visits therefore depends on the placement alone; the weights only decide between equals. They are learnt
from the tokens of a profile so that loads even out, and a router needs nothing else: one number for each GPU and layer.

Sources: the idea that a token joins a copy where it already goes is that of topology-aware routing (GRACE-MoE, arXiv
2509.25041, TAR), here for the whole token; weights as in weighted round-robin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.counting import compile_kernel
from moeplace.frozen import Floats, Ints

STEP = np.uint64(0x9E3779B97F4A7C15)
COMPILE_FROM = 50_000  # selections: about a second without compiling
ROUNDS = 40  # of learning weights
RATE = 1.5  # power of mean/load by which a weight changes in a round
SMALLEST = 1e-4  # weight, of the largest


def choose_copies(
    experts: npt.NDArray[Any], token_hash: npt.NDArray[np.uint64], table: tuple[Ints, Ints, Ints], weight: Floats
) -> Ints:
    """Copy that serves each selection of a layer's tokens.

    Parameters
    ----------
    experts
        ``[token, k]`` chosen experts; an expert may stand more than once.
    token_hash
        ``[token]`` well-mixed number of each.
    table
        ``[expert, copy]`` slots, ``[expert, copy]`` GPUs and ``[expert]`` counts of copies, in slot order.
    weight
        ``[GPU]`` weights.

    Returns
    -------
    array
        ``[token, k]`` numbers of copies. Complexity: O(tokens · k²), and the copies of an expert to the power of the
        further GPUs needed for a token that needs any.
    """
    out = np.zeros(experts.shape, np.int64)
    ids = np.ascontiguousarray(experts, dtype=np.int64)
    loop = _compiled_choice() if ids.size >= COMPILE_FROM else _choose_loop
    with np.errstate(over="ignore"):  # hashes are meant to overflow
        loop(ids, token_hash, *table, weight, out)
    return out


def expected_shares(
    experts: npt.NDArray[Any], tokens: Floats, table: tuple[Ints, Ints, Ints], weight: Floats, *, times: int = 1
) -> Floats:
    """``[GPU, expert]`` tokens of every expert that each GPU serves on average, of patterns with ``tokens`` each.

    It will be asked so many ``times``, which decides whether compiling pays. Complexity: as :func:`choose_copies`.
    """
    served = np.zeros((len(weight), len(table[2])))
    ids = np.ascontiguousarray(experts, dtype=np.int64)
    loop = _compiled_shares() if ids.size * times >= COMPILE_FROM else _share_loop
    loop(ids, np.asarray(tokens, np.float64), *table, weight, served)
    return served


def learn_weights(experts: npt.NDArray[Any], table: tuple[Ints, Ints, Ints], num_gpus: int) -> Floats:
    """``[GPU]`` weights under which the tokens ``experts`` [token, k] load GPUs most evenly.

    Weights change by a power of mean/load, round by round; the best met is kept, all alike to begin with.
    """
    weight, best = np.ones(num_gpus), np.ones(num_gpus)
    if (table[2] < 2).all() or not len(experts):
        return best
    patterns, tokens = distinct_patterns(experts)
    several = (table[2][patterns] > 1).any(axis=1)
    fixed = np.zeros(num_gpus)
    np.add.at(fixed, table[1][patterns[~several], 0], tokens[~several, None])
    patterns, tokens = patterns[several], tokens[several]
    least, rate = np.inf, RATE
    for _ in range(ROUNDS):
        load = fixed + expected_shares(patterns, tokens, table, weight, times=ROUNDS).sum(axis=1)
        if load.max() < least:
            least, best = load.max(), weight
        else:
            rate *= 0.8
        mean = load.mean()
        if least <= mean * 1.001:
            break
        weight = weight * (mean / np.maximum(load, 1e-9 * mean)) ** rate
        weight = np.maximum(weight / weight.max(), SMALLEST)
    return best


def distinct_patterns(experts: npt.NDArray[Any]) -> tuple[Ints, Floats]:
    """``[pattern, k]`` distinct sets of experts, rising, and ``[pattern]`` tokens that chose each."""
    rows, tokens = np.unique(np.sort(experts, axis=1), axis=0, return_counts=True)
    return rows.astype(np.int64), tokens.astype(np.float64)


@functools.cache
def _compiled_choice() -> Callable[..., None]:
    return compile_kernel(_choose_loop, *HELPERS)


@functools.cache
def _compiled_shares() -> Callable[..., None]:
    return compile_kernel(_share_loop, *HELPERS)


def _choose_loop(ids: Any, token_hash: Any, slot: Any, gpu: Any, count: Any, weight: Any, out: Any) -> None:
    """Choose copies token by token."""
    top_k = ids.shape[1]
    visited, open_ = np.zeros(len(weight), np.int64), np.zeros(top_k, np.int64)
    trail, nothing = np.zeros(top_k + 1, np.int64), np.zeros((1, 1))
    for i in range(len(ids)):
        several = False
        for j in range(top_k):
            several = several or count[ids[i, j]] > 1
        if not several:
            continue
        left = _fixed(ids[i], slot, gpu, count, visited, open_)
        if left:
            size, total = _smallest(left, open_, gpu, count, weight, visited, trail)
            turn = _turn(token_hash[i], np.uint64(0))
            _walk(left, open_, gpu, count, weight, visited, trail, size, turn * total, ids[i], 0.0, nothing)
        for j in range(top_k):
            e = ids[i, j]
            if count[e] < 2:
                continue
            total = 0.0
            for c in range(count[e]):
                if visited[gpu[e, c]]:
                    total += weight[gpu[e, c]]
            left_over = _turn(token_hash[i], np.uint64(slot[e, 0] + 1)) * total
            for c in range(count[e]):
                if visited[gpu[e, c]]:
                    out[i, j] = c
                    left_over -= weight[gpu[e, c]]
                    if left_over < 0:
                        break
        visited[:] = 0


def _share_loop(ids: Any, tokens: Any, slot: Any, gpu: Any, count: Any, weight: Any, served: Any) -> None:
    """Add up what each GPU serves of each expert, pattern by pattern."""
    top_k = ids.shape[1]
    visited, open_ = np.zeros(len(weight), np.int64), np.zeros(top_k, np.int64)
    trail = np.zeros(top_k + 1, np.int64)
    for i in range(len(ids)):
        left = _fixed(ids[i], slot, gpu, count, visited, open_)
        if left:
            size, total = _smallest(left, open_, gpu, count, weight, visited, trail)
            _walk(left, open_, gpu, count, weight, visited, trail, size, -1.0, ids[i], tokens[i] / total, served)
        else:
            _serve(ids[i], gpu, count, weight, visited, tokens[i], served)
        visited[:] = 0


def _turn(token_hash: Any, salt: Any) -> float:
    """A number in [0, 1), as good as random, the same for a token and a salt."""
    mixed = (token_hash + salt * STEP) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return np.float64(mixed >> np.uint64(40)) * 2.0**-24


def _fixed(experts: Any, slot: Any, gpu: Any, count: Any, visited: Any, open_: Any) -> int:
    """Mark the GPUs of experts with one copy; list the experts that these do not serve, by their first slots."""
    for j in range(len(experts)):
        if count[experts[j]] == 1:
            visited[gpu[experts[j], 0]] = 1
    left = 0
    for j in range(len(experts)):
        e = experts[j]
        served = False
        for c in range(count[e]):
            served = served or visited[gpu[e, c]] > 0
        if served:
            continue
        place = left
        while place > 0 and slot[open_[place - 1], 0] > slot[e, 0]:
            open_[place] = open_[place - 1]
            place -= 1
        open_[place] = e
        left += 1
    return left


def _smallest(left: int, open_: Any, gpu: Any, count: Any, weight: Any, visited: Any, trail: Any) -> Any:
    """Size of the smallest sets of GPUs that serve the open experts, and the sum of their weights."""
    nothing = np.zeros((1, 1))
    for size in range(1, left + 1):
        total = _walk(left, open_, gpu, count, weight, visited, trail, size, -1.0, open_, 0.0, nothing)
        if total > 0.0:
            return size, total
    return left, 1.0


def _walk(
    left: int, open_: Any, gpu: Any, count: Any, weight: Any, visited: Any, trail: Any, size: int, until: float,
    experts: Any, tokens: float, served: Any,
) -> float:  # fmt: skip
    """Go through the sets of at most ``size`` GPUs that serve the open experts; return the sum of their weights.

    With ``until`` of at least 0 it ends at the set where the sum passes it, and leaves the GPUs of that set marked.
    With ``tokens`` above 0 each set serves that many tokens times its weight.
    """
    total, depth = 0.0, 0
    copies = np.zeros(size + 1, np.int64)  # next copy to try at each depth
    at = np.zeros(size + 1, np.int64)  # expert that is served at each depth
    at[0] = 0
    while depth >= 0:
        if copies[depth] == 0:
            while at[depth] < left:
                e = open_[at[depth]]
                has = False
                for c in range(count[e]):
                    has = has or visited[gpu[e, c]] > 0
                if not has:
                    break
                at[depth] += 1
            if at[depth] == left:
                product = 1.0
                for step in range(depth):
                    product *= weight[trail[step]]
                total += product
                if tokens > 0.0:
                    _serve(experts, gpu, count, weight, visited, tokens * product, served)
                if 0.0 <= until < total:
                    return total
                copies[depth] = -1
        if copies[depth] < 0 or depth == size or copies[depth] >= count[open_[at[depth]]]:
            depth -= 1
            if depth >= 0:
                visited[trail[depth]] = 0
            continue
        trail[depth] = gpu[open_[at[depth]], copies[depth]]
        copies[depth] += 1
        visited[trail[depth]] = 1
        at[depth + 1] = at[depth] + 1
        copies[depth + 1] = 0
        depth += 1
    return total


def _serve(experts: Any, gpu: Any, count: Any, weight: Any, visited: Any, tokens: float, served: Any) -> None:
    """Share the tokens of every expert among its copies on visited GPUs, by weight."""
    for j in range(len(experts)):
        e = experts[j]
        total = 0.0
        for c in range(count[e]):
            if visited[gpu[e, c]]:
                total += weight[gpu[e, c]]
        for c in range(count[e]):
            if visited[gpu[e, c]]:
                served[gpu[e, c], e] += tokens * weight[gpu[e, c]] / total


HELPERS = (_turn, _fixed, _smallest, _walk, _serve)
