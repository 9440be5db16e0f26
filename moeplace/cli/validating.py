"""``moeplace compare --validate``: whether what the solvers of a table gain holds on requests not fitted to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moeplace.engines import Engine
    from moeplace.results import Results
    from moeplace.spool import Spooled
    from moeplace.trials import Setup, TraceFile
    from moeplace.validated import Item, Tried, Validated


def validation_items(
    sources: Mapping[str, TraceFile | Spooled], names: tuple[Sequence[str], Sequence[str]], halves: int, setup: Setup
) -> list[Item]:
    """Every case of every trace, topology and solver; those that share a trace follow one another.

    Raises
    ------
    InputError
        A trace holds counts only.
    """
    from moeplace.trials import Trial
    from moeplace.validated import Item, cases_in

    solvers, topologies = names
    items = []
    for label, source in sources.items():
        cases = cases_in(source, setup.choices, halves)
        for topology in topologies:
            for solver in solvers:
                trial = Trial(trace=label, topology=topology, solver=solver, seed=0)
                items += [Item(trial=trial, case=case, source=source, setup=setup) for case in cases]
    return items


def run_items(
    items: Sequence[Item], engine_for: Callable[[int], Engine], results: Results | None, *, shown: bool
) -> tuple[list[Validated], bool]:
    """Try what is not kept yet; what came of every solver, and whether the user stopped it."""
    from moeplace.validated import try_item, validated

    kept = [] if results is None else [found for item in items if (found := results.load_tried(item)) is not None]
    done: dict[Any, Tried] = {(one.trial, one.case): one for one in kept}
    waiting = {(item.trial, item.case): item for item in items if (item.trial, item.case) not in done}
    started, interrupted = time.monotonic(), False
    if shown:
        known = f", {len(done):,} of them kept from before" if done else ""
        click.echo(f"{len(items):,} fits to validate by{known}", err=True)
    try:
        with engine_for(len(waiting)) as engine:
            for tried in engine.run(try_item, waiting.values()):
                if results is not None:
                    results.save_tried(waiting[tried.trial, tried.case], tried)
                done[tried.trial, tried.case] = tried
                if shown:
                    _tell(tried, f"{time.monotonic() - started:7.1f}s  {len(done):,}/{len(items):,}")
    except KeyboardInterrupt:
        interrupted = True
        click.echo(f"{len(done):,} of {len(items):,} fits to validate by are done", err=True)
    return validated(items, list(done.values())), interrupted


def _tell(tried: Tried, place: str) -> None:
    gain = "" if tried.found is None else f"gain {tried.found.test.value:+.2%} on test"
    where = f"{tried.trial.solver} on {tried.trial.topology}, {tried.trial.trace}, {tried.case}"
    click.echo(f"{place}  {where}: {tried.failure or gain}", err=True)
