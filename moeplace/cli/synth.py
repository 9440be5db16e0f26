"""``moeplace synth``: synthetic traces in the shape of a model."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from moeplace.cli.inputs import check_paths, warn
from moeplace.cli.options import common, option, threads
from moeplace.cli.values import Whole

SYNTH_EPILOG = """\b
Examples:
  moeplace synth olmoe-1b-7b -o olmoe.npz
  moeplace synth deepseek-v3 -o dsv3.npz --tokens 60k --domains 6 --sigma 0.5 --mi 0.5 --seed 1
  moeplace synth qwen3-30b-a3b -o one.jsonl.zst --domains 1 --sigma 1.1 --drift 0.2 --json
  moeplace synth llama-4-maverick -o top1.npz --tokens 200k --hot 16
"""
IN_MEMORY_BYTES = 512 << 20  # writing walks a trace twice: up to this size it is drawn once and kept
FORMATS = ("jsonl", "npz")
UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
TARGETS = {  # option → field of the specification
    "sigma": "sigma",
    "domains": "domains",
    "domain_tv": "domain_distance",
    "drift": "drift",
    "mi": "mutual_information",
    "spearman": "rank_correlation",
    "hot": "hot",
    "request_tokens": "request_tokens",
    "prompt_share": "prompt_share",
}
WORDS = {
    "sigma": "spread of ln(load)",
    "domain_distance": "distance of domains",
    "drift": "drift per 25k tokens",
    "mutual_information": "bits between layers",
    "rank_correlation": "prefill against decode ρ",
}


class Amount(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """A whole number of at least 1, written ``60000``, ``60_000``, ``60k`` or ``1.5M``."""

    name = "n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read an amount."""
        match = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?)\s*([kmg]?)\s*", str(value).lower())
        number = float(match[1].replace("_", "") or 0) * UNITS[match[2]] if match else 0.0
        if number < 1 or number != int(number):
            self.fail(f"{value!r} is not an amount: write 60000, 60k or 1.5M", param, ctx)
        return int(number)


@click.command("synth", epilog=SYNTH_EPILOG)
@click.argument("model")
@click.option("--output", "-o", type=click.Path(allow_dash=True), required=True, help="Where the trace goes.")
@option("--tokens", type=Amount(), default="60k", help="Tokens, e.g. 60000, 60k, 1.5M.")
@option("--domains", type=Whole(1), help="Domains, one per request; default 6.")
@option("--sigma", type=float, help="Spread of ln(load) in a layer: 0.2 mild, 0.5 pooled (default), 1.1 one domain.")
@option(
    "--mi", type=float, help="Bits that adjacent layers share; default 0.5 (top-1 models 1), less with few experts."
)
@option("--domain-tv", type=float, help="Total variation between domains' loads; default 0.35.")
@option("--drift", type=float, help="Total variation between consecutive 25,000 tokens; default 0.12.")
@option("--spearman", type=float, help="Rank correlation of prefill's and decode's loads; default 0.8.")
@option("--hot", type=float, help="Load of each layer's hottest expert over the mean; 0 leaves it to sigma.")
@option("--request-tokens", type=Whole(1), help="Tokens of a request; default 512.")
@option("--prompt-share", type=click.FloatRange(0, 1), help="Share of a request that is prefill; default 0.5.")
@option("--seed", type=Whole(0), default=0, help="The same seed gives the same bytes.")
@option("--to", "output_format", type=click.Choice(FORMATS), help="Output format; default: by the name.")
@threads
@common
def synth_command(model: str, output: str, tokens: int, seed: int, **options: Any) -> None:
    """Make a synthetic trace in the shape of MODEL whose statistics are what you ask for.

    MODEL is a preset, a Hugging Face id or a TOML file (moeplace list models). Skew, affinity, domains, drift and
    phases are calibrated until a pilot sample measures what was asked for; a value out of reach is an error.
    """
    from moeplace.model import load_model
    from moeplace.report import write_json
    from moeplace.synth import SynthSpec, synthesise
    from moeplace.trace import concatenate
    from moeplace.writers import trace_outputs

    check_paths([], output)
    if output == "-" and options["as_json"]:
        raise click.UsageError("--json and the trace cannot both go to standard output: name the output")
    shape = load_model(model)
    asked = {field: options[name] for name, field in TARGETS.items() if options[name] is not None}
    spec = SynthSpec.of_model(shape).replace(**asked)
    small = tokens * shape.num_moe_layers * shape.top_k * 2 <= IN_MEMORY_BYTES
    with trace_outputs([output], format=options["output_format"], formats=FORMATS) as (file,):
        trace = synthesise(shape, spec, tokens, seed).replace(threads=options["threads"])
        file.write(concatenate(trace.blocks(), trace.meta) if small else trace)
    warn(trace.meta.assumptions, quiet=options["quiet"])
    if options["as_json"]:
        write_json(_document(trace))
    elif not options["quiet"] and (options["verbose"] or sys.stderr.isatty()):
        _write_measured(trace)


def _document(trace: Any) -> dict[str, Any]:
    from dataclasses import asdict

    measured = {name: None if value is None else round(value, 4) for name, value in asdict(trace.reached).items()}
    return {
        "schema": "moeplace/synth/1",
        "model": trace.model.name,
        "tokens": trace.num_tokens,
        "seed": trace.seed,
        "asked": asdict(trace.spec),
        "measured": measured,
    }


def _write_measured(trace: Any) -> None:
    from moeplace.report import console, write_lines

    lines = {}
    for name, words in WORDS.items():
        value, asked = getattr(trace.reached, name), getattr(trace.spec, name)
        if value is not None:
            lines[words] = f"{value:.3f} measured on a pilot, {asked:g} asked"
    write_lines(lines, console(err=True))
