"""Laws of :mod:`moeplace.trials`: a trial is solving on one part and scoring on the other, wherever it is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from strategies import make_trace

from moeplace.affinity import count_routing
from moeplace.build import Choices, build_problem
from moeplace.errors import InputError
from moeplace.scoring import score
from moeplace.solvers import solve
from moeplace.split import parse_split, select
from moeplace.trace import Trace
from moeplace.trials import Outcome, Setup, Sides, TraceFile, Trial, TrialItem, run_item, run_trial
from moeplace.writers import write_trace

SETUP = Setup(choices=Choices(phase="decode"), scoring={"phase": "decode", "batches": 20, "requests": 4})
TRIAL = Trial(trace="t", topology="scale-up:2", solver="eplb", seed=3)


@pytest.fixture
def trace() -> Trace:
    """Twenty requests of six layers' worth of tokens."""
    return make_trace(0, tokens=200, requests=20)


def test_a_trial_is_solving_and_scoring_apart(trace: Trace) -> None:
    """Its times are those of a placement solved on the fit half and scored on the other, with the trial's seed."""
    outcome = run_trial(Sides.of(trace, "half:3", phase="decode"), TRIAL, SETUP)
    fit, test = (select(trace, split=parse_split("half:3"), part=part, phase="decode") for part in ("fit", "test"))
    problem = build_problem(fit, topology="scale-up:2", phase="decode")
    answer = solve(problem, "eplb")
    placements = {"a": answer.placement}
    (by_hand,) = score(
        test, placements, problem.topology, problem.model, phase="decode", batches=20, requests=4, seed=3
    )
    (times,) = outcome.times
    assert np.array_equal(times.step_us, by_hand.simulation.step_us)
    assert times.max_over_mean == pytest.approx(by_hand.max_over_mean.mean())
    assert (outcome.objective, outcome.gap) == (answer.objective, answer.gap)
    assert any("widths are unknown" in note for note in outcome.notes)


def test_the_sides_share_no_request(trace: Trace) -> None:
    """Fit and test are apart, together all, and counted as they are."""
    sides = Sides.of(trace, "half:1")
    fit, test = ({int(i) for block in side.blocks() for i in block.request} for side in (sides.fit, sides.test))
    assert not fit & test
    assert fit | test == set(trace.request.tolist())
    assert sides.fit_stats.trace_digest == count_routing(sides.fit).trace_digest


@pytest.mark.parametrize(("split", "expected"), [("half", "half:3"), ("time:0.5", "time:0.5")])
def test_another_half_for_every_seed(split: str, expected: str) -> None:
    """``half`` goes with the seed, any other split is the same for all."""
    assert Setup(split=split).split_of(TRIAL) == expected


def test_outcomes_survive_json(trace: Trace) -> None:
    """An outcome is the same after JSON, to the picosecond."""
    outcome = run_trial(Sides.of(trace, "half:3", phase="decode"), TRIAL, SETUP)
    again = Outcome.of_dict(json.loads(json.dumps(outcome.to_dict())))
    assert (again.trial, again.objective, again.notes) == (outcome.trial, outcome.objective, outcome.notes)
    assert again.times[0].step_us == pytest.approx(outcome.times[0].step_us, abs=1e-6)


@pytest.mark.parametrize("bad", [{"trial": {}}, {"times": [{}]}, {"more": 1}])
def test_other_documents_are_no_outcomes(trace: Trace, bad: dict[str, object]) -> None:
    """A document of another form raises what a reader of kept files expects."""
    good = run_trial(Sides.of(trace, "half:3", phase="decode"), TRIAL, SETUP).to_dict()
    with pytest.raises((KeyError, TypeError, ValueError)):
        Outcome.of_dict({**good, **bad})


def test_what_cannot_be_solved_is_an_outcome_too(trace: Trace) -> None:
    """Too few slots fail that trial with a reason; what is wrong with the trace or the law is raised."""
    sides = Sides.of(trace, "half:3", phase="decode")
    failed = run_trial(sides, TRIAL, Setup(choices=Choices(slots_per_gpu=1)))
    assert failed.failure is not None
    assert "slots" in failed.failure
    assert not failed.times
    with pytest.raises(InputError, match="distinct"):
        run_trial(sides, TRIAL, Setup(scoring={"phase": "decode", "requests": 1000}))


def test_items_run_the_same_in_any_order(trace: Trace, tmp_path: Path) -> None:
    """What is kept from one item to the next does not change any."""
    write_trace(trace, tmp_path / "t.npz", format="npz")
    items = [
        TrialItem(
            trial=Trial(trace="t", topology="scale-up:2", solver=solver, seed=seed),
            source=TraceFile(path=str(tmp_path / "t.npz")),
            setup=SETUP,
        )
        for seed in (0, 1)
        for solver in ("linear", "eplb")
    ]
    forward = {item.trial: run_item(item) for item in items}
    for item in reversed(items):
        again = run_item(item)
        assert np.array_equal(again.times[0].step_us, forward[item.trial].times[0].step_us)
