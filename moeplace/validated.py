"""Validations of a comparison: every split of every solver an item of its own, tried anywhere and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moeplace.build import Choices
from moeplace.errors import InfeasibleError, InputError, NothingFoundError, PlacementError, ProblemError, SolverError
from moeplace.frozen import replaced
from moeplace.solution import Limits
from moeplace.split import select_tokens
from moeplace.spool import Spooled
from moeplace.suites import Method
from moeplace.trace import Trace, concatenate
from moeplace.trials import Setup, TraceFile, opened
from moeplace.trials import Trial as Contestant
from moeplace.validation import (
    Case,
    Fits,
    Trial,
    Validation,
    cases_of,
    refuse_counts,
    sides,
    trial_of,
    trial_to_dict,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One case for one contestant of a comparison, with all that is needed to try it elsewhere."""

    trial: Contestant
    case: Case
    source: TraceFile | Spooled
    setup: Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What came of an item: figures, or why there are none."""

    trial: Contestant
    case: Case
    found: Trial | None = None
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {} if self.found is None else trial_to_dict(self.found)

    @classmethod
    def of_dict(cls, item: Item, document: Mapping[str, Any]) -> Tried:
        """Take what :meth:`to_dict` returned; anything else raises KeyError, TypeError or ValueError."""
        return cls(trial=item.trial, case=item.case, found=trial_of(document))


def try_item(item: Item) -> Tried:
    """Fit and test; a solver that finds nothing, or a problem that cannot be, is told, anything else is raised."""
    phase = item.setup.choices.phase
    trace = _whole(item.source, phase if phase != "mixed" else None)
    method = Method.of(item.trial.solver)
    limits = Limits(**{**item.setup.limits, "seed": item.trial.seed, "threads": item.setup.threads})
    run = Fits(replaced(item.setup.choices, topology=item.trial.topology), method, limits)
    try:
        found = run.trial(item.case, *sides(trace, item.case, item.trial.seed))
    except (InputError, ProblemError, PlacementError, SolverError, InfeasibleError, NothingFoundError) as error:
        return Tried(trial=item.trial, case=item.case, failure=str(error).splitlines()[0])
    return Tried(trial=item.trial, case=item.case, found=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """A contestant of a comparison: all its figures, or why there are none."""

    trial: Contestant
    validation: Validation | None
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the contestant, and a ``moeplace/validation/1`` document or the failure."""
        told = {"trace": self.trial.trace, "topology": self.trial.topology, "solver": self.trial.solver}
        return told | ({"failure": self.failure} if self.validation is None else self.validation.to_dict())


def validated(items: Sequence[Item], tried: Sequence[Tried]) -> list[Validated]:
    """Put together what came of items, contestant by contestant; one that lacks a case is left out unless it failed."""
    known = {(one.trial, one.case): one for one in tried}
    cases: dict[Contestant, list[Case]] = {}
    for item in items:
        cases.setdefault(item.trial, []).append(item.case)
    found = []
    for trial, own in cases.items():
        done = {case: known[trial, case] for case in own if (trial, case) in known}
        failures = [f"{case}: {one.failure}" for case, one in done.items() if one.failure is not None]
        trials = {case: one.found for case, one in done.items() if one.found is not None}
        if failures or len(trials) == len(own):
            validation = None if failures else Validation.of(trials)
            found.append(Validated(trial=trial, validation=validation, failure=failures[0] if failures else None))
    return found


@lru_cache(maxsize=1)
def _whole(source: TraceFile | Spooled, phase: str | None) -> Trace:
    """Return a trace's tokens of a phase, read once for items that follow one another."""
    tokens = select_tokens(refuse_counts(opened(source)), phase=phase)
    return concatenate(list(tokens.blocks()), tokens.meta)


def cases_in(source: TraceFile | Spooled, choices: Choices, halves: int) -> tuple[Case, ...]:
    """Return the cases of a trace where it lies; raises :class:`~moeplace.errors.InputError` for counts."""
    return cases_of(_whole(source, choices.phase if choices.phase != "mixed" else None), halves)
