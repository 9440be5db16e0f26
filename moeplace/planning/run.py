"""A whole plan in one call: what the command does, for programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeplace.affinity import count_routing
from moeplace.build import model_for
from moeplace.hardware import Accelerator
from moeplace.model import ModelSpec
from moeplace.planning.economics import with_network_share
from moeplace.planning.evaluate import Demands, Evaluator
from moeplace.planning.pricebook import DEFAULT_BOOK, load_price_book
from moeplace.planning.search import Found, search
from moeplace.planning.space import Space, deployments
from moeplace.planning.workload import make_workload
from moeplace.topology import SCALE_UP, build_topology
from moeplace.trace import Counts, TraceStream

SHARE_GPUS = 64  # of the scale-up cluster that a network share is of
SEARCH_OPTIONS = ("time_limit_s", "results", "tell")


def plan(fit: TraceStream | Counts, test: TraceStream | Counts, space: Space, **options: Any) -> Found:
    """Search a space of deployments.

    Parameters
    ----------
    fit, test
        Part of a trace that placements are fitted to, and the part that steps are drawn from.
    space
        What is combined with what.
    **options
        Those of :func:`make_evaluator`, and ``time_limit_s``, ``results`` and ``tell`` of
        :func:`~moeplace.planning.search.search`.

    Returns
    -------
    Found
        :func:`~moeplace.planning.pareto.pareto_set` of its outcomes is what nothing beats.

    Examples
    --------
    >>> import moeplace
    >>> from moeplace.planning.space import Space
    >>> trace = moeplace.read_trace("traces/tinymoe_8x32_top4.npz")
    >>> h100 = moeplace.load_accelerator("h100")
    >>> space = Space(kinds=("scale-up:8", "torus:2x2x2"), accelerators={"h100": h100}, batches=(16,))
    >>> len(moeplace.plan(trace, trace, space, solver="eplb", steps=4).outcomes)
    4
    """
    rest = {name: options.pop(name) for name in SEARCH_OPTIONS if name in options}
    threads = options.get("threads", 1)
    accelerators = {**space.accelerators, **space.attention_accelerators}
    evaluator = make_evaluator(fit, test, accelerators, **options)
    found = deployments(space, evaluator.workload.model, evaluator.workload.context)
    return search(found, evaluator, threads=threads, **rest)


def make_evaluator(
    fit: TraceStream | Counts,
    test: TraceStream | Counts,
    accelerators: Mapping[str, Accelerator],
    *,
    model: str | ModelSpec | None = None,
    prices: str | Path = DEFAULT_BOOK,
    network_share: float | None = None,
    demands: Demands | None = None,
    solver: str = "balance+relabel",
    threads: int = 1,
    **workload: Any,
) -> Evaluator:
    """Collect what deployments are judged by.

    Parameters
    ----------
    fit, test
        As in :func:`plan`.
    accelerators
        Name → accelerator, of everything in the space.
    model
        A model or its name; default: what the trace names.
    prices, network_share
        A price book, and the share of the price of a scale-up cluster of 64 of the first accelerator that its network
        prices are scaled to.
    demands, solver
        Constraints, and who places experts.
    threads
        For counting.
    **workload
        ``context``, ``prompt``, ``steps`` and ``seed`` of :func:`~moeplace.planning.workload.make_workload`.
    """
    book = load_price_book(prices)
    if network_share is not None:
        base = build_topology(SCALE_UP, (SHARE_GPUS,), next(iter(accelerators.values())))
        book = with_network_share(book, base, network_share)
    spec = model if isinstance(model, ModelSpec) else model_for(test.meta, model)
    return Evaluator(
        workload=make_workload(test, spec, **workload),
        stats=count_routing(fit, threads=threads),
        accelerators=accelerators,
        book=book,
        demands=demands or Demands(),
        solver=solver,
    )
