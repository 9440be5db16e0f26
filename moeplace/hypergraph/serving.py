"""Fewest GPUs that serve each token pattern, and what a copy more or less would change, kept as tables.

Take one expert away from a pattern: the sets of the fewest GPUs that serve the others form its *ways*. The expert costs
nothing more if one of its copies is on a GPU of some way, else one GPU more, wherever its copies are. So one bit set
for each expert of each pattern (the GPUs of all its ways) tells what any move of that expert costs, and its sums over
patterns cost a look-up where the expert has one copy. Only patterns that hold both experts of a move need more.

The loops run compiled or plain. GPUs are bits of words of 62 (plain int64 without the sign), as many as it takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.patterns import Patterns

WORD = 62
PRIME = 67  # powers of two up to 2^65 leave different rests
BIT_OF = np.zeros(PRIME, np.int64)
BIT_OF[[2**bit % PRIME for bit in range(WORD)]] = np.arange(WORD)
GOOD, COMMON, OPEN, NEXT, AT, FIRST_REST, SECOND_REST, TAKEN = range(8)  # rows of the loops' scratch


class Incidence(NamedTuple):
    """The patterns of a layer as the loops read them; a *place* is one expert of one pattern, ordered by expert.

    ``experts`` [pattern, k], ``weight`` [pattern] tokens, ``load`` [expert] tokens and ``scale`` [expert] by which the
    tokens of patterns count towards it (1 but for samples, whose loads are those of all tokens); ``of`` [place]
    pattern, ``first`` [expert + 1] first place, ``at`` [pattern, k] place; ``pairs`` [pair, 2] places of two experts of
    one pattern, those of experts ``a < b`` from ``first_pair[a · experts + b]`` on.
    """

    experts: Any
    weight: Any
    load: Any
    scale: Any
    of: Any
    first: Any
    at: Any
    pairs: Any
    first_pair: Any

    @classmethod
    def of_patterns(cls, patterns: Patterns, load: Floats | None = None) -> Incidence:
        """Index the patterns, with ``load`` [expert] where theirs is that of a sample.

        Complexity: O(patterns · k² · log) time, O(patterns · k² + experts²) memory.
        """
        number, top_k = patterns.num_experts, patterns.top_k
        chosen = patterns.load.astype(np.float64)
        known = chosen if load is None else np.asarray(load, np.float64)
        flat = patterns.experts.ravel()
        order = np.argsort(flat, kind="stable")
        at = np.argsort(order, kind="stable").reshape(patterns.experts.shape)
        left, right = np.triu_indices(top_k, 1)
        keys = (patterns.experts[:, left] * number + patterns.experts[:, right]).ravel()
        by_key = np.argsort(keys, kind="stable")
        pairs = np.stack([at[:, left].ravel()[by_key], at[:, right].ravel()[by_key]], axis=1)
        return cls(
            experts=patterns.experts.astype(np.int32),
            weight=patterns.weight.astype(np.int64),
            load=known,
            scale=known / np.maximum(chosen, 1),
            of=(order // top_k).astype(np.int32),
            first=np.searchsorted(flat[order], np.arange(number + 1)).astype(np.int64),
            at=at.astype(np.int32),
            pairs=pairs.astype(np.int32),
            first_pair=np.searchsorted(keys[by_key], np.arange(number * number + 1)).astype(np.int64),
        )


class Serving(NamedTuple):
    """Where copies are, and what follows for every pattern.

    ``mask`` [expert, word] and ``host`` [expert, copy] GPUs that hold a copy, ``number`` [expert] copies; ``cost``
    [pattern] GPUs that a token
    visits; ``good`` [word, place] GPUs of all ways to serve the pattern's other experts; ``joined`` [expert, GPU]
    tokens of an expert for which that GPU is among them; ``work`` and ``seen`` [GPU + 1] scratch.
    """

    mask: Any
    number: Any
    cost: Any
    good: Any
    joined: Any
    host: Any
    work: Any
    seen: Any

    @classmethod
    def of_slots(cls, slots: Ints, tokens: Incidence) -> Serving:
        """Empty tables for ``slots`` [GPU, slot]; :func:`refresh` fills them."""
        gpus, experts = len(slots), len(tokens.load)
        words, top_k = -(-gpus // WORD), tokens.experts.shape[1]
        mask, number = np.zeros((experts, words), np.int64), np.zeros(experts, np.int64)
        host = np.zeros((experts, gpus), np.int32)
        for gpu, held in enumerate(slots):
            here = held[held >= 0]
            mask[here, gpu // WORD] |= 1 << (gpu % WORD)
            host[here, number[here]] = gpu
            number[here] += 1
        return cls(
            mask=mask,
            number=number,
            cost=np.zeros(len(tokens.weight), np.int64),
            good=np.zeros((words, len(tokens.of)), np.int64),
            joined=np.zeros((experts, gpus), np.int64),
            work=np.zeros((TAKEN + top_k + 1, max(words, top_k + 1, gpus)), np.int64),
            seen=np.zeros(gpus + 1, np.int64),
            host=host,
        )


def fill(tokens: Any, serving: Any) -> None:
    """Fill the tables of all patterns."""
    for p in range(len(tokens.weight)):
        refresh(
            tokens.experts, tokens.weight, tokens.at, serving.mask, serving.number, serving.cost, serving.good,
            serving.joined, serving.work, p,
        )  # fmt: skip


def count(tokens: Any, serving: Any) -> None:
    """Write what a token of every pattern visits, without the other tables."""
    for p in range(len(tokens.weight)):
        serving.cost[p] = ways(tokens.experts, serving.mask, serving.number, serving.work, p, -1)


def refresh(
    experts: Any, weight: Any, at: Any, mask: Any, number: Any, cost: Any, good: Any, joined: Any, work: Any, p: Any
) -> None:
    """Bring the tables of one pattern up to date with its experts' copies."""
    visits = 0
    for j in range(experts.shape[1]):
        e, place = experts[p, j], at[p, j]
        visits = ways(experts, mask, number, work, p, j)
        served = False
        for w in range(mask.shape[1]):
            new = work[GOOD, w]
            served = served or new & mask[e, w] != 0
            changed = new ^ good[w, place]
            good[w, place] = new
            while changed:
                bit = changed & -changed
                changed ^= bit
                joined[e, w * WORD + BIT_OF[bit % PRIME]] += weight[p] if new & bit else -weight[p]
        visits += not served
    cost[p] = visits


def ways(experts: Any, mask: Any, number: Any, work: Any, p: Any, skip: int) -> int:
    """Fewest GPUs that serve a pattern's experts but that at ``skip``; ``work[GOOD]`` gets those of all such sets."""
    words, left = mask.shape[1], 0
    for w in range(words):
        work[GOOD, w], work[COMMON, w] = 0, -1
    for j in range(experts.shape[1]):
        e = experts[p, j]
        if j != skip and number[e] == 1:
            for w in range(words):
                work[GOOD, w] |= mask[e, w]
    for j in range(experts.shape[1]):
        e = experts[p, j]
        if j != skip and number[e] > 1 and not meets(mask, e, work, GOOD):
            work[OPEN, left] = e
            left += 1
            for w in range(words):
                work[COMMON, w] &= mask[e, w]
    visits, together = 0, False
    for w in range(words):
        rest = work[GOOD, w]
        while rest:
            rest &= rest - 1
            visits += 1
        together = together or work[COMMON, w] != 0
    if left == 0:
        return visits
    if together:
        for w in range(words):
            work[GOOD, w] |= work[COMMON, w]
        return visits + 1
    return visits + smallest(mask, work, left)


def smallest(mask: Any, work: Any, left: int) -> int:
    """Size of the smallest sets of GPUs that serve the open experts, which no one GPU does; add all sets' GPUs."""
    for size in range(2, left):
        depth, found = 0, False
        work[NEXT, 0], work[AT, 0] = 0, 0
        while depth >= 0:
            gpu = following(mask, work[OPEN, work[AT, depth]], work[NEXT, depth])
            if gpu < 0:
                depth -= 1
                continue
            work[NEXT, depth] = gpu + 1
            for w in range(mask.shape[1]):
                work[TAKEN + depth, w] = work[TAKEN + depth - 1, w] if depth else 0
                work[COMMON, w] = -1
            work[TAKEN + depth, gpu // WORD] |= 1 << (gpu % WORD)
            unserved = -1
            for i in range(left - 1, -1, -1):
                if not meets(mask, work[OPEN, i], work, TAKEN + depth):
                    unserved = i
                    for w in range(mask.shape[1]):
                        work[COMMON, w] &= mask[work[OPEN, i], w]
            if depth + 2 < size:
                depth += 1
                work[NEXT, depth], work[AT, depth] = 0, unserved
                continue
            together = False
            for w in range(mask.shape[1]):
                together = together or work[COMMON, w] != 0
            if together:
                found = True
                for w in range(mask.shape[1]):
                    work[GOOD, w] |= work[TAKEN + depth, w] | work[COMMON, w]
        if found:
            return size
    for i in range(left):
        for w in range(mask.shape[1]):
            work[GOOD, w] |= mask[work[OPEN, i], w]
    return left


def meets(mask: Any, e: Any, work: Any, row: int) -> bool:
    """Whether an expert has a copy on a GPU of a row of scratch."""
    met = False
    for w in range(mask.shape[1]):
        met = met or mask[e, w] & work[row, w] != 0
    return met


def following(mask: Any, e: Any, gpu: int) -> int:
    """First GPU from ``gpu`` on that holds a copy of an expert; -1: none."""
    for w in range(gpu // WORD, mask.shape[1]):
        rest = mask[e, w] >> (gpu % WORD) << (gpu % WORD) if w == gpu // WORD else mask[e, w]
        if rest:
            return w * WORD + BIT_OF[(rest & -rest) % PRIME]
    return -1


def share(
    experts: Any,
    weight: Any,
    scale: Any,
    mask: Any,
    number: Any,
    host: Any,
    seen: Any,
    work: Any,
    p: Any,
    sign: float,
    busy: Any,
) -> None:
    """Add (or take away) the loads of a pattern's tokens for experts with several copies.

    An expert's tokens are shared by its copies on GPUs that are visited anyway; else by those on GPUs that serve all
    the experts left, else by all. That is the policy's mean with weights alike, but for what sets of two or more
    further GPUs do to each other.
    """
    top_k, several = experts.shape[1], 0
    for j in range(top_k):
        several += number[experts[p, j]] > 1
    if several == 0:
        return
    seen[-1] += 1  # a mark that no GPU has
    for j in range(top_k):
        e = experts[p, j]
        if number[e] == 1:
            seen[host[e, 0]] = seen[-1]
    left = 0
    for j in range(top_k):
        e, among = experts[p, j], 0
        if number[e] == 1:
            continue
        for c in range(number[e]):
            among += seen[host[e, c]] == seen[-1]
        if among == 0:
            work[OPEN, left] = e
            left += 1
            continue
        part = sign * weight[p] * scale[e] / among
        for c in range(number[e]):
            if seen[host[e, c]] == seen[-1]:
                busy[host[e, c]] += part
    if left:
        share_open(scale, mask, number, host, work, left, sign * weight[p], busy)


def share_open(scale: Any, mask: Any, number: Any, host: Any, work: Any, left: int, amount: float, busy: Any) -> None:
    """Share tokens of the open experts among the GPUs that hold all of them, or else those that hold each."""
    first, together = work[OPEN, 0], 0
    for c in range(number[first] if left > 1 else 0):
        all_there = True
        for i in range(1, left):
            all_there = all_there and holds(mask, work[OPEN, i], host[first, c])
        if all_there:
            work[COMMON, together] = host[first, c]
            together += 1
    for i in range(left):
        e = work[OPEN, i]
        if together:
            for c in range(together):
                busy[work[COMMON, c]] += amount * scale[e] / together
        else:
            for c in range(number[e]):
                busy[host[e, c]] += amount * scale[e] / number[e]


def holds(mask: Any, e: Any, gpu: Any) -> bool:
    """Whether a GPU holds a copy of an expert."""
    return (mask[e, gpu // WORD] >> (gpu % WORD)) & 1 == 1


def toggle(mask: Any, number: Any, host: Any, e: Any, off: Any, on: Any) -> None:
    """Take a copy of an expert off one GPU and put one on another; -1: none."""
    if e < 0:
        return
    if off >= 0:
        mask[e, off // WORD] ^= 1 << (off % WORD)
        number[e] -= 1
        for c in range(number[e]):
            if host[e, c] == off:
                host[e, c] = host[e, number[e]]
    if on >= 0:
        mask[e, on // WORD] ^= 1 << (on % WORD)
        host[e, number[e]] = on
        number[e] += 1


def change_load(tokens: Any, serving: Any, a: Any, b: Any, sign: float, busy: Any) -> None:
    """Add (or take away) what follows from two experts' copies: their own loads, and those of their patterns."""
    experts, weight, scale, of, first = tokens.experts, tokens.weight, tokens.scale, tokens.of, tokens.first
    mask, number, host, seen, work = serving.mask, serving.number, serving.host, serving.seen, serving.work
    if number[a] == 1:
        busy[host[a, 0]] += sign * tokens.load[a]
    for place in range(first[a], first[a + 1]):
        share(experts, weight, scale, mask, number, host, seen, work, of[place], sign, busy)
    if b < 0:
        return
    if number[b] == 1:
        busy[host[b, 0]] += sign * tokens.load[b]
    for place in range(first[b], first[b + 1]):
        if not chose(experts, of[place], a):
            share(experts, weight, scale, mask, number, host, seen, work, of[place], sign, busy)


def change_ways(tokens: Any, serving: Any, a: Any, b: Any) -> None:
    """Bring the tables of the patterns of two experts up to date."""
    experts, weight, of, first, at = tokens.experts, tokens.weight, tokens.of, tokens.first, tokens.at
    mask, number, work, cost = serving.mask, serving.number, serving.work, serving.cost
    good, joined = serving.good, serving.joined
    for place in range(first[a], first[a + 1]):
        refresh(experts, weight, at, mask, number, cost, good, joined, work, of[place])
    for place in range(first[b] if b >= 0 else 0, first[b + 1] if b >= 0 else 0):
        if not chose(experts, of[place], a):
            refresh(experts, weight, at, mask, number, cost, good, joined, work, of[place])


def chose(experts: Any, p: Any, e: Any) -> bool:
    """Whether a pattern has an expert."""
    met = False
    for j in range(experts.shape[1]):
        met = met or experts[p, j] == e
    return met


def loads(tokens: Any, serving: Any, busy: Any) -> None:
    """Write the load of every GPU."""
    busy[:] = 0.0
    for e in range(len(tokens.load)):
        if serving.number[e] == 1:
            busy[serving.host[e, 0]] += tokens.load[e]
    for p in range(len(tokens.weight)):
        share(
            tokens.experts, tokens.weight, tokens.scale, serving.mask, serving.number, serving.host, serving.seen,
            serving.work, p, 1.0, busy,
        )  # fmt: skip


HELPERS = (
    change_load, change_ways, loads, chose, share, share_open, toggle, holds, refresh, ways, smallest, meets, following,
)  # fmt: skip
