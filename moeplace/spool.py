"""The tokens of a trace of many files in one place, for work that walks a trace more than once; resumable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeplace.engines import Run
from moeplace.errors import InputError, OutputError
from moeplace.journal import Journal, load_arrays
from moeplace.merging import Array
from moeplace.parts import BadFile, PartedTrace, TracePart, bad_of_json, bad_to_json
from moeplace.trace import COLUMNS, Trace, TraceMeta, assembled, id_dtype

PART_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """A trace whose parts lie in a folder, in recorded order: a stream that is quick to walk.

    Attributes
    ----------
    meta
        The whole trace's.
    files
        One file of arrays for each part that has tokens.
    bad
        Files of the trace that were left out.
    """

    meta: TraceMeta
    files: tuple[Path, ...]
    bad: tuple[BadFile, ...]

    def blocks(self) -> Iterator[Trace]:
        """Yield the tokens part by part."""
        for file in self.files:
            arrays = load_arrays(file)
            if arrays is None:
                raise InputError("is gone or damaged", hint="run the command again", where=str(file))
            columns = {name: arrays[name] for name in COLUMNS if name in arrays}
            columns["experts"] = columns["experts"].astype(id_dtype(self.meta.num_experts), copy=False)
            yield assembled(self.meta, columns)


@contextlib.contextmanager
def spooled(source: PartedTrace, run: Run | None = None) -> Iterator[Spooled]:
    """Read a trace of many files into a folder, which is deleted when the context is left.

    A run that is killed or interrupted, or cannot write its output, leaves what it has read, and the next one goes on
    from there. Disk space: the ids of all tokens, a byte or two each, and 25 bytes for each token.

    Parameters
    ----------
    source
        The trace.
    run
        How its parts are read; default: here, one after another.

    Raises
    ------
    TraceError
        More files are bad than may be left out, or none is good.
    """
    run = run or Run()
    with Journal(("spool", source.identity), run.work_dir, tell=run.tell) as journal:
        _read_rest(source, run, journal)
        kept = {name: journal.load(name, only=("bad", "tokens", "largest")) or {} for name in journal.names()}
        bad = tuple(sorted((file for arrays in kept.values() for file in bad_of_json(arrays["bad"])), key=_by_name))
        filled = {name: arrays for name, arrays in kept.items() if arrays["tokens"] > 0}
        largest = max((int(arrays["largest"]) for arrays in kept.values()), default=-1)
        meta = source.settled(largest if filled else -1, bad)
        files = tuple(journal.path / f"{name}.npz" for name in filled)
        try:
            yield Spooled(meta=meta, files=files, bad=bad)
        except OutputError:  # the next try begins to write at once
            raise
        except Exception:
            journal.remove()
            raise
        journal.remove()


def _by_name(file: BadFile) -> str:
    return file.name


def _read_rest(source: PartedTrace, run: Run, journal: Journal) -> None:
    """Read the files that are not kept yet."""
    sizes = source.file_bytes
    done = np.zeros(len(sizes), bool)
    num_bad = 0
    for name in journal.names():
        arrays = journal.load(name, only=("files", "bad"))
        bad = [] if arrays is None else bad_of_json(arrays["bad"])
        if arrays is None or any(file.unreadable for file in bad):
            journal.delete(name)  # damaged, or readable by now
            continue
        done[arrays["files"]] = True
        num_bad += len(bad)
    run.watch(int(done.sum()), int(sizes[done].sum()), num_bad)
    for arrays in run.engine.run(arrays_of, source.parts(PART_BYTES, np.flatnonzero(~done))):
        journal.save(f"{arrays['files'][0]:09d}", arrays)
        done[arrays["files"]] = True
        num_bad += len(bad_of_json(arrays["bad"]))
        run.watch(int(done.sum()), int(sizes[done].sum()), num_bad)


def arrays_of(part: TracePart) -> dict[str, Array]:
    """Read a part into one array for each column, with the places of its files and the bad ones among them."""
    tokens = part.read()
    columns = [
        {name: column for name in COLUMNS if (column := getattr(chunk.tokens, name)) is not None}
        for chunk in tokens.chunks
    ]
    known = max((chunk.tokens.meta.num_experts for chunk in tokens.chunks), default=0)
    return {
        "files": np.array(part.files, np.int64),
        "bad": bad_to_json(tokens.bad),
        "largest": np.array(known - 1),
        "tokens": np.array(sum(chunk.tokens.num_tokens for chunk in tokens.chunks)),
        **{name: np.concatenate([own[name] for own in columns]) for name in (columns[0] if columns else ())},
    }
