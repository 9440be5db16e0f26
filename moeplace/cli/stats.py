"""``moeplace stats``: what a trace says."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from moeplace.cli.corpora import count_source
from moeplace.cli.inputs import choices_of, open_source, warn
from moeplace.cli.options import common, hardware, option, threads, trace_input

STATS_EPILOG = """\b
Examples:
  moeplace stats trace.npz
  moeplace stats trace.jsonl.zst --phase decode --num-gpus 16 --json
  moeplace stats profiling_result/ --cluster tcp://10.0.0.1:8786
"""


@click.command("stats", epilog=STATS_EPILOG)
@trace_input
@hardware
@option("--phase", type=click.Choice(["prefill", "decode"]), help="Use only tokens of this phase.")
@option("--fit", metavar="SPLIT", help="Use the fit part of a split: half:SEED, domain:NAME,… or time:FRACTION.")
@option("--heat/--no-heat", default=True, help="Draw a line of blocks per layer, one block for each expert.")
@threads
@common
def stats_command(trace: str, fit: str | None, heat: bool, **options: Any) -> None:
    """Show what a routing trace says.

    Per layer, the load: the hottest expert over the mean, coefficient of variation, Gini coefficient, share of the
    busiest tenth; and over GPUs with contiguous experts, max/mean, balancedness (mean/max) and imbalance ratio
    ((max - mean)/mean). Then affinity: bits of mutual information with the next layer beside what chance shows, lift,
    and the shares of the busiest pairs beside what popularity alone would give.

    Then how much the sample supports and how far its chunks, domains and phases differ, what it shows of six published
    patterns, beside the published figures (arXiv 2510.05497), and what looks wrong with it.
    """
    from moeplace.build import describe_trace, model_for, topology_for
    from moeplace.checks import check_trace
    from moeplace.insight import measure_trace, patterns
    from moeplace.overview import write_overview, write_remarks
    from moeplace.report import write_json
    from moeplace.summary import summarise_trace

    source = open_source(trace, options, split=fit, walked_once=True)
    stats, profile, bad = count_source(source, options)
    insight = measure_trace(stats, profile)
    findings = check_trace(source, stats, profile.loops, model_for(stats.meta, options["model"]))
    topology = topology_for(choices_of(options), stats)
    summary = summarise_trace(stats, topology.num_gpus, insight)
    warn(stats.meta.assumptions, quiet=options["quiet"])
    if options["as_json"]:
        found = [asdict(finding) for finding in findings]
        left_out = {"bad_files": [{"name": file.name, "reason": file.reason} for file in bad]} if bad else {}
        write_json(summary.to_dict() | {"insight": insight.to_dict(), "findings": found} | left_out)
        return
    write_overview(summary, insight, describe_trace(stats, topology.num_gpus), stats.load if heat else None)
    write_remarks(patterns(insight), findings)
