"""Synthetic traces of published shapes, the instances that quality targets are stated on.

Tokens follow hidden topics that persist from layer to layer; each topic likes a sparse set of experts per layer. With
mid and strong affinity the busiest fifth of expert pairs of adjacent layers holds about 50 % and 65-73 % of the
transitions, and the hottest expert of a layer takes 2-5 times the mean.
"""

from __future__ import annotations

import numpy as np

from moeplace.trace import Trace, TraceMeta

SHAPES = {  # MoE layers, experts, top-k, tokens
    "mixtral": (32, 8, 2, 40_000),
    "olmoe": (16, 64, 8, 40_000),
    "qwen3": (48, 128, 8, 40_000),
    "qwen3-235b": (94, 128, 8, 40_000),
    "dsv3": (58, 256, 8, 60_000),
    "kimi": (60, 384, 8, 60_000),
}
MODELS = {
    "mixtral": "mixtral-8x7b",
    "olmoe": "olmoe-1b-7b",
    "qwen3": "qwen3-30b-a3b",
    "dsv3": "deepseek-v3",
    "kimi": "kimi-k2",
}
AFFINITY = {  # mean boost of a topic's experts, spread of popularity, chance to change topic between layers
    "weak": (1.4, 0.5, 0.25),
    "mid": (2.6, 0.6, 0.10),
    "strong": (4.5, 0.7, 0.03),
}
BLOCK = 4096


def make_trace(shape: str, affinity: str, seed: int, tokens: int | None = None) -> Trace:
    """Sample a trace; the structure and the tokens both depend on the seed. Requests are 512 tokens each."""
    layers, experts, top_k, default_tokens = SHAPES[shape]
    boost, popularity, switch = AFFINITY[affinity]
    boost += 0.6 * (shape == "mixtral")
    count = tokens or default_tokens
    rng = np.random.default_rng([seed, layers, experts])
    topics = max(6, experts // max(2, top_k // 2))
    share = 1 / np.sqrt(np.arange(1, topics + 1))
    share /= share.sum()
    liked_share = max(1.5 * top_k / experts, 0.06) if experts > 8 else 0.3
    topic = rng.choice(topics, count, p=share)
    ids = np.empty((count, layers, top_k), np.uint16)
    for layer in range(layers):
        if layer:
            change = rng.random(count) < switch
            topic = np.where(change, rng.choice(topics, count, p=share), topic)
        liked = rng.random((topics, experts)) < liked_share
        pull = liked * np.abs(rng.normal(boost, 0.7, (topics, experts))) + rng.normal(0, 0.3, (topics, experts))
        logits = (rng.normal(0, popularity, experts) + pull).astype(np.float32)
        for start in range(0, count, BLOCK):
            rows = slice(start, min(start + BLOCK, count))
            ids[rows, layer] = _top_k(logits[topic[rows]], top_k, rng)
    number = np.arange(count)
    meta = TraceMeta(num_experts=experts, top_k=top_k, layer_ids=tuple(range(layers)), model_id=f"synthetic-{shape}")
    return Trace(meta=meta, experts=ids, request=number // 512, position=number % 512, phase=np.ones(count, np.uint8))


def _top_k(logits: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray:
    exponential = rng.standard_exponential(logits.shape, np.float32)
    score = logits - np.log(np.maximum(exponential, np.finfo(np.float32).tiny))
    chosen = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
    order = np.argsort(-np.take_along_axis(score, chosen, 1), axis=1)
    return np.take_along_axis(chosen, order, 1)
