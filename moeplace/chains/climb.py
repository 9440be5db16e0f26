"""The search: several annealed states, their best layers put together, and that chain warmed and cooled again.

Annealing from different seeds leaves walls, where the experts of a topic change their GPU, in different places. The
best chain of all runs' layers avoids most of them. The incumbent is then warmed, cooled, repaired and polished with new
seeds, and the best layers of old and new are kept, round after round. The incumbent never gets worse and always keeps
the caps. The work is a number of proposals, so the result depends on the seed alone unless it is stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeplace.chains.anneal import COMPILE_FROM_SWAPS, Schedule, anneal, spread_of_swaps
from moeplace.chains.instance import Instance
from moeplace.chains.recombine import recombine
from moeplace.chains.repair import repair
from moeplace.frozen import Ints

PROPOSALS = 500e6  # of all stages at work 1
FEW_EXPERTS, MORE = 2048, 3.0  # experts of all layers up to which there are more of them, and how many times
SHARE_OF_RUNS = 0.6
MOST_RUNS = 8
WARM = (0.4, 0.2, 0.5, 0.3, 0.6)
WARM_PRICE = 2.0
SHARE_OF_POLISH = 0.1  # of a run's sweeps
COPIES = 2  # states of a round
PATIENCE = 12  # rounds without an improvement that end the search


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the stages may do.

    Attributes
    ----------
    runs, sweeps
        Annealed states, and the sweeps of each.
    rounds, warm_sweeps
        Rounds of warming, and the sweeps of each state in one.
    """

    runs: int
    sweeps: int
    rounds: int
    warm_sweeps: int

    @classmethod
    def of(cls, instance: Instance, scale: float) -> Work:
        """Share out ``scale`` times :data:`PROPOSALS`: longer runs on more GPUs, more runs where there is time left."""
        more = MORE if instance.load.size <= FEW_EXPERTS else 1.0
        sweeps = max(8.0, scale * more * PROPOSALS / instance.load.size)
        runs = int(min(MOST_RUNS, max(1.0, SHARE_OF_RUNS * sweeps / max(5000.0, 100.0 * instance.num_gpus))))
        each = SHARE_OF_RUNS * sweeps / runs
        warm = min(each / 2, 2000.0)
        rounds = int((1 - SHARE_OF_RUNS) * sweeps / (COPIES * warm * (1 + SHARE_OF_POLISH)))
        return cls(runs=runs, sweeps=max(4, int(each)), rounds=rounds, warm_sweeps=max(4, int(warm)))

    @property
    def total(self) -> float:
        """Sweeps of all stages."""
        return self.runs * self.sweeps + self.rounds * COPIES * self.warm_sweeps


class Climb:
    """One search.

    Parameters
    ----------
    instance
        The problem.
    start
        ``[layer, expert]`` GPUs of a state that keeps the caps.
    seed, threads
        Of the runs; threads do not change the result.
    watch
        Called with the share of the work that is done; the search ends soon when it returns True.
    compiled
        Use the compiled loop; default: where there is enough work.
    """

    def __init__(
        self,
        instance: Instance,
        start: Ints,
        *,
        seed: int,
        threads: int,
        watch: Callable[[float], bool],
        compiled: bool | None = None,
    ) -> None:
        self.instance, self.start, self.best = instance, start, start
        self.taken_back = 0
        self._seed, self._threads, self._watch = seed * 10_007, threads, watch
        self._unit = spread_of_swaps(instance, start)
        self._done, self._total, self._stopped, self._wanted = 0.0, 1.0, False, compiled
        self._compiled = bool(compiled)

    def run(self, work: Work, improved: Callable[[str, Ints], None]) -> Ints:
        """Do the work, telling of every improvement; return the best state.

        ``taken_back`` counts layers that had to be taken from the start to keep the caps.
        """
        self._total = max(1.0, work.total)
        if self._wanted is None:
            self._compiled = work.total * self.instance.load.size >= COMPILE_FROM_SWAPS
        states = [self.start]
        for _ in range(work.runs):
            states.append(self._cooled(self.start, Schedule(sweeps=work.sweeps)))
            if self._stopped:
                break
        self._keep("annealing", recombine(self.instance, states), improved)
        idle = 0
        for turn in range(work.rounds):
            if self._stopped or idle == PATIENCE:
                break
            warm = Schedule(sweeps=work.warm_sweeps, hot=WARM[turn % len(WARM)], first_price=WARM_PRICE)
            again = [self._cooled(self.best, warm) for _ in range(COPIES)]
            idle = 0 if self._keep("warming", recombine(self.instance, [self.best, *again]), improved) else idle + 1
        return self.best

    def warmed(self, hot: float, sweeps: int) -> Ints:
        """Return the start warmed, cooled, repaired and polished once."""
        self._total = float(sweeps)
        return self._cooled(self.start, Schedule(sweeps=sweeps, hot=hot, first_price=WARM_PRICE))

    def _keep(self, source: str, state: Ints, improved: Callable[[str, Ints], None]) -> bool:
        """Polish a state, and keep it if it is better and within the caps; return whether it was."""
        sweeps = 0 if self._stopped else 200
        state = self._polished(state, sweeps)
        better = self.instance.kept(state) > self.instance.kept(self.best)
        if better and not self.instance.excess(state).any():
            self.best = state
            improved(source, state)
            return True
        return False

    def _cooled(self, state: Ints, schedule: Schedule) -> Ints:
        """Anneal, repair and polish a state."""
        done = self._done

        def tick(share: float) -> bool:
            self._done = done + share * schedule.sweeps
            self._stopped = self._watch(min(1.0, self._done / self._total))
            return self._stopped

        state = self._annealed(state, schedule, tick)
        state, taken = repair(self.instance, state, self.start)
        self.taken_back += taken
        return self._polished(state, 0 if self._stopped else int(SHARE_OF_POLISH * schedule.sweeps))

    def _polished(self, state: Ints, sweeps: int) -> Ints:
        if sweeps < 1:
            return state
        return self._annealed(state, Schedule.polish(sweeps), None)

    def _annealed(self, state: Ints, schedule: Schedule, tick: Callable[[float], bool] | None) -> Ints:
        self._seed += 1
        return anneal(
            self.instance,
            state,
            schedule,
            self._seed,
            unit=self._unit,
            compiled=self._compiled,
            threads=self._threads,
            tick=tick,
        )
