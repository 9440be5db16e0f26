"""``moeplace convert``: traces in other formats, and parts of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from moeplace.cli.inputs import check_paths, open_source, warn
from moeplace.cli.options import common, option, threads, trace_input
from moeplace.cli.values import Portion, Whole

if TYPE_CHECKING:
    from moeplace.split import Part
    from moeplace.subset import Sized, Subset
    from moeplace.trace import Counts, TraceStream

EPILOG = """\b
Examples:
  moeplace convert trace.jsonl.gz trace.npz
  moeplace convert profiling_result/ trace.npz
  moeplace convert trace.npz decode.jsonl.zst --phase decode
  moeplace convert trace.npz test.npz --part half:0 --keep test
  moeplace convert trace.npz --split fit.npz,test.npz --by time:0.8
  moeplace convert trace.npz some.npz --requests 7,10-19
  moeplace convert trace.npz rest.npz --without-requests @loops.txt
  moeplace convert trace.npz small.npz --drop-dummy-run --sample 10% --seed 1
  moeplace convert trace.npz counts.json --model deepseek-v3
"""
FORMATS = ("jsonl", "npz", "counts")
LOST = "only counts are written: affinity, requests and phases are lost"


@click.command("convert", epilog=EPILOG)
@trace_input
@click.argument("output", type=click.Path(allow_dash=True), required=False)
@option("--drop-dummy-run", is_flag=True, help="Leave out an engine's dummy run: identical rows at the start.")
@option("--part", metavar="SPLIT", help="Keep a part of a split: half:SEED, domain:NAME,… or time:FRACTION.")
@option("--keep", type=click.Choice(["fit", "test"]), default="fit", help="Which part of --part to keep.")
@option("--split", metavar="FIT,TEST", help="Write both parts of a split, to two files, in place of OUTPUT.")
@option("--by", metavar="SPLIT", default="half:0", help="How --split divides, as for --part.")
@option("--requests", metavar="LIST", help="Keep only these: names, numbers, ranges 10-19; or @FILE, one to a line.")
@option("--without-requests", metavar="LIST", help="Leave these requests out; a LIST as for --requests.")
@option("--phase", type=click.Choice(["prefill", "decode"]), help="Keep only tokens of this phase.")
@option("--sample", type=Portion(), help="Keep a uniform sample of whole requests: so many, or a share such as 10%.")
@option("--seed", type=Whole(0), default=0, help="Seed of the sample.")
@option("--to", "output_format", type=click.Choice(FORMATS), help="Output format; default: by name.")
@option("--per-step", is_flag=True, help="Count each recorded step by itself, not the whole trace.")
@threads
@common
def convert_command(trace: str, output: str | None, **options: Any) -> None:
    """Turn a trace into native npz (fast), JSONL (readable) or counts, or a part of it.

    OUTPUT ends in .npz, .jsonl or .json (counts), the last two also with .gz or .zst; the same input always gives the
    same bytes. What to keep is chosen in the order of the options below: first the dummy run goes, then a part of a
    split is taken, of it the requests named, of them a phase, of what is left a sample. So --split and --part divide
    requests as solve --fit and score --test do, and none moves to the other part by what else is left out.

    Counts are what SGLang's --init-expert-location takes: logical_count [layers, experts], with --per-step
    [steps, layers, experts]; in JSON dense layers have rows of zeros (--model tells which they are). Counts as input
    can be split by step.
    """
    from moeplace.report import write_json
    from moeplace.subset import narrowed
    from moeplace.writers import trace_outputs

    targets = _targets(trace, output, options)
    subset = _subset(options)
    parts: list[Written] = []
    form, known = (None, ()) if options["output_format"] == "counts" else (options["output_format"], FORMATS)
    # opened first: a long trace is not read for an output that cannot be written
    with trace_outputs([path for _, path in targets], format=form, formats=known) as files:
        source, said = _opened(trace, options)
        for part, path in targets:
            kept = narrowed(source, subset.replace(part=part))
            parts.append(_written(kept, path, options))
        if any(entry.size and entry.steps for entry in parts):
            said.append(LOST)
        for entry, file in zip(parts, files, strict=True):
            file.write(entry.content)
    notes = (*source.meta.assumptions, *said)
    warn(notes, quiet=options["quiet"])
    if options["as_json"]:
        write_json(_document(source, parts, notes))
    elif not options["quiet"] and (options["verbose"] or sys.stderr.isatty()):
        for entry in parts:
            click.echo(f"{entry.path}: {entry}", err=True)


class Written(NamedTuple):
    """One output: what is written, where to, and the size of what it was made from (None: counts)."""

    content: Sized | Counts
    path: str
    size: Sized | None

    def __str__(self) -> str:
        from moeplace.build import plural

        counts = "" if self.steps is None else f"counts of {plural(self.steps, 'step')}"
        if self.size is None:
            return counts
        tokens = f"{plural(self.size.num_tokens, 'token')} of {plural(self.size.num_requests, 'request')}"
        return f"{counts}: {tokens}" if counts else tokens

    @property
    def steps(self) -> int | None:
        """Steps of counts."""
        from moeplace.trace import Counts

        return self.content.num_steps if isinstance(self.content, Counts) else None


def _written(kept: TraceStream | Counts, path: str, options: dict[str, Any]) -> Written:
    from moeplace.reduction import counts_of
    from moeplace.subset import Sized
    from moeplace.trace import Counts

    if isinstance(kept, Counts):
        return Written(kept, path, None)
    size = Sized(kept)
    counted = _is_counts(path, options)
    return Written(counts_of(size, per_step=options["per_step"]) if counted else size, path, size)


def _document(source: TraceStream | Counts, parts: list[Written], notes: Sequence[str]) -> dict[str, Any]:
    meta = source.meta
    outputs = [
        {
            "num_tokens": part.size.num_tokens if part.size else None,
            "num_requests": part.size.num_requests if part.size else None,
            "num_steps": part.steps,
        }
        for part in parts
    ]
    return {
        "schema": "moeplace/convert/1",
        "num_layers": meta.num_layers,
        "num_experts": meta.num_experts,
        "top_k": meta.top_k,
        "model_id": meta.model_id,
        "notes": list(notes),
        "outputs": outputs,
    }


def _targets(trace: str, output: str | None, options: dict[str, Any]) -> list[tuple[Part, str]]:
    """Which part goes where; a usage error where the options do not say it once."""
    given = {name for name in ("keep", "by") if _from_command_line(name)}
    if options["split"] is None:
        if output is None:
            raise click.UsageError("Missing argument 'OUTPUT': give a file, - for standard output, or --split FIT,TEST")
        if "by" in given:
            raise click.UsageError("--by says how --split divides: give --split FIT,TEST, or --part SPLIT")
        if "keep" in given and options["part"] is None:
            raise click.UsageError("--keep chooses a part of --part: give --part SPLIT")
        targets: list[tuple[Part, str]] = [("test" if options["keep"] == "test" else "fit", output)]
    else:
        if output is not None:
            raise click.UsageError(f"--split names both outputs: leave {output} out")
        if options["part"] is not None or "keep" in given:
            raise click.UsageError("--split writes both parts: leave --part and --keep out, --by names the split")
        names = [name.strip() for name in options["split"].split(",")]
        if len(names) != 2 or "" in names or len({os.path.realpath(name) for name in names}) < 2:
            raise click.UsageError(f"--split {options['split']}: give two files, as in --split fit.npz,test.npz")
        targets = [("fit", names[0]), ("test", names[1])]
    lists = [options[name] for name in ("requests", "without_requests")]
    for _, path in targets:
        check_paths([trace, *[text[1:] for text in lists if text and text.startswith("@")]], path, keep=[trace])
        if path == "-" and options["as_json"]:
            raise click.UsageError("--json and the trace cannot both go to standard output: name the output")
    if options["per_step"] and not all(_is_counts(path, options) for _, path in targets):
        raise click.UsageError("--per-step is for counts: name the output .json, or give --to counts")
    return targets


def _from_command_line(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def _is_counts(path: str, options: dict[str, Any]) -> bool:
    from moeplace.writers import format_of

    form = options["output_format"]
    return bool(form == "counts" or (form is None and format_of(path, "jsonl", FORMATS) == "json"))


def _opened(trace: str, options: dict[str, Any]) -> tuple[TraceStream | Counts, list[str]]:
    """The whole trace under its model's name, and what is to be said of its dummy run."""
    from moeplace.model import load_model
    from moeplace.split import named
    from moeplace.subset import dummy_run
    from moeplace.trace import Counts

    model_id = load_model(options["model"]).name if options["model"] else None
    source = named(open_source(trace, {**options, "phase": None}), model_id)
    if not options["drop_dummy_run"] or isinstance(source, Counts):
        return source, []
    rows = dummy_run(source)
    found = f"the first {rows:,} rows are left out: they choose the same experts, as an engine's dummy run does"
    return source, [found if rows else "no dummy run stands at the start: nothing was left out for it"]


def _subset(options: dict[str, Any]) -> Subset:
    from moeplace.split import parse_split
    from moeplace.subset import Subset, parse_requests

    rule = options["by"] if options["split"] is not None else options["part"]
    without = options["without_requests"]
    return Subset(
        drop_dummy_run=options["drop_dummy_run"],
        split=None if rule is None else parse_split(rule),
        requests=None if options["requests"] is None else parse_requests(options["requests"]),
        without=() if without is None else parse_requests(without),
        phase=options["phase"],
        sample=options["sample"],
        seed=options["seed"],
    )
