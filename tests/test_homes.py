"""Laws of :mod:`moeplace.homes` and :mod:`moeplace.cohosting`: homes that follow a request's experts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shell import Shell

from moeplace.batches import BatchLaw, TokenIndex
from moeplace.build import build_problem
from moeplace.cohosting import cohost, whole_requests
from moeplace.errors import InputError
from moeplace.execution import Execution, step_tokens
from moeplace.homes import align_names, deal, held_at_home, preferences, seen_tokens
from moeplace.metrics import max_over_mean, traffic_metrics
from moeplace.placement import Placement
from moeplace.routing import Router
from moeplace.scoring import draw_steps, score
from moeplace.solvers import solve
from moeplace.topology import Topology, load_topology
from moeplace.trace import Trace, TraceMeta


def topical(requests: int, tokens: int, layers: int = 3, topics: int = 4, seed: int = 0) -> Trace:
    """Requests that choose two experts of one topic each, which has other names in every layer."""
    rng = np.random.default_rng(seed)
    names = np.stack([rng.permutation(topics * 3).reshape(topics, 3) for _ in range(layers)])
    topic = np.arange(requests) % topics
    experts = np.empty((requests, tokens, layers, 2), np.uint8)
    for r in range(requests):
        for layer in range(layers):
            chosen = np.argsort(rng.random((tokens, 3)), axis=1)[:, :2]
            experts[r, :, layer] = names[layer, topic[r]][chosen]
    meta = TraceMeta(num_experts=topics * 3, top_k=2, layer_ids=tuple(range(layers)))
    return Trace(
        meta=meta,
        experts=experts.reshape(-1, layers, 2),
        request=np.repeat(np.arange(requests), tokens),
        position=np.tile(np.arange(tokens), requests),
        phase=np.ones(requests * tokens, np.uint8),
    )


def by_topic(trace: Trace, seed: int = 1) -> Placement:
    """A topic's experts on one GPU in every layer, under names drawn anew in each."""
    rng, slots = np.random.default_rng(seed), []
    for layer in range(trace.meta.num_layers):
        sets = {frozenset(trace.experts[trace.request == r, layer].ravel().tolist()) for r in range(4)}
        slots.append(rng.permutation([sorted(s) for s in sets]))
    return Placement(slots=np.array(slots), num_experts=trace.meta.num_experts)


def test_names_of_homes() -> None:
    """The rule names how many tokens it goes by."""
    assert [seen_tokens(h) for h in ("auto", "affinity", "affinity:5")] == [None, 64, 5]
    for wrong in ("affinity:0", "affinity:x", "affinity:", "affinity:-3"):
        with pytest.raises(InputError, match="affinity"):
            Execution(homes=wrong)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_dealing_keeps_room_and_takes_the_best(batches: int, requests: int, gpus: int, seed: int) -> None:
    """No rank gets more than its part; each request in turn gets the best that has room, by a plain loop."""
    rng = np.random.default_rng(seed)
    value, known = rng.normal(size=(batches, requests, gpus)), rng.random((batches, requests)) < 0.7
    home = deal(value, known)
    most = -(-requests // gpus)
    for b in range(batches):
        room = [most] * gpus
        for r in range(requests):
            better = value[b, r] if known[b, r] else np.array(room)
            free = [g for g in range(gpus) if room[g]]
            assert home[b, r] == max(free, key=lambda g: (better[g], -g))
            room[home[b, r]] -= 1


def test_preferences_are_savings() -> None:
    """With one token per request: the best home is a GPU it visits, on two nodes one on the node it visits most."""
    trace, topology = topical(4, 1), load_topology("scale-out:2x2")
    share = by_topic(topical(4, 20)).even_share()
    names, value = preferences(trace, share, topology)
    assert names.tolist() == [0, 1, 2, 3]
    cost = 1 / topology.pair_bandwidth_gb_per_s()
    for r in range(4):
        visited = [{int(share[layer, :, e].argmax()) for e in trace.experts[r, layer]} for layer in range(3)]
        told = [-sum(cost[g, h] for layer in visited for g in layer) for h in range(4)]
        np.testing.assert_allclose(value[r], told, atol=1e-12)


@pytest.mark.parametrize("name", ["scale-up:4", "scale-out:2x2", "torus:2x2x1"])
def test_planted_topics_are_found(name: str) -> None:
    """Where a topic fills a GPU in every layer, all copies can stay at home under the right names, and do."""
    trace, topology = topical(16, 12), load_topology(name)
    shuffled = by_topic(trace)
    aligned = align_names(trace, shuffled, topology, seed=0)
    if name != "scale-out:2x2":  # names are free within nodes and of nodes only
        assert held_at_home(trace, aligned, topology, 4).at_home == pytest.approx(1.0)
    before, after = (held_at_home(trace, p, topology, 4) for p in (shuffled, aligned))
    assert after.at_home >= before.at_home
    assert (after.copies, after.by_chance) == (1.0, 0.25)


@given(st.integers(0, 10_000), st.sampled_from(["scale-up:4", "scale-out:2x2"]))
def test_names_change_neither_loads_nor_copies(seed: int, name: str) -> None:
    """Any placement: the same loads of GPUs, copies and node copies in every layer."""
    rng = np.random.default_rng(seed)
    trace, topology = topical(6, 5, seed=seed), load_topology(name)
    slots = np.stack([rng.permutation(12).reshape(4, 3) for _ in range(3)])
    placement = Placement(slots=slots, num_experts=12)
    problem = build_problem(trace, topology=name)
    renamed = align_names(trace, placement, topology, seed=seed)
    told = [traffic_metrics(problem.stats, p, topology) for p in (placement, renamed)]
    assert told[0].copies_per_token_gpu == pytest.approx(told[1].copies_per_token_gpu)
    assert told[0].copies_per_token_node == pytest.approx(told[1].copies_per_token_node)
    loads = [np.sort(p.gpu_load(problem.stats.load), axis=1) for p in (placement, renamed)]
    np.testing.assert_allclose(*loads)
    np.testing.assert_allclose(max_over_mean(placement, problem.stats.load), max_over_mean(renamed, problem.stats.load))


def test_held_copies_are_counted_over_later_tokens() -> None:
    """Against a plain loop: homes by the first three tokens, counted over the tokens after those."""
    trace, topology = topical(7, 9, seed=3), load_topology("scale-up:4")
    rng = np.random.default_rng(0)
    placement = Placement(slots=np.stack([rng.permutation(12).reshape(4, 3) for _ in range(3)]), num_experts=12)
    gpu = placement.copies().argmax(axis=1)
    seen, stay, copies = 3, 0, 0
    value = np.zeros((1, 7, 4))
    for r in range(7):
        for t in range(seen):
            for layer in range(3):
                for g in {int(gpu[layer, e]) for e in trace.experts[9 * r + t, layer]}:
                    value[0, r, g] += 1
    home = deal(value, np.ones((1, 7), bool))[0]
    for r in range(7):
        for t in range(seen, 9):
            for layer in range(3):
                visited = {int(gpu[layer, e]) for e in trace.experts[9 * r + t, layer]}
                copies, stay = copies + len(visited), stay + (home[r] in visited)
    held = held_at_home(trace, placement, topology, seen)
    assert (held.copies, held.at_home) == pytest.approx((copies / 126, stay / 126))
    assert held.remote_change == pytest.approx((copies - stay) / (copies * 3 / 4) - 1)
    with pytest.raises(InputError, match="no request has more than 9"):
        held_at_home(trace, placement, topology, 9)


def step_homes(trace: Trace, placement: Placement, topology: Topology, homes: str) -> tuple[np.ndarray, np.ndarray]:
    """Homes and rows of steps of one token of eight requests."""
    law = BatchLaw(phase="decode", requests=8, tokens=1, batches=50)
    steps = draw_steps(trace, TokenIndex.of(trace), law, homes)
    tokens = step_tokens(steps, 4, Execution(homes=homes), (Router.of(placement, topology), topology))
    return tokens.home.reshape(50, 8), steps.trace.position[steps.rows]


def test_requests_of_a_step_have_homes_by_affinity() -> None:
    """Two on every rank; a request that has not had its first tokens yet is dealt; the others meet their topic."""
    trace, topology = topical(8, 40), load_topology("scale-up:4")
    aligned = align_names(trace, by_topic(trace), topology, seed=0)
    home, position = step_homes(trace, aligned, topology, "affinity:4")
    assert all(np.bincount(row, minlength=4).tolist() == [2, 2, 2, 2] for row in home)
    free = (position >= 4).all(axis=1)
    assert free.any()
    gpu = aligned.copies().argmax(axis=1)
    of_topic = [gpu[0, trace.experts[40 * r, 0, 0]] for r in range(8)]
    law = BatchLaw(phase="decode", requests=8, tokens=1, batches=50)
    steps = draw_steps(trace, TokenIndex.of(trace), law)
    request = steps.trace.request[steps.rows]
    np.testing.assert_array_equal(home[free], np.array(of_topic)[request[free]])
    with pytest.raises(InputError, match="first tokens"):
        step_tokens(steps, 4, Execution(homes="affinity"), (Router.of(aligned, topology), topology))


def test_homes_by_affinity_send_less() -> None:
    """The evaluator agrees: planted topics at home are faster than dealt in turn."""
    trace = topical(32, 40)
    problem = build_problem(trace, topology="scale-out:4x1")
    placement = align_names(trace, by_topic(trace), problem.topology, seed=0)
    mean = {}
    for homes in ("turn", "affinity:4"):
        found = score(trace, {"a": placement}, problem.topology, problem.model, homes=homes, requests=16, batches=40)
        mean[homes] = found[0].simulation.summary["mean"].value
    assert mean["affinity:4"] < mean["turn"]


def test_cohosting_a_solution() -> None:
    """The answer keeps its objective, tells copies at home, and declares its homes; other executions are refused."""
    trace = topical(16, 20)
    problem = build_problem(trace, topology="scale-up:4", objective="copies")
    solution = solve(problem, "setpart")
    answer = cohost(problem, solution, "affinity:4", trace, None)
    assert answer.objective == pytest.approx(solution.objective)
    assert answer.terms["copies_at_home"].value == pytest.approx(1.0)
    assert "affinity:4 on the fit" in answer.notes[-1]
    assert cohost(problem, solution, "turn", trace, None) is solution
    chained = problem.replace(dataflow="context-coherent", objective="cross")
    with pytest.raises(InputError, match="context-coherent"):
        cohost(chained, solution, "affinity", trace, None)


def test_whole_requests_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit, at least one, and all tokens of each."""
    trace = topical(10, 6)
    monkeypatch.setattr("moeplace.cohosting.MOST_TOKENS", 25)
    read = whole_requests(trace)
    assert sorted(np.bincount(read.request)[np.unique(read.request)].tolist()) == [6, 6, 6, 6]
    monkeypatch.setattr("moeplace.cohosting.MOST_TOKENS", 1)
    assert whole_requests(trace).num_tokens == 6


def test_the_command_line_renames_and_tells(shell: Shell) -> None:
    """Held-out requests are judged where some are held out; the score takes the same rule; others are refused."""
    told = shell("solve t.npz --solver eplb --fit half:0 --homes affinity:2 -v -o a.json")
    assert "homes affinity:2 on held-out requests" in " ".join(told.err.split())
    document = json.loads((shell.folder / "a.json").read_text())
    assert 0 < document["terms"]["copies_at_home"]["value"] < document["terms"]["copies_per_token_gpu"]["value"]
    assert shell("score t.npz a.json --test half:0 --homes affinity:2 --batches 20 --json").json["scores"]
    shell.fails("solve t.npz --homes turn", "affinity:N", code=2)
    shell.fails("score t.npz a.json --homes affinity:none", "at least 1")
    shell.fails("solve t.npz --solver eplb --homes affinity:1000", "fewer tokens")
    shell.fails("solve t.npz --homes affinity:2 --baseline a.json", "renames GPUs", code=2)
