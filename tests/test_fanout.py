"""Laws of :mod:`moeplace.fanout`, of annealing replicas, and of the solver that uses both."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shell import Shell
from strategies import (
    every_placement,
    make_problem,
    make_trace,
    random_placement,
    relabel_placement,
    slow_topology,
)

from moeplace import fanout
from moeplace.bounds import load_floor
from moeplace.chains.anneal import LOG_LEVELS
from moeplace.errors import InputError, ProblemError
from moeplace.exporters import read_placement
from moeplace.exporters.native import document_of
from moeplace.hypergraph import Patterns, replicas, serving
from moeplace.hypergraph.anneal import Schedule
from moeplace.hypergraph.replicas import CopyAnnealer
from moeplace.hypergraph.serving import Incidence, Serving
from moeplace.metrics import max_over_mean, token_metrics
from moeplace.objective import load_ratio, objective_value, router_of
from moeplace.placement import EMPTY, Placement
from moeplace.problem import OBJECTIVES
from moeplace.routing import EVEN, FEWEST, POLICIES, Router
from moeplace.scoring import score
from moeplace.solution import Limits, Status
from moeplace.solvers import solve
from moeplace.topology import load_topology

LIMITS = Limits(time_limit_s=60.0, options={"runs": "1"})


def case(seed: int, tokens: int = 60, top_k: int = 4) -> tuple[Placement, np.ndarray]:
    """A placement with copies, and tokens [token, layer, k] for it."""
    rng = np.random.default_rng(seed)
    room = rng.integers(1, 5, rng.integers(2, 6))
    room[0] += max(0, 7 - room.sum())
    chosen = np.argsort(rng.random((tokens, 1, 7)), axis=2)[:, :, :top_k]
    return random_placement(seed, room, 1, 7), chosen


def fewest(placement: Placement, tokens: np.ndarray) -> list[int]:
    """Fewest GPUs that each token can visit, of all choices of copies."""
    hosts = [np.flatnonzero(held) for held in placement.copies()[0].T]
    return [min(len(set(way)) for way in itertools.product(*[hosts[e] for e in token])) for token in tokens[:, 0]]


def router(placement: Placement, tokens: np.ndarray | None) -> Router:
    """The policy on one switch, learnt from the tokens."""
    return Router.of(placement, load_topology(f"scale-up:{placement.num_gpus}"), FEWEST, None, tokens)


@given(st.integers(0, 10**6))
def test_no_choice_of_copies_visits_fewer_gpus(seed: int) -> None:
    """Every token visits as few GPUs as any choice among the copies of its experts allows, learnt or not."""
    placement, tokens = case(seed)
    best = fewest(placement, tokens)
    for way in (router(placement, tokens), router(placement, None)):
        slot = way.choose(0, tokens[:, 0], np.arange(len(tokens)), np.zeros(len(tokens), int))
        assert np.array_equal(placement.slots[0].ravel()[slot], tokens[:, 0])
        assert [len(set(row)) for row in (slot // placement.max_slots).tolist()] == best


@given(st.integers(0, 10**6))
def test_annealing_counts_what_tokens_visit(seed: int) -> None:
    """The annealer's copies are the sum over tokens of the fewest GPUs, before and after a run."""
    placement, tokens = case(seed)
    room = (placement.slots[0] != EMPTY).sum(axis=1)
    annealer = CopyAnnealer(Patterns.of(tokens[:, 0], 7), room)
    assert annealer.copies(placement.slots[0].astype(np.int64)) == sum(fewest(placement, tokens))
    slots = annealer.run(placement.slots[0].astype(np.int64), np.inf, Schedule(turns=3, swaps=20), seed)
    found = Placement(slots=slots[None], num_experts=7)
    found.check_fits(room)
    assert annealer.copies(slots) == sum(fewest(found, tokens)) <= sum(fewest(placement, tokens))


def test_shares_are_what_choices_come_to() -> None:
    """Over many tokens of each pattern every GPU serves its expected share of every expert."""
    for seed in range(4):
        placement, tokens = case(seed, tokens=30)
        way = router(placement, tokens)
        many = np.repeat(tokens, 600, axis=0)
        slot = way.choose(0, many[:, 0], np.arange(len(many)), np.zeros(len(many), int))
        served = np.zeros((placement.num_gpus, 7))
        np.add.at(served, (slot // placement.max_slots, many[:, 0]), 1)
        assert served / served.sum(axis=0) == pytest.approx(way.gpu_share(placement.num_gpus)[0], abs=0.03)


@given(st.integers(0, 10**6))
def test_learnt_weights_never_load_a_gpu_more(seed: int) -> None:
    """The busiest GPU of the profile has no more than with weights all alike."""
    placement, tokens = case(seed)
    load = np.bincount(tokens[:, 0].ravel(), minlength=7)[None]
    learnt, plain = router(placement, tokens), router(placement, None).measured(tokens)
    assert max_over_mean(placement, load, learnt)[0] <= max_over_mean(placement, load, plain)[0] + 1e-9


def test_weights_even_out_by_hand() -> None:
    """Two GPUs hold a free expert; one also holds a busy one: the free expert's tokens go to the other GPU."""
    placement = Placement(slots=np.array([[[0, 1], [0, 2]]]), num_experts=3)
    tokens = np.array([[1]] * 30 + [[0]] * 30 + [[2]] * 0)[:, None]
    share = router(placement, tokens).gpu_share(2)[0, :, 0]
    assert share[0] < 0.01
    assert share.sum() == pytest.approx(1)


@given(st.integers(0, 10**6))
def test_compiled_and_plain_loops_agree(seed: int) -> None:
    """Choices, shares and visits are the same whether compiled or not."""
    placement, tokens = case(seed)
    table = router(placement, None).table.of_layer(0)
    weight = np.random.default_rng(seed).random(placement.num_gpus) + 0.01
    ids = np.ascontiguousarray(tokens[:, 0].astype(np.int64))
    hashes = fanout.np.arange(len(ids), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    chosen, shared = [], []
    with np.errstate(over="ignore"):
        for choose in (fanout._choose_loop, fanout._compiled_choice()):
            out = np.zeros(ids.shape, np.int64)
            choose(ids, hashes, *table, weight, out)
            chosen.append(out.tolist())
    for share in (fanout._share_loop, fanout._compiled_shares()):
        served = np.zeros((placement.num_gpus, 7))
        share(ids, np.ones(len(ids)), *table, weight, served)
        shared.append(served)
    assert chosen[0] == chosen[1]
    assert shared[0] == pytest.approx(shared[1])


def test_a_compiled_run_anneals_alike() -> None:
    """A run of the compiled kernel ends in the state of the plain one."""
    placement, tokens = case(3, tokens=80)
    room = (placement.slots[0] != EMPTY).sum(axis=1)
    annealer = CopyAnnealer(Patterns.of(tokens[:, 0], 7), room)
    start, cap = placement.slots[0].astype(np.int64), 1.3 * tokens.size / len(room)
    schedule, found = Schedule(turns=4, swaps=60, hot=0.6), []
    for limit in (10**12, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replicas, "COMPILE_FROM", limit)
            found.append(annealer.run(start, cap, schedule, 5).tolist())
    assert found[0] == found[1]


@given(st.integers(0, 10**6))
def test_renaming_experts_changes_nothing(seed: int) -> None:
    """With experts renamed in placement and tokens alike, every selection is served by the same slot."""
    placement, tokens = case(seed)
    order = np.random.default_rng(seed).permutation(7)
    plain, renamed = router(placement, None), router(relabel_placement(placement, order), None)
    number, home = np.arange(len(tokens)), np.zeros(len(tokens), int)
    assert np.array_equal(
        plain.choose(0, tokens[:, 0], number, home), renamed.choose(0, order[tokens[:, 0]], number, home)
    )


def test_the_solver_claims_what_the_evaluator_says() -> None:
    """The answer's value is that of a score of the same tokens; its file carries the routing, and its load the cap."""
    problem = make_problem(
        make_trace(3, tokens=300, experts=8, top_k=3), slow_topology("scale-up:4"), redundant=4, objective="copies"
    ).replace(routing=FEWEST, load_cap=1.25)
    answer = solve(problem, "fanout", LIMITS)
    placement = answer.placement
    assert placement is not None
    assert answer.objective == objective_value(problem, placement)
    assert (load_ratio(problem, placement) <= 1.25 + 1e-9).all()
    sample = problem.stats.sample
    assert sample is not None
    (told,) = score(
        sample, {"a": placement}, problem.topology, problem.model, phase="decode", requests=2, batches=5,
        routings={"a": FEWEST},
    )  # fmt: skip
    assert told.traffic.copies_per_token_gpu == pytest.approx(answer.objective)
    assert told.max_over_mean == pytest.approx(load_ratio(problem, placement))
    assert told.execution.routing == FEWEST
    assert document_of(problem, answer).details["routing"] == FEWEST
    bare = solve(problem.replace(slots_per_gpu=[2] * 4, load_cap=None), "setpart")
    assert answer.objective < bare.objective


def test_answers_are_the_same_bytes_and_never_worse_than_a_start() -> None:
    """Threads change nothing; a start within the cap is kept or beaten."""
    problem = make_problem(
        make_trace(4, tokens=200, experts=8, top_k=3), slow_topology("scale-up:4"), redundant=4, objective="copies"
    ).replace(routing=FEWEST)
    one, other = (solve(problem, "fanout", LIMITS.replace(threads=threads)) for threads in (1, 2))
    assert one.placement is not None
    assert other.placement is not None
    assert one.placement.digest() == other.placement.digest()
    again = solve(problem.replace(start=one.placement), "fanout", LIMITS.replace(seed=9))
    assert again.objective <= one.objective + 1e-12


@pytest.mark.parametrize("gpus", [70, 128])
def test_more_gpus_than_bits_of_a_word(gpus: int) -> None:
    """Copies are placed on any number of GPUs, on fewer of them per token than experts."""
    problem = make_problem(
        make_trace(5, tokens=150, layers=1, experts=128, top_k=4), f"scale-up:{gpus}",
        slots_per_gpu=[2] * (140 - gpus) + [1] * (2 * gpus - 140), objective="copies",
    ).replace(routing=FEWEST)  # fmt: skip
    answer = solve(problem, "fanout", LIMITS)
    assert answer.placement is not None
    assert answer.objective == objective_value(problem, answer.placement)
    assert answer.objective < 4  # experts


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_tables_after_a_turn_are_those_of_its_state(seed: int, word: int) -> None:
    """What proposals keep up to date is what a fresh look at the state says, for words of any number of GPUs."""
    placement, tokens = case(seed, tokens=25, top_k=5)
    slots = placement.slots[0].astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "WORD", word)
        patch.setattr(replicas, "WORD", word)
        incidence = Incidence.of_patterns(Patterns.of(tokens[:, 0], 7))
        tables, busy = Serving.of_slots(slots, incidence), np.zeros(len(slots))
        serving.fill(incidence, tables)
        serving.loads(incidence, tables, busy)
        state, now = slots.ravel().copy(), np.array([int(tables.cost @ incidence.weight)])
        best, least = state.copy(), np.array([2**62])
        state[state < 0] = replicas.CLOSED
        rng = np.array([seed + 1], np.uint64)
        with np.errstate(over="ignore"):
            replicas._turn(
                incidence, tables, 1.2 * tokens.size / len(slots), state, slots.shape[1], busy, now, best, least, 60,
                4.0, 0.3, 0.1, LOG_LEVELS, rng,
            )  # fmt: skip
        after = np.maximum(state, EMPTY).reshape(slots.shape)
        fresh, load = Serving.of_slots(after, incidence), np.zeros(len(slots))
        serving.fill(incidence, fresh)
        serving.loads(incidence, fresh, load)
    found = Placement(slots=after[None], num_experts=7)
    assert now[0] == fresh.cost @ incidence.weight == sum(fewest(found, tokens))
    for name in ("mask", "number", "cost", "good", "joined"):
        assert np.array_equal(getattr(tables, name), getattr(fresh, name))
    assert busy == pytest.approx(load, abs=1e-9)
    assert load.sum() == pytest.approx(tokens.size)


@given(st.integers(0, 10**6))
def test_ways_are_those_of_all_smallest_sets(seed: int) -> None:
    """The GPUs of all ways to serve a pattern's other experts, against every set of GPUs."""
    rng = np.random.default_rng(seed)
    held = rng.random((6, 7)) < 0.3  # copies of seven experts on six GPUs
    held[rng.integers(0, 6, 7), np.arange(7)] = True
    slots = np.where(held, np.arange(7), EMPTY)
    incidence = Incidence.of_patterns(Patterns.of(np.argsort(rng.random((12, 7)), axis=1)[:, :6], 7))
    tables = Serving.of_slots(slots, incidence)
    serving.fill(incidence, tables)
    for p, pattern in enumerate(incidence.experts):
        for j, place in enumerate(incidence.at[p]):
            others = np.delete(pattern, j)
            for size in range(7):
                sets = [s for s in itertools.combinations(range(6), size) if held[list(s)][:, others].any(axis=0).all()]
                if sets:
                    break
            assert tables.good[0, place] == sum(1 << gpu for gpu in {gpu for one in sets for gpu in one})


def test_the_best_of_all_small_placements_is_found() -> None:
    """Against every placement of a layer of four experts on two GPUs of three slots."""
    problem = make_problem(
        make_trace(0, tokens=80, layers=1, experts=4), "scale-up:2", slots_per_gpu=[3, 3], objective="copies"
    ).replace(routing=FEWEST)
    answer = solve(problem, "fanout", LIMITS)
    best = min(objective_value(problem, placement) for placement in every_placement(problem))
    assert answer.objective == pytest.approx(best)
    assert answer.bound is not None
    assert answer.bound <= best


def test_fanout_refuses_what_it_does_not_do() -> None:
    """Another objective, another routing with spare slots, counts of runs that are none."""
    problem = make_problem(make_trace(3, tokens=60), slow_topology("scale-up:3"), redundant=3, objective="copies")
    with pytest.raises(ProblemError, match="even routing"):
        solve(problem, "fanout")
    with pytest.raises(ProblemError, match="objective load"):
        solve(problem.replace(objective="load"), "fanout")
    with pytest.raises(InputError):
        solve(problem.replace(routing=FEWEST), "fanout", Limits(options={"runs": "0"}))


def test_a_cap_that_nothing_found_keeps_is_no_answer() -> None:
    """Stopped before it began, with a cap that EPLB's packing exceeds, the solver says that it found nothing."""
    problem = make_problem(
        make_trace(3, tokens=200, layers=1), slow_topology("scale-up:3"), redundant=2, objective="copies"
    ).replace(routing=FEWEST)
    plain = solve(problem.replace(slots_per_gpu=[2] * 3, objective="load"), "eplb")
    floor = load_floor(problem)
    cap = (float(floor[0]) + plain.objective) / 2
    assert cap < plain.objective
    limits = Limits()
    limits.stop.set()
    answer = solve(problem.replace(load_cap=cap), "fanout", limits)
    assert answer.status is Status.UNKNOWN
    assert "no placement within the load cap" in answer.notes[-1]


def test_auto_tries_replicas_under_this_routing() -> None:
    """With spare slots and the policy declared, auto's answer for copies is no worse than without replicas."""
    problem = make_problem(
        make_trace(3, tokens=200, experts=8, top_k=3), slow_topology("scale-up:4"), redundant=4, objective="copies"
    ).replace(routing=FEWEST)
    answer = solve(problem, limits=LIMITS)
    assert answer.solver == "fanout"
    assert answer.objective < solve(problem, "setpart").objective


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_values_every_objective(objective: str, policy: str) -> None:
    """EPLB's copies under each routing: a value not below the bound; even routing is what it was."""
    place = slow_topology("scale-out:3x1" if objective == "remote" else "scale-up:3")
    problem = make_problem(make_trace(3, tokens=80), place, redundant=4, objective=objective, routing=policy)
    answer = solve(problem, "eplb")
    assert answer.placement is not None
    assert answer.bound is not None
    assert 0 < answer.bound <= answer.objective
    assert answer.objective == objective_value(problem, answer.placement)
    if policy == EVEN:
        assert router_of(problem, answer.placement) is None
        sample = problem.stats.sample
        assert sample is not None
        if objective == "copies":
            assert answer.objective == token_metrics(sample, answer.placement, problem.topology)[0]


def test_a_method_that_shares_evenly_proves_nothing_under_another_routing() -> None:
    """An integer programme's optimum for even sharing is valued anew and not called optimal."""
    problem = make_problem(make_trace(3, tokens=60, layers=1), "scale-up:3", redundant=1, objective="load")
    even = solve(problem, "balance")
    other = solve(problem.replace(routing="lp-static"), "balance")
    assert even.placement is not None
    assert other.placement is not None
    assert other.objective <= even.objective + 1e-9
    assert any("valued under lp-static" in note for note in other.notes)


def test_a_placement_file_names_its_routing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file written under a routing is scored under it; --routing overrules; an unknown one is told."""
    trace, path, shell = (
        Path(__file__).parents[1] / "traces" / "hand.jsonl",
        tmp_path / "a.json",
        Shell(tmp_path, capsys),
    )
    asked = "--num-gpus 2 --slots-per-gpu 3 --objective copies --routing fewest-gpus"
    shell(f"solve {trace} {asked} -o {path}")
    assert read_placement(path).details["routing"] == FEWEST
    own = shell(f"score {trace} {path} --batches 4 --json")
    assert own.json["scores"][0]["execution"]["routing"] == FEWEST
    assert "as its file says" in own.err
    export = shell(f"export {path} --format csv -o {tmp_path / 'a.csv'}")
    assert "csv files do not carry the replica choice fewest-gpus" in export.err
    other = shell(f"score {trace} {path} --batches 4 --json --routing even")
    assert other.json["scores"][0]["execution"]["routing"] == EVEN
    path.write_text(path.read_text().replace("fewest-gpus", "by-magic"))
    unknown = shell(f"score {trace} {path} --batches 4 --json")
    assert "'by-magic' is not known" in unknown.err
