"""Trace, placement and replica choice → who sends how many copies to whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.counting import count_visits
from moeplace.frozen import Ints
from moeplace.network import NORMAL, Traffic
from moeplace.topology import Topology


def dispatch_traffic(
    gpu: npt.NDArray[Any], home: Ints, group: tuple[Ints, int], topology: Topology, kernel: str
) -> Traffic:
    """Copies each home rank sends in one layer's dispatch.

    Parameters
    ----------
    gpu
        ``[token, k]`` GPU that serves each selection.
    home
        ``[token]`` rank whose attention holds the token.
    group
        ``[token]`` batch of each token, and the number of batches.
    topology
        Gives the nodes.
    kernel
        ``low-latency`` sends one copy per selection, ``normal`` one per distinct GPU and per distinct node.

    Returns
    -------
    Traffic
        ``copies`` [batch, GPU, GPU] and, for normal kernels, ``node_copies`` [batch, GPU, node], int64.
    """
    gpus, nodes = topology.num_gpus, topology.num_nodes
    source, shape = group[0] * gpus + home, (group[1], gpus, -1)
    sources, distinct = group[1] * gpus, kernel == NORMAL
    copies = count_visits(source, gpu, (sources, gpus), distinct=distinct).reshape(shape)
    if not distinct:
        return Traffic(copies=copies)
    node_copies = count_visits(source, gpu // topology.gpus_per_node, (sources, nodes), distinct=True)
    return Traffic(copies=copies, node_copies=node_copies.reshape(shape))


def chain_traffic(gpu: npt.NDArray[Any], following: npt.NDArray[Any], group: tuple[Ints, int], gpus: int) -> Traffic:
    """Copies between consecutive layers when a token moves from expert to expert: all ``k·k`` pairs of each token.

    ``gpu`` and ``following`` are ``[token, k]`` GPUs in layer ``l`` and ``l+1``.
    """
    copies = np.zeros(group[1] * gpus * gpus, np.int64)
    for i in range(gpu.shape[1]):
        source = (group[0] * gpus + gpu[:, i]) * gpus
        copies += np.bincount((source[:, None] + following).ravel(), minlength=copies.size)
    return Traffic(copies=copies.reshape(group[1], gpus, gpus))
