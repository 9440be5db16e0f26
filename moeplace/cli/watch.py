"""``moeplace solve --watch``: look at a growing trace again and again, and propose a placement when that repays."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moeplace.build import Choices
    from moeplace.solution import Limits
    from moeplace.trace import Counts, TraceStream


def watch_trace(
    trace: str,
    choices: Choices,
    limits: Limits,
    options: dict[str, Any],
    *,
    open_now: Callable[[], TraceStream | Counts],
    output: str | None,
) -> int:
    """Watch until Ctrl-C, or for ``--watch-rounds`` looks; every placement proposed is written and then watched.

    A look is taken when the file has changed. What is proposed replaces the output as a whole.
    """
    from moeplace.errors import MoeplaceError
    from moeplace.exporters import Target, load_exporter, suffix_for
    from moeplace.exporters.native import document_of
    from moeplace.files import atomic_output
    from moeplace.report import write_json
    from moeplace.watching import propose, watch

    if choices.baseline is None or choices.horizon_steps is None or output in (None, "-") or trace == "-":
        raise click.UsageError("--watch needs a trace file, --baseline, --horizon-steps and a file for -o")
    state: dict[str, Any] = {"seen": None, "choices": choices}

    def look() -> bool:
        try:
            facts = os.stat(trace)
            stamp = (facts.st_mtime_ns, facts.st_size)
            if stamp == state["seen"]:
                return False
            proposal = propose(open_now(), state["choices"], options["solver"], limits.replace())
        except (MoeplaceError, OSError) as error:  # half a line, or a file being replaced: look again later
            if state["seen"] is None:
                raise
            click.echo(f"not read: {error}", err=True)
            return True
        state["seen"] = stamp
        if options["as_json"]:
            write_json(proposal.to_dict())
        elif not options["quiet"]:
            click.echo(str(proposal))
        if proposal.repays:
            document = document_of(proposal.problem, proposal.solution, limits, None)
            suffix = suffix_for(options["output_format"], output)
            with atomic_output(str(output)) as file:
                target = Target(model=proposal.problem.model, num_gpus=proposal.problem.num_gpus)
                load_exporter(options["output_format"]).write(document, file, target, suffix)
            state["choices"] = replace(state["choices"], baseline=proposal.solution.placement)
        return True

    watch(look, lambda: limits.stop.wait(options["watch"]), rounds=options["watch_rounds"])
    return 0
