"""Two figures of a plan, with the plot extra: cost against time per token, and cost against link bandwidth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeplace.errors import InputError, MissingExtraError
from moeplace.files import atomic_output
from moeplace.planning.compare import link_rows
from moeplace.planning.outcome import Outcome
from moeplace.planning.pareto import LATENCY, PER_USD, pareto_set
from moeplace.planning.pricebook import PriceBook

FORMATS = ("png", "pdf", "svg")
COLOURS = {"scale-up": "C0", "scale-out": "C1", "torus": "C2", "full-mesh": "C3", "mesh": "C4"}
LINES = {"scale-up": "o-", "scale-out": "s-", "torus": "^-", "full-mesh": "v--", "mesh": "x-"}
MARKS = {"none": "o", "dual-batch": "^", "ping-pong": "s"}
INCHES, DOTS_PER_INCH = (7.0, 4.5), 150


def draw_plan(outcomes: Sequence[Outcome], book: PriceBook, stem: str | os.PathLike[str]) -> list[Path]:
    """Draw the figures of feasible outcomes with a price.

    Parameters
    ----------
    outcomes
        What a search judged.
    book
        Names the unit of money.
    stem
        ``plan.png`` gives ``plan-latency.png``, and ``plan-bandwidth.png`` where several bandwidths were tried.

    Returns
    -------
    list
        The files written.

    Raises
    ------
    MissingExtraError
        Matplotlib is not installed.
    InputError
        The name has no ending of :data:`FORMATS`.
    """
    path = check_figures(stem)
    from matplotlib.figure import Figure

    drawn = []
    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    _latency(figure.subplots(), outcomes, book)
    drawn.append(_saved(figure, path, "latency"))
    if link_rows(outcomes):
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        _bandwidth(figure.subplots(), outcomes, book)
        drawn.append(_saved(figure, path, "bandwidth"))
    return drawn


def check_figures(stem: str | os.PathLike[str]) -> Path:
    """Raise what :func:`draw_plan` would, before anything is searched."""
    path = Path(stem)
    if path.suffix.removeprefix(".").lower() not in FORMATS:
        raise InputError(f"figure {path.name!r}", rule=f"its name ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401 # whether it is there
    except ImportError as error:
        hint = "pip install 'moeplace[plot]'"
        raise MissingExtraError("figures need Matplotlib", rule="it comes with an extra", hint=hint) from error
    return path


def _latency(axes: Any, outcomes: Sequence[Outcome], book: PriceBook) -> None:
    """Throughput per cost against the time per token, with what is best in these two."""
    priced = [one for one in outcomes if one.feasible and one.per_usd is not None]
    for kind in dict.fromkeys(one.deployment.kind for one in priced):
        for overlap, mark in MARKS.items():
            own = [one for one in priced if (one.deployment.kind, one.deployment.overlap) == (kind, overlap)]
            if own:
                label = kind if overlap == "none" else f"{kind}, {overlap}"
                x, y = [one.latency_ms for one in own], [(one.per_usd or 0.0) / 1e6 for one in own]
                axes.scatter(x, y, s=14, alpha=0.6, color=COLOURS[kind], marker=mark, label=label)
    front = sorted(pareto_set(priced, (PER_USD, LATENCY)), key=lambda one: one.latency_ms)
    x, y = [one.latency_ms for one in front], [(one.per_usd or 0.0) / 1e6 for one in front]
    axes.step(x, y, "k-", where="post", lw=1, label="front")
    axes.set_xlabel("time per output token [ms]")
    axes.set_ylabel(f"million tokens for 1 {book.unit}")
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _bandwidth(axes: Any, outcomes: Sequence[Outcome], book: PriceBook) -> None:
    """Cost of a million tokens against scale-up bandwidth, the best of each kind and accelerator."""
    rows = link_rows(outcomes)
    for kind, accelerator in dict.fromkeys((row.kind, row.accelerator) for row in rows):
        own = sorted(
            (row for row in rows if (row.kind, row.accelerator) == (kind, accelerator)),
            key=lambda row: row.link_gb_per_s,
        )
        x, y = [row.link_gb_per_s for row in own], [row.best.usd_per_million or 0.0 for row in own]
        axes.plot(x, y, LINES[kind], ms=4, lw=1, color=COLOURS[kind], alpha=0.8, label=f"{kind}, {accelerator}")
    axes.set_xlabel("scale-up bandwidth of an accelerator [GB/s]")
    axes.set_ylabel(f"{book.unit} for a million tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _saved(figure: Any, path: Path, what: str) -> Path:
    target = path.with_name(f"{path.stem}-{what}{path.suffix}")
    kind = path.suffix.removeprefix(".").lower()
    # dates would make two runs differ
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    with atomic_output(target) as file:
        figure.savefig(file, format=kind, metadata=metadata)
    return target
