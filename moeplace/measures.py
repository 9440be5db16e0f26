"""Measures of routing, each a pure function of tables of counts: skew, affinity, distance, correlation, sample size.

All of them are shares, bits or ratios: none depends on how long a trace is, except through noise, and none changes when
the experts of a layer are renamed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplace.errors import ProblemError
from moeplace.frozen import Floats, Ints

TOP_EXPERTS, TOP_PAIRS, TOP_TOGETHER = 0.10, 0.20, 0.10

Numbers: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skew:
    """How unevenly a layer's experts are loaded.

    Attributes
    ----------
    max_over_mean
        Load of the hottest expert over the mean load.
    variation
        Coefficient of variation: standard deviation over mean (population form).
    gini
        Gini coefficient: 0 when all are equal, towards 1 when one expert takes everything.
    top_share
        Share of the load on the busiest tenth of experts (at least one).
    sigma
        Standard deviation of the natural logarithm of the load; the σ of a log-normal load.
    """

    max_over_mean: float
    variation: float
    gini: float
    top_share: float
    sigma: float


def load_skew(load: Numbers) -> Skew:
    """Measure the skew of one layer's load ``[expert]``, which is not all zero. Complexity: O(E·log E)."""
    values = np.asarray(load, np.float64)
    mean = _total(values) / values.size
    return Skew(
        max_over_mean=float(values.max() / mean),
        variation=float(values.std() / mean),
        gini=gini(values),
        top_share=top_share(values),
        sigma=log_spread(values),
    )


def gini(load: Numbers) -> float:
    """Gini coefficient of a load ``[expert]``, in [0, 1 − 1/E].

    ``G = Σ_{e,f} |x_e − x_f| / (2·E·Σ x)``, computed from the sorted load as ``Σ_i (2i − E − 1)·x_(i) / (E·Σ x)``.
    Source: Gini, Variabilità e mutabilità, 1912. Complexity: O(E·log E).
    """
    ordered = np.sort(np.asarray(load, np.float64))
    weights = 2 * np.arange(1, ordered.size + 1) - ordered.size - 1
    return max(0.0, float(weights @ ordered) / (ordered.size * _total(ordered)))


def top_share(load: Numbers, share: float = TOP_EXPERTS) -> float:
    """Share of a load that its busiest ``share`` of entries holds, at least one entry. Complexity: O(E·log E)."""
    values = np.asarray(load, np.float64)
    return _top(values, max(1, round(share * values.size))) / _total(values)


def log_spread(load: Numbers) -> float:
    """Standard deviation of ln(load); an expert that was never chosen counts as half a selection.

    It is the σ of the log-normal law that the load follows, if it follows one. Complexity: O(E).
    """
    values = np.asarray(load, np.float64)
    floor = 0.5 if np.asarray(load).dtype.kind in "iu" else float(values[values > 0].min(initial=np.inf)) / 2
    _total(values)
    return float(np.log(np.maximum(values, floor)).std())


def mutual_information(table: Numbers) -> float:
    """Mutual information in bits of the two experts of a table of pairs, normalised to a joint distribution.

    ``I = Σ_{e,f} p(e,f)·log2( p(e,f) / (p(e)·p(f)) )`` with ``p = table / Σ table`` (Shannon, 1948). For adjacent
    layers the table holds all k·k pairs of every token. Never negative, and 0 exactly when the layers' choices are
    independent: popularity alone adds nothing. Being estimated from counts it is biased upwards; see
    :func:`information_bias`. Complexity: O(E²).
    """
    joint, independent = _joint(table)
    seen = joint > 0
    return max(0.0, float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum()))


def information_bias(table: Numbers, num_tokens: float, top_k: int) -> float:
    """Bits by which the plug-in :func:`mutual_information` of independent layers exceeds 0 on average.

    ``(C − A − B + 1)·f / (2·N·ln 2)`` with C pairs and A and B experts seen and ``N = tokens·k²``: the correction of
    Miller (1955) and Madow. The k·k pairs of a token are not independent, as its k ids differ, which takes degrees of
    freedom: ``f = (A−k)(B−k) / ((A−1)(B−1))``, 1 for k = 1. Tokens are taken as independent: give the effective sample
    size as ``num_tokens`` where they are not. Complexity: O(E²).
    """
    counts = np.asarray(table) > 0
    rows, columns = int(counts.any(axis=1).sum()), int(counts.any(axis=0).sum())
    if min(rows, columns) <= top_k:
        return 0.0
    freedom = (int(counts.sum()) - rows - columns + 1) * (rows - top_k) * (columns - top_k)
    return max(0.0, freedom / ((rows - 1) * (columns - 1)) / (2 * num_tokens * top_k**2 * math.log(2)))


def pair_table(left: Numbers, right: Numbers, num_experts: int) -> Ints:
    """``[expert, expert]`` pairs that tokens choose on either side, all k·k per token. Complexity: O(tokens·k²)."""
    flat = (left.astype(np.int64)[:, :, None] * num_experts + right[:, None, :]).ravel()
    return np.bincount(flat, minlength=num_experts**2).reshape(num_experts, num_experts)


def mean_lift(table: Numbers) -> float:
    """How much likelier the pairs of a table are than if both sides were independent, averaged over its pairs.

    ``Σ p(e,f)·p(e,f)/(p(e)·p(f)) = 1 + χ²/N`` (Pearson's mean square contingency plus one): 1 means independent.
    Complexity: O(E²).
    """
    joint, independent = _joint(table)
    seen = joint > 0
    return max(1.0, float((joint[seen] ** 2 / independent[seen]).sum()))


def pair_concentration(transition: Numbers, share: float = TOP_PAIRS) -> tuple[float, float]:
    """Share of transitions held by the busiest ``share`` of pairs, and the same if both layers were independent.

    ``round(share·E²)`` pairs are counted. Only the difference of the two is affinity. Complexity: O(E²·log E).
    """
    counts = np.asarray(transition)
    total, count = float(counts.sum()), round(share * counts.size)
    independent = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / total
    return _top(counts, count) / total, _top(independent, count) / total


def successor_concentration(transition: Numbers, share: float = TOP_PAIRS) -> tuple[float, float]:
    """Share of an expert's transitions that its own busiest ``share`` of successors takes, and the independent share.

    ``Σ_e p(e)·Σ_{f in top(e)} p(f|e)`` with the ``round(share·E)`` (at least one) likeliest successors of each expert;
    independent layers would give the share of the next layer's busiest experts. It is the "conditional mass of
    next-layer candidates" of "Patterns behind Chaos" (arXiv 2510.05497). Complexity: O(E²·log E).
    """
    joint, _ = _joint(transition)
    count = max(1, round(share * joint.shape[1]))
    best = np.sort(joint, axis=1)[:, joint.shape[1] - count :]
    return float(best.sum()), _top(joint.sum(axis=0), count)


def coactivation_concentration(together: Numbers, share: float = TOP_TOGETHER) -> tuple[float, float]:
    """Share of a layer's co-activations held by the busiest ``share`` of its pairs, and by popularity alone.

    ``together`` is ``[expert, expert]``, symmetric; its diagonal is left out. Popularity alone makes each pair as
    likely as the product of the two loads. Both are 0 where a token chooses one expert. Complexity: O(E²·log E).
    """
    counts = np.asarray(together, np.float64)
    upper = np.triu_indices(len(counts), 1)
    pairs = counts[upper]
    if pairs.sum() == 0:
        return 0.0, 0.0
    degree = counts.sum(axis=1) - counts.diagonal()
    popular = np.outer(degree, degree)[upper]
    count = max(1, round(share * pairs.size))
    return _top(pairs, count) / float(pairs.sum()), _top(popular, count) / float(popular.sum())


def rank_correlation(left: Numbers, right: Numbers) -> float:
    """Spearman's ρ: the correlation of two loads' ranks, equal loads sharing their mean rank; in [−1, 1].

    0 where one side is constant: it orders nothing. Source: Spearman, 1904. Complexity: O(E·log E).
    """
    ranks = [_ranks(np.asarray(side)) for side in (left, right)]
    centred = [side - side.mean() for side in ranks]
    scale = math.sqrt(float(centred[0] @ centred[0]) * float(centred[1] @ centred[1]))
    return float(np.clip(float(centred[0] @ centred[1]) / scale, -1, 1)) if scale > 0 else 0.0


def top_overlap(left: Numbers, right: Numbers, count: int) -> float:
    """Share of the ``count`` busiest experts of ``right`` that are among the ``count`` busiest of ``left``, in [0, 1].

    ``|top(left) ∩ top(right)| / count``: "Patterns behind Chaos" counts so how many of decode's experts prefill
    foresees. Experts tied for the last places share them (the mean over random ties), so that names do not matter.
    Complexity: O(E·log E).
    """
    number = min(count, len(left))
    members = [_membership(np.asarray(side), number) for side in (left, right)]
    return float(members[0] @ members[1]) / number


def total_variation(left: Numbers, right: Numbers) -> float:
    """Total variation distance of two loads, each normalised: ``½·Σ_e |p_e − q_e|``, in [0, 1]; a metric.

    It is the share of one load that would have to move for it to look like the other. Complexity: O(E).
    """
    p, q = (np.asarray(side, np.float64) / _total(np.asarray(side, np.float64)) for side in (left, right))
    return float(np.abs(p - q).sum()) / 2


def sampling_variation(chosen: Numbers, left_tokens: float, right_tokens: float) -> float:
    """Total variation that two samples of the same routing show on average, by chance alone.

    ``½·Σ_e sqrt(2/π·v_e)`` with ``v_e = q_e(1−q_e)/k²·(1/a + 1/b)``: an expert's share of a sample of ``a`` tokens is
    close to normal, and a difference of two normals has mean size ``sqrt(2v/π)``.

    Parameters
    ----------
    chosen
        ``[expert]`` q, probability that a token chooses the expert; sums to k.
    left_tokens, right_tokens
        Sizes a and b of the samples [independent tokens]. Complexity: O(E).
    """
    top_k = float(chosen.sum())
    variance = chosen * (1 - chosen) / top_k**2 * (1 / left_tokens + 1 / right_tokens)
    return float(np.sqrt(2 / math.pi * np.maximum(variance, 0)).sum()) / 2


def design_effect(load: Numbers, tokens: Numbers) -> float | None:
    """How many tokens count as one independent token, because tokens of a request resemble each other.

    ``Σ_e V_e / Σ_e n·q_e(1−q_e)`` with ``V_e = R/(R−1)·Σ_r (c_re − q_e·n_r)²``: the variance of an expert's load seen
    between groups of whole requests, over that of independent tokens (Kish, Survey Sampling, 1965; random groups:
    Wolter, Introduction to Variance Estimation, ch. 2). About 1 for independent tokens.

    Parameters
    ----------
    load
        ``[group, expert]`` selections by the requests of each group.
    tokens
        ``[group]`` tokens of each group; empty groups are left out.

    Returns
    -------
    float or None
        None with fewer than two groups, or where no expert's load can vary. Complexity: O(groups·E).
    """
    filled = np.asarray(tokens) > 0
    counts, sizes = np.asarray(load, np.float64)[filled], np.asarray(tokens, np.float64)[filled]
    chosen = counts.sum(axis=0) / max(1.0, sizes.sum())
    independent = float(sizes.sum() * (chosen * (1 - chosen)).sum())
    if sizes.size < 2 or independent <= 0:
        return None
    between = float(((counts - sizes[:, None] * chosen) ** 2).sum()) * sizes.size / (sizes.size - 1)
    return between / independent


def _total(values: Floats) -> float:
    total = float(values.sum())
    if not total > 0:
        raise ProblemError("a load without selections", rule="a load to be measured has at least one selection")
    return total


def _joint(table: Numbers) -> tuple[Floats, Floats]:
    counts = np.asarray(table, np.float64)
    joint = counts / _total(counts)
    return joint, np.outer(joint.sum(axis=1), joint.sum(axis=0))


def _top(values: Numbers, count: int) -> float:
    return float(np.sort(values, axis=None)[values.size - count :].sum())


def _ranks(values: Numbers) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _membership(values: Numbers, count: int) -> Floats:
    threshold = np.sort(values)[len(values) - count]
    above, tied = values > threshold, values == threshold
    return above + tied * ((count - above.sum()) / tied.sum())
