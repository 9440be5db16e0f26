"""Trace, placement and replica choice → who sends how many copies to whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Ints
from moeplace.network import NORMAL, Traffic
from moeplace.topology import Topology


def first_visits(places: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """``[token, k]`` True where a place (GPU or node) appears for the first time among a token's ``k``.

    Complexity: O(tokens · k²), vectorised.
    """
    first = np.ones(places.shape, bool)
    for j in range(1, places.shape[1]):
        for i in range(j):
            first[:, j] &= places[:, j] != places[:, i]
    return first


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
    source = group[0] * gpus + home
    if kernel != NORMAL:
        return Traffic(copies=_histogram(source, gpu, np.ones(gpu.shape, bool), (group[1], gpus, gpus)))
    node = gpu // topology.gpus_per_node
    return Traffic(
        copies=_histogram(source, gpu, first_visits(gpu), (group[1], gpus, gpus)),
        node_copies=_histogram(source, node, first_visits(node), (group[1], gpus, nodes)),
    )


def chain_traffic(gpu: npt.NDArray[Any], following: npt.NDArray[Any], group: tuple[Ints, int], gpus: int) -> Traffic:
    """Copies between consecutive layers when a token moves from expert to expert: all ``k·k`` pairs of each token.

    ``gpu`` and ``following`` are ``[token, k]`` GPUs in layer ``l`` and ``l+1``.
    """
    copies = np.zeros(group[1] * gpus * gpus, np.int64)
    for i in range(gpu.shape[1]):
        source = (group[0] * gpus + gpu[:, i]) * gpus
        copies += np.bincount((source[:, None] + following).ravel(), minlength=copies.size)
    return Traffic(copies=copies.reshape(group[1], gpus, gpus))


def _histogram(source: Ints, place: npt.NDArray[Any], keep: npt.NDArray[np.bool_], shape: tuple[int, ...]) -> Ints:
    flat = source[:, None] * shape[-1] + place
    return np.bincount(flat[keep], minlength=int(np.prod(shape))).reshape(shape)
