"""One layer: the least copies of its tokens, with a lower bound, by columns.

Where all sets of experts can be counted through, the relaxation over all of them gives prices and a bound; only columns
whose reduced cost is below the gap between that bound and the best known partition can stand in a better one, and the
integer programme over these few proves the optimum. They are taken in growing numbers, so a partition is known before
the proof and every stop leaves a bound. Elsewhere annealed states and exchanges supply the columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.anneal import Annealer, Schedule
from moeplace.hypergraph.columns import EverySet, Pool, enumerable
from moeplace.hypergraph.exchange import exchanged
from moeplace.hypergraph.master import Master
from moeplace.hypergraph.pairs import pair_bound
from moeplace.hypergraph.patterns import Patterns
from moeplace.hypergraph.relaxation import relaxed_bound
from moeplace.hypergraph.thin import thinned, worth_thinning

ROOM = 1e-9  # of a cap, for the rounding of sums
FIRST_WINDOW = 0.003  # of the bound: reduced costs of the first columns tried
SMOOTHING = 0.3  # weight of the best prices so far in those tried next (Wentges 1997)
CLOSED = 1e-7  # of the value: the relaxation's gap at which pricing ends
KEPT_COLUMNS = 3000
UNLISTED = 3  # where sets are too many to list, programmes are harder: so much fewer columns
HOT_TURNS, HOT, WARM = 40, 0.15, 0.03  # annealing on a sample of the tokens, temperatures as in Schedule
COOL_TURNS, COOL, COLD = 20, 0.04, 0.003  # then on all of them
GLANCE_TURNS, GLANCE_SWAPS = 10, 8
STARTS = 48  # columns that exchanges start from, in a round
EXCHANGED_SIZE = 16  # larger sets hardly recombine


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is to be partitioned.

    Attributes
    ----------
    patterns
        Token patterns.
    load
        ``[expert]`` loads.
    cap
        Most load of a group; infinite without one.
    rooms
        ``[group]`` experts that each group (a GPU, or a node) holds; they add up to the experts.
    """

    patterns: Patterns
    load: Floats
    cap: float
    rooms: Ints

    @property
    def groups(self) -> dict[int, int]:
        """Size → how many groups have it; groups that hold nothing are left out."""
        sizes, counts = np.unique(self.rooms[self.rooms > 0], return_counts=True)
        return dict(zip(sizes.tolist(), counts.tolist(), strict=True))

    def keeps_cap(self, group: Ints) -> bool:
        """Whether a state ``[expert]`` is within the cap."""
        return bool((np.bincount(group, self.load, len(self.rooms)) <= self.cap * (1 + ROOM)).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much work a layer may take; none of it is measured by the clock.

    Attributes
    ----------
    columns, nodes
        Most columns and branches of an integer programme.
    rounds
        Most rounds of pricing.
    runs, turns, swaps
        Annealing runs, temperatures of each, and proposals of each expert at each.
    thin_runs
        Annealing runs where there are tokens enough to start on a sample of them.
    gap
        Relative gap at which a layer is done.
    steps
        Of the semidefinite relaxation, where sets are too many to count through.
    """

    columns: int = 20_000
    nodes: int = 4000
    rounds: int = 200
    runs: int = 4
    thin_runs: int = 8
    turns: int = 60
    swaps: int = 256
    gap: float = 0.0
    steps: int = 200


@dataclass(frozen=True, slots=True)
class Found:
    """The best partition so far ([expert] group, tokens' copies), a lower bound, and whether the cap proved too low."""

    group: Ints | None = None
    value: float = math.inf
    bound: float = 0.0
    infeasible: bool = False
    done: bool = False

    @property
    def proved(self) -> bool:
        """Whether no partition is better. Copies are whole numbers."""
        return self.group is not None and self.value <= self.bound


@dataclass
class LayerSearch:
    """The search for one layer's best partition; :attr:`found` may be read at any time.

    Attributes
    ----------
    layer, effort, seed
        What to solve, how hard, and the seed of annealing.
    stop, seconds
        Asked between steps: whether to end, and the seconds left for an integer programme.
    """

    layer: Layer
    effort: Effort
    seed: int
    stop: Callable[[], bool] = lambda: False
    seconds: Callable[[], float] = lambda: math.inf
    found: Found = field(default_factory=Found)

    def __post_init__(self) -> None:
        patterns = self.layer.patterns
        self.cap = self.layer.cap * (1 + ROOM)
        self.groups = self.layer.groups
        self.master = Master(patterns.num_experts, self.groups, 4.0 * patterns.tokens)
        self.pool = Pool.empty(max(self.groups))
        self._raise(float(-(-patterns.top_k // max(self.groups)) * patterns.tokens))

    def offer(self, group: Ints) -> None:
        """Take a state within the cap as the best, if it is."""
        value = self.layer.patterns.copies(group, len(self.layer.rooms))
        if value < self.found.value:
            self.found = replace(self.found, group=group, value=float(value))

    def glance(self) -> None:
        """Anneal for a moment, so that something better than the start is known. Complexity: O(patterns · GPUs)."""
        start = self.found.group
        if start is None or self.stop() or self._closed():
            return
        annealer = self._annealer(self.layer.patterns)
        schedule = Schedule(turns=GLANCE_TURNS, swaps=GLANCE_SWAPS * self.layer.patterns.num_experts)
        best, _ = annealer.run(start, schedule, self.seed, stop=self.stop)
        if self.layer.keeps_cap(best):
            self.offer(best)

    def run(self) -> Found:
        """Search until proved, or the effort is spent."""
        patterns = self.layer.patterns
        if not self.stop() and not self._closed():
            if all(enumerable(patterns, size) for size in self.groups):
                self._every_set()
            else:
                self._some_sets()
        self.found = replace(self.found, done=not self.stop())
        return self.found

    def _closed(self) -> bool:
        found = self.found
        return found.proved or (found.value < math.inf and found.value - found.bound <= self.effort.gap * found.value)

    def _raise(self, bound: float) -> None:
        """Take a bound; copies are whole numbers, so it may be rounded up."""
        whole = math.ceil(bound - 1e-6) if math.isfinite(bound) else bound
        self.found = replace(self.found, bound=min(self.found.value, max(self.found.bound, float(whole))))

    def _every_set(self) -> None:
        """Prove the optimum over all sets."""
        layer = self.layer
        sets = [EverySet(layer.patterns, size, layer.load, self.cap) for size in self.groups]
        listed = [one.pool for one in sets if one.pool is not None]
        if len(listed) == len(sets):
            price = self.master.relax(Pool.empty(max(self.groups)).joined(*listed)).price
        else:
            self._anneal(1)
            price = self._priced(sets)
        least = {one.size: one.price(price)[0] for one in sets}
        if any(math.isinf(value) for value in least.values()):
            self.found = replace(self.found, infeasible=True)
            return
        bound = self.master.bound(price, least)
        self._raise(bound)
        self._close(sets, price, least, bound)
        if len(listed) == len(sets) and not self._closed() and not self.found.infeasible:
            self._anneal(self.effort.runs)

    def _priced(self, sets: list[EverySet]) -> Floats:
        """Prices that solve the relaxation over all sets, by column generation with smoothed prices."""
        patterns = self.layer.patterns
        copies = self.found.value if math.isfinite(self.found.value) else 0.7 * patterns.top_k * patterns.tokens
        best, highest = self.layer.load * (copies / max(1.0, float(self.layer.load.sum()))), -math.inf
        for turn in range(self.effort.rounds):
            relaxed = self.master.relax(self.pool) if turn else None
            price = best if relaxed is None else SMOOTHING * best + (1 - SMOOTHING) * relaxed.price
            told = [one.price(price) for one in sets]
            bound = self.master.bound(price, {one.size: least for one, (least, _) in zip(sets, told, strict=True)})
            if bound > highest:
                best, highest = price, bound
            self._raise(bound)
            if self.stop() or (relaxed is not None and relaxed.value - highest <= CLOSED * relaxed.value):
                break
            if relaxed is not None and len(self.pool) > KEPT_COLUMNS:
                order = np.argsort(self.pool.reduced(relaxed.price), kind="stable")
                self.pool = self.pool.take(np.sort(order[: KEPT_COLUMNS // 2]))
            self.pool = self.pool.joined(*[pool for _, pool in told])
        return best

    def _close(self, sets: list[EverySet], price: Floats, least: dict[int, float], bound: float) -> None:
        """Close the gap: integer programmes over columns within a growing window of reduced cost.

        A partition costs at least the bound and the reduced costs of its columns above the least, so one that is not
        within the window costs at least the bound and the window. None costs more than a copy of every token on as
        many groups as it can touch, so beyond that width there are no columns left to try.
        """
        patterns = self.layer.patterns
        most = patterns.tokens * min(patterns.top_k, sum(self.groups.values()))
        window, widest, crowded = FIRST_WINDOW * max(1.0, bound), most + 1.0 - bound, False
        if widest <= 0:
            self.found = replace(self.found, infeasible=self.found.group is None)
            return
        while not self.stop() and not self._closed():
            needed = self.found.value - bound  # columns beyond cannot stand in a better partition
            window = min(window, needed, widest)
            pool = self._window(sets, price, least, window)
            if pool is None:
                if window <= self.found.bound - bound:
                    return
                window, crowded = window * 0.8, True
                continue
            complete = self._choose(pool, bound + window)
            if window >= min(widest, self.found.value - bound - 1e-6):
                self.found = replace(self.found, infeasible=self.found.group is None and complete)
                return
            if crowded or not complete:
                return
            window *= 2.0

    def _window(self, sets: list[EverySet], price: Floats, least: dict[int, float], window: float) -> Pool | None:
        parts = []
        for one in sets:
            room = self.effort.columns if one.pool is not None else self.effort.columns // UNLISTED
            part = one.within(price, least[one.size] + window * (1 + 1e-9) + 1e-6, room)
            if part is None:
                return None
            parts.append(part)
        return Pool.empty(max(self.groups)).joined(*parts)

    def _choose(self, pool: Pool, beyond: float) -> bool:
        """Choose among columns; ``beyond`` is a bound on partitions of others. Returns whether the programme ended."""
        choice = self.master.choose(pool, nodes=self.effort.nodes, seconds=self.seconds(), gap=self.effort.gap / 2)
        if choice.rows is not None:
            self.offer(self._state(pool.take(choice.rows)))
        if math.isfinite(beyond):
            self._raise(min(choice.bound, beyond))
        return choice.complete

    def _state(self, chosen: Pool) -> Ints:
        """``[expert]`` groups of a partition: sets in order of their first expert, each on a group of its size."""
        order = np.lexsort((chosen.members[:, 0], chosen.sizes))
        groups = np.argsort(self.layer.rooms, kind="stable")[(self.layer.rooms == 0).sum() :]
        state = np.zeros(self.layer.patterns.num_experts, np.int64)
        for row, group in zip(order, groups, strict=True):
            members = chosen.members[row]
            state[members[members >= 0]] = group
        return state

    def _anneal(self, runs: int) -> None:
        """Anneal from the best state within the cap, if one is known, and keep what the runs met as columns.

        Where there are tokens enough, a run starts on a sample of them.
        """
        start = self.found.group
        if start is None:
            start = np.random.default_rng(self.seed).permutation(
                np.repeat(np.arange(len(self.layer.rooms)), self.layer.rooms)
            )
        annealer, thin = self._annealer(self.layer.patterns), worth_thinning(self.layer.patterns)
        schedule = Schedule(turns=self.effort.turns, swaps=self._proposals)
        for run in range(runs):
            if self.stop():
                return
            seed = self.seed * 1009 + run
            if thin:
                best, met = self._settled(annealer, start, seed)
            else:
                best, met = annealer.run(start, schedule, seed, stop=self.stop)
            for state in [best, *met]:
                if self.layer.keeps_cap(state):
                    self.offer(state)
            if max(self.groups) <= EXCHANGED_SIZE:
                self._keep([state for state in [best, *met] if self.layer.keeps_cap(state)])

    def _settled(self, annealer: Annealer, start: Ints, seed: int) -> tuple[Ints, list[Ints]]:
        """Anneal on a sample of the tokens while it is hot, then on all of them."""
        hot = Schedule(turns=HOT_TURNS, swaps=self._proposals, hot=HOT, cold=WARM)
        cool = Schedule(turns=COOL_TURNS, swaps=self._proposals, hot=COOL, cold=COLD)
        state, _ = self._annealer(thinned(self.layer.patterns, seed)).run(start, hot, seed, stop=self.stop)
        return annealer.run(state, cool, seed, stop=self.stop)

    @property
    def _proposals(self) -> int:
        return self.effort.swaps * self.layer.patterns.num_experts

    def _annealer(self, patterns: Patterns) -> Annealer:
        """Of the layer, or of a sample of its tokens: loads and cap shrink alike."""
        share = patterns.tokens / self.layer.patterns.tokens
        return Annealer(patterns, self.layer.load * share, self.cap * share, len(self.layer.rooms))

    def _keep(self, states: list[Ints]) -> None:
        """Add the columns of states to the pool."""
        rows = [np.flatnonzero(state == group) for state in states for group in np.flatnonzero(self.layer.rooms)]
        if not rows:
            return
        width = max(self.groups)
        members = np.unique(np.array([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows]), axis=0)
        self.pool = self.pool.joined(Pool(members, self.layer.patterns.touching(members)))

    def _some_sets(self) -> None:
        """Anneal; let exchanges and the relaxation over what they find add columns; choose among them; bound."""
        self._anneal(self.effort.thin_runs if worth_thinning(self.layer.patterns) else self.effort.runs)
        self._raise(pair_bound(self.layer.patterns, self.layer.rooms))
        self._relax_pairs()
        if self.stop() or not len(self.pool) or self._closed():
            return
        relaxed = self.master.relax(self.pool)
        for _ in range(self.effort.rounds if max(self.groups) <= EXCHANGED_SIZE else 0):
            order = np.argsort(self.pool.reduced(relaxed.price), kind="stable")[:STARTS]
            before = len(self.pool)
            self.pool = self.pool.joined(*self._exchanges(self.pool.take(order), relaxed.price))
            lower = self.master.relax(self.pool)
            gained = relaxed.value - lower.value
            relaxed = lower
            if self.stop() or len(self.pool) == before or gained <= 1e-6 * lower.value:
                break
        reduced = self.pool.reduced(relaxed.price)
        within = np.flatnonzero(reduced <= self.found.value - relaxed.value)
        within = within[np.argsort(reduced[within], kind="stable")[: self.effort.columns // 2]]
        self._choose(self.pool.take(np.sort(within)), math.nan)

    def _relax_pairs(self) -> None:
        """Raise the bound by the semidefinite relaxation, where groups are equal."""
        patterns, group = self.layer.patterns, self.found.group
        if group is None or self._closed() or len(self.groups) > 1:
            return
        number = next(iter(self.groups.values()))
        self._raise(relaxed_bound(patterns, group, number, steps=self.effort.steps, stop=self.stop))

    def _exchanges(self, pool: Pool, price: Floats) -> list[Pool]:
        """New columns by exchanges, size by size."""
        parts = []
        for size in self.groups:
            own = pool.take(np.flatnonzero(pool.sizes == size))
            own = Pool(own.members[:, :size], own.cost)
            parts.append(exchanged(self.layer.patterns, own, price, self.layer.load, self.cap))
        return parts
