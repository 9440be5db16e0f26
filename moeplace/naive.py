"""What calculators without placement assume: balanced experts, a copy per selection, the same bandwidth everywhere.

Set beside a score it shows what those assumptions leave out: imbalance, sharing of copies, the network's structure and
the tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplace.batches import BatchLaw
from moeplace.compute import ExpertCompute
from moeplace.model import ModelSpec
from moeplace.network import KERNEL_OF_PHASE, LOW_LATENCY
from moeplace.placement import Placement
from moeplace.topology import CUSTOM, Topology, num_links_per_gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveTimes:
    """Times of all MoE layers of a step, under assumptions that no placement meets [µs]."""

    compute_us: float
    dispatch_us: float
    combine_us: float

    @property
    def total_us(self) -> float:
        """Time of the step."""
        return self.compute_us + self.dispatch_us + self.combine_us


def naive_times(law: BatchLaw, placement: Placement, topology: Topology, model: ModelSpec, top_k: int) -> NaiveTimes:
    """Time a step whose rows are the same for every slot, sent at one rate to every GPU.

    Each GPU sends ``tokens·k/GPUs`` copies, all but 1/GPUs of them to others, at what its links carry together (across
    nodes: its NIC). The start-up times and the reached shares of the rates are those of the evaluator.
    """
    gpus, layers = topology.num_gpus, placement.num_layers
    rows_per_gpu = law.step_tokens * top_k / gpus
    slots = max(1.0, float(placement.used_slots().mean()))
    active = max(1, int(np.ceil(min(slots, rows_per_gpu))))
    compute = ExpertCompute.of(model, topology.accelerator, law.phase)
    rows = np.full(active, rows_per_gpu / active)
    speed = 1.0 if topology.gpu_speed is None else float(topology.gpu_speed.mean())
    compute_us = float(compute.rank_us(rows, law.step_tokens / gpus)) / speed
    sent = rows_per_gpu * (1 - 1 / gpus)
    per_byte_us = 1e-3 / flat_gb_per_s(topology) if gpus > 1 else 0.0
    low = KERNEL_OF_PHASE[law.phase] == LOW_LATENCY
    fixed = (topology.low_latency_us if low else topology.normal_latency_us) if gpus > 1 else 0.0
    return NaiveTimes(
        compute_us=layers * compute_us,
        dispatch_us=layers * (fixed + sent * model.bytes_per_copy_dispatch * per_byte_us),
        combine_us=layers * (fixed + sent * model.bytes_per_copy_combine * per_byte_us),
    )


def flat_gb_per_s(topology: Topology) -> float:
    """Bandwidth of one GPU to all others together, were the network without structure [GB/s]."""
    if topology.kind == CUSTOM and topology.pair_gb_per_s is not None:
        return float(topology.pair_gb_per_s[~np.eye(topology.num_gpus, dtype=bool)].mean())
    if topology.is_direct:
        return topology.link_gb_per_s * num_links_per_gpu(topology.kind, topology.dims)
    return topology.nic_gb_per_s if topology.num_nodes > 1 else topology.local_gb_per_s
