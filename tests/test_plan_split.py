"""Attention apart from experts: the published arithmetic, the pipeline event by event, and deployments on a trace."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plan_cases import MODEL, toy_evaluator

from moeplace.hardware import load_accelerator
from moeplace.model import Attention, ModelSpec, load_model
from moeplace.overlap import PING_PONG, PartTimes, step_times
from moeplace.planning.deployment import Deployment
from moeplace.planning.disaggregation import (
    Sides,
    algorithm_1,
    balanced_attention_nodes,
    compute_bound_batch,
    iteration_bounds_us,
    make_plan,
    message_bytes,
    micro_batches_needed,
    nodes_in_balance,
    nodes_to_try,
    total_us,
)
from moeplace.planning.pingpong import ATTENTION, EXPERTS, run_pipeline, uniform
from moeplace.planning.pricebook import load_price_book
from moeplace.planning.search import judge
from moeplace.planning.space import Space, deployments

SCALED = ModelSpec(  # the paper's third model: 32 experts, top-4; its other widths are recalled, not checked
    name="scaled-moe",
    num_layers=48,
    moe_layer_ids=tuple(range(48)),
    num_experts=32,
    top_k=4,
    hidden=8192,
    expert_inner=8192,
    attention=Attention(num_heads=64, num_kv_heads=8, head_dim=128),
)
KINDS = ("h20", "l40s", "l20", "h800", "a800")
TIMES = st.floats(0.5, 50.0)


def paper_model(name: str) -> ModelSpec:
    """One of the three models of the paper."""
    return SCALED if name == SCALED.name else load_model(name)


def test_micro_batches_that_hide_the_network() -> None:
    """Evaluator's table: T_c/T_f of 0.10, 0.49 and 0.75 need 3, 3 and 4 micro-batches; half of it exactly needs 3."""
    assert [micro_batches_needed(x, 1.0) for x in (0.10, 0.49, 0.75)] == [3, 3, 4]
    assert micro_batches_needed(0.5, 1.0) == 3
    assert micro_batches_needed(0.0, 1.0) == 2


def test_message_of_the_paper() -> None:
    """Mixtral-8x22B, 128 requests, TP 2: 196,608 bytes from an attention GPU to an expert."""
    assert message_bytes(128, load_model("mixtral-8x22b"), 2) == 196_608


def test_batches_from_which_experts_compute() -> None:
    """At 156 FLOPs a byte: 624 tokens for Mixtral-8x22B and DBRX, 1248 for 32 experts, top-4."""
    for name, batch in (("mixtral-8x22b", 624), ("dbrx", 624), ("scaled-moe", 1248)):
        model = paper_model(name)
        assert compute_bound_batch(156, model.num_experts, model.top_k) == batch


def test_nodes_in_balance_are_the_paper_s_for_straight_lines() -> None:
    """``n_a = k1·E/(k3·K)``: with those slopes both sides take equally long at any batch, fixed times left out."""
    k1, k3, experts, top_k, batch = 1.7, 0.4, 32, 4, 640.0
    nodes = balanced_attention_nodes(k1, k3, experts, top_k)
    assert k1 * batch == pytest.approx(k3 * batch * nodes * top_k / experts)


def test_nodes_in_balance_approach_the_slopes_ratio() -> None:
    """As batches grow, the search for balance gives the paper's formula with the slopes there."""
    h20, l40s = load_accelerator("h20"), load_accelerator("l40s")
    sides = Sides(model=load_model("dbrx"), attention=h20, experts=l40s, context=730, expert_nodes=16)
    k1, k3 = sides.slopes(20_000)
    nodes = nodes_in_balance(sides, 20_000)
    assert nodes == pytest.approx(balanced_attention_nodes(k1, k3, 16, 4), abs=1.01)
    assert nodes in nodes_to_try(sides, 20_000, 3)


@given(TIMES, TIMES, TIMES, st.integers(1, 6), st.integers(1, 12))
def test_the_pipeline_agrees_with_the_equations(a: float, e: float, c: float, count: int, layers: int) -> None:
    """Balanced micro-batches: event by event it takes (5); where (3) and (2) hold, a micro-batch lies within (4)."""
    run = run_pipeline(*(uniform(value, layers, count) for value in (a, e, c, c)))
    assert run.total_us == pytest.approx(total_us((a, e, c), count, layers))
    slower = max(a, e)
    if count * slower >= a + e + 2 * c:
        assert run.total_us == pytest.approx((a + e + 2 * c) + slower * (count * layers - 1))
        low, high = iteration_bounds_us((a, e, c), count, layers)
        # the last micro-batch starts (m-1)·T_a after the first: its own time through the layers
        first = min(item.start_us for item in run.work if (item.side, item.micro_batch) == (ATTENTION, count - 1))
        assert low - (count - 1) * slower <= run.total_us - first + 1e-6
        assert run.total_us - first <= high + a + e + 2 * c + 1e-6


@given(
    arrays(float, (4, 3), elements=TIMES),
    arrays(float, (4, 3), elements=TIMES),
    arrays(float, (4, 3), elements=TIMES),
    arrays(float, (3,), elements=TIMES),
)
def test_events_end_when_the_evaluator_says(
    experts: np.ndarray, dispatch: np.ndarray, combine: np.ndarray, attention: np.ndarray
) -> None:
    """Any times: the event-driven pipeline ends when the walk of moeplace.overlap does, and no side does two things."""
    run = run_pipeline(np.broadcast_to(attention, (4, 3)), experts, dispatch, combine)
    parts = PartTimes(
        attention=attention[None], compute=experts[:, None], dispatch=dispatch[:, None], combine=combine[:, None]
    )
    assert run.total_us == pytest.approx(step_times(parts, PING_PONG)[0])
    for side in (ATTENTION, EXPERTS):
        own = [item for item in run.work if item.side == side]
        assert len(own) == 12
        assert all(b.start_us >= a.end_us - 1e-9 for a, b in pairwise(own))
    assert run.busy_us(EXPERTS) == pytest.approx(experts.sum())


def test_bubbles_show_where_a_pipeline_is_not_balanced() -> None:
    """Enough micro-batches and equal sides: no bubbles; one micro-batch, or a slow side: the other waits."""
    full = run_pipeline(*(uniform(value, 10, 3) for value in (10.0, 10.0, 4.0, 4.0)))
    assert full.bubbles_us(ATTENTION) == pytest.approx(0)
    assert full.bubbles_us(EXPERTS) == pytest.approx(0)
    one = run_pipeline(*(uniform(value, 10, 1) for value in (10.0, 10.0, 4.0, 4.0)))
    assert one.bubbles_us(ATTENTION) == pytest.approx(9 * 18)
    slow = run_pipeline(*(uniform(value, 10, 3) for value in (10.0, 20.0, 4.0, 4.0)))
    assert slow.bubbles_us(EXPERTS) == pytest.approx(0)
    assert slow.bubbles_us(ATTENTION) > 9 * 3 * 9


@pytest.mark.parametrize(("name", "published"), [("mixtral-8x22b", 1.10), ("dbrx", 1.28), ("scaled-moe", 1.38)])
def test_micro_batches_gain_as_published(name: str, published: float) -> None:
    """On A100: the second nearly doubles throughput (1.9), the third adds what the network had left (1.10/1.28/1.38).

    Ideal pipelines gain exactly 2 from the second where the sides are equal, and ``1 + T_c/T_f`` from the third while
    ``T_c < T_f/2``; the published gains say T_c/T_f is 0.10, 0.28 and 0.38. The paper's batches for this figure are not
    at hand: all models get the 128 requests and TP 2 that it tells of Mixtral-8x22B. One 200 Gb/s NIC per GPU and 24 µs
    to start a message then give DBRX and the third model more to hide than published, up to 1.49; for Mixtral the third
    adds 1.02, since its one attention node leaves the experts the slower side by far.
    """
    batch = 128
    a100 = load_accelerator("a100-80")
    model = paper_model(name)
    sides = Sides(
        model=model, attention=a100, experts=a100, context=730, tp_attention=2, expert_nodes=model.num_experts
    )
    nodes = nodes_in_balance(sides, batch)
    rates = [make_plan(sides, (nodes, m, batch), {"a100-80": 1.0}).tokens_per_s for m in (1, 2, 3)]
    assert rates[1] / rates[0] == pytest.approx(1.9, abs=0.1)
    assert rates[2] / rates[1] == pytest.approx(published, abs=0.25)
    assert 1 < rates[2] / rates[1] < rates[1] / rates[0]


def _best_pair(name: str) -> tuple[str, str]:
    prices = load_price_book("megascale").accelerator_usd
    gpus = {each: load_accelerator(each) for each in KINDS}
    found = {
        (a, e): algorithm_1(paper_model(name), (gpus[a], gpus[e]), prices, context=730, limit_ms=150)
        for a in KINDS
        for e in KINDS
    }
    rates = {pair: plan.per_cost for pair, plan in found.items() if plan is not None}
    return max(rates, key=lambda pair: rates[pair])


@pytest.mark.parametrize(
    "name",
    [
        "dbrx",
        "scaled-moe",
        pytest.param(
            "mixtral-8x22b",
            marks=pytest.mark.xfail(
                strict=True, reason="H20 + H800 comes out 6 % ahead: an expert of 34 GB is shared by two L40S over PCIe"
            ),
        ),
    ],
)
def test_the_paper_s_deployment_is_chosen(name: str) -> None:
    """Of 25 pairs, H20 for attention and L40S for experts give most throughput for the paper's prices."""
    assert _best_pair(name) == ("h20", "l40s")


def test_cards_of_the_paper_s_table() -> None:
    """Memory bandwidth for a price is best with H20 (2214), arithmetic with L40S (335): why these two."""
    prices = load_price_book("megascale").accelerator_usd
    # the table's own numbers: 4096 GB/s is 4.0 TB/s times 1.024, which presets do not repeat
    bandwidth = {name: load_accelerator(name).hbm_tb_per_s * 1000 / prices[name] for name in KINDS}
    arithmetic = {name: load_accelerator(name).bf16_tflops / prices[name] for name in KINDS}
    assert max(bandwidth, key=lambda name: bandwidth[name]) == "h20"
    assert 4096 / prices["h20"] == pytest.approx(2214.1, abs=0.1)
    assert max(arithmetic, key=lambda name: arithmetic[name]) == "l40s"
    assert arithmetic["l40s"] == pytest.approx(335.2, abs=0.1)


def test_a_split_deployment_pays_for_imbalance() -> None:
    """On the trace: no faster than balanced routing, within its bounds, and its experts' imbalance shows as bubbles."""
    evaluator = toy_evaluator("h20", "l40s")
    own = Deployment(
        kind="scale-out",
        dims=(1, 8),
        accelerator="l40s",
        link_gb_per_s=32,
        batch=48,
        overlap=PING_PONG,
        attention_accelerator="h20",
        attention_gpus=2,
        micro_batches=3,
    )
    outcome = judge(own, evaluator)
    gpus = evaluator.accelerators
    sides = Sides(model=MODEL, attention=gpus["h20"], experts=gpus["l40s"], context=500, expert_nodes=8)
    balanced = total_us(sides.times(16, 2), 3, MODEL.num_moe_layers)
    assert outcome.tpot_ms["mean"] * 1e3 - outcome.parts_us["dense layers"] > balanced
    bound = evaluator.bound(evaluator.screen(own))
    assert outcome.latency_ms >= bound.latency_ms
    assert outcome.details["attention waits (share)"] > 0
    assert outcome.usd["nics"] == pytest.approx(34 * 25 * 8 + 34 * gpus["h20"].nic_gb_per_s * 2)
    assert own.num_gpus == 10


def test_the_space_holds_split_deployments() -> None:
    """Ping-pong puts every pair of accelerators into the space, each with the nodes that balance gives."""
    evaluator = toy_evaluator("h20", "l40s")
    space = Space(accelerators=evaluator.accelerators, ep_sizes=(8,), batches=(16,), overlaps=(PING_PONG,))
    found = deployments(space, MODEL, 500)
    assert {(own.attention_accelerator, own.accelerator) for own in found} == {
        (a, e) for a in ("h20", "l40s") for e in ("h20", "l40s")
    }
    assert all(own.attention_gpus and own.overlap == PING_PONG for own in found)
