"""Validation: null traces keep popularity alone, resampled requests stay whole, figures are the objective's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shell import Shell
from strategies import make_trace

from moeplace.affinity import count_routing
from moeplace.build import Choices, build_problem
from moeplace.errors import InputError
from moeplace.objective import objective_value
from moeplace.reduction import counts_of
from moeplace.solution import Limits
from moeplace.solvers import solve
from moeplace.split import parse_split, select
from moeplace.suites import Method
from moeplace.tails import Estimate
from moeplace.trials import Setup, TraceFile
from moeplace.trials import Trial as Contestant
from moeplace.validated import Item, Tried, validated
from moeplace.validation import (
    SHARES,
    Case,
    Fits,
    Trial,
    cases_of,
    first_requests,
    null_trace,
    resampled,
    sides,
    validate,
)

BRIEF = Limits(work=0.01)


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_a_null_trace_keeps_how_often_experts_are_chosen(seed: int, tokens: int) -> None:
    """Exactly, in every layer; no token has an expert twice; the same seed gives the same."""
    trace = make_trace(seed, tokens=tokens, layers=2, experts=8, top_k=3)
    null = null_trace(trace, seed)
    for layer in range(2):
        assert (np.bincount(null.experts[:, layer].ravel()) == np.bincount(trace.experts[:, layer].ravel())).all()
    assert (np.diff(np.sort(null.experts, axis=2), axis=2) > 0).all()
    assert (null.experts == null_trace(trace, seed).experts).all()


def test_a_null_trace_has_no_affinity() -> None:
    """Experts that always come together do so no more often than by chance afterwards."""
    trace = make_trace(0, tokens=4000, layers=1, experts=8, top_k=2)
    pairs = np.random.default_rng(0).integers(0, 4, 4000)
    together = trace.replace(experts=np.stack([2 * pairs, 2 * pairs + 1], axis=1)[:, None].astype(trace.experts.dtype))
    null = count_routing(null_trace(together, 1))
    assert null.coactivation is not None
    # 8 experts equally often: any pair has a seventh of an expert's choices
    share = null.coactivation[0, 0, 1] / null.load[0, 0]
    assert share == pytest.approx(1 / 7, abs=0.04)


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_requests_are_resampled_whole(seed: int) -> None:
    """Every request drawn has all its tokens, in order, under a number of its own."""
    trace = make_trace(seed, tokens=50, layers=1, experts=6, top_k=2)
    drawn = resampled(trace, np.random.default_rng(seed))
    known = {trace.experts[trace.request == name].tobytes() for name in np.unique(trace.request)}
    names = np.unique(drawn.request)
    assert len(names) == len(np.unique(trace.request))
    assert all(drawn.experts[drawn.request == name].tobytes() in known for name in names)


def test_figures_are_the_objectives_on_the_other_part() -> None:
    """Against EPLB fitted to the same; the curve ends in the whole half; counts are refused."""
    trace = make_trace(2, tokens=300, layers=2, experts=8, top_k=2)
    choices = Choices(topology="scale-up:4", objective="load")
    found = validate(trace, choices, "balance", BRIEF)
    fit, test = (select(trace, split=parse_split("half:0"), part=part) for part in ("fit", "test"))
    problem, judged = (build_problem(part, choices) for part in (fit, test))
    ours, rival = (solve(problem, name, BRIEF).placement for name in ("balance", "eplb"))
    assert ours is not None
    assert rival is not None
    assert found.splits[0].test.value == pytest.approx(
        1 - objective_value(judged, ours) / objective_value(judged, rival)
    )
    assert found.splits[0].test.low <= found.splits[0].test.value <= found.splits[0].test.high
    assert found.curve[-1] == found.splits[0]
    assert [one.requests for one in found.curve] == sorted(one.requests for one in found.curve)
    assert len(found.curve) == len(SHARES)
    assert "remain without affinity" in found.sentence()
    assert len(found.rows()) == 1 + len(found.splits) + 1 + len(SHARES)
    assert len(np.unique(first_requests(trace, 0.5).request)) == round(0.5 * len(np.unique(trace.request)))
    with pytest.raises(InputError, match="validation of counts"):
        validate(counts_of(trace), choices, "balance", BRIEF)


def test_a_method_is_validated_with_its_goals_and_its_choice_of_copies() -> None:
    """Posed with its own objective and cap, judged by the comparison's, the rival without its routing."""
    trace = make_trace(3, tokens=300, layers=2, experts=8, top_k=2)
    choices, case = Choices(topology="scale-out:2x2", redundant=4, objective="load"), Case(split="half:0")
    method = Method.of("grace:load-cap=2.0@weighted")
    found = Fits(choices, method, BRIEF).trial(case, *sides(trace, case, 0))
    fit, test = (select(trace, split=parse_split("half:0"), part=part) for part in ("fit", "test"))
    routed = replace(choices, routing="weighted")
    ours = solve(build_problem(fit, replace(routed, load_cap="2.0")), "grace", BRIEF).placement
    rival = solve(build_problem(fit, choices), "eplb", BRIEF).placement
    assert ours is not None
    assert rival is not None
    values = objective_value(build_problem(test, routed), ours), objective_value(build_problem(test, choices), rival)
    assert found.test.value == pytest.approx(1 - values[0] / values[1])


def test_a_comparison_needs_every_case() -> None:
    """A contestant whose cases are not all done is left out; one with a failure says it; figures survive their JSON."""
    trial = Contestant(trace="t", topology="scale-up:2", solver="eplb", seed=0)
    items = [
        Item(trial=trial, case=case, source=TraceFile(path="t.npz"), setup=Setup())
        for case in cases_of(make_trace(0, tokens=60), 1)
    ]
    figures = Trial(name="half:0", requests=3, fit=0.25, test=Estimate(value=0.125, low=0.1, high=0.2))
    tried = [Tried(trial=trial, case=item.case, found=figures) for item in items]
    assert Tried.of_dict(items[0], json.loads(json.dumps(tried[0].to_dict()))) == tried[0]
    assert validated(items, tried[:-1]) == []
    (whole,) = validated(items, tried[::-1])
    assert whole.validation is not None
    assert len(whole.validation.splits) == 2
    (failed,) = validated(items, [*tried[:-1], Tried(trial=trial, case=items[-1].case, failure="no")])
    assert failed.to_dict()["failure"] == f"{items[-1].case}: no"


def test_the_command_line_validates(shell: Shell) -> None:
    """A table, or JSON; no placement is written."""
    line = "solve t.npz -t scale-up:4 --objective load --solver balance --work 0.01 --validate"
    told = shell(f"{line} --json").json
    assert told["schema"] == "moeplace/validation/1"
    assert {one["fitted_to"] for one in told["splits"]} >= {"half:0", "half:1", "time:0.5"}
    assert "null trace" in shell(line).out
