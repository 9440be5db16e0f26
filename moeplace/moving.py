"""How much may move from the placement now deployed, and what moving costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplace.errors import InputError
from moeplace.frozen import Ints, replaced
from moeplace.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveLimits:
    """Hard limits on the copies that GPUs load, and over how many steps a move has to repay itself.

    Attributes
    ----------
    max_copies, max_copies_per_gpu
        Copies to load in all, and by any one GPU, over all layers; None for no limit.
    horizon_steps
        Steps over which the time of moving is spread; None leaves it out.
    """

    max_copies: int | None = None
    max_copies_per_gpu: int | None = None
    horizon_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_copies", "max_copies_per_gpu"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name.replace('_', ' ')} {value}", rule="at least 0")
        if self.horizon_steps is not None and self.horizon_steps < 1:
            raise InputError(f"a horizon of {self.horizon_steps} steps", rule="at least 1")

    def __str__(self) -> str:
        each = "" if self.max_copies_per_gpu is None else f"at most {self.max_copies_per_gpu:,} copies load on a GPU"
        total = "" if self.max_copies is None else f"at most {self.max_copies:,} copies move"
        horizon = "" if self.horizon_steps is None else f"moving is spread over {self.horizon_steps:,} steps"
        return ", ".join(part for part in (total, each, horizon) if part)

    def allow(self, arriving: Ints) -> bool:
        """Whether ``[GPU]`` copies to load, over all layers, are within the limits."""
        total = self.max_copies is None or int(arriving.sum()) <= self.max_copies
        return total and (self.max_copies_per_gpu is None or int(arriving.max()) <= self.max_copies_per_gpu)

    def replace(self, **changes: object) -> MoveLimits:
        """Copy with some fields changed."""
        return replaced(self, **changes)


def arriving_copies(before: np.ndarray, after: np.ndarray) -> Ints:
    """``[GPU]`` copies that each GPU must load, from copies ``[layer, GPU, expert]`` held before and after."""
    loaded: Ints = np.maximum(after - before, 0).sum(axis=(0, 2))
    return loaded


def copy_us(topology: Topology, expert_bytes: float) -> float:
    """µs in which a GPU loads one expert's weights over its port: its NIC where there are several nodes."""
    if topology.is_direct:
        rate = topology.link_gb_per_s
    elif topology.pair_gb_per_s is not None:
        rate = float(topology.pair_gb_per_s[~np.eye(topology.num_gpus, dtype=bool)].min())
    else:
        rate = topology.nic_gb_per_s if topology.num_nodes > 1 else topology.local_gb_per_s
    return expert_bytes * 1e-3 / rate


def move_us(topology: Topology, expert_bytes: float, arriving: Ints) -> float:
    """µs until the GPU that loads most has all its copies; GPUs load at the same time."""
    return int(arriving.max(initial=0)) * copy_us(topology, expert_bytes)
