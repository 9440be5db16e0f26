"""Whether an answer holds on what it was not fitted to, and what of it is affinity and not popularity.

Every split is fitted on one part and judged on the other against EPLB's placement fitted to the same, with an interval
from resampled requests (the bootstrap of Efron and Tibshirani 1993 over requests, since tokens of one request are not
independent). Beside it stands a null trace: every expert chosen as often in every layer, by tokens picked at random, so
that what is gained there is not gained by knowing which experts are chosen together. A curve tells how much trace is
enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeplace.build import Choices, build_problem
from moeplace.errors import InputError
from moeplace.frozen import Ints, replaced
from moeplace.objective import objective_value
from moeplace.placement import Placement
from moeplace.solution import Limits, Report
from moeplace.solvers import solve
from moeplace.split import parse_split, select_tokens
from moeplace.suites import Method
from moeplace.tails import Estimate
from moeplace.trace import Counts, Trace, TraceStream, concatenate

RIVAL = "eplb"
RESAMPLES = 40
HALVES = 2  # splits into halves
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the fit part's requests
ROUNDS = 12  # exchanges of each choice of the null trace
STEPS = 150  # drawn where a tail or the mean of steps is judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is fitted to.

    Attributes
    ----------
    split
        As :func:`~moeplace.split.parse_split` takes it.
    share
        Of the requests of its fit part.
    null
        Whether both parts are replaced by their null traces.
    """

    split: str
    share: float = 1.0
    null: bool = False

    def __str__(self) -> str:
        part = self.split if self.share == 1 else f"{100 * self.share:g} % of {self.split}"
        return f"{part}, null trace" if self.null else part


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
        return [["fitted to", "requests", "gain, fit", "gain, test", "95 % interval"], *map(list, self.lines())]

    def lines(self) -> list[tuple[str, str, str, str, str]]:
        """Return the table without its head."""
        named = [
            (f"{100 * share:g} % of {self.splits[0].name}", one) for share, one in zip(SHARES, self.curve, strict=True)
        ]
        lines = []
        for name, one in [*[(one.name, one) for one in self.splits], (self.null.name, self.null), *named]:
            low, high = (f"{100 * value:+.2f}" for value in (one.test.low, one.test.high))
            lines.append((name, f"{one.requests:,}", f"{one.fit:+.2%}", f"{one.test.value:+.2%}", f"{low} to {high} %"))
        return lines

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
            "splits": [trial_to_dict(one) for one in self.splits],
            "null": trial_to_dict(self.null),
            "curve": [{"share": share} | trial_to_dict(one) for share, one in zip(SHARES, self.curve, strict=True)],
        }

    @classmethod
    def of(cls, trials: Mapping[Case, Trial]) -> Validation:
        """Put the trials of all :func:`cases_of` together."""
        whole = [trial for case, trial in trials.items() if case.share == 1 and not case.null]
        null = next(trial for case, trial in trials.items() if case.null)
        parts = [trial for case, trial in trials.items() if case.share < 1]
        return cls(splits=tuple(whole), null=null, curve=(*parts, whole[0]))


def trial_to_dict(one: Trial) -> dict[str, Any]:
    """Return a trial as JSON values."""
    return {
        "fitted_to": one.name,
        "requests": one.requests,
        "gain_fit": one.fit,
        "gain_test": {"value": one.test.value, "interval": [one.test.low, one.test.high]},
    }


def trial_of(document: Mapping[str, Any]) -> Trial:
    """Take what :func:`_trial` returned."""
    gain = document["gain_test"]
    low, high = map(float, gain["interval"])
    return Trial(
        name=str(document["fitted_to"]),
        requests=int(document["requests"]),
        fit=float(document["gain_fit"]),
        test=Estimate(value=float(gain["value"]), low=low, high=high),
    )


def cases_of(trace: Trace, halves: int = HALVES) -> tuple[Case, ...]:
    """Return splits by request, time and, as far as the trace records them, domain; a null trace; parts of a half."""
    names = [*(f"half:{seed}" for seed in range(halves)), "time:0.5", *_by_domain(trace)]
    parts = [Case(split=names[0], share=share) for share in SHARES[:-1]]
    return (*(Case(split=name) for name in names), Case(split=names[0], null=True), *parts)


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
    source = refuse_counts(source)
    report = report or Report()
    trace = concatenate(list(source.blocks()), source.meta)
    cases, run = cases_of(trace), Fits(choices, Method(solver=solver), limits)
    trials = {}
    for number, case in enumerate(cases):
        report.progress(number, len(cases), str(case))
        trials[case] = run.trial(case, *sides(trace, case, limits.seed))
    return Validation.of(trials)


def refuse_counts(source: TraceStream | Counts) -> TraceStream:
    """Return a source that holds tokens; raises :class:`~moeplace.errors.InputError` for counts."""
    if isinstance(source, Counts):
        raise InputError(
            "a validation of counts", rule="requests are resampled, and counts hold none",
            hint="record a per-token trace",
        )  # fmt: skip
    return source


class Fits:
    """Fits and tests under the same choices; moves and baselines are left out."""

    def __init__(self, choices: Choices, method: Method, limits: Limits) -> None:
        self.choices = replace(
            choices, baseline=None, max_moves=None, max_moved_bytes=None, max_moved_bytes_per_gpu=None,
            horizon_steps=None, risk_batches=choices.risk_batches or (STEPS if choices.risk != "mean" else None),
        )  # fmt: skip
        self.method, self.limits = method, limits.replace(options={**limits.options, **method.options})
        # a method is judged with the choice of copies it comes with
        self.own = self.choices if method.routing is None else replace(self.choices, routing=method.routing)

    def trial(self, case: Case, fit: Trace, test: Trace) -> Trial:
        """Fit the method and EPLB to one part and judge both on the other.

        Complexity: two solves, and :data:`RESAMPLES` counts of the test part.
        """
        problem = build_problem(fit, self.choices)
        posed = build_problem(fit, replaced(self.own, **self.method.goals)) if self._differs else problem
        rival = solve(problem, RIVAL, Limits()).placement
        answer = solve(posed, self.method.solver, self.limits).placement
        if rival is None or answer is None:
            raise InputError(f"no placement for {case}", rule="a validation needs an answer for every split")
        pair = (answer, rival)
        return Trial(
            name=str(case),
            requests=len(np.unique(fit.request)),
            fit=self._gain_on(fit, pair),
            test=self._interval(test, pair),
        )

    @property
    def _differs(self) -> bool:
        return bool(self.method.goals) or self.own is not self.choices

    def _interval(self, test: Trace, pair: tuple[Placement, Placement]) -> Estimate:
        value = self._gain_on(test, pair)
        rng = np.random.default_rng(self.limits.seed)
        found = [self._gain_on(resampled(test, rng), pair) for _ in range(RESAMPLES)]
        # the busiest GPU of fewer distinct requests stands out more, for either: what that adds on average is taken off
        low, high = value + np.quantile(found, [0.025, 0.975]) - np.mean(found)
        return Estimate(value=value, low=min(value, float(low)), high=max(value, float(high)))

    def _gain_on(self, part: Trace, pair: tuple[Placement, Placement]) -> float:
        problem = build_problem(part, self.choices)
        own = problem if self.own is self.choices else build_problem(part, self.own)
        return _gain([objective_value(own, pair[0]), objective_value(problem, pair[1])])


def _gain(values: Sequence[float]) -> float:
    """Share by which the first is below the second; 0 where both are nothing."""
    return 1 - values[0] / values[1] if values[1] > 0 else 0.0


def _by_domain(trace: Trace) -> list[str]:
    """Return a split by domain, every second one to fit, where at least two occur."""
    if trace.domain is None:
        return []
    names = [trace.meta.domains[number] for number in np.unique(trace.domain)]
    return [f"domain:{','.join(names[::2])}"] if len(names) > 1 and not any("," in name for name in names) else []


def sides(trace: Trace, case: Case, seed: int) -> tuple[Trace, Trace]:
    """Return what is fitted to in a case, and what is tested on."""
    split = parse_split(case.split)
    fit, test = (
        concatenate(list(select_tokens(trace, split=split, part=part).blocks()), trace.meta) for part in ("fit", "test")
    )
    if case.share < 1:
        fit = first_requests(fit, case.share)
    return (null_trace(fit, seed), null_trace(test, seed)) if case.null else (fit, test)


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
