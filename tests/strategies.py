"""Seeded makers of traces, placements and problems, and the hypothesis strategies built on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from moeplace.affinity import count_routing
from moeplace.batches import BatchLaw
from moeplace.exporters.native import PlacementFile
from moeplace.model import ModelSpec
from moeplace.placement import EMPTY, Placement
from moeplace.problem import Problem, slots_for
from moeplace.topology import Topology, load_topology
from moeplace.trace import COLUMNS, Trace, TraceMeta


def make_trace(seed: int = 0, **shape: Any) -> Trace:
    """Return a seeded trace with skewed experts; ``shape``: tokens, layers, experts, top_k, requests, ranks."""
    tokens, layers = shape.get("tokens", 40), shape.get("layers", 2)
    experts, top_k = shape.get("experts", 6), shape.get("top_k", 2)
    rng = np.random.default_rng(seed)
    taste = rng.gumbel(size=(layers, experts))
    noise = rng.gumbel(size=(tokens, layers, experts))
    chosen = np.argsort(-(taste + noise), axis=2, kind="stable")[:, :, :top_k]
    request = np.sort(rng.integers(0, shape.get("requests", 5), tokens)) * 3 + 1
    _, first, inverse = np.unique(request, return_index=True, return_inverse=True)
    position = np.arange(tokens) - first[inverse]
    ranks = shape.get("ranks")
    return Trace(
        meta=TraceMeta(num_experts=experts, top_k=top_k, layer_ids=tuple(range(layers))),
        experts=chosen,
        request=request,
        position=position,
        phase=(position >= shape.get("prompt", 2)).astype(np.uint8),
        rank=None if ranks is None else rng.integers(0, ranks, tokens),
    )


def cut(trace: Trace, sizes: Sequence[int]) -> Blocks:
    """Return the trace as a stream of blocks of the given sizes, the last one taking what is left."""
    edges = [0, *(min(edge, trace.num_tokens) for edge in np.cumsum(sizes).tolist()), trace.num_tokens]
    rows = np.arange(trace.num_tokens)
    return Blocks(trace.meta, [trace.take(rows[a:b]) for a, b in itertools.pairwise(edges)])


def divided(trace: Trace, num_parts: int, seed: int) -> list[tuple[int, Trace]]:
    """Divide a trace by whole requests, in random order: each part knows only the experts that it has met.

    With each part comes the place of its first token in the trace, whose tokens are sorted by request.
    """
    rng = np.random.default_rng(seed)
    names = np.unique(trace.request)
    owner = np.sort(rng.integers(0, num_parts, len(names)))
    parts = []
    for part in rng.permutation(num_parts):
        rows = np.flatnonzero(np.isin(trace.request, names[owner == part]))
        if rows.size:
            own = trace.take(rows)
            experts = max(trace.meta.top_k, int(own.experts.max()) + 1)
            meta = trace.meta.replace(num_experts=experts)
            columns = {name: getattr(own, name) for name in COLUMNS}
            parts.append((int(rows[0]), Trace(meta=meta, **columns)))
    return parts


class Blocks:
    """A stream over traces in memory; blocks may be empty."""

    def __init__(self, meta: TraceMeta, parts: Sequence[Trace]) -> None:
        self.meta = meta
        self._parts = parts

    def blocks(self) -> Iterator[Trace]:
        """Yield the parts."""
        yield from self._parts


@st.composite
def traces(draw: st.DrawFn, *, ranks: bool = False, **fixed: int) -> Trace:
    """Traces of at most 30 tokens, 3 layers and 7 experts, every top-k from 1 to all experts."""
    experts = fixed.get("experts", draw(st.integers(1, 7)))
    return make_trace(
        draw(st.integers(0, 10**6)),
        tokens=fixed.get("tokens", draw(st.integers(1, 30))),
        layers=fixed.get("layers", draw(st.integers(1, 3))),
        experts=experts,
        top_k=fixed.get("top_k", draw(st.integers(1, experts))),
        requests=draw(st.integers(1, 6)),
        ranks=draw(st.integers(1, 4)) if ranks else None,
    )


def random_placement(seed: int, slots_per_gpu: npt.ArrayLike, layers: int, experts: int) -> Placement:
    """Return a valid placement without two copies of an expert on one GPU; spare slots are filled or left empty."""
    rng = np.random.default_rng(seed)
    room = np.asarray(slots_per_gpu)
    slots = np.full((layers, len(room), int(room.max())), EMPTY)
    for layer in range(layers):
        seats = rng.permutation(np.repeat(np.arange(len(room)), room))
        for number, gpu in enumerate(seats):
            absent = np.setdiff1d(np.arange(experts), slots[layer, gpu])
            spare = number >= experts and (absent.size == 0 or rng.random() < 0.3)
            if not spare:
                free = rng.choice(np.flatnonzero(slots[layer, gpu, : room[gpu]] == EMPTY))
                slots[layer, gpu, free] = number if number < experts else rng.choice(absent)
    return Placement(slots=slots, num_experts=experts)


@st.composite
def placements(draw: st.DrawFn, *, layers: int | None = None, experts: int | None = None) -> Placement:
    """Placements with copies, empty slots and GPUs of different sizes, some without any slot."""
    number = experts or draw(st.integers(1, 7))
    room = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    room[0] += max(0, number - sum(room))
    return random_placement(draw(st.integers(0, 10**6)), room, layers or draw(st.integers(1, 3)), number)


def dealt(model: ModelSpec, gpus: int, redundant: int, seed: int = 0) -> PlacementFile:
    """A random placement without empty slots and without two copies on a GPU."""
    rng = np.random.default_rng(seed)
    experts, width = model.num_experts, (model.num_experts + redundant) // gpus
    slots = np.zeros((model.num_moe_layers, gpus, width), np.int64)
    for layer in slots:
        # neighbours in this order are dealt to different GPUs, and copies stand beside each other
        order = np.sort(np.concatenate([np.arange(experts), rng.permutation(experts)[:redundant]]))
        layer[:] = rng.permutation(experts)[order].reshape(width, gpus).T
    placement = Placement(slots=slots, num_experts=experts)
    details = {"model": {"name": model.name, "num_experts": experts, "num_moe_layers": model.num_moe_layers}}
    return PlacementFile(placement=placement, layer_ids=model.moe_layer_ids, details=details)


def small_model(layers: int = 2, experts: int = 6, top_k: int = 2, **changes: Any) -> ModelSpec:
    """Return a narrow model whose weights and activations cost comparable times on small steps."""
    fields: dict[str, Any] = {
        "name": "toy",
        "num_layers": layers,
        "moe_layer_ids": tuple(range(layers)),
        "num_experts": experts,
        "top_k": top_k,
        "hidden": 1024,
        "expert_inner": 512,
        "num_shared": 1,
        "shared_inner": 256,
        "weight_bytes": 1.0,
        "dispatch_bytes": 1,
    }
    return ModelSpec(**(fields | changes))


def make_problem(trace: Trace, topology: str | Topology, **options: Any) -> Problem:
    """Return a problem on a trace; ``options``: fields of Problem, and ``redundant``, ``phase``, ``requests``."""
    place = load_topology(topology) if isinstance(topology, str) else topology
    meta = trace.meta
    redundant, phase = options.pop("redundant", 0), options.pop("phase", "decode")
    law = BatchLaw(phase=phase, requests=options.pop("requests", 64))
    slots = options.pop("slots_per_gpu", slots_for(meta.num_experts, place.num_gpus, redundant=redundant))
    model = options.pop("model", small_model(meta.num_layers, meta.num_experts, meta.top_k))
    return Problem(stats=count_routing(trace), model=model, topology=place, slots_per_gpu=slots, law=law, **options)


def slow_topology(spec: str, **changes: Any) -> Topology:
    """Return a topology on which small messages take a visible time and nothing else does."""
    values = {"local_gb_per_s": 4.0, "nic_gb_per_s": 1.0, "low_latency_us": 2.0, "normal_latency_us": 3.0}
    return load_topology(spec).replace(**(values | changes))


def every_placement(problem: Problem) -> Iterator[Placement]:
    """Enumerate the placements of a problem up to the order of slots: every set of distinct experts on every GPU."""
    experts, width = problem.num_experts, problem.max_slots
    holdings = [
        [held for size in range(int(room) + 1) for held in itertools.combinations(range(experts), size)]
        for room in problem.slots_per_gpu
    ]
    layers = [
        [gpu + (EMPTY,) * (width - len(gpu)) for gpu in layer]
        for layer in itertools.product(*holdings)
        if len({expert for gpu in layer for expert in gpu}) == experts
    ]
    for chosen in itertools.product(layers, repeat=problem.num_layers):
        yield Placement(slots=np.array(chosen), num_experts=experts)


def relabel_experts(trace: Trace, order: npt.NDArray[Any]) -> Trace:
    """Rename expert ``e`` of every layer to ``order[e]``."""
    return trace.replace(experts=order[trace.experts])


def relabel_placement(placement: Placement, order: npt.NDArray[Any]) -> Placement:
    """Rename expert ``e`` of every layer to ``order[e]``, every copy staying in its slot."""
    return placement.replace(slots=np.where(placement.slots == EMPTY, EMPTY, order[placement.slots]))
