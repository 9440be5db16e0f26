"""``moeplace convert``: other formats, parts of traces, and counts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from shell import SHAPE, Shell, on_terminal
from strategies import make_trace

from moeplace.readers import read_trace
from moeplace.trace import Counts, Trace
from moeplace.writers import write_trace


def digest(shell: Shell, line: str) -> str:
    """Digest of the tokens that ``stats`` sees."""
    value: str = shell(f"stats {line} --json").json["trace_digest"]
    return value


def requests_of(shell: Shell, name: str) -> set[int]:
    """Request numbers of a trace file."""
    trace = read_trace(shell.folder / name)
    assert isinstance(trace, Trace)
    return set(trace.request.tolist())


@pytest.mark.parametrize("rule", ["half:0", "half:3", "time:0.3", "domain:a"])
def test_split_writes_the_requests_that_fit_and_test_see(shell: Shell, rule: str) -> None:
    """Both files at once, with the tokens of ``--fit`` and ``--test`` of the same rule; half:0 is the default."""
    trace = make_trace(0, **SHAPE)
    domains = trace.replace(meta=trace.meta.replace(domains=("a", "b")), domain=trace.request % 2)
    write_trace(domains, shell.folder / "d.npz")
    shell(f"convert d.npz --split fit.npz,test.jsonl.zst --by {rule} -q")
    assert digest(shell, "fit.npz") == digest(shell, f"d.npz --fit {rule}")
    for part, name in (("fit", "fit.npz"), ("test", "test.jsonl.zst")):
        shell(f"convert d.npz part.npz --part {rule} --keep {part} -q")
        assert digest(shell, name) == digest(shell, "part.npz")
    assert requests_of(shell, "fit.npz") | requests_of(shell, "test.jsonl.zst") == set(trace.request.tolist())
    if rule == "half:0":
        shell("convert d.npz --split f.npz,g.npz -q")
        assert (shell.folder / "f.npz").read_bytes() == (shell.folder / "fit.npz").read_bytes()


def test_split_writes_both_files_or_none(shell: Shell) -> None:
    """Where one output cannot be written, the other is not touched either; what was there stays."""
    (shell.folder / "fit.npz").write_text("kept")
    shell.fails("convert t.npz --split fit.npz,no/test.npz", "no/test.npz: cannot be written")
    shell.fails("convert t.npz --split fit.npz,test.csv", "'.csv' names no format")
    shell.fails("convert t.npz --split fit.npz,test.npz --by time:0.001", "the fit part of time:0.001 is empty")
    assert (shell.folder / "fit.npz").read_text() == "kept"
    assert shell.files() == ["counts.npz", "fit.npz", "t.jsonl", "t.npz"]


def test_requests_by_number_range_name_and_file(shell: Shell) -> None:
    """Kept and left out are the whole trace; a list on the line and in a file are the same; - reads standard input."""
    shell("convert t.npz in.npz --requests 1,10-19 -q")
    shell("convert t.npz out.npz --without-requests 1,10-19 -q")
    everything = requests_of(shell, "t.npz")
    inside = {number for number in everything if number == 1 or 10 <= number <= 19}
    assert requests_of(shell, "in.npz") == inside
    assert requests_of(shell, "out.npz") == everything - inside
    (shell.folder / "list.txt").write_text("1\n10-19\n")
    shell("convert t.npz file.npz --requests @list.txt -q")
    assert (shell.folder / "file.npz").read_bytes() == (shell.folder / "in.npz").read_bytes()
    shell("convert t.npz both.npz --requests @list.txt --without-requests 10 -q")
    assert requests_of(shell, "both.npz") == inside - {10}


def test_named_requests(shell: Shell) -> None:
    """Requests with names go by their names, and a typo is met with the nearest ones."""
    rows = [
        json.dumps({"req_id": name, "token_idx": i, "phase": "decode", "topk_ids": [[i % 4, 4]]})
        for name in ("math-1", "math-2", "law-1")
        for i in range(3)
    ]
    (shell.folder / "n.jsonl").write_text("\n".join(rows))
    shell("convert n.jsonl m.jsonl --requests math-2,law-1 -q")
    kept = read_trace(shell.folder / "m.jsonl")
    assert isinstance(kept, Trace)
    assert [kept.meta.request_names[i] for i in kept.request[::3]] == ["math-2", "law-1"]
    shell.fails("convert n.jsonl x.jsonl --requests maths-2", "unknown request 'maths-2'", "3 requests", "did you mean")
    assert "x.jsonl" not in shell.files()


def test_samples(shell: Shell) -> None:
    """A number or a share of the requests; the same seed gives the same bytes, another one another sample."""
    total = len(requests_of(shell, "t.npz"))
    for size, expected in (("5", 5), ("10%", round(total / 10)), ("0.5", round(total / 2)), ("100%", total)):
        shell(f"convert t.npz s.npz --sample {size} --seed 4 -q")
        assert len(requests_of(shell, "s.npz")) == expected
    shell("convert t.npz a.npz --sample 5 --seed 4 -q")
    shell("convert t.jsonl b.npz --sample 5 --seed 4 -q")
    shell("convert t.npz c.npz --sample 5 --seed 5 -q")
    assert requests_of(shell, "a.npz") == requests_of(shell, "b.npz") != requests_of(shell, "c.npz")
    assert digest(shell, "a.npz") == digest(shell, "b.npz")
    shell.fails("convert t.npz s.npz --sample 500", "a sample of 500 requests out of 20")


def test_options_compose_in_the_documented_order(shell: Shell) -> None:
    """One command is the commands of its options one after another: split, requests, phase, sample."""
    shell("convert t.npz 1.npz --part half:0 --keep test -q")
    left = sorted(requests_of(shell, "1.npz"))[:8]
    wanted = ",".join(map(str, left))
    shell(f"convert 1.npz 2.npz --requests {wanted} -q")
    shell("convert 2.npz 3.npz --phase decode -q")
    shell("convert 3.npz 4.npz --sample 3 -q")
    shell(f"convert t.npz all.npz --sample 3 --phase decode --requests {wanted} --keep test --part half:0 -q")
    assert (shell.folder / "all.npz").read_bytes() == (shell.folder / "4.npz").read_bytes()


def test_a_dummy_run_is_named_by_stats_and_dropped_as_its_hint_says(shell: Shell) -> None:
    """The finding's hint holds the option that drops what it found; it says how many rows went, or that none were."""
    trace = make_trace(0, **SHAPE)
    rows = np.concatenate([np.zeros(50, int), np.arange(1, 400)])
    write_trace(trace.take(rows), shell.folder / "d.npz")
    assert "moeplace convert --drop-dummy-run" in shell("stats d.npz").out
    assert "the first 50 rows are left out" in shell("convert d.npz e.npz --drop-dummy-run").err
    assert digest(shell, "e.npz") != digest(shell, "d.npz")
    assert "--drop-dummy-run" not in shell("stats e.npz").out
    assert "no dummy run stands at the start" in shell("convert t.npz f.npz --drop-dummy-run").err
    assert digest(shell, "f.npz") == digest(shell, "t.npz")


def test_a_trace_becomes_counts(shell: Shell) -> None:
    """By the name .json or by --to counts: the load of every layer and expert, with a note of what is lost."""
    for line, name in (
        ("c.json", "c.json"),
        ("c.json.zst", "c.json.zst"),
        ("d.npz --to counts", "d.npz"),
        ("e.json --phase decode", "e.json"),
    ):
        assert "affinity, requests and phases are lost" in shell(f"convert t.npz {line}").err
        counts = read_trace(shell.folder / name)
        assert isinstance(counts, Counts)
        assert counts.num_steps == 1
        assert counts.meta.top_k == 4
    content = json.loads((shell.folder / "c.json").read_text())
    trace = read_trace(shell.folder / "t.npz")
    assert isinstance(trace, Trace)
    load = [np.bincount(trace.experts[:, layer].ravel(), minlength=32).tolist() for layer in range(3)]
    assert content["logical_count"] == load
    assert json.loads(shell("convert t.npz - --to counts -q").out) == content
    assert "only counts" in shell("solve c.json -o p.json").err
    shell.fails("convert t.npz c.jsonl --to counts", "counts cannot be written as jsonl")


def test_counts_of_every_step(shell: Shell) -> None:
    """--per-step keeps the recorded steps, which score takes as batches; a trace without steps says so."""
    trace = make_trace(0, **SHAPE)
    write_trace(trace.replace(step=trace.position), shell.folder / "s.npz")
    shell("convert s.npz steps.json --per-step -q")
    shell("convert s.npz once.json -q")
    steps, once = (read_trace(shell.folder / name) for name in ("steps.json", "once.json"))
    assert isinstance(steps, Counts)
    assert isinstance(once, Counts)
    assert steps.num_steps == len(np.unique(trace.position))
    assert steps.counts.sum(axis=0).tolist() == once.counts[0].tolist()
    assert f"{steps.num_steps} recorded steps" in shell("score steps.json linear").out
    shell.fails("convert t.npz x.json --per-step", "the trace records no steps", "leave --per-step out")


def test_counts_as_input_are_split_by_step(shell: Shell) -> None:
    """The steps of counts are divided; what needs tokens is refused by its option's name."""
    shell("convert counts.npz --split a.json,b.json --by time:0.5 -q")
    a, b = (read_trace(shell.folder / name) for name in ("a.json", "b.json"))
    assert isinstance(a, Counts)
    assert isinstance(b, Counts)
    assert (a.num_steps, b.num_steps) == (2, 2)
    for line in ("--sample 3", "--requests 1", "--without-requests 1", "--drop-dummy-run"):
        shell.fails(f"convert counts.npz x.json {line}", f"{line.split()[0]} on counts", "can be split")
    shell.fails("convert counts.npz x.json --phase decode", "--phase decode on counts")


USAGE = {
    "convert t.npz": "Missing argument 'OUTPUT'",
    "convert t.npz u.npz --split a.npz,b.npz": "leave u.npz out",
    "convert t.npz --split a.npz": "give two files",
    "convert t.npz --split a.npz,b.npz,c.npz": "give two files",
    "convert t.npz --split a.npz,": "give two files",
    "convert t.npz --split a.npz,./a.npz": "give two files",
    "convert t.npz --split t.npz,b.npz": "t.npz is the input",
    "convert t.npz --split a.npz,b.npz --part half:0": "leave --part and --keep out",
    "convert t.npz --split a.npz,b.npz --keep test": "leave --part and --keep out",
    "convert t.npz --split a.jsonl,- --json": "name the output",
    "convert t.npz u.npz --by half:0": "give --split FIT,TEST",
    "convert t.npz u.npz --keep test": "give --part SPLIT",
    "convert t.npz u.npz --per-step": "--per-step is for counts",
    "convert t.npz u.json --per-step --to npz": "--per-step is for counts",
    "convert t.npz u.npz --sample 0": "write 200 or 10%",
    "convert t.npz u.npz --sample 110%": "write 200 or 10%",
    "convert t.npz u.npz --sample -5": "write 200 or 10%",
    "convert t.npz u.npz --sample some": "write 200 or 10%",
    "convert - u.npz --requests @-": "standard input can be read once",
}
INPUT = {
    "convert t.npz u.npz --requests 999": ("unknown request '999'", "the trace has 20 requests"),
    "convert t.npz u.npz --requests 19-10": ("a range goes up", "write 10-19"),
    "convert t.npz u.npz --requests @none.txt": ("none.txt: no such file",),
    "convert t.npz u.npz --requests ,": ("no requests in ','",),
    "convert t.npz u.npz --without-requests 0-999": ("none of the requests to keep",),
    "convert t.npz --split a.npz,b.npz --by hlf:0": ("unknown split", "did you mean half"),
    "convert t.npz --split a.npz,b.npz --by domain:x": ("names its domains",),
}


@pytest.mark.parametrize("line", USAGE)
def test_combinations_that_make_no_sense(shell: Shell, line: str) -> None:
    """What cannot be meant exits with 2, says what to give instead, and writes nothing."""
    before = shell.files()
    shell.fails(line, USAGE[line], code=2)
    assert shell.files() == before


@pytest.mark.parametrize("line", INPUT)
def test_values_that_do_not_fit(shell: Shell, line: str) -> None:
    """What does not fit the trace exits with 1, with the value and what there is, and writes nothing."""
    before = shell.files()
    shell.fails(line, *INPUT[line])
    assert shell.files() == before


def test_a_phase_that_the_trace_lacks_leaves_nothing(shell: Shell) -> None:
    """An empty trace is not written: nothing could read it."""
    write_trace(make_trace(0, prompt=0), shell.folder / "d.npz")
    for name in ("x.npz", "x.jsonl", "x.json"):
        shell.fails(f"convert d.npz {name} --phase prefill", "no tokens are left")
        assert name not in shell.files()


def test_a_person_is_told_what_was_written(shell: Shell) -> None:
    """On a terminal, or with --verbose, each output has a line with its size; JSON has the same numbers."""
    shown = on_terminal(shell.folder, "convert t.npz --split fit.npz,test.npz")
    assert "fit.npz: " in shown
    assert " tokens of 10 requests" in shown
    outputs: list[dict[str, Any]] = shell("convert t.npz --split a.npz,b.json --json").json["outputs"]
    assert [entry["num_requests"] for entry in outputs] == [10, 10]
    assert [entry["num_steps"] for entry in outputs] == [None, 1]
    assert sum(entry["num_tokens"] for entry in outputs) == 400
    assert "u.json: counts of 1 step: 400 tokens of 20 requests" in shell("convert t.npz u.json -v").err
    assert shell("convert counts.npz u.json -v").err.endswith("u.json: counts of 4 steps\n")
    assert shell("convert t.npz u.npz -q").err == ""
