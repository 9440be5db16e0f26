"""The command line as a person meets it: what it accepts, what it says, what it leaves behind, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shell import SHAPE, Shell, on_terminal, started
from strategies import make_trace

from moeplace.cli import COMMANDS, run
from moeplace.writers import write_trace

PLUGIN = """
import time
from moeplace.solution import Solution, Status, StopReason, found
from moeplace.solvers.linear import contiguous

DESCRIPTION = "waits until it is told to stop"
OPTIONS = {"stubborn": "never stops"}

def solve(problem, limits, report):
    report.stage("waiting")
    while not limits.stop.is_set() or limits.options.get("stubborn"):
        time.sleep(0.01)
    placement = contiguous(problem.slots_per_gpu, problem.num_layers, problem.num_experts)
    answer = found(problem, placement, limits, report, solver="slow")
    return answer.replace(stop_reason=StopReason.INTERRUPTED)
"""


# --- solve -----------------------------------------------------------------------------------------------------------


def test_solve_writes_the_placement_and_says_what_it_assumed(shell: Shell) -> None:
    """Without a topology or a model the defaults are used, each said in a note on standard error."""
    done = shell("solve t.npz -o p.json")
    assert done.out == ""
    for words in ("widths are unknown", "scale-up:8 of h100", "home ranks", "a decode step holds"):
        assert words in done.err
    assert json.loads((shell.folder / "p.json").read_text())["topology"]["name"] == "scale-up:8"


def test_quiet_is_quiet(shell: Shell) -> None:
    """--quiet leaves only the result: nothing at all when it goes to a file, the placement when it does not."""
    done = shell("solve t.npz -q -o p.json")
    assert (done.out, done.err) == ("", "")
    done = shell("solve t.npz -q")
    assert done.err == ""
    assert done.out == (shell.folder / "p.json").read_text()
    for line in (
        "stats t.npz -q",
        "score t.npz p.json -q --batches 2",
        "convert t.npz u.jsonl -q",
        "diff p.json p.json -q",
    ):
        assert shell(line).err == ""


def test_verbose_writes_the_whole_log_without_a_terminal(shell: Shell) -> None:
    """--verbose shows the instance, each improvement with bound and gap, status and stop reason in words."""
    log = shell("solve t.npz -s eplb -v -o p.json").err
    head, rest = log.split("time  source", 1)
    for label in ("trace ", "experts ", "model ", "topology ", "slots ", "objective ", "step ", "assumed: "):
        assert f"\n{label}" in f"\n{head}"
    assert re.search(r"\n +[\d.]+s  eplb +[\d,.]+ +[\d,.]+ +[\d.]+%", rest)
    assert "status " in rest
    assert "the method's work is done (eplb, seed 0)" in rest
    assert rest.endswith("written to p.json\n")


def test_same_input_gives_the_same_bytes_whatever_the_threads(shell: Shell) -> None:
    """A rerun, other threads and the other form of the same trace give the same placement file."""
    first = shell("solve t.npz -q -t scale-out:2x4 --threads 1").out
    assert shell("solve t.npz -q -t scale-out:2x4 --threads 2").out == first
    assert shell("solve t.jsonl -q -t scale-out:2x4").out == first


def test_json_beside_a_file(shell: Shell) -> None:
    """With -o and --json the same placement goes to both."""
    done = shell("solve t.npz --json -o p.json")
    assert done.json["schema"] == "moeplace/placement/1"
    assert done.out == (shell.folder / "p.json").read_text()


def test_dry_run_checks_and_describes_but_solves_nothing(shell: Shell) -> None:
    """--dry-run prints the instance and the assumptions, as text or JSON, writes no file, and finds what is wrong."""
    text = shell("solve t.npz --dry-run -o p.json").out
    assert text.startswith("trace ")
    assert "assumed: topology scale-up:8" in text
    document = shell("solve t.npz --dry-run --json").json
    assert document["schema"] == "moeplace/dry-run/1"
    assert document["instance"]["slots"] == "32 per layer, 4 per GPU, 0 redundant"
    assert "p.json" not in shell.files()
    shell.fails("solve t.npz --dry-run --slots-per-gpu 3", "24 slots for 32 experts", "hint: --slots-per-gpu 4")


def test_a_cap_below_the_floor_is_infeasible_and_names_layers_and_floors(shell: Shell) -> None:
    """A load cap no placement can keep exits with 3, before any solving, and leaves the output alone."""
    (shell.folder / "p.json").write_text("kept")
    for line in (
        "solve t.npz --load-cap 1.01 -t scale-up:32 -o p.json",
        "solve t.npz --load-cap 1.01 -t scale-up:32 --dry-run",
    ):
        message = shell.fails(line, "below the certified floor in 3 of 3 layers", "hint:", code=3)
        assert len(re.findall(r"layer \d \(cap 1\.0100, floor [1-9]\.\d{4}\)", message)) == 3
    assert (shell.folder / "p.json").read_text() == "kept"


def test_a_cap_nothing_kept_exits_with_4(shell: Shell) -> None:
    """Where no solver keeps a cap that is not excluded either, nothing was found: exit 4, and the output is kept."""
    (shell.folder / "p.json").write_text("kept")
    shell.fails(
        "solve t.npz --load-cap 1.0001 --num-gpus 2 -s linear -o p.json", "exceeds the load cap", "hint:", code=4
    )
    assert (shell.folder / "p.json").read_text() == "kept"


def test_require_unmet_exits_with_5_and_still_writes(shell: Shell) -> None:
    """--require optimal|GAP is checked after the placement is written; a gap that is met exits with 0."""
    line = "solve t.npz -t scale-out:2x4 -s linear -o p.json --require"
    shell.fails(f"{line} optimal", "the answer is feasible with gap", "--require optimal", code=5)
    assert (shell.folder / "p.json").exists()
    shell.fails(f"{line} 0.1%", "--require 0.1%", code=5)
    shell(f"{line} 99%")


def test_deterministic_leaves_the_clock_out(shell: Shell) -> None:
    """--deterministic has no time limit, wins over one from the environment, and refuses one beside it."""
    document = shell("solve t.npz -q --deterministic").json
    assert document["provenance"]["limits"]["time_limit_s"] is None
    shell.fails("solve t.npz --deterministic --time-limit 5s", "not both", code=2)


def test_baseline_counts_moves_in_the_file_and_in_the_log(shell: Shell) -> None:
    """Against a baseline the terms hold moved_copies and moved_bytes, as diff counts them, and the log says so."""
    shell("solve t.npz -q -s linear -o old.json --model gpt-oss-20b")
    log = shell("solve t.npz -v -s eplb --baseline old.json -o new.json --model gpt-oss-20b").err
    moved = shell("diff old.json new.json --json").json
    terms = json.loads((shell.folder / "new.json").read_text())["terms"]
    assert terms["moved_copies"] == {"unit": "copies", "value": moved["moved_copies"]}
    assert terms["moved_bytes"] == {"unit": "bytes", "value": moved["moved_bytes"]}
    assert moved["moved_copies"] > 0
    assert f"{moved['moved_copies']} of 96 copies" in log
    shell.fails("solve t.npz --baseline old.json --num-gpus 4 -o x.json", "the baseline placement has", "8 GPUs")


@pytest.mark.parametrize("objective", ["step-time", "load", "copies", "cross"])
def test_direct_networks_take_every_objective(shell: Shell, objective: str) -> None:
    """A torus is optimised for time, load and traffic, and scored with its links by name."""
    document = shell(f"solve t.npz -q -t torus:2x2x2 --objective {objective} -o p.json --json").json
    assert document["objective"]["name"] == objective
    scored = shell("score t.npz p.json --phase decode -t torus:2x2x2 -t torus:2x2x2:valiant --json").json["scores"]
    assert {entry["link"] for entry in scored[0]["link_utilisation"]} == {f"link {s}{d}" for s in "+-" for d in "xyz"}
    assert [entry["topology"] for entry in scored] == ["torus:2x2x2", "torus:2x2x2:valiant"]


def test_counts_can_be_balanced_and_nothing_else(shell: Shell) -> None:
    """Counts solve and score, with a note; copies and batch laws are refused with a reason."""
    assert "only counts" in shell("solve counts.npz --num-redundant-experts 8 -o p.json").err
    assert "recorded steps" in shell("score counts.npz p.json linear").out
    shell.fails("solve counts.npz --objective copies", "holds only counts", "--objective load")
    shell.fails("solve counts.npz --batch-tokens 2", "--batch-tokens on counts")
    shell.fails("score counts.npz linear --batches 10 --batch-requests 2", "--batch-requests, --batches on counts")


# --- mistakes --------------------------------------------------------------------------------------------------------

USAGE = {
    "slove t.npz": "Did you mean solve",
    "nonsense": "Commands: solve, score",
    "solve": "Missing argument 'TRACE'",
    "solve t.npz --topolgy x": "Did you mean '--topology'",
    "solve t.npz extra": "one trace, not 2: several are for --robust",
    "solve t.npz --objective lod": "'lod' is not one of 'step-time'",
    "solve t.npz --gap 2": "write 0.01 or 1%",
    "solve t.npz --time-limit 5x": "write 90, 90s, 5m or 1h",
    "solve t.npz --time-limit 0": "write 90, 90s, 5m or 1h",
    "solve t.npz --require optimum": "'--require': 'optimum' is neither 'optimal' nor a gap",
    "solve t.npz --seed -1": "'-1' is not a whole number of at least 0",
    "solve t.npz --threads 0": "at least 1",
    "solve t.npz --option policy": "'policy' is not KEY=VALUE",
    "solve t.npz --config nofile.toml": "nofile.toml: No such file",
    "solve - --baseline -": "standard input can be read once",
    "score - -": "standard input can be read once",
    "score t.npz": "Missing argument",
    "list": "Choose from",
    "list solver": "'solver' is not one of 'solvers'",
    "solve t.npz -o t.npz": "t.npz is the input",
    "convert t.npz t.npz": "t.npz is the input",
    "convert t.npz - --json": "name the output",
}
INPUT = {
    "solve nope.npz": ("no such file",),
    "solve t.np": ("no such file", "did you mean t.npz"),
    "solve .": ("a file",),
    "solve t.npz --model mixtrl": ("unknown model 'mixtrl'", "did you mean mixtral"),
    "solve t.npz --model mixtral-8x7b": ("num_experts is 32", "mixtral-8x7b has 8"),
    "solve t.npz -t scaleup:8": ("unknown topology kind", "did you mean scale-up"),
    "solve t.npz -t hgx-h10": ("unknown topology", "did you mean hgx-h100"),
    "solve t.npz -t scale-out:2": ("1 dimensions", "scale-out has 2"),
    "solve t.npz --accelerator h10": ("unknown accelerator", "did you mean h100"),
    "solve t.npz -s epbl": ("unknown solver 'epbl'", "did you mean eplb"),
    "solve t.npz -s eplb+lineer": ("unknown solver 'lineer'", "did you mean linear"),
    "solve t.npz --format nativ": ("unknown placement format", "did you mean native"),
    "solve t.npz --input-format np": ("unknown format 'np'", "did you mean npz"),
    "solve t.npz --slots-per-gpu 3": ("24 slots for 32 experts", "hint: --slots-per-gpu 4"),
    "solve t.npz --slots-per-gpu 5 --num-redundant-experts 3": ("40 slots", "need 35", "give one of"),
    "solve t.npz --num-gpus 4 -t scale-out:2x4": ("4 GPUs on scale-out:2x4", "leave one of"),
    "solve t.npz -o no/p.json": ("no/p.json: cannot be written", "create the folder first"),
    "solve t.npz -o .": ("is a directory",),
    "solve t.npz --load-cap 0.5": ("load cap 0.5", "at least 1"),
    "solve t.npz --load-cap elpb": ("load cap 'elpb'", "or eplb"),
    "solve t.npz --load-cap nan": ("load cap nan",),
    "solve t.npz --fit hlf:0": ("unknown split", "did you mean half"),
    "solve t.npz --fit domain:code": ("domain 'code'",),
    "solve t.npz --risk p99 --objective copies": ("risk p99 of copies", "have a tail"),
    "solve t.npz -s eplb --option polcy=global": ("no option 'polcy'", "its options are copies, policy"),
    "solve t.npz -s eplb --backend cbc": ("no option 'backend'",),
    "score t.npz lineer": ("unknown placement 'lineer'", "did you mean linear"),
    "score t.npz nope.json": ("nope.json: no such file",),
    "score t.npz t.npz": ("t.npz: is not a placement file", "moeplace solve TRACE"),
    "score t.npz linear linear": ("given twice",),
    "score t.npz linear --batch-requests 500": ("only ", "--batch-requests"),
    "diff t.npz t.npz": ("is not a placement file",),
    "convert t.npz u.csv": ("'.csv' names no format",),
    "convert t.npz no/u.npz": ("cannot be written", "create the folder first"),
    "convert counts.npz u.jsonl": ("counts cannot be written as jsonl",),
}


@pytest.mark.parametrize("line", USAGE)
def test_usage_errors_exit_with_2(shell: Shell, line: str) -> None:
    """A command that cannot be read exits with 2, says what is wrong, and points to the help."""
    before = shell.files()
    message = shell.fails(line, USAGE[line], code=2)
    assert "--help explains every option" in message or "standard input" in message or "name " in message
    assert shell.files() == before


@pytest.mark.parametrize("line", INPUT)
def test_input_errors_exit_with_1_and_say_what_and_how(shell: Shell, line: str) -> None:
    """Bad names, files and numbers exit with 1; the message has the value, the rule or a hint; nothing is left over."""
    before = shell.files()
    shell.fails(line, *INPUT[line])
    assert shell.files() == before


def _bad_files(folder: Path) -> dict[str, tuple[str, ...]]:
    import gzip

    trace = dict(np.load(folder / "t.npz"))
    ids = trace["expert_ids"]

    def changed(name: str, value: int) -> None:
        other = ids.copy()
        other[5, 0, 2] = value
        np.savez(folder / name, **{**trace, "expert_ids": other})

    changed("range.npz", 200)
    changed("twice.npz", int(ids[5, 0, 1]))
    text = (folder / "t.jsonl").read_bytes()
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:200])
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "garbage").write_bytes(bytes(range(128, 256)) * 9)
    (folder / "cut.npz").write_bytes((folder / "t.npz").read_bytes()[:600])
    lines = text.decode().splitlines()
    (folder / "ragged.jsonl").write_text("\n".join([*lines[:3], lines[3].replace("]]", ",1]]"), *lines[4:]]))
    np.save(folder / "nan.npy", np.array([[1.0, np.nan], [1, 2]]))
    return {
        "range.npz": ("expert_ids[5, 0, 2]: expert 200", "0..31"),
        "twice.npz": ("expert_ids[5, 0, 2]", "stands twice"),
        "cut.jsonl.gz": ("gzip data ends early",),
        "empty.jsonl": ("is empty",),
        "garbage": ("no known format", "hint: known formats: "),
        "cut.npz": ("cut.npz",),
        "ragged.jsonl": ("ragged.jsonl:4:", "top-4 in every row"),
        "nan.npy": ("count NaN", "whole numbers"),
    }


def test_bad_traces_name_the_place_and_never_touch_the_output(shell: Shell) -> None:
    """Each kind of damaged trace exits with 1 and names file and place; an output that was there stays as it was."""
    (shell.folder / "p.json").write_text("kept")
    bad = _bad_files(shell.folder)
    before = shell.files()
    for name, words in bad.items():
        for command in (f"solve {name} -o p.json", f"stats {name}", f"convert {name} p.json --to npz"):
            shell.fails(command, name, *words)
    assert (shell.folder / "p.json").read_text() == "kept"
    assert shell.files() == before


def test_skip_bad_leaves_rows_out_up_to_the_number_given(shell: Shell) -> None:
    """--skip-bad N reads on past N bad rows with a note, and fails at one more."""
    lines = (shell.folder / "t.jsonl").read_text().splitlines()
    (shell.folder / "bad.jsonl").write_text("\n".join([*lines[:5], "oops", *lines[5:], "oops"]))
    assert "400 tokens" in shell("stats bad.jsonl --skip-bad 2").out
    shell.fails("stats bad.jsonl --skip-bad 1", "bad.jsonl:")


def test_unexpected_errors_are_one_line_unless_debugged(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours exits with 1 and names --debug, which shows the traceback."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("moeplace.profile.count_and_profile", broken)
    assert shell("stats t.npz", 1).err == "error: RuntimeError: a fault (unexpected; --debug shows where)\n"
    with pytest.raises(RuntimeError):
        run(["stats", "t.npz", "--debug"])


# --- settings --------------------------------------------------------------------------------------------------------


def test_flag_beats_environment_beats_file_beats_default(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same option from four places: the nearer one to the user wins."""

    def seed(line: str) -> int:
        value: int = shell(f"solve t.npz -q {line}").json["provenance"]["seed"]
        return value

    (shell.folder / "run.toml").write_text("seed = 3\n")
    assert seed("") == 0
    assert seed("--config run.toml") == 3
    monkeypatch.setenv("MOEPLACE_SEED", "5")
    assert seed("--config run.toml") == 5
    assert seed("--config run.toml --seed 7") == 7


def test_one_config_serves_every_command(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of other commands are passed over; a table of a command's name wins for it; MOEPLACE_CONFIG works too."""
    text = 'topology = "scale-out:2x4"\nsolver = "eplb"\nbatches = 2\nseed = 1\n[solve]\nseed = 4\ntime-limit = "90s"\n'
    (shell.folder / "run.toml").write_text(text + '[solve.option]\npolicy = "global"\n')
    monkeypatch.setenv("MOEPLACE_CONFIG", "run.toml")
    document = shell("solve t.npz -q").json
    assert document["topology"]["name"] == "scale-out:2x4"
    assert document["provenance"]["seed"] == 4
    assert document["provenance"]["limits"]["time_limit_s"] == 90
    assert document["provenance"]["options"] == {"policy": "global"}
    (entry,) = shell("score t.npz linear --json").json["scores"][:1]
    assert (entry["topology"], entry["batch"]["batches"], entry["batch"]["seed"]) == ("scale-out:2x4", 2, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = 3", "no option 'sed'; did you mean seed or seeds?"),
        ("[solve]\nbatches = 3", "solve has no option 'batches'"),
        ("[sovle]\nseed = 3", "no option 'sovle'"),
        ("seed = = 3", "not TOML"),
        ('seed = "x"', "'x' is not a whole number of at least 0 (from the --config file)"),
        ('config = "y.toml"', "no option 'config'"),
    ],
)
def test_bad_configs_are_usage_errors(shell: Shell, text: str, words: str) -> None:
    """A key nobody knows, a value that does not fit and a file that is not TOML exit with 2 and name the key."""
    (shell.folder / "run.toml").write_text(text)
    shell.fails("solve t.npz --config run.toml", words, code=2)


def test_bad_variables_are_named(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value from the environment that does not fit is reported with its variable."""
    monkeypatch.setenv("MOEPLACE_SEED", "abc")
    shell.fails("solve t.npz", "'abc' is not a whole number", "MOEPLACE_SEED", code=2)


# --- the other commands ----------------------------------------------------------------------------------------------


def test_json_of_every_command_is_sorted_and_repeats(shell: Shell) -> None:
    """Each command's --json is one document with a schema and sorted keys, the same bytes when run again."""
    shell("solve t.npz -q -o p.json")
    lines = {
        "solve": "solve t.npz --json",
        "score": "score t.npz p.json linear --json --batches 5",
        "compare": "compare t.npz -s linear,eplb --num-gpus 2 --seeds 2 --batches 5 --json",
        "plan": "plan t.npz --ep-sizes 4 --batches 4 --steps 4 --accelerators h100 -t scale-up -s eplb --json",
        "stats": "stats t.npz --json",
        "export": "export p.json --format vllm-ascend -o a.json --json",
        "check": "check a.json --num-gpus 8 --json",
        "diff": "diff p.json p.json --json",
        "convert": "convert t.npz u.jsonl --json",
        "synth": "synth olmoe-1b-7b --tokens 600 -o s.npz --json",
        "list": "list models --json",
        "help": "help sglang --json",
        "doctor": "doctor --json",
    }
    assert list(lines) == list(COMMANDS)
    for name, line in lines.items():
        first = shell(line)
        assert first.json["schema"].startswith("moeplace/"), name
        assert shell(line).out == first.out, name


def test_score_takes_topology_and_model_from_the_placement_file(shell: Shell) -> None:
    """What a placement was made for is where it is judged by default, and the notes say so."""
    shell("solve t.npz -q -t hgx-h100-2x8 --model gpt-oss-20b -o p.json")
    done = shell("score t.npz p.json linear --batches 2 --phase decode")
    assert done.out.startswith("hgx-h100-2x8, decode: 2 steps of")
    assert "gpt-oss-20b" in done.out.splitlines()[0]
    assert "topology hgx-h100-2x8 of h100, as the placement files name it" in done.err
    assert "model gpt-oss-20b, as the placement files name it" in done.err


def test_score_refuses_to_guess_a_topology_it_cannot_rebuild(shell: Shell) -> None:
    """A placement made for a user's own file, or another accelerator, needs --topology."""
    (shell.folder / "mine.toml").write_text('kind = "scale-up"\ndims = [4]\n')
    shell("solve t.npz -q -t mine.toml -o p.json")
    shell.fails("score t.npz p.json", "made for 'mine'", "give --topology")
    shell("score t.npz p.json -t mine.toml --batches 2")
    shell("solve t.npz -q -t scale-up:4 --accelerator b200 -o p.json")
    shell.fails("score t.npz p.json", "made for 'scale-up:4'", "--accelerator")


def test_score_of_several_placements_and_topologies(shell: Shell) -> None:
    """Every placement stands beside every other under each topology and phase; labels are file names."""
    shell("solve t.npz -q -o a.json -s linear")
    (shell.folder / "sub").mkdir()
    shell("solve t.npz -q -o sub/a.json -s eplb")
    document = shell("score t.npz a.json sub/a.json linear -t scale-up:8 -t scale-out:2x4 --batches 3 --json").json
    seen = {(s["placement"], s["topology"], s["phase"]) for s in document["scores"]}
    labels, places = {"a", "sub/a.json", "linear"}, {"scale-up:8", "scale-out:2x4"}
    assert seen == {(a, b, c) for a in labels for b in places for c in ("decode", "prefill")}
    by_label = {s["placement"]: s["step_time_us"] for s in document["scores"]}
    assert by_label["a"] == by_label["linear"]
    only = shell("score t.npz a.json --phase prefill --batches 3 --json").json["scores"]
    assert {s["phase"] for s in only} == {"prefill"}


def test_score_refuses_placements_of_other_shapes(shell: Shell) -> None:
    """Another number of GPUs or another model is an error, not a figure."""
    shell("solve t.npz -q -o p.json")
    shell.fails("score t.npz p.json -t scale-up:4", "for 8 GPUs", "scale-up:4 has 4")
    write_trace(make_trace(1, experts=6), shell.folder / "six.npz")
    shell.fails("score six.npz p.json", "3 layers of 32 experts", "2 of 6")
    shell("solve six.npz -q -s eplb --num-gpus 8 -o six.json")
    shell.fails("diff p.json six.json", "3 layers of 32 experts on 8 GPUs", "2 layers of 6 experts on 8 GPUs")


def test_diff_counts_what_arrives(shell: Shell) -> None:
    """Copies that arrive and leave add up, per GPU and per layer; equal placements move nothing."""
    shell("solve t.npz -q -o a.json -s linear")
    shell("solve t.npz -q -o b.json -s eplb --num-redundant-experts 8")
    document = shell("diff a.json b.json --json --model gpt-oss-20b").json
    assert sum(document["arriving_per_gpu"]) == document["moved_copies"]
    assert sum(layer["moved_copies"] for layer in document["per_layer"]) == document["moved_copies"]
    assert sum(document["arriving_per_gpu"]) - sum(document["leaving_per_gpu"]) == 3 * 8
    assert document["moved_bytes"] > 0
    assert shell("diff a.json a.json").out == "0 of 96 copies move (0.0%)\n"
    assert shell("diff a.json b.json").out.splitlines()[1].split() == ["GPU", "arriving", "leaving"]


def test_convert_and_back_is_the_same_trace(shell: Shell) -> None:
    """From npz to JSONL and back, and JSONL through standard output, keep the digest; parts of a split add up."""

    def digest(name: str) -> str:
        value: str = shell(f"stats {name} --json").json["trace_digest"]
        return value

    shell("convert t.npz u.jsonl.zst -q")
    shell("convert u.jsonl.zst v.npz -q")
    assert digest("v.npz") == digest("t.npz")
    (shell.folder / "w.jsonl").write_text(shell("convert t.npz - -q").out)
    assert digest("w.jsonl") == digest("t.npz")
    for part in ("fit", "test"):
        shell(f"convert t.npz {part}.npz --part half:0 --keep {part} -q")
    sizes = [shell(f"stats {part}.npz --json").json["num_tokens"] for part in ("fit", "test")]
    assert sum(sizes) == 400


@pytest.mark.parametrize("kind", ["solvers", "topologies", "models", "accelerators", "formats"])
def test_lists_are_complete_and_unwrapped(shell: Shell, kind: str) -> None:
    """Every entry of a list's JSON has a line of its own in the table, whole, with nothing behind it."""
    entries = shell(f"list {kind} --json").json["entries"]
    text = shell(f"list {kind}").out
    assert entries
    for entry in entries:
        assert re.search(rf"^{re.escape(entry['name'])}  ", text, re.M)
        assert str(entry.get("description", "")) in text
    assert not re.search(r" $", text, re.M)


def test_every_solver_s_options_stand_below_it(shell: Shell) -> None:
    """Also where two solvers have an option of one name."""
    entries = shell("list solvers --json").json["entries"]
    blocks: list[set[str]] = []
    for line in shell("list solvers").out.splitlines():
        blocks += [] if line.startswith("  --option ") else [set()]
        blocks[-1].add(line.split("=…")[0].removeprefix("  --option ") if "  --option " in line else line.split()[0])
    assert blocks == [{e["name"], *e["options"]} for e in entries]


def test_list_survives_a_solver_that_does_not_load(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's broken solver is listed as such, and the others beside it."""
    from moeplace import solvers

    load = solvers.load_solver
    monkeypatch.setattr(solvers, "list_solvers", lambda: ("broken", "linear"))
    monkeypatch.setattr(solvers, "load_solver", lambda name: load("linear") if name == "linear" else 1 / 0)
    names = {e["name"]: e["description"] for e in shell("list solvers --json").json["entries"]}
    assert names["broken"] == "does not load: division by zero"
    assert "contiguous" in names["linear"]


def test_doctor_solves_a_tiny_problem_with_each_backend(shell: Shell) -> None:
    """CBC, CP-SAT and the compiled kernels are tried, not only looked for."""
    document = shell("doctor --json").json
    assert {document[name] for name in ("CBC", "CP-SAT", "compiled kernels")} == {"ok"}
    assert document["numpy"] == np.__version__


def test_doctor_fails_where_a_solver_gives_a_wrong_answer(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that answers wrongly is reported, and the exit code is 1."""
    from moeplace import milp
    from moeplace.solution import Status, StopReason

    wrong = milp.MilpResult(
        values=np.ones(3), objective=15.0, bound=15.0, status=Status.OPTIMAL, stop_reason=StopReason.PROVEN
    )
    monkeypatch.setitem(milp.BACKENDS, "cbc", lambda *_: wrong)
    done = shell("doctor", 1)
    assert re.search(r"^CBC +does not work: SolverError: cbc answers \[1, 1, 1\]", done.out, re.M)
    assert re.search(r"^CP-SAT +ok$", done.out, re.M)


def test_help_and_version(shell: Shell) -> None:
    """Without a command the help is shown with exit 2, as for a missing argument; --help and --version exit with 0."""
    assert "Usage: moeplace" in shell("", 2).err
    for name in COMMANDS:
        assert shell(f"{name} -h").out.startswith(f"Usage: moeplace {name}")
    assert shell("--version").out.startswith("moeplace ")
    assert "_MOEPLACE_COMPLETE=bash_source moeplace" in shell("--help").out


# --- processes, pipes, terminals, signals ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_completion_scripts(tmp_path: Path, kind: str) -> None:
    """The variable named in the help makes a completion script for each shell."""
    words = [sys.executable, "-m", "moeplace"]
    variables = {**os.environ, "_MOEPLACE_COMPLETE": f"{kind}_source"}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    assert "_MOEPLACE_COMPLETE" in done.stdout
    if kind == "bash":
        variables |= {"_MOEPLACE_COMPLETE": "bash_complete", "COMP_WORDS": "moeplace solve --obj", "COMP_CWORD": "2"}
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
        assert done.stdout == "plain,--objective\n"


def test_a_trace_from_standard_input(shell: Shell) -> None:
    """A pipe gives the same bytes as the file, for traces and for placements."""
    shell("solve t.npz -q -o p.json")
    with started(shell.folder, "solve - -q") as process:
        out, err = process.communicate((shell.folder / "t.jsonl").read_text())
    assert (process.returncode, err) == (0, "")
    assert out == (shell.folder / "p.json").read_text()


def test_a_reader_that_leaves_is_no_error(shell: Shell) -> None:
    """``| head`` ends a command that still has much to write, silently and with exit 0."""
    write_trace(make_trace(0, **(SHAPE | {"tokens": 20_000})), shell.folder / "long.npz")
    with started(shell.folder, "convert long.npz - -q") as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("{")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("line", ["stats t.npz -q", "solve t.npz -q", "solve t.npz -q -o /dev/full"])
def test_a_full_disk_is_reported(shell: Shell, line: str) -> None:
    """Output that cannot be written is an error with exit 1, once, without a traceback."""
    with open("/dev/full", "w") as full, started(shell.folder, line, stdout=full) as process:
        _, err = process.communicate()
    assert process.returncode == 1
    assert err.count("cannot be written: No space left on device") == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("exec moeplace stats t.npz >&-", 1, "standard output cannot be written"),
        ("exec moeplace solve t.npz -q -o p.json >&-", 0, ""),
        ("exec moeplace solve t.npz -o q.json 2>&-", 0, ""),
        ("exec moeplace solve - -q <&-", 1, "standard input is closed"),
    ],
)
def test_closed_streams(shell: Shell, line: str, code: int, words: str) -> None:
    """A closed stream matters only where it is needed."""
    script = line.replace("moeplace", f"{sys.executable} -m moeplace", 1)
    done = subprocess.run(["sh", "-c", script], cwd=shell.folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_sees_the_log_and_where_the_placement_went(shell: Shell) -> None:
    """On a terminal without -o the summary is shown, no JSON, and a line says that nothing was written and how to."""
    shown = on_terminal(shell.folder, "solve t.npz -s eplb")
    assert "status " in shown
    assert '"slots"' not in shown
    assert "not written: name a file with -o FILE" in shown.splitlines()[-1]
    shown = on_terminal(shell.folder, "solve t.npz -s eplb -o p.json")
    assert shown.splitlines()[-1] == "written to p.json"
    assert '"slots"' in on_terminal(shell.folder, "solve t.npz -s eplb --json")


def test_colours_only_where_they_are_wanted(shell: Shell) -> None:
    """A terminal gets colours unless NO_COLOR is set; a pipe never does."""
    assert "\x1b[33m" in on_terminal(shell.folder, "solve t.npz -s eplb")
    assert "\x1b[3" not in on_terminal(shell.folder, "solve t.npz -s eplb", NO_COLOR="1")
    assert "\x1b" not in shell("solve t.npz -s eplb -v -o p.json").err


def test_narrow_terminals_keep_cells_whole(shell: Shell) -> None:
    """At 50 columns a score shows one placement beneath the other; no number is broken and no line is longer."""
    shell("solve t.npz -q -o p.json -t scale-out:2x4")
    shown = on_terminal(shell.folder, "score t.npz p.json linear --phase decode --batches 30 -q", width=50)
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()[1:]
    assert [line.split() for line in lines if line.startswith("figure")] == [["figure", "p"], ["figure", "linear"]]
    rows = [line for line in lines if line.startswith("step ")]
    assert len(rows) == 10
    assert all(re.search(r"µs\] +[\d,.]+ ± [\d,.]+$", row) and len(row) <= 50 for row in rows)


@pytest.fixture
def slow(shell: Shell) -> dict[str, str]:
    """Environment in which another package offers the solver ``slow``, through the entry-point group."""
    folder = shell.folder / "plugin"
    meta = folder / "slowsolver-1.0.dist-info"
    meta.mkdir(parents=True)
    (folder / "slowsolver.py").write_text(PLUGIN)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: slowsolver\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[moeplace.solvers]\nslow = slowsolver\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def _wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"{words!r} never came")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("group", [False, True])
def test_an_interrupted_solver_keeps_its_best(shell: Shell, slow: dict[str, str], number: int, group: bool) -> None:
    """One Ctrl-C or SIGTERM, to the process or its group: the best is written, says so, and the exit code is 130."""
    settings: dict[str, Any] = {"env": slow, "start_new_session": True}
    with started(shell.folder, "solve t.npz -s slow -v -o p.json", **settings) as process:
        _wait_for(process, "waiting")
        os.killpg(process.pid, number) if group else process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert "the best placement so far is kept" in err
    assert json.loads((shell.folder / "p.json").read_text())["stop_reason"] == "interrupted"


def test_a_second_interrupt_ends_the_program(shell: Shell, slow: dict[str, str]) -> None:
    """A solver that does not stop is left by a second Ctrl-C: exit 130, the old output untouched, nothing left over."""
    (shell.folder / "p.json").write_text("kept")
    before = shell.files()
    line = "solve t.npz -s slow --option stubborn=1 -v -o p.json"
    with started(shell.folder, line, env=slow) as process:
        _wait_for(process, "waiting")
        process.send_signal(signal.SIGINT)
        _wait_for(process, "Ctrl-C again")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.endswith("interrupted\n")
    assert (shell.folder / "p.json").read_text() == "kept"
    assert shell.files() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_reading(shell: Shell, number: int, code: int) -> None:
    """Stopped while the trace is still being read: no answer, the old output untouched, nothing left over."""
    (shell.folder / "p.json").write_text("kept")
    before = shell.files()
    with started(shell.folder, "solve - -v -o p.json") as process:
        assert process.stdin
        process.stdin.write('{"req_id":1,"token_idx":0,"topk_ids":[[0,1]]}\n')
        process.stdin.flush()
        _wait_for(process, "reading")
        process.send_signal(number)
        assert process.stderr
        err = process.stderr.read()
        process.stdin.close()
    assert process.returncode == code
    assert "Traceback" not in err
    assert (shell.folder / "p.json").read_text() == "kept"
    assert shell.files() == before


def test_a_table_whose_reader_leaves_is_no_failure(tmp_path: Path) -> None:
    """A table piped into a reader that has gone ends with exit code 0 and no message."""
    words = [
        sys.executable,
        "-m",
        "moeplace",
        "stats",
        str(Path(__file__).parents[1] / "traces" / "hand.jsonl"),
        "-q",
        "--num-gpus",
        "2",
    ]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    _, said = child.communicate()
    assert (child.returncode, said) == (0, b"")


def test_a_placement_fitted_on_the_scored_tokens_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scoring on the fit part is allowed but said; scoring on the other part says nothing of the kind."""
    trace, placed = str(Path(__file__).parents[1] / "traces" / "tinymoe_8x32_top4.npz"), str(tmp_path / "p.json")
    assert run(["solve", trace, "--num-gpus", "8", "-s", "eplb", "--fit", "half:0", "-q", "-o", placed]) == 0
    capsys.readouterr()
    steps = ["--phase", "decode", "--batch-requests", "16", "--batches", "4"]
    assert run(["score", trace, placed, "--test", "half:0", *steps]) == 0
    assert "fitted on these very tokens" not in capsys.readouterr().err
    whole = str(tmp_path / "whole.json")
    assert run(["solve", trace, "--num-gpus", "8", "-s", "eplb", "--phase", "decode", "-q", "-o", whole]) == 0
    assert run(["score", trace, whole, *steps]) == 0
    assert "whole was fitted on these very tokens" in capsys.readouterr().err


def test_an_interrupt_is_not_the_exact_type_python_ends_itself_for() -> None:
    """Ctrl-C raises a subclass of KeyboardInterrupt, so that the exit code is 130 whatever it crosses."""
    from moeplace import cli

    with pytest.raises(cli.Interrupted):
        cli._interrupt(2, None)
    assert issubclass(cli.Interrupted, KeyboardInterrupt)
    assert cli.Interrupted.seen
    cli.Interrupted.seen = False


@pytest.mark.parametrize(
    ("when", "code", "said"),
    [
        ("sys.meta_path.insert(0, type('Early', (), {'find_spec': lambda *_: stop()}))", 130, "interrupted\n"),
        ("atexit.register(stop)", 0, ""),
    ],
)
def test_an_interrupt_before_or_after_the_work_is_no_traceback(when: str, code: int, said: str) -> None:
    """Ctrl-C while Python still imports the command line, or already ends, shows no traceback."""
    program = f"""
import atexit, os, signal, sys
from moeplace.__main__ import main
def stop():
    os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["moeplace", "list", "models"]
{when}
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def test_an_interrupt_lost_in_an_import_still_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that stands in for a lost Ctrl-C ends with 130, not as an error."""
    from moeplace import cli

    def fail(*words: object, **settings: object) -> None:
        raise ImportError("initialization failed")

    monkeypatch.setattr(cli.cli, "main", fail)
    assert cli.run(["stats"]) == 1
    monkeypatch.setattr(cli.Interrupted, "seen", True)
    assert cli.run(["stats"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_stats_tells_patterns_and_what_looks_wrong(shell: Shell) -> None:
    """After the table come six published patterns, each with the published figure, and the findings; JSON has both."""
    text = shell("stats t.npz").out
    assert text.count("(published: ") == 6
    assert "\nchecks\n" in text
    document = shell("stats t.npz --json").json
    assert {"insight", "findings", "per_layer"} <= set(document)
    assert {finding["check"] for finding in document["findings"]} >= {"few-requests"}
