"""Laws of :mod:`moeplace.naive`: what is left of a step without imbalance, shared copies and structure."""

from __future__ import annotations

import numpy as np
import pytest
from strategies import random_placement, slow_topology, small_model

from moeplace.batches import BatchLaw
from moeplace.compute import ExpertCompute
from moeplace.naive import flat_gb_per_s, naive_times
from moeplace.placement import Placement
from moeplace.topology import load_topology

MODEL = small_model()


def _placement(gpus: int, slots: int = 3) -> Placement:
    return random_placement(0, [slots] * gpus, 2, slots * gpus)


def test_two_gpus_by_hand() -> None:
    """Two GPUs, 12 tokens, top-2: 12 rows each on 3 slots, 6 copies to the other GPU at the NVLink rate, two layers."""
    topology, law = slow_topology("scale-up:2"), BatchLaw(phase="decode", requests=12)
    times = naive_times(law, _placement(2), topology, MODEL, 2)
    compute = ExpertCompute.of(MODEL, topology.accelerator, "decode")
    assert times.compute_us == pytest.approx(2 * float(compute.rank_us(np.full(3, 4), 6)))
    for name, size in (("dispatch_us", MODEL.bytes_per_copy_dispatch), ("combine_us", MODEL.bytes_per_copy_combine)):
        wire = 6 * size / (topology.local_gb_per_s * 1e3)
        assert getattr(times, name) == pytest.approx(2 * (topology.low_latency_us + wire))
    assert times.total_us == pytest.approx(times.compute_us + times.dispatch_us + times.combine_us)


def test_one_gpu_sends_nothing() -> None:
    """With one GPU only computing is left."""
    times = naive_times(
        BatchLaw(phase="prefill", requests=4, tokens=8), _placement(1), slow_topology("scale-up:1"), MODEL, 2
    )
    assert times.dispatch_us == times.combine_us == 0
    assert times.compute_us > 0


def test_few_rows_touch_few_experts() -> None:
    """A step of one token reads no more than its own experts' weights."""
    topology = slow_topology("scale-up:2")
    one = naive_times(BatchLaw(phase="decode", requests=1), _placement(2), topology, MODEL, 2)
    compute = ExpertCompute.of(MODEL, topology.accelerator, "decode")
    assert one.compute_us == pytest.approx(2 * float(compute.rank_us(np.ones(1), 0.5)))


def test_flat_bandwidth_is_all_links_or_the_nic() -> None:
    """All links of a torus together, the NIC where there are several nodes, the domain's rate otherwise."""
    assert flat_gb_per_s(torus := load_topology("torus:4x4x4")) == pytest.approx(6 * torus.link_gb_per_s)
    assert flat_gb_per_s(out := load_topology("scale-out:2x8")) == out.nic_gb_per_s
    assert flat_gb_per_s(up := load_topology("scale-up:8")) == up.local_gb_per_s
    pairs = np.array([[1.0, 2, 3], [4, 1, 6], [7, 8, 1]])
    assert flat_gb_per_s(load_topology("scale-up:3").replace(kind="custom", pair_gb_per_s=pairs)) == pytest.approx(5)


def test_unlike_gpus_compute_at_their_mean_speed() -> None:
    """Calculators know one speed: the mean of all."""
    topology, law = slow_topology("scale-up:2"), BatchLaw(phase="decode", requests=12)
    alike = naive_times(law, _placement(2), topology, MODEL, 2)
    unlike = naive_times(law, _placement(2), topology.replace(gpu_speed=np.array([0.5, 1.0])), MODEL, 2)
    assert unlike.compute_us == pytest.approx(alike.compute_us / 0.75)
    assert unlike.dispatch_us == alike.dispatch_us
