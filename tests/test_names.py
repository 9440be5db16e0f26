"""Sets of experts named after the ranks whose tokens touch them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_problem, make_trace, slow_topology

from moeplace.hypergraph.names import best_names, copies_at_home, named_after_homes
from moeplace.objective import objective_value
from moeplace.placement import Placement
from moeplace.solvers import solve


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_names_keep_more_copies_at_home(seed: int, by_node: bool) -> None:
    """All permutations, of GPUs with as many slots, and of whole nodes where nodes must stay."""
    rng = np.random.default_rng(seed)
    experts = make_trace(seed, tokens=50, experts=8, top_k=3).experts[:, 0].astype(np.int64)
    home, group = rng.integers(0, 4, 50), rng.permutation(np.repeat(np.arange(4), 2))
    rooms = np.full(4, 2) if by_node else rng.integers(2, 4, 4)
    node = np.array([0, 0, 1, 1]) if by_node else np.zeros(4, np.int64)
    gain = copies_at_home(experts, home, group, 4)
    names = best_names(gain, rooms, node)
    assert sorted(names.tolist()) == [0, 1, 2, 3]
    assert (rooms[names] == rooms).all()

    def kept(order: tuple[int, ...]) -> int:
        return sum(any(order[group[e]] == rank for e in row) for row, rank in zip(experts, home, strict=True))

    allowed = [
        order
        for order in itertools.permutations(range(4))
        if (rooms[list(order)] == rooms).all()
        and all(node[order[a]] == node[order[b]] for a, b in itertools.combinations(range(4), 2) if node[a] == node[b])
    ]
    assert kept(tuple(names.tolist())) == max(kept(order) for order in allowed)


@pytest.mark.parametrize("level", ["gpu", "node"])
def test_setpart_names_gpus_without_changing_its_value(level: str) -> None:
    """The value is that of any names; the note tells copies at home, no fewer than before."""
    trace = make_trace(3, tokens=200, experts=8, top_k=3, ranks=4)
    problem = make_problem(trace, slow_topology("scale-out:2x2"), objective="copies", copies_level=level)
    answer = solve(problem, "setpart")
    assert answer.placement is not None
    (note,) = [note for note in answer.notes if "stay at home" in note]
    after, before = (float(word) for word in note.replace(",", " ").split() if word.startswith(("0.", "1.")))
    assert after >= before
    sample, state = problem.stats.sample, answer.placement.copies().argmax(axis=1)
    assert sample is not None
    assert sample.rank is not None
    again, _ = named_after_homes(
        sample.experts, sample.rank, state, problem.slots_per_gpu, problem.topology.node_of_gpu() * (level == "node")
    )
    kept = [sum(np.trace(copies_at_home(sample.experts[:, i].astype(np.int64), sample.rank, row, 4)) for i, row
            in enumerate(rows)) for rows in (state, again)]  # fmt: skip
    assert kept[0] == kept[1]
    lists = [[np.flatnonzero(row == gpu).tolist() for gpu in range(4)] for row in state]
    assert objective_value(problem, Placement.from_lists(lists, 8)) == answer.objective


def test_without_homes_names_stay() -> None:
    """No ranks, or ranks that are no GPUs."""
    trace = make_trace(0, experts=4)
    state, rooms = np.array([[0, 0, 1, 1]] * 2), np.array([2, 2])
    for rank in (None, np.full(trace.num_tokens, 5)):
        named, notes = named_after_homes(trace.experts, rank, state, rooms, np.zeros(2, np.int64))
        assert (named == state).all()
        assert notes == ()
