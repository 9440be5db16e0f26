"""In words: what was assumed and where it comes from, why nothing is feasible, and one deployment's budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moeplace.build import plural
from moeplace.planning.deployment import Deployment
from moeplace.planning.evaluate import Evaluator
from moeplace.planning.memory import USABLE_SHARE, USABLE_SOURCE
from moeplace.planning.outcome import BOUNDED, Breach, Outcome
from moeplace.planning.search import Found
from moeplace.planning.workload import MANY_GPUS
from moeplace.topology import SCALE_UP

RELAX = {
    "memory": "more GPUs per instance (--ep-sizes), a smaller batch (--batches), a shorter --context or more memory",
    "--tpot": "raise --tpot, or try smaller --batches",
    "--ttft": "raise --ttft, or give a shorter --prompt",
    "--max-gpus": "raise --max-gpus, or try smaller --ep-sizes",
    "--max-price": "raise --max-price, or try cheaper --accelerators",
}


def workload_sentences(evaluator: Evaluator, fitted: str) -> tuple[str, ...]:
    """What is assumed of the requests, the engine and the placements."""
    work, model = evaluator.workload, evaluator.workload.model
    pool = work.decode
    requests = 0 if pool is None else pool.num_requests
    said = [
        f"model {model.name}: {model.num_layers} layers, {model.num_moe_layers} of them with {model.num_experts} "
        f"experts, top-{model.top_k}, {model.weight_bytes:g} bytes a weight",
        f"a request that decodes looks at {work.context:,.0f} tokens; a prompt has {work.prompt:,}",
        f"{plural(work.steps, 'step')} of every size drawn from {plural(requests, 'request')}, seed {work.seed}, "
        f"fewer beyond {MANY_GPUS} GPUs; where a step holds more, one stands for several",
        f"experts placed by {evaluator.solver} for each topology, {fitted}",
        f"{USABLE_SHARE:.0%} of memory is usable: {USABLE_SOURCE}",
        "times are model outputs; embeddings, sampling, scheduling and queueing are left out",
    ]
    if pool is not None and work.layer_scale != 1:
        said.append(
            f"the trace has {pool.meta.num_layers} of {model.num_moe_layers} MoE layers: the others are taken to "
            "be like them"
        )
    if model.attention is None:
        said.append(f"the attention of {model.name} is unknown: its time, weights and cache are left out; see --model")
    return tuple(said)


def network_sentences(evaluator: Evaluator, deployments: Sequence[Deployment]) -> tuple[str, ...]:
    """Networks of the search that are not built today."""
    said = []
    for name, accelerator in evaluator.accelerators.items():
        most = max((d.expert_gpus for d in deployments if (d.kind, d.accelerator) == (SCALE_UP, name)), default=0)
        if most > accelerator.scale_up_domain:
            said.append(
                f"scale-up domains of up to {most} {name}: today's join {accelerator.scale_up_domain}; efficiency and "
                "latency are taken to stay"
            )
    if any(d.kind not in (SCALE_UP, "scale-out") for d in deployments):
        said.append("on a torus, full mesh or mesh an accelerator's scale-up bandwidth is divided among its links")
    return tuple(said)


def price_sentences(evaluator: Evaluator) -> tuple[str, ...]:
    """Every price in use, with its source."""
    book = evaluator.book
    said = [f"prices: book {book.name} of {book.date}, in {book.unit}; no book is authoritative, see --prices"]
    for key, value in book.numbers().items():
        table, _, rest = key.partition(".")
        name, _, what = rest.rpartition(".")
        if table == "accelerators" and name in evaluator.accelerators:
            said.append(f"{name}: {value:,g} {book.unit if what == 'usd' else 'W'} ({book.sources[key]})")
        elif table != "accelerators":
            said.append(f"{rest} {value:,.4g} ({book.sources[key]})")
    for name in evaluator.accelerators:
        if name not in book.accelerator_usd:
            said.append(f"{name}: no price in the book; compared by GPU and time alone")
        if name not in book.accelerator_watts:
            said.append(f"{name}: watts unknown; electricity is left out")
    return tuple(said)


def infeasible_sentences(found: Found) -> tuple[str, ...]:
    """Which constraints bind when nothing is feasible, and the nearest change that would make something so."""
    broken = [outcome for outcome in found.outcomes if outcome.breaches]
    if not broken or any(outcome.feasible for outcome in found.outcomes):
        return ()
    counts = Counter(breach.constraint for outcome in broken for breach in outcome.breaches)
    said = [
        f"{name} rules out {count:,} of {plural(len(found.outcomes), 'deployment')}"
        for name, count in counts.most_common()
    ]
    nearest = min(broken, key=lambda outcome: (_worst(outcome.breaches), outcome.deployment.id))
    wanted = "; ".join(str(breach) for breach in nearest.breaches)
    said.append(f"nearest: {nearest.deployment.id} {nearest.deployment.label}: {wanted}")
    said += [RELAX[name] for name in dict.fromkeys(breach.constraint for breach in nearest.breaches)]
    return tuple(said)


def _worst(breaches: Sequence[Breach]) -> tuple[float, int]:
    return max(breach.excess for breach in breaches), len(breaches)


def counts_sentence(found: Found) -> str:
    """How many deployments there were, and what became of them."""
    outcomes = found.outcomes
    bounded = sum(outcome.kind == BOUNDED for outcome in outcomes)
    broken = sum(bool(outcome.breaches) for outcome in outcomes)
    timed = sum(outcome.feasible for outcome in outcomes)
    text = f"{plural(len(outcomes) + found.unjudged, 'deployment')}: {timed:,} feasible"
    text += f", {broken:,} break a constraint" * bool(broken)
    text += f", {bounded:,} beaten by their bounds alone" * bool(bounded)
    return text + f", {found.unjudged:,} not judged" * bool(found.unjudged)


def budget_rows(outcome: Outcome, unit: str) -> dict[str, list[list[str]]]:
    """Tables of one deployment's budget: title → rows, the first of them the head."""
    time = [["part of a step", "µs", "share"]]
    step_us = outcome.tpot_ms.get("mean", 0.0) * 1e3
    for name, value in outcome.parts_us.items():
        if value:
            signed = -value if name == "hidden" else value
            time.append([name, f"{signed:,.0f}", f"{signed / step_us:.1%}"])
    time.append(["step", f"{step_us:,.0f}", "100.0%"])
    money = [["part of the cluster", unit, "share", "W"]]
    total = sum(value for value in outcome.usd.values() if value is not None)
    for name, price in outcome.usd.items():
        watts = outcome.watts.get(name)
        share = "-" if price is None or not total else f"{price / total:.1%}"
        money.append([name, _shown(price), share, _shown(watts)])
    memory = [["on the fullest GPU", "GB"], *[[name, f"{value:,.2f}"] for name, value in outcome.memory_gb.items()]]
    return {"time": time, "money": money, "memory": memory}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"
