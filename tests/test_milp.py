"""The linear models and both solvers behind them: what they prove is so, what they stop at is said."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import SolverError, UnknownNameError
from moeplace.milp import BACKENDS, Backend, Budget, LinearModel, backend
from moeplace.milp.cbc import _Log, _run
from moeplace.milp.cpsat import scaled_row, solve_cpsat, true_bound, units
from moeplace.milp.model import Claim, checked_point, judge
from moeplace.solution import Status, StopReason

TELLING = ("cbc", "cpsat")  # backends that tell of incumbents on their way, and keep them when they are stopped
both = pytest.mark.parametrize("solver", BACKENDS.values(), ids=BACKENDS.keys())
telling = pytest.mark.parametrize("solver", [BACKENDS[name] for name in TELLING], ids=TELLING)


def partition(experts: int, clusters: int, seed: int = 0) -> LinearModel:
    """Split random loads into clusters of equal size with the least deviation: quick to build, hard to prove."""
    rng = np.random.default_rng(seed)
    load, model = rng.integers(1000, 9000, experts), LinearModel()
    x = [[model.binary(f"x{c}_{e}") for e in range(experts)] for c in range(clusters)]
    away = [model.integer(f"d{c}", 0, int(clusters * load.sum()), implied=True) for c in range(clusters)]
    for e in range(experts):
        model.add([(x[c][e], 1) for c in range(clusters)], 1, 1)
    for c in range(clusters):
        size = experts // clusters
        model.add([(v, 1) for v in x[c]], size, size)
        held = [(v, int(clusters * p)) for v, p in zip(x[c], load, strict=True)]
        model.add([*held, (away[c], -1)], upper=int(load.sum()))
    model.minimise([(v, 2 / clusters) for v in away])
    return model


def random_model(seed: int) -> LinearModel:
    """Six binaries, an integer, fractional coefficients of both signs, one-sided, ranged and equal rows."""
    rng = np.random.default_rng(seed)
    model = LinearModel()
    x = [model.binary(f"x{i}") for i in range(6)] + [model.integer("n", -2, 3)]
    for _ in range(int(rng.integers(1, 4))):
        row = rng.normal(size=7).round(3) * rng.integers(0, 2, 7)
        centre = float(row @ rng.integers(0, 2, 7))
        kind = rng.integers(0, 3)
        low, high = centre - rng.random(), centre + rng.random()
        model.add(zip(x, row, strict=True), *((low, math.inf), (-math.inf, high), (low, high))[kind])
    model.add([(x[0], 1), (x[1], 1), (x[2], 1)], 1, 1)
    model.minimise(zip(x, rng.normal(size=7), strict=True))
    return model


def best_value(model: LinearModel) -> float:
    """Optimum over all points of a model of integers; infinite where none is feasible."""
    ranges = [range(int(a), int(b) + 1) for a, b in zip(model.lower, model.upper, strict=True)]
    points = [point for point in itertools.product(*ranges) if model.violation(point) <= 1e-9]
    return min((model.objective_of(point) for point in points), default=math.inf)


@both
@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_is_the_one_of_brute_force(solver: Backend, seed: int) -> None:
    """A proven optimum is the least value over all points; a proven infeasibility means that there are none."""
    model = random_model(seed)
    answer, expected = solver(model, Budget(work=5), None), best_value(model)
    if math.isinf(expected):
        assert (answer.status, answer.values, answer.stop_reason) == (Status.INFEASIBLE, None, StopReason.PROVEN)
        return
    assert (answer.status, answer.stop_reason) == (Status.OPTIMAL, StopReason.PROVEN)
    assert answer.objective == pytest.approx(expected, abs=1e-6)
    assert answer.values is not None
    assert model.violation(answer.values) <= 1e-6


@both
def test_continuous_variables_are_exact(solver: Backend) -> None:
    """The objective of a mixed model is that of its integers with the best continuous values, in float64."""
    model = LinearModel()
    n, x = model.integer("n", 0, 5), model.continuous("x", 0, 4)
    model.add([(n, 1.1), (x, 1.0)], lower=math.pi)
    model.minimise([(n, 1.0), (x, 1.0)])
    answer = solver(model, Budget(work=1), None)
    assert answer.status is Status.OPTIMAL
    assert answer.values is not None
    assert answer.values.tolist() == pytest.approx([2.0, math.pi - 2.2], abs=1e-12)
    assert answer.objective == pytest.approx(math.pi - 0.2, abs=1e-12)


def test_a_grid_proves_what_it_can() -> None:
    """Where a variable's range dwarfs the optimum the grid leaves a gap, which is stated: no proof is claimed."""
    model = LinearModel()
    n, x = model.integer("n", 0, 3), model.continuous("x", 0, 1e5)
    model.add([(n, 0.1), (x, 1.0)], lower=1.0)
    model.minimise([(x, 1.0)])
    answer = solve_cpsat(model, Budget(work=1))
    assert answer.objective == pytest.approx(0.7)
    assert answer.bound is not None
    assert answer.bound < 0.7
    assert (answer.status, answer.stop_reason) == (Status.FEASIBLE, StopReason.EXHAUSTED)


def test_backends_agree_where_both_prove() -> None:
    """Two solvers that both say optimal name the same value."""
    for seed in range(3):
        values = [solve(partition(12, 3, seed), Budget(work=20), None) for solve in BACKENDS.values()]
        assert [answer.status for answer in values] == [Status.OPTIMAL] * len(BACKENDS)
        for answer in values[1:]:
            assert answer.objective == pytest.approx(values[0].objective)


@both
def test_a_cut_search_is_honest(solver: Backend) -> None:
    """At the end of its work a search says FEASIBLE and EXHAUSTED, with a bound below the value."""
    answer = solver(partition(32, 8), Budget(work=0.3), None)
    assert (answer.status, answer.stop_reason) == (Status.FEASIBLE, StopReason.EXHAUSTED)
    assert answer.objective is not None
    assert answer.bound is not None
    assert answer.bound < answer.objective


@both
def test_a_gap_reached_is_not_called_optimal(solver: Backend) -> None:
    """Stopping at a gap is FEASIBLE and GAP unless the bound meets the value."""
    answer = solver(partition(12, 4, 2), Budget(work=20, gap=0.6), None)
    assert answer.objective is not None
    assert answer.bound is not None
    closed = answer.objective - answer.bound <= 1e-6 * answer.objective
    assert (answer.status, answer.stop_reason) == (
        (Status.OPTIMAL, StopReason.PROVEN) if closed else (Status.FEASIBLE, StopReason.GAP)
    )
    assert answer.objective - answer.bound <= 0.6 * answer.objective + 1e-6


@both
def test_the_time_limit_is_kept(solver: Backend) -> None:
    """A run cut by the clock ends within 1.1·T + 1 s, says TIME_LIMIT and keeps what it has."""
    started = time.monotonic()
    answer = solver(partition(32, 8), Budget(work=1e6, time_limit_s=1.5), None)
    assert time.monotonic() - started <= 1.1 * 1.5 + 1
    assert (answer.status, answer.stop_reason) == (Status.FEASIBLE, StopReason.TIME_LIMIT)


@telling
def test_an_interrupt_keeps_the_best(solver: Backend) -> None:
    """When the stop flag is set, the answer is at least as good as the last incumbent that was told."""
    stop, told = threading.Event(), [math.inf]
    threading.Timer(1.2, stop.set).start()
    answer = solver(partition(32, 8), Budget(work=1e6, stop=stop), lambda value, _: told.append(value))
    assert answer.stop_reason is StopReason.INTERRUPTED
    assert answer.objective is not None
    assert answer.objective <= told[-1] + 1.0  # CP-SAT tells values of its grid and relaxed rows


def test_highs_is_ended_and_its_start_is_kept() -> None:
    """A backend that cannot be asked to stop is ended: a start survives, and nothing is known without one."""
    model, stop = partition(32, 8), threading.Event()
    model.begin_at(solve_cpsat(model, Budget(work=0.3)).values if model.start is None else model.start)
    threading.Timer(1.0, stop.set).start()
    started = time.monotonic()
    answer = backend("highs")(model, Budget(work=1e6, stop=stop), None)
    assert time.monotonic() - started <= 3
    assert (answer.status, answer.stop_reason) == (Status.FEASIBLE, StopReason.INTERRUPTED)
    assert answer.values is not None


SCRIPT = """
import signal, sys, threading
sys.path.insert(0, {tests!r})
from test_milp import partition
from moeplace.milp import BACKENDS, Budget
stop = threading.Event()
signal.signal(signal.SIGINT, lambda *_: stop.set())
print("ready", flush=True)
budget = Budget(work=1e6, time_limit_s=20, stop=stop)
answer = BACKENDS[{name!r}](partition(32, 8), budget, lambda *_: print("news", flush=True))
print(answer.stop_reason.value, answer.values is not None)
"""


@pytest.mark.parametrize("name", TELLING)
def test_control_c_keeps_the_best(name: str) -> None:
    """A SIGINT to the whole process group, as a terminal sends it, ends the run with its incumbent, not a traceback."""
    code = SCRIPT.format(tests=str(Path(__file__).parent), name=name)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == "news\n"
        os.killpg(process.pid, signal.SIGINT)
        last = process.stdout.read().splitlines()[-1]
    assert (process.returncode, last) == (0, "interrupted True")


HIGHSPY = """
import sys
print("first" if "ortools.sat.python.cp_model" in sys.modules else "too late")
raise ImportError("a stand-in")
"""


def test_ortools_loads_before_highspy(tmp_path: Path) -> None:
    """PuLP loads highspy where it is installed, after which OR-Tools cannot load: so OR-Tools goes first."""
    (tmp_path / "highspy.py").write_text(HIGHSPY)
    paths = [str(tmp_path), str(Path(__file__).parent)]
    setting = f"import sys; sys.path[:0] = {paths!r}; from test_milp import *"
    code = f"{setting}; print(backend('cbc')(partition(4, 2), Budget(), None).status.value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.split("\n")
    assert "too late" not in lines
    assert "optimal" in lines


@both
def test_same_input_same_bytes(solver: Backend) -> None:
    """Seed and work decide the answer; a rerun gives the same bytes."""
    one, other = (solver(partition(32, 8), Budget(work=0.3, seed=5), None) for _ in range(2))
    assert one.values is not None
    assert other.values is not None
    assert one.values.tobytes() == other.values.tobytes()
    assert one.bound == other.bound


@both
def test_a_start_is_never_lost(solver: Backend) -> None:
    """A feasible start is returned, or something better, even when the search is stopped before it begins."""
    model, stop = partition(12, 3), threading.Event()
    answer = solver(model, Budget(work=0.01, gap=0.99), None)
    assert answer.values is not None
    stop.set()
    again = partition(12, 3)
    again.begin_at(answer.values)
    kept = solver(again, Budget(stop=stop), None)
    assert kept.objective is not None
    assert answer.objective is not None
    assert kept.objective <= answer.objective
    assert kept.stop_reason in (StopReason.INTERRUPTED, StopReason.PROVEN)


@both
def test_nothing_found_is_unknown(solver: Backend) -> None:
    """Stopped before a first solution, a search knows nothing: no values, UNKNOWN, never INFEASIBLE."""
    stop = threading.Event()
    stop.set()
    answer = solver(partition(64, 16), Budget(stop=stop), None)
    assert answer.stop_reason is StopReason.INTERRUPTED
    assert answer.status is (Status.UNKNOWN if answer.values is None else Status.FEASIBLE)


@both
def test_news_gets_better(solver: Backend) -> None:
    """Told objectives never rise, told bounds never fall or pass the optimum."""
    news: list[tuple[float, float | None]] = []
    answer = solver(partition(12, 4, 1), Budget(work=20), lambda value, bound: news.append((value, bound)))
    values = [value for value, _ in news]
    bounds = [bound for _, bound in news if bound is not None]
    assert answer.status is Status.OPTIMAL
    assert answer.objective is not None
    assert values == sorted(values, reverse=True)
    assert bounds == sorted(bounds)
    assert all(bound <= answer.objective + 1e-6 for bound in bounds)


@both
def test_odd_models(solver: Backend) -> None:
    """Fixed, unused and rowless variables, an empty objective and a constant in the objective are all fine."""
    model = LinearModel()
    fixed, loose = model.continuous("fixed", 7.5, 7.5), model.integer("loose", 2, 4)
    model.continuous("unused", 1.0, 2.0)
    x = model.binary("x")
    model.add([(x, 1), (fixed, 2.0)], lower=15.5)
    model.minimise([(fixed, 1.0), (x, 3.0), (loose, 1.0)])
    answer = solver(model, Budget(work=1), None)
    assert (answer.status, answer.objective) == (Status.OPTIMAL, 12.5)
    model.minimise([])
    assert solver(model, Budget(work=1), None).objective == 0.0


def test_unbounded_and_unscalable_models() -> None:
    """CBC proves nothing about an unbounded model; CP-SAT refuses a variable without bounds by name."""
    model = LinearModel()
    free = model.continuous("free", -math.inf, math.inf)
    model.add([(free, 1.0)], upper=4)
    model.minimise([(free, 1.0)])
    answer = backend("cbc")(model, Budget(work=1), None)
    assert (answer.status, answer.bound) in ((Status.UNKNOWN, None), (Status.FEASIBLE, None))
    with pytest.raises(SolverError, match="free has no finite bounds"):
        solve_cpsat(model, Budget(work=1))
    with pytest.raises(UnknownNameError, match="cbc"):
        backend("cbcc")


@given(st.integers(0, 10**6), st.integers(-6, 6))
def test_scaling_errs_by_no_more_than_it_says(seed: int, magnitude: int) -> None:
    """For any point, the integer row differs from the exact one by at most the error it states."""
    rng, model = np.random.default_rng(seed), LinearModel()
    for i in range(6):
        low = float(rng.normal())
        if rng.random() < 0.5:
            model.integer(f"n{i}", math.floor(low), math.floor(low) + int(rng.integers(0, 5)))
        else:
            model.continuous(f"x{i}", low, low + float(rng.random()) * 10.0**magnitude)
    terms = {i: float(a) for i, a in enumerate(rng.normal(size=6) * 10.0 ** rng.integers(-3, 4))}
    grid = units(model)
    row = scaled_row(model, terms, grid)
    point = [rng.uniform(a, b) for a, b in zip(model.lower, model.upper, strict=True)]
    point = [round(x) if whole else x for x, whole in zip(point, model.is_integer, strict=True)]
    steps = [
        x if whole else (0 if unit == 0 else round((x - low) / unit))
        for x, low, unit, whole in zip(point, model.lower, grid, model.is_integer, strict=True)
    ]
    exact = row.factor * math.fsum(a * point[i] for i, a in terms.items())
    scaled = sum(a * steps[i] for i, a in row.terms) + row.constant
    assert abs(exact - scaled) <= row.error * (1 + 1e-9) + 1e-9 * abs(row.constant) + 1e-9


def test_whole_numbers_are_scaled_exactly() -> None:
    """Rows of integers with whole coefficients lose nothing, and a bound comes back as it was."""
    model = LinearModel()
    x = [model.integer(f"x{i}", 0, 9) for i in range(3)]
    row = scaled_row(model, dict(zip(x, (6.0, -9.0, 12.0), strict=True)), units(model))
    assert (row.error, row.terms) == (0.0, ((0, 2), (1, -3), (2, 4)))
    assert true_bound(row, 5.0) == 15.0
    thirds = scaled_row(model, dict.fromkeys(x, 2 / 3), units(model))
    assert (thirds.error, thirds.terms) == (0.0, ((0, 1), (1, 1), (2, 1)))
    assert true_bound(row, -math.inf) is None


def test_violation_measures_what_is_broken() -> None:
    """Bounds, integrality and rows are all checked; a feasible point has none."""
    model = LinearModel()
    n, x = model.integer("n", 0, 3), model.continuous("x", 0, 1)
    model.add([(n, 1.0), (x, 1.0)], lower=1, upper=2)
    assert model.violation([1, 0.5]) == 0.0
    assert model.violation([0.5, 0.75]) == 0.5
    assert model.violation([-1, 0.0]) >= 1.0
    assert model.violation([0, 0.25]) == pytest.approx(0.75)
    assert model.violation([1]) == math.inf
    assert model.violation([math.nan, 0]) == math.inf


def test_a_rough_point_is_completed() -> None:
    """Integers are rounded and the continuous variables chosen anew; a point that rounds wrong is refused."""
    model = LinearModel()
    n, x = model.integer("n", 0, 3), model.continuous("x", 0, 10)
    model.add([(n, 1.0), (x, 1.0)], lower=2.5)
    model.minimise([(x, 1.0)])
    point = checked_point(model, [1.9999, 9.0])
    assert point is not None
    assert point.tolist() == [2.0, 0.5]
    model.add([(n, 1.0)], upper=1)
    assert checked_point(model, [1.9999, 9.0]) is None


def test_claims_are_judged() -> None:
    """A bad point is no answer, however sure the solver; a feasible start refutes infeasibility; bounds make proofs."""
    model = LinearModel()
    x = model.binary("x")
    model.add([(x, 1.0)], lower=1)
    model.minimise([(x, 4.0)])

    def said(point: list[float] | None, bound: float | None, reason: StopReason, infeasible: bool = False) -> tuple:
        answer = judge(model, Claim(point=point, bound=bound, infeasible=infeasible, stop_reason=reason), gap=0.3)
        return answer.objective, answer.bound, answer.status, answer.stop_reason

    assert said([0.0], 0.0, StopReason.PROVEN) == (None, 0.0, Status.UNKNOWN, StopReason.EXHAUSTED)
    assert said([1.0], 4.0, StopReason.TIME_LIMIT) == (4.0, 4.0, Status.OPTIMAL, StopReason.PROVEN)
    assert said([1.0], 3.0, StopReason.PROVEN) == (4.0, 3.0, Status.FEASIBLE, StopReason.GAP)
    assert said([1.0], 2.0, StopReason.PROVEN) == (4.0, 2.0, Status.FEASIBLE, StopReason.EXHAUSTED)
    assert said(None, None, StopReason.PROVEN, True) == (None, None, Status.INFEASIBLE, StopReason.PROVEN)
    model.begin_at([1.0])
    assert said(None, None, StopReason.PROVEN, True)[2] is Status.FEASIBLE
    model.begin_at({x: 0.0})
    assert model.start is None


def test_the_log_of_a_process_is_read_to_its_end() -> None:
    """No line is lost when a process ends right after its last one, whose result is in it."""
    code = "print('.\\n' * 3000 + 'Result - Optimal solution found', end='\\n', flush=True)"
    for _ in range(20):
        log = _Log(1.0, None)
        assert _run([sys.executable, "-S", "-c", code], threading.Event(), math.inf, log) is None
        assert log.result == "optimal solution found"
