"""A ping-pong pipeline event by event: who works when, and where the bubbles are.

Micro-batches go from attention to experts and back, layer after layer. Each side works on one at a time, in the order
of layers and micro-batches; a way over the network takes its time and holds nobody up. The end is that of
:func:`moeplace.overlap.step_times`, which walks the same pipeline without events; here every side's work is kept.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from moeplace.frozen import Floats

ATTENTION, EXPERTS = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A side at work on one micro-batch of one layer [µs]."""

    side: int
    layer: int
    micro_batch: int
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What happened.

    Attributes
    ----------
    total_us
        When the last micro-batch was back.
    work
        All work, in the order in which it began.
    """

    total_us: float
    work: tuple[Work, ...]

    def busy_us(self, side: int) -> float:
        """Time a side worked."""
        return sum(item.end_us - item.start_us for item in self.work if item.side == side)

    def bubbles_us(self, side: int) -> float:
        """Time a side waited between its first and its last work."""
        own = [item for item in self.work if item.side == side]
        return max(item.end_us for item in own) - min(item.start_us for item in own) - self.busy_us(side)


def run_pipeline(attention: Floats, experts: Floats, dispatch: Floats, combine: Floats) -> Pipeline:
    """Run micro-batches through the pipeline.

    Parameters
    ----------
    attention, experts, dispatch, combine
        ``[layer, micro-batch]`` µs of both sides and both ways.

    Returns
    -------
    Pipeline
        Complexity: O(layers · micro-batches · log micro-batches).
    """
    layers, count = attention.shape
    ready: list[list[tuple[int, int]]] = [[(0, part) for part in range(count)], []]  # waiting, least first
    following, free_at = [(0, 0), (0, 0)], [0.0, 0.0]
    events: list[tuple[float, int, int, int]] = []  # time, side that a micro-batch reaches, layer, micro-batch
    duration, way = (attention, experts), (dispatch, combine)
    done: list[Work] = []
    now = last = 0.0
    while True:
        for side in (ATTENTION, EXPERTS):
            while ready[side] and ready[side][0] == following[side] and free_at[side] <= now:
                layer, part = heapq.heappop(ready[side])
                end = now + float(duration[side][layer, part])
                done.append(Work(side=side, layer=layer, micro_batch=part, start_us=now, end_us=end))
                free_at[side] = end
                following[side] = (layer, part + 1) if part + 1 < count else (layer + 1, 0)
                arrival = end + float(way[side][layer, part])
                heapq.heappush(events, (end, -1, layer, part))
                heapq.heappush(events, (arrival, 1 - side, layer + side, part))
        if not events:
            return Pipeline(total_us=last, work=tuple(done))
        now, side, layer, part = heapq.heappop(events)
        last = max(last, now)
        if side >= 0 and layer < layers:
            heapq.heappush(ready[side], (layer, part))


def uniform(value: float, layers: int, micro_batches: int) -> Floats:
    """``[layer, micro-batch]`` of one value."""
    return np.full((layers, micro_batches), float(value))
