"""Time of one direction of an all-to-all on a topology, with the load of every link and the named bottleneck.

An exchange lasts a fixed latency plus the time of what is busiest. On switched topologies that is a port: of a GPU into
its switched domain, of its NIC, of a leaf switch into the spine. On direct networks it is a link between neighbours, or
with scheduled algorithms the rounds of links in step (:mod:`moeplace.network.direct`).

* ``low-latency`` kernels send one copy per selection straight to its GPU: over the NIC to other nodes, over the domain
  inside the node.
* ``normal`` kernels send one copy per destination node over the NIC to the GPU of the same rail, which forwards one
  copy per destination GPU inside its node. The stages are pipelined, so the time is the busiest port's, not a sum.
  Across nodes every copy passes the forwarding buffers of its node, those for the forwarding GPU itself too: the
  measured rates of such kernels count them. On direct networks they send one copy per destination GPU.

Combine is the transpose: every copy returns over the ports it came by, so what went out comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import TopologyError
from moeplace.frozen import Floats, Ints
from moeplace.network import direct, switched
from moeplace.topology import Topology

LOW_LATENCY, NORMAL = "low-latency", "normal"
KERNELS = (LOW_LATENCY, NORMAL)
KERNEL_OF_PHASE = {"decode": LOW_LATENCY, "prefill": NORMAL, "mixed": NORMAL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Who sends how many copies to whom in one direction.

    Attributes
    ----------
    copies
        ``[..., GPU, GPU]`` copies from source to destination: one per selection (low-latency) or one per distinct
        destination GPU of a token (normal). The diagonal stays at home and costs nothing, but for the forwarding
        buffers of normal kernels across nodes.
    node_copies
        ``[..., GPU, node]`` copies per distinct destination node of a token; needed by normal kernels across nodes.
    """

    copies: npt.NDArray[Any]
    node_copies: npt.NDArray[Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One direction of an all-to-all.

    Attributes
    ----------
    time_us
        ``[...]`` time, latency included.
    link_us
        Kind of link → ``[..., GPU]`` time that the GPU's link of that kind is busy; ``[..., leaf]`` for spine links.
    latency_us
        The fixed part.
    """

    time_us: Floats
    link_us: Mapping[str, Floats]
    latency_us: float

    def bottleneck(self) -> tuple[tuple[str, ...], Ints]:
        """Names of all links, and ``[...]`` the number of the busiest."""
        names = tuple(link_name(kind, i) for kind, busy in self.link_us.items() for i in range(busy.shape[-1]))
        if not names:
            return ("none",), np.zeros(self.time_us.shape, np.int64)
        return names, np.concatenate([*self.link_us.values()], axis=-1).argmax(axis=-1)


def link_name(kind: str, number: int) -> str:
    """What a link is called: its kind, and the GPU or leaf switch that it leaves."""
    return f"{kind} of {'leaf' if kind.startswith(switched.SPINE) else 'GPU'} {number}"


def exchange(
    topology: Topology, traffic: Traffic, *, kernel: str, bytes_per_copy: float, returning: bool = False
) -> Exchange:
    """Time one direction of an all-to-all.

    Parameters
    ----------
    topology
        GPUs and their network.
    traffic
        Copies between GPUs; any leading axes (batch, layer).
    kernel
        :data:`LOW_LATENCY` or :data:`NORMAL`.
    bytes_per_copy
        Bytes of one token's activation.
    returning
        Time the way back of this traffic (combine) instead of the way out (dispatch).

    Raises
    ------
    TopologyError
        Normal kernels across nodes without copies per node.
    """
    if topology.is_direct:
        return _direct(topology, traffic, kernel, bytes_per_copy, returning)
    nodes = traffic.node_copies if kernel == NORMAL else None
    if kernel == NORMAL and nodes is None and topology.num_nodes > 1 and topology.pair_gb_per_s is None:
        raise TopologyError("no per-node copies", rule="normal kernels across nodes need them")
    place = switched.reversed_topology(topology) if returning else topology
    links = switched.link_times(place, traffic.copies, nodes)
    if returning:
        links = {name: links[switched.other_way(name)] for name in links}
    links = {name: copies * bytes_per_copy for name, copies in links.items()}
    latency = latency_us(topology, kernel)
    busiest = np.max(np.stack([value.max(axis=-1) for value in links.values()]), axis=0)
    return Exchange(time_us=latency + busiest, link_us=links, latency_us=latency)


def _direct(topology: Topology, traffic: Traffic, kernel: str, bytes_per_copy: float, returning: bool) -> Exchange:
    moved = direct.move(topology, np.swapaxes(traffic.copies, -1, -2) if returning else traffic.copies)
    us_per_copy = bytes_per_copy * 1e-3 / topology.link_gb_per_s
    latency = latency_us(topology, kernel)
    if topology.num_gpus > 1:
        latency += moved.hops * topology.hop_latency_us
    links = {name: copies * us_per_copy for name, copies in moved.links.items()}
    return Exchange(time_us=latency + moved.busiest * us_per_copy, link_us=links, latency_us=latency)


def stages_us(
    topology: Topology, copies: npt.NDArray[Any], *, bytes_per_copy: float, returning: bool = False
) -> list[list[Floats]]:
    """What :func:`exchange` takes the largest of with low-latency kernels.

    Phases of chunks of ``[..., round, link]`` µs, all linear in ``copies`` [..., GPU, GPU]:
    ``time - latency = Σ_phase max_chunk Σ_round max_link``. An integer programme minimises that.
    """
    if topology.is_direct:
        us_per_copy = bytes_per_copy * 1e-3 / topology.link_gb_per_s
        phases = direct.stages(topology, np.swapaxes(copies, -1, -2) if returning else copies)
        return [[loads * us_per_copy for loads in chunks] for chunks in phases]
    busy = exchange(
        topology, Traffic(copies=copies), kernel=LOW_LATENCY, bytes_per_copy=bytes_per_copy, returning=returning
    )
    return [[np.concatenate([*busy.link_us.values()], axis=-1)[..., None, :]]]


def latency_us(topology: Topology, kernel: str) -> float:
    """Fixed time of one direction of an all-to-all, hops not counted; 0 for one GPU, which exchanges nothing."""
    if topology.num_gpus == 1:
        return 0.0
    return topology.normal_latency_us if kernel == NORMAL else topology.low_latency_us
