"""A problem: what was routed, on what hardware, with how many slots, and what is to be minimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.affinity import RoutingStats
from moeplace.batches import BatchLaw, Steps
from moeplace.errors import ProblemError
from moeplace.frozen import digest, frozen_array, replaced, seal
from moeplace.model import ModelSpec
from moeplace.moving import MoveLimits
from moeplace.placement import Placement, spread_slots
from moeplace.routing import EVEN, POLICIES
from moeplace.tails import MEAN, RISKS
from moeplace.topology import Topology
from moeplace.trace import Counts

DISPATCH_COMBINE, CONTEXT_COHERENT = "dispatch-combine", "context-coherent"
DATAFLOWS = (DISPATCH_COMBINE, CONTEXT_COHERENT)
STEP_TIME, LOAD, COPIES, CROSS, REMOTE = "step-time", "load", "copies", "cross", "remote"
OBJECTIVES = (STEP_TIME, LOAD, COPIES, CROSS, REMOTE)
GPU, NODE = "gpu", "node"
COPIES_LEVELS = (GPU, NODE)
DEFAULT_LAW = BatchLaw(phase="decode", requests=256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Everything a solver needs, checked once.

    Attributes
    ----------
    stats, model, topology
        What was routed; the model's widths; the GPUs and their network.
    slots_per_gpu
        ``[GPU]`` slots each GPU has in every layer. See :func:`slots_for`.
    law
        The step whose time is predicted (its phase, requests and tokens).
    dataflow
        ``dispatch-combine`` (tokens return home after every layer) or ``context-coherent`` (they stay with experts).
    objective
        ``step-time`` [µs], ``load`` [max/mean], ``copies`` [copies per token], ``cross`` [share of pairs] or ``remote``
        [copies per token that are sent to other nodes].
    copies_level
        ``gpu`` or ``node``: what ``copies`` and ``cross`` count.
    load_cap
        ``[layer]`` hard cap on max/mean GPU load, or None.
    copies_cap
        Hard cap on the GPUs that a token visits, mean over layers and sampled tokens, or None; with objective ``load``.
    whole_model
        Slots are counted over all layers together, as MoETuner's memory constraint does, not in each layer.
    steps, risk
        Steps drawn from the fit part, or recorded counts; ``load`` and ``step-time`` are then the risk (one of
        :data:`~moeplace.tails.RISKS`) of their values. Without steps they are those of the mean step.
    routing
        Which copy of an expert serves a token, one of :data:`~moeplace.routing.POLICIES`; the objective is under it.
    start, baseline
        A placement to start from, and the one now deployed; both optional.
    moves
        Limits on moves from the baseline; optional.

    Raises
    ------
    ProblemError
        Shapes disagree, there are too few slots, weights exceed the memory, or the trace cannot support the objective.
    """

    stats: RoutingStats
    model: ModelSpec
    topology: Topology
    slots_per_gpu: npt.NDArray[np.int64]
    law: BatchLaw = DEFAULT_LAW
    dataflow: str = DISPATCH_COMBINE
    objective: str = STEP_TIME
    copies_level: str = GPU
    load_cap: npt.NDArray[np.float64] | None = None
    copies_cap: float | None = None
    whole_model: bool = False
    steps: Steps | Counts | None = None
    risk: str = MEAN
    routing: str = EVEN
    start: Placement | None = None
    baseline: Placement | None = None
    moves: MoveLimits | None = None

    def __post_init__(self) -> None:
        seal(self, slots_per_gpu=frozen_array(np.atleast_1d(self.slots_per_gpu), np.int64))
        self._check_names()
        self._check_shapes()
        self._check_memory()
        if self.load_cap is not None:
            cap = np.broadcast_to(np.asarray(self.load_cap, np.float64), (self.num_layers,))
            if not (np.isfinite(cap) & (cap >= 1)).all():
                raise ProblemError(f"load cap {cap.min():g}", rule="a cap on max/mean load is at least 1")
            seal(self, load_cap=frozen_array(cap, np.float64))
        self._check_copies_cap()
        self._check_moves()

    def _check_copies_cap(self) -> None:
        if self.copies_cap is None:
            return
        if not (np.isfinite(self.copies_cap) and self.copies_cap >= 1):
            raise ProblemError(f"copies cap {self.copies_cap:g}", rule="a cap on copies per token is at least 1")
        if self.objective != LOAD or self.whole_model:
            what = "slots counted over the whole model" if self.whole_model else f"objective {self.objective}"
            raise ProblemError(
                f"a copies cap with {what}", rule="it is for the objective load", hint="--objective load"
            )
        if self.stats.sample is None:
            raise ProblemError(
                "a copies cap on a trace that holds only counts",
                rule="copies need to know which experts a token chose together",
                hint="record a per-token trace",
            )

    def _check_moves(self) -> None:
        if self.moves is None:
            return
        if self.baseline is None:
            raise ProblemError(
                "limits on moves without a baseline", rule="moves are counted from the placement deployed"
            )
        if self.moves.horizon_steps is not None and self.objective != STEP_TIME:
            raise ProblemError(
                f"a horizon with objective {self.objective}", rule="the time of moving is weighed against step time"
            )

    def _check_names(self) -> None:
        for value, known, what in (
            (self.dataflow, DATAFLOWS, "dataflow"),
            (self.objective, OBJECTIVES, "objective"),
            (self.copies_level, COPIES_LEVELS, "copies level"),
            (self.risk, RISKS, "risk"),
            (self.routing, POLICIES, "routing"),
        ):
            if value not in known:
                raise ProblemError(f"{what} {value!r}", rule=f"one of {', '.join(known)}")
        if self.risk != MEAN and (self.steps is None or self.objective not in (STEP_TIME, LOAD)):
            what = "without steps" if self.steps is None else f"of {self.objective}"
            raise ProblemError(f"risk {self.risk} {what}", rule="step time and load of sampled steps have a tail")
        needs_tokens = self.objective in (COPIES, CROSS, REMOTE) or (
            self.objective == STEP_TIME and self.dataflow == CONTEXT_COHERENT
        )
        if needs_tokens and not self.stats.has_tokens:
            raise ProblemError(
                f"objective {self.objective} with {self.dataflow} on a trace that holds only counts",
                rule="copies and crossings need to know which experts a token chose together",
                hint="--objective load, or record a per-token trace",
            )

    def _check_shapes(self) -> None:
        meta, gpus = self.stats.meta, self.topology.num_gpus
        if self.model.num_experts != meta.num_experts or self.model.num_moe_layers < meta.num_layers:
            raise ProblemError(
                f"the trace has {meta.num_layers} layers of {meta.num_experts} experts; {self.model.name} has "
                f"{self.model.num_moe_layers} of {self.model.num_experts}",
                rule="trace and model agree",
                hint="is --model the one the trace was recorded on?",
            )
        if self.stats.has_tokens and self.model.top_k != meta.top_k:
            raise ProblemError(
                f"the trace has {meta.top_k} experts a token; {self.model.name} has {self.model.top_k}",
                rule="trace and model agree",
                hint="is --model the one the trace was recorded on?",
            )
        if self.slots_per_gpu.shape != (gpus,) or (self.slots_per_gpu < 0).any():
            raise ProblemError(
                f"slots for {self.slots_per_gpu.size} GPUs", rule=f"the topology has {gpus}, none with negative slots"
            )
        if self.num_slots < self.num_experts:
            raise ProblemError(
                f"{self.num_slots} slots per layer for {self.num_experts} experts",
                rule="every expert needs a slot",
                hint=f"--slots-per-gpu {-(-self.num_experts // gpus)} or more, or more GPUs",
            )
        for name in ("start", "baseline"):
            placement = getattr(self, name)
            shape = (self.num_layers, gpus, self.num_experts)
            if placement is not None and (placement.num_layers, placement.num_gpus, placement.num_experts) != shape:
                raise ProblemError(
                    f"the {name} placement has {placement.num_layers} layers, {placement.num_gpus} GPUs, "
                    f"{placement.num_experts} experts",
                    rule=f"the problem has {shape[0]}, {shape[1]}, {shape[2]}",
                )

    def _check_memory(self) -> None:
        needed = int(self.slots_per_gpu.max()) * self.num_layers * self.model.expert_weight_bytes
        room = self.topology.accelerator.hbm_gb * 1e9
        if needed > room:
            raise ProblemError(
                f"{self.slots_per_gpu.max()} slots in {self.num_layers} layers weigh {needed / 1e9:.1f} GB per GPU",
                rule=f"{self.topology.accelerator.name} has {room / 1e9:g} GB",
                hint="fewer slots per GPU, more GPUs, or another --accelerator",
            )

    @property
    def is_sampled(self) -> bool:
        """Whether the objective is the risk over steps."""
        return self.steps is not None and self.objective in (STEP_TIME, LOAD)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.stats.meta.num_layers

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return self.stats.meta.num_experts

    @property
    def num_gpus(self) -> int:
        """GPUs."""
        return self.topology.num_gpus

    @property
    def num_slots(self) -> int:
        """Slots per layer over all GPUs."""
        return int(self.slots_per_gpu.sum())

    @property
    def shares_evenly(self) -> bool:
        """Whether copies of an expert share its tokens evenly, or no slot is spare for a second copy."""
        return self.routing == EVEN or (self.num_slots == self.num_experts and not self.whole_model)

    @property
    def divides_evenly(self) -> bool:
        """Whether every slot of a layer is full and all GPUs have equally many."""
        return self.num_slots == self.num_experts and bool((self.slots_per_gpu == self.max_slots).all())

    @property
    def levelled(self) -> tuple[int, int]:
        """GPUs and most slots of one, or nodes and most slots of one, as :attr:`copies_level` says."""
        if self.copies_level == GPU:
            return self.num_gpus, self.max_slots
        nodes = self.topology.num_nodes
        return nodes, int(self.slots_per_gpu.reshape(nodes, -1).sum(axis=1).max())

    @property
    def max_slots(self) -> int:
        """Slots of the GPU that has the most."""
        return int(self.slots_per_gpu.max())

    def replace(self, **changes: object) -> Problem:
        """Copy with some fields changed; the constructor checks the result again."""
        return replaced(self, **changes)

    def digest(self) -> str:
        """Sha256 of the whole problem."""
        return digest(self)


def slots_for(
    num_experts: int, num_gpus: int, *, redundant: int | None = None, per_gpu: int | None = None
) -> npt.NDArray[Any]:
    """``[GPU]`` slots per layer from a number of redundant experts in total, or of slots per GPU.

    Slots that do not divide evenly are dealt as evenly as possible: 256 experts and 32 redundant ones on 64 GPUs give 5
    slots to every other GPU and 4 to the rest. With neither number given there are as many slots as experts.

    Raises
    ------
    ProblemError
        Both are given and disagree, or the slots do not hold every expert.
    """
    if redundant is not None and redundant < 0:
        raise ProblemError(f"{redundant} redundant experts", rule="at least 0")
    if per_gpu is not None:
        total = per_gpu * num_gpus
        if redundant is not None and total != num_experts + redundant:
            raise ProblemError(
                f"{per_gpu} slots on each of {num_gpus} GPUs are {total} slots",
                rule=f"{num_experts} experts and {redundant} redundant ones need {num_experts + redundant}",
                hint="give one of --slots-per-gpu and --num-redundant-experts",
            )
        if total < num_experts:
            raise ProblemError(
                f"{per_gpu} slots on each of {num_gpus} GPUs are {total} slots for {num_experts} experts",
                rule="every expert needs a slot",
                hint=f"--slots-per-gpu {-(-num_experts // num_gpus)} or more, or more GPUs",
            )
        return np.full(num_gpus, per_gpu, np.int64)
    return spread_slots(num_experts + (redundant or 0), num_gpus)
