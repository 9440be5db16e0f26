"""What a trace says at a glance: skew of the load, and how much affinity is more than popularity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeplace.affinity import RoutingStats
from moeplace.measures import load_skew, pair_concentration
from moeplace.metrics import max_over_mean
from moeplace.placement import spread_slots
from moeplace.solvers.linear import contiguous

DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One MoE layer.

    Attributes
    ----------
    layer_id
        Its id.
    expert_max_over_mean, variation, top_expert_share
        Load of the hottest expert over the mean; coefficient of variation; share of the busiest tenth of experts.
    gpu_max_over_mean
        GPU load max/mean under contiguous placement.
    top_pair_share, top_pair_share_independent
        Share of transitions to the next layer held by the busiest fifth of expert pairs, and what it would be if the
        layers' choices were independent: only the difference is affinity. None without per-token data.
    """

    layer_id: int
    expert_max_over_mean: float
    variation: float
    top_expert_share: float
    gpu_max_over_mean: float
    top_pair_share: float | None = None
    top_pair_share_independent: float | None = None


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


def summarise_trace(stats: RoutingStats, num_gpus: int) -> TraceSummary:
    """Summarise statistics, with contiguous placement on ``num_gpus`` GPUs. Complexity: O(layers · experts²)."""
    experts, layers = stats.meta.num_experts, stats.meta.num_layers
    placed = contiguous(spread_slots(experts, num_gpus), layers, experts)
    gpu = max_over_mean(placed, stats.load)
    return TraceSummary(
        num_tokens=stats.num_tokens,
        num_requests=stats.num_requests,
        num_experts=experts,
        top_k=stats.meta.top_k,
        num_gpus=num_gpus,
        trace_digest=stats.trace_digest,
        layers=tuple(_layer(stats, layer, float(gpu[layer])) for layer in range(layers)),
    )


def _layer(stats: RoutingStats, layer: int, gpu: float) -> LayerSummary:
    skew = load_skew(stats.load[layer])
    pairs: tuple[float | None, float | None] = (None, None)
    if stats.transition is not None and layer < len(stats.transition):
        pairs = pair_concentration(stats.transition[layer])
    return LayerSummary(
        layer_id=stats.meta.layer_ids[layer],
        expert_max_over_mean=skew.max_over_mean,
        variation=skew.variation,
        top_expert_share=skew.top_share,
        gpu_max_over_mean=gpu,
        top_pair_share=pairs[0],
        top_pair_share_independent=pairs[1],
    )


def _round(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value
