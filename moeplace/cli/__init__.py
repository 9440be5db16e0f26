"""The command line: parses, calls the library, prints. No logic of its own.

Every error of the library becomes one message on standard error and the exit code of its kind; ``--debug`` shows where
it was raised. Commands are imported when they are called, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import sys
from typing import Any

import click
from click.core import ParameterSource

from moeplace.errors import MoeplaceError

COMMANDS = {
    "solve": ("moeplace.cli.solve", "Choose where experts live, from a routing trace."),
    "score": ("moeplace.cli.score", "Judge placements on a trace: step-time tails, load, traffic."),
    "compare": ("moeplace.cli.compare", "Compare solvers: fit, judge on the rest, over seeds and topologies."),
    "plan": ("moeplace.cli.plan", "Find the cluster, topology and split of least cost per token."),
    "stats": ("moeplace.cli.stats", "Show what a routing trace says."),
    "export": ("moeplace.cli.files", "Write a placement in the form a serving stack loads."),
    "check": ("moeplace.cli.files", "Check a placement file by the rules of the stack that loads it."),
    "diff": ("moeplace.cli.files", "Compare two placements: what moves, from where, in what order."),
    "convert": ("moeplace.cli.convert", "Turn a trace into another native format, or a part of it."),
    "synth": ("moeplace.cli.synth", "Make a synthetic trace in the shape of a model."),
    "list": ("moeplace.cli.info", "List solvers, topologies, models, accelerators, prices or formats."),
    "help": ("moeplace.cli.guides", "Tell how to record, place and load with a serving stack."),
    "doctor": ("moeplace.cli.info", "Show versions and what this machine can run."),
}
EPILOG = """\b
Examples:
  moeplace stats trace.npz
  moeplace solve trace.jsonl -o placement.json
  moeplace solve trace.npz -t scale-out:2x8 --fit half:0 -o placement.json
  moeplace score trace.npz placement.json linear --test half:0

\b
Completion of commands and options, for bash (or zsh_source, fish_source):
  eval "$(_MOEPLACE_COMPLETE=bash_source moeplace)"
"""
EXIT_INPUT, EXIT_INTERRUPTED = 1, 130
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _ReaderLeftError(Exception):
    """Standard output is a pipe whose reader left (``| head``)."""


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

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a reader that left is no error, and click must not turn it into one."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderLeftError from error

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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. Python ends itself by the signal, whatever the exit code, once a plain one has crossed a nested exec.

    ``seen`` tells of one that was lost: importing an extension module turns it into an ImportError.
    """

    seen = False


def _interrupt(number: int, frame: object) -> None:
    Interrupted.seen = True
    raise Interrupted


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    with contextlib.suppress(ValueError):
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, _interrupt)
    # a scheduler's SIGTERM removes temporary files and stops a solver just as Ctrl-C does
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + signal.SIGTERM))
    code = EXIT_INTERRUPTED
    with contextlib.suppress(KeyboardInterrupt):  # a second one, while the first is being told
        code = run(args)
    # Python's own end takes a moment too, and would answer Ctrl-C with a traceback
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(code))
    sys.exit(code)


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if args is None else args
    debug = "--debug" in words or bool(os.environ.get("MOEPLACE_DEBUG"))
    _open_closed_streams()
    try:
        result = cli.main(args=args, prog_name="moeplace", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        _tell(_usage(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _tell("interrupted")
        return EXIT_INTERRUPTED
    except (BrokenPipeError, _ReaderLeftError):
        _silence_stdout()
        return 0
    except Exception as error:
        if Interrupted.seen and not isinstance(error, MoeplaceError):
            _tell("interrupted")
            return EXIT_INTERRUPTED
        if debug:
            raise
        _tell(_message(error))
        if isinstance(error, OSError):
            _silence_stdout()
        return error.exit_code if isinstance(error, MoeplaceError) else EXIT_INPUT


def _message(error: Exception) -> str:
    if isinstance(error, MoeplaceError):
        return f"error: {error}"
    if isinstance(error, MemoryError):
        return "error: out of memory\nhint: --phase, a shorter trace, or a machine with more"
    if isinstance(error, OSError) and error.filename is None:
        return f"error: standard output cannot be written: {error.strerror or error}"
    return f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)"


def _usage(error: click.ClickException) -> str:
    """A usage error in the form of every other: what is wrong, where the value came from, and where to read more."""
    text, ctx = f"error: {error.format_message()}", getattr(error, "ctx", None)
    if ctx is None:
        return text
    param = getattr(error, "param", None)
    if isinstance(error, click.BadParameter) and param is not None and param.name:
        source = ctx.get_parameter_source(param.name)
        if source is ParameterSource.ENVIRONMENT:
            text += f" (from the environment: {param.envvar})"
        elif source is ParameterSource.DEFAULT_MAP:
            text += " (from the --config file)"
    return f"{text}\nhint: {ctx.command_path} --help explains every option"


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # standard error may be gone too
        click.echo(text, err=True)


def _open_closed_streams() -> None:
    """Give the streams a caller closed something to write to: standard output fails, standard error is silent."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 # open as long as the process


def _silence_stdout() -> None:
    """Point standard output elsewhere, so that what is still buffered does not fail again at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
