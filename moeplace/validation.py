"""Whether an answer holds on what it was not fitted to, and what of it is affinity and not popularity.

Every split is fitted on one part and judged on the other against EPLB's placement fitted to the same, with an interval
from resampled requests (the bootstrap of Efron and Tibshirani 1993 over requests, since tokens of one request are not
independent). Beside it stands a null trace: every expert chosen as often in every layer, by tokens picked at random, so
that what is gained there is not gained by knowing which experts are chosen together. A curve tells how much trace is
enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeplace.build import Choices, build_problem
from moeplace.errors import InputError
from moeplace.frozen import Ints
from moeplace.objective import objective_value
from moeplace.placement import Placement
from moeplace.solution import Limits, Report
from moeplace.solvers import solve
from moeplace.split import parse_split, select_tokens
from moeplace.tails import Estimate
from moeplace.trace import Counts, Trace, TraceStream, concatenate

RIVAL = "eplb"
RESAMPLES = 20
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the fit part's requests
ROUNDS = 12  # exchanges of each choice of the null trace
STEPS = 150  # drawn where a tail or the mean of steps is judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One fit and its test.

    Attributes
    ----------
    name
        The split.
    requests
        Requests fitted to.
    fit, test
        Gain over EPLB on the part fitted to, and on the other with its 95 % interval over requests; shares.
    """

    name: str
    requests: int
    fit: float
    test: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Trials by split, of the null trace, and by size of the part fitted to."""

    splits: tuple[Trial, ...]
    null: Trial
    curve: tuple[Trial, ...]

    def rows(self) -> list[list[str]]:
        """Return a table: what was fitted, its requests, gain on fit and test, interval."""
        rows = [["fitted to", "requests", "gain, fit", "gain, test", "95 % interval"]]
        named = [
            ("half:0, null trace", self.null),
            *[(f"{100 * share:g} % of half:0", one) for share, one in zip(SHARES, self.curve, strict=True)],
        ]
        for name, one in [*[(one.name, one) for one in self.splits], *named]:
            low, high = (f"{100 * value:+.2f}" for value in (one.test.low, one.test.high))
            rows.append([name, f"{one.requests:,}", f"{one.fit:+.2%}", f"{one.test.value:+.2%}", f"{low} to {high} %"])
        return rows

    def sentence(self) -> str:
        """What the figures come to."""
        first = self.splits[0].test
        clear = "clear of zero" if first.low > 0 else "not clear of zero"
        own = first.value - self.null.test.value
        return (
            f"on requests not fitted to the gain over {RIVAL} is {first.value:+.2%}, {clear}; "
            f"{self.null.test.value:+.2%} remain without affinity, so that {own:+.2%} come from experts chosen together"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a ``moeplace/validation/1`` document."""
        return {
            "schema": "moeplace/validation/1",
            "against": RIVAL,
            "splits": [_trial(one) for one in self.splits],
            "null": _trial(self.null),
            "curve": [{"share": share} | _trial(one) for share, one in zip(SHARES, self.curve, strict=True)],
        }


def _trial(one: Trial) -> dict[str, Any]:
    return {
        "fitted_to": one.name,
        "requests": one.requests,
        "gain_fit": one.fit,
        "gain_test": {"value": one.test.value, "interval": [one.test.low, one.test.high]},
    }


def validate(
    source: TraceStream | Counts, choices: Choices, solver: str, limits: Limits, report: Report | None = None
) -> Validation:
    """Fit and test on splits by request, time and domain as far as the trace goes.

    Parameters
    ----------
    source
        A per-token trace; it is held in memory.
    choices
        What is fixed; moves and baselines are left out.
    solver, limits, report
        As for :func:`~moeplace.solvers.solve`.

    Returns
    -------
    Validation
        Complexity: some nine solves, and :data:`RESAMPLES` counts of each test part.

    Raises
    ------
    InputError
        The source holds counts only.
    """
    if isinstance(source, Counts):
        raise InputError(
            "a validation of counts", rule="requests are resampled, and counts hold none",
            hint="record a per-token trace",
        )  # fmt: skip
    report = report or Report()
    trace = concatenate(list(source.blocks()), source.meta)
    drawn = choices.risk_batches or (STEPS if choices.risk != "mean" else None)
    plain = replace(
        choices, baseline=None, max_moves=None, max_moved_bytes=None, max_moved_bytes_per_gpu=None,
        horizon_steps=None, risk_batches=drawn,
    )  # fmt: skip
    names = ["half:0", "half:1", "time:0.5", *_by_domain(trace)]
    run = _Run(plain, solver, limits)
    trials = []
    for number, name in enumerate(names):
        report.progress(number, len(names) + len(SHARES) + 1, name)
        trials.append(run.trial(name, *_parts(trace, name)))
    report.progress(len(names), len(names) + len(SHARES) + 1, "null trace")
    fit, test = _parts(trace, names[0])
    null = run.trial("half:0, null trace", *(null_trace(part, limits.seed) for part in (fit, test)))
    curve = [run.trial(f"{100 * share:g} % of half:0", first_requests(fit, share), test) for share in SHARES[:-1]]
    return Validation(splits=tuple(trials), null=null, curve=(*curve, trials[0]))


class _Run:
    """Fits and tests under the same choices."""

    def __init__(self, choices: Choices, solver: str, limits: Limits) -> None:
        self.choices, self.solver, self.limits = choices, solver, limits

    def trial(self, name: str, fit: Trace, test: Trace) -> Trial:
        problem = build_problem(fit, self.choices)
        rival = solve(problem, RIVAL, Limits()).placement
        answer = solve(problem, self.solver, self.limits).placement
        if rival is None or answer is None:
            raise InputError(f"no placement for {name}", rule="a validation needs an answer for every split")
        pair = (answer, rival)
        return Trial(
            name=name,
            requests=len(np.unique(fit.request)),
            fit=_gain([objective_value(problem, one) for one in pair]),
            test=self._interval(test, pair),
        )

    def _interval(self, test: Trace, pair: tuple[Placement, Placement]) -> Estimate:
        value = self._gain_on(test, pair)
        rng = np.random.default_rng(self.limits.seed)
        found = [self._gain_on(resampled(test, rng), pair) for _ in range(RESAMPLES)]
        low, high = np.quantile(found, [0.025, 0.975])
        return Estimate(value=value, low=min(value, float(low)), high=max(value, float(high)))

    def _gain_on(self, part: Trace, pair: tuple[Placement, Placement]) -> float:
        problem = build_problem(part, self.choices)
        return _gain([objective_value(problem, one) for one in pair])


def _gain(values: Sequence[float]) -> float:
    """Share by which the first is below the second; 0 where both are nothing."""
    return 1 - values[0] / values[1] if values[1] > 0 else 0.0


def _by_domain(trace: Trace) -> list[str]:
    """Return a split by domain, every second one to fit, where at least two occur."""
    if trace.domain is None:
        return []
    names = [trace.meta.domains[number] for number in np.unique(trace.domain)]
    return [f"domain:{','.join(names[::2])}"] if len(names) > 1 and not any("," in name for name in names) else []


def _parts(trace: Trace, name: str) -> tuple[Trace, Trace]:
    split = parse_split(name)
    fit, test = (
        concatenate(list(select_tokens(trace, split=split, part=part).blocks()), trace.meta) for part in ("fit", "test")
    )
    return fit, test


def first_requests(trace: Trace, share: float) -> Trace:
    """Return the tokens of so large a share of the requests, at least one, in order of their numbers."""
    names = np.unique(trace.request)
    kept = names[: max(1, round(share * len(names)))]
    return trace.take(np.flatnonzero(np.isin(trace.request, kept)))


def resampled(trace: Trace, rng: np.random.Generator) -> Trace:
    """Draw as many requests with replacement; one drawn twice is two requests. Complexity: O(tokens log tokens)."""
    names, request = np.unique(trace.request, return_inverse=True)
    order = np.argsort(request, kind="stable")
    first = np.searchsorted(request[order], np.arange(len(names) + 1))
    chosen = rng.integers(0, len(names), len(names))
    rows = np.concatenate([order[first[one] : first[one + 1]] for one in chosen])
    number = np.repeat(np.arange(len(chosen)), [first[one + 1] - first[one] for one in chosen])
    return trace.take(rows).replace(request=number)


def null_trace(trace: Trace, seed: int = 0) -> Trace:
    """Return a trace in which experts are chosen as often, each token as many distinct ones, and otherwise at random.

    Pairs of tokens exchange one of their experts in a layer where neither then has one twice, again and again: a walk
    over all such traces (degree-preserving randomisation; Maslov and Sneppen, Science 296, 2002). Complexity:
    O(:data:`ROUNDS` · tokens · layers · k).
    """
    rng = np.random.default_rng(seed)
    experts = trace.experts.copy()
    tokens, layers, top_k = experts.shape
    half = tokens // 2
    for layer in range(layers):
        ids = experts[:, layer]
        for _ in range(ROUNDS * top_k):
            order: Ints = rng.permutation(tokens)
            a, b = order[:half], order[half : 2 * half]
            i, j = rng.integers(0, top_k, (2, half))
            x, y = ids[a, i], ids[b, j]
            apart = ~((ids[a] == y[:, None]).any(axis=1) | (ids[b] == x[:, None]).any(axis=1))
            ids[a[apart], i[apart]], ids[b[apart], j[apart]] = y[apart], x[apart]
    return trace.replace(experts=experts)
