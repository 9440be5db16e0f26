"""Swaps of experts between the GPUs of one layer, annealed on the exact number of copies under a price on load.

A table holds what every expert would add on each GPU, and a list what it would save by leaving its own: tokens of which
it is the only expert there. Their sum never overstates what a swap costs, so most proposals are turned down by four
look-ups; the tokens that chose both experts are counted only for the rest, and tables are changed only by swaps made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.chains.anneal import LOG_LEVELS
from moeplace.counting import compile_kernel
from moeplace.frozen import Floats, Ints
from moeplace.hypergraph.patterns import Patterns

SAMPLED_SWAPS = 2000
SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a run goes; everything changes geometrically from the first turn to the last.

    Attributes
    ----------
    turns, swaps
        Temperatures, and proposals at each.
    hot, cold
        Temperatures, in spreads of a random swap's cost.
    first_price, last_price
        Price of load above the cap, in those spreads for each 1 % of the mean load.
    """

    turns: int
    swaps: int
    hot: float = 0.1
    cold: float = 0.005
    first_price: float = 0.3
    last_price: float = 15.0

    def course(self, unit: float, percent: float) -> tuple[Floats, Floats]:
        """``[turn]`` temperatures and prices of load, for costs that spread by ``unit``; ``percent``: 1 % of a load."""
        steps = np.linspace(0.0, 1.0, max(2, self.turns))
        heat: Floats = unit * self.hot * (self.cold / self.hot) ** steps
        price: Floats = unit / percent * self.first_price * (self.last_price / self.first_price) ** steps
        return heat, price


class Annealer:
    """The tables of one layer, ready for runs from any state.

    Parameters
    ----------
    patterns
        The layer.
    load
        ``[expert]`` loads.
    cap
        Most load of a GPU.
    num_gpus
        GPUs.
    """

    def __init__(self, patterns: Patterns, load: Floats, cap: float, num_gpus: int) -> None:
        self.patterns, self.load, self.cap, self.num_gpus = patterns, np.asarray(load, np.float64), cap, num_gpus
        self.of, self.first = patterns.by_expert()
        self.experts = patterns.experts.astype(np.int32)
        self.weight = patterns.weight.astype(np.int64)
        self.has = np.zeros((patterns.num_experts, len(self.weight)), np.bool_)
        self.has[patterns.experts, np.arange(len(self.weight))[:, None]] = True

    def run(
        self, group: Ints, schedule: Schedule, seed: int, *, stop: Callable[[], bool] = lambda: False
    ) -> tuple[Ints, list[Ints]]:
        """Anneal from a state.

        Parameters
        ----------
        group
            ``[expert]`` GPU of each; every GPU holds as many in the result.
        schedule
            Temperatures and prices.
        seed
            Of the run.
        stop
            Asked after every turn.

        Returns
        -------
        tuple
            The best state within the cap that was met (the start where there was none better), and the states within
            the cap that later turns ended in. Complexity: O(1) for a swap turned down, O(patterns of the two experts ·
            k) for one that is made.
        """
        state = group.astype(np.int64).copy()
        count, join, leave = self._tables(state)
        busy = np.bincount(state, self.load, self.num_gpus)
        unit = self._spread(state, join, leave)
        percent = max(0.01 * float(self.load.sum()) / self.num_gpus, 1e-300)
        heat, price = schedule.course(unit, percent)
        feasible = bool((busy <= self.cap).all())
        best, least = state.copy(), np.array([self.patterns.copies(state, self.num_gpus) if feasible else 2**62])
        now = np.array([self.patterns.copies(state, self.num_gpus)])
        word = np.array([max(1, (seed + 1) * SEED_STEP % 2**64)], np.uint64)
        met: list[Ints] = []
        for turn in range(len(heat)):
            _compiled()(
                self.experts, self.weight, self.of, self.first, self.has, self.load, self.cap, state, count, join,
                leave, busy, now, best, least, schedule.swaps, heat[turn], price[turn], 0.1 / percent, LOG_LEVELS, word,
            )  # fmt: skip
            if 2 * turn >= len(heat) and (busy <= self.cap).all():
                met.append(state.copy())
            if stop():
                break
        return best, met

    def _tables(self, state: Ints) -> tuple[Any, Any, Any]:
        """``[pattern, GPU]`` experts of a pattern on each GPU, ``[expert, GPU]`` and ``[expert]`` tables."""
        place = state[self.experts]
        count = np.zeros((len(self.weight), self.num_gpus), np.int8)
        row = np.arange(len(self.weight))
        for j in range(self.experts.shape[1]):
            count[row, place[:, j]] += 1
        join = np.zeros((self.patterns.num_experts, self.num_gpus), np.int64)
        leave = np.zeros(self.patterns.num_experts, np.int64)
        experts = self.experts.ravel()
        for gpu in range(self.num_gpus):
            absent = np.where(count[:, gpu] == 0, self.weight, 0)
            join[:, gpu] = np.bincount(experts, np.repeat(absent, self.experts.shape[1]), len(join))
        alone = np.take_along_axis(count, place, axis=1) == 1
        leave[:] = np.bincount(experts, (alone * self.weight[:, None]).ravel(), len(leave))
        return count, join, leave

    def _spread(self, state: Ints, join: Ints, leave: Ints) -> float:
        """Spread of a random swap's cost at a state, at least 1."""
        a, b = np.random.default_rng(0).integers(0, len(state), (2, SAMPLED_SWAPS))
        cost = join[a, state[b]] + join[b, state[a]] - leave[a] - leave[b]
        moved = cost[state[a] != state[b]]
        return max(1.0, float(moved.std())) if moved.size else 1.0


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_turn, _shared, _move)


def _turn(
    experts: Any, weight: Any, of: Any, first: Any, has: Any, load: Any, cap: float, state: Any, count: Any, join: Any,
    leave: Any, busy: Any, now: Any, best: Any, least: Any, swaps: int, heat: float, price: float, bend: float,
    logs: Any, random: Any,
) -> None:  # fmt: skip
    """Propose ``swaps`` swaps at one temperature; everything from ``state`` to ``least`` is changed in place."""
    size, mask, word = len(state), len(logs) - 1, random[0]
    over = 0
    for g in range(len(busy)):
        over += busy[g] > cap
    for _ in range(swaps):
        word ^= word << np.uint64(13)
        word ^= word >> np.uint64(7)
        word ^= word << np.uint64(17)
        draw = np.int64(word >> np.uint64(1))
        a, b = ((draw & 0xFFFFF) * size) >> 20, (((draw >> 20) & 0xFFFFF) * size) >> 20
        g, h = state[a], state[b]
        if g == h:
            continue
        moved = load[a] - load[b]
        was_g, was_h = max(0.0, busy[g] - cap), max(0.0, busy[h] - cap)
        new_g, new_h = max(0.0, busy[g] - moved - cap), max(0.0, busy[h] + moved - cap)
        above = new_g * (1.0 + new_g * bend) + new_h * (1.0 + new_h * bend)
        above -= was_g * (1.0 + was_g * bend) + was_h * (1.0 + was_h * bend)
        room = -heat * logs[(draw >> 51) & mask] - price * above
        cost = join[a, h] + join[b, g] - leave[a] - leave[b]
        if cost > room:
            continue
        cost += _shared(weight, of, first, has, count, a, b, g, h)
        if cost > room:
            continue
        _move(experts, weight, of, first, state, count, join, leave, a, h)
        _move(experts, weight, of, first, state, count, join, leave, b, g)
        over -= (busy[g] > cap) + (busy[h] > cap)
        busy[g] -= moved
        busy[h] += moved
        over += (busy[g] > cap) + (busy[h] > cap)
        now[0] += cost
        if over == 0 and now[0] < least[0]:
            least[0] = now[0]
            best[:] = state
    random[0] = word


def _shared(weight: Any, of: Any, first: Any, has: Any, count: Any, a: Any, b: Any, g: Any, h: Any) -> int:
    """Tokens that chose both experts: a swap changes nothing for them, which the tables do not know."""
    if first[a + 1] - first[a] > first[b + 1] - first[b]:
        a, b = b, a
    total = 0
    for place in range(first[a], first[a + 1]):
        p = of[place]
        if has[b, p]:
            total += weight[p] * ((count[p, g] == 1) + (count[p, h] == 1))
    return total


def _move(
    experts: Any, weight: Any, of: Any, first: Any, state: Any, count: Any, join: Any, leave: Any, e: Any, h: Any
) -> None:
    """Move an expert to GPU ``h`` and change the tables."""
    g, width = state[e], experts.shape[1]
    state[e] = h
    alone = 0
    for place in range(first[e], first[e + 1]):
        p = of[place]
        w = weight[p]
        count[p, g] -= 1
        count[p, h] += 1
        if count[p, g] == 0:
            for j in range(width):
                join[experts[p, j], g] += w
        elif count[p, g] == 1:
            for j in range(width):
                if state[experts[p, j]] == g:
                    leave[experts[p, j]] += w
        if count[p, h] == 1:
            alone += w
            for j in range(width):
                join[experts[p, j], h] -= w
        elif count[p, h] == 2:
            for j in range(width):
                if state[experts[p, j]] == h and experts[p, j] != e:
                    leave[experts[p, j]] -= w
    leave[e] = alone
