"""``moeplace solve``: the whole pipeline, from a trace to a placement file."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from moeplace.cli import EXIT_INTERRUPTED
from moeplace.cli.inputs import check_paths, choices_of, open_source, warn
from moeplace.cli.options import (
    batch_law,
    common,
    constants,
    goal,
    hardware,
    moves,
    option,
    risk,
    routing_choice,
    threads,
    trace_input,
)
from moeplace.cli.values import Duration, Homes, KeyValue, Requirement, Share, Whole
from moeplace.cli.watch import watch_trace

if TYPE_CHECKING:
    from moeplace.build import Choices
    from moeplace.problem import Problem
    from moeplace.report import SolveLog
    from moeplace.solution import Limits, Solution
    from moeplace.trace import Counts, TraceStream

EPILOG = """\b
Examples:
  moeplace solve trace.jsonl -o placement.json
  moeplace solve trace.npz -t hgx-h100-2x8 --slots-per-gpu 17 -o new.json
  moeplace solve trace.npz -t scale-out:2x4 --solver moetuner --time-limit 2m
  moeplace solve trace.npz --baseline old.json --require 5% -o new.json
  moeplace solve trace.npz --slots-per-gpu 5 --objective copies --routing fewest-gpus --load-cap 1.05 -o few.json
  moeplace solve trace.npz --baseline old.json --max-moves 10% --horizon-steps 100000 -o near.json
  moeplace solve grows.jsonl --baseline now.json --horizon-steps 100000 --watch 5m -o next.json
  moeplace solve trace.npz -t scale-out:2x4 --dataflow context-coherent --pareto -o best.json
  moeplace solve trace.npz --risk p99 --batch-requests 32 --fit half:0 -o steady.json
  moeplace solve trace.npz --objective load --risk p99 --copies-cap eplb-6% -o both.json
  moeplace solve monday.npz sunday.npz --robust --objective load -o any-day.json
  moeplace solve trace.npz --risk p99 --objective load --validate
  zcat trace.jsonl.gz | moeplace solve - --objective load > placement.json
"""


@click.command("solve", epilog=EPILOG)
@trace_input
@click.argument("others", nargs=-1, type=click.Path())
@hardware
@goal
@risk
@option(
    "--copies-cap",
    metavar="X|eplb-6%",
    help="With --objective load: hard cap on copies per token, a number or so much less than EPLB's placement has.",
)
@option(
    "--solver",
    "-s",
    metavar="NAME",
    default="auto",
    help="NAME, or NAME+NAME where each starts from the one before, if it can (moeplace list solvers).",
)
@option(
    "--backend", type=click.Choice(["cbc", "cpsat", "highs"]), help="Integer programming solver of ilp and moetuner."
)
@option(
    "--option", "solver_options", type=KeyValue(), multiple=True, help="Option of the solver (moeplace list solvers)."
)
@option(
    "--grace-ratio",
    metavar="R|knee",
    help="How uneven GRACE's groups of GPUs may be, 0 to 1 (the paper: 0.15); default: the knee.",
)
@option("--time-limit", type=Duration(), default="5m", help="Safety stop by the wall clock: 90, 90s, 5m.")
@option("--deterministic", is_flag=True, help="No stop by the wall clock: the work budget alone ends the run.")
@option(
    "--work", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Scale of the deterministic work budget."
)
@option("--gap", type=Share(), default="0", help="Stop at this relative gap: 0.01 or 1%.")
@option("--seed", type=Whole(0), default=0, help="Random seed.")
@routing_choice("even")
@option("--pareto", is_flag=True, help="Sweep the load cap, show the front, and return its least step time.")
@option(
    "--robust",
    is_flag=True,
    help="Choose for the worst of several traces, or of a trace's domains, by what methods lose on one left out.",
)
@option(
    "--robust-radius",
    type=click.FloatRange(0, 1),
    default=1.0,
    help="With --robust: how far the mixture may be from equal parts: 1 any one alone, 0 equal parts.",
)
@option("--fit", metavar="SPLIT", help="Fit on a part of the trace: half:SEED, domain:NAME,… or time:FRACTION.")
@option(
    "--homes",
    type=Homes(["affinity"]),
    help="Rename GPUs for servers that give a request the rank its first N (64) tokens visit most: affinity:N.",
)
@option("--baseline", type=click.Path(allow_dash=True), help="The placement now deployed, to count moves from.")
@moves
@option("--watch", type=Duration(), help="Look this often whether the trace has grown: 30s, 5m; ends by Ctrl-C.")
@option("--watch-rounds", type=Whole(1), help="With --watch: end after so many looks.")
@option("--format", "output_format", metavar="NAME", default="native", help="Placement format (moeplace list formats).")
@option("--output", "-o", type=click.Path(allow_dash=True), help="Where the placement goes; default: standard output.")
@option(
    "--require",
    type=Requirement(),
    help="Exit with code 5 unless the answer is 'optimal', or has at most this gap (1%).",
)
@option(
    "--validate",
    is_flag=True,
    help="Write no placement: fit and test on splits, on a trace without affinity, and on less of the trace.",
)
@option("--dry-run", is_flag=True, help="Read and check everything, print the assumptions, solve nothing.")
@batch_law
@constants
@threads
@common
def solve_command(trace: str, others: tuple[str, ...], output: str | None, fit: str | None, **options: Any) -> int:
    """Choose where experts live.

    TRACE is a file of routed tokens or of expert counts, or - for standard input; gzip and zstd are recognised. The
    placement goes to -o, or to standard output when that is not a terminal (or with --json or --quiet); the log goes
    to standard error.
    """
    from moeplace.build import assumptions, build_problem, check_law, describe, preset_for, trace_warnings
    from moeplace.cohosting import cohost
    from moeplace.exporters import (
        DEFAULT,
        Target,
        beside,
        check_room,
        load_exporter,
        numbering_note,
        routing_note,
        suffix_for,
        write_placement,
    )
    from moeplace.exporters.native import document_of
    from moeplace.feasible import check_cap
    from moeplace.files import atomic_output
    from moeplace.front import trace_front
    from moeplace.report import SolveLog
    from moeplace.solvers import load_solver
    from moeplace.soundness import count_and_doubt

    check_paths([trace, options["baseline"]], output, keep=[trace])
    exporter, suffix = load_exporter(options["output_format"]), suffix_for(options["output_format"], output)
    for name in options["solver"].split("+"):
        if name != "auto":
            load_solver(name)
    _check_usage(others, options)
    if options["watch"] is not None or options["validate"]:
        return (_validate if options["validate"] else _watch)(trace, output, fit, options)
    quiet = options["quiet"]
    to_stdout = output is None and (options["as_json"] or quiet or not sys.stdout.isatty())
    target = "-" if to_stdout else output
    log = SolveLog(shown=not quiet and (options["verbose"] or sys.stderr.isatty()))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(atomic_output(target)) if target and not options["dry_run"] else None
        choices = choices_of(options)
        log.stage("reading", trace)
        source = open_source(trace, options, split=fit)
        check_law(
            source, requests=choices.batch_requests, tokens=choices.batch_tokens, risk_batches=choices.risk_batches
        )
        stats, doubts = count_and_doubt(source, threads=options["threads"])
        problem = build_problem(source, choices, stats=stats)
        check_room(options["output_format"], problem)
        said, noted = assumptions(problem, choices), trace_warnings(source, problem, doubts)
        if options["dry_run"]:
            check_cap(problem)
            _show_plan(describe(problem), said, noted, as_json=options["as_json"])
            return 0
        log.head(describe(problem), said, noted)
        known = problem.model if choices.model or preset_for(source.meta, source.meta.model_id) else None
        noted += numbering_note(options["output_format"], known, source.meta.layer_ids)
        noted += routing_note(options["output_format"], problem.routing)
        warn((*said, *noted), quiet=quiet or log.shown)
        limits = _limits(options)
        with _stop_on_interrupt(limits.stop):
            front = None
            if options["pareto"]:
                front, solution = trace_front(problem, options["solver"], limits, log)
                log.front(front)
            else:
                problem, solution = _solution(problem, choices, source, limits, log, (trace, others, options))
        if options["homes"]:
            test = open_source(trace, options, split=fit, part="test") if fit else None
            solution = cohost(problem, solution, options["homes"], source, test)
        log.tail(solution, problem)
        document = document_of(problem, solution, limits, front)
        if file is not None:
            if options["output_format"] != DEFAULT and (kept := beside(target)):
                write_placement(document, kept)
                log.end(f"bound, terms and provenance written to {kept}")
            exporter.write(document, file, Target(model=problem.model, num_gpus=problem.num_gpus), suffix)
    if file is None:
        log.end("not written: name a file with -o FILE, or send the output to a pipe or a file")
    elif target != "-":
        log.end(f"written to {output}")
        if options["as_json"]:
            load_exporter(DEFAULT).write(document, sys.stdout.buffer, Target())
    _check_requirement(solution, options["require"])
    return EXIT_INTERRUPTED if limits.stop.is_set() else 0


def _check_usage(others: tuple[str, ...], options: dict[str, Any]) -> None:
    if options["pareto"] and options["objective"] != "step-time":
        raise click.UsageError(f"--pareto chooses by predicted step time: leave out --objective {options['objective']}")
    if others and not options["robust"]:
        raise click.UsageError(f"one trace, not {1 + len(others)}: several are for --robust")
    if options["homes"] and (options["baseline"] or options["watch"] is not None or options["validate"]):
        raise click.UsageError("--homes renames GPUs: leave out --baseline, --watch and --validate")


def _solution(
    problem: Problem,
    choices: Choices,
    source: TraceStream | Counts,
    limits: Limits,
    log: SolveLog,
    asked: tuple[str, tuple[str, ...], dict[str, Any]],
) -> tuple[Problem, Solution]:
    """Solve, for one trace or for the worst of several."""
    from moeplace.robust import solve_robust
    from moeplace.solvers import solve

    trace, others, options = asked
    if not options["robust"]:
        return problem, solve(problem, options["solver"], limits, log)
    if options["solver"] != "auto":
        raise click.UsageError("--robust chooses the solver: leave out --solver")
    sources = {trace: source}
    for number, other in enumerate(others, 2):
        sources[other if other not in sources else f"{other} ({number})"] = open_source(other, options)
    problem, solution, _ = solve_robust(sources, choices, limits, log, radius=options["robust_radius"])
    return problem, solution


def _validate(trace: str, output: str | None, fit: str | None, options: dict[str, Any]) -> int:
    from moeplace.report import SolveLog, console, say, write_json, write_table
    from moeplace.validation import validate

    if output is not None:
        raise click.UsageError("--validate writes no placement: leave out -o")
    choices, limits = choices_of(options), _limits(options)
    log = SolveLog(shown=not options["quiet"] and (options["verbose"] or sys.stderr.isatty()))
    with _stop_on_interrupt(limits.stop):
        found = validate(open_source(trace, options, split=fit), choices, options["solver"], limits, log)
    if options["as_json"]:
        write_json(found.to_dict())
    else:
        write_table(found.rows(), right=range(1, 5))
        say(found.sentence(), console())
    return EXIT_INTERRUPTED if limits.stop.is_set() else 0


def _watch(trace: str, output: str | None, fit: str | None, options: dict[str, Any]) -> int:
    choices = choices_of(options)
    limits = _limits(options)

    def open_now() -> Any:
        return open_source(trace, options, split=fit)

    with _stop_on_interrupt(limits.stop):
        return watch_trace(trace, choices, limits, options, open_now=open_now, output=output)


def _show_plan(instance: Mapping[str, str], assumed: tuple[str, ...], noted: tuple[str, ...], *, as_json: bool) -> None:
    from moeplace.report import console, write_json, write_plan

    if not as_json:
        write_plan(instance, assumed, noted, console())
        return
    told = {"instance": dict(instance), "assumptions": list(assumed), "warnings": list(noted)}
    write_json({"schema": "moeplace/dry-run/1", **told})


def _limits(options: dict[str, Any]) -> Limits:
    from moeplace.solution import Limits

    source = click.get_current_context().get_parameter_source
    if options["deterministic"] and source("time_limit") is source("deterministic") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--deterministic leaves the clock out: give it or --time-limit, not both")
    chosen = dict(options["solver_options"])
    if options["grace_ratio"] is not None:
        if "grace" not in options["solver"].split("+"):
            raise click.UsageError("--grace-ratio is for --solver grace")
        chosen["ratio"] = options["grace_ratio"]
    if options["backend"]:
        chosen["backend"] = options["backend"]
    return Limits(
        time_limit_s=math.inf if options["deterministic"] else options["time_limit"],
        gap=options["gap"],
        work=options["work"],
        seed=options["seed"],
        threads=options["threads"],
        options=chosen,
    )


def _check_requirement(solution: Solution, requirement: str | float | None) -> None:
    from moeplace.errors import RequirementError
    from moeplace.solution import Status

    if requirement is None or solution.status is Status.OPTIMAL:
        return
    if isinstance(requirement, str) or solution.gap is None or solution.gap > requirement:
        gap = "unknown" if solution.gap is None else f"{solution.gap:.3%}"
        raise RequirementError(
            f"the answer is {solution.status} with gap {gap}",
            rule=f"--require {requirement if isinstance(requirement, str) else f'{100 * requirement:g}%'}",
            hint="the placement was written all the same; a longer --time-limit or another --solver may get there",
        )


@contextlib.contextmanager
def _stop_on_interrupt(stop: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C (or SIGTERM) ask the solver for its best answer; a second one ends the program."""

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        click.echo("\nstopping; the best placement so far is kept (Ctrl-C again to give up)", err=True)

    if threading.current_thread() is not threading.main_thread():
        yield  # the caller handles signals
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
