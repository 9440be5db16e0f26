"""Progress on disk: what is kept comes back, one run at a time, and nothing stays for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from moeplace.errors import OutputError
from moeplace.journal import KEPT_DAYS, Journal


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    """Arrays of any name and type are those that were saved last, all or some; another key knows nothing of them."""
    arrays = {"a/b": np.arange(3, dtype=np.uint8), "c": np.array(7), "d": np.zeros((0, 2))}
    with Journal("key", tmp_path) as journal:
        assert journal.load("state") is None
        journal.save("state", {"old": np.arange(9)})
        journal.save("state", arrays)
    with Journal("key", tmp_path) as journal:
        found = journal.load("state")
        assert found is not None
        assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in arrays.items()}
        assert found["a/b"].dtype == np.uint8
        assert list(journal.load("state", only=("c",)) or {}) == ["c"]
        assert journal.names() == ["state"]
    with Journal("other", tmp_path) as journal:
        assert journal.names() == []
        journal.remove()
    assert len(list(tmp_path.iterdir())) == 1


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """A run that is begun twice has a folder of its own the second time, which ends with it; and says so."""
    told: list[str] = []
    with Journal("key", tmp_path) as first:
        first.save("a", {"x": np.arange(3)})
        with Journal("key", tmp_path, tell=told.append) as second:
            assert second.path != first.path
            assert second.names() == []
            second.save("b", {"x": np.arange(3)})
        assert not second.path.exists()
        assert first.names() == ["a"]
        with Journal("other", tmp_path, tell=told.append):
            pass
    with Journal("key", tmp_path, tell=told.append) as again:
        assert again.names() == ["a"]
    assert len(told) == 1
    assert "another process is at work" in told[0]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on in a temporary folder that is gone at the end, and the user is told."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told: list[str] = []
    with Journal("key", tell=told.append) as journal:
        journal.save("a", {"x": np.arange(3)})
        assert journal.names() == ["a"]
    assert not journal.path.exists()
    assert "--work-dir" in told[0]


def test_another_version_of_moeplace_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is read by the version that kept it alone."""
    here = Journal("key", tmp_path).path
    monkeypatch.setattr("moeplace.journal.metadata.version", lambda name: "0.0.1")
    assert Journal("key", tmp_path).path != here


def test_a_name_is_forgotten(tmp_path: Path) -> None:
    """Deleting a name twice is no error."""
    with Journal("key", tmp_path) as journal:
        journal.save("a", {"x": np.arange(3)})
        journal.delete("a")
        journal.delete("a")
        assert journal.names() == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """Where the progress cannot be kept the user is told which option names another folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written") as caught, Journal("key", tmp_path / "file"):
        pass
    assert "--work-dir" in str(caught.value.hint)


def test_old_runs_of_the_cache_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in the cache folder that nobody goes on with are deleted after a while; those elsewhere are the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("old", "new"):
        with Journal(name) as journal:
            path = journal.save("state", {"a": np.zeros(1)})
            if name == "old":
                long_ago = time.time() - (KEPT_DAYS + 1) * 86_400
                for file in [path.parent, *path.parent.iterdir()]:
                    os.utime(file, (long_ago, long_ago))
                old = path
    assert not old.exists()
    assert path.exists()
