"""Laws of :mod:`moeplace.execution`: homes and micro-batches of the tokens of a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_trace

from moeplace.batches import BatchLaw, Steps, TokenIndex
from moeplace.errors import InputError
from moeplace.execution import Execution, step_tokens
from moeplace.scoring import draw_steps
from moeplace.trace import Trace


def steps_of(trace: Trace, **law: int | str) -> Steps:
    """A few steps of a trace."""
    drawn = BatchLaw(**({"phase": "decode", "requests": 6, "tokens": 2, "batches": 5} | law))  # type: ignore[arg-type]
    return draw_steps(trace, TokenIndex.of(trace), drawn)


TRACE = make_trace(0, tokens=300, requests=20, prompt=6, ranks=4)
UNRANKED = TRACE.replace(rank=None)


def test_requests_are_dealt_in_turn() -> None:
    """Without recorded ranks, or when told so, request i of a step lives on GPU i modulo the number of GPUs."""
    for trace, homes in ((UNRANKED, "auto"), (UNRANKED, "turn"), (TRACE, "turn")):
        tokens = step_tokens(steps_of(trace), 4, Execution(homes=homes))
        assert tokens.home.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1] * 5
        assert tokens.group.tolist() == [batch for batch in range(5) for _ in range(12)]


def test_recorded_homes_are_used_where_they_can_be() -> None:
    """Recorded ranks are homes when every GPU exists; told to use them where they cannot be is an error."""
    steps = steps_of(TRACE)
    for homes in ("auto", "recorded"):
        tokens = step_tokens(steps, 4, Execution(homes=homes))
        assert steps.trace.rank is not None
        assert np.array_equal(tokens.home, steps.trace.rank[tokens.row])
    assert step_tokens(steps, 2, Execution()).home.max() == 1
    with pytest.raises(InputError, match="of 2 GPUs"):
        step_tokens(steps, 2, Execution(homes="recorded"))
    with pytest.raises(InputError, match="records no ranks"):
        step_tokens(steps_of(UNRANKED), 4, Execution(homes="recorded"))


def test_random_homes_stick_to_requests() -> None:
    """A request has the same random home in every step, and requests spread over all GPUs."""
    steps = steps_of(UNRANKED, batches=40)
    tokens = step_tokens(steps, 4, Execution(homes="random"))
    request = steps.trace.request[tokens.row]
    homes = {name: set(tokens.home[request == name].tolist()) for name in np.unique(request).tolist()}
    assert all(len(where) == 1 for where in homes.values())
    assert len(set().union(*homes.values())) == 4


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 6), st.integers(1, 5))
def test_micro_batches_divide_every_step(gpus: int, requests: int, length: int, parts: int) -> None:
    """Micro-batches hold every token of a step once, evenly on each GPU, and whole requests where there are enough."""
    trace = make_trace(1, tokens=600, requests=20, prompt=0)
    law = BatchLaw(phase="decode", requests=requests, tokens=length, batches=3)
    how = Execution(overlap="ping-pong", micro_batches=parts)
    tokens = step_tokens(draw_steps(trace, TokenIndex.of(trace), law), gpus, how)
    assert tokens.num_groups == 3 * parts
    assert np.array_equal(tokens.group // parts, np.repeat(np.arange(3), law.step_tokens))
    part, turn = tokens.group[: law.step_tokens] % parts, law.turns()
    if requests >= parts * gpus:
        assert len({*zip(turn.tolist(), part.tolist(), strict=True)}) == requests
        held = np.zeros((gpus, parts), int)
        np.add.at(held, (tokens.home[: law.step_tokens], part), 1)
        assert held.max() - held.min(axis=1).max() <= length * 1 + length
        assert (np.ptp(held, axis=1) <= length).all()
    elif length >= parts:
        sizes = np.bincount(part, minlength=parts)
        assert np.ptp(sizes) <= requests
