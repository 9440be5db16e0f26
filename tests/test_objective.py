"""Laws of :mod:`moeplace.objective`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import poisson
from strategies import (
    make_problem,
    make_trace,
    random_placement,
    relabel_experts,
    relabel_placement,
    slow_topology,
    small_model,
)

from moeplace.affinity import count_routing
from moeplace.batches import BatchLaw, TokenIndex
from moeplace.compute import ExpertCompute
from moeplace.metrics import cross_shares, token_metrics
from moeplace.objective import UNITS, mean_step_times, objective_value, terms
from moeplace.placement import Placement
from moeplace.problem import DATAFLOWS, OBJECTIVES, Problem
from moeplace.scoring import draw_steps
from moeplace.simulate import simulate
from moeplace.topology import load_topology
from moeplace.trace import Counts, Trace, TraceMeta
from moeplace.traffic import home_ranks

TWO_BY_TWO = slow_topology("scale-out:2x2")


def _problem(seed: int, **options: object) -> Problem:
    options.setdefault("slots_per_gpu", [2, 2, 3, 1])
    return make_problem(make_trace(seed, tokens=80), TWO_BY_TWO, **options)


@pytest.mark.parametrize(("weight_bytes", "bound_by"), [(1.0, "memory"), (0.01, "arithmetic")])
def test_decode_by_hand(weight_bytes: float, bound_by: str) -> None:
    """Every µs of a two-GPU step, written out: Poisson weights and tiles, copies to the other GPU, two latencies."""
    meta = TraceMeta(num_experts=2, top_k=1, layer_ids=(0,))
    trace = Trace(
        meta=meta, experts=[[[0]], [[0]], [[0]], [[1]]], request=[0, 1, 2, 3], position=[0] * 4, phase=[1] * 4
    )
    model, topology = small_model(1, 2, 1, weight_bytes=weight_bytes), slow_topology("scale-up:2")
    problem = make_problem(trace, topology, requests=160, model=model)
    placement = Placement(slots=np.array([[[0], [1]]]), num_experts=2)
    cost = ExpertCompute.of(model, topology.accelerator, "decode")
    rows = np.arange(400)
    tiles = float((poisson.pmf(rows, 120) * np.ceil(rows / 64)).sum())
    # each GPU is home to 80 tokens: two tiles of its shared experts
    memory = cost.weight_us + cost.shared_weight_us
    arithmetic = tiles * 64 * cost.row_us + 2 * 64 * cost.shared_row_us
    assert (memory > arithmetic) == (bound_by == "memory")
    times = mean_step_times(problem, placement)
    assert times.compute[0] == pytest.approx(20 + max(memory, arithmetic), rel=1e-6)
    # GPU 0 gets 120 of 160 tokens, half of them from GPU 1; 4 GB/s are 4000 bytes/µs
    assert times.dispatch[0] == pytest.approx(2 + 60 * model.bytes_per_copy_dispatch / 4000)
    assert times.combine[0] == pytest.approx(2 + 60 * model.bytes_per_copy_combine / 4000)
    assert objective_value(problem, placement) == pytest.approx(times.total)


@given(
    st.integers(0, 999),
    st.sampled_from(["scale-up:4", "scale-out:2x2"]),
    st.sampled_from(DATAFLOWS),
    st.sampled_from([0.01, 1.0]),
    st.booleans(),
)
def test_decode_equals_a_plain_loop(seed: int, spec: str, dataflow: str, weight_bytes: float, ranks: bool) -> None:
    """Mean steps with copies, empty slots and recorded homes, added up copy by copy and token by token."""
    trace = make_trace(seed, tokens=40, layers=2, experts=5, ranks=4 if ranks else None)
    topology, model = slow_topology(spec), small_model(2, 5, 2, weight_bytes=weight_bytes)
    slots, step = [3, 1, 2, 3], 500
    problem = make_problem(trace, topology, slots_per_gpu=slots, requests=step, model=model, dataflow=dataflow)
    placement = random_placement(seed, slots, 2, 5)
    cost = ExpertCompute.of(model, topology.accelerator, "decode")
    where = [{e: [g for g, held in enumerate(layer) if e in held] for e in range(5)} for layer in placement.to_lists()]
    compute_us, sends = [], np.zeros((2, 4, 4))
    for layer in range(2):
        memory, arithmetic = np.zeros(4), np.zeros(4)
        for expert, homes in where[layer].items():
            mean = sum(expert in token for token in trace.experts[:, layer].tolist()) * step / 40 / len(homes)
            n = np.arange(1500)
            for gpu in homes:
                memory[gpu] += (1 - np.exp(-mean)) * cost.weight_us
                arithmetic[gpu] += float((poisson.pmf(n, mean) * np.ceil(n / 64)).sum()) * 64 * cost.row_us
        shared = np.ceil(step / 4 / 64) * 64 * cost.shared_row_us
        compute_us.append(20 + max((memory + cost.shared_weight_us).max(), (arithmetic + shared).max()))
        for token in range(40):
            for expert in trace.experts[token, layer].tolist():
                if dataflow == "context-coherent":
                    following = [] if layer else trace.experts[token, 1].tolist()
                    pairs = [(a, b) for f in following for a in where[0][expert] for b in where[1][f]]
                    weights = [
                        1 / (len(where[0][expert]) * len(where[1][f]))
                        for f in following
                        for _ in where[0][expert]
                        for _ in where[1][f]
                    ]
                else:
                    sources = range(4) if trace.rank is None else [int(trace.rank[token])]
                    pairs = [(a, b) for a in sources for b in where[layer][expert]]
                    weights = [1 / len(pairs)] * len(pairs)
                for (source, target), weight in zip(pairs, weights, strict=True):
                    sends[layer, source, target] += weight * step / 40
    moves_us = []
    for layer in range(1 if dataflow == "context-coherent" else 2):
        apart = np.arange(4)[:, None] // topology.gpus_per_node != np.arange(4)[None, :] // topology.gpus_per_node
        within = ~apart & ~np.eye(4, dtype=bool)
        nic, local = sends[layer] * apart, sends[layer] * within / 4.0
        moves_us.append(max(t.sum(axis=axis).max() for t in (nic, local) for axis in (0, 1)) * 1e-3)
    times = mean_step_times(problem, placement)
    assert times.compute.tolist() == pytest.approx(compute_us, rel=2e-3)
    assert times.dispatch.tolist() == pytest.approx([2 + t * model.bytes_per_copy_dispatch for t in moves_us])
    expected = [0.0] if dataflow == "context-coherent" else [2 + t * model.bytes_per_copy_combine for t in moves_us]
    assert times.combine.tolist() == pytest.approx(expected)


@given(st.integers(0, 99), st.sampled_from(DATAFLOWS), st.sampled_from(["decode", "prefill"]))
def test_renaming_experts_changes_nothing(seed: int, dataflow: str, phase: str) -> None:
    """Experts renamed in trace and placement alike leave every objective and term as it was."""
    trace = make_trace(seed, tokens=60)
    order = np.random.default_rng(seed).permutation(6)
    placement = random_placement(seed, [2, 2, 3, 1], 2, 6)
    problems = [
        make_problem(t, TWO_BY_TWO, slots_per_gpu=[2, 2, 3, 1], dataflow=dataflow, phase=phase)
        for t in (trace, relabel_experts(trace, order))
    ]
    renamed = relabel_placement(placement, order)
    for objective in OBJECTIVES:
        one, other = (problem.replace(objective=objective) for problem in problems)
        assert objective_value(other, renamed) == pytest.approx(objective_value(one, placement))
    one_terms, other_terms = terms(problems[0], placement), terms(problems[1], renamed)
    assert {name: term.value for name, term in other_terms.items()} == pytest.approx(
        {name: term.value for name, term in one_terms.items()}
    )


@given(st.integers(0, 99), st.sampled_from(DATAFLOWS), st.sampled_from(OBJECTIVES))
def test_relabelling_gpus_changes_nothing(seed: int, dataflow: str, objective: str) -> None:
    """GPUs renumbered inside nodes, and nodes among themselves, cost the same in decode steps with even homes.

    Objectives that sample which copy serves a token are compared without copies: the choice follows the slot order.
    """
    rng = np.random.default_rng(seed)
    spare = objective != "copies"
    slots = [2, 2, 3, 1] if spare else [2, 1, 2, 1]
    problem = _problem(seed, dataflow=dataflow, objective=objective, slots_per_gpu=slots)
    placement = random_placement(seed, slots, 2, 6)
    order = np.concatenate([node * 2 + rng.permutation(2) for node in rng.permutation(2)])
    moved = placement.permute_gpus(order)
    assert objective_value(problem, moved) == pytest.approx(objective_value(problem, placement))


@given(st.integers(0, 99))
def test_prefill_traffic_is_what_the_sample_sends(seed: int) -> None:
    """Prefill steps cost the sample's copies, scaled to the step: twice the tokens take twice the bytes."""
    free = TWO_BY_TWO.replace(normal_latency_us=0)
    problem = make_problem(make_trace(seed, tokens=50), free, slots_per_gpu=[2, 2, 3, 1], phase="prefill", requests=50)
    placement = random_placement(seed, [2, 2, 3, 1], 2, 6)
    once = mean_step_times(problem, placement)
    twice = mean_step_times(problem.replace(law=problem.law.replace(requests=100)), placement)
    assert twice.dispatch == pytest.approx(2 * once.dispatch)
    assert twice.combine == pytest.approx(2 * once.combine)
    assert (once.dispatch > 0).all()


def test_natural_objectives_are_the_metrics() -> None:
    """load, copies and cross are the metrics of the same name; units are stated for every objective."""
    problem = _problem(3)
    placement = random_placement(3, [2, 2, 3, 1], 2, 6)
    stats, place = problem.stats, problem.topology
    assert stats.sample is not None
    copies = token_metrics(stats.sample, placement, place)
    expected = {
        "load": (placement.gpu_load(stats.load).max(axis=1) / placement.gpu_load(stats.load).mean(axis=1)).mean(),
        "copies": copies[0],
        "cross": cross_shares(stats, placement, place)[0],  # type: ignore[index]
    }
    for name, value in expected.items():
        assert objective_value(problem.replace(objective=name), placement) == pytest.approx(value)
    assert objective_value(problem.replace(objective="copies", copies_level="node"), placement) == copies[1]
    assert set(UNITS) == set(OBJECTIVES)


def test_terms_add_up() -> None:
    """The µs terms of a placement add up to its step time, on direct networks too."""
    problem, placement = _problem(4), random_placement(4, [2, 2, 3, 1], 2, 6)
    for place in (problem, problem.replace(topology=load_topology("torus:2x2"))):
        parts = terms(place, placement)
        timed = sum(parts[name].value for name in ("compute_us", "dispatch_us", "combine_us"))
        assert timed == pytest.approx(objective_value(place, placement))
        assert all(term.unit for term in parts.values())


def test_recorded_homes_count() -> None:
    """Tokens whose experts sit on their recorded home send nothing; from the other home they send everything."""
    meta = TraceMeta(num_experts=2, top_k=1, layer_ids=(0,))
    experts = np.array([0, 1] * 10).reshape(20, 1, 1)
    fields = {"request": np.arange(20), "position": np.zeros(20), "phase": np.ones(20)}
    placement = Placement(slots=np.array([[[0], [1]]]), num_experts=2)
    found = []
    for rank in (experts[:, 0, 0], 1 - experts[:, 0, 0]):
        trace = Trace(meta=meta, experts=experts, rank=rank, **fields)
        problem = make_problem(trace, slow_topology("scale-up:2"), requests=10, model=small_model(1, 2, 1))
        found.append(float(mean_step_times(problem, placement).dispatch[0]))
    assert found[0] == 2.0
    assert found[1] == pytest.approx(2.0 + 5 * small_model().bytes_per_copy_dispatch / 4000)


def test_the_way_back_may_be_faster() -> None:
    """On a custom network out and back have speeds of their own: half a GB/s to the expert, four back."""
    meta = TraceMeta(num_experts=2, top_k=1, layer_ids=(0,))
    ones = np.ones(10, np.int64)
    trace = Trace(meta=meta, experts=ones.reshape(10, 1, 1), request=ones, position=ones, phase=ones, rank=ones - 1)
    pairs = np.array([[0, 0.5], [4, 0]])
    topology = slow_topology("scale-up:2").replace(kind="custom", pair_gb_per_s=pairs)
    model = small_model(1, 2, 1)
    problem = make_problem(trace, topology, requests=10, model=model)
    times = mean_step_times(problem, Placement(slots=np.array([[[0], [1]]]), num_experts=2))
    assert times.dispatch[0] == pytest.approx(2 + 10 * model.bytes_per_copy_dispatch / 500)
    assert times.combine[0] == pytest.approx(2 + 10 * model.bytes_per_copy_combine / 4000)


def test_homes_are_dealt_where_ranks_do_not_fit() -> None:
    """Recorded homes are used if every one exists; otherwise requests are dealt in turn."""
    turn = np.arange(5)
    assert home_ranks(np.array([1, 0, 1, 1, 0]), turn, 2).tolist() == [1, 0, 1, 1, 0]
    for recorded in (None, np.array([0, 2, 0, 0, 0]), np.array([0, -1, 0, 0, 0])):
        assert home_ranks(recorded, turn, 2).tolist() == [0, 1, 0, 1, 0]


def test_counts_over_estimate_prefill() -> None:
    """On counts each selection is one copy, so the step costs at least what it costs with tokens."""
    trace = make_trace(5, tokens=80)
    problem = make_problem(trace, slow_topology("scale-up:2", normal_latency_us=2), phase="prefill", requests=80)
    counts = count_routing(Counts(meta=trace.meta, counts=problem.stats.load[None]))
    placement = random_placement(5, [3, 3], 2, 6)
    with_tokens, without = (mean_step_times(p, placement) for p in (problem, problem.replace(stats=counts)))
    assert (without.dispatch >= with_tokens.dispatch * 0.9).all()
    assert without.compute == pytest.approx(with_tokens.compute)


@pytest.mark.parametrize(("dataflow", "phase"), list(itertools.product(DATAFLOWS, ["decode", "prefill"])))
@pytest.mark.parametrize("shape", [(1, 1, 1, [1]), (1, 3, 3, [3, 0]), (2, 2, 2, [1, 1]), (3, 4, 1, [2, 4, 0])])
def test_edge_shapes(dataflow: str, phase: str, shape: tuple[int, int, int, list[int]]) -> None:
    """One layer, one GPU, k = 1, k = E and GPUs without slots all have finite, positive costs of every objective."""
    layers, experts, top_k, slots = shape
    trace = make_trace(0, tokens=12, layers=layers, experts=experts, top_k=top_k)
    problem = make_problem(
        trace, slow_topology(f"scale-up:{len(slots)}"), slots_per_gpu=slots, dataflow=dataflow, phase=phase
    )
    placement = random_placement(0, slots, layers, experts)
    for objective in OBJECTIVES:
        value = objective_value(problem.replace(objective=objective), placement)
        assert np.isfinite(value)
        assert value >= (0 if objective in ("cross", "remote") else 1)


@pytest.mark.parametrize("spec", ["scale-up:4", "scale-out:2x2"])
def test_the_mean_step_predicts_simulated_steps(spec: str) -> None:
    """Steps of independent tokens take the predicted mean or a little more: the mean of a maximum is the larger.

    The excess is that of the busiest GPU over the average one, a few per cent with 4,000 tokens in a step.
    """
    tokens = 12_000
    trace = make_trace(1, tokens=tokens, experts=8).replace(
        request=np.arange(tokens), position=np.zeros(tokens), phase=np.ones(tokens)
    )
    topology, model = slow_topology(spec), small_model(2, 8, 2)
    placement = random_placement(1, [3, 2, 3, 2], 2, 8)
    for requests, excess in ((4000, 1.03), (100, 1.25)):
        law = BatchLaw(phase="decode", requests=requests, batches=40)
        problem = make_problem(trace, topology, slots_per_gpu=[3, 2, 3, 2], model=model).replace(law=law)
        steps = draw_steps(trace, TokenIndex.of(trace), law)
        measured = simulate(steps, placement, topology, model).summary["mean"].value
        predicted = objective_value(problem, placement)
        assert 0.995 <= measured / predicted <= excess
