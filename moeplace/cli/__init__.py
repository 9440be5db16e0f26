"""The command line: parses, calls the library, prints. No logic of its own.

Every error of the library becomes one message on standard error and the exit code of its kind; ``--debug`` shows where
it was raised. Commands are imported when they are called, so that ``--help`` is quick.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

import click

from moeplace.errors import MoeplaceError

COMMANDS = {
    "solve": ("moeplace.cli.solve", "Choose where experts live, from a routing trace."),
    "score": ("moeplace.cli.score", "Judge placements on a trace: step-time tails, load, traffic."),
    "stats": ("moeplace.cli.traces", "Show what a routing trace says."),
    "diff": ("moeplace.cli.score", "Compare two placements: what moves, and how much."),
    "convert": ("moeplace.cli.traces", "Turn a trace into another native format, or a part of it."),
    "list": ("moeplace.cli.info", "List solvers, topologies, models, accelerators or formats."),
    "doctor": ("moeplace.cli.info", "Show versions and what this machine can run."),
}
EPILOG = """\b
Examples:
  moeplace solve trace.jsonl -o placement.json
  moeplace solve trace.npz --topology scale-out:2x8 --model deepseek-v3 --fit half:0 -o placement.json
  moeplace score trace.npz placement.json linear --topology scale-out:2x8 --test half:0
  moeplace stats trace.npz
"""
EXIT_INPUT, EXIT_INTERRUPTED = 1, 130
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class LazyGroup(click.Group):
    """A group whose commands are imported when called, and that suggests the nearest name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Suggest commands for a typo."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=2, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else f" Commands: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib import metadata

        click.echo(f"moeplace {metadata.version('moeplace')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings=CONTEXT, epilog=EPILOG)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Decide where the experts of a Mixture-of-Experts model live.

    Every option can also be set as MOEPLACE_<OPTION> in the environment or in --config run.toml; a flag wins over the
    environment, which wins over the file. Exit codes: 0 a valid answer, 1 bad input or failed run, 2 usage, 3 proven
    infeasible, 4 nothing found in the limit, 5 --require unmet, 130 interrupted.
    """
    ctx.meta["debug"] = debug or bool(os.environ.get("MOEPLACE_DEBUG"))


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if args is None else args
    debug = "--debug" in words or bool(os.environ.get("MOEPLACE_DEBUG"))
    try:
        result = cli.main(args=args, prog_name="moeplace", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader left (| head): point stdout elsewhere so that interpreter shutdown stays silent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MoeplaceError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except MemoryError:
        click.echo("error: out of memory\nhint: --phase, a shorter trace, or a machine with more", err=True)
        return EXIT_INPUT
    except Exception as error:
        if debug:
            raise
        click.echo(f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)", err=True)
        return EXIT_INPUT
