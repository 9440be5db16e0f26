"""A solved plan whose homes follow the experts: GPUs renamed for it, and what that keeps off the network.

Names change neither loads nor copies; what they change is how many copies meet no network when requests are dealt by
their first tokens (:mod:`moeplace.homes`). That is measured on requests that were not fitted, over the tokens after the
first ones.
"""

from __future__ import annotations

import math

import numpy as np

from moeplace.batches import TokenIndex, gather
from moeplace.errors import InputError
from moeplace.homes import Held, align_names, held_at_home, seen_tokens
from moeplace.objective import Term, objective_value
from moeplace.problem import DISPATCH_COMBINE, Problem
from moeplace.solution import Solution
from moeplace.solvers import finish
from moeplace.trace import Counts, Trace, TraceStream

MOST_TOKENS = 200_000  # of whole requests, read for the fit and for the test


def cohost(
    problem: Problem, solution: Solution, homes: str, fit: TraceStream | Counts, test: TraceStream | Counts | None
) -> Solution:
    """Rename a solution's GPUs for homes by ``affinity:N``, and tell what it gains.

    Parameters
    ----------
    problem, solution
        What was solved.
    homes
        ``affinity`` or ``affinity:N``.
    fit, test
        The requests that were fitted, and others to judge on; without others the figures are of the fit.

    Returns
    -------
    Solution
        With the same objective where it does not depend on names, the terms ``copies_at_home`` and
        ``copies_at_home_by_chance`` (copies per token and layer on the judged requests), and a note that declares the
        homes.

    Raises
    ------
    InputError
        Tokens do not return home, the trace holds only counts, or no request is long enough.
    """
    seen = seen_tokens(homes)
    if seen is None or solution.placement is None:
        return solution
    if problem.dataflow != DISPATCH_COMBINE or isinstance(fit, Counts):
        what = "counts" if isinstance(fit, Counts) else f"{problem.dataflow} execution"
        raise InputError(f"homes by affinity with {what}", rule="they need requests whose tokens return home")
    placement = align_names(whole_requests(fit), solution.placement, problem.topology, solution.seed)
    judged = whole_requests(fit if test is None or isinstance(test, Counts) else test)
    before = held_at_home(judged, solution.placement, problem.topology, seen)
    held = held_at_home(judged, placement, problem.topology, seen)
    value = objective_value(problem, placement)
    if not math.isclose(value, solution.objective, rel_tol=1e-9):
        solution = solution.replace(objective=value)
    note = _note(seen, before, held, "the fit" if test is None else "held-out requests")
    answer = finish(
        problem, solution.replace(placement=placement, notes=(*solution.notes, note)), solution.bound or 0.0
    )
    unit = "copies/token"
    terms = {
        "copies_at_home": Term(value=held.at_home, unit=unit),
        "copies_at_home_by_chance": Term(value=held.by_chance, unit=unit),
    }
    return answer.replace(terms={**answer.terms, **terms})


def _note(seen: int, before: Held, held: Held, where: str) -> str:
    return (
        f"homes affinity:{seen} on {where}: {held.at_home:.3f} of {held.copies:.3f} copies per token stay at home, "
        f"{held.by_chance:.3f} by chance and {before.at_home:.3f} before GPUs were renamed: "
        f"{100 * held.remote_change:+.1f} % copies on the network (score --homes affinity:{seen} tells step times)"
    )


def whole_requests(source: TraceStream) -> Trace:
    """Read as many whole requests as hold 200,000 tokens, from all over the trace. Complexity: two passes over it."""
    index = TokenIndex.of(source)
    _, of, length = np.unique(index.request, return_inverse=True, return_counts=True)
    order = np.argsort(_scattered(len(length)), kind="stable")
    kept = order[np.cumsum(length[order]) <= max(MOST_TOKENS, int(length[order[0]]))]
    return gather(source, np.flatnonzero(np.isin(of, kept)))[0]


def _scattered(count: int) -> np.ndarray:
    # multiples of the golden ratio: any first part is spread evenly
    return np.arange(count) * 0.6180339887498949 % 1.0
