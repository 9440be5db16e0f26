"""``moeplace plan`` beside what is published: topologies, bandwidth, overlap, ping-pong, a wafer; the search's time.

Published figures are targets only where the issue asks for a direction; elsewhere they stand in the note. No constant
is fitted to them: the price table of arXiv 2605.00254 is not public, so prices are scaled to network shares.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.cases import Case
from moeplace.affinity import count_routing
from moeplace.hardware import load_accelerator
from moeplace.model import Attention, ModelSpec, load_model
from moeplace.overlap import DUAL_BATCH, NONE
from moeplace.planning.compare import best_of, even_share, repriced
from moeplace.planning.disaggregation import Sides, algorithm_1, make_plan, nodes_in_balance
from moeplace.planning.economics import with_network_share
from moeplace.planning.evaluate import Evaluator
from moeplace.planning.outcome import Outcome
from moeplace.planning.pricebook import load_price_book
from moeplace.planning.search import search
from moeplace.planning.space import DEFAULT_ACCELERATORS, Space, cells, deployments
from moeplace.planning.wafer import compare_wafer
from moeplace.planning.workload import make_workload
from moeplace.synth import SynthSpec, synthesise
from moeplace.topology import load_topology
from moeplace.trace import Trace, concatenate

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
SWITCHLESS = ("torus", "full-mesh")
PUBLISHED_GAINS = {"mixtral-8x22b": 1.10, "dbrx": 1.28, "scaled-moe": 1.38}
CARDS = ("h20", "l40s", "l20", "h800", "a800")
SCALED = ModelSpec(
    name="scaled-moe",
    num_layers=48,
    moe_layer_ids=tuple(range(48)),
    num_experts=32,
    top_k=4,
    hidden=8192,
    expert_inner=8192,
    attention=Attention(num_heads=64, num_kv_heads=8, head_dim=128),
)


def cases(seeds: int) -> list[Case]:
    """DeepSeek-V3 on a synthetic trace of all its layers; MegaScale-Infer's models by its equations."""
    results = _ping_pong()
    for seed in range(seeds):
        trace = _trace(seed)
        results += [*_topologies(trace, seed), *_wafer(trace, seed), *_default_search(trace, seed)]
    return results


def _trace(seed: int) -> Trace:
    model = load_model("deepseek-v3")
    stream = synthesise(model, SynthSpec.of_model(model), 20_000, seed)
    return concatenate(stream.blocks(), stream.meta)


def _evaluator(trace: Trace, seed: int, names: tuple[str, ...], steps: int, solver: str) -> Evaluator:
    return Evaluator(
        workload=make_workload(trace, load_model("deepseek-v3"), context=2048, steps=steps, seed=seed),
        stats=count_routing(trace, threads=2),
        accelerators={name: load_accelerator(name) for name in names},
        book=load_price_book(),
        solver=solver,
    )


def _topologies(trace: Trace, seed: int) -> list[Case]:
    evaluator = _evaluator(trace, seed, ("h100",), 8, "balance+relabel")
    space = Space(
        accelerators=evaluator.accelerators,
        ep_sizes=(64,),
        batches=(16, 32, 64, 128, 256),
        link_scales=(1, 0.75, 0.5, 0.33, 0.25, 0.15, 0.1),
    )
    judged = [
        one
        for cell in cells(deployments(space, evaluator.workload.model))
        for one in evaluator.time([evaluator.screen(own).replace(breaches=()) for own in cell])
    ]
    title = f"DeepSeek-V3, EP64, decode, H100, seed {seed}"
    results = []
    for share in SHARES:
        book = with_network_share(evaluator.book, load_topology("scale-up:64"), share)
        results += _at_share(f"{title}, network share {share:.0%}", [repriced(one, evaluator, book) for one in judged])
    base, other = _best(judged, "scale-up"), _best(judged, *SWITCHLESS)
    even = even_share(base, other)
    results.append(
        Case(name=f"{title}: network share at which both are even", value=100 * (even or 0.0), unit="%", target=20)
    )
    return results + _overlap(title, judged)


def _best(outcomes: list[Outcome], *kinds: str, when: Callable[[Outcome], bool] | None = None) -> Outcome:
    """Best of some kinds at full bandwidth, or where ``when`` says."""
    wanted = when or (lambda one: one.deployment.link_gb_per_s == 450)
    found = best_of(one for one in outcomes if one.deployment.kind in kinds and wanted(one))
    if found is None:
        raise RuntimeError(f"no deployment of {kinds}")
    return found


def _rate(outcome: Outcome) -> float:
    return outcome.per_usd or 0.0


def _at_share(title: str, outcomes: list[Outcome]) -> list[Case]:
    switched, switchless = _best(outcomes, "scale-up"), _best(outcomes, *SWITCHLESS)
    narrow = _best(outcomes, "scale-up", when=lambda one: True)
    own = _best(outcomes, *SWITCHLESS, when=lambda one: True)
    results = [
        Case(
            name=f"{title}: switchless over scale-up, tokens/$",
            value=100 * (_rate(switchless) / _rate(switched) - 1),
            unit="%",
            target=0,
            at_least=True,
            note=f"published 20.6 to 56.2; {switchless.deployment.label}",
        ),
        Case(
            name="  both at their best bandwidth",
            value=100 * (_rate(own) / _rate(narrow) - 1),
            unit="%",
            target=0,
            at_least=True,
        ),
        Case(
            name="  best scale-up bandwidth",
            value=narrow.deployment.link_gb_per_s,
            unit="GB/s",
            target=449,
            note=f"{_rate(narrow) / _rate(switched) - 1:+.1%} tokens/$ against 450 GB/s; published up to 27 %",
        ),
    ]
    for batch in (16, 64):
        at = [one for one in outcomes if one.deployment.batch == batch]
        gain = _rate(_best(at, *SWITCHLESS)) / _rate(_best(at, "scale-up")) - 1
        results.append(Case(name=f"  at batch {batch} alone", value=100 * gain, unit="%", target=0, at_least=True))
    return results


def _overlap(title: str, outcomes: list[Outcome]) -> list[Case]:
    results = []
    published = {32: -27.0, 256: 25.5}
    for kind in ("scale-up", "scale-out", *SWITCHLESS):
        for batch, told in published.items():
            own = {
                one.deployment.overlap: one.per_gpu
                for one in outcomes
                if (one.deployment.kind, one.deployment.batch, one.deployment.link_gb_per_s) == (kind, batch, 450)
            }
            results.append(
                Case(
                    name=f"{title}: dual-batch overlap on {kind}, batch {batch}",
                    value=100 * (own[DUAL_BATCH] / own[NONE] - 1),
                    unit="%",
                    target=0,
                    at_least=batch == 256,
                    note=f"published {told:+g} on 72 H100 over NICs",
                )
            )
    for batch in (32, 64, 128, 256):
        rate = {
            kind: max(one.per_gpu for one in outcomes if one.deployment.kind == kind and one.deployment.batch == batch)
            for kind in SWITCHLESS
        }
        gain = 100 * (rate["full-mesh"] / rate["torus"] - 1)
        name = f"{title}: full mesh over torus, tokens/s/GPU, batch {batch}"
        results.append(Case(name=name, value=round(gain, 9), unit="%", target=0, at_least=True))
    return results


def _ping_pong() -> list[Case]:
    """Micro-batches on A100, and the cheapest pair of five cards."""
    a100, results = load_accelerator("a100-80"), []
    prices = load_price_book("megascale").accelerator_usd
    for name, published in PUBLISHED_GAINS.items():
        model = SCALED if name == SCALED.name else load_model(name)
        sides = Sides(
            model=model, attention=a100, experts=a100, context=730, tp_attention=2, expert_nodes=model.num_experts
        )
        nodes = nodes_in_balance(sides, 128)
        plans = [make_plan(sides, (nodes, count, 128), {"a100-80": 1.0}) for count in (1, 2, 3)]
        rates = [plan.tokens_per_s for plan in plans]
        times = plans[0].times_us
        note = f"T_a {times[0]:.0f}, T_e {times[1]:.0f}, T_c {times[2]:.0f} µs"
        title = f"{name} on A100, 128 requests a node: throughput of"
        results += [
            Case(
                name=f"{title} 2 micro-batches over 1",
                value=rates[1] / rates[0],
                unit="×",
                note=f"published 1.9; {note}",
            ),
            Case(name=f"{title} 3 over 2", value=rates[2] / rates[1], unit="×", note=f"published {published}"),
        ]
        found = {
            (a, e): algorithm_1(model, (load_accelerator(a), load_accelerator(e)), prices, context=730, limit_ms=150)
            for a in CARDS
            for e in CARDS
        }
        known = {pair: plan.per_cost for pair, plan in found.items() if plan is not None}
        best = max(known, key=lambda pair: known[pair])
        results.append(
            Case(
                name=f"{name}: H20 + L40S over the best pair of {len(known)}, tokens/s for its price",
                value=known["h20", "l40s"] / known[best],
                unit="×",
                target=1,
                at_least=True,
                note=f"best: {best[0]} for attention, {best[1]} for experts",
            )
        )
    return results


def _wafer(trace: Trace, seed: int) -> list[Case]:
    evaluator = _evaluator(trace, seed, ("h100",), 8, "eplb")
    rows = compare_wafer(evaluator.workload, evaluator.stats, load_topology("mesh:8x8"), 16)
    return [
        Case(
            name=f"DeepSeek-V3 on a mesh of 8×8 dies, seed {seed}: {row.placement}, requests {row.homes}",
            value=100 * (row.step_us / rows[0].step_us - 1),
            unit="%",
            note=f"MoE layers {row.step_us / 1e3:.1f} ms, {row.hops:.2f} hops, max/mean {row.busiest_over_mean:.2f}",
        )
        for row in rows
    ]


def _default_search(trace: Trace, seed: int) -> list[Case]:
    """4 topologies × 3 accelerators × 6 EP sizes × 5 batches, with and without overlap, on two threads."""
    evaluator = _evaluator(trace, seed, DEFAULT_ACCELERATORS, 32, "balance+relabel")
    found = deployments(Space(accelerators=evaluator.accelerators), evaluator.workload.model)
    started, used = time.perf_counter(), time.process_time()
    result = search(found, evaluator, threads=2)
    seconds, busy = time.perf_counter() - started, time.process_time() - used
    note = f"{len(result.outcomes)} deployments, {busy:.0f} s of processor time"
    return [Case(name=f"default search, DeepSeek-V3, seed {seed}", value=seconds, unit="s", target=180, note=note)]
