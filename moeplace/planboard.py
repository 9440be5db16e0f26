"""What a person sees of a plan: the Pareto set as a table, why nothing is feasible, one deployment's budget."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from moeplace.planning.compare import KindRow, LinkRow, batch_rows, kind_rows, link_rows
from moeplace.planning.explain import budget_rows, counts_sentence, infeasible_sentences
from moeplace.planning.outcome import Outcome
from moeplace.planning.pareto import pareto_set
from moeplace.planning.pricebook import PriceBook
from moeplace.planning.search import Found, Progress
from moeplace.planning.wafer import WaferRow
from moeplace.report import console, say, say_wrapped, write_lines, write_table

TELL_EVERY_S = 2.0


def write_front(found: Found, book: PriceBook, percentile: float) -> None:
    """Write the Pareto set as a table, or what stands in the way of one."""
    out = console()
    front = pareto_set(found.outcomes, found.axes)
    if front:
        write_table(front_rows(front, book, percentile), right=range(4, 11))
    _write_kinds(kind_rows(found.outcomes), book)
    _write_batches(*batch_rows(found.outcomes), book)
    _write_links(link_rows(found.outcomes), book)
    for sentence in infeasible_sentences(found):
        say_wrapped(sentence, out, "yellow", indent="  ")
    say(counts_sentence(found), out, "dim")


def _write_kinds(rows: Sequence[KindRow], book: PriceBook) -> None:
    """Write the best of each kind of topology, where there are several."""
    if len(rows) < 2:
        return
    out = console()
    say("", out)
    say("least cost of each topology", out, "bold")
    table = [["topology", "id", "tokens/s/GPU", f"{book.unit}/Mtoken", "even with scale-up where the network is"]]
    for row in rows:
        even = "" if row.even_share is None else f"{abs(row.even_share):.1%} of its price"
        cells = [row.best.deployment.topology_name, row.best.deployment.id, f"{row.best.per_gpu:,.0f}"]
        table.append([*cells, shown(row.best.usd_per_million), even])
    write_table(table, right=(2, 3))


def _write_batches(batches: Sequence[int], rows: Sequence[tuple[str, list[Outcome | None]]], book: PriceBook) -> None:
    """Write what each topology gives for its cost at each batch, where there are several of both."""
    if len(batches) < 2 or len(rows) < 2:
        return
    out = console()
    say("", out)
    say(
        f"million tokens for 1 {book.unit}, by requests for each GPU (-: beaten, or over a limit)",
        out,
        "bold",
    )
    table = [["topology", *map(str, batches)]]
    for kind, ones in rows:
        table.append([kind, *[shown(None if one is None else (one.per_usd or 0.0) / 1e6) for one in ones]])
    write_table(table, right=range(1, len(table[0])))


def _write_links(rows: Sequence[LinkRow], book: PriceBook) -> None:
    """Write what each scale-up bandwidth buys, where several were tried."""
    if not rows:
        return
    out = console()
    say("", out)
    say("scale-up bandwidth, against the widest", out, "bold")
    table = [["topology", "accelerator", "GB/s", "id", "tokens/s/GPU", "price", f"tokens/{book.unit}"]]
    for row in rows:
        changes = (row.throughput_change, row.price_change, row.per_usd_change)
        cells = [row.kind, row.accelerator, f"{row.link_gb_per_s:g}", row.best.deployment.id]
        table.append([*cells, *[f"{change:+.1%}" for change in changes]])
    write_table(table, right=(2, 4, 5, 6))


def write_wafer(rows: Sequence[WaferRow]) -> None:
    """Write ways to place experts and requests on a wafer, and the change of each from the first."""
    base = rows[0].step_us
    table = [["experts", "requests", "MoE layers [µs]", "compute", "network", "hops", "max/mean", "change"]]
    for row in rows:
        times = [f"{value:,.0f}" for value in (row.step_us, row.compute_us, row.network_us)]
        ratios = [f"{row.hops:.2f}", f"{row.busiest_over_mean:.3f}", f"{row.step_us / base - 1:+.1%}"]
        table.append([row.placement, row.homes, *times, *ratios])
    write_table(table, right=range(2, 8))


def front_rows(front: Sequence[Outcome], book: PriceBook, percentile: float) -> list[list[str]]:
    """Rows of the table, the first of them its head."""
    unit = book.unit
    head = ["id", "topology", "accelerator", "how", "batch", "GPUs", f"TPOT p{percentile:g} [ms]", "tokens/s/GPU"]
    rows = [[*head, f"{unit}/Mtoken", "tokens/J", "network"]]
    for outcome in front:
        own = outcome.deployment
        total = sum(value for value in outcome.usd.values() if value is not None)
        price = outcome.usd.get("accelerators")
        share = "-" if price is None or not total else f"{1 - price / total:.1%}"
        cells = [own.id, own.topology_name, accelerators_of(outcome), how(outcome), str(own.batch), str(own.num_gpus)]
        cells += [f"{outcome.latency_ms:.2f}", f"{outcome.per_gpu:,.0f}", shown(outcome.usd_per_million)]
        rows.append([*cells, shown(outcome.per_watt), share])
    return rows


def accelerators_of(outcome: Outcome) -> str:
    """The accelerator, or both where attention has its own."""
    own = outcome.deployment
    return f"{own.attention_accelerator} + {own.accelerator}" if own.attention_gpus else own.accelerator


def how(outcome: Outcome) -> str:
    """How an instance runs, as far as it is not the plain way."""
    own = outcome.deployment
    parts = [own.overlap] + [f"m={own.micro_batches}"] * (own.micro_batches > 1)
    parts += [f"+{own.redundant}"] * bool(own.redundant) + [f"TP{own.attention_tp}"] * (own.attention_tp > 1)
    parts += [f"{own.attention_gpus}:{own.expert_gpus}"] * bool(own.attention_gpus)
    return " ".join(parts) + f" {own.link_gb_per_s:g} GB/s"


def shown(value: float | None) -> str:
    """Three digits that count; ``-`` for what is unknown."""
    return "-" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def write_budget(outcome: Outcome, book: PriceBook) -> None:
    """Write one deployment's budget of time, money and memory."""
    out = console()
    own = outcome.deployment
    write_lines({"deployment": own.id, "what": own.label, "requests": f"{own.step_requests:,} at a time"}, out)
    for title, rows in budget_rows(outcome, book.unit).items():
        say("", out)
        say(title, out, "bold")
        write_table(rows, right=range(1, len(rows[0])))
    say("", out)
    figures = {
        "tokens/s": f"{outcome.tokens_per_s:,.0f}, {outcome.per_gpu:,.0f} for each GPU",
        f"{book.unit}/h": shown(outcome.usd_per_hour),
        f"{book.unit}/Mtoken": shown(outcome.usd_per_million),
        "tokens/J": shown(outcome.per_watt),
        **{name: shown(value) for name, value in outcome.details.items()},
    }
    write_lines(figures, out)
    for breach in outcome.breaches:
        say_wrapped(f"breaks {breach}", out, "yellow")


class PlanLog:
    """A line now and then while a search runs, on standard error."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._started = self._told = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Tell how far the search is."""
        now = time.monotonic()
        if not self._shown or (now - self._told < TELL_EVERY_S and progress.done < progress.total):
            return
        self._told = now
        last = progress.outcomes[-1].deployment.topology_name if progress.outcomes else ""
        print(f"{now - self._started:7.1f}s  {progress.done:,}/{progress.total:,}  {last}", file=sys.stderr)
