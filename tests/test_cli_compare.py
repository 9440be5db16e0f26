"""``moeplace compare`` as a person uses it: one grid, stopped, grown, on several processes and on a cluster."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from shell import Shell
from strategies import make_trace

from moeplace.writers import write_trace

GRID = "compare t.npz -s linear,eplb --num-gpus 2 --batches 20"


def test_a_grid_is_shown_and_told(shell: Shell) -> None:
    """A table per topology and phase, the same figures in JSON, the assumptions once."""
    done = shell(f"{GRID} --seeds 2 -v")
    assert done.out.count("mean against first") == done.out.count("t on scale-up:2, ")
    assert done.err.count("4/4") == 1
    assert done.err.count("widths are unknown") == 1
    document = shell(f"{GRID} --seeds 2 --json").json
    assert document["schema"] == "moeplace/compare/1"
    assert {row["solver"] for row in document["rows"]} == {"linear", "eplb"}
    assert len(document["trials"]) == 4
    assert shell(f"{GRID} --seeds 1 -q").err == ""


def test_a_grid_goes_on_and_grows(shell: Shell) -> None:
    """What is kept is not run again; a larger grid runs only the rest; the files are those of the whole grid."""
    shell(f"{GRID} --seeds 1 --results r")
    again = shell(f"{GRID},random --seeds 2 --results r -v".replace("--num", "-t scale-up:2 --num"), code=2)
    assert "scale-up:2" not in again.out
    grown = shell("compare t.npz -s linear,eplb,random --num-gpus 2 --batches 20 --seeds 2 --results r -v")
    assert "6 runs, 2 of them kept from before" in grown.err
    same = shell("compare t.npz -s linear,eplb,random --num-gpus 2 --batches 20 --seeds 2 --results r -v")
    assert "6 runs, 6 of them kept from before" in same.err
    assert same.out == grown.out
    document = json.loads((shell.folder / "r/comparison.json").read_text())
    assert {row["solver"] for row in document["rows"]} == {"linear", "eplb", "random"}
    assert (shell.folder / "r/comparison.csv").read_text().count("\n") == 1 + len(document["rows"])
    assert "| random |" in (shell.folder / "r/comparison.md").read_text()


def test_a_comparison_is_validated(shell: Shell) -> None:
    """Every split of every solver, also in processes; kept and grown with the rest; what has no answer says why."""
    line = "compare t.npz --num-gpus 2 --batches 20 --seeds 2 --work 0.01 --objective load --results v --validate"
    document = shell(f"{line} -s eplb,balance --json").json
    names = ["half:0", "half:1", "time:0.5"]
    for one, solver in zip(document["validations"], ("eplb", "balance"), strict=True):
        assert (one["solver"], one["schema"], one["against"]) == (solver, "moeplace/validation/1", "eplb")
        assert [split["fitted_to"] for split in one["splits"]] == names
        assert one["null"]["fitted_to"] == "half:0, null trace"
        assert [part["share"] for part in one["curve"]] == [0.125, 0.25, 0.5, 1.0]
    assert all(
        split["gain_test"] == {"value": 0.0, "interval": [0.0, 0.0]} for split in document["validations"][0]["splits"]
    )
    grown = shell(f"{line} -s eplb,balance,saa --jobs 2 -v")
    assert "21 fits to validate by, 14 of them kept from before" in grown.err
    assert "saa chooses by sampled steps" in grown.err
    assert grown.out.count("half:0, null trace") == 2
    kept = json.loads((shell.folder / "v/comparison.json").read_text())
    assert kept["validations"][:2] == document["validations"]
    assert "saa chooses by sampled steps" in kept["validations"][2]["failure"]
    assert "| balance | half:1 |" in (shell.folder / "v/comparison.md").read_text()
    assert "validations" not in shell("compare t.npz --num-gpus 2 --batches 20 --seeds 1 -s eplb --json").json


def test_counts_are_not_validated(shell: Shell) -> None:
    """They are refused before the first run."""
    (shell.folder / "c.json").write_text(json.dumps({"logical_count": [[5, 3, 2, 2], [1, 2, 3, 4]]}))
    told = shell("compare c.json --num-gpus 2 -s eplb --validate", 1)
    assert "a validation of counts" in told.err
    assert told.out == ""


def test_the_tail_is_compared_where_it_is_asked_for(shell: Shell) -> None:
    """Solvers that need steps take part; objectives are of the risk."""
    line = "compare t.npz --num-gpus 2 --batches 20 --seeds 1 --objective load --risk p99 --risk-batches 20 --work 0.01"
    document = shell(f"{line} -s eplb,saa --batch-requests 2 --json").json
    assert {row["solver"] for row in document["rows"]} == {"eplb", "saa"}


def test_processes_give_the_same(shell: Shell) -> None:
    """Two processes give what one gives, and both the same as the runs kept."""
    one = shell(f"{GRID} --seeds 2 --json").out
    two = shell(f"{GRID} --seeds 2 --json --jobs 2").out
    assert one == two


def test_traces_and_topologies_are_told_apart(shell: Shell) -> None:
    """Several traces are named by their files, topologies as given."""
    write_trace(make_trace(3, tokens=120, experts=32, top_k=4, requests=12), shell.folder / "u.npz", format="npz")
    done = shell("compare t.npz u.npz -s linear -t scale-up:2,torus:2x2 --seeds 1 --batches 5 --json").json
    places = {(row["trace"], row["topology"]) for row in done["rows"]}
    assert places == {(trace, place) for trace in "tu" for place in ("scale-up:2", "torus:2x2")}


def test_failures_are_told_and_the_rest_is_shown(shell: Shell) -> None:
    """Too few slots on one topology fail there; where all fail the exit code is 4."""
    some = shell("compare t.npz -s linear -t scale-up:2,scale-up:4 --slots-per-gpu 10 --seeds 1 --batches 5")
    assert "warning: linear on scale-up:2, t, seed 0: " in some.err
    assert "t on scale-up:4" in some.out
    none = shell("compare t.npz -s linear -t scale-up:2 --slots-per-gpu 1 --seeds 1", code=4)
    assert none.out == ""


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [
        ("compare t.npz -s linera", "linear", 1),
        ("compare t.npz -s linear -t scale-up", "KIND:DIMS", 1),
        ("compare t.npz -s ,", "--solvers names none", 2),
        ("compare - t.npz -s linear", "standard input is one trace", 2),
        ("compare t.npz t.npz -s linear", "is given twice", 2),
        ("compare no.npz -s linear", "no.npz", 1),
        ("compare t.npz -s linear --by half:0.5", "half:SEED", 1),
        ("compare t.npz -s linear --cluster tcp://127.0.0.1:9", "no Dask scheduler answers", 1),
    ],
)
def test_mistakes_are_told_before_anything_runs(shell: Shell, line: str, words: str, code: int) -> None:
    """A wrong name, split, trace or address ends the command with one message."""
    shell.fails(line, words, code=code)


def test_counts_are_compared_too(shell: Shell) -> None:
    """Counts are split by recorded step; their steps are the recorded ones."""
    counts = np.random.default_rng(0).poisson(30, (12, 3, 32))
    (shell.folder / "c.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    document = shell("compare c.json -s linear,eplb --num-gpus 2 --seeds 2 --json").json
    assert [row["solver"] for row in document["rows"]] == ["linear", "eplb"]


def test_a_stopped_grid_is_kept(shell: Shell, tmp_path: Path) -> None:
    """Ctrl-C shows what is done, keeps it and ends with 130; the same command goes on from there."""
    words = "compare t.npz -s linear,eplb,moetuner,auto --num-gpus 2 --seeds 40 --results r --phase decode -v"
    program = subprocess.Popen(
        [sys.executable, "-m", "moeplace", *words.split()],
        cwd=shell.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = shell.folder / "r" / "trials"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(folder.glob("*.json"))) < 2:
        time.sleep(0.02)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 130, err
    assert "of 160 runs are done, kept in r: the same command goes on from there" in err
    assert "t on scale-up:2, decode" in out
    done = len(list(folder.glob("*.json")))
    more = shell(words.replace("--seeds 40", "--seeds 1").replace("linear,eplb,moetuner,auto", "linear,eplb"))
    assert f"2 runs, {min(done, 2)} of them kept from before" in more.err


def test_a_cluster_gives_the_same(shell: Shell) -> None:
    """Workers of a Dask cluster run the trials to the same figures."""
    distributed = pytest.importorskip("distributed", reason="the extra cluster is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        path = shell.folder / "t.npz"
        on_it = shell(f"{GRID} --seeds 2 --json --cluster {cluster.scheduler_address}".replace("t.npz", str(path)))
    here = shell(f"{GRID} --seeds 2 --json".replace("t.npz", str(path)))
    assert on_it.out == here.out
