r"""What is decided: which GPUs hold copies of which expert, in all layers together.

``on[l, e, n, g] = 1`` where expert ``e`` of layer ``l`` has ``n`` copies, one of them on GPU ``g``;
``has[l, e, n] = 1`` where it has ``n`` copies. Copies share evenly, so a copy carries ``1/n``:

    Σ_n has = 1,  Σ_g on[n, g] = n·has[n],  on ≤ has,  Σ_{e,n} on ≤ slots_g,  Σ_{e,n} P_e/n·on ≤ cap·mean

Loads are multiplied by the least common multiple of the copy numbers, so that they are whole numbers. Where nothing is
replicated there is no ``has`` and ``Σ_g on = 1``.
"""

from __future__ import annotations

import math

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.milp import LinearModel
from moeplace.placement import EMPTY, Placement
from moeplace.problem import Problem

MAX_MULTIPLE = 10**4  # its square multiplies numbers of pairs, and must leave them exact in float64
ROOM = 1e-9  # relative, of a cap that is no whole number

Terms = list[tuple[int, float]]


class Decision:
    """Variables and rows of the placement.

    Parameters
    ----------
    problem
        What is placed. Slots may be uneven, spare, or counted over the whole model.
    most
        Most copies of an expert.

    Attributes
    ----------
    model
        The programme, to which objectives add their own.
    on
        ``[layer, expert, copies-1, GPU]`` binaries.
    has
        ``[layer, expert, copies-1]`` binaries; empty where nothing is replicated.
    multiple
        What loads are multiplied by to be whole numbers; 1 where that would be too much, and they are fractions.
    load
        ``[layer, expert, copies-1]`` load of one copy, times ``multiple``.
    """

    def __init__(self, problem: Problem, most: int) -> None:
        self.problem, self.model, self.most = problem, LinearModel(), most
        self.counts = np.arange(1, most + 1)
        layers, experts, gpus = problem.num_layers, problem.num_experts, problem.num_gpus
        usable = [int(room > 0) for room in problem.slots_per_gpu]
        on = [
            self.model.integer(f"on{layer}_{e}_{n + 1}_{g}", 0, usable[g])
            for layer, e, n, g in np.ndindex(layers, experts, most, gpus)
        ]
        self.on: Ints = np.array(on, np.int64).reshape(layers, experts, most, gpus)
        cells = np.ndindex((layers, experts, most) if most > 1 else 0)
        has = [self.model.binary("has" + "_".join(map(str, cell))) for cell in cells]
        self.has: Ints = np.array(has, np.int64).reshape((layers, experts, most) if most > 1 else 0)
        multiple = math.lcm(*range(1, most + 1))
        self.is_whole = multiple <= MAX_MULTIPLE
        self.multiple = multiple if self.is_whole else 1
        self.load: Floats = problem.stats.load[:, :, None] * (self.multiple / self.counts)
        if self.is_whole:
            self.load = np.rint(self.load)
        self._assign()
        self._fit()
        self._keep_cap()

    def _assign(self) -> None:
        for layer, e in np.ndindex(self.on.shape[:2]):
            if self.most == 1:
                self.model.add([(int(v), 1.0) for v in self.on[layer, e, 0]], 1, 1)
                continue
            self.model.add([(int(v), 1.0) for v in self.has[layer, e]], 1, 1)
            for n in range(self.most):
                has = int(self.has[layer, e, n])
                self.model.add([*((int(v), 1.0) for v in self.on[layer, e, n]), (has, -float(n + 1))], 0, 0)
                for v in self.on[layer, e, n]:
                    self.model.add([(has, 1.0), (int(v), -1.0)], 0)

    def _fit(self) -> None:
        problem = self.problem
        for g, room in enumerate(problem.slots_per_gpu):
            if problem.whole_model:
                self.model.add([(int(v), 1.0) for v in self.on[..., g].ravel()], upper=float(room * problem.num_layers))
                continue
            for layer in self.on:
                self.model.add([(int(v), 1.0) for v in layer[..., g].ravel()], upper=float(room))

    def _keep_cap(self) -> None:
        cap = self.problem.load_cap
        if cap is None:
            return
        most = cap * self.mean * (1 + ROOM)
        if self.is_whole:
            most = np.floor(most)
        for layer, g in np.ndindex(len(self.on), self.on.shape[3]):
            self.model.add(self.gpu_load(layer, g), upper=float(most[layer]))

    @property
    def mean(self) -> Floats:
        """``[layer]`` mean load of a GPU, times :attr:`multiple`."""
        mean: Floats = self.problem.stats.load.sum(axis=1) * (self.multiple / self.problem.num_gpus)
        return mean

    def gpu_load(self, layer: int, gpu: int, sign: float = 1.0) -> Terms:
        """``sign`` times the load of a GPU, times :attr:`multiple`."""
        return self.weighted(layer, gpu, sign * self.load[layer])

    def weighted(self, layer: int, gpu: int, weight: Floats) -> Terms:
        """Sum over the copies on a GPU of ``weight`` [expert, copies-1]."""
        variables, values = self.on[layer, ..., gpu].ravel().tolist(), weight.ravel().tolist()
        return [(v, a) for v, a in zip(variables, values, strict=True) if a]

    def shares(self, layer: int, expert: int, gpu: int) -> Terms:
        """Share of an expert that a GPU serves."""
        return [(int(v), 1 / n) for v, n in zip(self.on[layer, expert, :, gpu], self.counts.tolist(), strict=True)]

    def point(self, placement: Placement) -> Floats | None:
        """Values of the placement's variables, all others 0; None where an expert has more copies than are modelled."""
        replicas = placement.replicas()
        if replicas.max() > self.most or placement.duplicates():
            return None
        point = np.zeros(self.model.num_variables)
        layer, gpu, expert = np.nonzero(placement.copies())
        count = replicas[layer, expert] - 1
        point[self.on[layer, expert, count, gpu]] = 1.0
        if self.most > 1:
            point[self.has[(*np.indices(replicas.shape), replicas - 1)]] = 1.0
        return point

    def placement(self, values: Floats) -> Placement:
        """Return the placement of a feasible point, experts of a GPU in order of their numbers."""
        held = np.asarray((values[self.on] > 0.5).any(axis=2))
        width = max(self.problem.max_slots, int(held.sum(axis=1).max()))
        slots = np.full((len(held), held.shape[2], width), EMPTY, np.int64)
        for layer, g in np.ndindex(len(held), held.shape[2]):
            experts = np.flatnonzero(held[layer, :, g])
            slots[layer, g, : len(experts)] = experts
        return Placement(slots=slots, num_experts=held.shape[1])
