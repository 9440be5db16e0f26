"""Heat lines: a layer's load as one line of blocks, one for each expert, for any width."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplace.frozen import Ints

BLOCKS = "·▁▂▃▄▅▆▇█"  # level 0 was never chosen
UP_TO, FROM = (1 / 4, 1 / 2, 4 / 5), (5 / 4, 2, 3, 4)  # edges below and above the mean, in means; equal loads are ▄
MEANINGS = ("0", "≤ 1/4", "≤ 1/2", "≤ 4/5", "≈ 1", "≥ 5/4", "≥ 2", "≥ 3", "≥ 4")
STYLES = ("dim", "blue", "blue", "cyan", "", "yellow", "yellow", "red", "bold red")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """Levels of a table of loads.

    Attributes
    ----------
    level
        ``[layer, cell]`` index into :data:`BLOCKS`.
    experts_per_cell
        Consecutive experts whose mean a cell shows; the last cell may have fewer.
    """

    level: Ints
    experts_per_cell: int


def heat_of(load: Ints, room: int) -> Heat:
    """Turn loads into levels, as many experts to a cell as it takes to keep to the room.

    Parameters
    ----------
    load
        ``[layer, expert]`` selections; every layer has some.
    room
        Most cells of a line.

    Returns
    -------
    Heat
        A level grows with the load over the mean load of its layer. Complexity: O(layers·experts).
    """
    experts = load.shape[1]
    size = -(-experts // max(1, min(room, experts)))
    starts = np.arange(0, experts, size)
    held = np.add.reduceat(load, starts, axis=1)
    ratio = held * experts / (np.diff([*starts, experts]) * load.sum(axis=1, keepdims=True))
    level = 1 + sum((ratio > edge).astype(np.int64) for edge in UP_TO) + sum(ratio >= edge for edge in FROM)
    return Heat(level=np.where(held == 0, 0, level), experts_per_cell=size)
