"""What a plan shows: the command, its tables and documents, figures, topologies side by side, and the wafer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from plan_cases import MODEL, toy_evaluator
from shell import Shell

from moeplace.errors import InputError
from moeplace.planning import figures
from moeplace.planning.compare import best_of, even_share, kind_rows, link_rows, repriced
from moeplace.planning.economics import with_network_share
from moeplace.planning.evaluate import Evaluator
from moeplace.planning.outcome import Outcome
from moeplace.planning.pareto import pareto_set
from moeplace.planning.search import judge, search
from moeplace.planning.space import Space, deployments
from moeplace.planning.wafer import AWARE, IN_TURN, aware_homes, compare_wafer, decentralised
from moeplace.topology import load_topology

SMALL = "plan t.npz --ep-sizes 4,8 --batches 4,16 --steps 4 --accelerators h100 -s eplb"


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """The toy workload on H100."""
    return toy_evaluator("h100")


@pytest.fixture(scope="module")
def outcomes(evaluator: Evaluator) -> tuple[Outcome, ...]:
    """Three topologies and two bandwidths, all timed."""
    kinds = ("scale-up", "torus", "full-mesh")
    space = Space(
        accelerators=evaluator.accelerators, kinds=kinds, ep_sizes=(8,), batches=(4, 64), link_scales=(0.25, 1.0)
    )
    return tuple(judge(own, evaluator) for own in deployments(space, MODEL))


def test_even_shares_are_even(evaluator: Evaluator, outcomes: tuple[Outcome, ...]) -> None:
    """At the network share that the table names, both topologies buy the same for their price, electricity apart."""
    rows = {row.kind: row for row in kind_rows(outcomes)}
    assert set(rows) == {"scale-up", "torus", "full-mesh"}
    assert [row.best.per_usd for row in kind_rows(outcomes)] == sorted(
        (row.best.per_usd for row in rows.values()), key=lambda rate: -(rate or 0)
    )
    base, other = rows["scale-up"].best, rows["torus"].best
    share = even_share(base, other)
    if share is None:
        return
    book = with_network_share(evaluator.book, evaluator.topology(base.deployment), share).replace(usd_per_kwh=0.0)
    assert repriced(base, evaluator, book).per_usd == pytest.approx(repriced(other, evaluator, book).per_usd)


def test_narrower_links_cost_less_and_carry_less(outcomes: tuple[Outcome, ...]) -> None:
    """Every row is measured from the widest of its kind; prices fall with bandwidth, throughput does not rise."""
    rows = link_rows(outcomes)
    assert {row.kind for row in rows} == {"scale-up", "torus", "full-mesh"}
    for row in rows:
        if row.link_gb_per_s == 450:
            assert row.throughput_change == row.price_change == row.per_usd_change == 0
        else:
            assert row.price_change < 0
            assert row.throughput_change <= 1e-9
    one = [outcome for outcome in outcomes if outcome.deployment.link_gb_per_s == 450]
    assert link_rows(one) == []


def test_the_search_knows_the_best_of_every_kind(evaluator: Evaluator) -> None:
    """Bounds exclude within a kind of topology alone: the table of kinds is that of judging everything."""
    space = Space(accelerators=evaluator.accelerators, ep_sizes=(4, 8), batches=(1, 4, 64))
    found = deployments(space, MODEL)
    everything = tuple(judge(own, evaluator) for own in found)
    result = search(found, toy_evaluator("h100"))
    assert [row.best.deployment for row in kind_rows(result.outcomes)] == [
        row.best.deployment for row in kind_rows(everything)
    ]
    best = best_of(everything)
    assert best is not None
    assert pareto_set(result.outcomes)[0].deployment == best.deployment


def test_figures_are_drawn(evaluator: Evaluator, outcomes: tuple[Outcome, ...], tmp_path: Path) -> None:
    """Two files with the plot extra, the same bytes each time; other endings are refused."""
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    drawn = figures.draw_plan(outcomes, evaluator.book, tmp_path / "plan.png")
    assert [file.name for file in drawn] == ["plan-latency.png", "plan-bandwidth.png"]
    first = [file.read_bytes() for file in drawn]
    assert all(data.startswith(b"\x89PNG") for data in first)
    assert [file.read_bytes() for file in figures.draw_plan(outcomes, evaluator.book, tmp_path / "plan.png")] == first
    one = [outcome for outcome in outcomes if outcome.deployment.link_gb_per_s == 450]
    assert len(figures.draw_plan(one, evaluator.book, tmp_path / "one.svg")) == 1
    with pytest.raises(InputError, match="png, pdf, svg"):
        figures.check_figures("plan.gif")


def test_popular_experts_are_dealt_to_dies_of_their_own() -> None:
    """The most popular expert is on a die in the middle, no two of the first round share one, and all are placed."""
    mesh = load_topology("mesh:4x4")
    load = np.random.default_rng(0).lognormal(0, 1, (3, 40))
    placed = decentralised(load, mesh)
    hops = mesh.hops().sum(axis=1)
    for layer in range(3):
        popular = np.argsort(-load[layer], kind="stable")[:16]
        homes = [int(np.argwhere(placed.slots[layer] == expert)[0, 0]) for expert in popular]
        assert len(set(homes)) == 16
        assert hops[homes[0]] == hops.min()
    assert placed.used_slots().sum() == 3 * 40


def test_a_wafer_is_compared(evaluator: Evaluator) -> None:
    """Requests near their experts travel fewer hops, every die has as many as before; loads are the same."""
    mesh = load_topology("mesh:2x4")
    rows = compare_wafer(evaluator.workload, evaluator.stats, mesh, 1)
    assert rows[1].hops < rows[0].hops
    assert [(row.placement, row.homes) for row in rows[:2]] == [("contiguous", IN_TURN), ("contiguous", AWARE)]
    assert len(rows) == 6
    for turn, near in zip(rows[::2], rows[1::2], strict=True):
        if turn.placement != "copies of popular experts":
            assert near.busiest_over_mean == turn.busiest_over_mean
            assert near.compute_us == pytest.approx(turn.compute_us)
    steps = evaluator.workload.decode_steps(16, 8)
    homes = aware_homes(evaluator.workload, steps, evaluator.placement(_own()), mesh).reshape(steps.num_batches, -1)
    assert all(np.bincount(step, minlength=8).tolist() == [2] * 8 for step in homes)


def _own() -> object:
    space = Space(accelerators=toy_evaluator("h100").accelerators, kinds=("mesh:2x4",), batches=(2,))
    return deployments(space, MODEL)[0]


def test_the_command_shows_the_front(shell: Shell) -> None:
    """A table of the Pareto set on standard output, every assumption with its source on standard error."""
    done = shell(SMALL)
    assert "USD/Mtoken" in done.out
    assert "least cost of each topology" in done.out
    assert "book street of 2024-08" in done.err
    assert "h100: 34,400 USD (derived" in done.err


def test_the_command_s_document_is_repeatable_and_resumed(shell: Shell) -> None:
    """Same bytes whatever the threads and however often it was stopped; ids lead to explanations."""
    one = shell(f"{SMALL} --json --threads 1").out
    stopped = shell(f"{SMALL} --json --results kept.jsonl --time-limit 1ms", code=4)
    assert "0 deployments judged" in stopped.err
    assert shell(f"{SMALL} --json --results kept.jsonl").out == one
    kept = (shell.folder / "kept.jsonl").read_text().splitlines()
    again = shell(f"{SMALL} --json --results kept.jsonl")
    assert again.out == one
    assert (shell.folder / "kept.jsonl").read_text().splitlines() == kept
    document = json.loads(one)
    assert document["schema"] == "moeplace/plan/1"
    assert document["complete"]
    best = document["pareto"][0]
    budget = shell(f"{SMALL} --explain {best}")
    for word in ("experts", "dispatch", "accelerators", "KV cache", "USD/Mtoken"):
        assert word in budget.out
    deployment = json.loads(shell(f"{SMALL} --explain {best} --json").out)
    assert deployment["deployment"]["id"] == best


def test_the_command_tells_what_binds(shell: Shell) -> None:
    """Exit code 3 with the constraint and the nearest change."""
    done = shell(f"{SMALL} --tpot 0.001 -q", code=3)
    assert "--tpot rules out" in done.out
    assert "raise --tpot" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--topologies tours", "unknown topology kind 'tours'"),
        ("--accelerators h1000", "unknown accelerator 'h1000'"),
        ("--batches 0", "at least one value, each 1 or more"),
        ("--ep-sizes x", "not a list of numbers"),
        ("--overlaps both", "unknown overlap 'both'"),
        ("--prices cheap", "unknown price book 'cheap'"),
        ("--explain zzz", "unknown deployment 'zzz'"),
        ("--plot plan.gif", "png, pdf, svg"),
        ("--ep-sizes 999", "no deployment"),
    ],
)
def test_wrong_words_are_refused(shell: Shell, words: str, message: str) -> None:
    """A message with the value and what is known, no traceback."""
    usage = words.split()[0] in ("--batches", "--ep-sizes") and "999" not in words
    shell.fails(f"{SMALL} {words}", message, code=2 if usage else 1)


def test_the_command_compares_a_wafer(shell: Shell) -> None:
    """Six rows; as JSON the same."""
    done = shell(f"{SMALL} --wafer 2x4 -q")
    assert "popular experts apart" in done.out
    rows = json.loads(shell(f"{SMALL} --wafer 2x4 --json").out)["rows"]
    assert len(rows) == 6


def test_the_command_refuses_counts(shell: Shell) -> None:
    """Counts do not tell which tokens make a step."""
    shell.fails("plan counts.npz --accelerators h100", "per-token trace")


def test_the_library_s_twin_finds_what_the_command_finds(shell: Shell) -> None:
    """The same outcomes from moeplace.plan as in the command's document."""
    import moeplace

    trace = moeplace.open_trace(shell.folder / "t.npz")
    fit, test = (moeplace.select(trace, split=moeplace.parse_split("half:0"), part=part) for part in ("fit", "test"))
    space = Space(accelerators={"h100": moeplace.load_accelerator("h100")}, ep_sizes=(4, 8), batches=(4, 16))
    found = moeplace.plan(fit, test, space, solver="eplb", steps=4, threads=2)
    document = json.loads(shell(f"{SMALL} --json").out)
    assert [one.to_dict() for one in found.outcomes] == document["deployments"]
    assert document["topologies_by_batch"]


def test_prices_are_listed(shell: Shell) -> None:
    """Every number of every book, with its date and source."""
    rows = json.loads(shell("list prices --json").out)["entries"]
    assert {row["book"] for row in rows} == {"street", "megascale"}
    assert all(row["source"] for row in rows)
    assert "accelerators.h20.usd" in shell("list prices").out
