"""From a placement now deployed towards a better one under a budget of moves: the swaps that gain most a moved copy.

Where loads alone count and layers are small, each layer's gain by the number of moved copies is searched from what is
deployed, and the budget shared among layers by these curves (:mod:`moeplace.sampled.curves`). Elsewhere a price on
every copy away from where it is now turns a budget into a term that swaps are judged by: at a price each layer is
improved by itself, from what is deployed and from where a free search would go, and the least price that keeps the
budget is found by bisection (Lagrange; Everett, Operations Research 11, 1963). What room is left goes to the layers
that gain most for it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplace.batches import BatchLaw, Steps
from moeplace.diff import closest_names
from moeplace.errors import ProblemError
from moeplace.feasible import keeps_caps
from moeplace.frozen import Floats, Ints
from moeplace.moving import MoveLimits, arriving_copies, copy_us, move_us
from moeplace.objective import objective_value
from moeplace.placement import Placement
from moeplace.problem import COPIES, CROSS, LOAD, STEP_TIME, Problem
from moeplace.sampled.curves import gain_curves, share_moves
from moeplace.sampled.improve import Search, improve_mean_layers
from moeplace.sampled.joint import Costs, improve_joint, improve_joint_tail
from moeplace.sampled.starts import best_layers
from moeplace.sampled.tables import StepTables
from moeplace.sampled.tokens import Wire
from moeplace.solution import Clock, Limits
from moeplace.tails import MEAN

PRICES = 9  # tried
WIDTH = 8  # placements kept for each number of moved copies
SHARES = 4  # even shares of the budget that one layer may take
BEAM_WORK = 4e9  # swaps times steps, of all layers
KICKS = 30
MIX = 0.2  # of the worst steps, where a tail is minimised
WORK = 1e8  # swaps times steps, of all layers at one price
ALONE = 2  # times as many where copies do not count
MOST_TOKENS = 8192  # of the mean step whose copies count


def aligned(problem: Problem, placement: Placement) -> Placement:
    """Rename GPUs so that most copies stay where they are, unless the objective is worse under those names.

    Complexity: that of :func:`~moeplace.diff.closest_names`.
    """
    base = problem.baseline
    if base is None:
        return placement
    nodes = problem.topology.num_nodes if not problem.topology.is_direct else 1
    renamed = placement.permute_gpus(closest_names(base, placement, num_nodes=nodes))
    if not (renamed.used_slots() <= problem.slots_per_gpu).all():
        return placement
    worse = objective_value(problem, renamed) > objective_value(problem, placement) * (1 + 1e-9)
    return placement if worse else renamed


def moving_value(problem: Problem, placement: Placement) -> float:
    """Objective, and the time of moving to a placement spread over the horizon [µs] where there is one."""
    value = objective_value(problem, placement)
    if problem.moves is None or problem.moves.horizon_steps is None or problem.baseline is None:
        return value
    arriving = arriving_copies(problem.baseline.copies(), placement.copies())
    return value + move_us(problem.topology, problem.model.expert_weight_bytes, arriving) / problem.moves.horizon_steps


def relink(problem: Problem, target: Placement, limits: Limits) -> Placement:
    """Return the best placement found within the problem's limits on moves; at worst the baseline.

    Parameters
    ----------
    problem
        With a baseline and limits on moves.
    target
        Where a search without limits went, its GPUs named as the baseline's.
    limits
        Work, seed and threads.

    Raises
    ------
    ProblemError
        There is no baseline or it does not fit, or slots are counted over the whole model.
    """
    base, moves = problem.baseline, problem.moves
    if base is None or moves is None:
        raise ProblemError("no limits on moves", rule="moves are counted from a baseline", hint="--baseline FILE")
    base.check_fits(problem.slots_per_gpu, whole_model=problem.whole_model)
    options = [base]
    if moves.allow(arriving_copies(base.copies(), target.copies())):
        options.append(target)
    if problem.objective == CROSS or problem.whole_model:
        options.append(_by_layers(problem, moves, target))
    else:
        options += _Relink(problem, moves, limits).run(target)
    within = [one for one in options if keeps_caps(problem, one)] or options
    return min(reversed(within), key=lambda one: moving_value(problem, one))


def _by_layers(problem: Problem, moves: MoveLimits, target: Placement) -> Placement:
    """Take whole layers of the target, those first whose change gains most a moved copy, as long as limits hold."""
    base = problem.baseline
    assert base is not None
    now = base
    waiting = [layer for layer in range(base.num_layers) if (base.copies()[layer] != target.copies()[layer]).any()]
    while waiting:
        best: tuple[float, int, Placement] | None = None
        value = objective_value(problem, now)
        for layer in waiting:
            one = _with_layer(now, target, layer)
            loaded = arriving_copies(base.copies(), one.copies())
            if not moves.allow(loaded):
                continue
            more = int(loaded.sum()) - int(arriving_copies(base.copies(), now.copies()).sum())
            gain = (value - objective_value(problem, one)) / max(1, more)
            if gain > 0 and (best is None or gain > best[0]):
                best = (gain, layer, one)
        if best is None:
            break
        now = best[2]
        waiting.remove(best[1])
    return now


def _with_layer(placement: Placement, other: Placement, layer: int) -> Placement:
    width = max(placement.max_slots, other.max_slots)
    slots, taken = (
        np.pad(one.slots, ((0, 0), (0, 0), (0, width - one.max_slots)), constant_values=-1)
        for one in (placement, other)
    )
    slots = slots.copy()
    slots[layer] = taken[layer]
    return Placement(slots=slots, num_experts=placement.num_experts)


class _Relink:
    """One call of :func:`relink`, where layers can be improved by themselves."""

    def __init__(self, problem: Problem, moves: MoveLimits, limits: Limits) -> None:
        assert problem.baseline is not None
        self.problem, self.moves, self.base = problem, moves, problem.baseline
        self.held = self.base.copies()
        self.costs = step_costs(problem)
        self.work = limits.work
        clock = Clock(limits)
        mean = problem.stats.load.sum(axis=1) / problem.num_gpus
        self.search = Search(
            load=problem.stats.load.astype(np.float64),
            cap=np.full(problem.num_layers, np.inf) if problem.load_cap is None else problem.load_cap * mean,
            room=problem.slots_per_gpu,
            kicks=max(1, round(KICKS * limits.work)),
            budget=max(1, int(WORK * limits.work / (problem.num_layers * self.costs.batches))),
            seed=limits.seed,
            threads=max(1, limits.threads),
            stop=lambda: clock.over,
        )

    def run(self, target: Placement) -> list[Placement]:
        """Placements within the limits."""
        if (width := self._beam_width()) > 1:
            found, price = self._by_curves(width)
            return [found, *self._tail(found, price)]
        unit = float(self._improve(self.base, replace(self.search, budget=0))[1].sum())
        per_copy = copy_us(self.problem.topology, self.problem.model.expert_weight_bytes) / self.problem.num_gpus
        least = per_copy / self.moves.horizon_steps if self.moves.horizon_steps else 0.0
        low, high = 1e-7 * unit, 1e-2 * unit
        kept, values = self._at(least, (self.base, target))
        if self._allowed(kept):
            return [kept, *self._tail(kept, least)]
        over, over_values = kept, values
        kept, values, price = self.base, np.full(self.base.num_layers, np.inf), max(high, least)
        for _ in range(PRICES):
            middle = float(np.sqrt(low * high))
            found, own = self._at(max(middle, least), (kept, over))
            if self._allowed(found):
                kept, values, price, high = found, own, max(middle, least), middle
            else:
                over, over_values, low = found, own, middle
        found = self._fill(kept, values, over, over_values, price)
        return [kept, found, *self._tail(found, price)]

    @property
    def _most(self) -> int:
        """Moved copies of a layer that its curve goes to: a few times its even share of the budget."""
        budget = self.moves.max_copies or 0
        return min(budget, int(self.base.used_slots().sum(axis=1).max()), SHARES * (budget // self.base.num_layers + 1))

    def _beam_width(self) -> int:
        """Placements to keep for each number of moved copies; 0 where prices do better or are needed."""
        alone = self.costs.wire is None and self.moves.max_copies_per_gpu is None and self.moves.horizon_steps is None
        if not alone or not self.moves.max_copies:
            return 0
        pairs = int(self.problem.slots_per_gpu.sum()) ** 2 // 2
        each = self.base.num_layers * self._most * pairs * self.costs.batches
        return min(max(2, round(WIDTH * self.work)), int(BEAM_WORK * self.work / max(1, each)))

    def _by_curves(self, width: int) -> tuple[Placement, float]:
        """Share the budget among layers by what they gain; and what the last moves gain, each."""
        assert self.moves.max_copies is not None
        curves = gain_curves(self.costs.tables, self.base, self.search, most=self._most, width=width)
        shares, price = share_moves(curves, self.moves.max_copies)
        slots = [curve.slots[moved] for curve, moved in zip(curves, shares, strict=True)]
        return Placement(
            slots=np.stack([one for one in slots if one is not None]), num_experts=self.base.num_experts
        ), price

    def _at(self, price: float, starts: tuple[Placement, ...]) -> tuple[Placement, Floats]:
        """Improve at a price of each copy that is not where it was; and what every layer's priced value is."""
        search = replace(self.search, moving=price * (self.held == 0))
        tried = [self._improve(start, search) for start in starts]
        return best_layers(tried), np.min([values for _, values in tried], axis=0)

    def _improve(self, start: Placement, search: Search) -> tuple[Placement, Floats]:
        """Lower the mean of every layer, and what it costs to move."""
        if self.costs.wire is not None:
            return improve_joint(self.costs, start, search)
        weights = np.full(self.costs.batches, 1 / self.costs.batches)
        share = replace(search, budget=search.budget * ALONE)
        return improve_mean_layers(self.costs.tables, start, weights, share)

    def _fill(self, kept: Placement, values: Floats, over: Placement, over_values: Floats, price: float) -> Placement:
        """Take layers of a placement that moves too much, those with the most gain a moved copy first."""
        more = np.array([self._moved(over, layer) - self._moved(kept, layer) for layer in range(len(values))])
        gain = np.where(np.isfinite(values), values - over_values, 1.0) + price * np.maximum(more, 0)
        for layer in np.argsort(-gain / np.maximum(more, 1), kind="stable").tolist():
            if more[layer] > 0:
                one = _with_layer(kept, over, layer)
                kept = one if self._allowed(one) else kept
        return kept

    def _tail(self, start: Placement, price: float) -> list[Placement]:
        """Lower the tail at the same price, where one is asked for."""
        if self.problem.risk == MEAN:
            return []
        search = replace(self.search, moving=price * (self.held == 0))
        found = improve_joint_tail(self.costs, start, MIX, search)
        return [found] if self._allowed(found) else []

    def _moved(self, placement: Placement, layer: int) -> int:
        return int(np.maximum(placement.copies()[layer] - self.held[layer], 0).sum())

    def _allowed(self, placement: Placement) -> bool:
        return self.moves.allow(arriving_copies(self.held, placement.copies()))


def step_costs(problem: Problem) -> Costs:
    """What the steps of a problem are made of, or its mean step where it has none."""
    if problem.is_sampled:
        tables = StepTables.of(problem)
        wire = Wire.of(problem, np.arange(tables.rows.shape[2]))
        exact = wire is not None
        return Costs(replace(tables, port_us=0.0) if exact else tables, wire)
    rows = problem.stats.load.astype(np.float64)[:, :, None]
    if problem.objective == LOAD:
        mean = rows.sum(axis=1, keepdims=True) / problem.num_gpus
        return Costs(StepTables((rows / mean / len(rows)).astype(np.float32), None, 0.0, (0.0, 0.0)), None)
    wire = _mean_wire(problem)
    if problem.objective == COPIES:
        return Costs(StepTables(np.zeros(rows.shape, np.float32), None, 0.0, (0.0, 0.0)), wire)
    assert problem.objective == STEP_TIME
    return Costs(StepTables.of_mean(problem), wire)


def _mean_wire(problem: Problem) -> Wire | None:
    """Exchanges of a step of sampled tokens, priced as copies, or as links that carry so many times the mean step."""
    sample = problem.stats.sample
    if sample is None or problem.objective == STEP_TIME:
        return None
    size = min(sample.num_tokens, MOST_TOKENS)
    chosen: Ints = np.linspace(0, sample.num_tokens - 1, size).astype(np.int64)
    law = BatchLaw(phase=problem.law.phase if problem.law.phase != "mixed" else "prefill", requests=size, batches=1)
    one = problem.replace(objective=LOAD, load_cap=None, steps=Steps(trace=sample, rows=chosen[None], law=law), law=law)
    return Wire.of(one, np.array([0]), price=1.0 / (size * problem.num_layers))
