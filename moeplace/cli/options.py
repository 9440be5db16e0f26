"""Options shared by commands."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moeplace.cli.values import Homes, Portion, Size, Whole

Command = Callable[..., Any]


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """Add a click option that can also be set as ``MOEPLACE_<OPTION>``."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "MOEPLACE_" + long.removeprefix("--").replace("-", "_").upper()
    settings.setdefault("show_default", settings.get("default") is not None and not settings.get("is_flag"))
    decorate: Callable[[Command], Command] = click.option(*names, envvar=variable, **settings)
    return decorate


def _read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Take defaults from a TOML file: options of any command on top, those of one command in a table of its name."""
    if value is None:
        return
    try:
        table = tomllib.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not TOML: {error}"
        raise click.BadParameter(f"{value}: {reason}", ctx, param) from error
    commands = _commands(ctx)
    own = {name: item for item in ctx.command.params for name in _spellings(item)}
    shared = {name for command in commands.values() for item in command.params for name in _spellings(item)}
    chosen: dict[str, Any] = {}
    sections = [(key, table.pop(key)) for key in list(table) if key in commands and isinstance(table[key], dict)]
    for section, settings in [("", table), *sections]:
        known = {name for item in commands[section].params for name in _spellings(item)} if section else shared
        for key, setting in settings.items():
            name = key.replace("_", "-")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=2)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                where = section or "moeplace"
                raise click.BadParameter(f"{value}: {where} has no option {key!r}{hint}", ctx, param)
            if name in own and section in ("", ctx.command.name):
                chosen[str(own[name].name)] = _setting(own[name], setting)
    ctx.default_map = {**(ctx.default_map or {}), **chosen}


def _commands(ctx: click.Context) -> dict[str, click.Command]:
    """Every command by name; only the one that runs where it stands alone."""
    group = ctx.parent.command if ctx.parent else None
    if ctx.parent is None or not isinstance(group, click.Group):
        return {str(ctx.command.name): ctx.command}
    found = {name: group.get_command(ctx.parent, name) for name in group.list_commands(ctx.parent)}
    return {name: command for name, command in found.items() if command is not None}


def _setting(item: click.Parameter, setting: Any) -> Any:
    if isinstance(setting, dict):
        return [f"{key}={value}" for key, value in setting.items()]
    return [setting] if item.multiple and not isinstance(setting, list) else setting


def _spellings(item: click.Parameter) -> list[str]:
    """Long names of an option, without those that make no sense in a file."""
    names = [name.lstrip("-") for name in item.opts if name.startswith("--")]
    return [name for name in names if name not in ("config", "help", "debug")]


def common(command: Command) -> Command:
    """Add ``--json``, ``--quiet``, ``--verbose``, ``--config`` and ``--debug``."""
    for decorate in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors."),
        click.option(
            "--config",
            type=click.Path(dir_okay=False),
            envvar="MOEPLACE_CONFIG",
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            help="TOML file of options by their long names; [solve], [score], … hold those of one command.",
        ),
        option("--verbose", "-v", is_flag=True, help="Write the log to standard error even if it is not a terminal."),
        option("--quiet", "-q", is_flag=True, help="Write nothing but results and errors."),
        option("--json", "as_json", is_flag=True, help="Write JSON to standard output."),
    ):
        command = decorate(command)
    return command


threads = option(
    "--threads",
    type=Whole(1),
    default=lambda: os.cpu_count() or 1,
    show_default="all cores",
    help="Threads, or processes for many files; the result does not depend on them.",
)


def trace_input(command: Command) -> Command:
    """Add the trace argument and how it is read."""
    for decorate in (
        option(
            "--cluster",
            metavar="ADDRESS",
            help="Read a folder or archive of requests on a running Dask cluster: tcp://HOST:PORT or a scheduler file.",
        ),
        option(
            "--work-dir",
            type=click.Path(file_okay=False),
            help="Where the progress on many files is kept; default: the cache folder.",
        ),
        option(
            "--skip-bad",
            type=Whole(0),
            help="Skip up to this many bad rows, or files of a folder; default: no row, a fifth of the files.",
        ),
        option(
            "--input-format", metavar="NAME", help="Format of the trace; default: by content (moeplace list formats)."
        ),
        option("--model", metavar="NAME", help="Model preset, Hugging Face id or TOML file (moeplace list models)."),
        click.argument("trace", type=click.Path(allow_dash=True)),
    ):
        command = decorate(command)
    return command


def hardware(command: Command) -> Command:
    """Add what the GPUs and their network are."""
    for decorate in (
        option("--num-nodes", type=Whole(1), help="Nodes the GPUs are on, equally many each: a scale-out network."),
        option("--num-gpus", "--ep-size", "num_gpus", type=Whole(1), help="GPUs; alone: one scale-up domain."),
        option("--accelerator", metavar="NAME", help="Accelerator preset or TOML file (moeplace list accelerators)."),
        option(
            "--topology",
            "-t",
            metavar="NAME",
            help="Preset, TOML file or KIND:DIMS, e.g. scale-up:8, scale-out:2x8 (moeplace list topologies).",
        ),
    ):
        command = decorate(command)
    return command


def goal(command: Command) -> Command:
    """Add what is decided, and what it should be best in."""
    for decorate in (
        option(
            "--equal-experts", type=click.Choice(["layer", "model"]), default="layer", help="Where slots are counted."
        ),
        option(
            "--load-cap",
            metavar="X|eplb",
            help="Hard cap on max/mean GPU load in every layer: a number, or 'eplb' for EPLB's own maximum.",
        ),
        option(
            "--copies-level",
            type=click.Choice(["gpu", "node"]),
            default="gpu",
            help="What --objective copies and cross count.",
        ),
        option(
            "--objective",
            type=click.Choice(["step-time", "load", "copies", "cross", "remote"]),
            default="step-time",
            help="Predicted µs per step, or one of its parts in natural units; remote: copies sent to other nodes.",
        ),
        option("--slots-per-gpu", type=Whole(1), help="Slots of each GPU in every layer."),
        option("--num-groups", type=Whole(1), help="Expert groups of hierarchical EPLB; default: the model's."),
        option("--num-redundant-experts", type=Whole(0), help="Extra slots per layer, in total over all GPUs."),
    ):
        command = decorate(command)
    return command


def risk(command: Command) -> Command:
    """Add what of the steps is to be least."""
    for decorate in (
        option(
            "--risk-batches",
            type=Whole(4),
            help="Steps to draw for --risk [default: 1000]; with mean, their mean.",
        ),
        option(
            "--risk",
            type=click.Choice(["mean", "p95", "p99", "cvar95"]),
            default="mean",
            help="What to minimise of step time or load: over steps drawn from the trace, unless it is the mean.",
        ),
    ):
        command = decorate(command)
    return command


def moves(command: Command) -> Command:
    """Add limits on what moves from the baseline."""
    for decorate in (
        option(
            "--horizon-steps",
            type=Whole(1),
            help="With --baseline: steps over which the time of moving must repay itself, as part of the step time.",
        ),
        option("--max-moved-bytes-per-gpu", type=Size(), help="With --baseline: weights any GPU may load: 500MB, 2GB."),
        option("--max-moved-bytes", type=Size(), help="With --baseline: weights that may be loaded in all."),
        option("--max-moves", type=Portion(), help="With --baseline: copies that may move, a number or a share: 10%."),
    ):
        command = decorate(command)
    return command


def constants(command: Command) -> Command:
    """Add what times depend on beside hardware and model."""
    dtype = click.Choice(["fp8", "bf16"])
    for decorate in (
        option("--combine-dtype", type=dtype, help="What results are sent back as; default: as for the model."),
        option("--dispatch-dtype", type=dtype, help="What tokens are sent to experts as; default: as for the model."),
        option(
            "--compute-table",
            type=click.Path(),
            help="CSV of measured expert GEMMs to fit compute to: activated_experts,rows_per_expert,time_us.",
        ),
    ):
        command = decorate(command)
    return command


def routing_choice(usual: str) -> Callable[[Command], Command]:
    """Return the option that names the replica choice, with what it is by default."""
    return option(
        "--routing",
        type=click.Choice(["even", "weighted", "nearest", "topology-aware", "lp-static", "lp", "fewest-gpus"]),
        help=f"Which copy of an expert serves a token; lp splits every step's tokens evenly. Default: {usual}.",
    )


def execution(command: Command) -> Command:
    """Add how an engine runs a step."""
    for decorate in (
        option("--attention", "with_attention", is_flag=True, help="Count the time of attention too."),
        option("--micro-batches", type=Whole(1), help="Micro-batches of --overlap ping-pong; default 3."),
        option(
            "--overlap",
            type=click.Choice(["none", "dual-batch", "ping-pong"]),
            default="none",
            help="How computing and communicating overlap; the last two count attention.",
        ),
        option(
            "--homes",
            type=Homes(["auto", "recorded", "turn", "random", "affinity"]),
            default="auto",
            help="Which GPU holds a request: recorded, turn, random, or affinity:N, the one with room that its first "
            "N (64) tokens visited most; auto: recorded if it can be, else in turn.",
        ),
        routing_choice("even, or what a placement file names"),
    ):
        command = decorate(command)
    return command


def batch_law(command: Command) -> Command:
    """Add the batch law and the dataflow."""
    for decorate in (
        option("--batch-tokens", type=Whole(1), help="Consecutive tokens of each request in a step; default 1, 128."),
        option(
            "--batch-requests",
            type=Whole(1),
            help="Requests in a step, over all GPUs; default 256 in decode, 64 in prefill.",
        ),
        option("--batch-prefill-tokens", type=Whole(1), help="Of a mixed step: tokens of each prompt; default 128."),
        option("--batch-prefill-requests", type=Whole(1), help="Of a mixed step: prompts in it; default 16."),
        option(
            "--arrival",
            type=click.Choice(["uniform", "consecutive"]),
            default="uniform",
            help="Whether any requests meet in a step, or neighbours in the trace.",
        ),
        option(
            "--phase",
            type=click.Choice(["prefill", "decode", "mixed"]),
            help="Use only tokens of this phase; mixed steps decode and take chunks of prompts.",
        ),
        option(
            "--dataflow",
            type=click.Choice(["dispatch-combine", "context-coherent"]),
            default="dispatch-combine",
            help="Whether tokens return home after every MoE layer or stay where their expert is.",
        ),
    ):
        command = decorate(command)
    return command
