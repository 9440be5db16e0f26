"""The evaluator at DeepSeek-V3 size: seconds and memory per score, link loads of a torus, exact splits of a layer."""

from __future__ import annotations

import numpy as np

from benchmarks.cases import Case, best_seconds, in_child
from moeplace.balance import least_busy_split
from moeplace.network import LOW_LATENCY, Traffic, exchange
from moeplace.topology import load_topology

SCORE = """
import sys, time
import numpy as np
from benchmarks.instances import make_trace
from moeplace.batches import BatchLaw
from moeplace.batches import Steps
from moeplace.execution import Execution
from moeplace.model import load_model
from moeplace.placement import Placement
from moeplace.problem import slots_for
from moeplace.simulate import simulate
from moeplace.packing.eplb import balance_global
from moeplace.topology import load_topology

redundant, routing, spec = int(sys.argv[1]), sys.argv[2], sys.argv[3]
trace = make_trace("dsv3", "mid", 0, tokens=40_000)
law = BatchLaw(phase="decode", requests=4096, batches=200)
rng = np.random.default_rng(0)
rows = np.stack([rng.choice(trace.num_tokens, law.requests, replace=False) for _ in range(law.batches)])
steps = Steps(trace=trace, rows=rows, law=law)
load = np.stack([np.bincount(trace.experts[:, layer].ravel(), minlength=256) for layer in range(58)])
placement = balance_global(load.astype(float), slots_for(256, 64, redundant=redundant))
topology, model = load_topology(spec), load_model("deepseek-v3")
small = Steps(trace=trace, rows=rows[:2], law=law.replace(batches=2))
simulate(small, placement, topology, model, Execution(routing=routing), profile=load)
started = time.perf_counter()
simulate(steps, placement, topology, model, Execution(routing=routing), profile=load)
print(time.perf_counter() - started)
"""


def cases(seeds: int) -> list[Case]:
    """Score 200 steps of 4,096 tokens (380 M routed selections), and time the kernels by themselves."""
    results = []
    for redundant, routing, spec in (
        (0, "even", "scale-out:8x8"),
        (64, "even", "scale-out:8x8"),
        (64, "topology-aware", "scale-out:8x8"),
        (64, "lp", "scale-out:8x8"),
        (0, "even", "torus:4x4x4"),
    ):
        _, memory, printed = in_child(SCORE, str(redundant), routing, spec)
        name = f"score 200 × 4,096 tokens × 58 layers, {spec}, {256 + redundant} slots, {routing}"
        results.append(Case(name=name, value=float(printed), unit="s", target=20))
        results.append(Case(name="  peak memory", value=memory, unit="MB", target=2000))
    results += [*_torus(), _split()]
    return results


def _torus() -> list[Case]:
    rng = np.random.default_rng(0)
    found = []
    for spec in ("torus:8x8x4", "torus:8x8x4:one-shot", "torus:8x8x4:adaptive", "full-mesh:4x8x8", "mesh:16x16"):
        topology = load_topology(spec)
        traffic = Traffic(copies=rng.poisson(1.0, (1, 256, 256)).astype(np.float64))

        def run(topology=topology, traffic=traffic) -> None:  # type: ignore[no-untyped-def]
            exchange(topology, traffic, kernel=LOW_LATENCY, bytes_per_copy=7392)

        run()
        value = 1e3 * best_seconds(run, 10)
        found.append(Case(name=f"link loads of one layer, {spec}", value=value, unit="ms", target=5))
    return found


def _split() -> Case:
    rng = np.random.default_rng(0)
    count = np.where(np.arange(256) < 64, 2, 1)
    slots = np.concatenate([np.arange(256), np.arange(64)])
    gpu_of = rng.permutation(320) // 5
    gpu = np.zeros((256, 2), np.int64)
    for number, expert in enumerate(slots):
        gpu[expert, 1 if number >= 256 else 0] = gpu_of[number]
    load = rng.poisson(128, (50, 256)).astype(np.float64)
    least_busy_split(load, gpu, count, 64)
    value = 1e3 * best_seconds(lambda: least_busy_split(load, gpu, count, 64)) / len(load)
    return Case(name="least busy split of one layer, 256 experts, 320 slots, 64 GPUs", value=value, unit="ms")
