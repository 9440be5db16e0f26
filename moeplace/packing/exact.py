r"""One small layer packed exactly: how many copies of each expert, and where, by an integer programme.

With ``z[e, n] = 1`` where expert ``e`` has ``n`` copies and ``y[e, n, g] = 1`` where one of them is on GPU ``g``

    min T   subject to  Σ_n z[e, n] = 1,  Σ_g y[e, n, g] = n·z[e, n],  y ≤ z,
                        Σ_{e,n} y[e, n, g] ≤ slots_g,  Σ_{e,n} P_e/n·y[e, n, g] ≤ T

Multiplied by the least common multiple of the copy numbers all loads are whole numbers. GPUs of equal slots can be
renamed at will, so their loads may fall in order.
"""

from __future__ import annotations

import math

import numpy as np

from moeplace.frozen import Ints
from moeplace.milp import Budget, LinearModel, MilpResult, solve_cpsat
from moeplace.placement import EMPTY

MAX_PLACES = 128  # experts × GPUs: beyond, nothing is proved in the time that exchanges need to come within 0.1 %
MAX_MULTIPLE = 10**6


def exact_layer(
    load: Ints, slots: Ints, slots_per_gpu: Ints, floor: float, budget: Budget
) -> tuple[Ints, float] | None:
    """Solve one layer.

    Parameters
    ----------
    load
        ``[expert]`` selections.
    slots
        ``[GPU, slot]`` a packing to start from.
    slots_per_gpu
        ``[GPU]`` slots of each.
    floor
        A lower bound on the load of the busiest GPU.
    budget
        Work, and the safety stop.

    Returns
    -------
    tuple
        The best packing ``[GPU, slot]`` found and a lower bound; None where the layer is too large.
    """
    gpus, spare = len(slots_per_gpu), int(slots_per_gpu.sum()) - len(load)
    most = max(1, min(int((slots_per_gpu > 0).sum()), spare + 1))
    multiple = math.lcm(*range(1, most + 1))
    if len(load) * gpus > MAX_PLACES or multiple > MAX_MULTIPLE:
        return None
    layer = _Layer(load.astype(np.int64), slots_per_gpu, most, multiple)
    result = layer.solve(slots, floor, budget)
    bound = floor if result.bound is None else max(floor, math.ceil(result.bound - 1e-6) / multiple)
    return (slots if result.values is None else layer.read(result.values, slots.shape[1])), bound


class _Layer:
    """The model of one layer."""

    def __init__(self, load: Ints, slots_per_gpu: Ints, most: int, multiple: int) -> None:
        self.load, self.room, self.multiple = load, slots_per_gpu, multiple
        self.model = LinearModel()
        self.counts = range(1, most + 1)
        experts, gpus = range(len(load)), range(len(slots_per_gpu))
        self.has = {(e, n): self.model.binary(f"has{e}_{n}") for e in experts for n in self.counts}
        self.on = {(e, n, g): self.model.binary(f"on{e}_{n}_{g}") for e, n in self.has for g in gpus}
        self.busiest = self.model.integer("busiest", 0, float(load.sum() * multiple))
        for e in experts:
            self.model.add([(self.has[e, n], 1.0) for n in self.counts], 1, 1)
            for n in self.counts:
                places = [(self.on[e, n, g], 1.0) for g in gpus]
                self.model.add([*places, (self.has[e, n], -float(n))], 0, 0)
                for g in gpus:
                    self.model.add([(self.has[e, n], 1.0), (self.on[e, n, g], -1.0)], 0)
        for g in gpus:
            self.model.add([(self.on[e, n, g], 1.0) for e, n in self.has], 0, float(slots_per_gpu[g]))
            self.model.add([(self.busiest, 1.0), *self._gpu_load(g, -1.0)], 0)
            if g and slots_per_gpu[g] == slots_per_gpu[g - 1]:
                self.model.add([*self._gpu_load(g - 1, 1.0), *self._gpu_load(g, -1.0)], 0)
        self.model.minimise([(self.busiest, 1.0)])

    def _gpu_load(self, gpu: int, sign: float) -> list[tuple[int, float]]:
        return [(self.on[e, n, gpu], sign * float(self.load[e] * self.multiple // n)) for e, n in self.has]

    def solve(self, slots: Ints, floor: float, budget: Budget) -> MilpResult:
        """Solve from a packing; GPUs of equal slots are put in falling order of load first."""
        count = np.bincount(slots[slots != EMPTY], minlength=len(self.load))
        copy = self.load * self.multiple // np.maximum(count, 1)
        busy = np.where(slots == EMPTY, 0, copy[np.maximum(slots, 0)]).sum(axis=1)
        order = np.lexsort((-busy, self.room))
        place = np.empty(len(order), np.int64)
        place[np.argsort(self.room, kind="stable")] = order
        point = {self.has[e, int(count[e])]: 1.0 for e in range(len(self.load))}
        for g, source in enumerate(place):
            point |= {self.on[int(e), int(count[e]), g]: 1.0 for e in slots[source] if e != EMPTY}
        point[self.busiest] = float(busy.max())
        self.model.lower[self.busiest] = float(math.ceil(floor * self.multiple - 1e-6))
        self.model.begin_at(point)
        return solve_cpsat(self.model, budget)

    def read(self, values: np.ndarray, width: int) -> Ints:
        """Return the packing of a point."""
        slots = np.full((len(self.room), width), EMPTY, np.int64)
        used = np.zeros(len(self.room), np.int64)
        for (e, _, g), variable in self.on.items():
            if values[variable] > 0.5:
                slots[g, used[g]] = e
                used[g] += 1
        return slots
