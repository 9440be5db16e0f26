"""Options shared by commands, and the types of their values."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """Seconds, written ``90``, ``90s``, ``5m`` or ``1h``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a duration in seconds."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h)?\s*", str(value))
        if not match or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a duration: write 90, 90s, 5m or 1h", param, ctx)
        return float(match[1]) * _SECONDS[match[2] or "s"]


class Share(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """A fraction, written ``0.01`` or ``1%``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a fraction between 0 and 1."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            self.fail(f"{value!r} is not a share: write 0.01 or 1%", param, ctx)
        return share


class KeyValue(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """``KEY=VALUE``."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the first ``=``."""
        if isinstance(value, tuple):
            return (str(value[0]), str(value[1]))
        key, equals, text = str(value).partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key.strip().replace("_", "-"), text.strip()


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """Add a click option that can also be set as ``MOEPLACE_<OPTION>``."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "MOEPLACE_" + long.removeprefix("--").replace("-", "_").upper()
    settings.setdefault("show_default", settings.get("default") is not None and not settings.get("is_flag"))
    decorate: Callable[[Command], Command] = click.option(*names, envvar=variable, **settings)
    return decorate


def _read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    try:
        table = tomllib.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{value}: {error}", ctx, param) from error
    known = {name: item for item in ctx.command.params for name in _spellings(item)}
    chosen: dict[str, Any] = {}
    for key, setting in table.items():
        item = known.get(key.replace("_", "-"))
        if item is None or item.name in ("config", None):
            raise click.BadParameter(f"{value}: {ctx.command.name} has no option {key!r}", ctx, param)
        chosen[str(item.name)] = setting
    ctx.default_map = {**(ctx.default_map or {}), **chosen}


def _spellings(item: click.Parameter) -> list[str]:
    return [name.lstrip("-") for name in item.opts if name.startswith("--")]


def common(command: Command) -> Command:
    """Add ``--json``, ``--quiet``, ``--verbose``, ``--config`` and ``--debug``."""
    for decorate in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors."),
        click.option(
            "--config",
            type=click.Path(dir_okay=False),
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            help="TOML file of options (keys are long option names).",
        ),
        option(
            "--threads",
            type=click.IntRange(1),
            default=lambda: os.cpu_count() or 1,
            show_default="all cores",
            help="Threads; the result does not depend on them.",
        ),
        option("--verbose", "-v", is_flag=True, help="Write the log to standard error even if it is not a terminal."),
        option("--quiet", "-q", is_flag=True, help="Write nothing but results and errors."),
        option("--json", "as_json", is_flag=True, help="Write JSON to standard output."),
    ):
        command = decorate(command)
    return command


def trace_input(command: Command) -> Command:
    """Add the trace argument and how it is read."""
    for decorate in (
        option("--skip-bad", type=click.IntRange(0), default=0, help="Skip up to this many bad rows, with a warning."),
        option("--input-format", help="Format of the trace; default: by content (moeplace list formats)."),
        option("--model", help="Model preset, Hugging Face id or TOML file (moeplace list models)."),
        click.argument("trace", type=click.Path(allow_dash=True)),
    ):
        command = decorate(command)
    return command


def hardware(command: Command) -> Command:
    """Add what the GPUs and their network are."""
    for decorate in (
        option("--num-gpus", "--ep-size", "num_gpus", type=click.IntRange(1), help="GPUs; alone: one scale-up domain."),
        option("--accelerator", help="Accelerator preset or TOML file (moeplace list accelerators)."),
        option("--topology", "-t", help="Preset, TOML file or KIND:DIMS, e.g. scale-up:8, scale-out:2x8."),
    ):
        command = decorate(command)
    return command


def batch_law(command: Command) -> Command:
    """Add the batch law and the dataflow."""
    for decorate in (
        option("--batch-tokens", type=click.IntRange(1), help="Consecutive tokens of each request in a step."),
        option("--batch-requests", type=click.IntRange(1), help="Requests in a step, over all GPUs."),
        option("--phase", type=click.Choice(["prefill", "decode"]), help="Use only tokens of this phase."),
        option(
            "--dataflow",
            type=click.Choice(["dispatch-combine", "context-coherent"]),
            default="dispatch-combine",
            help="Whether tokens return home after every MoE layer or stay where their expert is.",
        ),
    ):
        command = decorate(command)
    return command
