"""Redundant slots dealt over layers by what they gain, instead of as many to every layer, as CRAFT argues.

Every layer is packed with growing numbers of extra slots (:func:`moeplace.packing.pack_layers`), which gives its curve
of max/mean load; a total is then shared exactly by dynamic programming. Dealt over the floors of the layers (the mean,
and the hottest copy), the same programme bounds what any placement within the total can have: it stands in the
``budget`` stage. ``rule=craft`` deals by CRAFT's threshold instead (it has no total of its own), on the same packings,
which are better than the EPLB's that CRAFT replays; the balancedness of a layer is taken as mean/max of its load.

Layers then fill unequal numbers of the problem's slots and the others stay empty. GPUs are renamed layer by layer so
that each uses about as many in all: that is the memory which is saved. A stack that allocates as many slots in every
layer cannot load such a file; exporters refuse it.

Source: CRAFT, arXiv 2603.28768, MLSys 2026.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeplace.batches import expert_rows
from moeplace.errors import InputError, ProblemError
from moeplace.frozen import Floats, Ints
from moeplace.objective import UNITS
from moeplace.packing import pack_layers
from moeplace.packing.budget import CRAFT_SIZES, share_by_threshold, share_exactly, spread_layers
from moeplace.packing.eplb import balance_global, slots_without_copies
from moeplace.placement import EMPTY, Placement
from moeplace.problem import LOAD, Problem
from moeplace.solution import Clock, Limits, Report, Solution, Stage, Status, StopReason, found

DESCRIPTION = "CRAFT: a total of extra slots dealt over layers by what each gains, exactly, with a bound"
RULES = ("exact", "craft")
OPTIONS: Mapping[str, str] = {
    "extra": "extra slots of all layers together, a number or a share of all spare ones (default: 25%)",
    "rule": "exact (default: dynamic programming over the layers' curves) or craft (its threshold, no total)",
    "kicks": "kicks of each packing (default: 30, times --work)",
}
EXTRA = "25%"
KICKS = 30
FINE = 16  # every number of extra slots up to this, then in growing steps
STEP_SHARE = 0.125
MET = 1e-4  # of the floor: more slots gain nothing


@dataclass(frozen=True, slots=True)
class Curves:
    """``cost`` [layer, choice], and the packing of every choice with ``sizes`` extra slots."""

    sizes: Ints
    cost: Floats
    packings: tuple[Placement, ...]


def solve(problem: Problem, limits: Limits, report: Report) -> Solution:
    """Deal extra slots and pack every layer. Complexity: that of ``balance``, times the choices of a layer.

    Raises
    ------
    ProblemError
        Slots are counted over the whole model.
    """
    if problem.whole_model:
        raise ProblemError("slots are counted over the whole model", rule="craft deals them to layers, GPU by GPU")
    rule = limits.options.get("rule", RULES[0])
    if rule not in RULES:
        raise InputError(f"rule {rule!r}", rule=f"one of {', '.join(RULES)}")
    spare = problem.num_slots - problem.num_experts
    total, clock = _total(limits, spare * problem.num_layers), Clock(limits)
    curves = _curves(problem, limits, clock, report, CRAFT_SIZES if rule == "craft" else None)
    chosen = share_exactly(curves.cost, curves.sizes, total)
    if rule == "craft":
        chosen = share_by_threshold(1 - 1 / curves.cost, curves.sizes)
    # of choices that cost the same the one with the fewest slots, whose packing has this cost
    taken = np.take_along_axis(curves.cost, chosen[:, None], axis=1)
    chosen = (curves.cost <= taken).argmax(axis=1)
    placement = _taken(problem, curves, chosen)
    used = int(curves.sizes[chosen].sum())
    reached = float(taken.mean())
    bound = _bound(problem, max(total, used))
    stage = Stage(
        name=f"budget of {max(total, used)} extra slots",
        objective=reached,
        bound=min(bound, reached),
        unit=UNITS[LOAD],
        status=Status.OPTIMAL if reached <= bound * (1 + 1e-9) else Status.FEASIBLE,
        stop_reason=clock.stop_reason() if clock.over else StopReason.EXHAUSTED,
    )
    filled = placement.used_slots().sum(axis=0)
    notes = (
        f"{used} extra slots of {spare * problem.num_layers} in use, {int(curves.sizes[chosen].min())} to "
        f"{int(curves.sizes[chosen].max())} a layer; a GPU holds {int(filled.min())} to {int(filled.max())} experts in "
        "all layers together",
        "layers hold unequal numbers of experts: stacks with as many slots in every layer cannot load the placement "
        "(native, csv and omni-infer files can hold it)",
    )
    answer = found(problem, placement, limits, report, solver="craft", notes=notes if used else ())
    return answer.replace(stages=(stage,), stop_reason=stage.stop_reason)


def _total(limits: Limits, spare: int) -> int:
    text = limits.options.get("extra", EXTRA)
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else None
        total = round(share * spare) if share is not None else int(text)
    except ValueError:
        total = -1
    if total < 0:
        raise InputError(f"extra {text!r}", rule="a number of slots, or a share such as 25%")
    return min(total, spare)


def _curves(
    problem: Problem, limits: Limits, clock: Clock, report: Report, tried: Sequence[int] | None = None
) -> Curves:
    """Pack every layer with every number of extra slots (or those ``tried``), until a layer meets its floor."""
    load = problem.stats.load.astype(np.float64)
    spare, mean = problem.num_slots - problem.num_experts, load.sum(axis=1) / problem.num_gpus
    sizes = _sizes(spare) if tried is None else np.array([size for size in tried if size <= spare])
    floor = _floors(problem, spare)
    cost = np.full((len(load), len(sizes)), np.inf)
    packings: list[Placement] = []
    kicks = limits.whole("kicks", max(1, round(KICKS * limits.work)))
    for choice, size in enumerate(sizes.tolist()):
        report.progress(choice, len(sizes), f"packing with {size} extra slots a layer")
        start = _with_extra(problem, load, size)
        # a layer that met its floor, and all of them when time is up, keep what EPLB's rules give
        met = cost.min(axis=1) <= floor[:, -1] * (1 + MET)
        target = np.where(met, np.inf, floor[:, size] * mean)
        packed = start if clock.over else _packed(load, start, problem, (target, kicks, limits.seed), clock)
        cost[:, choice] = _imbalance(problem, packed)
        packings.append(packed)
    return Curves(sizes, np.minimum.accumulate(cost, axis=1), tuple(packings))


def _floors(problem: Problem, spare: int) -> Floats:
    """``[layer, extra]`` least max/mean load with every number of extra slots: the mean, and the hottest copy."""
    load = problem.stats.load.astype(np.float64)
    usable, layer = int((problem.slots_per_gpu > 0).sum()), np.arange(problem.num_layers)
    copies, floors = np.ones(load.shape, np.int64), np.empty((len(load), spare + 1))
    for extra in range(spare + 1):
        floors[:, extra] = (load / copies).max(axis=1)
        per_copy = np.where(copies < usable, load / copies, -1.0)
        copies[layer, per_copy.argmax(axis=1)] += 1
    even = problem.num_gpus / usable
    lowest: Floats = np.maximum(even, floors / (load.sum(axis=1, keepdims=True) / problem.num_gpus))
    return lowest


def _bound(problem: Problem, total: int) -> float:
    """Least mean of max/mean over layers that any placement with so many extra slots can have."""
    floors = _floors(problem, problem.num_slots - problem.num_experts)
    if problem.is_sampled:
        return 1.0
    least = share_exactly(floors, np.arange(floors.shape[1]), total)
    return float(np.take_along_axis(floors, least[:, None], axis=1).mean())


def _sizes(spare: int) -> Ints:
    sizes = [*range(min(spare, FINE) + 1)]
    while sizes[-1] < spare:
        sizes.append(min(spare, sizes[-1] + max(1, int(sizes[-1] * STEP_SHARE))))
    return np.array(sizes)


def _with_extra(problem: Problem, load: Floats, size: int) -> Placement:
    """EPLB's placement with so many extra slots; which GPUs they are on is evened out over layers later."""
    rooms = slots_without_copies(problem.slots_per_gpu, problem.num_experts)
    for _ in range(size):
        open_gpus = np.flatnonzero(rooms < problem.slots_per_gpu)
        rooms[open_gpus[rooms[open_gpus].argmin()]] += 1
    return balance_global(load, rooms)


def _packed(load: Floats, start: Placement, problem: Problem, run: tuple[Floats, int, int], clock: Clock) -> Placement:
    """Exchange and kick copies within the problem's slots; empty slots may be anywhere."""
    target, kicks, seed = run
    slots = np.full((len(load), problem.num_gpus, problem.max_slots), EMPTY, np.int64)
    slots[:, :, : start.max_slots] = start.slots
    wide = Placement(slots=slots, num_experts=problem.num_experts)
    return pack_layers(
        load, wide, problem.slots_per_gpu, floor=target, kicks=kicks, seed=seed, fill=False, stop=lambda: clock.over
    )


def _imbalance(problem: Problem, placement: Placement) -> Floats:
    """``[layer]`` max/mean load: of the steps of a sampled problem, averaged; else of the whole trace."""
    if problem.is_sampled and problem.steps is not None:
        rows = np.moveaxis(expert_rows(problem.steps), 2, 0).astype(np.float64)
        busy = np.einsum("lge,sle->slg", placement.even_share(), rows)
        mean = busy.mean(axis=2)
        ratio: Floats = np.divide(busy.max(axis=2), mean, out=np.ones(mean.shape), where=mean > 0).mean(axis=0)
        return ratio
    busy = placement.gpu_load(problem.stats.load)
    whole: Floats = busy.max(axis=1) / busy.mean(axis=1)
    return whole


def _taken(problem: Problem, curves: Curves, chosen: Ints) -> Placement:
    """The packings chosen, GPUs renamed so that each uses about as many slots in all layers together."""
    slots = np.full((problem.num_layers, problem.num_gpus, problem.max_slots), EMPTY, np.int64)
    for layer, choice in enumerate(chosen.tolist()):
        held = curves.packings[choice].slots[layer]
        slots[layer, :, : held.shape[1]] = held
    placement = Placement(slots=slots, num_experts=problem.num_experts)
    even = (problem.slots_per_gpu == problem.max_slots).all()
    return placement.permute_gpus(spread_layers(list(placement.used_slots()))) if even else placement
