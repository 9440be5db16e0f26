"""From option values to the library's inputs, shared by commands."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moeplace.build import Choices
    from moeplace.exporters import Target
    from moeplace.trace import Counts, TraceStream


def open_source(
    trace: str, options: dict[str, Any], *, split: str | None = None, part: str = "fit", walked_once: bool = False
) -> TraceStream | Counts:
    """Open a trace and select the part and phase the options name.

    A trace of many files is read into one place first, unless it will be ``walked_once`` and no split has to look at
    all of it before.
    """
    from moeplace.cli.corpora import spool_source
    from moeplace.model import load_model
    from moeplace.parts import parted
    from moeplace.readers import open_trace
    from moeplace.split import parse_split, select

    rule = parse_split(split) if split else None
    model = load_model(options["model"]) if options.get("model") else None
    source = open_trace(trace, model=model, format=options.get("input_format"), skip_bad=options.get("skip_bad"))
    if options.get("cluster") and parted(source) is None:
        raise click.UsageError("--cluster is for a folder or a plain archive of requests: this trace is read here")
    if rule is not None or not walked_once:
        source = spool_source(source, options)
    phase = options.get("phase") if options.get("phase") != "mixed" else None
    return select(source, split=rule, part="test" if part == "test" else "fit", phase=phase)


def choices_of(options: dict[str, Any]) -> Choices:
    """Collect what the options say about a problem."""
    from moeplace.build import Choices
    from moeplace.exporters import read_placement

    baseline = None
    if options.get("baseline"):
        baseline = read_placement(options["baseline"], target=target_for(options)).placement
    return Choices(
        model=options.get("model"),
        topology=options.get("topology"),
        accelerator=options.get("accelerator"),
        compute_table=options.get("compute_table"),
        dispatch_dtype=options.get("dispatch_dtype"),
        combine_dtype=options.get("combine_dtype"),
        num_gpus=options.get("num_gpus"),
        num_nodes=options.get("num_nodes"),
        num_groups=options.get("num_groups"),
        redundant=options.get("num_redundant_experts"),
        slots_per_gpu=options.get("slots_per_gpu"),
        dataflow=options.get("dataflow") or "dispatch-combine",
        objective=options.get("objective") or "step-time",
        risk=options.get("risk") or "mean",
        risk_batches=options.get("risk_batches"),
        copies_level=options.get("copies_level") or "gpu",
        whole_model=options.get("equal_experts") == "model",
        load_cap=options.get("load_cap"),
        copies_cap=options.get("copies_cap"),
        phase=options.get("phase"),
        batch_requests=options.get("batch_requests"),
        batch_tokens=options.get("batch_tokens"),
        batch_prefill_requests=options.get("batch_prefill_requests"),
        batch_prefill_tokens=options.get("batch_prefill_tokens"),
        arrival=options.get("arrival"),
        baseline=baseline,
        routing=options.get("routing"),
        max_moves=options.get("max_moves"),
        max_moved_bytes=options.get("max_moved_bytes"),
        max_moved_bytes_per_gpu=options.get("max_moved_bytes_per_gpu"),
        horizon_steps=options.get("horizon_steps"),
    )


def target_for(options: dict[str, Any]) -> Target:
    """What the options say a placement file is of."""
    from moeplace.exporters import Target
    from moeplace.model import load_model
    from moeplace.topology import load_topology

    gpus = options.get("num_gpus")
    if gpus is None and options.get("topology"):
        gpus = load_topology(options["topology"]).num_gpus
    return Target(
        model=load_model(options["model"]) if options.get("model") else None,
        num_gpus=gpus,
        num_redundant=options.get("num_redundant_experts"),
    )


def check_paths(inputs: Sequence[str | None], output: str | None, *, keep: Sequence[str] = ()) -> None:
    """Refuse a second reader of standard input, an empty output name, and an output that is one of ``keep``."""
    if sum(name == "-" for name in inputs) > 1:
        raise click.UsageError("standard input can be read once: give - for one input only")
    if output == "":
        raise click.UsageError("the output has no name: give a file, or - for standard output")
    for name in keep:
        with contextlib.suppress(OSError):
            if output not in (None, "-") and os.path.samefile(name, str(output)):
                raise click.UsageError(f"{output} is the input: name another output")


def warn(sentences: tuple[str, ...], *, quiet: bool) -> None:
    """Write sentences the user should read to standard error."""
    if not quiet:
        for sentence in sentences:
            click.echo(f"note: {sentence}", err=True)
