"""Laws of :mod:`moeplace.suites`: methods are read as they are written, and what a suite lacks does not break it."""

from __future__ import annotations

import numpy as np
import pytest
from shell import Shell
from strategies import make_trace

from moeplace.build import Choices
from moeplace.errors import InputError, UnknownNameError
from moeplace.solvers import list_solvers
from moeplace.suites import SUITES, Method, suite
from moeplace.trials import Outcome, Setup, Sides, TraceFile, Trial, TrialItem, fitted_on, run_item, run_trial
from moeplace.writers import write_trace

SETUP = Setup(choices=Choices(phase="decode", redundant=2), scoring={"phase": "decode", "batches": 10, "requests": 4})


def _run(method: str) -> Outcome:
    trial = Trial(trace="t", topology="scale-up:2", solver=method, seed=3)
    return run_trial(Sides.of(make_trace(0, tokens=200, requests=20), "half:3", phase="decode"), trial, SETUP)


def test_methods_are_read_as_they_are_written() -> None:
    """Options go to the solver, goals to the problem, the routing to the evaluator."""
    method = Method.of("setpart:mode=fast:objective=copies:load-cap=1.1@weighted")
    assert (method.solver, method.options, method.routing) == ("setpart", {"mode": "fast"}, "weighted")
    assert method.goals == {"objective": "copies", "load_cap": "1.1"}
    assert Method.of("eplb+relabel") == Method(solver="eplb+relabel")


@pytest.mark.parametrize("text", ["", ":a=b", "eplb:policy", "eplb:=x"])
def test_other_texts_are_no_methods(text: str) -> None:
    """What has another form is refused, with an example."""
    with pytest.raises(InputError, match="method"):
        Method.of(text)


def test_unknown_names_are_told() -> None:
    """A routing or a suite that does not exist."""
    with pytest.raises(UnknownNameError, match="routing"):
        Method.of("grace@nearst")
    with pytest.raises(UnknownNameError, match="suite"):
        suite("publishd")


def test_every_line_of_every_suite_is_a_method() -> None:
    """Lines can be read, and ours and the published methods of this package are among them."""
    named = {Method.of(text).solver for text in SUITES["published"]}
    assert {"grace", "occult", "exflow", "prefill-remap", "prefill-dup", "eplb", "moetuner", "auto"} <= named
    assert {"grace", "occult", "exflow"} <= set(list_solvers())


def test_what_is_missing_is_an_outcome() -> None:
    """A solver or an option that does not exist here fails alone, with the reason."""
    assert "unknown solver" in str(_run("no-such-solver").failure)
    assert "no option" in str(_run("eplb:polcy=global").failure)


def test_options_and_facts_reach_the_outcome() -> None:
    """An option changes the placement, and the facts are those of it."""
    filled, empty = _run("eplb"), _run("eplb:copies=none")
    assert filled.facts["extra_copies"] == 4
    assert empty.facts["extra_copies"] == 0
    assert _run("linear").facts["moves"] == 0
    assert filled.facts["load_std"] >= 0
    assert 1 <= filled.facts["copies_per_token_gpu"] <= 2
    assert np.isfinite(list(filled.facts.values())).all()


def test_the_suite_is_one_table(shell: Shell) -> None:
    """Every method that fits has a line, the others a reason; JSON has the facts."""
    call = "compare t.npz --suite published --num-gpus 2 --seeds 1 --batches 5 --work 0.01 --phase decode"
    done = shell(call)
    for word in ("grace@topology-aware", "occult", "prefill-remap", "load std", "moves"):
        assert word in done.out
    assert "exflow" not in done.out
    assert "exflow on scale-up:2" in done.err
    facts = {row["solver"]: row["facts"] for row in shell(f"{call} --json").json["rows"]}
    assert facts["linear"]["moves"] == 0
    assert "no-such" in shell("compare t.npz --suite no-such --num-gpus 2", code=1).err


def test_named_methods_are_added_to_a_suite(shell: Shell) -> None:
    """With ``--suite`` and ``-s`` both are run, each method once; swift starts from the contiguous placement."""
    call = "compare t.npz --suite published -s random,occult --num-gpus 2 --seeds 1 --batches 5 --work 0.01"
    told = [row["solver"] for row in shell(f"{call} --phase decode --json").json["rows"]]
    assert "random" in told
    assert told.count("occult") == 1
    assert "linear+swift" in told


def test_prefill_methods_are_fitted_on_prefill(shell: Shell) -> None:
    """Judged on decode they still place by prefill: the placement is that of a run on prefill, not an oracle's."""
    trace = make_trace(7, tokens=400, requests=20, prompt=8)
    other = np.where(trace.phase[:, None, None] == 0, trace.experts, (trace.experts + 3) % 6)
    trace = trace.replace(experts=np.sort(other, axis=2))
    trial = Trial(trace="t", topology="scale-up:2", solver="prefill-remap", seed=3)
    setup = Setup(choices=Choices(phase="decode"), scoring=SETUP.scoring, split="half")
    assert fitted_on("prefill-remap") == fitted_on("prefill-dup") == "prefill"
    assert fitted_on("auto") is fitted_on("eplb") is fitted_on("no-such-solver") is None
    path = shell.folder / "phases.npz"
    write_trace(trace, path)
    told = run_item(TrialItem(trial=trial, source=TraceFile(path=str(path)), setup=setup))
    assert told.failure is None
    alone = run_trial(Sides.of(trace, "half:3", phase="decode"), trial, setup)
    assert told.facts["load_std"] != alone.facts["load_std"]


def test_a_method_is_solved_under_the_routing_it_is_judged_by() -> None:
    """``nearby`` needs tokens that prefer their own node: with ``@nearest`` it has an answer, without it a reason."""
    setup = Setup(choices=SETUP.choices, scoring=SETUP.scoring)

    def told(method: str) -> Outcome:
        sides = Sides.of(make_trace(0, tokens=200, requests=20), "half:3", phase="decode")
        return run_trial(sides, Trial(trace="t", topology="scale-out:2x1", solver=method, seed=3), setup)

    near = told("nearby:objective=remote@nearest")
    assert near.failure is None
    assert near.facts["remote_copies_per_token"] < 1
    assert "own node" in str(told("nearby:objective=remote").failure)
