"""What ``moeplace solve`` says of a trace that looks wrong."""

from __future__ import annotations

import re

import numpy as np
from shell import SHAPE, Shell, on_terminal
from strategies import make_trace

from moeplace.writers import write_trace

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
FEW = "a placement fitted on them is fitted to them"
DUMMY = "the first 60 rows choose the same experts"


def with_dummy_run(shell: Shell) -> None:
    """Write ``d.npz``: few requests behind a dummy run."""
    rows = np.concatenate([np.zeros(60, int), np.arange(1, 400)])
    write_trace(make_trace(0, **SHAPE).take(rows), shell.folder / "d.npz")


def test_solve_warns_once_in_every_form(shell: Shell) -> None:
    """Few requests and a dummy run are told once: as notes, in the log, in the plan, on a terminal."""
    with_dummy_run(shell)
    notes = shell("solve d.npz -s linear -o p.json").err
    log = shell("solve d.npz -s linear -o p.json -v").err
    plan = shell("solve d.npz --dry-run").out
    terminal = " ".join(on_terminal(shell.folder, "solve d.npz -s linear -o p.json").split())
    for text in (notes, log, plan, terminal):
        for words in (FEW, DUMMY):
            assert text.count(words) == 1, text
        assert f"note: {DUMMY}" in ESCAPES.sub("", text)
    assert "assumed: the trace holds" not in log
    assert shell("solve d.npz --dry-run").err == ""
    assert shell("solve d.npz -s linear -o p.json -q").err == ""


def test_the_plan_lists_warnings_apart_from_assumptions(shell: Shell) -> None:
    """JSON of --dry-run has both lists; a trace without faults has no warnings."""
    with_dummy_run(shell)
    document = shell("solve d.npz --dry-run --json").json
    for words in (DUMMY, FEW):
        assert [words in line for line in document["warnings"]].count(True) == 1
    assert not any(FEW in line for line in document["assumptions"])
    rng = np.random.default_rng(0)
    good = make_trace(0, **(SHAPE | {"tokens": 4000, "requests": 200}))
    good = good.replace(experts=np.argsort(rng.random((4000, 3, 32)), axis=2)[:, :, :4])
    write_trace(good, shell.folder / "good.npz")
    assert shell("solve good.npz --dry-run --json").json["warnings"] == []


def test_a_short_trace_and_loops_are_told_as_stats_tells_them(shell: Shell) -> None:
    """Solve warns of loops and of too few tokens, in the words and figures of stats; enough of good ones is fine."""
    rng = np.random.default_rng(0)
    trace = make_trace(0, **(SHAPE | {"tokens": 12_000, "requests": 40}))
    trace = trace.replace(experts=np.argsort(rng.random((12_000, 3, 32)), axis=2)[:, :, :4])
    trace = trace.replace(request=np.repeat(np.arange(40), 300), position=np.tile(np.arange(300), 40))
    write_trace(trace, shell.folder / "fine.npz")
    assert shell("solve fine.npz --dry-run --json").json["warnings"] == []
    looping = trace.experts.copy()
    for request in range(4):
        looping[300 * request : 300 * (request + 1)] = looping[300 * request]
    write_trace(trace.replace(experts=looping), shell.folder / "loops.npz")
    said = shell("solve loops.npz -s linear -o p.json").err
    assert "note: 4 of 40 requests run in loops of repeated tokens" in said
    write_trace(trace.take(np.arange(12_000) % 40 == 0), shell.folder / "short.npz")
    short = shell("stats short.npz --json").json["insight"]["sample"]["warning"]
    assert short.startswith("the trace is short for 32 experts: 300 tokens")
    assert f"note: {short} (record more" in shell("solve short.npz -s linear -o p.json").err


def test_counts_are_checked_too(shell: Shell) -> None:
    """Layers that were counted less often than others are told before counts are solved."""
    counts = np.stack([np.random.default_rng(layer).permutation(np.arange(50, 82)) for layer in range(3)])
    counts[1] //= 2
    np.savez(shell.folder / "short.npz", logical_count=counts)
    assert "1 layer counted fewer selections" in shell("solve short.npz -s linear -o p.json").err
