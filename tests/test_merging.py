"""Laws of :mod:`moeplace.merging`: the same result in any order and any grouping."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeplace.fingerprint import hashed
from moeplace.merging import RowSample, grown, summed

SHAPES = st.tuples(st.integers(0, 4), st.integers(0, 4))


@given(st.lists(SHAPES, min_size=1, max_size=5), st.integers(0, 99))
def test_sums_are_those_of_padded_tables(shapes: list[tuple[int, int]], seed: int) -> None:
    """Tables of different shapes add up, in any order, to the sum of all padded to the largest."""
    rng = np.random.default_rng(seed)
    tables = [rng.integers(0, 9, shape) for shape in shapes]
    whole = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    expected = sum(grown(table, whole) for table in tables)
    for order in (range(len(tables)), rng.permutation(len(tables))):
        total = np.zeros((0, 0), np.int64)
        for i in order:
            total = summed(total, tables[i].copy())
        assert np.array_equal(total, expected)


@given(st.integers(1, 30), st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 99))
def test_samples_merge_into_the_sample_of_all(size: int, parts: list[int], seed: int) -> None:
    """However rows are divided, merged and restored, the rows of lowest priority are kept with their columns."""
    value = np.arange(sum(parts))
    priority = hashed(value, seed)
    kept = set(value[np.argsort(priority)[:size]].tolist())
    edges = np.cumsum([0, *parts])
    samples = []
    for a, b in itertools.pairwise(edges):
        sample = RowSample(size)
        for cut in (slice(a, (a + b) // 2), slice((a + b) // 2, b)):
            sample.add(priority[cut], {"value": value[cut], "double": 2 * value[cut]})
        samples.append(RowSample.restored(size, sample.state()))
    total = RowSample(size)
    for i in np.random.default_rng(seed).permutation(len(samples)):
        total.merge(samples[i])
    columns = total.columns()
    assert set(columns["value"].tolist()) == kept
    assert np.array_equal(columns["double"], 2 * columns["value"])
    assert total.threshold >= priority[sorted(kept)].max(initial=0)


def test_a_column_that_some_rows_lack_is_left_out() -> None:
    """Columns stay only where every row has them; an empty sample has none."""
    sample = RowSample(3)
    assert sample.columns() == sample.state() == {}
    sample.add(np.array([1], np.uint64), {"a": np.array([5]), "b": np.array([6])})
    sample.add(np.array([2], np.uint64), {"a": np.array([7])})
    assert {name: column.tolist() for name, column in sample.columns().items()} == {"a": [5, 7]}
