"""The solver ``setpart``: optima of small layers against brute force, bounds, caps, slots, nodes, stops, seeds."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_problem, make_trace, random_placement, slow_topology

from moeplace.build import build_problem
from moeplace.errors import InputError, ProblemError
from moeplace.hypergraph import Effort, Layer, LayerSearch, Patterns, columns, kernels, layer
from moeplace.hypergraph.anneal import Annealer, Schedule
from moeplace.hypergraph.columns import EverySet, Pool, unranked
from moeplace.hypergraph.exchange import exchanged
from moeplace.hypergraph.master import Master
from moeplace.hypergraph.pairs import pair_bound
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value
from moeplace.readers import open_trace, read_trace
from moeplace.solution import Limits, Report, Status, StopReason
from moeplace.solvers import choose, load_solver, solve
from moeplace.split import parse_split, select

ROOT = Path(__file__).parents[1]
GPT_OSS = ROOT.parent / "shared" / "data" / "gpt_oss_20b_fingerprinting" / "routing.npz"
QUICK = Effort(runs=2, turns=20, swaps=16)


def _tokens(seed: int, experts: int, top_k: int, tokens: int = 60) -> npt.NDArray[np.int64]:
    """``[token, k]`` choices of one layer."""
    return make_trace(seed, tokens=tokens, layers=1, experts=experts, top_k=top_k).experts[:, 0].astype(np.int64)


def _layer(seed: int, experts: int, top_k: int, rooms: list[int], slack: float = np.inf) -> Layer:
    patterns = Patterns.of(_tokens(seed, experts, top_k), experts)
    load = patterns.load.astype(np.float64)
    return Layer(patterns=patterns, load=load, cap=slack * load.sum() / len(rooms), rooms=np.array(rooms))


def _states(rooms: list[int]) -> Iterator[tuple[int, ...]]:
    """Every assignment of experts to groups that fills all rooms."""
    if not sum(rooms):
        yield ()
        return
    for group, room in enumerate(rooms):
        if room:
            rest = [size - (number == group) for number, size in enumerate(rooms)]
            yield from ((group, *others) for others in _states(rest))


def _copies(tokens: npt.NDArray[np.int64], state: tuple[int, ...]) -> int:
    """Copies of all tokens, token by token."""
    return sum(len({state[expert] for expert in token}) for token in tokens.tolist())


def _best(tokens: npt.NDArray[np.int64], one: Layer) -> int | None:
    """Least copies of any state within the cap; None where there is none."""
    least = None
    for state in _states(one.rooms.tolist()):
        if one.keeps_cap(np.array(state)):
            value = _copies(tokens, state)
            least = value if least is None else min(least, value)
    return least


SHAPES = st.sampled_from(
    [[4, 4], [2, 2, 2, 2], [3, 3, 2], [5, 3], [4, 2, 1], [1, 1, 1, 1], [3, 3], [2, 2, 2], [7], [6, 0]]
)


@given(st.integers(0, 10**6), SHAPES, st.integers(1, 5), st.sampled_from([1.02, 1.1, 1.4, np.inf]))
def test_small_layers_are_proved_to_be_what_brute_force_finds(
    seed: int, rooms: list[int], top_k: int, slack: float
) -> None:
    """Value, bound and infeasibility; even and uneven slots, tight and loose caps."""
    experts = sum(rooms)
    top_k = min(top_k, experts)
    one = _layer(seed, experts, top_k, rooms, slack)
    best = _best(_tokens(seed, experts, top_k), one)
    found = LayerSearch(one, QUICK, 0).run()
    assert found.infeasible == (best is None)
    if best is not None:
        assert found.group is not None
        assert one.keeps_cap(found.group)
        assert (np.bincount(found.group, minlength=len(rooms)) == rooms).all()
        assert _copies(_tokens(seed, experts, top_k), tuple(found.group)) == found.value == found.bound == best
    assert pair_bound(one.patterns, one.rooms) <= min(_copies(_tokens(seed, experts, top_k), s) for s in _states(rooms))


@pytest.mark.parametrize("seed", range(3))
def test_larger_layers_are_proved_again_by_dynamic_programming(seed: int) -> None:
    """Twelve experts in threes and fours: the optimum over subsets, by an independent recursion."""
    for rooms in ([3, 3, 3, 3], [4, 4, 4]):
        one = _layer(seed, 12, 4, rooms, 1.1)
        size, masks = rooms[0], one.patterns.masks()[:, 0]
        least = {0: 0}
        for mask in range(1, 1 << 12):
            if mask.bit_count() % size:
                continue
            low = (mask & -mask).bit_length() - 1
            rest = [e for e in range(12) if mask >> e & 1 and e != low]
            ways = []
            for others in itertools.combinations(rest, size - 1):
                held = [low, *others]
                part = sum(1 << e for e in held)
                if one.load[held].sum() <= one.cap * (1 + 1e-9) and mask ^ part in least:
                    ways.append(least[mask ^ part] + int(one.patterns.weight[(masks & np.uint64(part)) > 0].sum()))
            if ways:
                least[mask] = min(ways)
        found = LayerSearch(one, Effort(), 0).run()
        assert found.infeasible == ((1 << 12) - 1 not in least)
        if not found.infeasible:
            assert found.proved
            assert found.value == least[(1 << 12) - 1]


@pytest.mark.parametrize(
    ("experts", "top_k", "size"), [(9, 3, 4), (10, 4, 5), (8, 2, 3), (9, 5, 3), (7, 6, 6), (6, 3, 1)]
)
def test_costs_and_prices_of_all_sets_agree(
    monkeypatch: pytest.MonkeyPatch, experts: int, top_k: int, size: int
) -> None:
    """Listed and counted through; the loops are run uncompiled. A cost is that of a token-by-token count."""
    for name in ("cost_loop", "scan_loop", "hit_loop"):
        own = getattr(kernels, name)
        monkeypatch.setattr(columns, f"compiled_{name.split('_')[0]}s".replace("scans", "scan"), lambda own=own: own)
    tokens = _tokens(1, experts, top_k)
    one = _layer(1, experts, top_k, [experts], 1.0)
    cap = 1.1 * size * float(one.load.mean())
    listed, counted = (EverySet(one.patterns, size, one.load, cap, listed=kept) for kept in (True, False))
    assert listed.pool is not None
    assert listed.pool.cost.tolist() == [
        sum(bool(set(t) & set(s)) for t in tokens.tolist()) for s in listed.pool.members.tolist()
    ]
    price = np.random.default_rng(0).random(experts) * 30
    least, added = listed.price(price)
    assert counted.price(price)[0] == pytest.approx(least)
    assert added.reduced(price).min() == pytest.approx(least)
    assert counted.price(price)[1].reduced(price).min() == pytest.approx(least)
    near = [every.within(price, least + 15, 10**4) for every in (listed, counted)]
    assert near[0] is not None
    assert near[1] is not None
    assert near[0].members.tolist() == near[1].members.tolist()
    assert near[0].cost.tolist() == near[1].cost.tolist()
    assert counted.within(price, least + 1e9, 1) is None
    every = list(itertools.combinations(range(experts), size))
    assert unranked(np.arange(len(every)), experts, size).tolist() == [list(chosen) for chosen in every]


@pytest.mark.parametrize("rooms", [[4, 4], [3, 3, 2], [2, 2, 2, 2]], ids=str)
def test_generated_columns_prove_the_same(monkeypatch: pytest.MonkeyPatch, rooms: list[int]) -> None:
    """Where sets are counted through instead of listed, prices come by column generation; the optimum is the same."""
    one = _layer(3, 8, 3, rooms, 1.15)
    listed = LayerSearch(one, QUICK, 0).run()
    monkeypatch.setattr(columns, "LISTED", 0)
    counted = LayerSearch(one, QUICK, 0).run()
    assert (counted.value, counted.bound) == (listed.value, listed.bound)


@pytest.mark.parametrize("rooms", [[4, 4], [3, 3, 2], [2, 2, 2, 2]], ids=str)
def test_layers_too_large_to_count_through_keep_cap_and_bound(
    monkeypatch: pytest.MonkeyPatch, rooms: list[int]
) -> None:
    """Annealing, exchanges and the programme over their columns, made to do what enumeration would."""
    monkeypatch.setattr(layer, "enumerable", lambda *_: False)
    for seed in range(4):
        one = _layer(seed, 8, 3, rooms, 1.3)
        best = _best(_tokens(seed, 8, 3), one)
        found = LayerSearch(one, QUICK, 0).run()
        if best is not None and found.group is not None:
            assert one.keeps_cap(found.group)
            assert found.bound <= best <= found.value <= 1.1 * best
            assert found.value == _copies(_tokens(seed, 8, 3), tuple(found.group))


def test_annealing_counts_right_and_keeps_the_cap() -> None:
    """The tables kept by increments give the copies of the state they end in."""
    one = _layer(5, 12, 4, [4, 4, 4], 1.1)
    start = np.repeat(np.arange(3), 4)
    best, met = Annealer(one.patterns, one.load, one.cap, 3).run(start, Schedule(turns=20, swaps=200), 1)
    again, _ = Annealer(one.patterns, one.load, one.cap, 3).run(start, Schedule(turns=20, swaps=200), 1)
    assert best.tolist() == again.tolist()
    assert one.patterns.copies(best, 3) <= min(one.patterns.copies(state, 3) for state in [best, *met])
    optimum = LayerSearch(one, Effort(), 0).run().value
    assert optimum <= one.patterns.copies(best, 3) <= 1.03 * optimum
    for state in [best, *met]:
        assert one.keeps_cap(state)
        assert np.bincount(state).tolist() == [4, 4, 4]


def test_exchanges_cost_what_they_say() -> None:
    """Sets met on the way have the cost of a full count, and the last one a lower reduced cost than the first."""
    one = _layer(2, 10, 3, [5, 5])
    members = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    pool = Pool(members, one.patterns.touching(members))
    price = np.random.default_rng(1).random(10) * 30
    found = exchanged(one.patterns, pool, price, one.load, 0.6 * float(one.load.sum()))
    assert len(found)
    assert found.cost.tolist() == one.patterns.touching(found.members).tolist()
    assert found.reduced(price).min() < pool.reduced(price).min()


@given(st.integers(0, 10**6))
def test_any_prices_bound_every_partition(seed: int) -> None:
    """The Lagrangian bound holds whatever the prices."""
    one = _layer(seed % 50, 6, 3, [3, 3])
    sets = EverySet(one.patterns, 3, one.load, np.inf)
    price = np.random.default_rng(seed).normal(20, 30, 6)
    best = _best(_tokens(seed % 50, 6, 3), one)
    assert best is not None
    assert Master(6, {3: 2}, 1000.0).bound(price, {3: sets.price(price)[0]}) <= best + 1e-6


def test_patterns_of_many_experts_collapse_alike() -> None:
    """Ids that fit one word and ids that do not are counted the same."""
    rng = np.random.default_rng(0)
    tokens = rng.permuted(np.tile(np.arange(12), (40, 1)), axis=1)[:, :6]
    packed, plain = Patterns.of(tokens, 12), Patterns.of(tokens, 2**11)
    assert packed.experts.tolist() == plain.experts.tolist()
    assert packed.weight.tolist() == plain.weight.tolist()
    assert packed.tokens == 40


def _problem(seed: int = 0, topology: str = "scale-up:4", **options: Any) -> Any:
    shape = {name: options.pop(name) for name in ("experts", "top_k", "tokens") if name in options}
    trace = make_trace(seed, **({"tokens": 120, "experts": 8, "top_k": 3} | shape))
    return make_problem(trace, topology, objective="copies", **options)


@pytest.mark.parametrize("level", ["gpu", "node"])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_answers_are_proved_and_recomputed(level: str, cap: float | None) -> None:
    """Both levels: the objective is the recomputed one, its bound is met, every layer is a stage, caps are kept."""
    problem = _problem(topology="scale-out:2x2", copies_level=level, load_cap=cap)
    answer = solve(problem, "setpart")
    assert answer.placement is not None
    assert answer.objective == objective_value(problem, answer.placement)
    assert len(answer.stages) == problem.num_layers
    assert np.mean([stage.objective for stage in answer.stages]) == pytest.approx(answer.objective)
    if level == "gpu":
        assert (answer.status, answer.stop_reason, answer.gap) == (Status.OPTIMAL, StopReason.PROVEN, 0.0)
    if cap is not None:
        assert (max_over_mean(answer.placement, problem.stats.load) <= cap * (1 + 1e-9)).all()
    assert answer.history


def test_uneven_slots_and_gpus_without_any() -> None:
    """GPUs hold what their slots say; the proof is over exactly those placements."""
    problem = _problem(slots_per_gpu=[4, 3, 1, 0])
    answer = solve(problem, "setpart")
    assert answer.placement is not None
    assert answer.placement.copies().sum(axis=2).tolist() == [[4, 3, 1, 0]] * 2
    assert answer.status is Status.OPTIMAL


def test_spare_slots_stay_empty_and_nothing_is_called_proved() -> None:
    """Copies of experts could save more, so the bound is only the general one."""
    answer = solve(_problem(redundant=4), "setpart")
    assert answer.placement is not None
    assert (answer.placement.replicas() == 1).all()
    assert answer.status is Status.FEASIBLE
    assert "spare slots stay empty" in answer.notes[0]


def test_same_seed_same_bytes_whatever_the_threads() -> None:
    """Layers are solved alone, so neither threads nor their order matter."""
    problem = _problem(load_cap=1.4)
    one, other = (solve(problem, "setpart", Limits(seed=5, threads=threads)) for threads in (1, 3))
    assert one.placement is not None
    assert other.placement is not None
    assert one.placement.digest() == other.placement.digest()
    assert (one.objective, one.bound, one.status) == (other.objective, other.bound, other.status)


def test_an_interrupt_keeps_the_start() -> None:
    """Stopped before the first layer the start is the answer, with the general bound and the reason."""
    stop = threading.Event()
    stop.set()
    problem = _problem()
    start = random_placement(1, problem.slots_per_gpu, 2, 8)
    answer = solve(problem.replace(start=start), "setpart", Limits(stop=stop))
    assert answer.placement is not None
    assert answer.objective == objective_value(problem, start)
    assert answer.stop_reason is StopReason.INTERRUPTED
    assert answer.status is Status.FEASIBLE


def test_a_layer_stopped_midway_keeps_what_it_has() -> None:
    """Whenever the search is stopped, the best state is within the cap and the bound below the optimum."""
    one = _layer(4, 8, 3, [2, 2, 2, 2], 2.0)
    best = _best(_tokens(4, 8, 3), one)
    assert best is not None
    for asked in range(8):
        left = iter([False] * asked)
        found = LayerSearch(one, QUICK, 0, stop=lambda left=left: next(left, True)).run()
        assert found.bound <= best <= found.value


def test_a_cap_that_no_partition_keeps_is_proved() -> None:
    """Loads 5, 5, 5, 3, 3, 3 on two GPUs: one has at least 13 of 24, whatever floors say."""
    load = [0] * 5 + [1] * 5 + [2] * 5 + [3] * 3 + [4] * 3 + [5] * 3
    trace = make_trace(0, tokens=24, layers=1, experts=6, top_k=1).replace(experts=np.array(load).reshape(24, 1, 1))
    problem = make_problem(trace, "scale-up:2", objective="copies", load_cap=1.05)
    answer = load_solver("setpart").solve(problem, Limits(), Report())
    assert (answer.placement, answer.status, answer.stop_reason) == (None, Status.INFEASIBLE, StopReason.PROVEN)
    assert "no partition keeps the load cap in 1 layers: 0" in answer.notes[-1]
    kept = load_solver("setpart").solve(problem.replace(load_cap=13 / 12), Limits(), Report())
    assert kept.status is Status.OPTIMAL


def test_what_it_refuses() -> None:
    """Other objectives and unknown option values, each with its rule."""
    with pytest.raises(ProblemError, match="objective load"):
        solve(_problem().replace(objective="load"), "setpart")
    with pytest.raises(InputError, match="mode 'slow'"):
        solve(_problem(), "setpart", Limits(options={"mode": "slow"}))
    for value in ("0.5", "tight"):
        with pytest.raises(InputError, match=r"node.cap"):
            solve(
                _problem(topology="scale-out:2x2", copies_level="node"), "setpart", Limits(options={"node-cap": value})
            )


def test_a_node_cap_is_kept() -> None:
    """Nodes keep a cap of their own; GPUs are then only balanced."""
    problem = _problem(topology="scale-out:2x2", copies_level="node")
    answer = solve(problem, "setpart", Limits(options={"node-cap": "1.2"}))
    assert answer.placement is not None
    busy = np.einsum("lge,le->lg", answer.placement.even_share(), problem.stats.load.astype(float))
    node = busy.reshape(2, 2, 2).sum(axis=2)
    assert (node.max(axis=1) <= 1.2 * node.mean(axis=1) * (1 + 1e-9)).all()


def test_the_shipped_trace_is_proved_in_seconds() -> None:
    """Tinymoe on 8 GPUs within EPLB's cap: proved, and the quick mode is within half a percent of it."""
    trace = select(read_trace(ROOT / "traces" / "tinymoe_8x32_top4.npz"), split=parse_split("half:0"), part="fit")
    problem = build_problem(trace, topology="scale-up:8", objective="copies", load_cap="eplb")
    answer = solve(problem, "setpart", Limits(threads=2))
    fast = solve(problem, "setpart", Limits(threads=2, options={"mode": "fast"}))
    assert answer.status is Status.OPTIMAL
    assert answer.objective == pytest.approx(2.9782, abs=1e-4)
    assert answer.objective <= fast.objective <= 1.005 * answer.objective


@pytest.mark.slow
@pytest.mark.skipif(not GPT_OSS.exists(), reason="the gpt-oss trace is not here")
def test_a_real_trace_is_proved() -> None:
    """gpt-oss-20b on 8 GPUs within EPLB's cap: all 24 layers are proved."""
    trace = select(open_trace(GPT_OSS), split=parse_split("half:0"), part="fit")
    problem = build_problem(trace, topology="scale-up:8", objective="copies", load_cap="eplb")
    answer = solve(problem, "setpart", Limits(threads=2))
    assert answer.status is Status.OPTIMAL
    assert answer.objective == pytest.approx(3.0330, abs=1e-4)


def test_auto_saves_copies_where_a_token_is_sent_once_to_each_gpu() -> None:
    """In prefill steps fewest copies under caps are tried for step time, and never make it worse than balance."""
    trace = make_trace(5, tokens=300, layers=2, experts=8, top_k=3)
    problem = make_problem(trace, slow_topology("scale-up:4"), phase="prefill", requests=300)
    tried, why = choose(problem)
    assert [one.slack for one in tried if one.name == "setpart"] == [0.01, 0.03, 0.1]
    assert "GPUs per token" in why
    answer = solve(problem)
    assert answer.objective <= solve(problem, "balance").objective
    assert answer.unit == "µs"
    assert "setpart" not in [one.name for one in choose(problem.replace(law=problem.law.replace(phase="decode")))[0]]
    assert [one.name for one in choose(problem.replace(objective="copies"))[0]] == ["linear", "eplb", "setpart"]
