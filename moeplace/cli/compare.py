"""``moeplace compare``: solvers side by side on held-out requests, over seeds, topologies and traces."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeplace.cli import EXIT_INTERRUPTED
from moeplace.cli.inputs import check_paths, choices_of, warn
from moeplace.cli.options import batch_law, common, constants, execution, goal, option, risk, threads
from moeplace.cli.values import Duration, Whole

if TYPE_CHECKING:
    from moeplace.engines import Engine
    from moeplace.results import Results
    from moeplace.spool import Spooled
    from moeplace.trials import Outcome, Setup, TraceFile, TrialItem
    from moeplace.validated import Validated

EPILOG = """\b
Examples:
  moeplace compare trace.npz --solvers linear,eplb,auto --topologies scale-out:2x8
  moeplace compare trace.npz -s eplb,moetuner -t scale-up:8,torus:2x2x2 --seeds 5 --json
  moeplace compare a.npz b.npz -s linear,eplb --num-gpus 8 --results out/grid --jobs 2
  moeplace compare trace.npz -s eplb,auto --num-gpus 64 --num-redundant-experts 32 --by time:0.5
  moeplace compare trace.npz -s eplb,saa -t scale-up:8 --objective load --risk p99
  moeplace compare trace.npz -s eplb,auto -t scale-out:2x4 --validate --results out/held-out --jobs 2
  moeplace compare trace.npz --suite published -t scale-out:2x4 --num-redundant-experts 16 --seeds 1
"""
STDIN = "-"
USUAL = ("linear", "eplb", "auto")
EXIT_NOTHING_FOUND = 4


@click.command("compare", epilog=EPILOG)
@click.argument("traces", nargs=-1, required=True, type=click.Path(allow_dash=True), metavar="TRACE...")
@option(
    "--solvers",
    "-s",
    help="Comma-separated SOLVER[:OPTION=VALUE…][@ROUTING] (moeplace list solvers); default: linear,eplb,auto.",
)
@option(
    "--suite", metavar="NAME", help="published: all published methods that fit, and ours, in one table; -s adds more."
)
@option("--topologies", "-t", metavar="NAMES", help="Comma-separated presets, TOML files or KIND:DIMS.")
@option("--seeds", type=Whole(1), default=3, help="Seeds 0 to N-1, each with its own split, run and steps.")
@option("--by", metavar="SPLIT", default="half", help="half: another half per seed; or domain:NAME,…, time:FRACTION.")
@option("--num-gpus", "--ep-size", "num_gpus", type=Whole(1), help="GPUs; alone: one scale-up domain.")
@option("--accelerator", metavar="NAME", help="Accelerator preset or TOML file (moeplace list accelerators).")
@option("--model", metavar="NAME", help="Model preset, Hugging Face id or TOML file (moeplace list models).")
@option("--input-format", metavar="NAME", help="Format of the traces; default: by content (moeplace list formats).")
@option("--skip-bad", type=Whole(0), help="Skip up to this many bad rows, or files of a folder of requests.")
@goal
@risk
@option("--time-limit", type=Duration(), default="1m", help="Of one run of one solver: 90, 90s, 5m.")
@option("--deterministic", is_flag=True, help="No stop by the wall clock: the work budget alone ends a run.")
@option("--work", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Scale of the work budget.")
@option("--batches", type=Whole(2), show_default="300", help="Steps to draw for each seed.")
@option(
    "--results",
    type=click.Path(file_okay=False),
    help="Folder that keeps every run, so that the same or a larger grid goes on there; gets JSON, CSV and Markdown.",
)
@option(
    "--validate",
    is_flag=True,
    help="Also fit and test by request (--seeds halves), time and domain, on a null trace and on less of the trace: "
    "gains over EPLB in the objective, with intervals over resampled requests.",
)
@option("--jobs", type=Whole(1), default=1, help="Runs at the same time, in processes of this machine.")
@option("--cluster", metavar="ADDRESS", help="Run on a Dask cluster: tcp://HOST:PORT or a scheduler file.")
@option("--work-dir", type=click.Path(file_okay=False), help="Where the progress on many files is kept.")
@batch_law
@execution
@constants
@threads
@common
def compare_command(traces: tuple[str, ...], solvers: str | None, topologies: str | None, **options: Any) -> int:
    """Compare solvers on held-out requests.

    Each solver is fitted on one part of a TRACE and judged on the rest by the step time of the same drawn steps, for
    every topology and seed. A star marks the best of a column where its 95 % interval lies below all others'. Times are
    model outputs, not measurements; solving times are wall time of this machine.
    """
    from moeplace.cli.validating import run_items, validation_items
    from moeplace.comparison import compare, comparison_to_dict, notes_of
    from moeplace.report import write_json
    from moeplace.results import Results
    from moeplace.scoreboard import comparison_tables, suite_tables, validation_tables

    check_paths([*traces, None], None)
    if STDIN in traces and (len(traces) > 1 or options["jobs"] > 1 or options["cluster"] or options["results"]):
        raise click.UsageError("standard input is one trace, read here, and not kept: give a file")
    setup = _setup(options)
    names = _methods(solvers, options["suite"]), _topologies(topologies, setup)
    results = Results(options["results"]) if options["results"] else None
    sources = _sources(traces, options)
    items = list(_items(sources, names, options["seeds"], setup))
    # refused before the first run where it cannot be
    checks = validation_items(sources, names, options["seeds"], setup) if options["validate"] else []
    shown = not options["quiet"] and (options["verbose"] or sys.stderr.isatty())
    outcomes, interrupted = _run(items, options, results, _Log(len(items), shown=shown))
    warn(notes_of(outcomes), quiet=options["quiet"])
    _tell_failures(outcomes)
    rows, found = compare(outcomes), None
    if options["validate"] and not interrupted:
        found, interrupted = run_items(checks, lambda runs: _engine(options, runs), results, shown=shown)
        _tell_unvalidated(found)
    if results is not None:
        _write(results, outcomes, setup, found)
    if options["as_json"]:
        write_json(comparison_to_dict(outcomes, setup, found))
    else:
        (suite_tables if options["suite"] else comparison_tables)(rows)
        validation_tables(found or ())
    if interrupted:
        kept = f", kept in {options['results']}: the same command goes on from there" if results else ""
        click.echo(f"{len(outcomes):,} of {len(items):,} runs are done{kept}", err=True)
        return EXIT_INTERRUPTED
    return 0 if rows else EXIT_NOTHING_FOUND


def _setup(options: dict[str, Any]) -> Setup:
    from moeplace.cli.score import score_options
    from moeplace.split import parse_split
    from moeplace.trials import HALF, Setup

    if options["by"] != HALF:
        parse_split(options["by"])
    scoring = score_options({**options, "seed": 0})
    return Setup(
        choices=choices_of(options),
        split=options["by"],
        limits={
            "time_limit_s": math.inf if options["deterministic"] else options["time_limit"],
            "work": options["work"],
        },
        scoring={key: value for key, value in scoring.items() if key not in ("seed", "threads")},
        threads=1 if options["cluster"] else max(1, options["threads"] // options["jobs"]),
    )


def _methods(text: str | None, suite_name: str | None) -> tuple[str, ...]:
    """Return the methods of a suite and those that are named: these must exist."""
    from moeplace.solvers import AUTO, load_solver
    from moeplace.suites import Method, suite

    together = () if suite_name is None else suite(suite_name)
    if text is None:
        return together or USUAL
    named = _names(text, "--solvers")
    for name in (part for method in named for part in Method.of(method).solver.split("+")):
        if name != AUTO:
            load_solver(name)
    return tuple(dict.fromkeys((*together, *named)))


def _topologies(text: str | None, setup: Setup) -> tuple[str, ...]:
    from moeplace.build import topology_for
    from moeplace.frozen import replaced

    if text is None:
        return (topology_for(setup.choices).name,)
    names = _names(text, "--topologies")
    for name in names:
        topology_for(replaced(setup.choices, topology=name))
    return names


def _names(text: str, flag: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise click.UsageError(f"{flag} names none")
    return names


def _sources(traces: Sequence[str], options: dict[str, Any]) -> dict[str, TraceFile | Spooled]:
    """Label → trace, each looked at before the first run."""
    from moeplace.cli.corpora import spool_source
    from moeplace.parts import parted
    from moeplace.spool import Spooled
    from moeplace.trials import TraceFile, opened

    found: dict[str, TraceFile | Spooled] = {}
    short = [Path(name).name.split(".")[0] or name for name in traces]
    for name, label in zip(traces, short, strict=True):
        own = label if short.count(label) == 1 else name
        if own in found:
            raise click.UsageError(f"{name} is given twice")
        file = TraceFile(
            path=name,
            input_format=options["input_format"],
            skip_bad=options["skip_bad"],
            model=options["model"],
        )
        source = opened(file)
        found[own] = file
        if parted(source) is not None:
            if options["cluster"]:
                raise click.UsageError(f"{name} is a folder or archive: for a cluster, moeplace convert it to npz")
            spooled = spool_source(source, {**options, "cluster": None})
            found[own] = spooled if isinstance(spooled, Spooled) else file
    return found


def _items(
    sources: Mapping[str, TraceFile | Spooled], names: tuple[Sequence[str], Sequence[str]], seeds: int, setup: Setup
) -> Iterator[TrialItem]:
    """All runs; those that share a part of a trace follow one another."""
    from moeplace.trials import Trial, TrialItem

    for label, source in sources.items():
        for seed in range(seeds):
            for topology in names[1]:
                for solver in names[0]:
                    trial = Trial(trace=label, topology=topology, solver=solver, seed=seed)
                    yield TrialItem(trial=trial, source=source, setup=setup)


def _engine(options: dict[str, Any], runs: int) -> Engine:
    from moeplace.engines import DaskCluster, InProcess, Processes

    if options["cluster"]:
        return DaskCluster(options["cluster"])
    jobs = min(options["jobs"], runs)
    return Processes(jobs) if jobs > 1 else InProcess()


def _run(
    items: Sequence[TrialItem], options: dict[str, Any], results: Results | None, log: _Log
) -> tuple[list[Outcome], bool]:
    """Run what is not kept yet; outcomes in the order of the items, and whether the user stopped it."""
    from moeplace.trials import run_item

    kept = {} if results is None else {item.trial: results.load(item) for item in items}
    done = {trial: outcome for trial, outcome in kept.items() if outcome is not None}
    waiting = {item.trial: item for item in items if item.trial not in done}
    log.begin(len(done))
    interrupted = False
    try:
        with _engine(options, len(waiting)) as engine:
            for outcome in engine.run(run_item, waiting.values()):
                if results is not None:
                    results.save(waiting[outcome.trial], outcome)
                done[outcome.trial] = outcome
                log.tell(outcome)
    except KeyboardInterrupt:
        interrupted = True
    return [done[item.trial] for item in items if item.trial in done], interrupted


class _Log:
    """A line for every run that is done."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total, self._shown, self._done = total, shown, 0
        self._started = time.monotonic()

    def begin(self, kept: int) -> None:
        """Tell how many runs there are, and how many are known already."""
        self._done = kept
        if self._shown:
            known = f", {kept:,} of them kept from before" if kept else ""
            click.echo(f"{self._total:,} run{'s' * (self._total != 1)}{known}", err=True)

    def tell(self, outcome: Outcome) -> None:
        """Tell what came of a run."""
        self._done += 1
        if not self._shown:
            return
        found = outcome.failure or ", ".join(f"{times.phase} {times.step_us.mean():,.1f} µs" for times in outcome.times)
        place = f"{time.monotonic() - self._started:7.1f}s  {self._done:,}/{self._total:,}"
        click.echo(f"{place}  {outcome.trial}: {found}, solved in {outcome.solve_s:.2f} s", err=True)


def _tell_failures(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.failure is not None:
            click.echo(f"warning: {outcome.trial}: {outcome.failure}", err=True)


def _tell_unvalidated(found: Sequence[Validated]) -> None:
    for one in found:
        if one.failure is not None:
            click.echo(
                f"warning: {one.trial.solver} on {one.trial.topology}, {one.trial.trace}: {one.failure}", err=True
            )


def _write(results: Results, outcomes: Sequence[Outcome], setup: Setup, found: Sequence[Validated] | None) -> None:
    """Write JSON, CSV and Markdown beside the runs that are kept."""
    from moeplace.comparison import compare, comparison_to_csv, comparison_to_dict
    from moeplace.scoreboard import comparison_markdown

    rows = compare(outcomes)
    document = json.dumps(comparison_to_dict(outcomes, setup, found), sort_keys=True, indent=1, ensure_ascii=False)
    results.write(results.folder / "comparison.json", document + "\n")
    results.write(results.folder / "comparison.csv", comparison_to_csv(rows))
    results.write(results.folder / "comparison.md", comparison_markdown(rows, found or ()))
