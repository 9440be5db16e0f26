"""Time of one direction of an all-to-all on a topology, with the load of every port and the named bottleneck.

Switched topologies: each GPU has a port into its switched domain and, on scale-out, a NIC; an exchange lasts a fixed
latency plus the busiest port's bytes over its bandwidth, both directions counted.

* ``low-latency`` kernels send one copy per selection straight to its GPU: over the NIC to other nodes, over the domain
  inside the node.
* ``normal`` kernels send one copy per destination node over the NIC to the GPU of the same rail, which forwards one
  copy per destination GPU inside its node. The stages are pipelined, so the time is the busiest port's, not a sum.
  Across nodes every copy passes the forwarding buffers of its node, those for the forwarding GPU itself too: the
  measured rates of such kernels count them.

Combine is the transpose: every copy returns over the ports it came by, so what went out comes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import TopologyError
from moeplace.frozen import Floats
from moeplace.topology import CUSTOM, FULL_MESH, MESH, TORUS, Topology

LOW_LATENCY, NORMAL = "low-latency", "normal"
KERNELS = (LOW_LATENCY, NORMAL)
KERNEL_OF_PHASE = {"decode": LOW_LATENCY, "prefill": NORMAL}


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
    port_us
        Per port kind, ``[..., GPU]`` time the port is busy.
    latency_us
        The fixed part.
    """

    time_us: Floats
    port_us: dict[str, Floats]
    latency_us: float

    def bottleneck(self) -> tuple[tuple[str, ...], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Names of the port kinds, and ``[...]`` which kind and which GPU is the busiest."""
        names = tuple(self.port_us)
        stacked = np.stack([self.port_us[name] for name in names], axis=-2)
        kinds, gpus = stacked.shape[-2:]
        flat = stacked.reshape(*stacked.shape[:-2], kinds * gpus).argmax(axis=-1)
        return names, flat // gpus, flat % gpus


def exchange(
    topology: Topology, traffic: Traffic, *, kernel: str, bytes_per_copy: float, returning: bool = False
) -> Exchange:
    """Time one direction of an all-to-all.

    Parameters
    ----------
    topology
        A scale-up, scale-out or custom topology.
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
        The topology is a direct network, which has no cost model yet.
    """
    check_costed(topology)
    latency = latency_us(topology, kernel)
    off_diagonal = traffic.copies * ~np.eye(topology.num_gpus, dtype=bool)
    if topology.kind == CUSTOM:
        ports = _custom_ports(topology, off_diagonal, returning)
    elif topology.num_nodes == 1:
        ports = _domain_ports(topology, off_diagonal)
    elif kernel == LOW_LATENCY:
        ports = _one_level_ports(topology, off_diagonal)
    else:
        ports = _two_level_ports(topology, traffic)
    if returning:
        ports = {name: ports[_other_way(name)] for name in ports}
    ports = {name: copies * bytes_per_copy for name, copies in ports.items()}
    busiest = np.max(np.stack([value.max(axis=-1) for value in ports.values()]), axis=0)
    return Exchange(time_us=latency + busiest, port_us=ports, latency_us=latency)


def latency_us(topology: Topology, kernel: str) -> float:
    """Fixed time of one direction of an all-to-all; 0 for one GPU, which exchanges nothing."""
    if topology.num_gpus == 1:
        return 0.0
    return topology.normal_latency_us if kernel == NORMAL else topology.low_latency_us


def check_costed(topology: Topology) -> None:
    """Raise :class:`TopologyError` where no cost model exists."""
    if topology.kind in (TORUS, FULL_MESH, MESH):
        raise TopologyError(
            f"{topology.name}: direct networks have no time model yet",
            rule="step time is costed on scale-up, scale-out and custom topologies",
            hint="--objective load, copies or cross work on any topology",
        )


def _per_gb_per_s(gb_per_s: float) -> float:
    return 1e-3 / gb_per_s  # µs per byte at 1 GB/s = 1e9 bytes/s


def _other_way(port: str) -> str:
    kind, direction = port.rsplit(" ", 1)
    return f"{kind} {'in' if direction == 'out' else 'out'}"


def _custom_ports(topology: Topology, copies: npt.NDArray[Any], returning: bool) -> dict[str, Floats]:
    pairs = topology.pair_bandwidth_gb_per_s()
    # the two directions of a pair may differ in speed
    weighted = copies * (1e-3 / (pairs.T if returning else pairs))
    return {"link out": weighted.sum(axis=-1), "link in": weighted.sum(axis=-2)}


def _domain_ports(topology: Topology, copies: npt.NDArray[Any]) -> dict[str, Floats]:
    local = _per_gb_per_s(topology.local_gb_per_s)
    return {"scale-up out": copies.sum(axis=-1) * local, "scale-up in": copies.sum(axis=-2) * local}


def _one_level_ports(topology: Topology, copies: npt.NDArray[Any]) -> dict[str, Floats]:
    node = topology.node_of_gpu()
    inside = copies * (node[:, None] == node[None, :])
    local, nic = _per_gb_per_s(topology.local_gb_per_s), _per_gb_per_s(topology.nic_gb_per_s)
    sent, received = copies.sum(axis=-1), copies.sum(axis=-2)
    sent_inside, received_inside = inside.sum(axis=-1), inside.sum(axis=-2)
    return {
        "NIC out": (sent - sent_inside) * nic,
        "NIC in": (received - received_inside) * nic,
        "scale-up out": sent_inside * local,
        "scale-up in": received_inside * local,
    }


def _two_level_ports(topology: Topology, traffic: Traffic) -> dict[str, Floats]:
    copies, node_copies = traffic.copies, traffic.node_copies
    if node_copies is None:
        raise TopologyError("no per-node copies", rule="normal kernels across nodes need them")
    nodes, rails = topology.num_nodes, topology.gpus_per_node
    node = topology.node_of_gpu()
    away = node_copies * (node[:, None] != np.arange(nodes)[None, :])
    lead = copies.shape[:-2]
    # a copy for another node travels to the GPU of the sender's rail there
    arriving = away.reshape(*lead, nodes, rails, nodes).sum(axis=-3)
    nic = _per_gb_per_s(topology.nic_gb_per_s)
    ports = {
        "NIC out": away.sum(axis=-1) * nic,
        "NIC in": np.swapaxes(arriving, -1, -2).reshape(*lead, nodes * rails) * nic,
    }
    if rails > 1:
        by_rail = copies.reshape(*lead, nodes, rails, nodes, rails).sum(axis=(-4, -1))
        local = _per_gb_per_s(topology.local_gb_per_s)
        ports["scale-up out"] = np.swapaxes(by_rail, -1, -2).reshape(*lead, nodes * rails) * local
        ports["scale-up in"] = copies.sum(axis=-2) * local
    return ports
