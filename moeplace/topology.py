"""Topologies: which GPUs there are, how they are joined, and how fast each pair can talk.

A topology is written ``KIND:DIMS`` (``scale-up:8``, ``scale-out:2x8``, ``torus:4x4x4``, ``full-mesh:4x4x4``,
``mesh:8x8``), as the name of a preset, or as a TOML file; ``torus:4x4x4:valiant`` also names how a direct network moves
an all-to-all. GPUs are numbered node by node (scale-out) or in row-major order of their coordinates (direct networks);
``coordinates`` says otherwise where the rank map is a choice.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import TopologyError, unknown_name
from moeplace.frozen import digest, frozen_array, replaced, seal
from moeplace.hardware import Accelerator, load_accelerator

SCALE_UP, SCALE_OUT, TORUS, FULL_MESH, MESH, CUSTOM = "scale-up", "scale-out", "torus", "full-mesh", "mesh", "custom"
DIRECT = (TORUS, FULL_MESH, MESH)
KINDS = (SCALE_UP, SCALE_OUT, TORUS, FULL_MESH, MESH, CUSTOM)
DIMENSIONS = {SCALE_UP: (1, 1), SCALE_OUT: (2, 2), TORUS: (1, 3), FULL_MESH: (1, 4), MESH: (2, 2), CUSTOM: (1, 2)}
EXAMPLES = "scale-up:8, scale-out:2x8, torus:4x4x4, full-mesh:4x4x4, mesh:8x8"
DEFAULT_ACCELERATOR = "h100"
SCHEDULED, ONE_SHOT, ADAPTIVE, VALIANT = "scheduled", "one-shot", "adaptive", "valiant"
ALL_TO_ALLS = (SCHEDULED, ONE_SHOT, ADAPTIVE, VALIANT)
USUAL_ALL_TO_ALL = {TORUS: SCHEDULED, FULL_MESH: SCHEDULED, MESH: ONE_SHOT}
SPEEDS = ("local_gb_per_s", "nic_gb_per_s", "link_gb_per_s")
LATENCIES = ("low_latency_us", "normal_latency_us", "hop_latency_us")
ARRAYS = {  # what a TOML file says in lists
    "pair_gb_per_s": "rows of numbers, one per GPU",
    "coordinates": "a list of integers",
    "gpu_speed": "a list of numbers, one per GPU",
}
NUMBERS = (*SPEEDS, *LATENCIES, "spine_oversubscription")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """GPUs and the network between them.

    Attributes
    ----------
    name, kind
        A label, and one of :data:`KINDS`.
    dims
        ``(gpus,)`` for scale-up, ``(nodes, gpus per node)`` for scale-out, lengths per dimension otherwise.
    accelerator
        What each GPU is.
    local_gb_per_s, nic_gb_per_s
        Usable bandwidth per GPU and direction inside the switched domain and through its NIC [1e9 bytes/s].
    link_gb_per_s
        Usable bandwidth of one link and direction of a direct network; 0 for switched ones.
    low_latency_us, normal_latency_us
        Fixed time of one all-to-all with low-latency and with normal (two-level) kernels.
    hop_latency_us
        Time of each link of the way on a direct network, beside the fixed time.
    all_to_all
        How a direct network moves an all-to-all, one of :data:`ALL_TO_ALLS` (see :mod:`moeplace.network.direct`); empty
        for switched ones.
    spine_oversubscription
        Scale-out only: what a leaf's NICs can send together over what its links to the spine carry; 1 never limits.
    nodes_per_leaf
        Scale-out only: nodes whose GPUs of one rail (the same number in their nodes) share a leaf switch; 0 is all of
        them. Traffic between two leaves passes the spine.
    gpu_speed
        ``[GPU]`` how fast each computes, as a multiple of ``accelerator``; None means all alike.
    pair_gb_per_s
        ``[GPU, GPU]`` bandwidths of a custom topology.
    coordinates
        ``[GPU]`` position of each rank in row-major order of ``dims``; None means rank = position.

    Raises
    ------
    TopologyError
        Unknown kind, wrong number of dimensions, a length or bandwidth that is not positive, a bad rank map.
    """

    name: str
    kind: str
    dims: tuple[int, ...]
    accelerator: Accelerator
    local_gb_per_s: float
    nic_gb_per_s: float
    link_gb_per_s: float = 0.0
    low_latency_us: float = 0.0
    normal_latency_us: float = 0.0
    hop_latency_us: float = 0.0
    all_to_all: str = ""
    spine_oversubscription: float = 1.0
    nodes_per_leaf: int = 0
    gpu_speed: npt.NDArray[np.float64] | None = None
    pair_gb_per_s: npt.NDArray[np.float64] | None = None
    coordinates: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        seal(self, dims=tuple(int(length) for length in self.dims))
        for name in NUMBERS:
            seal(self, **{name: float(getattr(self, name))})
        check_dims(self.kind, self.dims, where=self.name)
        speeds = (
            [self.link_gb_per_s]
            if self.is_direct
            else [self.local_gb_per_s, *([self.nic_gb_per_s] * (self.num_nodes > 1))]
        )
        if self.num_gpus > 1 and not all(math.isfinite(x) and x > 0 for x in speeds):
            raise TopologyError(f"bandwidth {min(speeds)} GB/s", rule="bandwidths are positive", where=self.name)
        for latency in (getattr(self, name) for name in LATENCIES):
            if not (math.isfinite(latency) and latency >= 0):
                raise TopologyError(f"latency {latency} µs", rule="latencies are at least 0 µs", where=self.name)
        self._check_all_to_all()
        self._check_spine()
        self._seal_speed()
        if self.kind == CUSTOM:
            self._seal_pairs()
        if self.coordinates is not None:
            seal(self, coordinates=frozen_array(self.coordinates, np.int64))
            if not np.array_equal(np.sort(self.coordinates), np.arange(self.num_gpus)):
                raise TopologyError("coordinates repeat or miss a position", rule="a permutation of the GPUs")

    def _check_all_to_all(self) -> None:
        chosen = self.all_to_all or USUAL_ALL_TO_ALL.get(self.kind, "")
        if self.is_direct and chosen not in ALL_TO_ALLS:
            raise unknown_name("all-to-all", chosen, ALL_TO_ALLS, where=self.name)
        if not self.is_direct and chosen:
            rule = f"only {', '.join(DIRECT)} have a choice of all-to-all"
            raise TopologyError(f"all_to_all {chosen!r} of a {self.kind} topology", rule=rule, where=self.name)
        seal(self, all_to_all=chosen)

    def _check_spine(self) -> None:
        spine, nodes = self.spine_oversubscription, self.nodes_per_leaf
        if not (math.isfinite(spine) and spine >= 1):
            raise TopologyError(f"spine_oversubscription {spine:g}", rule="at least 1", where=self.name)
        if nodes < 0 or (nodes and self.num_nodes % nodes):
            rule = f"a number that divides the {self.num_nodes} nodes, or 0 for all"
            raise TopologyError(f"nodes_per_leaf {nodes}", rule=rule, where=self.name)

    def _seal_speed(self) -> None:
        if self.gpu_speed is None:
            return
        speed = np.asarray(self.gpu_speed, np.float64)
        if speed.shape != (self.num_gpus,) or not (np.isfinite(speed) & (speed > 0)).all():
            rule = f"one positive number for each of the {self.num_gpus} GPUs"
            raise TopologyError(f"gpu_speed of shape {speed.shape}", rule=rule, where=self.name)
        seal(self, gpu_speed=frozen_array(speed, np.float64))

    def _seal_pairs(self) -> None:
        pairs = np.asarray(self.pair_gb_per_s, dtype=np.float64)
        if pairs.shape != (self.num_gpus, self.num_gpus):
            raise TopologyError(
                f"pair_gb_per_s of shape {pairs.shape}",
                rule=f"one value per GPU pair: {self.num_gpus}²",
                where=self.name,
            )
        apart = pairs[~np.eye(self.num_gpus, dtype=bool)]
        if not (np.isfinite(apart) & (apart > 0)).all():
            raise TopologyError("a pair bandwidth is not positive", rule="every pair is joined", where=self.name)
        seal(self, pair_gb_per_s=frozen_array(pairs, np.float64))

    @property
    def num_gpus(self) -> int:
        """Number of GPUs (ranks)."""
        return math.prod(self.dims)

    @property
    def is_direct(self) -> bool:
        """Whether GPUs are joined by links of their own, without switches."""
        return self.kind in DIRECT

    @property
    def num_nodes(self) -> int:
        """Number of nodes: switched domains joined by NICs; 1 unless scale-out (or custom with two dims)."""
        return self.dims[0] if self.kind == SCALE_OUT or (self.kind == CUSTOM and len(self.dims) == 2) else 1

    @property
    def gpus_per_node(self) -> int:
        """GPUs in each node."""
        return self.num_gpus // self.num_nodes

    def node_of_gpu(self) -> npt.NDArray[np.int64]:
        """``[GPU]`` index of the node each GPU sits in."""
        return np.arange(self.num_gpus) // self.gpus_per_node

    def leaf_of_gpu(self) -> npt.NDArray[np.int64]:
        """``[GPU]`` leaf switch of each GPU's NIC: one for each rail of :attr:`nodes_per_leaf` nodes."""
        node, rail = np.divmod(np.arange(self.num_gpus), self.gpus_per_node)
        return node // (self.nodes_per_leaf or self.num_nodes) * self.gpus_per_node + rail

    def pair_bandwidth_gb_per_s(self) -> npt.NDArray[np.float64]:
        """``[GPU, GPU]`` bandwidth one pair sees when it talks alone; infinite on the diagonal.

        On direct networks this is the link's bandwidth divided by the number of hops, the share left to a message
        that holds every link of its path. Between leaf switches it is a NIC's share of the spine.
        """
        gpus = self.num_gpus
        if self.is_direct:
            with np.errstate(divide="ignore"):
                return self.link_gb_per_s / self.hops().astype(np.float64)
        if self.pair_gb_per_s is not None:
            pairs = self.pair_gb_per_s.copy()
        else:
            node = self.node_of_gpu()
            leaf = self.leaf_of_gpu()
            away = self.nic_gb_per_s / np.where(leaf[:, None] == leaf[None, :], 1.0, self.spine_oversubscription)
            pairs = np.where(node[:, None] == node[None, :], self.local_gb_per_s, away)
        pairs[np.arange(gpus), np.arange(gpus)] = np.inf
        return pairs

    def hops(self) -> npt.NDArray[np.int64]:
        """``[GPU, GPU]`` number of links on a shortest path: 0 to itself; switches count as one link per level."""
        gpus = self.num_gpus
        if not self.is_direct:
            node = self.node_of_gpu()
            return np.where(node[:, None] == node[None, :], 1, 2) - np.eye(gpus, dtype=np.int64)
        position = np.arange(gpus) if self.coordinates is None else self.coordinates
        total = np.zeros((gpus, gpus), np.int64)
        for length, axis in zip(self.dims, np.unravel_index(position, self.dims), strict=True):
            apart = np.abs(axis[:, None] - axis[None, :])
            if self.kind == TORUS:
                apart = np.minimum(apart, length - apart)
            elif self.kind == FULL_MESH:
                apart = (apart > 0).astype(np.int64)
            total += apart
        return total

    def replace(self, **changes: object) -> Topology:
        """Copy with some fields changed."""
        return replaced(self, **changes)

    def digest(self) -> str:
        """Sha256 of everything but the label."""
        return digest(self.replace(name=""))


def check_dims(kind: str, dims: tuple[int, ...], *, where: str) -> None:
    """Raise :class:`TopologyError` unless ``dims`` are lengths that fit ``kind``."""
    if kind not in KINDS:
        raise unknown_name("topology kind", kind, KINDS, where=where)
    low, high = DIMENSIONS[kind]
    if not low <= len(dims) <= high:
        count = str(low) if low == high else f"{low} to {high}"
        hint = f"for example {EXAMPLES}"
        raise TopologyError(f"{len(dims)} dimensions", rule=f"{kind} has {count}", hint=hint, where=where)
    if any(length < 1 for length in dims):
        raise TopologyError(f"dimensions {'x'.join(map(str, dims))}", rule="every length is at least 1", where=where)


def num_links_per_gpu(kind: str, dims: tuple[int, ...]) -> int:
    """Links each GPU of a direct network drives.

    A torus or mesh dimension takes 2 (1 if its length is 2), a full-mesh dimension one per other GPU on its line. GPUs
    at the rim of a mesh have fewer neighbours but the same ports.
    """
    if kind == FULL_MESH:
        return sum(length - 1 for length in dims)
    return sum(min(2, length - 1) for length in dims)


def build_topology(
    kind: str, dims: tuple[int, ...], accelerator: Accelerator, *, name: str | None = None, **overrides: Any
) -> Topology:
    """Build a topology of one kind of accelerator, with usable (effective) bandwidths and latencies.

    Parameters
    ----------
    kind, dims
        See :class:`Topology`.
    accelerator
        Gives nominal bandwidths and the usable share of them.
    name
        A label; default ``KIND:DIMS``.
    **overrides
        Any field of :class:`Topology` to set instead, e.g. ``nic_gb_per_s=25``.
    """
    label = name or f"{kind}:{'x'.join(map(str, dims))}"
    check_dims(kind, dims, where=label)
    per_gpu = accelerator.scale_up_gb_per_s * accelerator.scale_up_efficiency
    across = kind == SCALE_OUT and dims[0] > 1
    values: dict[str, Any] = {
        "local_gb_per_s": per_gpu,
        "nic_gb_per_s": accelerator.nic_gb_per_s * accelerator.nic_efficiency,
        "low_latency_us": accelerator.nic_latency_us if across else accelerator.scale_up_latency_us,
        "normal_latency_us": accelerator.normal_latency_us,
    }
    if kind in DIRECT:
        values["hop_latency_us"] = accelerator.hop_latency_us
        values["link_gb_per_s"] = per_gpu / max(1, num_links_per_gpu(kind, dims))
    return Topology(name=label, kind=kind, dims=dims, accelerator=accelerator, **(values | overrides))


def load_topology(spec: str, *, accelerator: str | None = None) -> Topology:
    """Build the topology named by a preset, a TOML file or ``KIND:DIMS``.

    Parameters
    ----------
    spec
        ``scale-out:2x8``, a name of :func:`list_topologies`, or the path of a TOML file.
    accelerator
        Name or TOML file; default: what the preset or file says, else H100.

    Raises
    ------
    TopologyError, UnknownNameError
        ``spec`` is none of these, or its content is wrong.
    """
    if spec.endswith(".toml") or Path(spec).is_file():
        return _from_file(Path(spec), accelerator)
    if ":" in spec:
        kind, text, *more = spec.split(":", 2)
        topology = build_topology(kind, _parse_dims(text, spec), load_accelerator(accelerator or DEFAULT_ACCELERATOR))
        return topology.replace(name=f"{topology.name}:{more[0]}", all_to_all=more[0]) if more else topology
    names = list_topologies()
    if spec in KINDS:
        raise TopologyError(f"topology {spec!r} has no dimensions", rule="KIND:DIMS", hint=f"for example {EXAMPLES}")
    if spec not in names:
        raise unknown_name("topology", spec, [*names, *EXAMPLES.split(", ")])
    text = resources.files("moeplace").joinpath("topologies", f"{spec}.toml").read_text(encoding="utf-8")
    return _from_table(tomllib.loads(text), spec, spec, accelerator)


def list_topologies() -> tuple[str, ...]:
    """Names of the topology presets, sorted."""
    folder = resources.files("moeplace").joinpath("topologies")
    files = folder.iterdir() if folder.is_dir() else ()
    return tuple(sorted(item.name.removesuffix(".toml") for item in files if item.name.endswith(".toml")))


def _parse_dims(text: str, where: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise TopologyError(
            f"dimensions {text!r}", rule="whole numbers joined by x", hint=f"for example {EXAMPLES}", where=where
        ) from None


def _from_file(path: Path, accelerator: str | None) -> Topology:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"KIND:DIMS such as {EXAMPLES}, a preset, or a TOML file"
        raise TopologyError(f"cannot read the topology: {error.strerror}", hint=hint, where=str(path)) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TopologyError(f"not a TOML file: {error}", where=str(path)) from error
    return _from_table(table, path.stem, str(path), accelerator)


def _from_table(table: Mapping[str, Any], name: str, where: str, accelerator: str | None) -> Topology:
    fields = dict(table)
    known = {"name", "kind", "dims", "accelerator", "description", "all_to_all", "nodes_per_leaf", *ARRAYS, *NUMBERS}
    for key in fields:
        if key not in known:
            raise unknown_name("topology key", key, sorted(known), where=where)
    kind, dims = fields.pop("kind", None), fields.pop("dims", None)
    if not isinstance(kind, str) or not isinstance(dims, list) or not all(type(x) is int for x in dims):
        hint = 'for example kind = "scale-out" and dims = [2, 8]'
        raise TopologyError(
            "kind or dims is missing", rule="kind is a text, dims a list of integers", hint=hint, where=where
        )
    fields.pop("description", None)
    chosen = accelerator or fields.pop("accelerator", DEFAULT_ACCELERATOR)
    fields.pop("accelerator", None)
    for key in NUMBERS:
        if key not in fields:
            continue
        if isinstance(fields[key], dict):
            fields[key] = fields[key].get("value")
        if isinstance(fields[key], bool) or not isinstance(fields[key], int | float):
            raise TopologyError(f"{key} = {fields[key]!r}", rule="a number", where=where)
    for key, rule in ARRAYS.items():
        fields |= {key: _array(fields[key], key, rule, where)} if key in fields else {}
    for key, kind_of in (("all_to_all", str), ("nodes_per_leaf", int)):
        if key in fields and type(fields[key]) is not kind_of:
            raise TopologyError(
                f"{key} = {fields[key]!r}", rule="a text" if kind_of is str else "a whole number", where=where
            )
    label = str(fields.pop("name", name))
    return build_topology(kind, tuple(dims), load_accelerator(chosen), name=label, **fields)


def _array(value: object, key: str, rule: str, where: str) -> npt.NDArray[Any]:
    try:
        array = np.array(value)
    except ValueError:
        array = np.array(None)  # rows of different lengths
    if array.dtype.kind not in ("i" if key == "coordinates" else "if"):
        raise TopologyError(f"{key} is not {rule}", rule=rule, where=where)
    return array
