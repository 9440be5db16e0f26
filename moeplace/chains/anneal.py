"""Swaps of experts between GPUs, annealed over all layers at once under a price on load.

A table holds what every expert's pairs with its two neighbouring layers are worth on each GPU, so a swap's gain is four
look-ups. An expert is swapped with one whose load ranks near its own, in a window that shrinks. Load above a
layer's cap is paid for, a little more than in proportion, by a price that grows while the temperature falls: the hot
phase crosses infeasible states, the cold one ends within the caps or very near.

A swap that would put two copies of an expert on one GPU is not made.

Layers of even number change while those of odd number stand still, and the other way round. A layer has random numbers
of its own, and begins its turn by taking up what its neighbours changed. Layers can so be given to threads, and the
result is the same whatever their number. Random numbers are a xorshift of 64 bits and acceptance compares with a table
of logarithms: the same on any platform, compiled or not.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.chains.instance import Instance
from moeplace.counting import compile_kernel
from moeplace.frozen import Ints

COMPILE_FROM_SWAPS = 300_000
THREADS_FROM_EXPERTS = 4000  # of all layers; fewer are soonest done by one thread
SWAPS_OF_A_CALL = 1_000_000
ROUNDS = 4  # proposals for each expert of a layer before its neighbours have their turn
LEVELS = 4096  # a power of two
LOG_LEVELS = np.log((np.arange(LEVELS) + 0.5) / LEVELS)
SEED_STEP = 0x9E3779B97F4A7C15
SAMPLED_SWAPS = 20_000
PRICELESS = 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a run goes; everything changes geometrically from the first sweep to the last.

    Attributes
    ----------
    sweeps
        Proposals for each expert.
    hot, cold
        Temperatures, in spreads of a random swap's gain.
    first_price, last_price
        Price of load above a cap, in those spreads for each 1 % of the mean load.
    first_window, last_window
        Most distance of two swapped experts in their layer's order of load, as a share of its experts.
    bend
        Load above the cap, in % of the mean load, at which the price has doubled.
    """

    sweeps: int
    hot: float = 0.9
    cold: float = 0.05
    first_price: float = 0.3
    last_price: float = 15.0
    first_window: float = 0.5
    last_window: float = 0.3
    bend: float = 10.0

    @classmethod
    def polish(cls, sweeps: int) -> Schedule:
        """Return the schedule that only improves a state which keeps the caps, and keeps them."""
        return cls(sweeps=sweeps, hot=0.05, cold=0.01, first_price=PRICELESS, last_price=PRICELESS, last_window=0.5)


def spread_of_swaps(instance: Instance, gpu: Ints) -> float:
    """Standard deviation of a random swap's gain where every GPU holds random experts, at least 1."""
    rng = np.random.default_rng(0)
    mixed = rng.permuted(gpu, axis=1)
    near = instance.near(mixed)
    layers, experts = gpu.shape
    layer = rng.integers(0, layers, SAMPLED_SWAPS)
    a, b = rng.integers(0, experts, (2, SAMPLED_SWAPS))
    g, h = mixed[layer, a], mixed[layer, b]
    gain = near[layer, h, a].astype(np.int64) + near[layer, g, b] - near[layer, g, a] - near[layer, h, b]
    moved = gain[g != h]
    return max(1.0, float(moved.std())) if moved.size else 1.0


def anneal(
    instance: Instance,
    gpu: Ints,
    schedule: Schedule,
    seed: int,
    *,
    unit: float | None = None,
    compiled: bool | None = None,
    threads: int = 1,
    tick: Callable[[float], bool] | None = None,
) -> Ints:
    """Anneal from a state.

    Parameters
    ----------
    instance
        The problem.
    gpu
        ``[layer, expert]`` GPU of each expert; every GPU holds as many in the result as here.
    schedule
        Sweeps, temperatures, prices.
    seed
        Of the run.
    unit
        Spread of a random swap's gain where it is known.
    compiled
        Use the compiled loop; default: from :data:`COMPILE_FROM_SWAPS` proposals on.
    threads
        Threads; they do not change the result.
    tick
        Called now and then with the share done; the run ends soon when it returns True.

    Returns
    -------
    ndarray
        ``[layer, expert]`` final state. Complexity: O(sweeps · layers · experts), and O(experts) for each expert that
        moved in a turn.
    """
    unit = spread_of_swaps(instance, gpu) if unit is None else unit
    return _Run(instance, gpu, (schedule, unit), seed, compiled).go(max(1, threads), tick)


class _Run:
    """The state of one run."""

    def __init__(
        self, instance: Instance, gpu: Ints, plan: tuple[Schedule, float], seed: int, compiled: bool | None
    ) -> None:
        self.instance, self.gpu = instance, gpu.astype(np.int64)
        schedule, unit = plan
        percent = max(0.01 * instance.mean_load, 1e-300)
        turns = max(1, schedule.sweeps // ROUNDS)
        steps = np.linspace(0.0, 1.0, turns) if turns > 1 else np.ones(1)
        self.heat = unit * schedule.hot * (schedule.cold / schedule.hot) ** steps
        self.price = unit / percent * schedule.first_price * (schedule.last_price / schedule.first_price) ** steps
        window = schedule.first_window * (schedule.last_window / schedule.first_window) ** steps
        self.window = np.maximum(1, np.rint(window * gpu.shape[1])).astype(np.int64)
        self.bend = 1.0 / (percent * schedule.bend)
        self.order = np.argsort(-instance.load, axis=1, kind="stable")
        self.rank = np.argsort(self.order, axis=1, kind="stable")
        self.was, self.near = self.gpu.copy(), instance.near(self.gpu)
        self.busy = instance.gpu_load(self.gpu)
        start = np.arange(1, len(gpu) + 1, dtype=np.uint64) * np.uint64(SEED_STEP) ^ np.uint64(seed * SEED_STEP % 2**64)
        self.random = np.maximum(start, 1)
        for _ in range(8):
            self.random ^= self.random << np.uint64(13)
            self.random ^= self.random >> np.uint64(7)
            self.random ^= self.random << np.uint64(17)
        self.halted, self.uniform, self.twins = False, instance.is_uniform, instance.twins
        self.onward = np.ascontiguousarray(instance.worth)
        self.backward = np.ascontiguousarray(instance.worth.T)
        if compiled is None:
            compiled = self.gpu.size * turns * ROUNDS >= COMPILE_FROM_SWAPS
        self.kernel = _compiled() if compiled else _turns

    def go(self, threads: int, tick: Callable[[float], bool] | None) -> Ints:
        """Run all turns."""
        if self.instance.num_gpus < 2 or len(self.gpu) < 2:
            return self.gpu
        halves = [np.arange(start, len(self.gpu), 2) for start in (0, 1)]
        if threads == 1 or self.gpu.size < THREADS_FROM_EXPERTS:
            self._alone(halves, tick)
            return self.gpu
        barrier = threading.Barrier(threads)
        shares = [[half[k::threads] for half in halves] for k in range(threads)]
        workers = [threading.Thread(target=self._work, args=(share, barrier, None)) for share in shares[1:]]
        for worker in workers:
            worker.start()
        try:
            self._work(shares[0], barrier, tick)
        finally:
            barrier.abort()
            for worker in workers:
                worker.join()
        return self.gpu

    def _alone(self, halves: list[Ints], tick: Callable[[float], bool] | None) -> None:
        """Take all turns, many in one call."""
        turns, step = len(self.heat), max(1, SWAPS_OF_A_CALL // (self.gpu.size * ROUNDS))
        for turn in range(0, turns, step):
            self._call(halves[0], halves[1], slice(turn, turn + step))
            if tick is not None and tick(min(1.0, (turn + step) / turns)):
                return

    def _work(self, halves: list[Ints], barrier: threading.Barrier, tick: Callable[[float], bool] | None) -> None:
        """Take the turns of one thread's layers."""
        turns, nothing = len(self.heat), np.zeros(0, np.int64)
        try:
            for turn in range(turns):
                for half in halves:
                    self._call(half, nothing, slice(turn, turn + 1))
                    if tick is not None and half is halves[-1]:
                        self.halted = tick((turn + 1) / turns)
                    barrier.wait()
                if self.halted:
                    return
        except threading.BrokenBarrierError:
            return

    def _call(self, first: Ints, second: Ints, turns: slice) -> None:
        one = self.instance
        self.kernel(
            first, second, one.pairs, one.back, one.load, one.cap, self.order, self.rank, self.gpu, self.was, self.near,
            self.busy, self.window[turns], self.heat[turns], self.price[turns], self.bend, LOG_LEVELS, self.random,
            self.onward, self.backward, self.uniform, self.twins,
        )  # fmt: skip


@functools.cache
def _compiled() -> Callable[..., None]:
    return compile_kernel(_turns, _turn, _take_up, _holds)


def _turns(
    first: Any, second: Any, pairs: Any, back: Any, load: Any, cap: Any, order: Any, rank: Any, gpu: Any, was: Any,
    near: Any, busy: Any, window: Any, heat: Any, price: Any, bend: float, logs: Any, random: Any, onward: Any,
    backward: Any, uniform: bool, twins: Any,
) -> None:  # fmt: skip
    """Give the layers in ``first`` and then those in ``second`` a turn, once for every temperature."""
    for t in range(len(heat)):
        _turn(first, pairs, back, load, cap, order, rank, gpu, was, near, busy, window[t], heat[t], price[t], bend,
              logs, random, onward, backward, uniform, twins)  # fmt: skip
        _turn(second, pairs, back, load, cap, order, rank, gpu, was, near, busy, window[t], heat[t], price[t], bend,
              logs, random, onward, backward, uniform, twins)  # fmt: skip


def _turn(
    own: Any, pairs: Any, back: Any, load: Any, cap: Any, order: Any, rank: Any, gpu: Any, was: Any, near: Any,
    busy: Any, window: int, heat: float, price: float, bend: float, logs: Any, random: Any, onward: Any, backward: Any,
    uniform: bool, twins: Any,
) -> None:  # fmt: skip
    """Give every layer in ``own`` its turn."""
    layers, experts = gpu.shape
    mask = len(logs) - 1
    for layer in own:
        if layer > 0:
            _take_up(near[layer], pairs[layer - 1], was[layer - 1], gpu[layer - 1], onward, uniform)
        if layer + 1 < layers:
            _take_up(near[layer], back[layer], was[layer + 1], gpu[layer + 1], backward, uniform)
        was[layer] = gpu[layer]
        top, word = cap[layer], random[layer]
        for _ in range(ROUNDS * experts):
            word ^= word << np.uint64(13)
            word ^= word >> np.uint64(7)
            word ^= word << np.uint64(17)
            draw = np.int64(word >> np.uint64(1))
            a = ((draw & 0xFFFFF) * experts) >> 20
            offset = ((((draw >> 20) & 0x7FFFF) * (2 * window)) >> 19) - window
            place = rank[layer, a] + (offset if offset < 0 else offset + 1)
            if place < 0 or place >= experts:
                continue
            b = order[layer, place]
            g, h = gpu[layer, a], gpu[layer, b]
            if g == h:
                continue
            gain = near[layer, h, a] + near[layer, g, b] - near[layer, g, a] - near[layer, h, b]
            moved = load[layer, a] - load[layer, b]
            was_g, was_h = max(0.0, busy[layer, g] - top), max(0.0, busy[layer, h] - top)
            new_g, new_h = max(0.0, busy[layer, g] - moved - top), max(0.0, busy[layer, h] + moved - top)
            above = new_g * (1.0 + new_g * bend) + new_h * (1.0 + new_h * bend)
            above -= was_g * (1.0 + was_g * bend) + was_h * (1.0 + was_h * bend)
            value = gain - price * above
            if value < 0 and value <= heat * logs[(draw >> 51) & mask]:
                continue
            if _holds(twins[layer], gpu[layer], a, h) or _holds(twins[layer], gpu[layer], b, g):
                continue
            gpu[layer, a], gpu[layer, b] = h, g
            busy[layer, g] -= moved
            busy[layer, h] += moved
        random[layer] = word


def _holds(twin: Any, gpu: Any, item: int, target: int) -> bool:
    """Whether a GPU holds another copy of an item's expert."""
    other = twin[item]
    while other != item:
        if gpu[other] == target:
            return True
        other = twin[other]
    return False


def _take_up(near: Any, pairs: Any, was: Any, now: Any, worth: Any, uniform: bool) -> None:
    """Change a layer's table by what a neighbour changed: ``pairs`` [its expert, own expert], ``worth`` [its GPU, own].

    Where only pairs that stay count, a move changes two rows of the table.
    """
    for e in range(len(now)):
        g, h = was[e], now[e]
        if g == h:
            continue
        if uniform:
            for f in range(near.shape[1]):
                near[g, f] -= pairs[e, f]
                near[h, f] += pairs[e, f]
            continue
        for x in range(near.shape[0]):
            change = worth[h, x] - worth[g, x]
            if change != 0:
                for f in range(near.shape[1]):
                    near[x, f] += change * pairs[e, f]
