"""Time of one direction of an all-to-all on a topology, with the load of every port and the named bottleneck.

Switched topologies: each GPU has a port into its switched domain and, on scale-out, a NIC; an exchange lasts a fixed
latency plus the busiest port's bytes over its bandwidth, both directions counted.

* ``low-latency`` kernels send one copy per selection straight to its GPU: over the NIC to other nodes, over the domain
  inside the node.
* ``normal`` kernels send one copy per destination node over the NIC to the GPU of the same rail, which forwards one
  copy per destination GPU inside its node. The stages are pipelined, so the time is the busiest port's, not a sum.

Combine is the transpose: the same ports with directions swapped, hence the same busiest port.
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
        destination GPU of a token (normal). The diagonal stays at home and costs nothing.
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


def exchange(topology: Topology, traffic: Traffic, *, kernel: str, bytes_per_copy: float) -> Exchange:
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

    Raises
    ------
    TopologyError
        The topology is a direct network, which has no cost model yet.
    """
    check_costed(topology)
    latency = topology.normal_latency_us if kernel == NORMAL else topology.low_latency_us
    off_diagonal = traffic.copies * ~np.eye(topology.num_gpus, dtype=bool)
    if topology.kind == CUSTOM:
        ports = _custom_ports(topology, off_diagonal)
    elif topology.num_nodes == 1:
        ports = _domain_ports(topology, off_diagonal)
    elif kernel == LOW_LATENCY:
        ports = _one_level_ports(topology, off_diagonal)
    else:
        ports = _two_level_ports(topology, off_diagonal, traffic.node_copies)
    ports = {name: copies * bytes_per_copy for name, copies in ports.items()}
    busiest = np.max(np.stack([value.max(axis=-1) for value in ports.values()]), axis=0)
    return Exchange(time_us=latency + busiest, port_us=ports, latency_us=latency)


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


def _custom_ports(topology: Topology, copies: npt.NDArray[Any]) -> dict[str, Floats]:
    weighted = copies * (1e-3 / topology.pair_bandwidth_gb_per_s())
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


def _two_level_ports(
    topology: Topology, copies: npt.NDArray[Any], node_copies: npt.NDArray[Any] | None
) -> dict[str, Floats]:
    if node_copies is None:
        raise TopologyError("no per-node copies", rule="normal kernels across nodes need them")
    nodes, rails = topology.num_nodes, topology.gpus_per_node
    node = topology.node_of_gpu()
    away = node_copies * (node[:, None] != np.arange(nodes)[None, :])
    lead = copies.shape[:-2]
    # a copy for another node travels to the GPU of the sender's rail there
    arriving = away.reshape(*lead, nodes, rails, nodes).sum(axis=-3)
    proxy_in = np.swapaxes(arriving, -1, -2).reshape(*lead, nodes * rails)
    by_rail = copies.reshape(*lead, nodes, rails, nodes, rails).sum(axis=-4)
    same_rail = np.einsum("...rnr->...nr", by_rail).reshape(*lead, nodes * rails)
    forwarded = np.swapaxes(by_rail.sum(axis=-1), -1, -2).reshape(*lead, nodes * rails) - same_rail
    received = copies.sum(axis=-2) - same_rail
    local, nic = _per_gb_per_s(topology.local_gb_per_s), _per_gb_per_s(topology.nic_gb_per_s)
    return {
        "NIC out": away.sum(axis=-1) * nic,
        "NIC in": proxy_in * nic,
        "scale-up out": forwarded * local,
        "scale-up in": received * local,
    }
