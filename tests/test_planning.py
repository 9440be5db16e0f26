"""Deployments are timed as the evaluator times them, bounded soundly, and searched without losing any."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import MODEL, toy_evaluator, toy_workload

from moeplace.attention import AttentionTime
from moeplace.errors import InputError, UnknownNameError
from moeplace.execution import Execution
from moeplace.hardware import load_accelerator
from moeplace.overlap import DUAL_BATCH, NONE
from moeplace.placement import spread_slots
from moeplace.planning.deployment import Deployment, cube, dims_for
from moeplace.planning.evaluate import Demands, Evaluator
from moeplace.planning.explain import infeasible_sentences, price_sentences, workload_sentences
from moeplace.planning.outcome import BOUNDED, Outcome
from moeplace.planning.pareto import AXES, dominates, merits, pareto_set
from moeplace.planning.search import Progress, Results, judge, search
from moeplace.planning.space import Space, deployments
from moeplace.planning.timing import attention_us, prefill_attention_us, time_parts
from moeplace.simulate import simulate
from moeplace.solvers.linear import contiguous
from moeplace.topology import build_topology

KINDS = (("scale-up", (8,)), ("scale-out", (2, 4)), ("torus", (2, 2, 2)), ("full-mesh", (2, 2, 2)), ("mesh", (4, 2)))


def toy_space(evaluator: Evaluator, **changes: object) -> Space:
    """Two kinds of networks of 4 and 8 GPUs."""
    chosen = {"kinds": ("scale-up", "torus"), "ep_sizes": (4, 8), "batches": (4, 16), **changes}
    return Space(accelerators=evaluator.accelerators, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "dims"), KINDS)
@pytest.mark.parametrize("overlap", [NONE, DUAL_BATCH])
def test_parts_are_those_of_the_simulator(kind: str, dims: tuple[int, ...], overlap: str) -> None:
    """Timed on several accelerators at once, every layer's means are what the simulator gives on each alone."""
    steps = toy_workload().decode_steps(64)
    placement = contiguous(spread_slots(16, 8), 2, 16)
    places = [build_topology(kind, dims, load_accelerator(name)) for name in ("h100", "b200", "l40s")]
    whole, cut = time_parts(steps, placement, places, MODEL, halves=overlap == DUAL_BATCH)
    for place, parts in zip(places, cut if overlap == DUAL_BATCH else whole, strict=True):
        run = simulate(steps, placement, place, MODEL, Execution(overlap=overlap))
        for layer, row in enumerate(run.layers):
            for name in ("compute", "dispatch", "combine"):
                mean = float(getattr(parts, name)[layer].sum(axis=1).mean())
                assert mean == pytest.approx(getattr(row, f"{name}_us"), rel=1e-9)


def test_prefill_parts_are_those_of_the_simulator() -> None:
    """The same for steps of whole prompts, which normal kernels move."""
    steps = toy_workload().prefill_steps(8)
    placement = contiguous(spread_slots(16, 8), 2, 16)
    places = [build_topology("scale-out", (2, 4), load_accelerator(name)) for name in ("h100", "h200")]
    for place, parts in zip(places, time_parts(steps, placement, places, MODEL)[0], strict=True):
        run = simulate(steps, placement, place, MODEL)
        total = (parts.compute + parts.dispatch + parts.combine).sum(axis=(0, 2))
        assert total == pytest.approx(run.step_us, rel=1e-9)


def test_attention_is_the_evaluator_s_without_tensor_parallelism() -> None:
    """One GPU for each request's attention: the evaluator's own formula; more share weights, and pay for the sum."""
    h100 = load_accelerator("h100")
    own = AttentionTime.of(MODEL, h100).rank_us(np.array([32]), np.array([32 * 500]), np.array([32 * 500]))
    assert attention_us(MODEL, h100, 32, 500, 1) == pytest.approx(own[0])
    shared = attention_us(MODEL, h100.replace(scale_up_latency_us=1e-9), 32, 500, 4)
    group = AttentionTime.of(MODEL, h100).rank_us(np.array([32]), np.array([16000]), np.array([16000]))[0]
    moved = 2 * 3 / 4 * 128 * 1024 * 2e-3 / h100.scale_up_effective_gb_per_s
    assert 0 < shared - moved <= group
    assert prefill_attention_us(MODEL, h100, 64, 1) > prefill_attention_us(MODEL, h100, 32, 1)


@pytest.mark.parametrize("overlap", [NONE, DUAL_BATCH])
@pytest.mark.parametrize(("kind", "dims"), KINDS)
@pytest.mark.parametrize("batch", [2, 64])
def test_bounds_are_sound(kind: str, dims: tuple[int, ...], overlap: str, batch: int) -> None:
    """No deployment is faster, in the mean or at the percentile, than its bound says."""
    evaluator = toy_evaluator()
    own = Deployment(kind=kind, dims=dims, accelerator="h100", link_gb_per_s=450, batch=batch, overlap=overlap)
    bound = evaluator.bound(evaluator.screen(own))
    timed = judge(own, evaluator)
    assert timed.tokens_per_s <= bound.tokens_per_s * (1 + 1e-9)
    assert timed.latency_ms >= bound.latency_ms * (1 - 1e-9)
    assert bound.latency_ms > 0.1 * timed.latency_ms


def test_parts_and_what_is_hidden_add_up_to_the_step() -> None:
    """The budget of time is the whole step; the budget of money is the bill."""
    evaluator = toy_evaluator()
    for overlap in (NONE, DUAL_BATCH):
        own = Deployment(kind="torus", dims=(2, 2, 2), accelerator="h100", link_gb_per_s=450, batch=16, overlap=overlap)
        outcome = judge(own, evaluator)
        parts = dict(outcome.parts_us)
        hidden = parts.pop("hidden")
        assert sum(parts.values()) - hidden == pytest.approx(outcome.tpot_ms["mean"] * 1e3)
        assert (hidden > 1e-6) == (overlap == DUAL_BATCH)
        assert outcome.per_usd == pytest.approx(outcome.tokens_per_s * 3600 / (outcome.usd_per_hour or 0))


def test_layers_that_the_trace_lacks_are_like_those_it_has() -> None:
    """A model with twice the MoE layers takes twice as long, but for its dense layers."""
    twice = MODEL.replace(num_layers=5, moe_layer_ids=(1, 2, 3, 4))
    own = Deployment(kind="scale-up", dims=(8,), accelerator="h100", link_gb_per_s=450, batch=16)
    one, two = (judge(own, toy_evaluator(model=model)) for model in (MODEL, twice))
    dense = one.parts_us["dense layers"]
    assert two.tpot_ms["mean"] * 1e3 - dense == pytest.approx(2 * (one.tpot_ms["mean"] * 1e3 - dense))


def test_the_search_keeps_what_is_best(tmp_path: Path) -> None:
    """What bounds leave out is never on the front: it is that of judging everything; kept outcomes are taken over."""
    evaluator = toy_evaluator("h100", "h200")
    found = deployments(toy_space(evaluator), MODEL)
    everything = [judge(own, evaluator) for own in found]
    results = tmp_path / "plan.jsonl"
    result = search(found, evaluator, results=Results(results, evaluator))
    front = [outcome.deployment.id for outcome in pareto_set(result.outcomes)]
    assert front == [outcome.deployment.id for outcome in pareto_set(everything)]
    assert result.unjudged == 0
    told: list[Progress] = []
    results.write_text(results.read_text() + '{"deployment": {"kind')  # as a kill leaves it
    again = search(found, evaluator, results=Results(results, evaluator), tell=told.append)
    assert [outcome.deployment.id for outcome in pareto_set(again.outcomes)] == front
    assert told[-1].done == len(found)
    with pytest.raises(InputError, match="another search"):
        Results(results, toy_evaluator("h100")).load()


def test_threads_change_nothing() -> None:
    """With two threads the outcomes, those excluded by bounds among them, are the same."""
    evaluator = toy_evaluator("h100", "h200")
    found = deployments(toy_space(evaluator, batches=(1, 4, 16)), MODEL)
    one, two = (search(found, toy_evaluator("h100", "h200"), threads=threads) for threads in (1, 2))
    assert [outcome.to_dict() for outcome in one.outcomes] == [outcome.to_dict() for outcome in two.outcomes]


def test_outcomes_survive_the_file() -> None:
    """An outcome read back is the outcome, to the digits that are kept."""
    evaluator = toy_evaluator(demands=Demands(tpot_ms=0.01))
    own = Deployment(kind="torus", dims=(2, 2, 2), accelerator="h100", link_gb_per_s=450, batch=16)
    outcome = judge(own, evaluator)
    assert Outcome.of_dict(json.loads(json.dumps(outcome.to_dict(exact=True)))) == outcome
    back = Outcome.of_dict(json.loads(json.dumps(outcome.to_dict())))
    assert back.deployment == own
    assert back.breaches[0].constraint == "--tpot"
    assert back.tokens_per_s == pytest.approx(outcome.tokens_per_s, rel=1e-7)
    assert back.per_usd == pytest.approx(outcome.per_usd, rel=1e-7)


def test_an_interrupted_search_returns_what_it_has() -> None:
    """Ctrl-C in the middle: the outcomes so far, and how many are missing."""
    evaluator = toy_evaluator()
    found = deployments(toy_space(evaluator), MODEL)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    result = search(found, evaluator, tell=stop)
    assert result.interrupted
    assert 0 < len(result.outcomes) < len(found)
    assert result.unjudged == len(found) - len(result.outcomes)
    late = search(found, evaluator, time_limit_s=0)
    assert late.out_of_time
    assert not late.outcomes


@pytest.mark.parametrize(
    ("demands", "binding"),
    [
        ({"tpot_ms": 1e-3}, "--tpot"),
        ({"ttft_ms": 1e-3}, "--ttft"),
        ({"max_gpus": 2}, "--max-gpus"),
        ({"max_usd": 10.0}, "--max-price"),
    ],
)
def test_what_is_infeasible_is_told_with_the_nearest_change(demands: dict[str, float], binding: str) -> None:
    """The constraint that binds is named with what the nearest deployment needs, and relaxing to that is feasible."""
    evaluator = toy_evaluator(demands=Demands(**demands))  # type: ignore[arg-type]
    found = deployments(toy_space(evaluator), MODEL)
    result = search(found, evaluator)
    said = infeasible_sentences(result)
    assert said[0].startswith(f"{binding} rules out {len(found)} of {len(found)} deployments")
    assert any("nearest" in sentence and binding in sentence for sentence in said)
    name = next(iter(demands))
    needed = min(breach.needed for outcome in result.outcomes for breach in outcome.breaches)
    relaxed = toy_evaluator(demands=Demands(**{name: math.ceil(needed * 1.5) if name == "max_gpus" else needed * 1.5}))
    assert not infeasible_sentences(search(found, relaxed))


def test_what_does_not_fit_the_memory_is_not_timed() -> None:
    """A cache that is too large is a breach of memory, with the GB it needs."""
    evaluator = toy_evaluator(context=10_000_000)
    result = search(deployments(toy_space(evaluator), MODEL), evaluator)
    assert all(outcome.breaches[0].constraint == "memory" for outcome in result.outcomes)
    assert all(not outcome.parts_us for outcome in result.outcomes)


def test_every_price_in_use_is_told_with_its_source() -> None:
    """The sentences name the accelerators' prices, each number of the network, and what is unknown."""
    said = "\n".join(price_sentences(toy_evaluator("h100", "tpu-v5p")))
    assert "h100: 34,400 USD (derived" in said
    assert "tpu-v5p: no price" in said
    assert "nic_usd_per_gb_per_s" in said
    assert any("attention of" in text for text in workload_sentences(_without_attention(), "fitted"))


def _without_attention() -> Evaluator:
    evaluator = toy_evaluator(model=MODEL.replace(attention=None))
    own = Deployment(kind="scale-up", dims=(8,), accelerator="h100", link_gb_per_s=450, batch=16)
    assert judge(own, evaluator).parts_us["attention"] == 0
    return evaluator


@given(st.integers(1, 512))
def test_a_cube_has_as_many_gpus(gpus: int) -> None:
    """The lengths of a grid multiply to its size, longest first."""
    assert math.prod(cube(gpus)) == gpus
    assert list(cube(gpus)) == sorted(cube(gpus), reverse=True)


def test_dimensions_of_each_kind() -> None:
    """Scale-out needs more than one whole node; meshes have two dimensions."""
    assert dims_for("scale-out", 32, 8) == (4, 8)
    assert dims_for("scale-out", 8, 8) is None
    assert dims_for("scale-out", 12, 8) is None
    assert dims_for("mesh", 32, 8) == (8, 4)
    assert dims_for("torus", 64, 8) == (4, 4, 4)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_dominance_is_a_strict_order(points: list[tuple[int, int, int]]) -> None:
    """Nothing dominates itself, and of two points at most one dominates the other."""
    for a in points:
        assert not dominates(a, a)
        assert not any(dominates(a, b) and dominates(b, a) for b in points)


def test_the_front_is_what_nothing_dominates() -> None:
    """By brute force: every feasible outcome is on the front or dominated by one that is."""
    evaluator = toy_evaluator("h100", "h200")
    outcomes = [judge(own, evaluator) for own in deployments(toy_space(evaluator), MODEL)]
    front = pareto_set(outcomes)
    for outcome in outcomes:
        beaten = any(dominates(merits(other, AXES), merits(outcome, AXES)) for other in outcomes)
        assert (outcome in front) == (not beaten)
    assert not pareto_set([dataclasses.replace(outcome, kind=BOUNDED) for outcome in outcomes])


def test_a_space_without_deployments_is_refused() -> None:
    """More GPUs than experts, and unknown kinds."""
    evaluator = toy_evaluator()
    with pytest.raises(InputError, match="no deployment"):
        deployments(toy_space(evaluator, ep_sizes=(64,)), MODEL)
    with pytest.raises(UnknownNameError, match="unknown topology kind 'tours'"):
        deployments(toy_space(evaluator, kinds=("tours",)), MODEL)
    with pytest.raises(InputError, match="KIND:DIMS"):
        deployments(toy_space(evaluator, kinds=("torus:4xq",)), MODEL)


def test_a_step_may_be_larger_than_the_trace() -> None:
    """Beyond the requests there are, each stands for several; up to there they are distinct."""
    work = toy_workload()
    for count in (5, 500):
        steps = work.decode_steps(count)
        assert steps.rows.shape == (8, count)
        names = steps.trace.request[steps.rows]
        distinct = [len(np.unique(row)) for row in names]
        assert distinct == [min(count, len(np.unique(steps.trace.request)))] * 8
