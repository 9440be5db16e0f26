"""Topologies side by side: the best of each kind, when network prices make them equal, what bandwidth buys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moeplace.planning.deployment import Deployment
from moeplace.planning.economics import Bill, break_even_factor
from moeplace.planning.evaluate import Evaluator
from moeplace.planning.outcome import Outcome
from moeplace.planning.pricebook import PriceBook
from moeplace.topology import SCALE_UP


@dataclass(frozen=True, slots=True, kw_only=True)
class KindRow:
    """The cheapest tokens of one kind of topology.

    Attributes
    ----------
    kind, best
        The kind, and its deployment of most tokens for its cost.
    even_share
        Network's share in the price of the best scale-up deployment at which both buy equally many tokens per second
        for their price, all network prices moved alike; None where there is none.
    """

    kind: str
    best: Outcome
    even_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRow:
    """The cheapest tokens of one kind and accelerator at one scale-up bandwidth, and its change from the widest."""

    kind: str
    accelerator: str
    link_gb_per_s: float
    best: Outcome
    throughput_change: float
    price_change: float
    per_usd_change: float


def repriced(outcome: Outcome, evaluator: Evaluator, book: PriceBook) -> Outcome:
    """Return the same times at the prices of another book."""
    bill = Evaluator.bill(_with_book(evaluator, book), outcome.deployment)
    return outcome.replace(usd=bill.usd, watts=bill.watts, usd_per_hour=bill.per_hour(book))


def _with_book(evaluator: Evaluator, book: PriceBook) -> Evaluator:
    return Evaluator(
        workload=evaluator.workload,
        stats=evaluator.stats,
        accelerators=evaluator.accelerators,
        book=book,
        demands=evaluator.demands,
    )


def best_of(outcomes: Iterable[Outcome]) -> Outcome | None:
    """Of feasible outcomes with a price, the one of most tokens for its cost."""
    priced = [one for one in outcomes if one.feasible and one.per_usd is not None]
    return min(priced, key=lambda one: (-(one.per_usd or 0.0), one.deployment.id), default=None)


def kind_rows(outcomes: Sequence[Outcome]) -> list[KindRow]:
    """One row for each kind of topology that has a feasible deployment of known price, the best first."""
    together = [one for one in outcomes if not one.deployment.attention_gpus]
    kinds = dict.fromkeys(one.deployment.kind for one in together)
    best = {kind: best_of(one for one in together if one.deployment.kind == kind) for kind in kinds}
    base = best.get(SCALE_UP)
    rows = [
        KindRow(kind=kind, best=one, even_share=None if base is None or kind == SCALE_UP else even_share(base, one))
        for kind, one in best.items()
        if one is not None
    ]
    return sorted(rows, key=lambda row: (-(row.best.per_usd or 0.0), row.kind))


def batch_rows(outcomes: Sequence[Outcome]) -> tuple[list[int], list[tuple[str, list[Outcome | None]]]]:
    """Batches, and kind by kind the best deployment of each; None where none was timed, or none keeps the limits."""
    together = [one for one in outcomes if not one.deployment.attention_gpus]
    batches = sorted({one.deployment.batch for one in together})
    rows = [
        (
            kind,
            [
                best_of(one for one in together if (one.deployment.kind, one.deployment.batch) == (kind, batch))
                for batch in batches
            ],
        )
        for kind in dict.fromkeys(one.deployment.kind for one in together)
    ]
    return batches, rows


def even_share(base: Outcome, other: Outcome) -> float | None:
    """Network's share in the price of ``base`` at which both buy as many tokens per second; None if at no share."""
    factor = break_even_factor((base.tokens_per_s, bill_of(base)), (other.tokens_per_s, bill_of(other)))
    accelerators = base.usd.get("accelerators")
    if factor is None or not accelerators:
        return None
    network = factor * bill_of(base).network_usd
    return network / (accelerators + network)


def bill_of(outcome: Outcome) -> Bill:
    """Its bill."""
    return Bill(usd=dict(outcome.usd), watts=dict(outcome.watts))


def link_rows(outcomes: Sequence[Outcome]) -> list[LinkRow]:
    """What each scale-up bandwidth buys, kind by kind; none where only one was tried."""
    groups: dict[tuple[str, str], dict[float, list[Outcome]]] = {}
    for one in outcomes:
        own: Deployment = one.deployment
        if not own.attention_gpus:
            groups.setdefault((own.kind, own.accelerator), {}).setdefault(own.link_gb_per_s, []).append(one)
    rows = []
    for (kind, accelerator), by_link in groups.items():
        found = {link: best_of(ones) for link, ones in sorted(by_link.items(), reverse=True)}
        best = {link: one for link, one in found.items() if one is not None}
        if len(best) < 2:
            continue
        widest = best[max(best)]
        for link, one in best.items():
            rows.append(
                LinkRow(
                    kind=kind,
                    accelerator=accelerator,
                    link_gb_per_s=link,
                    best=one,
                    throughput_change=one.per_gpu / widest.per_gpu - 1,
                    price_change=_price(one) / _price(widest) - 1,
                    per_usd_change=(one.per_usd or 0.0) / (widest.per_usd or 1.0) - 1,
                )
            )
    return rows


def _price(outcome: Outcome) -> float:
    return (bill_of(outcome).total_usd or 0.0) / outcome.deployment.num_gpus


def compare_document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Both tables as part of a ``moeplace/plan/1`` document."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    batches, by_batch = batch_rows(outcomes)
    return {
        "topologies_by_batch": [
            {"kind": kind, "batch": batch, "best": one.deployment.id, "per_usd": rounded(one.per_usd)}
            for kind, ones in by_batch
            for batch, one in zip(batches, ones, strict=True)
            if one is not None
        ],
        "topologies": [
            {"kind": row.kind, "best": row.best.deployment.id, "even_network_share": rounded(row.even_share)}
            for row in kind_rows(outcomes)
        ],
        "bandwidths": [
            {"kind": row.kind, "accelerator": row.accelerator, "link_gb_per_s": row.link_gb_per_s}
            | {"best": row.best.deployment.id}
            | {name: rounded(getattr(row, name)) for name in ("throughput_change", "price_change", "per_usd_change")}
            for row in link_rows(outcomes)
        ],
    }
