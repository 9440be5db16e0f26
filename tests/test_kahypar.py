"""The hypergraph partitioner as a peer, and the repairs of its answers."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_problem, make_trace, slow_topology

from moeplace.errors import MissingExtraError, ProblemError
from moeplace.hypergraph import Patterns
from moeplace.solution import Limits
from moeplace.solvers import kahypar, solve


def patterns_of(seed: int, experts: int = 8) -> Patterns:
    """Return patterns of 60 tokens that choose 3 experts."""
    return Patterns.of(make_trace(seed, tokens=60, experts=experts, top_k=3).experts[:, 0], experts)


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_swap_adds_what_is_counted(seed: int) -> None:
    """The table of swaps is the difference of the definition."""
    patterns, rng = patterns_of(seed), np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(4), 2))
    first, second = np.flatnonzero(group == 0), np.flatnonzero(group == 1)
    added = kahypar._Tables(patterns, group, 4).swapped(first, second, 0, 1)
    for (i, e), (j, f) in itertools.product(enumerate(first), enumerate(second)):
        other = group.copy()
        other[[e, f]] = group[[f, e]]
        assert added[i, j] == pytest.approx(patterns.copies(other, 4) - patterns.copies(group, 4))


@given(st.integers(0, 10**6), st.floats(1.0, 1.5))
@settings(max_examples=25, deadline=None)
def test_repairs_keep_sizes_and_never_raise_the_busiest(seed: int, cap: float) -> None:
    """Any blocks become blocks of the sizes asked for; swaps keep these, and end below the cap or at no worse load."""
    patterns, rng, rooms = patterns_of(seed), np.random.default_rng(seed), np.array([3, 2, 3])
    load = patterns.load.astype(float)
    group = kahypar.seated(patterns, rng.integers(0, 3, 8), rooms)
    assert np.bincount(group, minlength=3).tolist() == rooms.tolist()
    swapped = kahypar.within_cap(patterns, group, load, cap * load.sum() / 3, 3)
    assert np.bincount(swapped, minlength=3).tolist() == rooms.tolist()
    assert np.bincount(swapped, load).max() <= np.bincount(group, load).max()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the command that installs it."""
    monkeypatch.setitem(sys.modules, "mtkahypar", None)
    with pytest.raises(MissingExtraError) as told:
        kahypar._partitioner.__wrapped__()
    assert "moeplace[partition]" in str(told.value.hint)
    problem = make_problem(make_trace(0), "scale-up:2", objective="load")
    with pytest.raises(ProblemError, match="objective load"):
        solve(problem, "kahypar")


@pytest.mark.parametrize("level", ["gpu", "node"])
def test_it_answers_where_installed(level: str) -> None:
    """Exact sizes, the same bytes for a seed, and no value below what setpart proves."""
    pytest.importorskip("mtkahypar", reason="the extra partition is not installed")
    trace = make_trace(1, tokens=400, experts=16, top_k=4)
    problem = make_problem(trace, slow_topology("scale-out:2x2"), objective="copies", copies_level=level)
    one, other = (solve(problem, "kahypar", Limits(seed=3)) for _ in range(2))
    assert one.placement is not None
    assert other.placement is not None
    assert one.placement.digest() == other.placement.digest()
    proved = solve(problem, "setpart")
    assert proved.bound is not None
    assert one.objective >= proved.bound * (1 - 1e-9)
