"""``moeplace export``, ``check`` and ``diff``: placement files written for serving stacks, checked, and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moeplace.cli.inputs import check_paths, target_for, warn
from moeplace.cli.options import Command, common, option
from moeplace.cli.values import Whole

if TYPE_CHECKING:
    from moeplace.exporters import Inspection, Target

EXPORT_EPILOG = """\b
Examples:
  moeplace export placement.json --format sglang --model deepseek-v3 -o map.json
  moeplace export placement.json --format trtllm -o moe_load_balancer.yaml
  moeplace export map.json --num-gpus 32 --model deepseek-v3 --format vllm-ascend -o eplb.json
"""
CHECK_EPILOG = """\b
Examples:
  moeplace check map.json --format sglang --model deepseek-v3 --num-gpus 32 --num-redundant-experts 32
  moeplace check moe_load_balancer.yaml --model deepseek-v3 --num-gpus 32
  moeplace check eplb.json --format mindie --model qwen3-235b-a22b --json
"""
DIFF_EPILOG = """\b
Examples:
  moeplace diff old.json new.json
  moeplace diff old.json new.json --model deepseek-v3 --json
  moeplace diff old.json new.json --relabel -o renamed.json
  moeplace diff recorded.json map.json --model deepseek-v3 --num-gpus 32 --schedule --spare-slots 2
"""


def _for_whom(command: Command) -> Command:
    """Add what a placement file is of, where it does not say."""
    for decorate in (
        option("--num-gpus", "--ep-size", "num_gpus", type=Whole(1), help="GPUs; several formats do not say."),
        option("--model", metavar="NAME", help="Model preset, Hugging Face id or TOML file (moeplace list models)."),
    ):
        command = decorate(command)
    return command


@click.command("export", epilog=EXPORT_EPILOG)
@click.argument("placement", type=click.Path(allow_dash=True))
@option("--format", "output_format", metavar="NAME", required=True, help="Placement format (moeplace list formats).")
@option("--output", "-o", type=click.Path(allow_dash=True), default="-", help="Where it goes; -: standard output.")
@option("--input-format", metavar="NAME", help="Format of PLACEMENT; default: by content.")
@_for_whom
@common
def export_command(placement: str, output: str, output_format: str, **options: Any) -> None:
    """Write a placement in the form a serving stack loads.

    PLACEMENT is of any format that can be read back. What is written is checked first by the rules of the stack:
    what it cannot express, would reject, or would accept and misread, is an error and leaves the output alone.
    """
    from moeplace.exporters import (
        Target,
        load_exporter,
        loaded_by,
        numbering_note,
        read_placement,
        routing_note,
        suffix_for,
        target_of,
        write_placement,
    )
    from moeplace.report import write_json

    check_paths([placement], output)
    exporter = load_exporter(output_format)
    suffix_for(output_format, output)
    asked = target_for(options)
    document = read_placement(placement, format=options["input_format"], target=asked)
    target = target_of(document, asked if asked.model else None)
    write_placement(document, output, format=output_format, target=Target(model=target.model))
    assumed = numbering_note(output_format, target.model, document.layer_ids)
    assumed += routing_note(output_format, str(document.details.get("routing", "even")))
    warn(assumed, quiet=options["quiet"])
    if output == "-":
        return
    redundant = document.placement.max_slots * document.placement.num_gpus - document.placement.num_experts
    told = {
        "schema": "moeplace/export/1",
        "format": output_format,
        "model": target.model.name if target.model else None,
        "num_gpus": document.placement.num_gpus,
        "num_redundant_experts": redundant,
        "loaded_by": loaded_by(output_format, output, redundant),
        "assumptions": list(assumed),
    }
    if options["as_json"]:
        write_json(told)
    elif exporter.FLAG and not options["quiet"]:
        click.echo(f"loaded by {told['loaded_by']}", err=True)


@click.command("check", epilog=CHECK_EPILOG)
@click.argument("file", type=click.Path(allow_dash=True))
@option("--format", "input_format", metavar="NAME", help="Format of FILE; default: by content (moeplace list formats).")
@option("--num-redundant-experts", type=Whole(0), help="Redundant experts per layer that the server is told of.")
@_for_whom
@common
def check_command(file: str, **options: Any) -> int:
    """Check a placement file by the rules of the stack that loads it.

    Found is what the stack's loader would reject, and what it would accept and misread: rows of the wrong length, ids
    out of range, missing experts, two copies on one GPU, layers missing or numbered otherwise than the model's,
    unknown keys; each with what the stack makes of it. Exits with 0 where nothing is wrong, else with 1. What --model
    and --num-gpus would say is not checked without them, and said.
    """
    from moeplace.exporters import check_placement, load_exporter
    from moeplace.report import write_json

    check_paths([file], None)
    target = target_for(options)
    name, inspection = check_placement(file, format=options["input_format"], target=target)
    if options["as_json"]:
        faults = [
            {"kind": one.kind, "level": one.level, "what": one.what, "rule": one.rule, "consequence": one.consequence}
            for one in inspection.faults
        ]
        told = {"schema": "moeplace/check/1", "format": name, "ok": not inspection.errors, "faults": faults}
        write_json({**told, "stack": load_exporter(name).STACK.name})
    else:
        _show(inspection, target, quiet=options["quiet"])
    return 1 if inspection.errors else 0


def _show(inspection: Inspection, target: Target, *, quiet: bool) -> None:
    for fault in inspection.faults:
        if fault.level == "error" or not quiet:
            rule = f" (rule: {fault.rule})" if fault.rule else ""
            click.echo(f"{fault.level}: {fault.what}{rule}")
            if fault.consequence:
                click.echo(f"  {fault.consequence}.")
    if inspection.errors:
        count = len(inspection.errors)
        click.echo(f"{inspection.stack.name}: {count} {'error' if count == 1 else 'errors'}")
    elif not quiet:
        click.echo(f"{inspection.stack.name}: {inspection.shape()}: nothing is wrong")


@click.command("diff", epilog=DIFF_EPILOG)
@click.argument("before", type=click.Path(allow_dash=True))
@click.argument("after", type=click.Path(allow_dash=True))
@option(
    "--relabel",
    is_flag=True,
    help="Rename the GPUs of AFTER so that least moves: inside nodes, and whole nodes.",
)
@option("--output", "-o", type=click.Path(allow_dash=True), help="Where AFTER goes with its GPUs renamed; native.")
@option("--schedule", is_flag=True, help="Find rounds of drops and loads that keep a copy of every expert throughout.")
@option("--spare-slots", type=Whole(0), default=1, help="Copies a GPU can hold beyond its slots meanwhile, in all.")
@option("--num-nodes", type=Whole(1), help="Nodes the GPUs are on; default: as AFTER or BEFORE says, else 1.")
@option("--input-format", metavar="NAME", help="Format of both files; default: by content.")
@_for_whom
@common
def diff_command(before: str, after: str, **options: Any) -> None:
    """Compare two placements: what each GPU must newly load, from where, how many bytes that is, and in what order.

    Placement files may be of any format that can be read back. Without --relabel GPUs keep their numbers.
    """
    from moeplace.contest import compare_files, read_files, rename_sentences, schedule_files
    from moeplace.exporters import write_placement
    from moeplace.report import diff_table, schedule_table, write_json

    check_paths([before, after], options["output"], keep=[before, after])
    if options["output"] and not options["relabel"]:
        raise click.UsageError("-o is for the placement with its GPUs renamed: give --relabel too")
    first, second = read_files([before, after], target_for(options), format=options["input_format"])
    nodes = options["num_nodes"]
    change = compare_files(first, second, model=options["model"], num_nodes=nodes, relabel=options["relabel"])
    warn(rename_sentences(second, first) if options["relabel"] else (), quiet=options["quiet"])
    schedule = None
    if options["schedule"]:
        schedule = schedule_files(first, second, change, spare_slots=options["spare_slots"], num_nodes=nodes)
    if options["output"] and change.order is not None:
        write_placement(second.renamed(change.order), options["output"])
    if options["as_json"]:
        write_json(change.to_dict() | ({} if schedule is None else {"schedule": schedule.to_dict()}))
        return
    diff_table(change)
    if schedule is not None:
        schedule_table(schedule)
