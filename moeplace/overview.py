"""The terminal view of ``moeplace stats``: tables, heat lines, and what the sample, the patterns and the checks say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from moeplace.build import plural
from moeplace.checks import Finding
from moeplace.frozen import Ints
from moeplace.heat import BLOCKS, MEANINGS, STYLES, heat_of
from moeplace.insight import OVERLAPS, Pattern, TraceInsight
from moeplace.parts import CHUNK_TOKENS
from moeplace.report import GAP_BETWEEN, console, say, say_parts, say_wrapped, width_of, write_lines, write_table
from moeplace.summary import TraceSummary

PIPE_COLUMNS = 80  # heat lines have no natural width: in a pipe they take what every terminal shows
AFFINITY = (
    "with the next layer: bits shared, lift, share of the busiest 20 % of pairs; "
    "together: share of the busiest 10 % of pairs within the layer"
)


def write_overview(
    summary: TraceSummary, insight: TraceInsight, instance: Mapping[str, str], load: Ints | None = None
) -> None:
    """Write the trace's sizes, its tables, and what kind of sample it is.

    Parameters
    ----------
    summary, insight
        What was measured.
    instance
        The trace in words.
    load
        ``[layer, expert]`` selections, to be shown as heat lines; None leaves them out.
    """
    write_lines(instance, console())
    _section("load")
    _write_load(summary)
    if load is not None:
        _section("heat")
        _write_heat(load, [row.layer_id for row in summary.layers])
    if any(row.lift is not None or row.coactivation_share is not None for row in summary.layers):
        _section("affinity", AFFINITY)
        _write_affinity(summary)
    _section("sample")
    write_lines(sample_lines(insight), console())


def write_remarks(patterns: Sequence[Pattern], findings: Sequence[Finding]) -> None:
    """Write what the trace shows of the published patterns, and what looks wrong with it."""
    out = console()
    _section("patterns")
    for pattern in patterns:
        say_wrapped(str(pattern), out, indent="   ")
    _section("checks")
    for finding in findings:
        say_wrapped(str(finding), out, "yellow" if finding.level == "warning" else "", indent="   ")
    if not findings:
        say("nothing looks wrong with the trace", out)


def _section(name: str, text: str = "") -> None:
    out = console()
    say("", out)
    say(name, out, "bold")
    if text:
        say_wrapped(text, out, "dim")


def _write_load(summary: TraceSummary) -> None:
    rows = [["layer", "max/mean", "CV", "Gini", "top 10 %", "GPU max/mean", "balancedness", "imbalance"]]
    for row in summary.layers:
        figures = (row.expert_max_over_mean, row.variation, row.gini)
        gpus = (row.gpu_max_over_mean, row.gpu_balancedness, row.gpu_max_over_mean - 1)
        cells = [*[f"{x:.2f}" for x in figures], f"{row.top_expert_share:.1%}", *[f"{x:.3f}" for x in gpus]]
        rows.append([str(row.layer_id), *cells])
    write_table(rows, right=range(len(rows[0])))


def _write_affinity(summary: TraceSummary) -> None:
    head = ["layer", "bits", "chance", "lift", "top 20 %", "popularity", "together", "popularity"]
    rows = [head]
    for row in summary.layers:
        bits = (row.mutual_information, row.information_bias)
        shares = (row.top_pair_share, row.top_pair_share_independent)
        together = (row.coactivation_share, row.coactivation_share_independent)
        cells = [*[_shown(x, ".4f") for x in bits], _shown(row.lift, ".2f")]
        rows.append([str(row.layer_id), *cells, *[_shown(x, ".1%") for x in (*shares, *together)]])
    known = [i for i in range(len(head)) if any(row[i] != "-" for row in rows[1:])]
    write_table([[row[i] for i in known] for row in rows], right=range(len(known)))


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _write_heat(load: Ints, layer_ids: Sequence[int]) -> None:
    out = console()
    columns = width_of(out) or PIPE_COLUMNS
    labels = [str(layer) for layer in layer_ids]
    indent = max(map(len, labels)) + len(GAP_BETWEEN)
    heat = heat_of(load, columns - indent)
    size = heat.experts_per_cell
    each = "expert: its load" if size == 1 else f"{size} experts: their mean load"
    say_wrapped(f"a block for each {each} over the layer's mean", out, "dim")
    for line in _legend(columns):
        say_parts(line, out)
    for label, levels in zip(labels, heat.level.tolist(), strict=True):
        runs = [(BLOCKS[level] * len(list(run)), STYLES[level]) for level, run in groupby(levels)]
        say_parts([(label.rjust(indent - len(GAP_BETWEEN)) + GAP_BETWEEN, ""), *runs], out)


def _legend(columns: int) -> list[list[tuple[str, str]]]:
    """Lines of styled texts that tell what each block stands for, no entry broken."""
    lines: list[list[tuple[str, str]]] = [[]]
    used = 0
    for block, meaning, style in zip(BLOCKS, MEANINGS, STYLES, strict=True):
        needed = len(f"{block} {meaning}{GAP_BETWEEN}")
        if lines[-1] and used + needed - len(GAP_BETWEEN) > columns:
            lines.append([])
            used = 0
        lines[-1] += [(block, style), (f" {meaning}{GAP_BETWEEN}", "dim")]
        used += needed
    return [[*line[:-1], (line[-1][0].rstrip(), line[-1][1])] for line in lines]


def sample_lines(insight: TraceInsight) -> dict[str, str]:
    """What kind of sample a trace is, in words by label: how much it supports, and how far its parts differ."""
    sample = insight.sample
    told = {"tokens": plural(insight.num_tokens, "token")}
    if insight.num_requests:
        told["tokens"] += f" of {plural(insight.num_requests, 'request')}"
    if sample.design_effect is not None:
        told["tokens"] += (
            f" count as {sample.effective_tokens:,.0f} independent ones (design effect {sample.design_effect:.1f})"
        )
    told["error"] = f"±{sample.relative_error:.1%} of an average expert's load (standard error)"
    told["error"] += "" if sample.design_effect is not None else ", if its tokens are independent"
    if sample.warning:
        told["warning"] = sample.warning
    told["drift"] = f"unknown: the trace is shorter than two chunks of {CHUNK_TOKENS:,} tokens"
    if insight.drift:
        told["drift"] = (
            f"total variation of chunks of {CHUNK_TOKENS:,} tokens or more: median {np.median(insight.drift):.3f}, "
            f"max {max(insight.drift):.3f}; by chance {np.median(insight.drift_noise):.3f}"
        )
    if insight.most_distant is not None:
        distances = insight.pair_distances
        told["domains"] = (
            f"total variation of each two of {len(insight.domains)}: min {min(distances):.3f}, "
            f"median {np.median(distances):.3f}, max {max(distances):.3f} ({' and '.join(insight.most_distant)})"
        )
    if insight.phases is not None:
        rho = insight.phases.rank_correlation
        tops = "/".join(map(str, OVERLAPS))
        shares = "/".join(f"{100 * np.mean(row):.0f}" for row in insight.phases.overlap)
        told["phases"] = (
            f"prefill and decode: Spearman's ρ median {np.median(rho):.2f}, min {min(rho):.2f}; "
            f"top {tops} overlap {shares} %"
        )
    return told
