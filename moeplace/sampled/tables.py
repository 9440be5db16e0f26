"""What experts add to GPUs in every sampled step, in the channels whose busiest GPU sets the time of a layer.

For ``load`` there is one channel, selections over their mean. For ``step-time`` there are three: weights read and
arithmetic, of whose sums on a GPU the larger counts, and the port that receives copies. The port's channel spreads
homes evenly and leaves co-location aside: it steers the search, and what is found is timed by the evaluator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moeplace.batches import expert_rows
from moeplace.compute import ExpertCompute
from moeplace.frozen import Floats, Ints
from moeplace.network import KERNEL_OF_PHASE, NORMAL
from moeplace.problem import CONTEXT_COHERENT, LOAD, Problem
from moeplace.topology import num_links_per_gpu


@dataclass(frozen=True, slots=True)
class StepTables:
    """Rows of every expert in every step, and what they cost.

    Attributes
    ----------
    rows
        ``[layer, expert, batch]`` float32 selections.
    compute
        Cost constants; None for ``load``, where rows over their mean are counted.
    port_us
        µs of the busiest port for each row.
    shared
        ``(memory, arithmetic)`` µs of the shared experts of a GPU.
    expected
        Whether rows are means of Poisson numbers, not numbers.
    """

    rows: np.ndarray
    compute: ExpertCompute | None
    port_us: float
    shared: tuple[float, float]
    expected: bool = False

    @classmethod
    def of_mean(cls, problem: Problem) -> StepTables:
        """Return the one step that has the mean rows of every expert, each copy's number of rows a Poisson one."""
        rows = problem.stats.selections_per_token * problem.law.step_tokens
        compute, shared = _compute_of(problem)
        return cls(np.ascontiguousarray(rows[:, :, None], np.float32), compute, port_us(problem), shared, True)

    @classmethod
    def of(cls, problem: Problem) -> StepTables:
        """Count the steps of a problem. Complexity: O(batches · tokens · layers · k)."""
        if problem.steps is None:
            raise ValueError("the problem has no steps")
        rows = np.ascontiguousarray(expert_rows(problem.steps), np.float32)
        if problem.objective == LOAD:
            mean = rows.sum(axis=1, keepdims=True) / problem.num_gpus
            ratio = np.divide(rows, mean, out=np.zeros_like(rows), where=mean > 0)
            return cls(ratio / len(rows), None, 0.0, (0.0, 0.0))
        compute, shared = _compute_of(problem)
        return cls(rows, compute, port_us(problem), shared)

    def part(self, batches: Ints) -> StepTables:
        """Return the tables of some steps alone."""
        return replace(self, rows=np.ascontiguousarray(self.rows[:, :, batches]))

    @property
    def num_channels(self) -> int:
        """Channels of :meth:`work`."""
        return 1 if self.compute is None else 3

    def work(self, layer: int, experts: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """``[item, channel, batch]`` float32 what copies add to their GPU.

        Parameters
        ----------
        layer
            The layer.
        experts
            ``[item]`` expert of each slot, -1 for an empty one.
        copies
            ``[expert]`` copies that share the rows of each.
        """
        rows = self.rows[layer][np.maximum(experts, 0)] / np.maximum(copies, 1)[np.maximum(experts, 0), None]
        rows = np.where(experts[:, None] < 0, 0.0, rows)
        if self.compute is None:
            return np.ascontiguousarray(rows[:, None, :], np.float32)
        one = self.compute
        if self.expected:
            memory, arithmetic = one.expected_copy_us(rows)
        else:
            memory = np.minimum(rows, 1.0) * one.weight_us
            arithmetic = np.ceil(rows / one.tile_rows) * (one.tile_rows * one.row_us)
        return np.ascontiguousarray(np.stack([memory, arithmetic, rows * self.port_us], axis=1), np.float32)

    def base(self, gpus: int) -> np.ndarray:
        """``[GPU, channel, batch]`` float32 what every GPU has without experts."""
        base = np.zeros((gpus, self.num_channels, self.rows.shape[2]), np.float32)
        if self.compute is not None:
            base[:, 0], base[:, 1] = self.shared
        return base


def _compute_of(problem: Problem) -> tuple[ExpertCompute, tuple[float, float]]:
    """Cost constants, and memory and arithmetic µs of a GPU's shared experts."""
    compute = ExpertCompute.of(problem.model, problem.topology.accelerator, problem.law.phase)
    tiles = np.ceil(problem.law.step_tokens / problem.num_gpus / compute.tile_rows) * compute.tile_rows
    return compute, (compute.shared_weight_us, tiles * compute.shared_row_us)


def port_us(problem: Problem) -> float:
    """µs that one row keeps the busiest port of its GPU busy, dispatch and combine, homes spread evenly."""
    topology, model, gpus = problem.topology, problem.model, problem.num_gpus
    both = float(model.bytes_per_copy_dispatch + model.bytes_per_copy_combine)
    copies = 1.0
    if problem.dataflow == CONTEXT_COHERENT:
        both, copies = float(model.bytes_per_copy_dispatch), float(model.top_k)
    elif KERNEL_OF_PHASE[problem.law.phase] == NORMAL:
        # a token sends one copy to each GPU that holds any of its k experts
        copies = gpus * (1 - (1 - 1 / gpus) ** model.top_k) / model.top_k
    away = 1 - 1 / gpus
    if topology.is_direct:
        per_gb = away / (max(1, num_links_per_gpu(topology.kind, topology.dims)) * topology.link_gb_per_s)
    elif topology.num_nodes == 1:
        per_gb = away / topology.local_gb_per_s
    else:
        inside = (topology.gpus_per_node - 1) / gpus / topology.local_gb_per_s
        per_gb = max((1 - 1 / topology.num_nodes) / topology.nic_gb_per_s, inside)
    return copies * both * 1e-3 * per_gb if gpus > 1 else 0.0


def layer_times(usage: np.ndarray) -> Floats:
    """``[batch]`` time of a layer from what its GPUs ``[GPU, channel, batch]`` have to do."""
    if usage.shape[1] == 1:
        return usage[:, 0].max(axis=0).astype(np.float64)
    times: Floats = (np.maximum(usage[:, 0], usage[:, 1]).max(axis=0) + usage[:, 2].max(axis=0)).astype(np.float64)
    return times
