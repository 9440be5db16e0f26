"""What a person reads: the solver's log, tables, JSON on standard output."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moeplace.diff import Change, move_terms
from moeplace.front import Front
from moeplace.migration import Schedule
from moeplace.objective import load_ratio
from moeplace.problem import Problem
from moeplace.solution import Incumbent, Report, Solution, relative_gap

GAP_BETWEEN = "  "
LOG_EVERY_S = 0.5
BUSIEST_LINKS = 12  # shown; a document has all
MIN_TEXT_WIDTH = 24
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
TRAFFIC_WORDS = {
    "cross_gpu_share": "pairs across GPUs",
    "cross_node_share": "pairs across nodes",
    "copies_per_token_gpu": "GPUs per token",
    "copies_per_token_node": "nodes per token",
    "next_layer_locality": "next-layer locality",
}


class PipeConsole(Console):
    """A console that leaves a reader who has gone (``| head``) to the command line, which ends quietly."""

    def on_broken_pipe(self) -> None:
        """Raise what was caught instead of ending the program with an error."""
        raise BrokenPipeError


def console(*, err: bool = False) -> Console:
    """A console on standard output or error; colours only on a terminal, and never with NO_COLOR."""
    return PipeConsole(file=sys.stderr if err else sys.stdout, highlight=False)


def write_json(document: Mapping[str, Any]) -> None:
    """Write one JSON document with sorted keys to standard output."""
    sys.stdout.write(json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def say(text: str, out: Console, style: str = "") -> None:
    """Write one line as it is: no markup, and no wrapping of our own (a pipe keeps it whole)."""
    out.print(Text(text, style), soft_wrap=True)


def say_parts(parts: Iterable[tuple[str, str]], out: Console) -> None:
    """Write one line of texts that each have a style of their own."""
    out.print(Text.assemble(*parts), soft_wrap=True)


def say_wrapped(text: str, out: Console, style: str = "", *, indent: str = "") -> None:
    """Write a sentence: whole in a pipe, wrapped at words on a terminal, further lines with an indent."""
    room = width_of(out)
    for line in [text] if room is None else _wrapped(text, room, indent):
        say(line, out, style)


def _wrapped(text: str, room: int, indent: str = "") -> list[str]:
    """Lines of at most ``room`` columns where words allow; no line begins with a percent sign."""
    kept = text.replace(" %", "\u00a0%")
    lines = textwrap.wrap(kept, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\u00a0%", " %") for line in lines] or [""]


def write_lines(pairs: Mapping[str, str] | Sequence[tuple[str, str]], out: Console) -> None:
    """Write ``label  text`` lines, labels aligned; a terminal gets long texts wrapped beneath themselves."""
    lines = list(pairs.items()) if isinstance(pairs, Mapping) else pairs
    for line in align(lines, right=(), width=width_of(out)):
        say(line, out)


def align(rows: Sequence[Sequence[str]], *, right: Iterable[int], width: int | None = None) -> list[str]:
    """Lines of a table with two spaces between columns and nothing behind the last.

    Parameters
    ----------
    rows
        Cells, the same number in every row.
    right
        Numbers of the columns that are aligned right.
    width
        Width of a terminal: a last column aligned left is wrapped to it where there is room; None never wraps.
    """
    to_right = set(right)
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    indent = sum(widths[:-1]) + len(GAP_BETWEEN) * last
    room = None if width is None or last in to_right or width - indent < MIN_TEXT_WIDTH else width - indent
    lines = []
    for row in rows:
        cells = [_pad(cell, widths[i], i in to_right) for i, cell in enumerate(row[:-1])]
        tail = _pad(row[-1], widths[last], True) if last in to_right else row[-1]
        parts = _wrapped(tail, room) if room else [tail]
        lines.append(GAP_BETWEEN.join([*cells, parts[0]]).rstrip())
        lines += [" " * indent + part for part in parts[1:]]
    return lines


def _pad(cell: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def width_of(out: Console) -> int | None:
    """Columns of a terminal; None for a pipe, which takes lines of any length."""
    return out.width if out.is_terminal else None


def write_table(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> None:
    """Write a table with a bold head to standard output; where a terminal is too narrow, columns go beneath each other.

    The first column is then repeated, so that every line can be read by itself.
    """
    out, to_right = console(), set(right)
    room = width_of(out)
    widths = [max(map(cell_len, column)) + len(GAP_BETWEEN) for column in zip(*rows, strict=True)]
    wraps = len(widths) - 1 not in to_right
    groups: list[list[int]] = [[0]]
    used = widths[0]
    for column in range(1, len(widths)):
        needed = MIN_TEXT_WIDTH if wraps and column == len(widths) - 1 else widths[column]
        if room is not None and len(groups[-1]) > 1 and used + needed - len(GAP_BETWEEN) > room:
            groups.append([0])
            used = widths[0]
        groups[-1].append(column)
        used += needed
    for number, group in enumerate(groups):
        chosen = [[row[column] for column in group] for row in rows]
        shifted = [place for place, column in enumerate(group) if column in to_right]
        head, *lines = align(chosen, right=shifted, width=room)
        if number:
            say("", out)
        say(head, out, "bold")
        for line in lines:
            say(line, out)


def number(value: float) -> str:
    """A number with at most four decimals and six digits that count: ``0.8756``, ``1,178.50``, ``134,056``."""
    if not math.isfinite(value):
        return str(value)
    digits = 4 if abs(value) < 100 else max(0, 5 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def write_plan(instance: Mapping[str, str], assumed: Sequence[str], noted: Sequence[str], out: Console) -> None:
    """Write an instance, what was assumed of it, and what is to be noted of its trace."""
    write_lines(instance, out)
    for label, sentences in (("assumed", assumed), ("note", noted)):
        for sentence in sentences:
            say_wrapped(f"{label}: {sentence}", out, "yellow", indent="  ")


class SolveLog(Report):
    """The live log: assumptions first, one line per improvement, then status and stop reason in words."""

    def __init__(self, *, shown: bool) -> None:
        super().__init__()
        self.shown = shown
        self._out = console(err=True)
        self._live = self._out.is_terminal
        self._status_width = 0
        self._unit: str | None = None
        self._shown_at = -LOG_EVERY_S
        self._held: str | None = None

    def head(self, instance: Mapping[str, str], assumed: Sequence[str], noted: Sequence[str] = ()) -> None:
        """Write the instance, what was assumed, and what is to be noted of the trace."""
        if self.shown:
            self._clear()
            write_plan(instance, assumed, noted, self._out)

    def stage(self, name: str, detail: str = "") -> None:
        """Announce a stage."""
        if self.shown:
            self._clear()
            self._show_held()
            say(f"{self.seconds:7.1f}s  {name}: {detail}" if detail else f"{self.seconds:7.1f}s  {name}", self._out)

    def progress(self, done: float, total: float, what: str) -> None:
        """Show how far a stage is, on one line that is overwritten."""
        if self.shown and self._live:
            text = f"{self.seconds:7.1f}s  {what} {done:g}/{total:g}"[: self._out.width - 1]
            sys.stderr.write("\r" + text.ljust(self._status_width))
            sys.stderr.flush()
            self._status_width = len(text)

    def improved(self, source: str, objective: float, **details: Any) -> None:
        """Write one improvement."""
        super().improved(source, objective, **details)
        if self.shown:
            self._clear()
            entry = self.history[-1]
            if entry.unit != self._unit:
                self._show_held()
                self._unit = entry.unit
                self._shown_at = -LOG_EVERY_S
                say(_log_head(entry), self._out, "bold")
            self._held = _improvement(entry)
            if self.seconds - self._shown_at >= LOG_EVERY_S:
                self._show_held()
                self._shown_at = self.seconds

    def _show_held(self) -> None:
        """Write the last improvement that was held back: a quick run of them is shown by its first and last."""
        if self._held is not None:
            say(self._held, self._out)
            self._held = None

    def tail(self, solution: Solution, problem: Problem) -> None:
        """Write the answer if the log is shown."""
        if self.shown:
            self._clear()
            self._show_held()
            self.summary(solution, problem)

    def summary(self, solution: Solution, problem: Problem) -> None:
        """Write status, stop reason, objective, bound, gap and the terms."""
        lines = {
            "status": STATUS_WORDS[solution.status],
            "stopped": f"{STOP_WORDS[solution.stop_reason]} ({solution.solver}, seed {solution.seed})",
        }
        if solution.placement is not None:
            bound = "none known" if solution.bound is None else number(solution.bound)
            gap = "" if solution.gap is None else f", gap {solution.gap:.3%}"
            lines["objective"] = f"{number(solution.objective)} {solution.unit}; bound {bound}{gap}"
            worst = load_ratio(problem, solution.placement)
            lines["load max/mean"] = f"{worst.mean():.4f} mean over layers, {worst.max():.4f} worst"
            figures = f"balancedness {(1 / worst).mean():.4f}, imbalance ratio {worst.mean() - 1:.4f}"
            lines["load"] = f"{figures}, mean over layers (mean/max, and (max - mean)/mean)"
            for name, term in solution.terms.items():
                if not name.startswith("load"):
                    label = TRAFFIC_WORDS.get(name, name.removesuffix("_us").replace("_", " "))
                    lines[label] = f"{number(term.value)} {term.unit}"
            lines |= _moves(problem, solution)
        for stage in solution.stages:
            shown = "unknown" if stage.gap is None else f"{stage.gap:.3%}"
            lines[stage.name] = f"{number(stage.objective)} {stage.unit}, {stage.status}, gap {shown}"
            lines[stage.name] += f", {STOP_WORDS[stage.stop_reason]}"
        write_lines(lines, self._out)
        for note in solution.notes:
            say(f"note: {note}", self._out)

    def front(self, front: Front) -> None:
        """Write the trade between load and traffic, its certified corner last."""
        if not self.shown:
            return
        self._clear()
        self._show_held()
        more = {"node_traffic": f"{front.traffic} by node", "mean_us": "mean [µs]", "p99_us": "p99 [µs]"}
        more = {name: title for name, title in more.items() if getattr(front.points[0], name) is not None}
        head = ["least", "cap", "load max/mean", f"{front.traffic} [{front.unit}]", "step time [µs]", "bound"]
        rows = [[*head, *more.values(), ""]]
        for i, one in enumerate(front.points):
            told = "least step time" if i == front.chosen else "" if one.on_front else "beaten"
            bound = "-" if one.bound is None else number(one.bound)
            cap = "none" if one.cap is None else number(one.cap)
            figures = [cap, *map(number, (one.load, one.traffic, one.step_time_us)), bound]
            rows.append([one.minimised, *figures, *(number(getattr(one, name)) for name in more), told])
        floor, least, soonest = map(number, (front.load_floor, front.traffic_bound, front.step_time_bound_us))
        rows.append(
            ["no less than", "", floor, least, soonest, "", *("" for _ in more), "certified for every placement"]
        )
        for line in align(rows, right=range(1, 6 + len(more)), width=width_of(self._out)):
            say(line, self._out)

    def end(self, sentence: str) -> None:
        """Write where the placement went, if the log is shown."""
        if self.shown:
            say(sentence, self._out)

    def _clear(self) -> None:
        if self._status_width:
            sys.stderr.write("\r" + " " * self._status_width + "\r")
            self._status_width = 0


def _log_head(entry: Incumbent) -> str:
    figures = "  ".join(entry.figures)
    objective = f"objective [{entry.unit}]" if entry.unit else "objective"
    return f"{'time':>8}  {'source':<14} {objective:>22} {'bound':>12} {'gap':>7}  {figures}".rstrip()


def _improvement(entry: Incumbent) -> str:
    bound = "-" if entry.bound is None else number(entry.bound)
    gap = relative_gap(entry.objective, entry.bound)
    shown = "-" if gap is None else f"{gap:.2%}"
    figures = "  ".join(f"{value:>{len(name)},.4g}" for name, value in entry.figures.items())
    value = number(entry.objective)
    return f"{entry.seconds:7.1f}s  {entry.source:<14} {value:>22} {bound:>12} {shown:>7}  {figures}".rstrip()


def _moves(problem: Problem, solution: Solution) -> dict[str, str]:
    if solution.placement is None or problem.baseline is None:
        return {}
    terms = move_terms(problem, solution.placement)
    copies, total = int(terms["moved_copies"].value), int(solution.placement.used_slots().sum())
    volume = f"{terms['moved_bytes'].value / 1e9:,.2f} GB"
    return {"moves": f"{copies:,} of {total:,} copies ({copies / total:.1%}), {volume}, against the baseline"}


def diff_table(change: Change) -> None:
    """Write what moves, per GPU and over the busiest pairs of GPUs."""
    out = console()
    share = change.moved_copies / change.num_copies
    volume = "" if change.moved_bytes is None else f", {change.moved_bytes / 1e9:,.2f} GB"
    renamed = "" if change.order is None else ", GPUs renamed"
    say(f"{change.moved_copies:,} of {change.num_copies:,} copies move ({share:.1%}){volume}{renamed}", out)
    if change.order is not None and (change.order != range(len(change.order))).any():
        say(f"GPU of AFTER that each GPU takes on: {' '.join(map(str, change.order))}", out)
    arriving, leaving = change.arriving.sum(axis=0), change.leaving.sum(axis=0)
    if not arriving.any() and not leaving.any():
        return
    each = change.expert_bytes
    rows = [["GPU", "arriving", "leaving", *([] if each is None else ["arriving [GB]"])]]
    for gpu, (new, old) in enumerate(zip(arriving, leaving, strict=True)):
        rows.append([str(gpu), f"{new:,}", f"{old:,}", *_gigabytes(int(new), each)])
    write_table(rows, right=range(len(rows[0])))
    links = change.links()
    if links:
        say("", out)
        rows = [["link", "copies", *([] if each is None else ["GB"])]]
        rows += [[f"{a} → {b}", f"{count:,}", *_gigabytes(count, each)] for a, b, count in links[:BUSIEST_LINKS]]
        write_table(rows, right=range(1, len(rows[0])))
    if len(links) > BUSIEST_LINKS:
        say(f"and {len(links) - BUSIEST_LINKS:,} more pairs of GPUs (--json lists all)", out)


def schedule_table(schedule: Schedule) -> None:
    """Write how many rounds a change takes, and what each of the first ones does."""
    out, each = console(), schedule.expert_bytes
    spare = f"{schedule.spare_slots} spare {'slot' if schedule.spare_slots == 1 else 'slots'} per GPU"
    say(f"\n{len(schedule.rounds):,} rounds with {spare}; every expert keeps a copy throughout", out)
    rows = [["round", "drops", "loads", "busiest GPU loads", *([] if each is None else ["busiest GPU loads [GB]"])]]
    for number_of, one in enumerate(schedule.rounds[:BUSIEST_LINKS]):
        most = schedule.busiest_of(one)
        counts = [f"{count:,}" for count in (len(one.drops), len(one.loads), most)]
        rows.append([str(number_of), *counts, *_gigabytes(most, each)])
    write_table(rows, right=range(len(rows[0])))
    if len(schedule.rounds) > BUSIEST_LINKS:
        say(f"and {len(schedule.rounds) - BUSIEST_LINKS:,} more rounds (--json lists every copy)", out)


def _gigabytes(copies: int, each: float | None) -> list[str]:
    return [] if each is None else [f"{copies * each / 1e9:,.2f}"]
