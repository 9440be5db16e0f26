"""Deployments: one way to serve a model, as far as time and money depend on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moeplace.errors import ProblemError, unknown_name
from moeplace.frozen import digest, replaced
from moeplace.hardware import Accelerator
from moeplace.overlap import NONE, OVERLAPS
from moeplace.topology import FULL_MESH, MESH, SCALE_OUT, SCALE_UP, TORUS, Topology, build_topology

PLANNED_KINDS = (SCALE_UP, SCALE_OUT, TORUS, FULL_MESH, MESH)
ID_LENGTH = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One instance of a model on a cluster.

    Attributes
    ----------
    kind, dims
        Topology of the GPUs that hold experts; all GPUs unless ``attention_gpus`` are apart.
    accelerator
        Name of what they are.
    link_gb_per_s
        Nominal scale-up bandwidth of each [1e9 bytes/s].
    batch
        Requests that decode at the same time, for each GPU that does attention.
    redundant
        Extra expert slots per layer, in total.
    attention_tp
        GPUs that share the attention of one request.
    overlap
        One of :data:`moeplace.overlap.OVERLAPS`.
    attention_accelerator, attention_gpus
        Attention on GPUs of its own, and how many (disaggregated); empty and 0 where the same GPUs do both.
    micro_batches
        Of ping-pong.
    """

    kind: str
    dims: tuple[int, ...]
    accelerator: str
    link_gb_per_s: float
    batch: int
    redundant: int = 0
    attention_tp: int = 1
    overlap: str = NONE
    attention_accelerator: str = ""
    attention_gpus: int = 0
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if self.kind not in PLANNED_KINDS:
            raise unknown_name("topology kind", self.kind, PLANNED_KINDS)
        if self.overlap not in OVERLAPS:
            raise unknown_name("overlap", self.overlap, OVERLAPS)
        if min(self.batch, self.attention_tp, self.micro_batches) < 1 or self.redundant < 0:
            raise ProblemError(f"deployment {self.label}", rule="batch, attention TP and micro-batches are at least 1")
        if bool(self.attention_gpus) != bool(self.attention_accelerator):
            raise ProblemError(f"deployment {self.label}", rule="attention of its own needs GPUs and what they are")

    @property
    def expert_gpus(self) -> int:
        """GPUs that hold experts: the EP size."""
        return math.prod(self.dims)

    @property
    def num_gpus(self) -> int:
        """GPUs of the instance."""
        return self.expert_gpus + self.attention_gpus

    @property
    def step_requests(self) -> int:
        """Requests that one step decodes, over all GPUs (those of attention, where it has its own)."""
        return self.batch * (self.attention_gpus or self.expert_gpus)

    @property
    def topology_name(self) -> str:
        """``torus:4x4x4``."""
        return f"{self.kind}:{'x'.join(map(str, self.dims))}"

    @property
    def label(self) -> str:
        """All of it in a line."""
        parts = [self.topology_name, self.accelerator, f"{self.link_gb_per_s:g} GB/s", f"batch {self.batch}"]
        parts += [f"+{self.redundant}"] * bool(self.redundant) + [f"TP{self.attention_tp}"] * (self.attention_tp > 1)
        parts += [self.overlap] * (self.overlap != NONE)
        if self.attention_gpus:
            parts.append(f"attention on {self.attention_gpus} {self.attention_accelerator}, m={self.micro_batches}")
        return " ".join(parts)

    @property
    def id(self) -> str:
        """A short name that is the same in every run."""
        return digest(self)[:ID_LENGTH]

    def topology(self, accelerator: Accelerator) -> Topology:
        """Return the network of the expert GPUs; ``accelerator`` is the one named."""
        return build_topology(self.kind, self.dims, accelerator.replace(scale_up_gb_per_s=self.link_gb_per_s))

    def replace(self, **changes: object) -> Deployment:
        """Copy with some fields changed."""
        return replaced(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return its fields for a document."""
        return {"id": self.id} | {name: getattr(self, name) for name in self.__slots__} | {"dims": list(self.dims)}

    @classmethod
    def of_dict(cls, fields: dict[str, Any]) -> Deployment:
        """Read what :meth:`to_dict` returned."""
        own: dict[str, Any] = {name: value for name, value in fields.items() if name != "id"}
        own["dims"] = tuple(own["dims"])
        return cls(**own)


def cube(gpus: int, dimensions: int = 3) -> tuple[int, ...]:
    """Lengths of a grid as near to a cube as the factors of its size allow, longest first.

    Examples
    --------
    >>> cube(64), cube(32), cube(8), cube(16, 2)
    ((4, 4, 4), (4, 4, 2), (2, 2, 2), (4, 4))
    """
    lengths = [1] * dimensions
    for factor in reversed(_factors(gpus)):
        lengths[lengths.index(min(lengths))] *= factor
    return tuple(sorted(lengths, reverse=True))


def _factors(number: int) -> list[int]:
    found, factor = [], 2
    while factor * factor <= number:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return [*found, number] if number > 1 else found


def dims_for(kind: str, gpus: int, domain: int) -> tuple[int, ...] | None:
    """Dimensions of a topology of one kind with so many GPUs; None where the kind has none of that size.

    ``domain`` is the number of GPUs that a node of a scale-out network has.
    """
    if kind == SCALE_UP:
        return (gpus,)
    if kind == SCALE_OUT:
        return (gpus // domain, domain) if gpus > domain and gpus % domain == 0 else None
    return cube(gpus, 2 if kind == MESH else 3)
