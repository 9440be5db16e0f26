"""``moeplace stats`` and ``moeplace convert``: what a trace says, and traces in other formats."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from moeplace.cli.inputs import check_paths, choices_of, open_source, warn
from moeplace.cli.options import common, hardware, option, threads, trace_input

STATS_EPILOG = """\b
Examples:
  moeplace stats trace.npz
  moeplace stats trace.jsonl.zst --phase decode --num-gpus 16 --json
"""
CONVERT_EPILOG = """\b
Examples:
  moeplace convert trace.jsonl.gz trace.npz
  moeplace convert trace.npz decode.jsonl.zst --phase decode
  moeplace convert trace.npz test.npz --part half:0 --keep test
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
    insight, findings = measure_trace(stats, profile), check_trace(source, stats, profile.loops)
    topology = topology_for(choices_of(options), stats)
    summary = summarise_trace(stats, topology.num_gpus)
    warn(source.meta.assumptions, quiet=options["quiet"])
    if options["as_json"]:
        found = [asdict(finding) for finding in findings]
        write_json(summary.to_dict() | {"insight": insight.to_dict(), "findings": found})
        return
    stats_tables(summary, describe_trace(stats, topology.num_gpus))
    stats_notes([str(pattern) for pattern in patterns(insight)], [str(finding) for finding in findings])


@click.command("convert", epilog=CONVERT_EPILOG)
@trace_input
@click.argument("output", type=click.Path(allow_dash=True))
@option("--phase", type=click.Choice(["prefill", "decode"]), help="Keep only tokens of this phase.")
@option("--part", metavar="SPLIT", help="Keep a part of a split: half:SEED, domain:NAME,… or time:FRACTION.")
@option("--keep", type=click.Choice(["fit", "test"]), default="fit", help="Which part of the split to keep.")
@option("--to", "output_format", type=click.Choice(["jsonl", "npz"]), help="Output format; default: by the name.")
@common
def convert_command(trace: str, output: str, part: str | None, keep: str, **options: Any) -> None:
    """Turn a trace into native npz (fast) or JSONL (readable), or a part of it.

    OUTPUT ends in .npz, .jsonl, .jsonl.gz or .jsonl.zst; the same input always gives the same bytes.
    """
    from moeplace.model import load_model
    from moeplace.report import write_json
    from moeplace.split import named
    from moeplace.writers import write_trace

    check_paths([], output, keep=[trace])
    if output == "-" and options["as_json"]:
        raise click.UsageError("--json and the trace cannot both go to standard output: name the output")
    model_id = load_model(options["model"]).name if options["model"] else None
    source = named(open_source(trace, options, split=part, part=keep), model_id)
    write_trace(source, output, format=options["output_format"])
    warn(source.meta.assumptions, quiet=options["quiet"])
    if options["as_json"]:
        meta = source.meta
        shape = {"num_layers": meta.num_layers, "num_experts": meta.num_experts, "top_k": meta.top_k}
        write_json(
            {"schema": "moeplace/convert/1", **shape, "model_id": meta.model_id, "notes": list(meta.assumptions)}
        )
