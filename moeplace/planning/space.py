"""The deployments that a search goes through, in an order that depends on nothing but the choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, product

from moeplace.errors import InputError, unknown_name
from moeplace.hardware import Accelerator
from moeplace.model import ModelSpec
from moeplace.overlap import DUAL_BATCH, NONE, PING_PONG
from moeplace.planning.deployment import PLANNED_KINDS, Deployment, dims_for
from moeplace.planning.disaggregation import MICRO_BATCHES, Sides, nodes_to_try
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
        ``none``, ``dual-batch``, and ``ping-pong``: attention on GPUs of its own.
    attention_accelerators, micro_batches
        Of ping-pong: what attention may run on, and numbers of micro-batches.
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
    attention_accelerators: Mapping[str, Accelerator] = field(default_factory=dict)
    micro_batches: tuple[int, ...] = MICRO_BATCHES

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Kind, dimensions and GPUs of a node, of every topology in the space."""
        node = min((each.scale_up_domain for each in self.accelerators.values()), default=NODE_GPUS)
        for name in self.kinds:
            kind, _, text = name.partition(":")
            if kind not in PLANNED_KINDS:
                raise unknown_name("topology kind", kind, PLANNED_KINDS)
            if text:
                yield kind, lengths(text, name), node
                continue
            for gpus in self.ep_sizes:
                dims = dims_for(kind, gpus, min(node, NODE_GPUS))
                if dims is not None:
                    yield kind, dims, node


def lengths(text: str, name: str) -> tuple[int, ...]:
    """Read ``4x4x4``; ``name`` is what an error calls it."""
    try:
        return tuple(int(length) for length in text.split("x"))
    except ValueError:
        raise InputError(f"topology {name!r}", rule="KIND or KIND:DIMS", hint="for example torus:4x4x4") from None


def deployments(space: Space, model: ModelSpec, context: float = 1.0) -> list[Deployment]:
    """Every deployment of the space that the model can have: no more GPUs than slots, attention shared by whole groups.

    ``context`` is what a request looks at, by which attention gets its share of the GPUs where it has its own.

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
            [overlap for overlap in space.overlaps if overlap != PING_PONG],
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
    if PING_PONG in space.overlaps and model.attention is not None:
        found += _split(space, model, context)
    if not found:
        most = model.num_experts + max(space.redundant)
        raise InputError(
            f"no deployment: {model.name} has {model.num_experts} experts a layer",
            rule=f"at most one GPU for each of the {most} slots, and attention TP that divides them",
            hint="smaller --ep-sizes, or more --redundant",
        )
    return list(dict.fromkeys(found))


def _split(space: Space, model: ModelSpec, context: float) -> Iterator[Deployment]:
    """Attention apart from experts: every pair of accelerators, attention's GPUs by balanced routing."""
    attention = space.attention_accelerators or space.accelerators
    sizes = [gpus for gpus in space.ep_sizes if gpus <= model.num_experts]
    pairs = product(attention.values(), space.accelerators.values(), sizes, space.attention_tps)
    for (first, second, gpus, tp), batch, count, redundant in product(
        pairs, space.batches, space.micro_batches, space.redundant
    ):
        if batch * tp < count:
            continue
        sides = Sides(model=model, attention=first, experts=second, context=context, tp_attention=tp, expert_nodes=gpus)
        for nodes in nodes_to_try(sides, batch * tp / count, count):
            yield Deployment(
                kind=SCALE_OUT,
                dims=dims_for(SCALE_OUT, gpus, NODE_GPUS) or (1, gpus),
                accelerator=second.name,
                link_gb_per_s=second.scale_up_gb_per_s,
                batch=batch,
                redundant=redundant,
                attention_tp=tp,
                overlap=PING_PONG,
                attention_accelerator=first.name,
                attention_gpus=nodes * tp,
                micro_batches=count,
            )


def cells(found: Sequence[Deployment]) -> list[tuple[Deployment, ...]]:
    """Deployments grouped by what is timed together."""

    def key(own: Deployment) -> tuple[str, tuple[int, ...], int, int, int, int]:
        return own.kind, own.dims, own.batch, own.redundant, own.attention_gpus, own.micro_batches

    return [tuple(group) for _, group in groupby(sorted(found, key=key), key=key)]
