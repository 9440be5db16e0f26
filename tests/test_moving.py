"""Limits on moves: kept by every answer, names of GPUs aligned first, what is gained within them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shell import Shell
from strategies import every_placement, make_problem, make_trace, random_placement, slow_topology

from moeplace.build import Choices, build_problem
from moeplace.caps import moves_for
from moeplace.diff import compare_placements
from moeplace.errors import InputError, ProblemError, SolverError
from moeplace.migration import check_moves
from moeplace.moving import MoveLimits, arriving_copies, copy_us, move_us
from moeplace.objective import objective_value
from moeplace.problem import Problem
from moeplace.sampled import aligned, moving_value, relink
from moeplace.solution import Limits
from moeplace.solvers import finish, solve
from moeplace.split import parse_split, select
from moeplace.watching import propose, watch

BRIEF = Limits(work=0.05)


def _problem(seed: int = 0, **options: Any) -> Problem:
    trace = make_trace(seed, tokens=200, layers=2, experts=8, top_k=2)
    problem = make_problem(trace, slow_topology("scale-up:4"), **({"objective": "load"} | options))
    return problem.replace(baseline=random_placement(seed, problem.slots_per_gpu, 2, 8))


@given(
    seed=st.integers(0, 500),
    most=st.integers(0, 8),
    each=st.none() | st.integers(0, 3),
    objective=st.sampled_from(["load", "step-time", "copies", "cross"]),
    redundant=st.sampled_from([0, 4]),
)
@settings(max_examples=20, deadline=None)
def test_limits_on_moves_are_kept(seed: int, most: int, each: int | None, objective: str, redundant: int) -> None:
    """Whatever the objective, in all and on every GPU; the answer is never worse than what is deployed."""
    problem = _problem(seed, objective=objective, redundant=redundant)
    limited = problem.replace(moves=MoveLimits(max_copies=most, max_copies_per_gpu=each))
    answer = solve(limited, "eplb", BRIEF)
    assert answer.placement is not None
    assert problem.baseline is not None
    change = compare_placements(problem.baseline, answer.placement)
    assert change.moved_copies <= most
    assert each is None or change.arriving.sum(axis=0).max() <= each
    assert answer.objective <= objective_value(problem, problem.baseline) * (1 + 1e-9)
    assert check_moves(limited, answer.placement) is None


def test_moves_go_where_they_gain_most() -> None:
    """On a small layer the best placement within two moves is found, by trying all."""
    for seed in range(4):
        trace = make_trace(seed, tokens=120, layers=1, experts=6, top_k=2)
        problem = make_problem(trace, "scale-up:3", objective="load")
        base = random_placement(seed, problem.slots_per_gpu, 1, 6)
        limited = problem.replace(baseline=base, moves=MoveLimits(max_copies=2))
        near = [
            one
            for one in every_placement(problem)
            if (one.used_slots() == 2).all() and arriving_copies(base.copies(), one.copies()).sum() <= 2
        ]
        answer = solve(limited, "balance", BRIEF)
        assert answer.objective == pytest.approx(min(objective_value(problem, one) for one in near))
        assert any("of that gain is kept" in note for note in answer.notes)


def test_renamed_gpus_move_nothing() -> None:
    """A baseline that is the answer under other names of GPUs costs no move."""
    problem = _problem(3).replace(baseline=None)
    best = solve(problem, "balance", BRIEF).placement
    assert best is not None
    deployed = problem.replace(baseline=best.permute_gpus(np.array([2, 0, 3, 1])))
    answer = solve(deployed, "balance", BRIEF)
    assert answer.placement is not None
    assert deployed.baseline is not None
    assert not arriving_copies(deployed.baseline.copies(), answer.placement.copies()).any()
    assert aligned(problem, best) is best


def test_a_horizon_weighs_moving_against_step_time() -> None:
    """Over one step nothing pays; over very many the free answer does, and what moves costs its time."""
    problem = _problem(5, objective="step-time")
    assert problem.baseline is not None
    now = objective_value(problem, problem.baseline)
    soon = solve(problem.replace(moves=MoveLimits(horizon_steps=1)), "balance", BRIEF)
    late = solve(problem.replace(moves=MoveLimits(horizon_steps=10**9)), "balance", BRIEF)
    assert soon.objective <= now
    assert late.objective <= soon.objective
    assert late.placement is not None
    arriving = arriving_copies(problem.baseline.copies(), late.placement.copies())
    size = problem.model.expert_weight_bytes
    assert move_us(problem.topology, size, arriving) == arriving.max() * copy_us(problem.topology, size)
    spread = problem.replace(moves=MoveLimits(horizon_steps=10))
    more = move_us(problem.topology, size, arriving) / 10
    assert moving_value(spread, late.placement) == pytest.approx(late.objective + more)


def test_what_cannot_be_is_refused() -> None:
    """Limits without a baseline, a horizon for load, and an answer that breaks a limit."""
    problem = _problem(0)
    with pytest.raises(ProblemError, match="without a baseline"):
        problem.replace(baseline=None, moves=MoveLimits(max_copies=1))
    with pytest.raises(ProblemError, match="horizon"):
        problem.replace(moves=MoveLimits(horizon_steps=5))
    with pytest.raises(ProblemError, match="no limits on moves"):
        relink(problem, random_placement(1, problem.slots_per_gpu, 2, 8), BRIEF)
    with pytest.raises(InputError, match="at least 0"):
        MoveLimits(max_copies=-1)
    with pytest.raises(InputError, match="at least 1"):
        MoveLimits(horizon_steps=0)
    answer = solve(problem.replace(baseline=None), "balance", BRIEF)
    for limits in (MoveLimits(max_copies=0), MoveLimits(max_copies_per_gpu=0)):
        with pytest.raises(SolverError, match="limits on moves are hard"):
            finish(problem.replace(moves=limits), answer, 0.0)


def test_limits_in_bytes_and_shares() -> None:
    """All become copies of one expert; the tighter holds."""
    base = random_placement(0, np.full(4, 2), 2, 8)
    assert moves_for(base, 10.0) is None
    assert moves_for(base, 10.0, copies=0.25) == MoveLimits(max_copies=4)
    assert moves_for(base, 10.0, copies=9, total_bytes=39.0) == MoveLimits(max_copies=3)
    assert moves_for(base, 10.0, gpu_bytes=25.0) == MoveLimits(max_copies_per_gpu=2)
    assert str(MoveLimits(max_copies=3, horizon_steps=5)) == "at most 3 copies move, moving is spread over 5 steps"
    with pytest.raises(InputError, match="limits on moves"):
        moves_for(None, 10.0, copies=1)


def test_the_command_line_limits_moves(shell: Shell) -> None:
    """Shares, sizes, and what is wrong with them."""
    shell("solve t.npz -t scale-up:4 --solver linear -o old.json")
    told = shell(
        "solve t.npz -t scale-up:4 --solver balance --baseline old.json --max-moves 10% -o new.json --json"
    ).json
    assert told["objective"]["value"] > 0
    moved = shell("diff old.json new.json --json").json
    assert moved["moved_share"] <= 0.1 + 1e-9
    shell.fails("solve t.npz -t scale-up:4 --max-moves 3", "moves are counted from a placement")
    assert "is not a size" in shell("solve t.npz --baseline old.json --max-moved-bytes lots", 2).err


def test_a_watch_proposes_only_what_repays(shell: Shell) -> None:
    """A bad placement is replaced once and then kept; over one step nothing repays; waiting is asked for, not slept."""
    shell("solve t.npz -t scale-up:4 --solver random -o old.json")
    line = "solve t.npz -t scale-up:4 --solver balance --baseline old.json --watch 1s --watch-rounds 1 -o next.json"
    told = shell(f"{line} --horizon-steps 1000000000 --json").json
    assert told["move"] == (told["then_us"] < told["now_us"])
    assert not shell(f"{line} --horizon-steps 1 --json").json["move"]
    assert "horizon" in shell(f"{line} --horizon-steps 5").out or "stay" in shell(f"{line} --horizon-steps 5").out
    assert "--watch needs" in shell("solve t.npz --watch 1s", 2).err


def test_the_loop_counts_looks_and_ends() -> None:
    """Looks that find nothing new do not count; waiting may end it."""
    news = iter([True, False, True, True])
    assert watch(lambda: next(news), lambda: False, rounds=2) == 2
    assert watch(lambda: True, lambda: True) == 1


def test_a_proposal_is_judged_on_requests_not_fitted_to() -> None:
    """Its figures are the objective's on the other half; without a horizon there is none."""
    trace = make_trace(1, tokens=300, layers=2, experts=8, top_k=2)
    base = random_placement(0, np.full(4, 2), 2, 8)
    choices = Choices(topology="scale-up:4", baseline=base, horizon_steps=10**8)
    proposal = propose(trace, choices, "balance", BRIEF)
    test = build_problem(select(trace, split=parse_split("half:0"), part="test"), topology="scale-up:4")
    assert proposal.now_us == objective_value(test, base)
    assert proposal.solution.placement is not None
    assert proposal.then_us == objective_value(test, proposal.solution.placement)
    assert proposal.repays == (proposal.gain_us * 10**8 >= proposal.move_us and proposal.moved_copies > 0)
    assert ("move" if proposal.repays else "stay") in str(proposal)
    with pytest.raises(InputError, match="a watch without"):
        propose(trace, Choices(topology="scale-up:4", baseline=base), "balance", BRIEF)
