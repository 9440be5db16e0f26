"""How an engine runs a step: dataflow, replica choice, homes of the requests, overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplace.batches import BatchLaw, Steps
from moeplace.errors import InputError, ProblemError, unknown_name
from moeplace.fingerprint import hashed
from moeplace.frozen import Ints, replaced
from moeplace.homes import AFFINITY, deal, preferences, seen_tokens
from moeplace.overlap import MICRO_BATCHES, NONE, OVERLAPS, PING_PONG
from moeplace.problem import CONTEXT_COHERENT, DATAFLOWS, DISPATCH_COMBINE
from moeplace.routing import EVEN, LP, POLICIES, Router
from moeplace.topology import Topology
from moeplace.trace import Trace
from moeplace.traffic import StepTokens, home_ranks

AUTO_HOMES, TURN, RECORDED, RANDOM = "auto", "turn", "recorded", "random"
HOMES = (AUTO_HOMES, TURN, RECORDED, RANDOM, AFFINITY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How an engine runs a step.

    Attributes
    ----------
    dataflow
        ``dispatch-combine`` or ``context-coherent``.
    routing
        Which copy serves a token, one of :data:`moeplace.routing.POLICIES`.
    homes
        Which rank holds a request: ``recorded`` by the trace, in ``turn``, at ``random`` by request; ``auto`` takes the
        recorded ones where every rank exists, else deals in turn. ``affinity:N`` gives every request of a step, in
        turn, the rank with room that its first N tokens (64) visited most; one that has not had them yet is dealt.
    overlap, micro_batches
        See :mod:`moeplace.overlap`; 0 micro-batches are the usual number.
    with_attention
        Count attention's time too; needed to tell what overlap wins.
    """

    dataflow: str = DISPATCH_COMBINE
    routing: str = EVEN
    homes: str = AUTO_HOMES
    overlap: str = NONE
    micro_batches: int = 0
    with_attention: bool = False

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.routing, POLICIES, "routing"),
            (AFFINITY if seen_tokens(self.homes) else self.homes, HOMES, "homes"),
            (self.overlap, OVERLAPS, "overlap"),
        ):
            if value not in known:
                raise unknown_name(what, value, known)
        if self.dataflow not in DATAFLOWS:
            raise ProblemError(f"dataflow {self.dataflow!r}", rule=f"one of {', '.join(DATAFLOWS)}")
        if self.dataflow == CONTEXT_COHERENT and (self.overlap != NONE or self.routing == LP):
            what = self.overlap if self.overlap != NONE else f"routing {self.routing}"
            rule = "overlap and routing by each step's own loads need dispatch-combine"
            raise ProblemError(f"{what} under context-coherent execution", rule=rule)
        usual = MICRO_BATCHES[self.overlap]
        if self.micro_batches < 0 or (self.overlap != PING_PONG and self.micro_batches not in (0, usual)):
            rule = f"{self.overlap} has {usual}; only ping-pong has a choice"
            raise ProblemError(f"{self.micro_batches} micro-batches", rule=rule)

    @property
    def parts(self) -> int:
        """Micro-batches that a step is cut into."""
        return self.micro_batches or MICRO_BATCHES[self.overlap]

    def replace(self, **changes: object) -> Execution:
        """Copy with some fields changed."""
        return replaced(self, **changes)


def step_tokens(
    steps: Steps, gpus: int, execution: Execution, place: tuple[Router, Topology] | None = None
) -> StepTokens:
    """Every token of every step: its micro-batch and its home; homes by affinity need the copies and the network."""
    batches, size = steps.rows.shape
    row, turn = steps.rows.reshape(-1), np.tile(steps.law.turns(), batches)
    part = _parts_of(steps.law, gpus, execution.parts)
    home = _by_affinity(steps, place) if place is not None and seen_tokens(execution.homes) else None
    group = np.repeat(np.arange(batches), size) * execution.parts + np.tile(part, batches)
    return StepTokens(
        row=row,
        group=group,
        num_groups=batches * execution.parts,
        home=_homes_of(steps.trace, row, turn, (gpus, execution.homes)) if home is None else home,
    )


def _parts_of(law: BatchLaw, gpus: int, parts: int) -> Ints:
    """``[step token]`` micro-batch of each: requests of one rank in turn, or stretches where there are too few."""
    turns = law.turns()
    if parts == 1:
        return np.zeros(len(turns), np.int64)
    if turns[-1] + 1 >= parts * gpus:
        return turns // gpus % parts
    first = np.flatnonzero(np.diff(turns, prepend=-1))
    length = np.diff(first, append=len(turns))
    inside = np.arange(len(turns)) - np.repeat(first, length)
    return np.where(np.repeat(length, length) >= parts, inside * parts // np.repeat(length, length), turns % parts)


def _by_affinity(steps: Steps, place: tuple[Router, Topology]) -> Ints:
    """``[step token]`` homes by what the first tokens of each request visited."""
    router, topology = place
    opening = steps.opening
    if opening is None:
        raise InputError("the steps know no first tokens", rule="homes by affinity go by the first tokens of requests")
    turns = steps.law.turns()
    first = np.flatnonzero(np.diff(turns, prepend=-1))
    names, preference = preferences(opening, router.gpu_share(topology.num_gpus), topology)
    last = np.full(len(names), -1, np.int64)
    np.maximum.at(last, np.searchsorted(names, opening.request), opening.position)
    rows = steps.rows[:, first]
    which = np.searchsorted(names, steps.trace.request[rows])
    home = deal(preference[which], steps.trace.position[rows] > last[which])
    return np.repeat(home, np.bincount(turns), axis=1).reshape(-1)


def _homes_of(trace: Trace, row: Ints, turn: Ints, rule: tuple[int, str]) -> Ints:
    gpus, homes = rule
    if homes == RANDOM:
        return (hashed(trace.request[row], 0) % np.uint64(gpus)).astype(np.int64)
    if homes == TURN:
        return turn % gpus
    ranks = trace.rank
    usable = ranks is not None and ranks.size and ranks.min() >= 0 and ranks.max() < gpus
    if homes == RECORDED and not usable:
        what = "the trace records no ranks" if ranks is None else f"rank {int(ranks.max())} of {gpus} GPUs"
        hint = "--homes turn or random, or a topology of as many GPUs as were recorded"
        raise InputError(what, rule="recorded homes need a rank below the number of GPUs for every token", hint=hint)
    return home_ranks(None if ranks is None else ranks[row], turn, gpus)
