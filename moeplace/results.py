"""Outcomes of trials kept in a folder, so that a grid of them goes on where it was, or grows.

Every outcome is a file of its own, named by a digest of all it depends on: the trace's content, the trial, the setup
and the program itself. A changed trace, option or version is another file.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from importlib import resources
from pathlib import Path

from moeplace.errors import OutputError
from moeplace.files import atomic_output
from moeplace.frozen import digest, replaced
from moeplace.spool import Spooled
from moeplace.trials import Outcome, TraceFile, TrialItem
from moeplace.validated import Item, Tried

CHUNK_BYTES = 1 << 22


class Results:
    """A folder of outcomes.

    Parameters
    ----------
    folder
        Made if it does not exist.

    Raises
    ------
    OutputError
        It cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._trials = self.folder / "trials"
        try:
            self._trials.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            hint = "name a folder that can be written"
            raise OutputError(f"cannot be written: {error.strerror}", hint=hint, where=str(self._trials)) from error

    def load(self, item: TrialItem) -> Outcome | None:
        """Return what came of a trial; None where it was not run yet, failed, or its file is damaged."""
        try:
            return Outcome.of_dict(json.loads(self._path(item).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, item: TrialItem, outcome: Outcome) -> None:
        """Keep what came of a trial; a failure is tried again next time."""
        if outcome.failure is None:
            self.write(self._path(item), json.dumps(outcome.to_dict(), sort_keys=True) + "\n")

    def load_tried(self, item: Item) -> Tried | None:
        """Return what came of one case of a validation; None as for :meth:`load`."""
        try:
            return Tried.of_dict(item, json.loads(self._path(item, str(item.case)).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save_tried(self, item: Item, tried: Tried) -> None:
        """Keep what came of one case of a validation; a failure is tried again next time."""
        if tried.failure is None:
            self.write(self._path(item, str(item.case)), json.dumps(tried.to_dict(), sort_keys=True) + "\n")

    def write(self, path: Path, text: str) -> None:
        """Write a file that appears, or is replaced, when it is complete."""
        with atomic_output(path) as file:
            file.write(text.encode())

    def _path(self, item: TrialItem | Item, case: str = "") -> Path:
        setup = replaced(item.setup, threads=1)  # which never changes a result
        choices = setup.choices
        named = (item.trial.topology, choices.model, choices.accelerator, choices.compute_table)
        files = tuple(_sha256(Path(name)) if name and Path(name).is_file() else name for name in named)
        return self._trials / f"{digest((_program(), _content(item.source), item.trial, setup, files, case))[:32]}.json"


@cache
def _content(source: TraceFile | Spooled) -> tuple[str | int | None, ...]:
    """Return what tells a trace's content: digests of its file, or of the files its parts lie in."""
    if isinstance(source, Spooled):
        return tuple(_sha256(path) for path in source.files)
    return _sha256(Path(source.path)), source.input_format, source.skip_bad, source.model


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


@cache
def _program() -> str:
    """Digest of the package's own files: another version may give other results."""
    found = hashlib.sha256()
    stack = [resources.files("moeplace")]
    while stack:
        # names and contents in an order that is the same everywhere
        for entry in sorted(stack.pop().iterdir(), key=lambda entry: entry.name):
            if entry.is_dir():
                stack.append(entry)
            elif entry.name.endswith((".py", ".toml")):
                found.update(entry.name.encode())
                found.update(entry.read_bytes())
    return found.hexdigest()
