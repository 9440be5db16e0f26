"""Traces of many files on the command line: the same answers as from one file, and no bad file unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shell import Shell
from test_corpus import damage, write_requests

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
    assert shell(f"{command} --quiet").err == "warning: 3 files left out; stats --json lists all\n"
    shell.fails(f"{command} --skip-bad 2", "3 of 43 files break the format", "--skip-bad N leaves out up to N of them")


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
