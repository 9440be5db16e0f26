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
    """The same run cannot be begun twice; it can be once the first has ended."""
    with Journal("key", tmp_path):
        with pytest.raises(OutputError, match="another process is at work"), Journal("key", tmp_path):
            pass
        with Journal("other", tmp_path):
            pass
    with Journal("key", tmp_path):
        pass


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
