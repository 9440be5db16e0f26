"""A run's progress on disk, so that one that was killed goes on where it was instead of from the start.

A journal is a folder, by default below the platform's cache folder, named by a digest of all that the run depends on:
another input, or another version of a file, is another journal. It is gone when the run is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Self

import numpy as np

from moeplace.errors import OutputError
from moeplace.files import atomic_output
from moeplace.frozen import digest
from moeplace.merging import Array

VERSION = 1  # of what is kept; another one is another journal
KEPT_DAYS = 14  # in the cache folder, for runs that were killed


class Journal:
    """Named sets of arrays in a folder of one run. Use it as a context manager: it holds a lock.

    Parameters
    ----------
    key
        All that the run depends on (see :func:`moeplace.frozen.digest`).
    folder
        Where runs are kept; None is the platform's cache folder.
    tell
        Called with a sentence where progress cannot be kept: another process is at work on the same run, or the cache
        folder cannot be written. The journal is then a temporary folder, which is gone at the end.

    Raises
    ------
    OutputError
        The folder that was named cannot be written.
    """

    def __init__(
        self,
        key: object,
        folder: str | os.PathLike[str] | None = None,
        *,
        tell: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._own_folder = folder is None
        if folder is None:
            from platformdirs import user_cache_path

            folder = user_cache_path("moeplace") / "runs"
        self.path = Path(folder) / digest((VERSION, metadata.version("moeplace"), key))[:32]
        self._lock: IO[bytes] | None = None
        self._tell, self._temporary = tell, False

    def __enter__(self) -> Self:
        try:
            self._lock = self._locked()
        except OSError as exc:
            if not self._own_folder:
                hint = "name a folder that can be written with --work-dir"
                raise OutputError(f"cannot be written: {exc.strerror or exc}", hint=hint, where=str(self.path)) from exc
            reason = f"{self.path.parent} cannot be written ({exc.strerror or exc})"
            self._go_without(f"{reason}: progress is not kept; --work-dir names another folder", None)
            return self
        if self._lock is None:
            self._go_without("another process is at work on the same trace: this one reads it anew", self.path.parent)
        elif self._own_folder:
            self._forget_old_runs()
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            self.remove()
        if self._lock is not None:
            self._lock.close()

    def _locked(self) -> IO[bytes] | None:
        """Return the lock, held; None where another process holds it."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                return None
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / "lock")):
                    return lock
            lock.close()  # the run that held it has ended, and deleted it, in between

    def _go_without(self, sentence: str, folder: Path | None) -> None:
        """Use a folder that is this process's own and ends with it."""
        self.path, self._temporary = Path(tempfile.mkdtemp(prefix="moeplace-", dir=folder)), True
        self._tell(sentence)

    def save(self, name: str, arrays: Mapping[str, Array]) -> Path:
        """Keep arrays under a name; the file appears, or is replaced, when it is complete."""
        target = self.path / f"{name}.npz"
        with atomic_output(target) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type] # its other options are not among the names
        return target

    def delete(self, name: str) -> None:
        """Forget what is kept under a name."""
        (self.path / f"{name}.npz").unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Names that arrays are kept under, sorted."""
        return sorted(path.stem for path in self.path.glob("*.npz"))

    def load(self, name: str, *, only: tuple[str, ...] | None = None) -> dict[str, Array] | None:
        """Return the arrays of a name (``only`` some of them); None where there are none, or they cannot be read."""
        return load_arrays(self.path / f"{name}.npz", only=only)

    def _forget_old_runs(self) -> None:
        """Delete runs of the cache folder that nobody has gone on with for :data:`KEPT_DAYS`."""
        oldest = time.time() - KEPT_DAYS * 86_400
        for run in self.path.parent.iterdir():
            with contextlib.suppress(OSError):
                if run != self.path and max(file.stat().st_mtime for file in [run, *run.iterdir()]) < oldest:
                    shutil.rmtree(run)

    def remove(self) -> None:
        """Forget the run."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.path)


def load_arrays(path: Path, *, only: tuple[str, ...] | None = None) -> dict[str, Array] | None:
    """Read what :meth:`Journal.save` wrote; None where there is no such file, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files if only is None or key in only}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
