"""Which experts of a chain get copies, how many, and where, chosen together with the places of all experts.

Copies that share tokens evenly never lower what crosses by themselves; they relieve GPUs, so that within a load cap
experts may keep together that were too hot to. A few numbers of copies are tried first: as many as bring the load of a
copy below a share of the cap, from one that only splits what no GPU can hold alone to one that splits whatever is warm.
Then numbers change at random in every layer, a copy dropped, made, or passed to another expert; the chain is warmed and
cooled with them, and the best layers of old and new go on (:func:`moeplace.chains.clones.mixed`). Copies that cost
pairs and are not needed for the cap are dropped. At last the numbers stay and the chain is searched on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moeplace.chains import Climb, Work
from moeplace.chains.anneal import COMPILE_FROM_SWAPS
from moeplace.chains.climb import COPIES, PATIENCE, WARM
from moeplace.chains.clones import Chain, counts, mixed
from moeplace.chains.repair import repair
from moeplace.frozen import Floats, Ints
from moeplace.packing import pack_layers
from moeplace.packing.eplb import balance_counts, balance_global
from moeplace.placement import EMPTY, Placement

LEVELS = (1.0, 0.7, 0.5, 0.35)  # of the most load of a GPU: experts are split until none of their copies has more
SHARE_OF_STARTS, SHARE_OF_ROUNDS = 0.2, 0.6  # of the work; the rest goes to the last search
KICKS = 100
SAME = 1e-9


def counts_below(load: Floats, level: Floats, slots: int, most: int) -> Ints:
    """``[layer, expert]`` copies such that none has more load than ``level`` [layer], as far as ``slots`` go.

    The expert with the most load per copy is next; none gets more than ``most``.
    Complexity: O(slots · layers · experts).
    """
    count, row = np.ones(load.shape, np.int64), np.arange(len(load))
    for _ in range(slots - load.shape[1]):
        each = np.where(count < most, load / count, -1.0)
        hottest = each.argmax(axis=1)
        count[row, hottest] += each[row, hottest] > level
    return count


def starts(
    chain: Chain,
    load: Floats,
    top: Floats,
    *,
    kicks: int = KICKS,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> list[Placement]:
    """Balanced placements with few copies to many, of unlike numbers; those of no copies are left out.

    Parameters
    ----------
    chain
        The layers; placements are brought within its cap where that is found, layer by layer.
    load
        ``[layer, expert]`` loads by which they are balanced.
    top
        ``[layer]`` most load of a GPU, from which levels are counted.
    kicks, seed, stop
        Of :func:`pack_layers`, in layers that the packing does not bring within the cap; asked between layers.
    """
    slots, most = chain.slots_per_gpu, int((chain.slots_per_gpu > 0).sum())
    found: list[Placement] = []
    full = None

    def balanced(placement: Placement, *, fill: bool) -> Placement:
        floor = np.where(chain.keeps_cap(placement), np.inf, chain.cap)
        return pack_layers(load, placement, slots, floor=floor, kicks=kicks, seed=seed, fill=fill, stop=stop)

    for level in LEVELS:
        count = counts_below(load, level * top, int(slots.sum()), most)
        placement = balance_counts(load, count, slots)
        if not chain.keeps_cap(placement).all():
            placement = balanced(placement, fill=False)
        if not (kept := chain.keeps_cap(placement)).all():
            if full is None:
                full = balanced(balance_global(load, slots), fill=True)
            placement = placement.replace(slots=np.where(kept[:, None, None], placement.slots, full.slots))
        copies = placement.replicas()
        if (copies > 1).any() and not any(np.array_equal(copies, other.replicas()) for other in found):
            found.append(placement)
    return found


class Cloning:
    """One search over copies; what it finds keeps the cap, and is never worse than what it is given.

    Parameters
    ----------
    chain
        The layers.
    seed, threads
        Of the runs; threads do not change the result.
    watch
        Called with the share of the work that is done; the search ends soon when it returns True.
    improved
        Told of every better placement, and where it came from.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        seed: int,
        threads: int,
        watch: Callable[[float], bool],
        improved: Callable[[str, Placement], None],
    ) -> None:
        self.chain = chain
        self._rng, self._threads, self._watch, self._improved = np.random.default_rng(seed), threads, watch, improved
        self._seed, self._value, self._stopped = seed * 1009, -np.inf, False
        self._span, self._compiled = (0.0, 1.0), False
        self.best: Placement | None = None

    def run(self, given: Placement | None, options: Sequence[Placement], work: float) -> Placement | None:
        """Search from the options and the given placement with some work; None where none of them keeps the cap."""
        if given is not None and self.chain.keeps_cap(given).all():
            self.best, self._value = given, self.chain.kept(given)
        options = [option for option in options if self.chain.keeps_cap(option).all()]
        if not options and self.best is None:
            return None
        size = self.chain.instance(self.chain.items(options[0] if self.best is None else self.best)[0])
        self._compiled = Work.of(size, work).total * size.load.size >= COMPILE_FROM_SWAPS
        for i, option in enumerate(options):
            each = SHARE_OF_STARTS / len(options)
            self._span = (i * each, each)
            self._searched(option, work * each)
        self._span = (SHARE_OF_STARTS, SHARE_OF_ROUNDS)
        self._rounds(work * SHARE_OF_ROUNDS)
        begin = SHARE_OF_STARTS + SHARE_OF_ROUNDS
        self._span = (begin, 1 - begin)
        if self.best is not None:
            self._searched(self.best, work * (1 - begin))
        return self.best

    def _searched(self, start: Placement, work: float) -> None:
        """Search from a placement with its numbers of copies."""
        if self._stopped:
            self._keep("copies", start)
            return
        expert, gpu = self.chain.items(start)
        instance = self.chain.instance(expert)
        climb = self._climb(expert, gpu)
        self._keep("copies", self.chain.placement(expert, climb.run(Work.of(instance, work), lambda *_: None)))

    def _climb(self, expert: Ints, gpu: Ints) -> Climb:
        self._seed += 1
        return Climb(
            self.chain.instance(expert),
            gpu,
            seed=self._seed,
            threads=self._threads,
            watch=self._tick,
            compiled=self._compiled,
        )

    def _tick(self, share: float) -> bool:
        self._stopped = self._watch(self._span[0] + share * self._span[1])
        return self._stopped

    def _keep(self, source: str, *others: Placement) -> bool:
        """Put placements together with the best one, drop copies for nothing, and keep what is better."""
        chain = self.chain
        placements = [one for one in others if chain.keeps_cap(one).all()]
        if not placements:
            return False
        found = pruned(chain, mixed(chain, placements if self.best is None else [self.best, *placements]))
        value = chain.kept(found)
        if value <= self._value * (1 + SAME) and self.best is not None:
            return False
        self.best, self._value = found, value
        self._improved(source, found)
        return True

    def _rounds(self, work: float) -> None:
        """Change numbers of copies, warm and cool, and keep the best layers."""
        if self.best is None:
            return
        plan = Work.of(self.chain.instance(self.chain.items(self.best)[0]), work)
        rounds, idle = max(1, int(plan.total / (COPIES * plan.warm_sweeps))), 0
        begin, length = self._span
        for turn in range(rounds):
            if self._stopped or idle == PATIENCE:
                return
            others = []
            for copy in range(COPIES):
                each = length / rounds / COPIES
                self._span = (begin + (turn * COPIES + copy) * each, each)
                expert, gpu = self.chain.items(changed(self.chain, self.best, self._rng))
                warmed = self._climb(expert, gpu).warmed(WARM[turn % len(WARM)], plan.warm_sweeps)
                others.append(self.chain.placement(expert, warmed))
            idle = 0 if self._keep("copies changed", *others) else idle + 1


def changed(chain: Chain, placement: Placement, rng: np.random.Generator) -> Placement:
    """Return a placement with a copy dropped, made, or passed on in every layer; it keeps the cap where the given did.

    New copies go to experts by the load of one copy, into any slot whose GPU does not hold the expert yet. Layers that
    swaps do not bring back within the cap stay as they were.
    """
    expert, gpu = chain.items(placement)
    weight = chain.weigh(placement.replicas())
    held = placement.copies() > 0
    for layer, row in enumerate(expert):
        count = counts(row[None], placement.num_experts)[0]
        several = np.flatnonzero((row != EMPTY) & (count[row] > 1))
        empty = np.flatnonzero(row == EMPTY)
        ways = ["drop", "pass"] * (len(several) > 0) + ["make"] * (len(empty) > 0)
        way = ways[int(rng.integers(len(ways)))]
        item = int(rng.choice(empty if way == "make" else several))
        new = EMPTY
        if way != "drop":
            chance = np.where(held[layer, gpu[layer, item]], 0.0, weight[layer])
            if chance.sum() <= 0:
                continue
            new = int(rng.choice(len(chance), p=chance / chance.sum()))
        row[item] = new
    other = chain.placement(expert, gpu)
    if not (kept := chain.keeps_cap(other)).all():
        expert, gpu = chain.items(other)
        other = chain.placement(expert, repair(chain.instance(expert), gpu, gpu)[0])
        kept = chain.keeps_cap(other)
    return placement.replace(slots=np.where(kept[:, None, None], other.slots, placement.slots))


def pruned(chain: Chain, placement: Placement) -> Placement:
    """Drop copies as long as pairs do not lose by it and the cap is kept, those that gain most first.

    Complexity: O(layers · GPUs · experts²), and O(GPUs · experts · layers) for each copy that is looked at.
    """
    waiting = np.flatnonzero((placement.replicas() > 1).any(axis=1)).tolist()
    while waiting:
        layer = waiting.pop(0)
        near = chain.near(placement.even_share(), layer)
        copies, count = placement.copies()[layer], placement.replicas()
        slots = placement.slots.copy()
        while (found := _needless(chain, copies, count, layer, near)) is not None:
            gpu, expert = found
            copies[gpu, expert] -= 1
            count[layer, expert] -= 1
            slots[layer, gpu, slots[layer, gpu] == expert] = EMPTY
        if (slots != placement.slots).any():
            beside = {layer - 1, layer + 1} & set(range(len(slots))) - set(waiting)
            waiting += sorted(beside)  # what a copy there is worth has changed
            placement = placement.replace(slots=slots)
    return placement


def _needless(chain: Chain, copies: Ints, count: Ints, layer: int, near: Floats) -> tuple[int, int] | None:
    """GPU and expert of the copy whose tokens are best left to the other copies; None where all are needed."""
    mean = (near * copies).sum(axis=0) / count[layer]
    gain = np.where((copies > 0) & (count[layer] > 1), mean - near, -np.inf) / np.maximum(1, count[layer] - 1)
    for place in np.argsort(-gain, axis=None, kind="stable"):
        gpu, expert = (int(i) for i in np.unravel_index(place, gain.shape))
        if gain[gpu, expert] < -SAME * mean[expert]:
            return None
        fewer, other = count.copy(), copies.copy()
        fewer[layer, expert] -= 1
        other[gpu, expert] -= 1
        if (other @ chain.weigh(fewer)[layer]).max() <= chain.cap[layer] * (1 + 1e-12):
            return gpu, expert
    return None
