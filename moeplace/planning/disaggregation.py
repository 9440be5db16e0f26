"""Attention and experts on GPUs of their own: MegaScale-Infer's performance model (arXiv 2504.02263 §4).

``m`` micro-batches go back and forth between ``n_a`` attention nodes of ``tp_a`` GPUs and one node of ``tp_e`` GPUs for
each share of the experts. With ``T_a``, ``T_e`` and ``T_c`` the times of one layer's attention, experts and one way of
the network, and ``T_f = max(T_a, T_e)``:

* (1) ``T_a ≈ T_e``; (2) ``T_c < T_f``; (3) ``m·T_f ≥ 2·(T_f + T_c)``, so ``m ≥ 2·(1 + T_c/T_f)``
* (4) one micro-batch takes between ``(T_a+T_e+2T_c) + m·T_f·(L−1)`` and ``m·T_f·L``
* (5) all of them take ``(T_a+T_e+2T_c) + T_f·(m·L−1)``
* (6) ``T_c = max{ b_a·h·K/tp_a / W_a, b_e·h/tp_e / W_e }`` in bytes, over usable bandwidths
* (7) ``T_total ≤`` the limit; (8) the KV cache and the weights fit into the attention nodes
* from ``T_a = k1·b_a + k2``, ``T_e = k3·b_e + k4`` and (1): ``n_a = k1·E/(k3·K)``

The paper counts two matrices of a feed-forward network; gated experts have three, as everywhere here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moeplace.compute import ExpertCompute
from moeplace.hardware import Accelerator
from moeplace.model import ModelSpec
from moeplace.planning.memory import USABLE_SHARE, cache_gb, expert_gb, other_gb
from moeplace.planning.timing import attention_us, reduce_us

TP_SIZES = (1, 2, 4, 8)
MICRO_BATCHES = (3, 4)
MOST_ATTENTION_NODES = 64


def micro_batches_needed(communication_us: float, compute_us: float) -> int:
    """Fewest micro-batches that hide the network: (3). 3 where it takes less than half of computing, else 4.

    Examples
    --------
    >>> [micro_batches_needed(share, 1.0) for share in (0.10, 0.49, 0.75)]
    [3, 3, 4]
    """
    return math.ceil(2 * (1 + communication_us / compute_us) - 1e-12)


def total_us(times: tuple[float, float, float], micro_batches: int, layers: int) -> float:
    """Time of all micro-batches through all layers, (5); longer where (3) does not hold and every one waits.

    ``times`` are ``T_a``, ``T_e`` and ``T_c``. A micro-batch cannot begin its next layer before its way is over, which
    then takes the place of ``m·T_f`` in every layer.
    """
    attention, experts, way = times
    slower, round_trip = max(attention, experts), attention + experts + 2 * way
    return round_trip + (layers - 1) * max(micro_batches * slower, round_trip) + (micro_batches - 1) * slower


def iteration_bounds_us(times: tuple[float, float, float], micro_batches: int, layers: int) -> tuple[float, float]:
    """Least and most time of one micro-batch through all layers, (4)."""
    attention, experts, way = times
    slower = max(attention, experts)
    return attention + experts + 2 * way + micro_batches * slower * (layers - 1), micro_batches * slower * layers


def balanced_attention_nodes(k1: float, k3: float, experts: int, top_k: int) -> float:
    """Attention nodes for which both sides take equally long, as batches grow: ``k1·E/(k3·K)``."""
    return k1 * experts / (k3 * top_k)


def message_bytes(attention_batch: float, model: ModelSpec, tp: int) -> float:
    """Bytes of 16-bit activations that one attention GPU sends to one expert: ``b_a·(K/E)·h·2/tp_a``."""
    return attention_batch * model.top_k / model.num_experts * model.hidden * 2 / tp


def compute_bound_batch(flops_per_byte: float, experts: int, top_k: int) -> float:
    """Tokens of a batch from which every expert's weights are read more quickly than used, in 16 bits: ``(F/B)·E/K``.

    Examples
    --------
    >>> [compute_bound_batch(156, experts, top_k) for experts, top_k in ((8, 2), (16, 4), (32, 4))]
    [624.0, 624.0, 1248.0]
    """
    return float(flops_per_byte * experts / top_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Times of both sides of a split model under balanced routing.

    Attributes
    ----------
    model, attention, experts
        The model, and what the two kinds of GPU are.
    context
        Tokens in the cache of a request.
    tp_attention, tp_experts
        GPUs of an attention node and of an expert node.
    expert_nodes
        Nodes that the experts of a layer are on; the paper has one for each expert.
    """

    model: ModelSpec
    attention: Accelerator
    experts: Accelerator
    context: float
    tp_attention: int = 1
    tp_experts: int = 1
    expert_nodes: int = 1

    def attention_us(self, batch: float) -> float:
        """``T_a`` of a node for ``batch`` requests; shared experts run beside attention."""
        tp, model = self.tp_attention, self.model
        time = attention_us(model, self.attention, batch / tp, self.context, tp)
        if model.shared_inner:
            one = ExpertCompute.of(model, self.attention, "decode")
            time += max(one.shared_weight_us, batch * one.shared_row_us) / tp
        return time

    def experts_us(self, rows: float) -> float:
        """``T_e`` of a node whose experts compute ``rows`` together, all of them hit once there are enough."""
        one = ExpertCompute.of(self.model, self.experts, "decode")
        held = -(-self.model.num_experts // self.expert_nodes)
        hit = held * -math.expm1(-rows / held)
        busy = max(hit * one.weight_us, rows * one.row_us) / self.tp_experts
        return one.launch_us + busy + reduce_us(self.model, self.experts, rows, self.tp_experts)

    def way_us(self, batch: float, rows: float) -> float:
        """``T_c``: one way of the network, (6), and what it takes to start it."""
        model, size = self.model, self.model.bytes_per_copy_combine
        sent = batch * model.top_k * size / self.tp_attention / self.attention.nic_effective_gb_per_s
        received = rows * size / self.tp_experts / self.experts.nic_effective_gb_per_s
        start = max(self.attention.nic_latency_us, self.experts.nic_latency_us)
        return start + max(sent, received) * 1e-3

    def rows(self, batch: float, nodes: int) -> float:
        """``b_e``: rows of an expert node when ``nodes`` attention nodes have ``batch`` requests each."""
        return batch * nodes * self.model.top_k / self.expert_nodes

    def times(self, batch: float, nodes: int) -> tuple[float, float, float]:
        """``T_a``, ``T_e`` and ``T_c``."""
        rows = self.rows(batch, nodes)
        return self.attention_us(batch), self.experts_us(rows), self.way_us(batch, rows)

    def slopes(self, batch: float) -> tuple[float, float]:
        """``k1`` and ``k3`` around a batch [µs per token and per row of one expert]: what twice as much adds."""
        rows = max(1.0, batch * self.model.top_k / self.expert_nodes)
        k1 = (self.attention_us(2 * batch) - self.attention_us(batch)) / batch
        k3 = (self.experts_us(2 * rows) - self.experts_us(rows)) / rows
        return k1, k3


def nodes_in_balance(sides: Sides, batch: float) -> int:
    """Attention nodes for which ``T_e`` comes nearest to ``T_a`` without passing it; at least 1.

    For straight lines it is ``k1·E/(k3·K)`` as batches grow, rounded down; here both times are as they are.
    """
    attention = sides.attention_us(batch)
    fitting = [n for n in range(1, MOST_ATTENTION_NODES + 1) if sides.experts_us(sides.rows(batch, n)) <= attention]
    return max(fitting, default=1)


def nodes_to_try(sides: Sides, batch: float, micro_batches: int) -> list[int]:
    """Attention nodes in balance, and those of the highest throughput per GPU.

    The two differ where few rows leave ``T_e`` at the time of reading the weights.
    """

    def per_gpu(nodes: int) -> float:
        gpus = sides.tp_attention * nodes + sides.tp_experts * sides.expert_nodes
        return nodes * batch / total_us(sides.times(batch, nodes), micro_batches, sides.model.num_moe_layers) / gpus

    return sorted({nodes_in_balance(sides, batch), max(range(1, MOST_ATTENTION_NODES + 1), key=per_gpu)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A split deployment under balanced routing.

    Attributes
    ----------
    sides
        What is on which GPUs.
    attention_nodes, micro_batches, batch
        ``n_a``, ``m``, and the global batch ``B``.
    times_us
        ``T_a``, ``T_e`` and ``T_c``.
    total_us
        Time of a step, ``T_total``.
    cost
        Price of all GPUs.
    """

    sides: Sides
    attention_nodes: int
    micro_batches: int
    batch: int
    times_us: tuple[float, float, float]
    total_us: float
    cost: float

    @property
    def gpus(self) -> int:
        """GPUs of both sides."""
        own = self.sides
        return own.tp_attention * self.attention_nodes + own.tp_experts * own.expert_nodes

    @property
    def tokens_per_s(self) -> float:
        """Throughput."""
        return self.batch / self.total_us * 1e6

    @property
    def per_cost(self) -> float:
        """Throughput over price: what is maximised."""
        return self.tokens_per_s / self.cost


def algorithm_1(
    model: ModelSpec,
    accelerators: tuple[Accelerator, Accelerator],
    prices: Mapping[str, float],
    *,
    context: float,
    limit_ms: float,
    micro_batches: Sequence[int] = MICRO_BATCHES,
) -> Plan | None:
    """MegaScale-Infer's search: for every TP of both sides, nodes in balance and the largest batch within the limit.

    Parameters
    ----------
    model
        One node holds one expert of every layer.
    accelerators
        For attention, and for experts.
    prices
        Accelerator → price of one.
    context, limit_ms
        Tokens in a request's cache; most time per output token.
    micro_batches
        Numbers of micro-batches to try.

    Returns
    -------
    Plan or None
        The best throughput for its price; None where nothing fits. Complexity: a few thousand evaluations.
    """
    best: Plan | None = None
    for sides in _sides(model, accelerators, context):
        for count in micro_batches:
            found = _largest_batch(sides, count, prices, limit_ms * 1e3)
            if found is not None and (best is None or found.per_cost > best.per_cost):
                best = found
    return best


def _sides(model: ModelSpec, accelerators: tuple[Accelerator, Accelerator], context: float) -> Iterator[Sides]:
    """Both tensor parallelisms whose weights fit."""
    attention, experts = accelerators
    for tp_experts in TP_SIZES:
        if expert_gb(model, 1) / tp_experts > USABLE_SHARE * experts.hbm_gb:
            continue
        for tp_attention in TP_SIZES:
            if other_gb(model, tp_attention, tp_attention) <= USABLE_SHARE * attention.hbm_gb:
                yield Sides(
                    model=model,
                    attention=attention,
                    experts=experts,
                    context=context,
                    tp_attention=tp_attention,
                    tp_experts=tp_experts,
                    expert_nodes=model.num_experts,
                )


def _largest_batch(sides: Sides, micro_batches: int, prices: Mapping[str, float], limit_us: float) -> Plan | None:
    """Bisect the batch of an attention node; the nodes follow from the balance."""

    def plan(batch: int) -> Plan:
        return make_plan(sides, (nodes_in_balance(sides, batch), micro_batches, batch), prices)

    def fits(batch: int) -> bool:
        held = cache_gb(sides.model, micro_batches * batch / sides.tp_attention, sides.context, sides.tp_attention)
        weights = other_gb(sides.model, sides.tp_attention, sides.tp_attention)
        room = USABLE_SHARE * sides.attention.hbm_gb
        return held + weights <= room and plan(batch).total_us <= limit_us

    largest = _largest(fits)
    return plan(largest) if largest else None


def make_plan(sides: Sides, shape: tuple[int, int, int], prices: Mapping[str, float]) -> Plan:
    """Evaluate ``n_a`` nodes, ``m`` micro-batches and a batch ``b_a`` of each node and micro-batch."""
    nodes, count, batch = shape
    times = sides.times(batch, nodes)
    attention_price = prices[sides.attention.name] * sides.tp_attention * nodes
    return Plan(
        sides=sides,
        attention_nodes=nodes,
        micro_batches=count,
        batch=batch * nodes * count,
        times_us=times,
        total_us=total_us(times, count, sides.model.num_moe_layers),
        cost=attention_price + prices[sides.experts.name] * sides.tp_experts * sides.expert_nodes,
    )


def _largest(fits: Callable[[int], bool], most: int = 1 << 16) -> int:
    """Largest number that fits, by bisection; 0 where 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
