"""The deployments that a search goes through, in an order that depends on nothing but the choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product

from moeplace.errors import InputError, unknown_name
from moeplace.hardware import Accelerator
from moeplace.model import ModelSpec
from moeplace.overlap import DUAL_BATCH, NONE
from moeplace.planning.deployment import PLANNED_KINDS, Deployment, dims_for
from moeplace.planning.evaluate import Cell
from moeplace.topology import FULL_MESH, SCALE_OUT, SCALE_UP, TORUS

DEFAULT_KINDS = (SCALE_UP, SCALE_OUT, TORUS, FULL_MESH)
DEFAULT_ACCELERATORS = ("h100", "h200", "b200")
DEFAULT_EP_SIZES = (8, 16, 32, 64, 128, 256)
DEFAULT_BATCHES = (16, 32, 64, 128, 256)
NODE_GPUS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What is combined with what.

    Attributes
    ----------
    kinds
        Topology kinds, or whole topologies (``torus:4x4x4``), whose size is then the EP size.
    accelerators
        Name → accelerator.
    ep_sizes, batches
        GPUs that hold the experts of a layer; requests for each GPU.
    redundant
        Extra slots per layer in total.
    attention_tps
        GPUs that share the attention of a request.
    overlaps
        ``none`` and ``dual-batch``.
    link_scales
        Multiples of each accelerator's scale-up bandwidth.
    """

    kinds: tuple[str, ...] = DEFAULT_KINDS
    accelerators: Mapping[str, Accelerator]
    ep_sizes: tuple[int, ...] = DEFAULT_EP_SIZES
    batches: tuple[int, ...] = DEFAULT_BATCHES
    redundant: tuple[int, ...] = (0,)
    attention_tps: tuple[int, ...] = (1,)
    overlaps: tuple[str, ...] = (NONE, DUAL_BATCH)
    link_scales: tuple[float, ...] = (1.0,)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Kind, dimensions and GPUs of a node, of every topology in the space."""
        node = min((each.scale_up_domain for each in self.accelerators.values()), default=NODE_GPUS)
        for name in self.kinds:
            kind, _, text = name.partition(":")
            if kind not in PLANNED_KINDS:
                raise unknown_name("topology kind", kind, PLANNED_KINDS)
            if text:
                yield kind, _lengths(text, name), node
                continue
            for gpus in self.ep_sizes:
                dims = dims_for(kind, gpus, min(node, NODE_GPUS))
                if dims is not None:
                    yield kind, dims, node


def _lengths(text: str, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in text.split("x"))
    except ValueError:
        raise InputError(f"topology {name!r}", rule="KIND or KIND:DIMS", hint="for example torus:4x4x4") from None


def deployments(space: Space, model: ModelSpec) -> list[Deployment]:
    """Every deployment of the space that the model can have: no more GPUs than slots, attention shared by whole groups.

    Raises
    ------
    InputError
        There is none.
    """
    found = []
    for kind, dims, _ in space.shapes():
        for redundant, batch, tp, (name, accelerator), scale, overlap in product(
            space.redundant,
            space.batches,
            space.attention_tps,
            space.accelerators.items(),
            space.link_scales,
            space.overlaps,
        ):
            own = Deployment(
                kind=kind,
                dims=dims,
                accelerator=name,
                link_gb_per_s=accelerator.scale_up_gb_per_s * scale,
                batch=batch,
                redundant=redundant,
                attention_tp=tp,
                overlap=overlap,
            )
            enough = own.expert_gpus <= model.num_experts + redundant and own.expert_gpus % tp == 0
            if enough and (overlap == NONE or (batch > 1 and own.expert_gpus > 1)):
                found.append(own)
    if not found:
        most = model.num_experts + max(space.redundant)
        raise InputError(
            f"no deployment: {model.name} has {model.num_experts} experts a layer",
            rule=f"at most one GPU for each of the {most} slots, and attention TP that divides them",
            hint="smaller --ep-sizes, or more --redundant",
        )
    return list(dict.fromkeys(found))


def cells(found: Sequence[Deployment]) -> list[Cell]:
    """Deployments grouped by what is timed together."""

    def key(own: Deployment) -> tuple[str, tuple[int, ...], int, int]:
        return own.kind, own.dims, own.batch, own.redundant

    return [
        Cell(kind=shape[0], dims=shape[1], batch=shape[2], redundant=shape[3], deployments=tuple(group))
        for shape, group in groupby(sorted(found, key=key), key=key)
    ]
