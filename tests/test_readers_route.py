"""Tokens put together from rows of one layer each: what a loop over the rows would give, however they are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.readers._common import SHOWN_BAD_ROWS, BadRows, Columns
from moeplace.readers._route import TokenAssembler

LAYERS = (2, 3, 7)
Key = tuple[int, int]


def columns_of(rows: list[tuple[int, int, int]]) -> Columns:
    """Columns of rows of (request, position, layer), whose ids and step say the line."""
    lines = np.arange(1, len(rows) + 1)
    request, position, layer = np.array(rows, np.int64).reshape(-1, 3).T
    experts = np.stack((lines % 300, lines % 300 + 1), axis=1)[:, None, :]
    return {
        "experts": experts,
        "request": request,
        "position": position,
        "layer": layer,
        "line": lines,
        "step": 10 * lines,
    }


def looped(rows: list[tuple[int, int, int]]) -> tuple[list[Any], list[tuple[int, str]]]:
    """Complete tokens (request, position, step of the first row, line of each layer) and the bad rows, by a loop."""
    pending: dict[Key, dict[int, int]] = {}
    finished: set[Key] = set()
    tokens, bad = [], []
    for line, (request, position, layer) in enumerate(rows, 1):
        key = (request, position)
        token = pending.setdefault(key, {})
        if key in finished or layer in token:
            bad.append((line, f"token {position}, layer {layer}: the request has this row already"))
            continue
        token[layer] = line
        if len(token) == len(LAYERS):
            finished.add(key)
            tokens.append((request, position, 10 * min(token.values()), [token[layer] for layer in LAYERS]))
    for key, token in pending.items():
        if key not in finished:
            lacking = [layer for layer in LAYERS if layer not in token]
            what = f"token {key[1]}, which starts here, lacks {len(lacking)} layers: {', '.join(map(str, lacking))}"
            bad.append((min(token.values()), what))
    return tokens, bad


def assembled(rows: list[tuple[int, int, int]], cuts: list[int]) -> tuple[list[Any], BadRows]:
    """Give the same by an assembler that takes the rows in pieces."""
    bad = BadRows(1000)
    assembler = TokenAssembler("t", LAYERS, 301, bad)
    columns, tokens = columns_of(rows), []
    bounds = sorted({0, len(rows), *(cut % len(rows) for cut in cuts)})
    for start, end in pairwise(bounds):
        done = assembler.add({name: column[start:end] for name, column in columns.items()})
        if done is None:
            continue
        assert done["experts"].dtype == np.uint16
        assert (done["experts"][..., 1] == done["experts"][..., 0] + 1).all()
        parts = (done["request"], done["position"], done["step"], done["experts"][..., 0])
        tokens += zip(*(part.tolist() for part in parts), strict=True)
    assembler.finish()
    return tokens, bad


POSITIONS = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 4, 2**62, 2**63 - 2])
ROWS = st.lists(st.tuples(st.sampled_from([-5, 0, 2**60]), POSITIONS, st.sampled_from(LAYERS)), min_size=1, max_size=60)


@settings(max_examples=200)
@given(rows=ROWS, cuts=st.lists(st.integers(0, 60), max_size=5))
def test_the_same_as_a_loop_over_the_rows(rows: list[tuple[int, int, int]], cuts: list[int]) -> None:
    """Tokens come in the order in which they become complete, with their first row's step; others are bad rows."""
    expected, bad_rows = looped(rows)
    tokens, bad = assembled(rows, cuts)
    assert [(*token[:3], list(token[3])) for token in tokens] == expected
    assert bad.count == len(bad_rows)
    assert [(row.where.line, row.what) for row in bad.shown] == bad_rows[:SHOWN_BAD_ROWS]


@given(order=st.permutations([(r, p, layer) for r in range(2) for p in range(4) for layer in LAYERS]))
def test_any_order_of_layers_and_tokens(order: list[tuple[int, int, int]]) -> None:
    """Every token whose rows are all there comes out once, whatever the order of the rows."""
    tokens, bad = assembled(order, [5, 11])
    assert bad.count == 0
    assert {token[:2] for token in tokens} == {(r, p) for r in range(2) for p in range(4)}


def test_a_finished_token_is_remembered() -> None:
    """A row of a token that was complete in an earlier piece is a repeat, not the start of another token."""
    rows = [(0, 5, layer) for layer in LAYERS] + [(0, 5, 3), (0, 6, 2)]
    tokens, bad = assembled(rows, [3])
    assert [token[:2] for token in tokens] == [(0, 5)]
    assert [row.where.line for row in bad.shown] == [4, 5]
    assert bad.shown[0].what == "token 5, layer 3: the request has this row already"
    assert bad.shown[1].what == "token 6, which starts here, lacks 2 layers: 3, 7"
