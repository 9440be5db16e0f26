"""How the parts of a step overlap: not at all, two half batches at once, or micro-batches in a pipeline.

* ``none``: layer after layer, part after part.
* ``dual-batch``: the step's two halves take turns, one computing while the other communicates. It cannot be faster
  than either kind of work by itself, and is taken to be as fast as the slower one: ``max(Σ compute, Σ communication)``
  over both halves, each of which pays its own fixed times. With few tokens that is a loss. It is an upper bound on what
  overlap wins: at the one point published so far (SGLang on 72 H100, 256 tokens each, 5 May 2025) it won 25.5 %, which
  leaves about 0.47 of the communication exposed.
* ``ping-pong``: attention and experts run on different GPUs, and ``m`` micro-batches go back and forth between them
  (MegaScale-Infer, arXiv 2504.02263 §4). Each side works on one micro-batch at a time, in order; a micro-batch's way
  there and back takes its communication time. Balanced, that is ``(T_a+T_e+2T_c) + T_f·(m·L−1)`` with
  ``T_f = max(T_a, T_e)``, as long as ``m·T_f ≥ 2(T_f+T_c)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplace.errors import unknown_name
from moeplace.frozen import Floats

NONE, DUAL_BATCH, PING_PONG = "none", "dual-batch", "ping-pong"
OVERLAPS = (NONE, DUAL_BATCH, PING_PONG)
MICRO_BATCHES = {NONE: 1, DUAL_BATCH: 2, PING_PONG: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTimes:
    """Times of the parts of steps, cut into micro-batches [µs].

    Attributes
    ----------
    attention
        ``[step, micro-batch]`` of one layer.
    compute, dispatch, combine
        ``[layer, step, micro-batch]`` of the experts and of the two directions.
    """

    attention: Floats
    compute: Floats
    dispatch: Floats
    combine: Floats


def step_times(parts: PartTimes, overlap: str) -> Floats:
    """``[step]`` time of each step.

    Raises
    ------
    UnknownNameError
        No such overlap.
    """
    if overlap not in OVERLAPS:
        raise unknown_name("overlap", overlap, OVERLAPS)
    if overlap == PING_PONG:
        return _ping_pong(parts)
    layers = len(parts.compute)
    compute = layers * parts.attention.sum(axis=-1) + parts.compute.sum(axis=(0, 2))
    communication = (parts.dispatch + parts.combine).sum(axis=(0, 2))
    together: Floats = np.maximum(compute, communication) if overlap == DUAL_BATCH else compute + communication
    return together


def _ping_pong(parts: PartTimes) -> Floats:
    """Walk through the pipeline: who is ready when, and when each side is free again. Complexity: O(layers · parts)."""
    steps, micro_batches = parts.attention.shape
    attention_free, experts_free = np.zeros(steps), np.zeros(steps)
    ready = np.zeros((steps, micro_batches))
    for layer in range(len(parts.compute)):
        for part in range(micro_batches):
            attention_free = np.maximum(attention_free, ready[:, part]) + parts.attention[:, part]
            arrived = attention_free + parts.dispatch[layer, :, part]
            experts_free = np.maximum(experts_free, arrived) + parts.compute[layer, :, part]
            ready[:, part] = experts_free + parts.combine[layer, :, part]
    last: Floats = ready.max(axis=1)
    return last
