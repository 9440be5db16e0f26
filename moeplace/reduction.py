"""From tokens to counts: how often each expert was chosen is kept, which token chose it is not."""

from __future__ import annotations

import numpy as np

from moeplace.affinity import grouped_load
from moeplace.errors import InputError, TraceError
from moeplace.frozen import Ints
from moeplace.trace import Counts, TraceMeta, TraceStream

STEP_TABLE_BYTES = 1 << 30  # counts per step are held in memory until they are written


def counts_of(source: TraceStream, *, per_step: bool = False) -> Counts:
    """Count how often each expert was chosen, over the whole trace or in each recorded step.

    Parameters
    ----------
    source
        A trace, a stream or a selection.
    per_step
        Keep the steps that the trace records, in increasing order; otherwise there is one.

    Returns
    -------
    Counts
        Without domains and request names, which counts of many tokens have no place for. Complexity:
        O(tokens·layers·k) time; memory O(steps·layers·experts).

    Raises
    ------
    TraceError
        ``per_step``, and the trace records no steps.
    InputError
        Counts per step would take more than :data:`STEP_TABLE_BYTES`.
    """
    meta = source.meta
    steps = _steps(source, meta) if per_step else np.zeros(1, np.int64)
    table = np.zeros((len(steps), meta.num_layers, meta.num_experts), np.int64)
    for block in source.blocks():
        step = np.zeros(block.num_tokens, np.int64) if not per_step or block.step is None else block.step
        present, number = np.unique(step, return_inverse=True)
        table[np.searchsorted(steps, present)] += grouped_load(block, number, len(present))
    return Counts(meta=source.meta.replace(domains=(), request_names=()), counts=table)


def _steps(source: TraceStream, meta: TraceMeta) -> Ints:
    """Sorted numbers of the steps of a trace."""
    steps = np.zeros(0, np.int64)
    for block in source.blocks():
        if block.step is None:
            raise TraceError(
                "the trace records no steps",
                rule="counts per step need the engine's step of every token",
                hint="leave --per-step out: the counts are then of the whole trace",
            )
        steps = np.union1d(steps, block.step)
    size = len(steps) * meta.num_layers * meta.num_experts * 8
    if size > STEP_TABLE_BYTES:
        raise InputError(
            f"counts of {len(steps):,} steps take {size / 1e9:,.1f} GB",
            rule=f"at most {STEP_TABLE_BYTES / 1e9:,.1f} GB",
            hint="leave --per-step out, or keep fewer requests",
        )
    return steps
