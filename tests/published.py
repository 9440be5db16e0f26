"""What the evaluator says of published measurements: its own functions, its packaged presets, nothing fitted here.

An error is that of the predicted time: negative where the evaluator is too fast. A published rate is compared as the
time that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from moeplace.compute import ExpertCompute
from moeplace.hardware import load_accelerator
from moeplace.model import load_model
from moeplace.network import LOW_LATENCY, NORMAL, Exchange, Traffic, exchange
from moeplace.topology import Topology, build_topology

# what is compared → its errors, and how large they may be on average and each
Comparisons = dict[str, tuple[Callable[[], list[float]], float, float]]
# what is missed → its errors, and the published figure
Misses = dict[str, tuple[Callable[[], list[float]], str]]
MISSED_BY = 0.10
DEEPSEEK = load_model("deepseek-v3")
FP8_BYTES, BF16_BYTES = DEEPSEEK.bytes_per_copy_dispatch, DEEPSEEK.bytes_per_copy_combine


def servers(accelerator: str, ranks: int, per_node: int = 8) -> Topology:
    """Servers of a packaged accelerator; one server is a single switched domain."""
    return build_topology("scale-out", (ranks // per_node, per_node), load_accelerator(accelerator))


def domain(accelerator: str, ranks: int) -> Topology:
    """One switched domain of a packaged accelerator."""
    return build_topology("scale-up", (ranks,), load_accelerator(accelerator))


def touched(groups: int, experts: int, top_k: int = 8) -> float:
    """Expected number of ``groups`` equal groups among ``top_k`` of ``experts`` chosen uniformly."""
    return groups * (1 - math.comb(experts - experts // groups, top_k) / math.comb(experts, top_k))


def low_latency_us(topology: Topology, copies: float, size: float) -> float:
    """Time of one direction when every rank sends ``copies`` copies, evenly to all ranks, itself included."""
    gpus = topology.num_gpus
    traffic = Traffic(copies=np.full((gpus, gpus), copies / gpus))
    return float(exchange(topology, traffic, kernel=LOW_LATENCY, bytes_per_copy=size).time_us)


def normal(
    topology: Topology, tokens: int, size: float, *, most_nodes: int | None = None, gate: tuple[int, int] = (256, 8)
) -> tuple[Exchange, float]:
    """One direction with normal kernels under a uniform gate (experts, top-k), and the nodes that a token reaches.

    With ``most_nodes`` the gate is limited to the experts of so many nodes.
    """
    (experts, top_k), gpus, nodes = gate, topology.num_gpus, topology.num_nodes
    chosen = min(nodes, most_nodes or nodes)
    open_to_token = experts * chosen // nodes
    reach, node_reach = (touched(n, open_to_token, top_k) for n in (topology.gpus_per_node * chosen, chosen))
    traffic = Traffic(
        copies=np.full((gpus, gpus), tokens * reach / gpus),
        node_copies=np.full((gpus, nodes), tokens * node_reach / nodes),
    )
    return exchange(topology, traffic, kernel=NORMAL, bytes_per_copy=size), node_reach


def logical_gb_per_s(timed: Exchange, tokens: int, places: float, size: float) -> float:
    """Bytes for the places that tokens reach, their own included, per time without the fixed part."""
    return tokens * places * size / (float(timed.time_us) - timed.latency_us) * 1e-3


def bottleneck(timed: Exchange) -> str:
    """Name of the busiest link of a single exchange."""
    names, busiest = timed.bottleneck()
    return names[int(busiest)]


def routed_experts(accelerator: str, phase: str) -> ExpertCompute:
    """DeepSeek-V3's experts without the shared one, which measurements of grouped GEMMs leave out."""
    compute = ExpertCompute.of(DEEPSEEK, load_accelerator(accelerator), phase)
    return compute.replace(shared_weight_us=0.0, shared_row_us=0.0)


def errors(predicted: Iterable[float], measured: Iterable[float]) -> list[float]:
    """Relative errors of predicted times."""
    return [found / expected - 1 for found, expected in zip(predicted, measured, strict=True)]


def mean(found: Sequence[float]) -> float:
    """Mean size of errors."""
    return sum(map(abs, found)) / len(found)


def worst(found: Sequence[float]) -> float:
    """The largest error, with its sign."""
    return max(found, key=abs)


def percent(error: float, sign: str = "") -> str:
    """An error as the README writes it: whole percents, or tenths below one."""
    decimals = 0 if abs(error) >= 0.0095 else 1
    return f"{100 * error:{sign}.{decimals}f} %".replace("-", "−")


def span(found: Sequence[float]) -> str:
    """The least and the largest of errors, as the README writes them."""
    low, high = (percent(error, "+") for error in (min(found), max(found)))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def expected_failures(misses: Misses) -> list[Any]:
    """Parameters of a test that fails on every miss, and is to be changed when one is mended."""
    return [
        pytest.param(name, marks=pytest.mark.xfail(raises=AssertionError, strict=True, reason=f"published: {figure}"))
        for name, (_, figure) in misses.items()
    ]
