"""What a person reads of scores: one table of all of them, one per topology and phase, one per layer."""

from __future__ import annotations

from collections.abc import Sequence

from moeplace.build import law_words, plural
from moeplace.comparison import Place, Row
from moeplace.execution import Execution
from moeplace.model import ModelSpec
from moeplace.report import TRAFFIC_WORDS, console, say, write_table
from moeplace.scoring import Score, excess_removed
from moeplace.tails import QUANTILES, Estimate, paired, risk_value, tail_steps
from moeplace.validated import Validated
from moeplace.validation import RIVAL

MIN_TAIL_STEPS = 10
LEGEND = "* the best of its column, its 95 % interval below all others'; over several seeds intervals are Student's t"
STEP_WORDS = {"mean": "mean", "p50": "p50", "p95": "p95", "p99": "p99", "cvar95": "CVaR95"}


def score_tables(
    scores: Sequence[Score], model: ModelSpec, *, recorded: bool = False, naive: bool = False, layers: bool = False
) -> None:
    """Write a table of all scores where there are several topologies or phases, then one for each of these.

    In the latter, rows are figures and columns placements. ``recorded`` says that the steps are the recorded ones, not
    drawn from tokens; ``naive`` adds what calculators assume, ``layers`` a table per score with a row for each layer.
    """
    groups: dict[tuple[str, str], list[Score]] = {}
    for entry in scores:
        groups.setdefault((entry.topology, entry.law.phase), []).append(entry)
    out = console()
    if len(groups) > 1:
        write_table(_overview(scores), right=range(1, 6))
        say("", out)
    for place, ((topology, phase), group) in enumerate(groups.items()):
        law = group[0].law
        if place:
            say("", out)
        drawn = f"{plural(law.batches, 'step')} of {law_words(law)}"
        steps = f"{law.batches:,} recorded steps of {law.requests:,} tokens on average" if recorded else drawn
        say(f"{topology}, {phase}: {steps}, {_execution_words(group[0])}, {model.name}", out, "bold")
        write_table(_score_rows(group, naive=naive), right=range(1, len(group) + 1))
        beyond = tail_steps(law.batches, QUANTILES["p99"])
        if beyond < MIN_TAIL_STEPS:
            more = "" if recorded else ", or use more --batches"
            say(f"p99 rests on {beyond:g} steps beyond it: read it with its interval{more}", out)
        for entry in group if layers else ():
            say(f"\n{entry.placement} on {topology}, {phase}, by layer", out, "bold")
            write_table(_layer_rows(entry), right=range(8))


def _execution_words(entry: Score) -> str:
    """``dispatch-combine``, and what of the execution is not as usual."""
    chosen, usual = entry.execution, Execution()
    unlike = [name for name in chosen.__slots__ if getattr(chosen, name) != getattr(usual, name) and name != "dataflow"]
    told = [f"{name.replace('_', '-')} {getattr(chosen, name)}" for name in unlike if name != "with_attention"]
    told += ["attention counted"] if chosen.with_attention else []
    return ", ".join([chosen.dataflow, *told])


def _overview(scores: Sequence[Score]) -> list[list[str]]:
    rows = [["step time [µs]", *STEP_WORDS.values(), "busiest"]]
    for entry in scores:
        cells = [plus_minus(entry.simulation.summary[name]) for name in STEP_WORDS]
        rows.append([f"{entry.placement} on {entry.topology}, {entry.law.phase}", *cells, _busiest(entry)])
    return rows


def _layer_rows(entry: Score) -> list[list[str]]:
    head = ["layer", "compute [µs]", "dispatch [µs]", "combine [µs]", "max/mean, step", "excess", "balancedness"]
    rows = [[*head, "max/mean, trace"]]
    for row, whole in zip(entry.simulation.layers, entry.max_over_mean, strict=True):
        times = [f"{getattr(row, f'{part}_us'):,.1f}" for part in ("compute", "dispatch", "combine")]
        excess = row.max_over_mean - entry.simulation.noise_floor
        loads = [row.max_over_mean, excess, row.balancedness, float(whole)]
        rows.append([str(row.layer_id), *times, *[f"{load:.4f}" for load in loads]])
    return rows


def comparison_tables(rows: Sequence[Row]) -> None:
    """Write one table per trace, topology and phase; a star marks the best where its interval lies below all others."""
    out = console()
    for number, (title, table) in enumerate(comparison_rows(rows)):
        if number:
            say("", out)
        say(title, out, "bold")
        write_table(table, right=range(1, len(table[0])))
    if rows:
        say(f"\n{LEGEND}", out)


def comparison_rows(rows: Sequence[Row]) -> list[tuple[str, list[list[str]]]]:
    """Title and cells of each table, a row per solver."""
    tables: dict[Place, list[list[str]]] = {}
    for row in rows:
        if row.place not in tables:
            head = [f"step {words} [µs]" for words in STEP_WORDS.values()]
            tables[row.place] = [["solver", *head, "mean against first", "load max/mean", "excess", "gap", "solve [s]"]]
        cells = [plus_minus(row.step_us[name]) + ("*" if name in row.best else " ") for name in STEP_WORDS]
        change = "-" if row.change is None else change_words(row.change)
        gap = "-" if row.worst_gap is None else f"{row.worst_gap:.2%}"
        loads = [f"{row.max_over_mean.value:.4f}", f"{row.excess.value:.4f}"]
        tables[row.place].append([row.solver, *cells, change, *loads, gap, f"{row.solve_s:,.2f}"])
    seeds = {row.place: max(len(row.seeds), 1) for row in rows}
    return [(f"{place}, {plural(seeds[place], 'seed')}", table) for place, table in tables.items()]


SUITE_FACTS = {
    "load std": "load_std",
    "pairs cross-node": "cross_node_share",
    "cross-GPU": "cross_gpu_share",
    "GPU copies": "copies_per_token_gpu",
    "node copies": "copies_per_token_node",
    "to other nodes": "remote_copies_per_token",
}
SUITE_LEGEND = (
    "load of GPUs on held-out requests (std over mean), shares of consecutive pairs, copies per token and those sent "
    "to other nodes than its own, experts beyond one copy, and copies that move"
)


def suite_tables(rows: Sequence[Row]) -> None:
    """Write one table per trace, topology and phase: a line per method, its load, traffic, times, memory and moves."""
    out = console()
    for number, place in enumerate(dict.fromkeys(row.place for row in rows)):
        group = [row for row in rows if row.place == place]
        if number:
            say("", out)
        say(f"{place}, {plural(max(len(row.seeds) for row in group), 'seed')}", out, "bold")
        table = [["method", "max/mean", *SUITE_FACTS, "mean [µs]", "p99 [µs]", "extra", "moves", "solve [s]"]]
        for row in group:
            told = [f"{row.facts[name]:.4f}" if name in row.facts else "-" for name in SUITE_FACTS.values()]
            times = [f"{row.step_us[name].value:,.1f}" for name in ("mean", "p99")]
            extra = f"{row.facts.get('extra_copies', 0):,.0f}"
            extra += f" = {row.facts['extra_gb']:.2f} GB" if "extra_gb" in row.facts else ""
            ends = [extra, f"{row.facts.get('moves', 0):,.0f}", f"{row.solve_s:,.2f}"]
            table.append([row.solver, f"{row.max_over_mean.value:.4f}", *told, *times, *ends])
        write_table(table, right=range(1, len(table[0])))
    if rows:
        say(f"\n{SUITE_LEGEND}", out)


def validation_tables(found: Sequence[Validated]) -> None:
    """Write one table per trace and topology, a line per solver and fit, and for each what it comes to."""
    out = console()
    for title, table in validation_rows(found):
        say(f"\n{title}", out, "bold")
        write_table(table, right=range(2, 6))
    for one in found:
        if one.validation is not None and one.trial.solver != RIVAL:
            say(f"\n{one.trial.solver} on {one.trial.topology}, {one.trial.trace}: {one.validation.sentence()}", out)


def validation_rows(found: Sequence[Validated]) -> list[tuple[str, list[list[str]]]]:
    """Title and cells of each table."""
    tables: dict[str, list[list[str]]] = {}
    for one in found:
        if one.validation is None:
            continue
        title = f"{one.trial.trace} on {one.trial.topology}: gain over {RIVAL} in the objective, on the other requests"
        rows = tables.setdefault(title, [["solver", *one.validation.rows()[0]]])
        rows += [[one.trial.solver, *line] for line in one.validation.lines()]
    return list(tables.items())


def comparison_markdown(rows: Sequence[Row], found: Sequence[Validated] = ()) -> str:
    """Return the same tables as Markdown, those of validations after them."""
    parts = []
    for title, (head, *lines) in [*comparison_rows(rows), *validation_rows(found)]:
        rule = ["---", *["---:"] * (len(head) - 1)]
        cells = "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in [head, rule, *lines])
        parts.append(f"## {title}\n\n{cells}\n")
    return "\n".join([*parts, f"\\{LEGEND}.\n"])


def plus_minus(value: Estimate) -> str:
    """``1,234.5 ± 12.3``: a value, and how far its interval reaches at most."""
    half = max(value.high - value.value, value.value - value.low)
    return f"{value.value:,.1f} ± {half:,.1f}"


def _score_rows(group: Sequence[Score], *, naive: bool) -> list[list[str]]:
    rows = [["figure", *[entry.placement for entry in group]]]
    for name, words in STEP_WORDS.items():
        rows.append([f"step {words} [µs]", *[plus_minus(entry.simulation.summary[name]) for entry in group]])
    if len(group) > 1:
        base = group[0].simulation.step_us
        rows.append(["mean against first", *[change_words(paired(e.simulation.step_us, base)) for e in group]])
    if naive and group[0].naive is not None:
        assumed = [0.0 if e.naive is None else e.naive.total_us + e.simulation.attention_us for e in group]
        rows.append(["naive step [µs]", *[f"{time:,.1f}" for time in assumed]])
        for name in ("mean", "p99"):
            times = [entry.simulation.summary[name].value for entry in group]
            ratios = [f"{time / bare:.3f}" for time, bare in zip(times, assumed, strict=True)]
            rows.append([f"{name} over naive", *ratios])
    for part in ("compute", "dispatch", "combine"):
        totals = [sum(getattr(row, f"{part}_us") for row in e.simulation.layers) for e in group]
        rows.append([f"{part} [µs]", *[f"{total:,.1f}" for total in totals]])
    rows.append(["load max/mean, trace", *[f"{e.max_over_mean.mean():.4f}" for e in group]])
    rows.append(["balancedness, trace", *[f"{(1 / e.max_over_mean).mean():.4f}" for e in group]])
    rows.append(["imbalance ratio, trace", *[f"{e.max_over_mean.mean() - 1:.4f}" for e in group]])
    rows.append(["load max/mean, step", *[f"{e.step_max_over_mean:.4f}" for e in group]])
    rows.append(["noise floor", *[f"{e.simulation.noise_floor:.4f}" for e in group]])
    rows.append(["excess over it", *[f"{e.excess:.4f}" for e in group]])
    tails = [risk_value(e.simulation.step_max_over_mean, "p99") for e in group]
    rows.append(["load max/mean, p99 step", *[f"{tail:.4f}" for tail in tails]])
    if len(group) > 1:
        removed = [excess_removed(e, group[0])["step_max_over_mean"] for e in group]
        for name in ("mean", "p99"):
            shares = ["-" if one[name] is None else f"{one[name]:.1%}" for one in removed]
            rows.append([f"excess removed, {name} step", *shares])
    for name, words in TRAFFIC_WORDS.items():
        values = [getattr(e.traffic, name) for e in group]
        if any(value is not None for value in values):
            rows.append([words, *["-" if value is None else f"{value:.4f}" for value in values]])
    rows.append(["busiest", *[_busiest(e) for e in group]])
    return rows


def change_words(change: Estimate) -> str:
    """``-1.23 % ± 0.04``: a relative change, and its interval's half width in percent."""
    half = max(change.high - change.value, change.value - change.low)
    return f"{change.value:+.2%} ± {100 * half:.2f}"


def _busiest(entry: Score) -> str:
    ranked = entry.simulation.bottlenecks
    return f"{ranked[0][0]} {ranked[0][1]:.0%}" if ranked else "-"
