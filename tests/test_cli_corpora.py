"""Traces of many files on the command line: the same answers as from one file, and no bad file unseen."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from shell import Shell, on_terminal, started
from test_corpus import damage, write_requests

from moeplace import writers
from moeplace.cli.corpora import progress_bar
from moeplace.errors import InputError, OutputError

BAD = ("cut.json:1:", "other.json: 2 layers 1..2", "twice.json: step 0, layer 3, token 0: expert 2 stands twice")


@pytest.fixture
def shell(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell beside a folder ``c`` of forty requests, and the same as ``all.npz``; its cache is in the folder too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shell.folder / "cache"))
    write_requests(shell.folder / "c", 40)
    shell("convert c all.npz")
    return shell


def runs(shell: Shell, folder: str = "cache/moeplace/runs") -> list[Path]:
    """Runs whose progress is kept."""
    return list((shell.folder / folder).iterdir())


@pytest.mark.parametrize("more", ["", "--phase decode", "--fit half:3"])
def test_statistics_of_a_folder_are_those_of_its_tokens(shell: Shell, more: str) -> None:
    """A folder, or a part of it, has the statistics of the same tokens in one file, and leaves nothing behind."""
    assert shell(f"stats c --json {more}").json == shell(f"stats all.npz --json {more}").json
    assert runs(shell) == []


def test_placements_are_chosen_and_judged_from_a_folder(shell: Shell) -> None:
    """Solve and score read a folder as they read the same tokens in one file."""
    scores = []
    for trace in ("c", "all.npz"):
        shell(f"solve {trace} --num-gpus 2 --fit half:0 -o p.json")
        scores.append(shell(f"score {trace} linear p.json --num-gpus 2 --test half:0 --batches 20 --json").json)
    assert scores[0] == scores[1]
    assert runs(shell) == []


@pytest.mark.parametrize("command", ["stats c", "convert c out.npz"])
def test_bad_files_are_listed(shell: Shell, command: str) -> None:
    """Every bad file is on standard error with its reason, and counted; --quiet leaves the count."""
    damage(shell.folder / "c")
    err = shell(command).err
    for text in ("warning: 3 files left out:", *BAD, "note: 3 of 43 files break the format and are left out"):
        assert text in err, text
    assert shell(f"{command} --quiet").err == "warning: 3 files left out\n"
    shell.fails(f"{command} --skip-bad 2", "3 of 43 files break the format", "--skip-bad N leaves out up to N of them")


@pytest.mark.parametrize(
    "command", ["stats c", "solve c --num-gpus 2 -s linear -v -o p.json", "convert c - --to jsonl"]
)
def test_bad_files_are_the_last_thing_that_is_said(shell: Shell, command: str) -> None:
    """They do not scroll away behind tables or a log, on a terminal as in a pipe that both streams go to."""
    damage(shell.folder / "c")
    with started(shell.folder, command, stderr=subprocess.STDOUT) as process:
        out, _ = process.communicate()
    for text in (out, on_terminal(shell.folder, command)):
        last = text.splitlines()[-4:]
        assert last[0] == "warning: 3 files left out:", text
        assert all(words in line for words, line in zip(BAD, last[1:], strict=True)), text


@pytest.mark.parametrize("width", [30, 50, 80, 120])
def test_the_progress_bar_is_one_line(width: int) -> None:
    """A bar that wraps would leave a trail on a narrow terminal; how far it is shows at any width."""
    out = Console(width=width, file=io.StringIO(), force_terminal=True)
    bar = progress_bar(out)
    bar.add_task("counting", total=123_456_789_000, completed=9_876_543_210, files="1,234/9,999 files")
    lines = out.render_lines(bar.get_renderable())
    text = "".join(segment.text for segment in lines[0])
    assert len(lines) == 1
    assert "1,234/9,9" in text, text


def test_bad_files_are_in_the_document(shell: Shell) -> None:
    """JSON holds every bad file; without any there is no such key."""
    assert "bad_files" not in shell("stats c --json").json
    damage(shell.folder / "c")
    found = shell("stats c --json").json["bad_files"]
    assert [file["name"] for file in found] == ["art/cut.json", "art/other.json", "law/twice.json"]


def test_progress_is_kept_where_the_user_says(shell: Shell) -> None:
    """A run that ends in an error leaves its progress below --work-dir; the next goes on and forgets it."""
    damage(shell.folder / "c")
    shell.fails("stats c --skip-bad 0 --work-dir mine", "3 of 43 files")
    assert len(runs(shell, "mine")) == 1
    assert runs(shell) == []
    assert "counting: 43 of 43 files, 3 bad" in shell("stats c --work-dir mine --verbose").err
    assert runs(shell, "mine") == []


@pytest.mark.parametrize(
    ("error", "code", "kept"),
    [(KeyboardInterrupt(), 130, True), (OutputError("disk full"), 1, True), (InputError("no such request"), 1, False)],
)
def test_tokens_are_kept_for_a_command_that_is_stopped_while_it_writes(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, kept: bool
) -> None:
    """Ctrl-C or a full disk while a trace is written keeps what was read; the same command goes on, then forgets it."""

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(writers, "_write_npz", fail)
        err = shell("convert c out.npz", code=code).err
    assert ("what was read is kept: the same command goes on from there" in err) == kept
    assert len(runs(shell)) == kept
    assert "out.npz" not in shell.files()
    assert "reading: 40 of 40 files" in shell("convert c out.npz -v").err
    assert runs(shell) == []


@pytest.mark.parametrize("line", ["convert c no/out.npz", "convert c out.csv", "convert c --split out.npz,no/out.npz"])
def test_outputs_are_opened_before_anything_is_read(shell: Shell, line: str) -> None:
    """A name that cannot be written is told at once, with the formats that --to takes where it tells none."""
    err = shell(f"{line} --verbose", code=1).err
    assert ("cannot be written" if "no/" in line else "jsonl, npz, counts") in err
    assert "reading" not in err
    assert not (shell.folder / "cache" / "moeplace").exists() or runs(shell) == []
    assert "out.npz" not in shell.files()


def test_a_cluster_is_for_many_files(shell: Shell) -> None:
    """--cluster with one file is a usage error that says what it is for."""
    shell.fails("stats all.npz --cluster tcp://127.0.0.1:9", "--cluster is for a folder", code=2)


def test_the_largest_id_of_a_folder_names_the_experts(shell: Shell) -> None:
    """Without a model the number of experts is that of all files, whichever part is looked at."""
    path = shell.folder / "c" / "art" / "0000.json"
    steps = json.loads(path.read_text())
    steps[0]["3"][0] = [40, 2]
    path.write_text(json.dumps(steps))
    for more in ("", "--phase decode"):
        assert shell(f"stats c --json {more}").json["num_experts"] == 41


def test_a_cache_that_cannot_be_written_is_noted_unless_quiet(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command goes on without keeping progress; --quiet leaves the note out."""
    (shell.folder / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(shell.folder / "file"))
    assert "note: " in (err := shell("stats c").err)
    assert "progress is not kept; --work-dir names another folder" in err
    assert shell("stats c --quiet").err == ""
