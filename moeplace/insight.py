"""What a trace says, measured, and set beside what was published.

:func:`measure_trace` turns routing statistics and a :class:`~moeplace.profile.TraceProfile` into every measure of
:mod:`moeplace.measures`; :func:`patterns` compares them with the six insights of "Patterns behind Chaos".
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace import measures
from moeplace.affinity import RoutingStats
from moeplace.frozen import Ints
from moeplace.measures import Skew
from moeplace.profile import TraceProfile
from moeplace.trace import DECODE, PREFILL

OVERLAPS = (5, 10, 20)
EXACT_ENOUGH = 0.10  # relative standard error of an average expert's load beyond which a trace is short
DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Affinity:
    """How much a layer's choices say about the next layer's, beyond both layers' popularity.

    Attributes
    ----------
    mutual_information, information_bias
        Bits, as counted, and the bits of it that independent layers and tokens would show by chance.
    lift
        Mean of observed over independent probability; 1 is independent.
    top_pair_share, top_pair_share_independent
        Share of transitions on the busiest fifth of pairs, and by popularity alone.
    successor_share, successor_share_independent
        Share of an expert's transitions on its own busiest fifth of successors, and by popularity alone.
    """

    mutual_information: float
    information_bias: float
    lift: float
    top_pair_share: float
    top_pair_share_independent: float
    successor_share: float
    successor_share_independent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseAgreement:
    """How well prefill's load foretells decode's.

    Attributes
    ----------
    rank_correlation
        ``[layer]`` Spearman's ρ of the two loads.
    overlap
        ``[5, 10, 20][layer]`` share of decode's busiest experts that are among prefill's busiest.
    """

    rank_correlation: tuple[float, ...]
    overlap: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSize:
    """How much a trace can support.

    Attributes
    ----------
    design_effect
        Tokens that count as one independent token, median over layers; None where requests are not known.
    effective_tokens
        Tokens over the design effect (never more than the tokens).
    relative_error
        Relative standard error of an average expert's load.
    warning
        A sentence where the trace is too short for its experts, else None.
    """

    design_effect: float | None
    effective_tokens: float
    relative_error: float
    warning: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceInsight:
    """Every measure of a trace; empty tuples and None stand for what it does not record.

    Attributes
    ----------
    skew, coactivation
        One entry per MoE layer; co-activation as share on the busiest tenth of pairs, and by popularity alone.
    affinity
        One entry per pair of adjacent MoE layers.
    gpu_max_over_min
        Per layer, load of the busiest over that of the idlest of 8 GPUs with contiguous experts.
    following
        Per layer, successor share of consecutive tokens, and the independent share.
    phases, domains, domain_distance
        Prefill against decode; names, and total variation between each two of them, mean over layers.
    drift, drift_noise
        Total variation between consecutive chunks of 25,000 tokens or more, and what chance alone would give where
        the tokens of a request are as alike as here.
    sample
        How much the trace can support.
    """

    num_tokens: int
    num_requests: int
    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    skew: tuple[Skew, ...]
    affinity: tuple[Affinity, ...]
    coactivation: tuple[tuple[float, float], ...]
    gpu_max_over_min: tuple[float, ...]
    following: tuple[tuple[float, float], ...]
    phases: PhaseAgreement | None
    domains: tuple[str, ...]
    domain_distance: tuple[tuple[float, ...], ...]
    drift: tuple[float, ...]
    drift_noise: tuple[float, ...]
    sample: SampleSize

    @property
    def most_distant(self) -> tuple[str, str] | None:
        """The two domains whose loads differ most; None with fewer than two."""
        rows = self.domain_distance
        pairs = [(a, b) for a in range(len(rows)) for b in range(a)]
        far = max(pairs, key=lambda pair: rows[pair[0]][pair[1]], default=None)
        return None if far is None else (self.domains[far[1]], self.domains[far[0]])

    @property
    def pair_distances(self) -> tuple[float, ...]:
        """Distances of the domains, each pair once."""
        rows = self.domain_distance
        return tuple(rows[a][b] for a in range(len(rows)) for b in range(a))

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as a document of numbers, lists and names, rounded to six digits."""
        document: dict[str, Any] = _rounded(dataclasses.asdict(self))
        return document


def measure_trace(stats: RoutingStats, profile: TraceProfile) -> TraceInsight:
    """Compute every measure of a trace from its two tables. Complexity: O(layers·experts²·log experts)."""
    layers = range(stats.meta.num_layers)
    names, distance = domain_distances(profile)
    sample = sample_size(stats, profile.group_tokens, profile.group_load)
    # chance moves loads by as much as if there were only so many independent tokens
    chance = profile.drift_noise * math.sqrt(max(1.0, sample.design_effect or 1.0))
    return TraceInsight(
        num_tokens=stats.num_tokens,
        num_requests=stats.num_requests,
        num_experts=stats.meta.num_experts,
        top_k=stats.meta.top_k,
        layer_ids=stats.meta.layer_ids,
        skew=tuple(measures.load_skew(stats.load[layer]) for layer in layers),
        affinity=layer_affinity(stats),
        coactivation=layer_coactivation(stats),
        gpu_max_over_min=tuple(_gpu_max_over_min(stats.load[layer]) for layer in layers),
        following=tuple((float(a), float(b)) for a, b in profile.following),
        phases=phase_agreement(profile),
        domains=names,
        domain_distance=distance,
        drift=tuple(profile.drift.tolist()),
        drift_noise=tuple(chance.tolist()),
        sample=sample,
    )


def layer_affinity(stats: RoutingStats) -> tuple[Affinity, ...]:
    """Affinity of each pair of adjacent layers; empty for counts. Complexity: O(layers·experts²·log experts)."""
    tables = () if stats.transition is None else stats.transition
    return tuple(_affinity(table, stats) for table in tables)


def layer_coactivation(stats: RoutingStats) -> tuple[tuple[float, float], ...]:
    """Co-activation share of each layer, and by popularity alone; empty for counts. O(layers·experts²·log experts)."""
    tables = () if stats.coactivation is None else stats.coactivation
    return tuple(measures.coactivation_concentration(table) for table in tables)


def _affinity(table: Ints, stats: RoutingStats) -> Affinity:
    pairs, successors = measures.pair_concentration(table), measures.successor_concentration(table)
    return Affinity(
        mutual_information=measures.mutual_information(table),
        information_bias=measures.information_bias(table, stats.num_tokens, stats.meta.top_k),
        lift=measures.mean_lift(table),
        top_pair_share=pairs[0],
        top_pair_share_independent=pairs[1],
        successor_share=successors[0],
        successor_share_independent=successors[1],
    )


def phase_agreement(profile: TraceProfile) -> PhaseAgreement | None:
    """Compare prefill's load with decode's; None unless every layer has both. Complexity: O(layers·E·log E)."""
    prefill, decode = (profile.load[phase].sum(axis=0) for phase in (PREFILL, DECODE))
    if not (prefill.sum(axis=1).all() and decode.sum(axis=1).all()):
        return None
    pairs = list(zip(prefill, decode, strict=True))
    overlaps = [tuple(measures.top_overlap(a, b, count) for a, b in pairs) for count in OVERLAPS]
    return PhaseAgreement(
        rank_correlation=tuple(measures.rank_correlation(a, b) for a, b in pairs), overlap=tuple(overlaps)
    )


def domain_distances(profile: TraceProfile) -> tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]:
    """Names of the domains that have tokens, and the mean over layers of the total variation of each two."""
    if not profile.has_domains:
        return (), ()
    known = profile.meta.domains
    load = profile.load.sum(axis=0)
    present = [d for d in range(len(load)) if load[d].sum(axis=1).all()]
    share = load[present] / load[present].sum(axis=2, keepdims=True)
    rows = [tuple(float(x) for x in np.abs(share - own).sum(axis=2).mean(axis=1) / 2) for own in share]
    return tuple(known[d] if d < len(known) else str(d) for d in present), tuple(rows)


def sample_size(stats: RoutingStats, group_tokens: Ints, group_load: Ints) -> SampleSize:
    """Measure how many independent tokens a trace is worth, and whether they suffice for its experts.

    With ``q = k/E`` and n effective tokens the load of an average expert has relative standard error
    ``sqrt((1 − q)/(q·n))``; beyond 10 % the trace is short. ``group_tokens`` [group] and ``group_load`` [group, layer,
    expert] are those of a :class:`~moeplace.profile.TraceProfile`. Complexity: O(groups·layers·experts).
    """
    effects = [measures.design_effect(load, group_tokens) for load in group_load.transpose(1, 0, 2)]
    known = [effect for effect in effects if effect is not None]
    design = float(np.median(known)) if known else None
    effective = stats.num_tokens / max(1.0, design or 1.0)
    chosen = stats.meta.top_k / stats.meta.num_experts
    error = math.sqrt((1 - chosen) / (chosen * effective)) if effective > 0 else math.inf
    warning = None
    if error > EXACT_ENOUGH:
        counted = f" count as {effective:,.0f} independent ones" if effective < 0.95 * stats.num_tokens else ""
        warning = (
            f"the trace is short for {stats.meta.num_experts} experts: {stats.num_tokens:,} tokens{counted}, so that "
            f"an average expert's load is known to ±{error:.0%} only; "
            f"±{EXACT_ENOUGH:.0%} takes {(error / EXACT_ENOUGH) ** 2:.1f} times as many requests"
        )
    return SampleSize(design_effect=design, effective_tokens=effective, relative_error=error, warning=warning)


def _gpu_max_over_min(load: Ints, gpus: int = 8) -> float:
    gpus = min(gpus, len(load))
    held = np.add.reduceat(load, np.arange(gpus) * len(load) // gpus)
    return float(held.max() / max(1, int(held.min())))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, tuple | list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """One insight of "Patterns behind Chaos" (arXiv 2510.05497): what this trace shows, and what was published."""

    number: int
    name: str
    here: str
    published: str

    def __str__(self) -> str:
        return f"{self.number}. {self.name}: {self.here} (published: {self.published})"


def patterns(insight: TraceInsight) -> tuple[Pattern, ...]:
    """Set a trace beside the six insights of the paper; a line says so where the trace does not tell."""
    texts = (
        (
            "prefill foretells decode",
            _phases_text(insight),
            "ρ ≥ 0.7; the top 5/10/20 cover 60/75/90 %",
        ),
        (
            "layers and tokens are correlated",
            _correlation_text(insight),
            "top 20 % of candidates hold 50-77 % of the next layer's, 47-80 % of the next token's",
        ),
        (
            "place work where experts are",
            f"contiguous experts on 8 GPUs give max/min load {_median(insight.gpu_max_over_min):.2f}",
            "about 1.3 on 8 GPUs, more on more; sorting by load wins 15.5 % of the expert time",
        ),
        (
            "popular experts",
            f"the hottest takes {_median([s.max_over_mean for s in insight.skew]):.1f} times the mean, "
            f"{max(s.max_over_mean for s in insight.skew):.1f} in the worst layer",
            "some more than 16 times (Llama-4, layer 7)",
        ),
        (
            "experts are chosen together",
            _together_text(insight),
            "top 10 % of pairs hold 60-80 %",
        ),
        (
            "workloads differ",
            _domains_text(insight),
            "task and language change the hot experts; no single figure",
        ),
    )
    return tuple(Pattern(number=i + 1, name=a, here=b, published=c) for i, (a, b, c) in enumerate(texts))


def _phases_text(insight: TraceInsight) -> str:
    if insight.phases is None:
        return "the trace does not hold both phases"
    covered = "/".join(f"{100 * np.mean(row):.0f}" for row in insight.phases.overlap)
    return f"ρ = {_median(insight.phases.rank_correlation):.2f}; the top 5/10/20 cover {covered} %"


def _correlation_text(insight: TraceInsight) -> str:
    if not insight.affinity:
        return "the trace does not hold tokens of two layers"
    layer = _median([pair.successor_share for pair in insight.affinity])
    alone = _median([pair.successor_share_independent for pair in insight.affinity])
    text = f"top 20 % hold {_percent(layer)} of the next layer's ({_percent(alone)} by popularity alone)"
    if insight.following:
        text += f", {_percent(_median([share for share, _ in insight.following]))} of the next token's"
    return text


def _together_text(insight: TraceInsight) -> str:
    if insight.top_k < 2 or not insight.coactivation:
        return "the trace does not hold tokens that choose several experts"
    share, alone = (_median(column) for column in zip(*insight.coactivation, strict=True))
    return f"top 10 % of pairs hold {_percent(share)} ({_percent(alone)} by popularity alone)"


def _domains_text(insight: TraceInsight) -> str:
    if len(insight.domains) < 2:
        return "the trace does not hold several domains"
    low, high = min(insight.pair_distances), max(insight.pair_distances)
    return f"the loads of {len(insight.domains)} domains differ by {low:.2f} to {high:.2f} in total variation"


def _median(values: Any) -> float:
    return float(np.median(values))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
