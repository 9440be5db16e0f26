"""What a trace says at a glance: skew of the load, and how much affinity is more than popularity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeplace.affinity import RoutingStats
from moeplace.insight import Affinity, TraceInsight, layer_affinity, layer_coactivation
from moeplace.measures import Skew, load_skew
from moeplace.metrics import max_over_mean
from moeplace.placement import spread_slots
from moeplace.solvers.linear import contiguous

DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One MoE layer. What is said of the next layer is None in the last one, and all affinity is None for counts.

    Attributes
    ----------
    layer_id
        Its id.
    expert_max_over_mean, variation, gini, sigma, top_expert_share
        Of the experts' loads: the hottest over the mean; coefficient of variation; Gini coefficient; standard deviation
        of the natural logarithm; share of the busiest tenth of experts.
    gpu_max_over_mean, gpu_balancedness
        GPU load max/mean under contiguous placement, and its inverse mean/max: the share of the GPUs' time that is
        work, 1 when all GPUs finish together.
    mutual_information, information_bias
        Bits that the choices of this layer and the next share, and the bits of it that chance alone would show.
    lift
        How much likelier the pairs of the next layer's transitions are than if both layers' choices were independent.
    top_pair_share, top_pair_share_independent
        Share of transitions to the next layer held by the busiest fifth of expert pairs, and what it would be if the
        layers' choices were independent: only the difference is affinity.
    successor_share, successor_share_independent
        Share of an expert's transitions on its own busiest fifth of successors, and by popularity alone.
    coactivation_share, coactivation_share_independent
        Share of this layer's co-activations held by the busiest tenth of its pairs, and by popularity alone; None where
        tokens choose one expert.
    """

    layer_id: int
    expert_max_over_mean: float
    variation: float
    gini: float
    sigma: float
    top_expert_share: float
    gpu_max_over_mean: float
    gpu_balancedness: float
    mutual_information: float | None = None
    information_bias: float | None = None
    lift: float | None = None
    top_pair_share: float | None = None
    top_pair_share_independent: float | None = None
    successor_share: float | None = None
    successor_share_independent: float | None = None
    coactivation_share: float | None = None
    coactivation_share_independent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSummary:
    """A whole trace: sizes and one :class:`LayerSummary` per MoE layer."""

    num_tokens: int
    num_requests: int
    num_experts: int
    top_k: int
    num_gpus: int
    trace_digest: str
    layers: tuple[LayerSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a ``moeplace/stats/1`` document."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "layers"}
        layers = [{name: _round(getattr(row, name)) for name in row.__slots__} for row in self.layers]
        return {"schema": "moeplace/stats/1", **fields, "per_layer": layers}


def summarise_trace(stats: RoutingStats, num_gpus: int, insight: TraceInsight | None = None) -> TraceSummary:
    """Summarise statistics, with contiguous placement on ``num_gpus`` GPUs.

    ``insight`` is what :func:`~moeplace.insight.measure_trace` made of the same statistics, if it is at hand, so that
    nothing is measured twice. Complexity: O(layers · experts² · log experts).
    """
    experts, layers = stats.meta.num_experts, stats.meta.num_layers
    placed = contiguous(spread_slots(experts, num_gpus), layers, experts)
    gpu = max_over_mean(placed, stats.load)
    if insight is None:
        skew, pairs = tuple(map(load_skew, stats.load)), layer_affinity(stats)
        together = layer_coactivation(stats)
    else:
        skew, pairs, together = insight.skew, insight.affinity, insight.coactivation
    return TraceSummary(
        num_tokens=stats.num_tokens,
        num_requests=stats.num_requests,
        num_experts=experts,
        top_k=stats.meta.top_k,
        num_gpus=num_gpus,
        trace_digest=stats.trace_digest,
        layers=tuple(
            LayerSummary(
                layer_id=stats.meta.layer_ids[layer],
                gpu_max_over_mean=float(gpu[layer]),
                gpu_balancedness=1 / float(gpu[layer]),
                **_skew(skew[layer]),
                **(_affinity(pairs[layer]) if layer < len(pairs) else {}),
                **(_together(together[layer]) if stats.meta.top_k > 1 and together else {}),
            )
            for layer in range(layers)
        ),
    )


def _skew(skew: Skew) -> Mapping[str, float]:
    return {
        "expert_max_over_mean": skew.max_over_mean,
        "variation": skew.variation,
        "gini": skew.gini,
        "sigma": skew.sigma,
        "top_expert_share": skew.top_share,
    }


def _affinity(pair: Affinity) -> Mapping[str, float]:
    return {name: getattr(pair, name) for name in pair.__slots__}


def _together(shares: tuple[float, float]) -> Mapping[str, float]:
    return {"coactivation_share": shares[0], "coactivation_share_independent": shares[1]}


def _round(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value
