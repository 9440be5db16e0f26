"""Solvers compared: trials over seeds put together, and the best named only where that is certain."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplace.tails import Estimate, over_seeds, paired, summarise
from moeplace.trials import Outcome, PhaseTimes, Setup
from moeplace.validated import Validated

SCHEMA = "moeplace/compare/1"
DIGITS = 9
MEASURES = ("mean", "p50", "p95", "p99", "cvar95")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where solvers are compared: one trace, topology and phase."""

    trace: str
    topology: str
    phase: str

    def __str__(self) -> str:
        return f"{self.trace} on {self.topology}, {self.phase}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One solver at one place, over all seeds.

    Attributes
    ----------
    place, solver
        Where, and who.
    seeds
        Seeds with an answer.
    step_us
        mean, p50, p95, p99 and cvar95 of the step time, each with a 95 % interval.
    change
        Relative change of the mean step time against the first solver on the same steps; None without it.
    max_over_mean, excess
        Load max/mean on the test part; that of steps above their noise floor.
    worst_gap, solve_s
        Largest relative gap (None where a bound is missing), and mean wall time of solving.
    best
        Measures in which this solver is the best and its interval lies below all others'.
    facts
        Means of what the trials tell of load, traffic, memory and moves (:class:`~moeplace.trials.Outcome`).
    """

    place: Place
    solver: str
    seeds: tuple[int, ...]
    step_us: Mapping[str, Estimate]
    change: Estimate | None
    max_over_mean: Estimate
    excess: Estimate
    worst_gap: float | None
    solve_s: float
    best: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values, without the time of solving, which differs between equal runs."""
        return {
            "trace": self.place.trace,
            "topology": self.place.topology,
            "phase": self.place.phase,
            "solver": self.solver,
            "seeds": list(self.seeds),
            "step_time_us": {name: _estimate(value) for name, value in self.step_us.items()},
            "change_of_mean": None if self.change is None else _estimate(self.change),
            "max_over_mean": _estimate(self.max_over_mean),
            "excess_over_noise_floor": _estimate(self.excess),
            "worst_gap": _rounded(self.worst_gap),
            "best": list(self.best),
            "facts": {name: _rounded(value) for name, value in self.facts.items()},
        }


def compare(outcomes: Sequence[Outcome]) -> tuple[Row, ...]:
    """Put trials together: one row for each place and solver, in the order in which they first come.

    Intervals over several seeds are Student's t of the seeds' values, which contain what differs between splits,
    solver runs and drawn steps; with one seed they are those over its steps.
    """
    found: dict[Place, dict[str, list[tuple[Outcome, PhaseTimes]]]] = {}
    for outcome in outcomes:
        for times in outcome.times:
            place = Place(trace=outcome.trial.trace, topology=outcome.trial.topology, phase=times.phase)
            found.setdefault(place, {}).setdefault(outcome.trial.solver, []).append((outcome, times))
    rows = []
    for place, solvers in found.items():
        first = {outcome.trial.seed: times for outcome, times in next(iter(solvers.values()))}
        rows += _marked([_row(place, solver, tried, first) for solver, tried in solvers.items()])
    return tuple(rows)


def _row(
    place: Place, solver: str, tried: Sequence[tuple[Outcome, PhaseTimes]], first: Mapping[int, PhaseTimes]
) -> Row:
    summaries = [summarise(times.step_us) for _, times in tried]
    changes = [
        paired(times.step_us, first[outcome.trial.seed].step_us)
        for outcome, times in tried
        if outcome.trial.seed in first and len(first[outcome.trial.seed].step_us) == len(times.step_us)
    ]
    gaps = [outcome.gap for outcome, _ in tried if outcome.gap is not None]
    return Row(
        place=place,
        solver=solver,
        seeds=tuple(outcome.trial.seed for outcome, _ in tried),
        step_us={name: over_seeds([summary[name] for summary in summaries]) for name in MEASURES},
        change=over_seeds(changes) if changes else None,
        max_over_mean=_plain(times.max_over_mean for _, times in tried),
        excess=_plain(times.excess for _, times in tried),
        worst_gap=max(gaps) if len(gaps) == len(tried) else None,
        solve_s=float(np.mean([outcome.solve_s for outcome, _ in tried])),
        facts=_mean_facts([outcome.facts for outcome, _ in tried]),
    )


def _mean_facts(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
    known = [name for name in told[0] if all(name in facts for facts in told)]
    return {name: float(np.mean([facts[name] for facts in told])) for name in known}


def _plain(values: Iterable[float]) -> Estimate:
    return over_seeds([Estimate(value=value, low=value, high=value) for value in values])


def _marked(rows: Sequence[Row]) -> list[Row]:
    """Name the best in each measure where its interval lies below all the others' and the seeds are the same."""
    wins: dict[str, list[str]] = {row.solver: [] for row in rows}
    for name in MEASURES:
        best = min(rows, key=lambda row: row.step_us[name].value)
        others = [row for row in rows if row is not best]
        apart = all(best.step_us[name].high < row.step_us[name].low for row in others)
        if others and apart and all(row.seeds == best.seeds for row in others):
            wins[best.solver].append(name)
    return [
        Row(**{**{key: getattr(row, key) for key in row.__slots__}, "best": tuple(wins[row.solver])}) for row in rows
    ]


def comparison_to_dict(
    outcomes: Sequence[Outcome], setup: Setup, validations: Sequence[Validated] | None = None
) -> dict[str, Any]:
    """Return a ``moeplace/compare/1`` document: the rows, every trial, and what failed; no times of this machine.

    ``validations``, where there are any, stand under that name.
    """
    trials = []
    for outcome in outcomes:
        entry = {name: getattr(outcome.trial, name) for name in outcome.trial.__slots__}
        entry |= {name: getattr(outcome, name) for name in ("unit", "status", "stop_reason", "failure")}
        entry |= {name: _rounded(getattr(outcome, name)) for name in ("objective", "gap")}
        means = {times.phase: _rounded(float(times.step_us.mean())) for times in outcome.times}
        trials.append(entry | {"mean_step_us": means})
    document = {
        "schema": SCHEMA,
        "dataflow": setup.choices.dataflow,
        "split": setup.split,
        "rows": [row.to_dict() for row in compare(outcomes)],
        "trials": trials,
        "notes": list(notes_of(outcomes)),
    }
    return document if validations is None else document | {"validations": [one.to_dict() for one in validations]}


def notes_of(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Return what was assumed or is to be noted in any trial, each sentence once."""
    return tuple(dict.fromkeys(note for outcome in outcomes for note in outcome.notes))


def comparison_to_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV, one line each, intervals in columns of their own."""
    out = io.StringIO()
    head = ["trace", "topology", "phase", "solver", "seeds"]
    head += [f"{name}{part}_us" for name in MEASURES for part in ("", "_low", "_high")]
    head += ["change_of_mean", "change_low", "change_high", "max_over_mean", "excess", "worst_gap", "solve_s", "best"]
    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    head += facts
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        where = [row.place.trace, row.place.topology, row.place.phase, row.solver, len(row.seeds)]
        times = [_rounded(part) for name in MEASURES for part in _parts(row.step_us[name])]
        change = ["", "", ""] if row.change is None else [_rounded(part) for part in _parts(row.change)]
        loads = [_rounded(row.max_over_mean.value), _rounded(row.excess.value), _rounded(row.worst_gap)]
        told = ["" if name not in row.facts else _rounded(row.facts[name]) for name in facts]
        writer.writerow([*where, *times, *change, *loads, round(row.solve_s, 3), " ".join(row.best), *told])
    return out.getvalue()


def _parts(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": _rounded(estimate.value), "interval": [_rounded(estimate.low), _rounded(estimate.high)]}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), DIGITS)
