"""``moeplace score`` and ``moeplace diff``: placements judged and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moeplace.cli.inputs import choices_of, open_source, warn
from moeplace.cli.options import batch_law, common, option, trace_input

if TYPE_CHECKING:
    from moeplace.placement import Placement
    from moeplace.topology import Topology
    from moeplace.trace import Counts, TraceStream

SCORE_EPILOG = """\b
Examples:
  moeplace score trace.npz placement.json --topology scale-out:2x8 --test half:0
  moeplace score trace.npz a.json b.json linear --topology scale-up:8 --topology scale-out:2x4
  moeplace score counts.json linear --num-gpus 64 --json | jq '.scores[0].step_time_us.p99'
"""
DIFF_EPILOG = """\b
Examples:
  moeplace diff old.json new.json
  moeplace diff old.json new.json --model deepseek-v3 --json
"""
BUILT_IN = ("linear",)


@click.command("score", epilog=SCORE_EPILOG)
@trace_input
@click.argument("placements", nargs=-1, required=True)
@option("--topology", "-t", "topologies", multiple=True, help="Preset, file or KIND:DIMS; may be repeated.")
@option("--accelerator", help="Accelerator preset or TOML file.")
@option("--num-gpus", "--ep-size", "num_gpus", type=click.IntRange(1), help="GPUs; alone: one scale-up domain.")
@option("--test", help="Score on what a split leaves out: half:SEED, domain:NAME,… or time:FRACTION.")
@option("--batches", type=click.IntRange(2), help="Steps to draw; default 300.")
@option("--seed", type=click.IntRange(0), default=0, help="Seed of the draw.")
@batch_law
@common
def score_command(
    trace: str, placements: tuple[str, ...], topologies: tuple[str, ...], test: str | None, **options: Any
) -> None:
    """Judge placements on a trace.

    PLACEMENTS are placement files; the name linear stands for the contiguous placement servers use by default. Steps
    are drawn from the trace by the batch law, the same ones for every placement; mean, p50, p95, p99 and CVaR95 are
    over steps, with 95 % intervals. Times are model outputs for the MoE layers (experts, dispatch, combine), not
    measurements.
    """
    from moeplace.build import model_for
    from moeplace.report import score_tables, write_json
    from moeplace.scoring import score, scores_to_dict

    loaded = _load(placements)
    source = open_source(trace, options, split=test, part="test")
    places = _topologies(topologies, options, loaded)
    labelled = {label: placed or _linear(source, places[0]) for label, placed in loaded.items()}
    model = model_for(source.meta, options["model"])
    law = {name: options[f"batch_{name}"] for name in ("requests", "tokens")}
    scores = score(
        source,
        labelled,
        places,
        model,
        **{**law, **{name: options[name] for name in ("phase", "dataflow", "batches", "seed", "threads")}},
    )
    if options["as_json"]:
        write_json(scores_to_dict(scores))
        return
    warn(source.meta.assumptions, quiet=options["quiet"])
    score_tables(scores, model)


def _load(names: tuple[str, ...]) -> dict[str, Placement | None]:
    """Label → placement; None for names computed from the trace's shape. Labels are file names, made unique."""
    from pathlib import Path

    from moeplace.exporters import read_placement

    loaded: dict[str, Placement | None] = {}
    for name in names:
        built_in = name in BUILT_IN and not Path(name).exists()
        label = name if built_in or name == "-" else Path(name).stem
        if label in loaded:
            label = name
        loaded[label] = None if built_in else read_placement(name).placement
    return loaded


def _topologies(specs: tuple[str, ...], options: dict[str, Any], loaded: dict[str, Placement | None]) -> list[Topology]:
    from moeplace.build import topology_for

    sizes = {placed.num_gpus for placed in loaded.values() if placed is not None}
    if not specs and options["num_gpus"] is None and len(sizes) == 1:
        options = options | {"num_gpus": sizes.pop()}
    return [topology_for(choices_of(options | {"topology": spec})) for spec in specs or (None,)]


def _linear(source: TraceStream | Counts, topology: Topology) -> Placement:
    from moeplace.problem import slots_for
    from moeplace.solvers.linear import contiguous

    experts = source.meta.num_experts
    return contiguous(slots_for(experts, topology.num_gpus), source.meta.num_layers, experts)


@click.command("diff", epilog=DIFF_EPILOG)
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
@option("--model", help="Model preset or TOML file, for the bytes moved; default: the one the file names.")
@common
def diff_command(before: str, after: str, **options: Any) -> None:
    """Compare two placements: which experts each GPU must newly load, and how many bytes that is."""
    from moeplace.diff import compare_placements
    from moeplace.exporters import read_placement
    from moeplace.report import diff_table, write_json

    first, second = read_placement(before), read_placement(after)
    change = compare_placements(first, second, model=options["model"])
    if options["as_json"]:
        write_json(change.to_dict())
    else:
        diff_table(change)
