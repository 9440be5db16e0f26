"""Laws of heat lines: a block tells the load over the mean, whatever the width and the length of the trace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.heat import BLOCKS, MEANINGS, STYLES, heat_of

loads = st.integers(1, 40).flatmap(
    lambda experts: st.lists(st.integers(0, 60), min_size=experts, max_size=experts).filter(any)
)


def blocks(load: list[int], room: int = 99) -> str:
    """Blocks of one layer."""
    return "".join(BLOCKS[level] for level in heat_of(np.array([load]), room).level[0])


@pytest.mark.parametrize(
    ("ratio", "block"),
    [
        (0, "·"),
        (0.01, "▁"),
        (0.25, "▁"),
        (0.26, "▂"),
        (0.5, "▂"),
        (0.51, "▃"),
        (0.8, "▃"),
        (0.81, "▄"),
        (1, "▄"),
        (1.24, "▄"),
        (1.25, "▅"),
        (1.99, "▅"),
        (2, "▆"),
        (3, "▇"),
        (3.99, "▇"),
        (4, "█"),
        (5, "█"),
    ],
)
def test_blocks_mean_what_the_legend_says(ratio: float, block: str) -> None:
    """An expert of so many times the mean load is shown by the block that the legend gives for it."""
    own = round(100 * ratio)
    rest = (1000 - own) // 9
    load = [own, *[rest] * 8]
    load.append(1000 - sum(load))
    assert blocks(load)[0] == block


def test_a_legend_entry_and_a_style_for_every_block() -> None:
    """Blocks, meanings and styles go together."""
    assert len(BLOCKS) == len(MEANINGS) == len(STYLES) == 9


@given(loads, st.integers(-3, 50), st.integers(1, 1000))
def test_lines_keep_to_the_room_and_cover_every_expert(load: list[int], room: int, times: int) -> None:
    """Never more cells than room (at least one), as few experts to a cell as that takes; longer traces look alike."""
    heat = heat_of(np.array([load]), room)
    cells, size = heat.level.shape[1], heat.experts_per_cell
    assert cells <= max(1, room)
    assert (cells - 1) * size < len(load) <= cells * size
    assert size == 1 or -(-len(load) // (size - 1)) > max(1, room)
    assert heat_of(np.array([load]) * times, room).level.tolist() == heat.level.tolist()


@given(loads, st.integers(1, 50))
def test_a_cell_is_the_mean_of_its_experts(load: list[int], room: int) -> None:
    """Experts that share a cell are shown by their mean: the last cell, of fewer experts, too."""
    heat = heat_of(np.array([load]), room)
    size = heat.experts_per_cell
    means = [np.mean(load[i : i + size]) for i in range(0, len(load), size)]
    order = np.argsort(means, kind="stable")
    assert (np.diff(heat.level[0][order]) >= 0).all()
    for mean, level in zip(means, heat.level[0], strict=True):
        assert (level == 0) == (mean == 0)
        if abs(mean / np.mean(load) - 1) < 0.19:
            assert BLOCKS[level] == "▄"


def test_equal_loads_are_level() -> None:
    """Where all experts take the same, all blocks are those of the mean; layers are shown by their own means."""
    assert blocks([7] * 12) == "▄" * 12
    assert heat_of(np.array([[5, 5], [900, 900]]), 9).level.tolist() == [[4, 4], [4, 4]]
