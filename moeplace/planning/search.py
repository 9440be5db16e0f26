"""The search: every deployment is screened, then bounded, then timed unless others are known to be better in all.

Exhaustive but for what bounds exclude: a deployment is left out only where one of its own kind of topology (and, where
several bandwidths are tried, of its accelerator and bandwidth) that was timed, and keeps every constraint, is at least
as good on every axis as the other's bounds are, and better on one: so the best of each kind is known too. What is kept
on disk are outcomes, one a line, so that a search that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from moeplace.errors import InputError, OutputError
from moeplace.frozen import digest
from moeplace.planning.deployment import Deployment
from moeplace.planning.evaluate import Evaluator, placement_key
from moeplace.planning.outcome import BOUNDED, Outcome
from moeplace.planning.pareto import AXES, RATES, dominates, merits
from moeplace.planning.space import cells

SCHEMA = "moeplace/plan-outcomes/1"
Entry: TypeAlias = tuple[tuple[Deployment, ...], list[Outcome]]  # deployments timed together, and their bounds
WAVE = 8  # cells under way before what they found excludes others


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a search is: deployments judged, of how many, and the last cell's outcomes."""

    done: int
    total: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found.

    Attributes
    ----------
    outcomes
        Of every deployment judged, in the order of the space.
    axes
        What the Pareto set is over.
    interrupted, out_of_time
        Why some were not judged, if any.
    unjudged
        How many were not.
    """

    outcomes: tuple[Outcome, ...]
    axes: tuple[str, ...]
    interrupted: bool = False
    out_of_time: bool = False
    unjudged: int = 0


def axes_of(evaluator: Evaluator) -> tuple[str, ...]:
    """What deployments are compared on: a limit on the time per token takes the place of that time as an axis."""
    return RATES if evaluator.demands.tpot_ms is not None else AXES


def search(
    found: Sequence[Deployment],
    evaluator: Evaluator,
    *,
    threads: int = 1,
    time_limit_s: float = math.inf,
    results: Results | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Found:
    """Judge deployments.

    Parameters
    ----------
    found
        From :func:`~moeplace.planning.space.deployments`.
    evaluator
        Judges them.
    threads
        Cells judged at the same time; the outcomes do not depend on it.
    time_limit_s
        No further wave of cells is begun after so many seconds.
    results
        Where outcomes are kept, and taken from.
    tell
        Called after each cell.

    Returns
    -------
    Found
        With Ctrl-C (``KeyboardInterrupt``) what was judged so far.
    """
    started, axes = time.monotonic(), axes_of(evaluator)
    run = _Run(evaluator, found, {} if results is None else results.load())
    interrupted = late = False
    pool = ThreadPoolExecutor(threads)
    try:
        queue = _queue(found, evaluator)
        for first in range(0, len(queue), WAVE):
            if time.monotonic() - started >= time_limit_s:
                late = True
                break
            for new in run.wave(queue[first : first + WAVE], pool):
                if results is not None:
                    results.save([outcome for outcome in new if outcome.deployment.id not in run.kept])
                run.add(new)
                tell(Progress(done=len(run.judged), total=len(found), outcomes=tuple(new)))
    except KeyboardInterrupt:
        interrupted = True
        evaluator.stop.set()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    outcomes = tuple(run.judged[own.id] for own in found if own.id in run.judged)
    unjudged = len(found) - len(outcomes)
    return Found(outcomes=outcomes, axes=axes, interrupted=interrupted, out_of_time=late, unjudged=unjudged)


class _Run:
    """What is known while a search runs."""

    def __init__(self, evaluator: Evaluator, found: Sequence[Deployment], kept: dict[str, Outcome]) -> None:
        self.kept = kept
        self.judged: dict[str, Outcome] = {}
        self._best: dict[object, list[tuple[float, ...]]] = {}
        self._evaluator, self._axes = evaluator, axes_of(evaluator)
        links = {(own.accelerator, own.link_gb_per_s) for own in found}
        self._by_link = len(links) > len({accelerator for accelerator, _ in links})

    def _rivals(self, own: Deployment) -> list[tuple[float, ...]]:
        """Merits of what was timed and may exclude a deployment."""
        links = (own.accelerator, own.link_gb_per_s) if self._by_link else ()
        return self._best.setdefault((own.kind, bool(own.attention_gpus), links), [])

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Note what was judged."""
        self.judged |= {outcome.deployment.id: outcome for outcome in outcomes}
        for outcome in outcomes:
            if outcome.feasible:
                self._rivals(outcome.deployment).append(merits(outcome, self._axes))

    def wave(self, entries: Sequence[Entry], pool: ThreadPoolExecutor) -> Iterator[list[Outcome]]:
        """Judge some cells at the same time; what excludes them is what was known before, whatever the threads."""
        open_ = [self._open(bounds) for _, bounds in entries]
        new = {placement_key(one.deployment): one.deployment for timed in open_ for one in timed}
        for _ in pool.map(self._evaluator.placement, new.values()):
            pass
        for (cell, bounds), timed in zip(entries, pool.map(self._evaluator.time, open_), strict=True):
            known = {one.deployment.id: self._excluded(one) for one in bounds}
            known |= {one.deployment.id: one for one in timed}
            yield [known[own.id] for own in cell]

    def _open(self, bounds: Sequence[Outcome]) -> list[Outcome]:
        """Outcomes that must be timed."""
        return [
            one
            for one in bounds
            if one.deployment.id not in self.kept
            and not one.breaches
            and not any(dominates(other, merits(one, self._axes)) for other in self._rivals(one.deployment))
        ]

    def _excluded(self, one: Outcome) -> Outcome:
        if one.deployment.id in self.kept:
            return self.kept[one.deployment.id]
        return one if one.breaches else one.replace(kind=BOUNDED)


def judge(own: Deployment, evaluator: Evaluator) -> Outcome:
    """Time one deployment whatever constraints it breaks."""
    return evaluator.time([evaluator.screen(own)])[0]


def _queue(found: Sequence[Deployment], evaluator: Evaluator) -> list[Entry]:
    """Cells with their bounds, the most promising first: what is timed early excludes more."""
    queue = []
    for cell in cells(found):
        screened = [evaluator.screen(own) for own in cell]
        # what is ruled out is bounded too: other constraints may stand in its way besides
        queue.append((cell, [evaluator.bound(one) for one in screened]))

    def promise(entry: Entry) -> float:
        rates = [(one.per_usd or 0.0, one.per_gpu) for one in entry[1] if not one.breaches]
        return -max((rate[0] or rate[1] for rate in rates), default=0.0)

    return sorted(queue, key=promise)


class Results:
    """A file of outcomes: a line that tells what they are of, then one line for each.

    Parameters
    ----------
    path
        Made if it does not exist; a file of another trace, model, price book or constraints is refused.
    evaluator
        What the outcomes depend on.

    Raises
    ------
    InputError
        The file is of something else.
    OutputError
        It cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], evaluator: Evaluator) -> None:
        self.path = Path(path)
        self._head = {"schema": SCHEMA, "of": _identity(evaluator)}
        self._file: IO[str] | None = None

    def load(self) -> dict[str, Outcome]:
        """Outcomes by id; a line that was cut off, as a kill leaves it, is left out."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("cannot be read", hint="name another --results", where=str(self.path)) from error
        if not lines:
            return {}
        if _read(lines[0]) != self._head:
            raise InputError(
                "holds outcomes of another search",
                rule="the same trace, model, accelerators, prices, constraints and seed",
                hint="name another --results, or delete the file",
                where=str(self.path),
            )
        read = [_read(line) for line in lines[1:]]
        outcomes = [Outcome.of_dict(line) for line in read if line is not None and "deployment" in line]
        return {outcome.deployment.id: outcome for outcome in outcomes}

    def save(self, outcomes: Sequence[Outcome]) -> None:
        """Add outcomes, every number as it is."""
        if not outcomes:
            return
        try:
            if self._file is None:
                fresh = not self.path.exists() or not self.path.stat().st_size
                self._file = self.path.open("a", encoding="utf-8")
                # a line that a kill cut off must not swallow the next one
                self._file.write(json.dumps(self._head, sort_keys=True) + "\n" if fresh else "\n")
            for outcome in outcomes:
                self._file.write(json.dumps(outcome.to_dict(exact=True), sort_keys=True) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=str(self.path)) from error


def _read(line: str) -> dict[str, Any] | None:
    try:
        read = json.loads(line)
    except ValueError:
        return None
    return read if isinstance(read, dict) else None


def _identity(evaluator: Evaluator) -> str:
    work = evaluator.workload
    accelerators = [(name, each.digest()) for name, each in sorted(evaluator.accelerators.items())]
    book = asdict(evaluator.book.replace(sources={}, accelerator_usd={}, accelerator_watts={}))
    prices = (sorted(evaluator.book.accelerator_usd.items()), sorted(evaluator.book.accelerator_watts.items()))
    return digest(
        (
            work.trace_digest,
            work.model.digest(),
            (work.context, work.prompt, work.steps, work.seed),
            accelerators,
            (book, prices),
            evaluator.demands,
            (evaluator.solver, evaluator.work),
        )
    )
