"""Deployments judged: placed on their topology, timed on steps of the trace, priced by the book."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moeplace.affinity import RoutingStats
from moeplace.batches import BatchLaw, Steps
from moeplace.compute import ExpertCompute
from moeplace.frozen import Floats
from moeplace.hardware import Accelerator
from moeplace.network import KERNEL_OF_PHASE, latency_us
from moeplace.overlap import DUAL_BATCH, PING_PONG, PartTimes, step_times
from moeplace.placement import Placement
from moeplace.planning import memory
from moeplace.planning.deployment import Deployment
from moeplace.planning.disaggregation import Sides
from moeplace.planning.economics import Bill, bill
from moeplace.planning.outcome import TIMED, UNTIMED, Breach, Outcome
from moeplace.planning.pricebook import PriceBook
from moeplace.planning.split import bubbles, busiest_experts, part_times, sides_of, split_bill, split_memory
from moeplace.planning.timing import (
    LayerParts,
    attention_us,
    dense_us,
    prefill_attention_us,
    time_parts,
)
from moeplace.planning.workload import Workload
from moeplace.problem import STEP_TIME, Problem, slots_for
from moeplace.solution import Limits
from moeplace.solvers import solve
from moeplace.tails import quantile
from moeplace.topology import Topology

ROOMY_GB = 1e6  # memory of a GPU while its placement is chosen: what fits is checked apart
BOUND_REQUESTS = 2048  # of a step, whose distinct experts are counted for its bound
US_PER_S, MS = 1e6, 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Demands:
    """What a deployment must keep to.

    Attributes
    ----------
    tpot_ms, ttft_ms
        Most time per output token, and to the first one, at ``percentile``; None where it does not matter.
    percentile
        Of the times of steps, in (0, 100).
    max_gpus, max_usd
        Most GPUs of an instance, and the most it may cost to buy.
    """

    tpot_ms: float | None = None
    ttft_ms: float | None = None
    percentile: float = 95.0
    max_gpus: int | None = None
    max_usd: float | None = None


def placement_key(deployment: Deployment) -> tuple[object, ...]:
    """What its placement depends on."""
    return deployment.kind, deployment.dims, deployment.redundant


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Judges deployments of one workload; keeps placements, and what depends on the size of a step alone.

    Attributes
    ----------
    workload, stats
        What is served, and the statistics that placements are fitted to.
    accelerators
        Name → accelerator.
    book, demands
        Prices and constraints.
    solver, work
        Who places experts on each topology, and its share of the usual work.
    stop
        Set to end what is under way.
    """

    workload: Workload
    stats: RoutingStats
    accelerators: Mapping[str, Accelerator]
    book: PriceBook
    demands: Demands = field(default_factory=Demands)
    solver: str = "balance+relabel"
    work: float = 0.2
    stop: threading.Event = field(default_factory=threading.Event)
    _placements: dict[tuple[object, ...], Placement] = field(default_factory=dict)
    _active: dict[tuple[int, int], Floats] = field(default_factory=dict)

    def topology(self, deployment: Deployment) -> Topology:
        """Return the network of its expert GPUs."""
        return deployment.topology(self.accelerators[deployment.accelerator])

    def _pair(self, deployment: Deployment) -> tuple[Accelerator, Accelerator]:
        """What attention and experts run on."""
        return self.accelerators[deployment.attention_accelerator], self.accelerators[deployment.accelerator]

    def attention_accelerator(self, deployment: Deployment) -> Accelerator:
        """What attention and dense layers run on."""
        if deployment.attention_gpus:
            return self.accelerators[deployment.attention_accelerator]
        return self.topology(deployment).accelerator

    def bill(self, deployment: Deployment) -> Bill:
        """Price it."""
        if deployment.attention_gpus:
            return split_bill(deployment, self._pair(deployment), self.book)
        return bill(self.topology(deployment), self.book)

    def placement(self, deployment: Deployment) -> Placement:
        """Experts placed for the shape of its topology, once for each number of slots."""
        key = placement_key(deployment)
        if key not in self._placements:
            topology = self.topology(deployment)
            roomy = topology.accelerator.replace(hbm_gb=ROOMY_GB)
            problem = Problem(
                stats=self.stats,
                model=self.workload.model,
                topology=topology.replace(accelerator=roomy),
                slots_per_gpu=slots_for(
                    self.workload.model.num_experts, topology.num_gpus, redundant=deployment.redundant
                ),
                law=BatchLaw(phase="decode", requests=deployment.step_requests),
                objective=STEP_TIME,
            )
            limits = Limits(work=self.work, seed=self.workload.seed, threads=1, stop=self.stop)
            answer = solve(problem, self.solver, limits).placement
            if answer is None:  # a method of the user's choice that finds none on this topology
                answer = solve(problem, "linear", limits).placement
            assert answer is not None
            self._placements[key] = answer
        return self._placements[key]

    def memory(self, deployment: Deployment) -> list[tuple[float, memory.Memory]]:
        """Usable GB of each kind of GPU, and what its fullest one must hold."""
        model, context = self.workload.model, self.workload.context
        experts = self.accelerators[deployment.accelerator].hbm_gb * memory.USABLE_SHARE
        if deployment.attention_gpus:
            attention = self.accelerators[deployment.attention_accelerator].hbm_gb * memory.USABLE_SHARE
            held = split_memory(deployment, model, context)
            return [(attention, held[0]), (experts, held[1])]
        slots = -(-(model.num_experts + deployment.redundant) // deployment.expert_gpus)
        tp, gpus = deployment.attention_tp, deployment.num_gpus
        return [(experts, memory.colocated(model, slots, gpus, tp, deployment.batch, context))]

    def screen(self, deployment: Deployment) -> Outcome:
        """Judge all that needs no timing: memory, GPUs, price."""
        priced, kinds = self.bill(deployment), self.memory(deployment)
        breaches = [
            Breach(constraint="memory", needed=held.total_gb, allowed=room, unit="GB")
            for room, held in kinds
            if held.total_gb > room
        ]
        most, total = self.demands, priced.total_usd
        if most.max_gpus is not None and deployment.num_gpus > most.max_gpus:
            gpus = float(deployment.num_gpus)
            breaches.append(Breach(constraint="--max-gpus", needed=gpus, allowed=most.max_gpus, unit="GPUs"))
        if most.max_usd is not None and total is not None and total > most.max_usd:
            breaches.append(Breach(constraint="--max-price", needed=total, allowed=most.max_usd, unit=self.book.unit))
        return Outcome(
            deployment=deployment,
            kind=UNTIMED,
            memory_gb={
                "experts": max(held.expert_gb for _, held in kinds),
                "other weights": max(held.other_gb for _, held in kinds),
                "KV cache": max(held.cache_gb for _, held in kinds),
            },
            usd=priced.usd,
            watts=priced.watts,
            usd_per_hour=priced.per_hour(self.book),
            breaches=tuple(breaches),
        )

    def bound(self, screened: Outcome) -> Outcome:
        """Bounds on its figures: no step can be faster than its attention, its average GPU's experts and its latencies.

        ``tokens_per_s`` is an upper bound and ``tpot_ms`` a lower one. Sound for every placement: a layer waits for its
        busiest GPU, which is no faster than the average one; overlap hides at most the shorter of computing and
        communicating.
        """
        deployment = screened.deployment
        if deployment.attention_gpus:
            return self._split_bound(screened)
        topology = self.topology(deployment)
        compute = ExpertCompute.of(self.workload.model, topology.accelerator, "decode")
        gpus, requests = deployment.expert_gpus, deployment.step_requests
        active = self._distinct(requests, gpus)
        top_k = self.workload.model.top_k
        memory_us = active * compute.weight_us / gpus + compute.shared_weight_us
        arithmetic_us = requests * top_k / gpus * compute.row_us + deployment.batch * compute.shared_row_us
        busy = (compute.launch_us + np.maximum(memory_us, arithmetic_us)).sum(axis=0)
        other = self._attention_us(deployment)
        compute_us = busy + len(active) * other
        waiting = 2 * len(active) * latency_us(topology, KERNEL_OF_PHASE["decode"])
        least = np.maximum(compute_us, waiting) if deployment.overlap == DUAL_BATCH else compute_us + waiting
        step_us = least * self.workload.layer_scale + self._dense_us(deployment)
        return self._with_times(screened, step_us, {})

    def _split_bound(self, screened: Outcome) -> Outcome:
        """Attention works on all micro-batches of all layers, one after another, whatever the experts do."""
        own, model, scale = screened.deployment, self.workload.model, self.workload.layer_scale
        one = self._sides(own).attention_us(own.batch * own.attention_tp / own.micro_batches)
        layers = model.num_moe_layers / scale
        step_us = np.array([own.micro_batches * layers * one * scale + self._dense_us(own)])
        return self._with_times(screened, step_us, {})

    def _sides(self, own: Deployment) -> Sides:
        return sides_of(own, self.workload.model, self._pair(own), self.workload.context)

    def _distinct(self, requests: int, gpus: int) -> Floats:
        """``[layer, step]`` distinct experts chosen by the first requests of each step of a size: at least as many."""
        known = min(requests, BOUND_REQUESTS)
        if (requests, gpus) not in self._active:
            steps = self.workload.decode_steps(requests, gpus)
            experts, rows = steps.trace.experts, steps.rows[:, :known]
            count = self.workload.model.num_experts
            batch = np.arange(len(rows))[:, None, None] * count
            found = [
                (np.bincount((batch + experts[:, layer][rows]).ravel(), minlength=len(rows) * count) > 0)
                .reshape(len(rows), count)
                .sum(axis=1)
                for layer in range(experts.shape[1])
            ]
            self._active[requests, gpus] = np.array(found, np.float64)
        return self._active[requests, gpus]

    def _attention_us(self, deployment: Deployment, batch: float | None = None) -> float:
        if self.workload.model.attention is None:
            return 0.0
        accelerator = self.attention_accelerator(deployment)
        tokens = deployment.batch if batch is None else batch
        return attention_us(self.workload.model, accelerator, tokens, self.workload.context, deployment.attention_tp)

    def _dense_us(self, deployment: Deployment) -> float:
        """Time of the layers without experts, which nothing overlaps with."""
        model = self.workload.model
        layers = model.num_layers - model.num_moe_layers
        accelerator = self.attention_accelerator(deployment)
        own = dense_us(model, accelerator, deployment.batch, deployment.attention_tp)
        return layers * (self._attention_us(deployment) + own)

    def time(self, screened: Sequence[Outcome]) -> list[Outcome]:
        """Time the deployments of a cell, already screened, on the same steps."""
        if not screened:
            return []
        first = screened[0].deployment
        if first.attention_gpus:
            return self._time_split(screened)
        places: dict[tuple[str, float], Topology] = {}
        for outcome in screened:
            own = outcome.deployment
            places.setdefault((own.accelerator, own.link_gb_per_s), self.topology(own))
        steps = self.workload.decode_steps(first.step_requests, first.expert_gpus)
        halves = any(outcome.deployment.overlap == DUAL_BATCH for outcome in screened)
        placement = self.placement(first)
        whole, cut = time_parts(
            steps, placement, tuple(places.values()), self.workload.model, halves=halves, stop=self.stop
        )
        number = {key: i for i, key in enumerate(places)}
        first_token = self._first_token(placement, tuple(places.values()))
        timed = []
        for outcome in screened:
            own = outcome.deployment
            i = number[own.accelerator, own.link_gb_per_s]
            parts = cut[i] if own.overlap == DUAL_BATCH else whole[i]
            judged = self._judge(outcome, parts, steps)
            timed.append(self._with_first_token(judged, first_token, i))
        return timed

    def _time_split(self, screened: Sequence[Outcome]) -> list[Outcome]:
        """The same for attention on GPUs of its own."""
        first = screened[0].deployment
        experts = {one.deployment.accelerator: self.accelerators[one.deployment.accelerator] for one in screened}
        steps = self.workload.decode_steps(first.step_requests, first.expert_gpus)
        busiest = busiest_experts(
            steps,
            self.placement(first),
            self.topology(first),
            self.workload.model,
            tuple(experts.values()),
            micro_batches=first.micro_batches,
            stop=self.stop,
        )
        timed = []
        for outcome in screened:
            own, scale = outcome.deployment, self.workload.layer_scale
            times = part_times(own, self._sides(own), busiest)
            dense = self._dense_us(own)
            step_us = step_times(times, PING_PONG) * scale + dense
            layers, count = times.compute.shape[0], times.compute.shape[2]
            shares = {
                "attention": layers * count * float(times.attention.mean()) * scale,
                "experts": float(times.compute.sum(axis=(0, 2)).mean()) * scale,
                "dispatch": float(times.dispatch.sum(axis=(0, 2)).mean()) * scale,
                "combine": float(times.combine.sum(axis=(0, 2)).mean()) * scale,
                "dense layers": dense,
            }
            shares["hidden"] = sum(shares.values()) - float(step_us.mean())
            judged = self._with_times(outcome, step_us, shares).replace(kind=TIMED, details=bubbles(times))
            timed.append(judged)
        return timed

    def _judge(self, outcome: Outcome, parts: LayerParts, steps: Steps) -> Outcome:
        deployment = outcome.deployment
        count = parts.compute.shape[2]
        one = self._attention_us(deployment, deployment.batch / count)
        attention = np.full(parts.compute.shape[1:], one)
        layers, scale = len(parts.compute), self.workload.layer_scale
        times = PartTimes(attention=attention, compute=parts.compute, dispatch=parts.dispatch, combine=parts.combine)
        dense = self._dense_us(deployment)
        step_us = step_times(times, deployment.overlap) * scale + dense
        shares = {
            "attention": layers * one * count * scale,
            "experts": float(parts.compute.sum(axis=(0, 2)).mean()) * scale,
            "dispatch": float(parts.dispatch.sum(axis=(0, 2)).mean()) * scale,
            "combine": float(parts.combine.sum(axis=(0, 2)).mean()) * scale,
            "dense layers": dense,
        }
        shares["hidden"] = sum(shares.values()) - float(step_us.mean())
        return self._with_times(outcome, step_us, shares).replace(kind=TIMED)

    def _with_times(self, outcome: Outcome, step_us: Floats, parts_us: Mapping[str, float]) -> Outcome:
        """Fill in what follows from the times of steps, and check the time per output token."""
        deployment = outcome.deployment
        mean_s = float(step_us.mean()) / US_PER_S
        slo = _quantile(step_us, self.demands.percentile / 100) / MS
        allowed = self.demands.tpot_ms
        breaches = outcome.breaches
        if allowed is not None and slo > allowed:
            late = Breach(constraint="--tpot", needed=slo, allowed=allowed, unit="ms", at_least=not parts_us)
            breaches = (*breaches, late)
        return outcome.replace(
            tpot_ms={"mean": mean_s * MS, "slo": slo, "p50": _quantile(step_us, 0.5) / MS},
            tokens_per_s=deployment.step_requests / mean_s,
            parts_us=dict(parts_us),
            breaches=breaches,
        )

    def _first_token(self, placement: Placement, places: Sequence[Topology]) -> tuple[LayerParts, ...]:
        """Prefill steps of one prompt on every GPU, where a time to the first token is asked for."""
        if self.demands.ttft_ms is None:
            return ()
        steps = self.workload.prefill_steps(places[0].num_gpus)
        return time_parts(steps, placement, places, self.workload.model, stop=self.stop)[0]

    def _with_first_token(self, outcome: Outcome, parts: tuple[LayerParts, ...], i: int) -> Outcome:
        allowed = self.demands.ttft_ms
        if allowed is None or not parts:
            return outcome
        deployment, model, work = outcome.deployment, self.workload.model, self.workload
        accelerator = self.topology(deployment).accelerator
        experts = (parts[i].compute + parts[i].dispatch + parts[i].combine).sum(axis=(0, 2)) * work.layer_scale
        attention = 0.0
        if model.attention is not None:
            attention = prefill_attention_us(model, accelerator, work.prompt, deployment.attention_tp)
        dense = dense_us(model, accelerator, work.prompt, deployment.attention_tp)
        step_us = experts + model.num_layers * attention + (model.num_layers - model.num_moe_layers) * dense
        first = _quantile(step_us, self.demands.percentile / 100) / MS
        breaches = outcome.breaches
        if first > allowed:
            breaches = (*breaches, Breach(constraint="--ttft", needed=first, allowed=allowed, unit="ms"))
        return outcome.replace(ttft_ms=first, breaches=breaches)


def _quantile(values: Floats, share: float) -> float:
    return quantile(np.sort(values), share).value
