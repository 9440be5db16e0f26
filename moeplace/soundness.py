"""What a placement rests on: whether the requests it is fitted to run in loops, and whether there are enough of them.

Both are counted on the walk that counts the routing, so that a solve can tell what ``moeplace stats`` would.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplace.affinity import RoutingStats, RoutingTally, count_routing, grouped_load
from moeplace.checks import Finding, repetition_loops
from moeplace.fingerprint import Hashes, hashed
from moeplace.insight import sample_size
from moeplace.loops import LoopTally
from moeplace.profile import REQUEST_GROUPS
from moeplace.trace import Counts, Trace, TraceMeta, TraceStream


def count_and_doubt(source: TraceStream | Counts, **options: Any) -> tuple[RoutingStats, list[Finding]]:
    """Count a trace and find, on the same walk, loops and too short a trace.

    Parameters
    ----------
    source
        The fit part of a trace, or of counts.
    options
        :func:`~moeplace.affinity.count_routing`'s.

    Returns
    -------
    tuple
        The statistics, and the findings, empty when all is well. Complexity: that of the statistics, and O(64 +
        layers·k) per token; O(64·layers·experts) memory.
    """
    tally = SoundnessTally(source.meta)
    if isinstance(source, Counts):
        stats = count_routing(source, **options)
    else:
        routing = RoutingTally(source.meta, **options)
        routing.add_all(source.blocks(), tally.add)
        stats = routing.result(source.meta)  # names and skipped rows are complete once the trace has been walked
    return stats, tally.findings(stats)


class SoundnessTally:
    """Loops, and the loads of random groups of requests, whose spread tells what the sample is worth."""

    def __init__(self, meta: TraceMeta) -> None:
        self._loops = LoopTally.empty()
        self._tokens = np.zeros(REQUEST_GROUPS, np.int64)
        self._load = np.zeros((REQUEST_GROUPS, meta.num_layers, meta.num_experts), np.int64)

    def add(self, block: Trace, hashes: Hashes) -> None:
        """Add tokens."""
        group = (hashed(block.request, 0) % np.uint64(REQUEST_GROUPS)).astype(np.int64)
        self._load += grouped_load(block, group, REQUEST_GROUPS)
        self._tokens += np.bincount(group, minlength=REQUEST_GROUPS)
        self._loops.add(block)

    def findings(self, stats: RoutingStats) -> list[Finding]:
        """Return what is wrong; ``stats`` are those of the same tokens."""
        short = sample_size(stats, self._tokens, self._load).warning
        found = repetition_loops(self._loops, stats) if stats.has_tokens else []
        if short is not None:
            hint = "record more of the kinds you serve"
            found.append(Finding(level="warning", check="short-trace", sentence=short, hint=hint))
        return found
