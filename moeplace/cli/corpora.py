"""Traces of many files on the command line: where they are read, how far that is, and which files were left out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from moeplace.affinity import RoutingStats
    from moeplace.engines import Run
    from moeplace.parts import BadFile, PartedTrace
    from moeplace.profile import TraceProfile
    from moeplace.spool import Spooled
    from moeplace.trace import Counts, TraceStream

SHOWN_BAD_FILES = 20
LINE_EVERY_S = 10.0
MEDIUM_COLUMNS, WIDE_COLUMNS = 64, 90  # of a terminal that has room for the bytes, and for a bar and the rate


def count_source(
    source: TraceStream | Counts, options: dict[str, Any]
) -> tuple[RoutingStats, TraceProfile, tuple[BadFile, ...]]:
    """Count and profile a trace; one of many files part by part, wherever the options say."""
    from moeplace.parts import parted
    from moeplace.profile import count_and_profile

    whole = parted(source)
    if whole is None:
        stats, profile = count_and_profile(source, threads=options["threads"])
        bad = tuple(getattr(source, "bad_files", ()))
        click.get_current_context().call_on_close(lambda: tell_bad(bad, options))
        return stats, profile, bad
    from moeplace.corpus import count_parts

    with _run(whole, options, "counting") as run:
        counted = count_parts(whole, run)
    click.get_current_context().call_on_close(lambda: tell_bad(counted.bad, options))
    return counted.stats, counted.profile, counted.bad


def spool_source(source: TraceStream | Counts, options: dict[str, Any]) -> TraceStream | Counts:
    """Return a trace of many files as one that is quick to walk, until the command ends; any other as it is."""
    from moeplace.parts import parted

    whole = parted(source)
    if whole is None:
        return source
    from moeplace.spool import spooled

    with contextlib.ExitStack() as stack:
        with _run(whole, options, "reading") as run:
            found = stack.enter_context(spooled(whole, run))
        later = stack.pop_all()
    click.get_current_context().call_on_close(lambda: _leave(later, found, options))
    return found


def _leave(spool: contextlib.ExitStack, found: Spooled, options: dict[str, Any]) -> None:
    """End a command that has read a trace of many files; what it ends with decides whether the tokens are kept."""
    error = sys.exception()  # click does not pass it on before 8.2
    spool.__exit__(*((type(error), error, error.__traceback__) if error else (None, None, None)))
    if error is not None and found.files and found.files[0].exists():
        click.echo("what was read is kept: the same command goes on from there", err=True)
    tell_bad(found.bad, options)


def tell_bad(bad: Sequence[BadFile], options: dict[str, Any]) -> None:
    """Write which files were left out, and why, to standard error: the last thing of a command that was not stopped."""
    if not bad or isinstance(sys.exception(), KeyboardInterrupt):
        return
    sys.stdout.flush()
    shown = 0 if options["quiet"] else SHOWN_BAD_FILES
    click.echo(f"warning: {len(bad):,} file{'s' * (len(bad) != 1)} left out{':' * (shown > 0)}", err=True)
    for file in bad[:shown]:
        click.echo(f"  {str(file).splitlines()[0]}", err=True)
    if shown and len(bad) > shown:
        click.echo(f"  … {len(bad) - shown:,} more; stats --json lists all", err=True)


def _tell(sentence: str) -> None:
    click.echo(f"note: {sentence}", err=True)


@contextlib.contextmanager
def _run(source: PartedTrace, options: dict[str, Any], what: str) -> Iterator[Run]:
    """Start workers and the progress display; say that progress is kept when the user stops it."""
    from moeplace.engines import Run, engine_for

    sizes = source.file_bytes
    engine = engine_for(options.get("cluster"), options.get("threads", 1), int(sizes.sum()))
    with engine, _Progress(what, len(sizes), int(sizes.sum()), options) as progress:
        try:
            yield Run(
                engine=engine,
                work_dir=options.get("work_dir"),
                watch=progress.update,
                tell=(lambda sentence: None) if options["quiet"] else _tell,
            )
        except KeyboardInterrupt:
            progress.stop()
            if progress.files:
                kept = f"{progress.files:,} of {len(sizes):,} files are done and kept"
                click.echo(f"{kept}: the same command goes on from there", err=True)
            raise


class _Progress:
    """A bar with rate and time left on a terminal, a line now and then with --verbose, else nothing."""

    def __init__(self, what: str, files: int, size_bytes: int, options: dict[str, Any]) -> None:
        self._what, self._of, self._bytes = what, files, size_bytes
        self._lines = bool(options["verbose"]) and not sys.stderr.isatty()
        self._bar: Any = None
        self._shown = sys.stderr.isatty() and not options["quiet"]
        self._first: tuple[float, int] | None = None
        self._next = time.monotonic() + LINE_EVERY_S
        self.files = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def update(self, files: int, size_bytes: int, bad: int) -> None:
        """Show how far it is."""
        self.files = files
        if self._first is None:
            self._first = (time.monotonic(), size_bytes)
            if self._shown:
                self._start(size_bytes)
        left_out = f", {bad:,} bad" if bad else ""
        if self._bar is not None:
            self._bar.update(0, completed=size_bytes, files=f"{files:,}/{self._of:,} files{left_out}")
        elif self._lines and (time.monotonic() >= self._next or files == self._of):
            self._next = time.monotonic() + LINE_EVERY_S
            click.echo(f"{self._what}: {files:,} of {self._of:,} files{left_out}, {self._rate(size_bytes)}", err=True)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _rate(self, size_bytes: int) -> str:
        started, before = self._first or (0.0, 0)
        seconds = max(1e-9, time.monotonic() - started)
        rate = (size_bytes - before) / seconds
        left = f", {(self._bytes - size_bytes) / rate:,.0f} s left" if rate and size_bytes < self._bytes else ""
        return f"{size_bytes / 1e6:,.0f} of {self._bytes / 1e6:,.0f} MB at {rate / 1e6:,.0f} MB/s{left}"

    def _start(self, size_bytes: int) -> None:
        from moeplace.report import console

        self._bar = progress_bar(console(err=True))
        self._bar.add_task(self._what, total=self._bytes, completed=size_bytes, files="")
        self._bar.start()


def progress_bar(out: Console) -> Progress:
    """A bar of one line, with what a narrow terminal has room for."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    def line() -> Column:
        return Column(no_wrap=True)

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), TextColumn("{task.fields[files]}")]
    if out.width >= MEDIUM_COLUMNS:
        columns.append(DownloadColumn(table_column=line()))
    if out.width >= WIDE_COLUMNS:
        columns.insert(1, BarColumn(bar_width=None))
        columns.append(TransferSpeedColumn(table_column=line()))
    columns.append(TimeRemainingColumn(table_column=line()))
    return Progress(*columns, console=out, transient=True, refresh_per_second=4)
