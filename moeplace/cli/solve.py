"""``moeplace solve``: the whole pipeline, from a trace to a placement file."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from moeplace.cli import EXIT_INTERRUPTED
from moeplace.cli.inputs import choices_of, open_source, warn
from moeplace.cli.options import Duration, KeyValue, Share, batch_law, common, hardware, option, trace_input

if TYPE_CHECKING:
    from moeplace.exporters.native import PlacementFile
    from moeplace.problem import Problem
    from moeplace.solution import Limits, Solution

EPILOG = """\b
Examples:
  moeplace solve trace.jsonl -o placement.json
  moeplace solve trace.npz -t scale-out:2x8 --model deepseek-v3 --num-redundant-experts 32 -o placement.json
  moeplace solve trace.npz -t scale-out:2x4 --solver moetuner --backend cpsat --time-limit 2m --fit half:0
  zcat trace.jsonl.gz | moeplace solve - --num-gpus 8 --objective load > placement.json
"""


@click.command("solve", epilog=EPILOG)
@trace_input
@hardware
@option("--num-redundant-experts", type=click.IntRange(0), help="Extra slots per layer, in total over all GPUs.")
@option("--slots-per-gpu", type=click.IntRange(1), help="Slots of each GPU in every layer.")
@option(
    "--objective",
    type=click.Choice(["step-time", "load", "copies", "cross"]),
    default="step-time",
    help="Predicted µs per step, or one of its parts in natural units.",
)
@option("--copies-level", type=click.Choice(["gpu", "node"]), default="gpu", help="What --objective copies counts.")
@option("--load-cap", help="Hard cap on max/mean GPU load in every layer: a number, or 'eplb' for EPLB's own maximum.")
@option("--solver", "-s", default="auto", help="NAME, or NAME+NAME where each starts from the one before.")
@option("--backend", type=click.Choice(["cbc", "cpsat"]), help="Integer programming solver of moetuner.")
@option("--equal-experts", type=click.Choice(["layer", "model"]), default="layer", help="Where slots are counted.")
@option(
    "--option", "solver_options", type=KeyValue(), multiple=True, help="Option of the solver (moeplace list solvers)."
)
@option("--time-limit", type=Duration(), default="5m", help="Safety stop by the wall clock: 90, 90s, 5m.")
@option(
    "--work", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Scale of the deterministic work budget."
)
@option("--gap", type=Share(), default="0", help="Stop at this relative gap: 0.01 or 1%.")
@option("--seed", type=click.IntRange(0), default=0, help="Random seed.")
@option("--fit", help="Fit on a part of the trace: half:SEED, domain:NAME,… or time:FRACTION.")
@option("--baseline", type=click.Path(dir_okay=False), help="The placement now deployed, to count moves from.")
@option("--format", "output_format", default="native", help="Placement format (moeplace list formats).")
@option("--output", "-o", type=click.Path(allow_dash=True), help="Where the placement goes; default: standard output.")
@option("--require", help="Exit with code 5 unless the answer is 'optimal', or has at most this gap (1%).")
@option("--dry-run", is_flag=True, help="Read and check everything, print the assumptions, solve nothing.")
@batch_law
@common
def solve_command(trace: str, output: str | None, fit: str | None, **options: Any) -> int:
    """Choose where experts live.

    TRACE is a file of routed tokens or of expert counts, or - for standard input; gzip and zstd are recognised. The
    placement goes to -o, or to standard output when that is not a terminal; the log goes to standard error.
    """
    from moeplace.build import assumptions, build_problem, describe
    from moeplace.exporters import load_exporter
    from moeplace.files import atomic_output
    from moeplace.report import SolveLog
    from moeplace.solvers import load_solver, solve

    exporter = load_exporter(options["output_format"])
    requirement = _requirement(options["require"])
    for name in options["solver"].split("+"):
        if name != "auto":
            load_solver(name)
    quiet = options["quiet"]
    to_stdout = output is None and (options["as_json"] or not sys.stdout.isatty())
    target = "-" if to_stdout else output
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(atomic_output(target)) if target and not options["dry_run"] else None
        choices = choices_of(options)
        source = open_source(trace, options, split=fit)
        problem = build_problem(source, choices, threads=options["threads"])
        log = SolveLog(shown=not quiet and (options["verbose"] or sys.stderr.isatty()))
        log.head(describe(problem), assumptions(problem, choices))
        if not log.shown:
            warn(assumptions(problem, choices), quiet=quiet)
        if options["dry_run"]:
            return 0
        limits = _limits(options)
        with _stop_on_interrupt(limits.stop):
            solution = solve(problem, options["solver"], limits, log)
        log.tail(solution, problem)
        document = _document(problem, solution, limits)
        if file is not None:
            exporter.write(document, file)
        elif not quiet and not log.shown:
            log.summary(solution, problem)
    if output and options["as_json"] and output != "-":
        _write_json(document)
    _check_requirement(solution, requirement, options["require"])
    return EXIT_INTERRUPTED if limits.stop.is_set() else 0


def _limits(options: dict[str, Any]) -> Limits:
    from moeplace.solution import Limits

    chosen = dict(options["solver_options"])
    if options["backend"]:
        chosen["backend"] = options["backend"]
    return Limits(
        time_limit_s=options["time_limit"],
        gap=options["gap"],
        work=options["work"],
        seed=options["seed"],
        threads=options["threads"],
        options=chosen,
    )


def _document(problem: Problem, solution: Solution, limits: Limits) -> PlacementFile:
    from moeplace.errors import InfeasibleError, NothingFoundError
    from moeplace.exporters.native import document_of
    from moeplace.solution import Status

    if solution.placement is not None:
        return document_of(problem, solution, limits)
    why = "; ".join(solution.notes) or "no placement was found"
    if solution.status is Status.INFEASIBLE:
        raise InfeasibleError(f"{solution.solver}: {why}", hint="loosen --load-cap, or add slots")
    raise NothingFoundError(
        f"{solution.solver} stopped ({solution.stop_reason}) without an answer: {why}",
        hint="a longer --time-limit, a looser --load-cap, or another --solver",
    )


def _write_json(document: PlacementFile) -> None:
    from moeplace.exporters import native

    native.write(document, sys.stdout.buffer)


def _requirement(text: str | None) -> float | None:
    """Return the largest gap allowed: 0 for 'optimal', None for no requirement."""
    if text is None:
        return None
    return 0.0 if text == "optimal" else Share().convert(text, None, None)


def _check_requirement(solution: Solution, requirement: float | None, text: str | None) -> None:
    from moeplace.errors import RequirementError
    from moeplace.solution import Status

    if requirement is None or solution.status is Status.OPTIMAL:
        return
    if text == "optimal" or solution.gap is None or solution.gap > requirement:
        gap = "unknown" if solution.gap is None else f"{solution.gap:.3%}"
        raise RequirementError(
            f"the answer is {solution.status} with gap {gap}",
            rule=f"--require {text}",
            hint="the placement was written all the same; a longer --time-limit or another --solver may get there",
        )


@contextlib.contextmanager
def _stop_on_interrupt(stop: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C ask the solver for its best answer; a second one ends the program."""

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        click.echo("stopping; the best placement so far is kept (Ctrl-C again to give up)", err=True)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
