"""Counts made of tokens, checked against the loads counted from the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cut, make_trace, traces

import moeplace.reduction
from moeplace.affinity import count_routing
from moeplace.errors import InputError, TraceError
from moeplace.readers import read_trace
from moeplace.reduction import counts_of
from moeplace.trace import Counts, Trace
from moeplace.writers import write_trace


@given(traces(), st.lists(st.integers(0, 9), max_size=3))
def test_counts_are_the_loads(trace: Trace, sizes: list[int]) -> None:
    """One table, equal to the load of the tokens, however they are cut; tokens and top-k follow from it."""
    counts = counts_of(cut(trace, sizes))
    assert counts.counts.shape[0] == 1
    assert counts.counts[0].tolist() == count_routing(trace).load.tolist()
    assert counts.meta == trace.meta
    assert count_routing(counts).num_tokens == trace.num_tokens


@given(traces(tokens=25), st.data(), st.lists(st.integers(0, 9), max_size=3))
def test_counts_per_step_are_the_loads_of_its_tokens(trace: Trace, data: st.DataObject, sizes: list[int]) -> None:
    """A table per recorded step, in increasing order, each the load of the tokens of that step."""
    step = np.array(data.draw(st.lists(st.integers(-3, 6), min_size=25, max_size=25)))
    counts = counts_of(cut(trace.replace(step=step), sizes), per_step=True)
    assert counts.num_steps == len(np.unique(step))
    for number, table in zip(np.unique(step), counts.counts, strict=True):
        assert table.tolist() == count_routing(trace.take(step == number)).load.tolist()
    assert counts.counts.sum(axis=0).tolist() == counts_of(trace).counts[0].tolist()


def test_counts_per_step_need_steps_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace without steps, and steps whose tables do not fit, are refused with a way out."""
    with pytest.raises(TraceError, match="records no steps"):
        counts_of(make_trace(0), per_step=True)
    monkeypatch.setattr(moeplace.reduction, "STEP_TABLE_BYTES", 8 * 2 * 6 * 3)
    trace = make_trace(0, tokens=40).replace(step=np.arange(40) % 4)
    with pytest.raises(InputError, match="counts of 4 steps"):
        counts_of(trace, per_step=True)
    assert counts_of(trace.take(trace.step < 3), per_step=True).num_steps == 3
    assert counts_of(trace).num_steps == 1


def test_names_that_counts_have_no_place_for_are_left_out(tmp_path: Path) -> None:
    """Domains and request names do not outlive the tokens; the counts written and read again are the same."""
    trace = make_trace(0, requests=2)
    meta = trace.meta.replace(domains=("a",), request_names=("x", "y"), model_id="toy", layer_ids=(2, 5))
    number = np.unique(trace.request, return_inverse=True)[1]
    counts = counts_of(trace.replace(meta=meta, domain=np.zeros(40, int), request=number))
    assert counts.meta == meta.replace(domains=(), request_names=())
    for name in ("c.json", "c.npz"):
        write_trace(counts, tmp_path / name)
        again = read_trace(tmp_path / name)
        assert isinstance(again, Counts)
        assert (again.meta, again.digest()) == (counts.meta, counts.digest())
