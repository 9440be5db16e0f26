"""All-to-all on switched networks: domains of GPUs behind switches, joined by NICs.

Each GPU has a port into its switched domain and, on scale-out, a NIC. A rail is the GPUs of one number in their nodes;
their NICs share leaf switches, and traffic between leaves passes the spine, which may carry less than the NICs send.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Floats
from moeplace.topology import CUSTOM, Topology

SPINE = "spine"


def link_times(topology: Topology, copies: npt.NDArray[Any], node_copies: npt.NDArray[Any] | None) -> dict[str, Floats]:
    """µs per byte of a copy that each link is busy with one direction of an all-to-all.

    Parameters
    ----------
    topology
        A scale-up, scale-out or custom topology.
    copies
        ``[..., GPU, GPU]`` from source to destination.
    node_copies
        ``[..., GPU, node]`` for kernels that send one copy per node, else None.

    Returns
    -------
    dict
        Kind of link → ``[..., GPU]``, for spine links ``[..., leaf]``.
    """
    apart = copies * ~np.eye(topology.num_gpus, dtype=bool)
    if topology.kind == CUSTOM:
        return _custom(topology, apart)
    if topology.num_nodes == 1:
        return _domain(topology, apart)
    if node_copies is None:
        return _one_level(topology, apart)
    return _two_level(topology, copies, node_copies)


def reversed_topology(topology: Topology) -> Topology:
    """Return the topology that traffic sees on its way back: the two directions of a pair may differ in speed."""
    if topology.pair_gb_per_s is None:
        return topology
    return topology.replace(pair_gb_per_s=topology.pair_gb_per_s.T)


def other_way(link: str) -> str:
    """Name of the opposite direction of a kind of link."""
    kind, direction = link.rsplit(" ", 1)
    return f"{kind} {'in' if direction == 'out' else 'out'}"


def _per_gb_per_s(gb_per_s: float) -> float:
    return 1e-3 / gb_per_s  # µs per byte at 1 GB/s = 1e9 bytes/s


def _custom(topology: Topology, copies: npt.NDArray[Any]) -> dict[str, Floats]:
    weighted = copies * (1e-3 / topology.pair_bandwidth_gb_per_s())
    return {"link out": weighted.sum(axis=-1), "link in": weighted.sum(axis=-2)}


def _domain(topology: Topology, copies: npt.NDArray[Any]) -> dict[str, Floats]:
    local = _per_gb_per_s(topology.local_gb_per_s)
    return {"scale-up out": copies.sum(axis=-1) * local, "scale-up in": copies.sum(axis=-2) * local}


def _one_level(topology: Topology, copies: npt.NDArray[Any]) -> dict[str, Floats]:
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
        **_cross_rail_spine(topology, copies - inside),
    }


def _two_level(topology: Topology, copies: npt.NDArray[Any], node_copies: npt.NDArray[Any]) -> dict[str, Floats]:
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
    if topology.spine_oversubscription > 1:
        group = np.arange(nodes) // (topology.nodes_per_leaf or nodes)
        crossing = away * (group[node][:, None] != group[None, :])
        entering = crossing.reshape(*lead, nodes, rails, nodes).sum(axis=-3)
        ports |= _spine(topology, crossing.sum(axis=-1), np.swapaxes(entering, -1, -2).reshape(*lead, nodes * rails))
    if rails > 1:
        by_rail = copies.reshape(*lead, nodes, rails, nodes, rails).sum(axis=(-4, -1))
        local = _per_gb_per_s(topology.local_gb_per_s)
        ports["scale-up out"] = np.swapaxes(by_rail, -1, -2).reshape(*lead, nodes * rails) * local
        ports["scale-up in"] = copies.sum(axis=-2) * local
    return ports


def _cross_rail_spine(topology: Topology, apart: npt.NDArray[Any]) -> dict[str, Floats]:
    """Busy time of the spine when copies ``[..., GPU, GPU]`` for other nodes go straight to their GPU, on any rail."""
    if topology.spine_oversubscription == 1:
        return {}
    leaf = topology.leaf_of_gpu()
    crossing = apart * (leaf[:, None] != leaf[None, :])
    return _spine(topology, crossing.sum(axis=-1), crossing.sum(axis=-2))


def _spine(topology: Topology, sent: Floats, received: Floats) -> dict[str, Floats]:
    """Busy time of the links between each leaf and the spine, from what its GPUs ``[..., GPU]`` send across."""
    leaf = topology.leaf_of_gpu()
    member = (leaf[:, None] == np.arange(leaf.max() + 1)) / np.bincount(leaf)
    uplink = _per_gb_per_s(topology.nic_gb_per_s) * topology.spine_oversubscription
    return {f"{SPINE} out": sent @ member * uplink, f"{SPINE} in": received @ member * uplink}
