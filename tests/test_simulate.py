"""Laws of :mod:`moeplace.simulate`: a slow evaluator written from the equations alone says the same."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_trace, random_placement, relabel_experts, relabel_placement, slow_topology, small_model

from moeplace.attention import AttentionTime
from moeplace.batches import BatchLaw, Steps, TokenIndex
from moeplace.compute import ExpertCompute
from moeplace.errors import ProblemError, UnknownNameError
from moeplace.execution import Execution
from moeplace.hardware import load_accelerator
from moeplace.model import ModelSpec, load_model
from moeplace.placement import EMPTY, Placement
from moeplace.problem import DATAFLOWS, slots_for
from moeplace.routing import POLICIES, Router
from moeplace.scoring import draw_steps
from moeplace.simulate import Simulation, counts_max_over_mean, simulate, simulate_counts
from moeplace.tails import noise_floor, summarise
from moeplace.topology import Topology, load_topology
from moeplace.trace import Counts, Trace

SLOTS = [3, 1, 2, 3]


class SlowStep:
    """One step in plain Python: rows, weights and tiles per rank, copies token by token, ports by name."""

    def __init__(self, topology: Topology, model: ModelSpec, phase: str) -> None:
        self.topology, self.model, self.phase = topology, model, phase
        self.nodes, self.per_node = topology.num_nodes, topology.num_gpus // topology.num_nodes

    def compute_us(self, rows: dict[tuple[int, int], float], home_rows: list[float]) -> float:
        """Busiest rank's experts; ``rows`` by (GPU, slot)."""
        gpu, model = self.topology.accelerator, self.model
        bandwidth = gpu.hbm_efficiency * gpu.hbm_tb_per_s * 1e12
        rate = gpu.gemm_efficiency * (gpu.fp8_tflops or 0 if model.weight_bytes == 1 else gpu.bf16_tflops) * 1e12
        tile = {"decode": 64, "prefill": 128}[self.phase]
        times = []
        for rank in range(self.topology.num_gpus):
            weights = 3 * model.hidden * model.shared_inner * model.weight_bytes
            flops = math.ceil(home_rows[rank] / tile) * tile * 6 * model.hidden * model.shared_inner
            for (where, _), count in rows.items():
                if where == rank and count > 0:
                    weights += 3 * model.hidden * model.expert_inner * model.weight_bytes
                    flops += math.ceil(count / tile) * tile * 6 * model.hidden * model.expert_inner
            speed = 1.0 if self.topology.gpu_speed is None else float(self.topology.gpu_speed[rank])
            times.append((20e-6 + max(weights / bandwidth, flops / rate)) / speed)
        return max(times) * 1e6

    def exchange_us(self, tokens: list[tuple[int, list[int]]], size: float, dedup: bool) -> float:
        """One direction of tokens (home, GPU of each selection)."""
        topology, busy = self.topology, defaultdict[tuple[str, int], float](float)
        latency = topology.normal_latency_us if dedup else topology.low_latency_us
        for home, targets in tokens:
            for target in sorted(set(targets)) if dedup else targets:
                inside = target // self.per_node == home // self.per_node
                if dedup and self.nodes > 1:
                    # by the rail's GPU in the target's node, home's own node included
                    proxy = target // self.per_node * self.per_node + home % self.per_node
                    if self.per_node > 1:
                        busy["local out", proxy] += size / topology.local_gb_per_s
                        busy["local in", target] += size / topology.local_gb_per_s
                elif target != home:
                    speed = topology.local_gb_per_s if inside else topology.nic_gb_per_s
                    busy["local out" if inside else "nic out", home] += size / speed
                    busy["local in" if inside else "nic in", target] += size / speed
            if dedup and self.nodes > 1:
                for node in {target // self.per_node for target in targets} - {home // self.per_node}:
                    busy["nic out", home] += size / topology.nic_gb_per_s
                    busy["nic in", node * self.per_node + home % self.per_node] += size / topology.nic_gb_per_s
        return (latency if topology.num_gpus > 1 else 0) + max(busy.values(), default=0.0) / 1e3

    def step_us(self, served: list[list[list[tuple[int, int]]]], homes: list[int], chain: bool) -> float:
        """Time of a step; ``served[token][layer]`` are the (GPU, slot) of its selections."""
        total, home_rows = 0.0, [float(homes.count(rank)) for rank in range(self.topology.num_gpus)]
        for layer in range(len(served[0])):
            total += self.compute_us(Counter(place for token in served for place in token[layer]), home_rows)
            places = [[gpu for gpu, _ in token[layer]] for token in served]
            if not chain:
                dedup, tokens = self.phase == "prefill", list(zip(homes, places, strict=True))
                total += self.exchange_us(tokens, self.model.bytes_per_copy_dispatch, dedup)
                total += self.exchange_us(tokens, self.model.bytes_per_copy_combine, dedup)
            elif layer + 1 < len(served[0]):
                after = [[gpu for gpu, _ in token[layer + 1]] for token in served]
                moves = [(gpu, later) for here, later in zip(places, after, strict=True) for gpu in here]
                total += self.exchange_us(moves, self.model.bytes_per_copy_dispatch, dedup=False)
        return total


def slow_steps(steps: Steps, router: Router, slow: SlowStep, chain: bool) -> list[float]:
    """Step times in plain Python; which copy serves a token is asked of the router, one choice at a time."""
    trace, gpus, turns = steps.trace, slow.topology.num_gpus, steps.law.turns().tolist()
    times = []
    for batch in steps.rows.tolist():
        served, homes = [], []
        for turn, row in zip(turns, batch, strict=True):
            home = turn % gpus if trace.rank is None else int(trace.rank[row])
            token = []
            for layer, chosen in enumerate(trace.experts[row].tolist()):
                slots = router.choose(layer, np.array([chosen]), np.array([row]), np.array([home]))[0].tolist()
                token.append([divmod(slot, router.table.slots_per_gpu) for slot in slots])
            homes.append(home)
            served.append(token)
        times.append(slow.step_us(served, homes, chain))
    return times


def _steps(trace: Trace, phase: str = "decode", **law: int) -> Steps:
    drawn = BatchLaw(phase=phase, **({"requests": 4, "tokens": 2, "batches": 3} | law))
    return draw_steps(trace, TokenIndex.of(trace), drawn)


@given(
    st.integers(0, 10**6),
    st.sampled_from(DATAFLOWS),
    st.sampled_from(["decode", "prefill"]),
    st.sampled_from(["scale-up:4", "scale-out:2x2", "scale-out:4x1", "scale-out:1x4"]),
    st.sampled_from([policy for policy in POLICIES if policy != "lp"]),
    st.booleans(),
)
def test_steps_equal_a_plain_evaluator(
    seed: int, dataflow: str, phase: str, spec: str, policy: str, ranks: bool
) -> None:
    """Every step of random cases, with copies and empty slots, takes what the equations say, token by token."""
    rng = np.random.default_rng(seed)
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(4, 8))
    shape = {"tokens": 90, "layers": layers, "experts": experts, "top_k": int(rng.integers(1, 4)), "requests": 6}
    trace = make_trace(seed, **shape, prompt=6, ranks=4 if ranks else None)
    speed = rng.uniform(0.5, 2, 4) if ranks else None
    topology = slow_topology(spec, local_gb_per_s=0.5, nic_gb_per_s=0.2, gpu_speed=speed)
    model = small_model(layers, experts, shape["top_k"], weight_bytes=float(rng.choice([0.01, 1, 2])))
    placement = random_placement(seed, SLOTS, layers, experts)
    steps = _steps(trace, phase)
    profile = rng.integers(1, 9, (layers, experts))
    router = Router.of(placement, topology, policy, profile)
    expected = slow_steps(steps, router, SlowStep(topology, model, phase), dataflow == "context-coherent")
    how = Execution(dataflow=dataflow, routing=policy)
    found = simulate(steps, placement, topology, model, how, profile=profile)
    assert found.step_us.tolist() == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 10**6), st.sampled_from(["decode", "prefill"]))
def test_counted_steps_equal_a_plain_evaluator(seed: int, phase: str) -> None:
    """Recorded counts: copies share rows evenly, homes are even, one copy per selection in either phase."""
    rng = np.random.default_rng(seed)
    trace = make_trace(seed, layers=2, experts=5)
    counts = Counts(meta=trace.meta, counts=rng.integers(0, 200, (3, 2, 5)))
    placement, topology = random_placement(seed, SLOTS, 2, 5), slow_topology("scale-out:2x2")
    model = small_model(2, 5, 2, weight_bytes=float(rng.choice([0.01, 1])))
    slow = SlowStep(topology, model, phase)
    found = simulate_counts(counts, placement, topology, model, phase=phase)
    assert (counts_max_over_mean(counts, placement) == found.step_max_over_mean).all()
    for step in range(3):
        total = 0.0
        for layer in range(2):
            held = Counter(placement.slots[layer][placement.slots[layer] != EMPTY].tolist())
            rows: dict[tuple[int, int], float] = {}
            for (gpu, slot), expert in np.ndenumerate(placement.slots[layer]):
                if expert != EMPTY:
                    rows[gpu, slot] = counts.counts[step, layer, expert] / held[int(expert)]
            tokens = counts.counts[step, layer].sum() / 2
            total += slow.compute_us(rows, [tokens / 4] * 4)
            received = [sum(n for (gpu, _), n in rows.items() if gpu == rank) for rank in range(4)]
            inward = max(max(n / 4 * 2 / topology.nic_gb_per_s, n / 4 / topology.local_gb_per_s) for n in received)
            for size in (model.bytes_per_copy_dispatch, model.bytes_per_copy_combine):
                outward = [
                    max(
                        sum(received[g] for g in range(4) if g // 2 != rank // 2) / 4 / topology.nic_gb_per_s,
                        sum(received[g] for g in range(4) if g // 2 == rank // 2 and g != rank)
                        / 4
                        / topology.local_gb_per_s,
                    )
                    for rank in range(4)
                ]
                total += 2.0 + max(inward, *outward) * size / 1e3
        assert found.step_us[step] == pytest.approx(total)


@pytest.fixture(scope="module")
def run() -> Simulation:
    """A simulation of 20 steps on 2×2 with a hot network."""
    trace = make_trace(0, tokens=200, requests=12)
    steps = _steps(trace, requests=8, tokens=1, batches=20)
    topology = slow_topology("scale-out:2x2", nic_gb_per_s=0.05)
    return simulate(steps, random_placement(0, SLOTS, 2, 6), topology, small_model())


def test_reports_agree_with_the_steps(run: Simulation) -> None:
    """Layer means add up to the mean step; quantiles are of whole steps; ports and bottlenecks are shares."""
    layers = sum(row.compute_us + row.dispatch_us + row.combine_us for row in run.layers)
    assert layers == pytest.approx(run.summary["mean"].value)
    assert run.summary == summarise(run.step_us)
    assert all(busy.min() >= 0 and busy.max() <= 1 for busy in run.links.values())
    assert sum(share for _, share in run.bottlenecks) == pytest.approx(1)
    shares = [share for _, share in run.bottlenecks]
    assert shares == sorted(shares, reverse=True)
    assert run.bottlenecks[0][0].startswith("NIC")
    assert run.noise_floor == noise_floor(4, 8 * 2 / 4)
    for row in run.layers:
        assert 1 <= row.max_over_mean <= 4
        assert 0.25 <= row.balancedness <= 1
        assert row.balancedness >= 1 / row.max_over_mean - 1e-12


def test_layer_rows_and_bottlenecks_by_hand() -> None:
    """Two recorded steps, one even and one on a single GPU: means of max/mean and of mean/max, and the busiest port."""
    trace = make_trace(0, layers=1, experts=2, top_k=1)
    counts = Counts(meta=trace.meta, counts=[[[50, 50]], [[100, 0]]])
    placement = Placement(slots=np.array([[[0], [1]]]), num_experts=2)
    found = simulate_counts(counts, placement, slow_topology("scale-up:2"), small_model(1, 2, 1), phase="decode")
    row = found.layers[0]
    assert (row.max_over_mean, row.balancedness) == (1.5, 0.75)
    assert found.bottlenecks == (("scale-up out of GPU 0", 0.75), ("scale-up out of GPU 1", 0.25))
    only_in = Counts(meta=trace.meta, counts=[[[0, 90]]])
    wide = slow_topology("scale-up:3")
    placement = Placement(slots=np.array([[[0], [1], [-1]]]), num_experts=2)
    found = simulate_counts(only_in, placement, wide, small_model(1, 2, 1), phase="decode")
    assert found.bottlenecks == (("scale-up in of GPU 1", 0.5), ("scale-up out of GPU 1", 0.5))
    times = [
        2 + 60 * size / 4000 for size in (small_model().bytes_per_copy_dispatch, small_model().bytes_per_copy_combine)
    ]
    assert [found.layers[0].dispatch_us, found.layers[0].combine_us] == pytest.approx(times)
    assert found.links["scale-up in"][1] == pytest.approx((times[0] - 2) / sum(times))
    assert found.links["scale-up out"][1] == pytest.approx((times[1] - 2) / sum(times))


def test_a_quiet_network_is_bound_by_latency() -> None:
    """Where every selection stays at home the bottleneck is the latency, not a GPU."""
    trace = make_trace(0, tokens=20, layers=1, experts=2, top_k=1, ranks=1)
    placement = Placement(slots=np.array([[[0, 1], [-1, -1]]]), num_experts=2)
    found = simulate(_steps(trace, requests=1), placement, slow_topology("scale-up:2"), small_model(1, 2, 1))
    assert found.bottlenecks == (("latency", 1.0),)


@given(st.integers(0, 999), st.sampled_from(DATAFLOWS), st.sampled_from(["decode", "prefill"]))
def test_renaming_experts_changes_no_step(seed: int, dataflow: str, phase: str) -> None:
    """Experts renamed in trace and placement alike leave the time of every step as it was."""
    trace = make_trace(seed, tokens=90, prompt=6)
    order = np.random.default_rng(seed).permutation(6)
    placement = random_placement(seed, SLOTS, 2, 6)
    pairs = ((trace, placement), (relabel_experts(trace, order), relabel_placement(placement, order)))
    how = Execution(dataflow=dataflow)
    one, other = (
        simulate(_steps(t, phase, requests=3), p, slow_topology("scale-out:2x2"), small_model(), how) for t, p in pairs
    )
    assert other.step_us == pytest.approx(one.step_us)


def test_a_layer_without_tokens_is_balanced() -> None:
    """A recorded step in which no token reached a layer counts as balanced, not as a division by zero."""
    trace = make_trace(0, layers=2, experts=4)
    counts = Counts(meta=trace.meta, counts=[[[4, 4, 4, 4], [0, 0, 0, 0]], [[9, 1, 1, 1], [4, 4, 4, 4]]])
    placement = random_placement(0, [2, 2], 2, 4)
    found = simulate_counts(counts, placement, slow_topology("scale-up:2"), small_model(2, 4, 2), phase="decode")
    assert np.isfinite(found.step_us).all()
    assert found.layers[1].max_over_mean == found.layers[1].balancedness == 1.0


@pytest.mark.parametrize(
    ("placement", "spec", "words"),
    [
        (random_placement(0, [6], 1, 6), "scale-up:1", "1 layers"),
        (random_placement(0, [7], 2, 7), "scale-up:1", "7 experts"),
        (random_placement(0, [6], 2, 6), "scale-up:2", "1 GPUs"),
    ],
)
def test_shapes_must_agree(small_trace: Trace, placement: Placement, spec: str, words: str) -> None:
    """A placement for another trace or topology is refused, and so is an unknown dataflow."""
    with pytest.raises(ProblemError, match=words):
        simulate(_steps(small_trace), placement, load_topology(spec), small_model())


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"dataflow": "x"}, ProblemError, "dataflow"),
        ({"routing": "evn"}, UnknownNameError, "even"),
        ({"homes": "here"}, UnknownNameError, "recorded"),
        ({"overlap": "ping"}, UnknownNameError, "ping-pong"),
        ({"overlap": "dual-batch", "micro_batches": 3}, ProblemError, "dual-batch has 2"),
        ({"dataflow": "context-coherent", "overlap": "dual-batch"}, ProblemError, "dispatch-combine"),
        ({"dataflow": "context-coherent", "routing": "lp"}, ProblemError, "dispatch-combine"),
    ],
)
def test_bad_executions_are_refused(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    """Unknown names and combinations without a meaning are refused with what there is."""
    with pytest.raises(error, match=words):
        Execution(**fields)


def test_one_gpu_and_one_step(small_trace: Trace) -> None:
    """On one GPU a step is its compute alone; a single batch has point intervals for its mean."""
    steps, placement = _steps(small_trace, batches=1), random_placement(0, [6], 2, 6)
    found = simulate(steps, placement, slow_topology("scale-up:1"), small_model())
    assert found.step_us[0] == pytest.approx(sum(row.compute_us for row in found.layers))
    assert found.summary["mean"].low == found.summary["mean"].high == found.summary["p99"].value
    assert found.noise_floor == 1.0


def test_layer_tails_and_mean_matrices_mislead() -> None:
    """A step's p99 is not the sum of its layers' p99s; the busiest GPU of the mean is below the mean busiest."""
    trace = make_trace(1, tokens=400, layers=4, requests=40)
    steps = _steps(trace, requests=16, tokens=1, batches=200)
    placement, model = random_placement(1, [2, 2, 2], 4, 6), small_model(4)
    topology = slow_topology("scale-up:3", local_gb_per_s=0.2)
    whole = simulate(steps, placement, topology, model)
    alone: list[Any] = []
    for layer in range(4):
        part = steps.trace.replace(
            meta=steps.trace.meta.replace(layer_ids=(layer,)), experts=steps.trace.experts[:, [layer]]
        )
        single = Steps(trace=part, rows=steps.rows, law=steps.law)
        alone.append(simulate(single, placement.replace(slots=placement.slots[[layer]]), topology, model))
    assert np.sum([run.step_us for run in alone], axis=0) == pytest.approx(whole.step_us)
    assert sum(run.summary["p99"].value for run in alone) > whole.summary["p99"].value * 1.01
    load = [np.bincount(trace.experts[row, 0].ravel(), minlength=6) for row in range(400)]
    batches = np.array(load)[:384].reshape(24, 16, 6).sum(axis=1)
    per_gpu = np.array([placement.gpu_load(np.tile(batch, (4, 1)))[0] for batch in batches])
    assert per_gpu.mean(axis=0).max() < per_gpu.max(axis=1).mean()


def test_more_copies_may_slow_decode() -> None:
    """16 tokens of a DeepSeek-V3-wide model: a copy of every expert on both GPUs costs more weights than it saves."""
    trace = make_trace(2, tokens=100, layers=1, experts=8, requests=30)
    steps, model = _steps(trace, requests=16, tokens=1, batches=40), load_model("deepseek-v3")
    topology = load_topology("scale-up:2", accelerator="h100")
    apart = Placement(slots=np.arange(8).reshape(1, 2, 4), num_experts=8)
    everywhere = Placement(slots=np.tile(np.arange(8), (1, 2, 1)), num_experts=8)
    narrow = model.replace(num_experts=8, top_k=2, num_groups=1, groups_per_token=1)
    times = [
        np.mean([row.compute_us for row in simulate(steps, placement, topology, narrow).layers])
        for placement in (apart, everywhere)
    ]
    assert times[1] > times[0]
    assert ExpertCompute.of(narrow, load_accelerator("h100"), "decode").weight_us > 10
    assert slots_for(8, 2, redundant=8).tolist() == [8, 8]


def test_attention_counts_every_ranks_own_tokens() -> None:
    """Attention of a step is its busiest rank's in every layer: weights, its requests' caches, its tokens' products."""
    trace = make_trace(3, tokens=300, layers=2, experts=8, top_k=2, requests=12, prompt=9)
    model = load_model("qwen3-30b-a3b").replace(num_experts=8, top_k=2)
    topology = load_topology("scale-up:2")
    steps, placement = _steps(trace, "prefill", requests=3, tokens=4), random_placement(0, [4, 4], 2, 8)
    without = simulate(steps, placement, topology, model)
    found = simulate(steps, placement, topology, model, Execution(with_attention=True))
    time, gpu = AttentionTime.of(model, topology.accelerator), topology.accelerator
    assert gpu.name == "h100"
    for step in range(3):
        tokens, context, cached = np.zeros(2), np.zeros(2), np.zeros(2)
        for turn in range(3):
            positions = steps.trace.position[steps.rows[step, 4 * turn : 4 * turn + 4]]
            tokens[turn % 2] += 4
            context[turn % 2] += (positions + 1).sum()
            cached[turn % 2] += positions.max() + 1
        expected = 2 * time.rank_us(tokens, context, cached).max()
        assert found.step_us[step] - without.step_us[step] == pytest.approx(expected)
    assert found.attention_us == pytest.approx(found.summary["mean"].value - without.summary["mean"].value)
    assert without.attention_us == 0


@pytest.mark.parametrize("overlap", ["dual-batch", "ping-pong"])
def test_overlap_is_that_of_its_micro_batches(overlap: str) -> None:
    """A step's micro-batches are timed apart, as steps of their own, and put together by the overlap's rule."""
    trace = make_trace(4, tokens=400, requests=30, prompt=0)
    model, topology = load_model("mixtral-8x7b").replace(num_experts=6), load_topology("scale-out:2x2")
    placement = random_placement(0, SLOTS, 2, 6)
    law = BatchLaw(phase="decode", requests=24, batches=5)
    steps, how = draw_steps(trace, TokenIndex.of(trace), law), Execution(overlap=overlap, with_attention=True)
    found = simulate(steps, placement, topology, model, how)
    parts = how.parts
    turn = np.arange(24)
    alone = []
    for part in range(parts):
        mine = np.flatnonzero(turn // 4 % parts == part)
        own = Steps(trace=steps.trace, rows=steps.rows[:, mine], law=law.replace(requests=len(mine)))
        alone.append(simulate(own, placement, topology, model, Execution(with_attention=True)))
    serial = np.sum([run.step_us for run in alone], axis=0)
    assert (found.step_us <= serial + 1e-9).all()
    if overlap == "dual-batch":
        moving = sum(sum(row.dispatch_us + row.combine_us for row in run.layers) for run in alone)
        working = sum(run.attention_us + sum(row.compute_us for row in run.layers) for run in alone)
        assert found.summary["mean"].value >= max(moving, working) - 1e-9
        assert found.summary["mean"].value <= serial.mean()
    for name in ("compute_us", "dispatch_us", "combine_us"):
        whole = sum(getattr(row, name) for row in found.layers)
        assert whole == pytest.approx(sum(sum(getattr(row, name) for row in run.layers) for run in alone))


def test_mixed_steps_use_the_kernels_of_prompts() -> None:
    """A mixed step is timed with normal kernels and tall tiles, over the tokens of both phases."""
    trace = make_trace(5, tokens=400, requests=30, prompt=6)
    index = TokenIndex.of(trace)
    law = BatchLaw(phase="mixed", requests=6, prefill_requests=3, prefill_tokens=4, batches=4)
    topology, placement = slow_topology("scale-out:2x2"), random_placement(0, SLOTS, 2, 6)
    steps = draw_steps(trace, index, law)
    found = simulate(steps, placement, topology, small_model())
    turns = law.turns().tolist()
    router = Router.of(placement, topology)
    slow = SlowStep(topology, small_model(), "prefill")
    for batch, step_us in zip(steps.rows.tolist(), found.step_us.tolist(), strict=True):
        served, homes = [], [turn % 4 for turn in turns]
        for home, row in zip(homes, batch, strict=True):
            where = (np.array([row]), np.array([home]))
            slots = [
                router.choose(layer, trace_ids[None], *where)[0]
                for layer, trace_ids in enumerate(steps.trace.experts[row])
            ]
            served.append([[divmod(slot, router.table.slots_per_gpu) for slot in layer.tolist()] for layer in slots])
        assert step_us == pytest.approx(slow.step_us(served, homes, chain=False))
