"""Synthetic routers: per layer and hidden state of a token, how likely each expert is; and fast draws from that.

A token's state is its domain and its topic. Topics last from layer to layer, which is what makes adjacent layers
dependent; each layer's table is balanced (iterative proportional fitting) so that, whatever domains and topics like,
the layer's load as a whole stays the log-normal that was asked for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.counting import compile_kernel
from moeplace.fingerprint import hashed
from moeplace.frozen import Floats, Ints
from moeplace.model import ModelSpec

FEWEST_TOPICS, MOST_TOPICS = 6, 16
FITTING_ROUNDS = 30
MOST_CERTAIN = 0.97  # probability of a choice beyond which no state goes, so that the k choices stay distinct
MOST_TRIES = 24  # draws in a row that repeat a choice before what is left is walked through
_STEP, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11))

_Floats32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """What a router is built from; found by calibration.

    Attributes
    ----------
    popularity
        Standard deviation of the experts' log probability, over all tokens.
    domain, topic
        Standard deviations of what a domain and a topic add to it.
    agreement
        Correlation of prefill's and decode's log probabilities, in [0, 1].
    wander
        How far the mix of topics wanders over time, in logits.
    """

    popularity: float
    domain: float
    topic: float
    agreement: float
    wander: float

    def replace(self, **changes: float) -> Knobs:
        """Copy with some knobs changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class AliasTable:
    """Draws from many discrete distributions in constant time each (Walker 1974; Vose 1991).

    ``keep`` and ``other`` are ``[row, column]``: a uniform column of the row is kept with probability ``keep``, else
    its alias is taken.
    """

    keep: _Floats32
    other: npt.NDArray[np.uint16]

    @classmethod
    def build(cls, weights: Floats) -> AliasTable:
        """Build from non-negative ``weights`` [row, column], each row with a positive sum.

        All rows advance together: sorted, the lightest open column is filled up by the current heavy one, and a heavy
        one that runs out is filled up by the next. Complexity: O(rows·columns·log columns).
        """
        rows, columns = weights.shape
        scaled = weights * (columns / weights.sum(axis=1, keepdims=True))
        order = np.argsort(scaled, axis=1)
        scaled = np.take_along_axis(scaled, order, 1)
        keep, other = np.ones((rows, columns)), order.copy()
        every = np.arange(rows)
        light, heavy = np.zeros(rows, np.int64), np.minimum((scaled < 1).sum(axis=1), columns - 1)
        first_heavy, left = heavy.copy(), scaled[every, heavy]
        for _ in range(columns - 1):
            spent = (left < 1) & (heavy < columns - 1)
            place = np.where(spent, heavy, light)
            active = spent | (light < first_heavy)
            giver = np.minimum(np.where(spent, heavy + 1, heavy), columns - 1)
            value = np.where(spent, left, scaled[every, np.minimum(light, columns - 1)])
            where, at = every[active], place[active]
            keep[where, at] = np.clip(value[active], 0, 1)
            other[where, at] = order[where, giver[active]]
            left = np.where(active, np.where(spent, scaled[every, giver], left) - (1 - value), left)
            heavy, light = np.where(spent, giver, heavy), np.where(active & ~spent, light + 1, light)
        final, alias = np.empty((rows, columns), np.float32), np.empty((rows, columns), np.uint16)
        np.put_along_axis(final, order, keep.astype(np.float32), 1)
        np.put_along_axis(alias, order, other.astype(np.uint16), 1)
        return cls(final, alias)


@dataclass(frozen=True, slots=True)
class LayerRouter:
    """One layer: how likely a token of each state chooses each expert.

    ``weights`` is ``[phase·state, expert]``; a token's k experts are drawn one after the other, each with probability
    proportional to its weight among those left. With ``groups`` a token first draws its groups likewise, by the sum of
    their weights, and then experts in these only (node-limited routing, DeepSeek-V3, arXiv 2412.19437).
    """

    weights: _Floats32
    experts: AliasTable
    groups: LayerRouter | None
    groups_per_token: int

    @classmethod
    def build(cls, weights: Floats, model: ModelSpec | None = None) -> LayerRouter:
        """Build from positive ``weights``; without a model there are no groups."""
        groups = None
        if model is not None and model.groups_per_token < model.num_groups:
            groups = cls.build(weights.reshape(len(weights), model.num_groups, -1).sum(axis=2))
        return cls(
            weights.astype(np.float32),
            AliasTable.build(weights),
            groups,
            0 if model is None else model.groups_per_token,
        )

    def choose(self, state: Ints, top_k: int, tokens: Ints, seed: int) -> npt.NDArray[np.uint16]:
        """Draw ``[token, k]`` distinct experts, first choice first.

        Parameters
        ----------
        state
            ``[token]`` row of ``weights``.
        top_k
            Experts of a token.
        tokens, seed
            Numbers of the tokens, and a seed: both together fix a token's choice, whatever stands beside it.
            Complexity: O(k²) per token, a little more where a state leaves few likely experts.
        """
        allowed = np.ones((len(state), 1), bool)
        if self.groups is not None:
            chosen = self.groups.choose(state, self.groups_per_token, tokens, seed + 1)
            allowed = np.zeros((len(state), self.groups.weights.shape[1]), bool)
            np.put_along_axis(allowed, chosen.astype(np.int64), True, 1)
        result = np.empty((len(state), top_k), np.uint16)
        table = (self.weights, self.experts.keep, self.experts.other)
        _kernel()(*table, state, hashed(tokens, seed), allowed, result)
        return result


@functools.cache
def _kernel() -> Callable[..., None]:
    return compile_kernel(_draw_loop)


def _draw_loop(
    weights: Any, keep: Any, other: Any, state: Any, stream: Any, allowed: Any, result: Any
) -> None:  # pragma: no cover - compiled
    columns, top_k = weights.shape[1], result.shape[1]
    group = np.arange(columns) // (columns // allowed.shape[1])
    for token in range(len(state)):
        row, random, found, tries = state[token], stream[token], 0, 0
        while found < top_k:
            # SplitMix64: a stream of its own for each token
            random += _STEP
            mixed = (random ^ (random >> _SHIFTS[0])) * _MIX_1
            mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _MIX_2
            uniform = np.float64((mixed ^ (mixed >> _SHIFTS[2])) >> _SHIFTS[3]) * 2.0**-53
            choice = -1
            if tries < MOST_TRIES:
                column = int(uniform * columns)
                choice = column if uniform * columns - column < keep[row, column] else other[row, column]
            else:  # hardly anything but repetitions comes: walk through what is left
                left = 0.0
                for passing in range(2):
                    reach = uniform * left
                    for e in range(columns):
                        free = allowed[token, group[e]]
                        for i in range(found):
                            free = free and result[token, i] != e
                        if free and passing == 0:
                            left += weights[row, e]
                        elif free and reach >= 0:
                            choice = e
                            reach -= weights[row, e]
            tries += 1
            fresh = allowed[token, group[choice]]
            for i in range(found):
                fresh = fresh and result[token, i] != choice
            if fresh:
                result[token, found] = choice
                found, tries = found + 1, 0


@dataclass(frozen=True, slots=True)
class LayerTaste:
    """The random part of one layer, fixed by the seed: what calibration scales.

    ``popular`` and ``other_phase`` ``[expert]`` are normal scores, uncorrelated; ``domain`` ``[domain, expert]`` and
    ``topic`` ``[topic, expert]`` are normal.
    """

    popular: Floats
    other_phase: Floats
    domain: Floats
    topic: Floats

    @classmethod
    def draw(cls, model: ModelSpec, num_domains: int, seed: int, layer: int) -> LayerTaste:
        """Draw the taste of one layer."""
        num_experts = model.num_experts
        rng = np.random.default_rng([seed, 1, layer])
        scores = normal_scores(num_experts)
        popular, other = rng.permutation(scores), rng.permutation(scores)
        other = other - popular * (other @ popular) / max(float(popular @ popular), 1e-12)
        spread = float(other.std())
        return cls(
            popular=popular,
            other_phase=other / spread if spread > 1e-9 else other,
            domain=rng.standard_normal((num_domains, num_experts)),
            topic=rng.standard_normal((num_topics(model), num_experts)),
        )

    def router(self, knobs: Knobs, model: ModelSpec, hot: float) -> LayerRouter:
        """Build the layer's router. Complexity: O(domains·topics·experts·rounds)."""
        experts, top_k = model.num_experts, model.top_k
        liking = knobs.domain * self.domain[:, None] + knobs.topic * self.topic[None]
        liking = np.exp(liking - liking.max(axis=2, keepdims=True)).reshape(-1, experts)
        agreement = min(1.0, max(0.0, knobs.agreement))
        other = agreement * self.popular + np.sqrt(1 - agreement**2) * self.other_phase
        target = [expected_choices(knobs.popularity * taste, top_k, hot) for taste in (self.popular, other)]
        chosen = np.concatenate([balanced(liking, columns, top_k) for columns in target])
        # the rates of exponential clocks of which the first k ring: 1 − exp(−rate) each, close to it for k of many
        weights = chosen if top_k == 1 else -np.log1p(-chosen)
        return LayerRouter.build(weights, model)


def num_topics(model: ModelSpec) -> int:
    """Topics that tokens can have: fewer where a token chooses many of the experts, as topics then overlap."""
    return min(MOST_TOPICS, max(FEWEST_TOPICS, model.num_experts // model.top_k))


def normal_scores(count: int) -> Floats:
    """Return ``count`` quantiles of the normal law, standardised: a sample without chance. Complexity: O(count)."""
    from statistics import NormalDist

    law = NormalDist()
    scores = np.array([law.inv_cdf((i + 0.5) / count) for i in range(count)])
    return scores / max(float(scores.std()), 1e-12)


def expected_choices(log_weight: Floats, top_k: int, hot: float) -> Floats:
    """``[expert]`` probability that a token chooses each expert, proportional to exp(log_weight); sums to top-k.

    ``hot > 0`` gives the likeliest expert that many times the mean. No probability exceeds :data:`MOST_CERTAIN`.
    """
    chosen = np.exp(log_weight - log_weight.max())
    fixed = np.zeros(len(chosen), bool)
    if hot > 0:
        place = int(np.argmax(log_weight))
        fixed[place] = True
        chosen[place] = min(hot * top_k / len(chosen), MOST_CERTAIN)
    for _ in range(FITTING_ROUNDS):
        free = ~fixed
        chosen[free] *= max(0.0, top_k - chosen[fixed].sum()) / chosen[free].sum()
        over = free & (chosen > MOST_CERTAIN)
        if not over.any() or over.sum() == free.sum():
            break
        chosen[over], fixed[over] = MOST_CERTAIN, True
    return np.minimum(chosen, 1 - 1e-9)


def balanced(liking: Floats, columns: Floats, row_sum: float) -> Floats:
    """Scale a positive table so that rows sum to ``row_sum`` and columns average to ``columns``, no entry above 0.97.

    Iterative proportional fitting (Deming and Stephan, 1940), entries cut where they exceed a probability.
    """
    ceiling = max(MOST_CERTAIN, float(columns.max()))
    table = liking * columns
    for _ in range(FITTING_ROUNDS):
        table *= columns / table.mean(axis=0)
        np.minimum(table, ceiling, out=table)
        table *= row_sum / table.sum(axis=1, keepdims=True)
        np.minimum(table, ceiling, out=table)
    return table
