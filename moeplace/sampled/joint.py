"""Placements improved for compute and copies of sampled steps together, layer by layer or for the tail of their sum."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.frozen import Floats
from moeplace.placement import Placement
from moeplace.sampled.improve import TAIL, LayerItems, Search, finite_cap, moving_costs
from moeplace.sampled.joint_kernel import compiled_joint, descend_joint
from moeplace.sampled.tables import StepTables, layer_times
from moeplace.sampled.tokens import LINKS, Wire

KICKED = 3  # swaps of a kick
COMPILE_FROM = 5_000_000  # about as many µs as loops that are not compiled take; compiling takes 16 s, once per machine
ALONE, BITS = 3, 6  # µs of a swap in a step by its work, and for each word of tokens


@dataclass(frozen=True, slots=True)
class Costs:
    """What a step's time is made of: work of GPUs, and exchanges between them (None: as the tables have them)."""

    tables: StepTables
    wire: Wire | None

    @property
    def batches(self) -> int:
        """Steps."""
        return int(self.tables.rows.shape[2])

    @property
    def fixed_us(self) -> float:
        """What every layer takes whatever the placement, where times are exact."""
        if self.tables.compute is None or self.wire is None or self.wire.what != LINKS:
            return 0.0
        return self.tables.compute.launch_us + self.wire.fixed_us


class _Layer:
    """One layer's arrays, as the kernel takes them."""

    def __init__(self, costs: Costs, placement: Placement, layer: int, search: Search) -> None:
        self.items = LayerItems(placement.slots[layer], search.room, costs.tables, layer, search.load[layer])
        self.costs, self.number, self.width = costs, layer, placement.max_slots
        work, usage, load, busy = self.items.arrays()
        self.work, self.usage = work, usage
        moving = moving_costs(search, layer, self.items)
        self.bounds = (load, busy, np.array([finite_cap(search.cap[layer])]), moving)
        self.codes, self.times = self.items.codes(), np.zeros(costs.batches)
        self.wire = _wire_arrays(costs.wire, layer, self.items.expert, self.items.gpus)

    def descend(
        self, kernel: Callable[..., float], rest: Floats, risk: tuple[float, int], kicked: int, left: Any, word: Any
    ) -> float:
        """Improve, after a kick or none, and return the risk and the cost of moves; see the kernel."""
        layer = (self.work, self.items.where, self.codes, self.usage, self.times)
        with np.errstate(over="ignore"):  # of random numbers, and of counted bits; here, since threads have their own
            value = float(kernel(layer, self.wire, rest, risk, self.bounds, kicked, left, word))
        return value + float(self.bounds[3][np.arange(len(self.items.where)), self.items.where].sum())

    def state(self) -> tuple[np.ndarray, ...]:
        """Copies of what a descent changes."""
        return self.items.where.copy(), self.usage.copy(), self.bounds[1].copy(), self.times.copy()

    def restore(self, state: tuple[np.ndarray, ...]) -> None:
        """Go back to a state."""
        self.items.where[:], self.usage[:], self.bounds[1][:], self.times[:] = state

    def slots(self) -> np.ndarray:
        """``[GPU, slot]`` experts."""
        return self.items.slots(self.width)


def _wire_arrays(wire: Wire | None, layer: int, expert: np.ndarray, gpus: int) -> tuple[Any, ...]:
    """Arrays of an exchange, in the kernel's order; nearly empty without one."""
    if wire is None:
        code, rates, node = np.zeros(5, np.int64), np.zeros(2), np.zeros(gpus, np.int64)
        sets, homes, batches, nodes = np.zeros((1, 1, 1), np.uint64), 1, 1, 1
        words, gpus = 1, 1
    else:
        node, rates, homes, batches, words = wire.node, wire.rates(), wire.homes, wire.batches, wire.words
        nodes = int(node.max()) + 1
        code = np.array([wire.what, wire.distinct, wire.two_level, words, gpus // nodes], np.int64)
        sets = wire.sets(layer, expert)
    unions = wire is not None and wire.distinct
    held, over = (gpus if unions else 1, batches if unions else 1), homes * words if unions else 1
    levels = nodes if wire is not None and wire.two_level else 1
    spread = (levels, batches if levels > 1 else 1, over if levels > 1 else 1)
    return (
        code, rates, sets,
        np.zeros((*held, over), np.uint64), np.zeros((*held, over), np.uint64),
        np.zeros(spread, np.uint64), np.zeros(spread, np.uint64),
        np.zeros((batches, homes, gpus), np.int32), np.zeros((batches, homes, nodes), np.int32),
        np.zeros((batches, 4, gpus), np.int32), node.astype(np.int64), np.zeros((4, gpus), np.int32),
    )  # fmt: skip


def joint_values(costs: Costs, placement: Placement, search: Search) -> Floats:
    """``[batch]`` values of all steps as the search sees them: µs where exchanges are exact, else up to a constant."""
    total, nothing = np.zeros(costs.batches), np.array([0])
    for layer in range(placement.num_layers):
        if costs.wire is None:
            items = LayerItems(placement.slots[layer], search.room, costs.tables, layer, search.load[layer])
            total += layer_times(items.arrays()[1])
            continue
        one = _Layer(costs, placement, layer, search)
        one.descend(_kernel(costs, search), np.zeros(costs.batches), (0.0, 1), 0, nothing, _word(0, layer))
        total += one.times + costs.fixed_us
    return total


def improve_joint(costs: Costs, placement: Placement, search: Search) -> tuple[Placement, Floats]:
    """Lower the mean over steps of every layer's time by swaps of copies, with kicks; layers are independent.

    Parameters
    ----------
    costs
        What a step's time is made of.
    placement
        Where to start; the result is never worse in the mean of the sample.
    search
        Limits.

    Returns
    -------
    tuple
        The placement, and the mean of each of its layers. Complexity: O(layers · budget · batches · (GPUs + words)).
    """
    kernel, rest = _kernel(costs, search), np.zeros(costs.batches)

    def improve(layer: int) -> tuple[np.ndarray, float]:
        one = _Layer(costs, placement, layer, search)
        left, word = np.array([search.budget]), _word(search.seed, layer)
        left[:] *= not search.stop()
        best = one.descend(kernel, rest, (0.0, 1), 0, left, word)
        for _ in range(search.kicks):
            if left[0] <= 0 or search.stop():
                break
            before = one.state()
            value = one.descend(kernel, rest, (0.0, 1), KICKED, left, word)
            if value < best:
                best = value
            else:
                one.restore(before)
        return one.slots(), best

    with ThreadPoolExecutor(max(1, search.threads)) as pool:
        slots, values = zip(*pool.map(improve, range(placement.num_layers)), strict=True)
    return Placement(slots=np.stack(slots), num_experts=placement.num_experts), np.array(values)


def improve_joint_tail(costs: Costs, placement: Placement, mix: float, search: Search, *, sweeps: int = 3) -> Placement:
    """Lower ``(1 - mix)·mean + mix·CVaR95`` of the steps' times, sums over layers, by sweeps over the layers.

    Conditional value at risk as the mean of the worst 5 % (Rockafellar and Uryasev 2002). Complexity: O(sweeps · layers
    · budget · batches · (GPUs + words)).
    """
    kernel, nothing = _kernel(costs, search), np.array([0])
    risk = (float(mix), max(1, round(TAIL * costs.batches)))
    times = np.zeros((placement.num_layers, costs.batches))
    for layer in range(placement.num_layers):
        one = _Layer(costs, placement, layer, search)
        one.descend(kernel, times[0] * 0, risk, 0, nothing, _word(search.seed, layer))
        times[layer] = one.times
    for sweep in range(sweeps):
        slots, changed = [], False
        for layer in range(placement.num_layers):
            if search.stop():
                slots.append(placement.slots[layer])
                continue
            one = _Layer(costs, placement, layer, search)
            rest = times.sum(axis=0) - times[layer]
            word = _word(search.seed + 1 + sweep, layer)
            one.descend(kernel, rest, risk, 0, np.array([search.budget]), word)
            changed |= bool((one.times != times[layer]).any())
            times[layer] = one.times
            slots.append(one.slots())
        placement = Placement(slots=np.stack(slots), num_experts=placement.num_experts)
        if not changed or search.stop():
            break
    return placement


def _kernel(costs: Costs, search: Search) -> Callable[..., float]:
    wire = costs.wire
    each = ALONE if wire is None else BITS * wire.words * (wire.homes if wire.distinct or wire.what == LINKS else 1)
    # every layer is counted once whatever the budget
    effort = len(search.load) * (search.swaps + int(search.room.sum())) * costs.batches * each
    return compiled_joint() if effort >= COMPILE_FROM else descend_joint


def _word(seed: int, layer: int) -> np.ndarray:
    return np.array([(seed * 1_000_003 + layer + 1) * 0x9E3779B97F4A7C15 % 2**64 | 1], np.uint64)
