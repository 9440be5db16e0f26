"""What a person reads: the solver's log, tables, JSON on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moeplace.diff import Change
from moeplace.metrics import max_over_mean
from moeplace.model import ModelSpec
from moeplace.problem import Problem
from moeplace.scoring import Score
from moeplace.solution import Incumbent, Report, Solution, relative_gap
from moeplace.summary import TraceSummary
from moeplace.tails import QUANTILES, tail_steps

PIPE_WIDTH = 120
MIN_TAIL_STEPS = 10
LOG_HEAD = f"{'time':>8}  {'source':<22} {'objective':>14} {'bound':>14} {'gap':>8}  figures"
STATUS_WORDS = {
    "optimal": "optimal: no placement is better",
    "feasible": "feasible: valid, and no worse than the gap says",
    "infeasible": "infeasible: proven to have no answer",
    "unknown": "unknown: no answer was found, none was excluded",
}
STOP_WORDS = {
    "proven": "bound and objective meet",
    "gap": "the gap asked for is reached",
    "time limit": "the time limit cut the run; another run may differ",
    "interrupted": "interrupted; this is the best so far",
    "exhausted": "the method's work is done",
}


def console(*, err: bool = False) -> Console:
    """A console on standard output or error, wide enough for tables when it is a pipe."""
    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def write_json(document: Mapping[str, Any]) -> None:
    """Write one JSON document with sorted keys to standard output."""
    sys.stdout.write(json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def write_lines(pairs: Mapping[str, str], out: Console) -> None:
    """Write ``label  text`` lines, labels aligned."""
    width = max(map(len, pairs), default=0)
    for label, text in pairs.items():
        out.print(f"{label:<{width}}  {text}", markup=False)


class SolveLog(Report):
    """The live log: assumptions first, one line per improvement, then status and stop reason in words."""

    def __init__(self, *, shown: bool) -> None:
        super().__init__()
        self.shown = shown
        self._out = console(err=True)
        self._live = sys.stderr.isatty()
        self._status_width = 0

    def head(self, instance: Mapping[str, str], assumed: Sequence[str]) -> None:
        """Write the instance and what was assumed."""
        if self.shown:
            write_lines(instance, self._out)
            for sentence in assumed:
                self._out.print(f"assumed: {sentence}", style="yellow", markup=False)

    def stage(self, name: str, detail: str = "") -> None:
        """Announce a stage."""
        if self.shown:
            self._clear()
            self._out.print(f"{self.seconds:7.1f}s  {name}: {detail}" if detail else f"{self.seconds:7.1f}s  {name}")

    def progress(self, done: float, total: float, what: str) -> None:
        """Show how far a stage is, on one line that is overwritten."""
        if self.shown and self._live:
            text = f"{self.seconds:7.1f}s  {what} {done:g}/{total:g}"
            sys.stderr.write("\r" + text.ljust(self._status_width))
            sys.stderr.flush()
            self._status_width = len(text)

    def improved(self, source: str, objective: float, **details: Any) -> None:
        """Write one improvement."""
        super().improved(source, objective, **details)
        if self.shown:
            self._clear()
            if len(self.history) == 1:
                self._out.print(LOG_HEAD, style="bold", markup=False)
            self._out.print(_improvement(self.history[-1]), markup=False)

    def tail(self, solution: Solution, problem: Problem) -> None:
        """Write the answer if the log is shown."""
        if self.shown:
            self._clear()
            self.summary(solution, problem)

    def summary(self, solution: Solution, problem: Problem) -> None:
        """Write status, stop reason, objective, bound, gap and the terms."""
        lines = {
            "status": STATUS_WORDS[solution.status],
            "stopped": f"{STOP_WORDS[solution.stop_reason]} ({solution.solver}, seed {solution.seed})",
        }
        if solution.placement is not None:
            bound = "none known" if solution.bound is None else f"{solution.bound:,.4f}"
            gap = "" if solution.gap is None else f", gap {solution.gap:.3%}"
            lines["objective"] = f"{solution.objective:,.4f} {solution.unit}; bound {bound}{gap}"
            worst = max_over_mean(solution.placement, problem.stats.load)
            lines["load"] = f"max/mean {worst.mean():.4f} mean over layers, {worst.max():.4f} worst"
            for name, term in solution.terms.items():
                if not name.startswith("load"):
                    lines[name.removesuffix("_us").replace("_", " ")] = f"{term.value:,.4f} {term.unit}"
        for stage in solution.stages:
            shown = "unknown" if stage.gap is None else f"{stage.gap:.3%}"
            lines[stage.name] = f"{stage.objective:,.4f} {stage.unit}, {stage.status}, gap {shown}, {stage.stop_reason}"
        write_lines(lines, self._out)
        for note in solution.notes:
            self._out.print(f"note: {note}", markup=False)

    def _clear(self) -> None:
        if self._status_width:
            sys.stderr.write("\r" + " " * self._status_width + "\r")
            self._status_width = 0


def _improvement(entry: Incumbent) -> str:
    bound = "-" if entry.bound is None else f"{entry.bound:,.4f}"
    gap = relative_gap(entry.objective, entry.bound)
    shown = "-" if gap is None else f"{gap:.2%}"
    figures = ", ".join(f"{name} {value:,.4g}" for name, value in entry.figures.items())
    value = f"{entry.objective:,.4f}"
    return (
        f"{entry.seconds:7.1f}s  {entry.source:<22} {value:>14} {bound:>14} {shown:>8}  {entry.unit} {figures}".rstrip()
    )


def score_tables(scores: Sequence[Score], model: ModelSpec) -> None:
    """Write one table per topology and phase: rows are figures, columns placements."""
    out = console()
    groups: dict[tuple[str, str], list[Score]] = {}
    for entry in scores:
        groups.setdefault((entry.topology, entry.law.phase), []).append(entry)
    for (topology, phase), group in groups.items():
        law = group[0].law
        out.print(
            f"{topology}, {phase}: {law.batches} steps of {law.requests} requests × {law.tokens} tokens, "
            f"{group[0].dataflow}, {model.name}",
            style="bold",
            markup=False,
        )
        out.print(_score_table(group))
        beyond = tail_steps(law.batches, QUANTILES["p99"])
        if beyond < MIN_TAIL_STEPS:
            out.print(f"p99 rests on {beyond:g} steps beyond it: read it with its interval, or use more --batches")


def _score_table(group: Sequence[Score]) -> Table:
    table = Table("figure", *[entry.placement for entry in group], box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", False
    for name in ("mean", "p50", "p95", "p99", "cvar95"):
        cells = []
        for entry in group:
            value = entry.simulation.summary[name]
            half = max(value.high - value.value, value.value - value.low)
            cells.append(f"{value.value:,.1f} ± {half:,.1f}")
        table.add_row(f"step {name} [µs]", *cells)
    base = group[0].simulation.summary["mean"].value
    table.add_row("mean against first", *[_change(e.simulation.summary["mean"].value, base) for e in group])
    for part in ("compute", "dispatch", "combine"):
        totals = [sum(getattr(row, f"{part}_us") for row in e.simulation.layers) for e in group]
        table.add_row(f"{part} [µs]", *[f"{total:,.1f}" for total in totals])
    table.add_row("load max/mean, trace", *[f"{e.max_over_mean.mean():.4f}" for e in group])
    table.add_row("load max/mean, step", *[_step_load(e) for e in group])
    table.add_row("noise floor", *[f"{e.simulation.noise_floor:.4f}" for e in group])
    for name in group[0].traffic.__slots__:
        values = [getattr(e.traffic, name) for e in group]
        if any(value is not None for value in values):
            shown = ["-" if value is None else f"{value:.4f}" for value in values]
            table.add_row(name.replace("_", " "), *shown)
    table.add_row("busiest", *[_busiest(e) for e in group])
    return table


def _change(value: float, base: float) -> str:
    return f"{value / base - 1:+.2%}"


def _step_load(entry: Score) -> str:
    rows = entry.simulation.layers
    return f"{sum(row.max_over_mean for row in rows) / len(rows):.4f}"


def _busiest(entry: Score) -> str:
    ranked = entry.simulation.bottlenecks
    return f"{ranked[0][0]} {ranked[0][1]:.0%}" if ranked else "-"


def stats_tables(summary: TraceSummary, instance: Mapping[str, str]) -> None:
    """Write the trace's sizes and one row per layer."""
    out = console()
    write_lines(instance, out)
    head = ["layer", "hottest/mean", "variation", "top 10 %", f"GPU max/mean ({summary.num_gpus} GPUs)"]
    table = Table(*head, "top 20 % pairs", "if independent", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for row in summary.layers:
        table.add_row(
            str(row.layer_id),
            f"{row.expert_max_over_mean:.2f}",
            f"{row.variation:.2f}",
            f"{row.top_expert_share:.1%}",
            f"{row.gpu_max_over_mean:.3f}",
            "-" if row.top_pair_share is None else f"{row.top_pair_share:.1%}",
            "-" if row.top_pair_share_independent is None else f"{row.top_pair_share_independent:.1%}",
        )
    out.print(table)


def diff_table(change: Change) -> None:
    """Write what moves, per GPU."""
    out = console()
    share = change.moved_copies / change.num_copies
    volume = "" if change.moved_bytes is None else f", {change.moved_bytes / 1e9:,.2f} GB"
    out.print(f"{change.moved_copies:,} of {change.num_copies:,} copies move ({share:.1%}){volume}", markup=False)
    table = Table("GPU", "arriving", "leaving", box=None, pad_edge=False)
    arriving, leaving = change.arriving.sum(axis=0), change.leaving.sum(axis=0)
    for gpu, (new, old) in enumerate(zip(arriving, leaving, strict=True)):
        table.add_row(str(gpu), str(new), str(old))
    out.print(table)


def name_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a plain table."""
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console().print(table)
