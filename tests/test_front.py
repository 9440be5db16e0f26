"""The trade between load and traffic: caps kept, nothing beaten on the front, nothing below the certified corner."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from shell import Shell
from strategies import every_placement, make_problem, make_trace, slow_topology

from moeplace.batches import TokenIndex
from moeplace.errors import NothingFoundError
from moeplace.front import Front, trace_front
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value, step_values
from moeplace.problem import Problem
from moeplace.scoring import draw_steps
from moeplace.solution import Limits
from moeplace.solvers import solve

BRIEF = Limits(work=0.002, time_limit_s=60)


def _problem(**options: object) -> Problem:
    trace = make_trace(3, tokens=200, layers=3, experts=8, top_k=2)
    return make_problem(trace, slow_topology("scale-up:2"), requests=200, **options)


def _check(front: Front) -> None:
    """Laws of every front."""
    rows = np.array([[one.load, one.traffic, one.step_time_us] for one in front.points])
    corner = np.array([front.load_floor, front.traffic_bound, front.step_time_bound_us])
    assert (corner <= rows * (1 + 1e-9)).all()
    assert front.points[front.chosen].step_time_us == rows[:, 2].min()
    for row, one in zip(rows, front.points, strict=True):
        assert one.cap is None or one.load <= one.cap * (1 + 1e-9)
        beaten = ((rows <= row).all(axis=1) & (rows < row).any(axis=1)).any()
        assert one.on_front != beaten
        assert one.bound is None or one.bound <= (one.traffic if one.minimised == front.traffic else one.step_time_us)


@pytest.mark.parametrize("dataflow", ["context-coherent", "dispatch-combine"])
def test_front_of_a_small_problem(dataflow: str) -> None:
    """Both dataflows: looser caps, no more traffic; the answer is the point of least predicted step time."""
    problem = _problem(dataflow=dataflow)
    front, answer = trace_front(problem, limits=BRIEF)
    _check(front)
    swept = [one.traffic for one in front.points if one.minimised == front.traffic]
    assert len(swept) >= 3
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(swept))
    assert answer.placement is not None
    assert answer.objective == objective_value(problem, answer.placement) == min(p.step_time_us for p in front.points)
    assert answer.bound is not None
    assert answer.bound <= answer.objective
    assert any("least predicted step time" in note for note in answer.notes)


def test_corner_is_below_every_placement() -> None:
    """By trying all placements: none is below the corner in load, traffic or step time."""
    trace = make_trace(1, tokens=60, layers=2, experts=4, top_k=2)
    problem = make_problem(trace, slow_topology("scale-up:2"), dataflow="context-coherent", requests=60)
    front, _ = trace_front(problem, limits=BRIEF)
    crossing = problem.replace(objective="cross")
    for placement in every_placement(problem):
        assert front.load_floor <= max_over_mean(placement, problem.stats.load).mean() * (1 + 1e-9)
        assert front.traffic_bound <= objective_value(crossing, placement) + 1e-9
        assert front.step_time_bound_us <= objective_value(problem, placement) * (1 + 1e-9)


def test_a_given_cap_stays_the_loosest() -> None:
    """No point has more load than the problem's own cap allows."""
    problem = _problem(dataflow="context-coherent")
    free, _ = trace_front(problem, limits=BRIEF)
    cap = np.full(3, (free.points[0].load + max(one.load for one in free.points)) / 2 + 0.2)
    front, answer = trace_front(problem.replace(load_cap=cap), limits=BRIEF)
    _check(front)
    assert all(one.cap is not None and one.cap <= cap[0] * (1 + 1e-9) for one in front.points)
    assert answer.placement is not None
    assert (max_over_mean(answer.placement, problem.stats.load) <= cap * (1 + 1e-9)).all()


def test_a_solver_that_keeps_no_cap_is_told() -> None:
    """Random placements keep no cap just above the best balance."""
    problem = _problem(dataflow="context-coherent")
    balanced = solve(problem.replace(objective="load"), "balance").placement
    assert balanced is not None
    tight = problem.replace(load_cap=max_over_mean(balanced, problem.stats.load) * (1 + 1e-6))
    with pytest.raises(NothingFoundError, match="random keeps no load cap"):
        trace_front(tight, "random", BRIEF)


def test_a_front_of_sampled_steps() -> None:
    """With a risk its step times are those of the steps; load and traffic stay those of the mean step."""
    problem = _problem(dataflow="dispatch-combine")
    trace = make_trace(3, tokens=200, layers=3, experts=8, top_k=2)
    law = problem.law.replace(requests=4, batches=12, phase=TokenIndex.of(trace).phases()[0])
    sampled = problem.replace(law=law, steps=draw_steps(trace, TokenIndex.of(trace), law), risk="p95")
    front, answer = trace_front(sampled, limits=BRIEF)
    _check(front)
    assert answer.placement is not None
    assert answer.objective == objective_value(sampled, answer.placement)


def test_the_command_line_shows_and_writes_it(shell: Shell) -> None:
    """The table on standard error, the front in the document; another objective is refused."""
    words = "solve t.npz -t scale-up:4 --dataflow context-coherent --pareto --solver balance"
    told = shell(f"{words} --verbose --json")
    assert "least step time" in told.err
    assert "certified for every placement" in told.err
    front = told.json["front"]
    assert front["points"][front["chosen"]]["step_time_us"] == told.json["objective"]["value"]
    assert front["corner"]["step_time_us"] == told.json["bound"]
    shell.fails(f"{words} --objective load", "--pareto chooses by predicted step time", code=2)


def test_points_tell_nodes_and_tails_beside() -> None:
    """Traffic by node is the objective counted by node; mean and p99 are those of the sampled steps."""
    trace = make_trace(3, tokens=200, layers=3, experts=8, top_k=2)
    plain = make_problem(trace, slow_topology("scale-out:2x2"), requests=200, dataflow="dispatch-combine")
    law = plain.law.replace(requests=4, batches=30, phase=TokenIndex.of(trace).phases()[0])
    sampled = plain.replace(law=law, steps=draw_steps(trace, TokenIndex.of(trace), law), risk="p95")
    for problem in (plain, sampled):
        front, answer = trace_front(problem, limits=BRIEF)
        best = front.points[front.chosen]
        assert answer.placement is not None
        by_node = problem.replace(objective="copies", copies_level="node", steps=None, risk="mean")
        assert best.node_traffic == pytest.approx(objective_value(by_node, answer.placement))
        if not problem.is_sampled:
            assert best.mean_us is best.p99_us is None
            continue
        values = step_values(problem, answer.placement)
        assert best.mean_us == pytest.approx(values.mean())
        assert best.p99_us == pytest.approx(values.max())
        assert best.mean_us <= best.step_time_us <= best.p99_us
