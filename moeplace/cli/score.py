"""``moeplace score``: placements judged on a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from moeplace.cli.inputs import check_paths, choices_of, open_source, warn
from moeplace.cli.options import batch_law, common, constants, execution, option, threads, trace_input
from moeplace.cli.values import Whole

SCORE_EPILOG = """\b
Examples:
  moeplace score trace.npz placement.json linear --test half:0
  moeplace score trace.npz a.json b.json linear -t scale-up:8 -t scale-out:2x4
  moeplace score trace.npz a.json linear --phase decode --batches 1000 --naive
  moeplace score trace.npz a.json b.json --routing lp --overlap dual-batch
  moeplace score counts.json linear --num-gpus 64 --json | jq '.scores[0]'
"""


@click.command("score", epilog=SCORE_EPILOG)
@trace_input
@click.argument("placements", nargs=-1, required=True)
@option(
    "--topology",
    "-t",
    "topologies",
    metavar="NAME",
    multiple=True,
    help="Preset, TOML file or KIND:DIMS; may be repeated. Default: what the placement files name.",
)
@option("--accelerator", metavar="NAME", help="Accelerator preset or TOML file (moeplace list accelerators).")
@option("--num-gpus", "--ep-size", "num_gpus", type=Whole(1), help="GPUs; alone: one scale-up domain.")
@option("--test", metavar="SPLIT", help="Score on what a split leaves out: half:SEED, domain:NAME,… or time:FRACTION.")
@option("--batches", type=Whole(2), show_default="300", help="Steps to draw.")
@option("--seed", type=Whole(0), default=0, help="Seed of the draw.")
@option("--naive", is_flag=True, help="Show what balanced experts, one copy per choice and a flat network would give.")
@option("--layers", is_flag=True, help="Show a table of layers for every score.")
@batch_law
@execution
@constants
@threads
@common
def score_command(
    trace: str, placements: tuple[str, ...], topologies: tuple[str, ...], test: str | None, **options: Any
) -> None:
    """Judge placements on a trace.

    PLACEMENTS are placement files; the name linear stands for the contiguous placement servers use by default. Steps
    are drawn from the trace by the batch law, the same ones for every placement; mean, p50, p95, p99 and CVaR95 are
    over steps, with 95 % intervals. Times are model outputs for the MoE layers (experts, dispatch, combine), not
    measurements, and no public measurement of the tail exists to check them against: read ratios between placements.
    """
    from moeplace.contest import build_contest, fit_sentences, score_sentences
    from moeplace.report import write_json
    from moeplace.scoreboard import score_tables
    from moeplace.scoring import score, scores_to_dict
    from moeplace.trace import Counts

    check_paths([trace, *placements], None)
    choices = choices_of(options)
    source = open_source(trace, options, split=test, part="test")
    contest = build_contest(source, placements, choices, topologies=topologies, batches=options["batches"])
    scores = score(
        source,
        contest.placements,
        contest.topologies,
        contest.model,
        **_profile(trace, test, options, contest.routings),
        routings=contest.routings,
        **score_options(options),
    )
    said = (*source.meta.assumptions, *contest.assumptions, *score_sentences(scores, source, choices))
    said = (*said, *fit_sentences(contest, scores))
    warn(said, quiet=options["quiet"])
    if options["as_json"]:
        write_json(scores_to_dict(scores))
    else:
        shown = {"naive": options["naive"], "layers": options["layers"]}
        score_tables(scores, contest.model, recorded=isinstance(source, Counts), **shown)


def score_options(options: dict[str, Any]) -> dict[str, Any]:
    """Collect what the options say about steps and how they run, as :func:`moeplace.scoring.score` takes it."""
    from moeplace.scoring import EXECUTION_OPTIONS

    overlapped = options["overlap"] != "none"
    names = ("phase", "batches", "seed", "arrival", "threads", *EXECUTION_OPTIONS[:-1])
    return {
        "requests": options["batch_requests"],
        "tokens": options["batch_tokens"],
        "prefill_requests": options["batch_prefill_requests"],
        "prefill_tokens": options["batch_prefill_tokens"],
        "with_attention": options["with_attention"] or overlapped,
        **{name: options[name] for name in names},
    }


def _profile(trace: str, test: str | None, options: dict[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    """Loads and tokens of the part that a split fits on, for replica choices that go by them.

    Empty where none does: the choice then goes by what is scored.
    """
    from moeplace.affinity import count_routing, load_by_phase
    from moeplace.routing import BY_PROFILE, FEWEST
    from moeplace.trace import Counts

    used = {options["routing"], *own.values()}
    if used.isdisjoint(BY_PROFILE) or test is None:
        return {}
    fitted = open_source(trace, options, split=test, part="fit")
    if isinstance(fitted, Counts):
        return {}
    if FEWEST not in used:
        return {"profile": load_by_phase(fitted).sum(axis=0)}
    stats = count_routing(fitted, threads=options["threads"])
    return {"profile": stats.load, "profile_tokens": None if stats.sample is None else stats.sample.experts}
