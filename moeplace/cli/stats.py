"""``moeplace stats``: what a trace says."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from moeplace.cli.inputs import choices_of, open_source, warn
from moeplace.cli.options import common, hardware, option, threads, trace_input

STATS_EPILOG = """\b
Examples:
  moeplace stats trace.npz
  moeplace stats trace.jsonl.zst --phase decode --num-gpus 16 --json
"""


@click.command("stats", epilog=STATS_EPILOG)
@trace_input
@hardware
@option("--phase", type=click.Choice(["prefill", "decode"]), help="Use only tokens of this phase.")
@option("--fit", metavar="SPLIT", help="Use the fit part of a split: half:SEED, domain:NAME,… or time:FRACTION.")
@threads
@common
def stats_command(trace: str, fit: str | None, **options: Any) -> None:
    """Show what a routing trace says.

    Per layer: how skewed the load is, over experts and over GPUs when experts are placed contiguously, and what share
    of the transitions to the next layer the busiest fifth of expert pairs holds, beside what popularity alone would
    give. Then what the trace shows of six published patterns, beside the published figures (arXiv 2510.05497), and what
    looks wrong with it.
    """
    from moeplace.build import describe_trace, topology_for
    from moeplace.checks import check_trace
    from moeplace.insight import measure_trace, patterns
    from moeplace.profile import count_and_profile
    from moeplace.report import stats_notes, stats_tables, write_json
    from moeplace.summary import summarise_trace

    source = open_source(trace, options, split=fit)
    stats, profile = count_and_profile(source, threads=options["threads"])
    insight, findings = measure_trace(stats, profile), check_trace(source, stats)
    topology = topology_for(choices_of(options), stats)
    summary = summarise_trace(stats, topology.num_gpus)
    warn(source.meta.assumptions, quiet=options["quiet"])
    if options["as_json"]:
        found = [asdict(finding) for finding in findings]
        write_json(summary.to_dict() | {"insight": insight.to_dict(), "findings": found})
        return
    stats_tables(summary, describe_trace(stats, topology.num_gpus))
    stats_notes([str(pattern) for pattern in patterns(insight)], [str(finding) for finding in findings])
