"""What must fit into the memory of a GPU: weights of its slots, its share of the rest, and the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from moeplace.attention import KV_BYTES
from moeplace.model import ModelSpec

USABLE_SHARE = 0.9
USABLE_SOURCE = "assumed: a tenth of the memory is left to activations and buffers, as serving engines do by default"
_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one GPU, in GB (1e9 bytes).

    Attributes
    ----------
    expert_gb, other_gb, cache_gb
        Weights of routed experts; of everything else; the KV cache.
    """

    expert_gb: float
    other_gb: float
    cache_gb: float

    @property
    def total_gb(self) -> float:
        """All of it."""
        return self.expert_gb + self.other_gb + self.cache_gb


def expert_gb(model: ModelSpec, slots: int) -> float:
    """Weights of the routed experts of a GPU with so many slots in every MoE layer."""
    return slots * model.num_moe_layers * model.expert_weight_bytes / _GB


def other_gb(model: ModelSpec, gpus: int, tp: int) -> float:
    """Weights beside routed experts: attention and dense layers (over ``tp`` GPUs), shared experts, embeddings.

    Attention and embeddings are kept in 16 bits at most. Without attention data only what is known is counted.
    """
    own = min(model.weight_bytes, 2.0)
    attention = 0 if model.attention is None else model.num_layers * model.attention.parameters(model.hidden)
    dense = 3 * model.hidden * model.dense_inner * (model.num_layers - model.num_moe_layers)
    shared = 3 * model.hidden * model.shared_inner * model.num_moe_layers
    embeddings = model.vocab * model.hidden * (1 if model.tied_embeddings else 2)
    return ((attention + dense) * own / tp + shared * own + embeddings * 2.0 / gpus) / _GB


def cache_gb(model: ModelSpec, requests: float, context: float, tp: int) -> float:
    """KV cache of ``requests`` for each GPU; a latent cache is whole on each of the ``tp`` GPUs that share requests."""
    elements = model.kv_elements_per_token
    if elements is None or model.attention is None:
        return 0.0
    heads = 1 if model.attention.is_latent else min(tp, model.attention.num_kv_heads)
    return requests * tp / heads * context * elements * KV_BYTES / _GB


def colocated(model: ModelSpec, slots: int, gpus: int, tp: int, requests: float, context: float) -> Memory:
    """Memory of a GPU that holds experts and attention."""
    return Memory(
        expert_gb=expert_gb(model, slots),
        other_gb=other_gb(model, gpus, tp),
        cache_gb=cache_gb(model, requests, context, tp),
    )
