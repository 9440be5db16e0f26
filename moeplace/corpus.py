"""Statistics of traces of many files, by map and reduce, resumable.

Parts of a trace are read by an :class:`~moeplace.engines.Engine`; what comes of them is merged here, in whatever order
it comes. Progress is kept in a :class:`~moeplace.journal.Journal`: after a kill the same call reads only the files that
were not finished. Memory is that of the statistics of a few parts, whatever the number of files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from moeplace.affinity import DEFAULT_SAMPLE_TOKENS, RoutingStats, RoutingTally
from moeplace.engines import Run, signals_held
from moeplace.fingerprint import token_hashes
from moeplace.frozen import Ints
from moeplace.journal import Journal
from moeplace.merging import Array, DistinctNumbers
from moeplace.parts import BadFile, PartedTrace, TracePart, bad_of_json, bad_to_json
from moeplace.profile import ProfileTally, TraceProfile
from moeplace.trace import TraceMeta

SMALLEST_PART_BYTES = 4 << 20
PARTS_PER_WORKER = 8  # of a small trace, so that all workers end at about the same time
COMPILE_FROM_BYTES = 48 << 20
SAVE_EVERY_S, SAVE_SHARE = 1.0, 0.05  # progress is kept no more often, and takes at most this share of the time
STATE = "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Statistics of a trace of many files, and the files that were left out."""

    stats: RoutingStats
    profile: TraceProfile
    bad: tuple[BadFile, ...]


def count_parts(
    source: PartedTrace, run: Run | None = None, *, sample_tokens: int = DEFAULT_SAMPLE_TOKENS, seed: int = 0
) -> Counted:
    """Count and profile a trace of many files.

    Parameters
    ----------
    source
        The trace.
    run
        How its parts are read; default: here, one after another.
    sample_tokens, seed
        As for :func:`~moeplace.affinity.count_routing`.

    Returns
    -------
    Counted
        The same whatever the engine, and whether or not the run was interrupted. Complexity: O(tokens·layers·k²) time
        over all workers, O(layers·experts²) memory for each.

    Raises
    ------
    TraceError
        More files are bad than may be left out, or none is good. Progress is kept: a call that may leave out more ends
        at once.
    """
    run = run or Run()
    work = CountPart(
        sample_tokens=sample_tokens, seed=seed, compiled=int(source.file_bytes.sum()) >= COMPILE_FROM_BYTES or None
    )
    with Journal(("count", source.identity, sample_tokens, seed), run.work_dir, tell=run.tell) as journal:
        total = work.tally(source.bare_meta.replace(num_experts=source.bare_meta.top_k))
        total.restore(journal.load(STATE))
        total.forget_unreadable()
        saver = _Saver(journal, total)
        try:
            _count_rest(source, run, work, saver)
            meta, bad = source.settled(total.largest_id, total.bad), tuple(total.bad)
            counted = Counted(stats=total.routing.result(meta), profile=total.profile.result(meta), bad=bad)
        except BaseException:  # Ctrl-C too
            saver.save()
            raise
        journal.remove()
    return counted


@dataclass(frozen=True, slots=True, kw_only=True)
class CountPart:
    """The statistics of a part; a small value that can be sent to where the part is read."""

    sample_tokens: int
    seed: int
    compiled: bool | None

    def tally(self, meta: TraceMeta) -> FilesTally:
        """Return the tally of no files."""
        routing = RoutingTally(meta, sample_tokens=self.sample_tokens, seed=self.seed, compiled=self.compiled)
        return FilesTally(routing, ProfileTally(meta, compiled=self.compiled))

    def __call__(self, part: TracePart) -> dict[str, Array]:
        """Read and count a part; return the state of its tally."""
        tokens = part.read()
        known = max((chunk.tokens.meta.num_experts for chunk in tokens.chunks), default=part.meta.top_k)
        tally = self.tally(part.meta.replace(num_experts=known))
        for chunk in tokens.chunks:
            hashes = token_hashes(chunk.tokens)
            tally.routing.add(chunk.tokens, hashes, chunk.first)
            tally.profile.add(chunk.tokens, hashes, chunk.number)
        tally.add_files(np.array(part.files, np.int64), tokens.bad)
        return tally.state()


@dataclass(slots=True)
class FilesTally:
    """Statistics of some files of a trace, and which they are.

    Attributes
    ----------
    routing, profile
        Running statistics of the good ones.
    whole
        Whether no merge was broken off: a state in between is of no use.
    """

    routing: RoutingTally
    profile: ProfileTally
    whole: bool = True
    _files: DistinctNumbers = field(default_factory=DistinctNumbers)
    _bad: dict[int, BadFile] = field(default_factory=dict)

    @property
    def files(self) -> Ints:
        """Places of all files in the recorded order, sorted."""
        return self._files.values()

    @property
    def num_bad(self) -> int:
        """Files that were left out."""
        return len(self._bad)

    @property
    def bad(self) -> list[BadFile]:
        """Files that were left out, by name."""
        return sorted(self._bad.values(), key=lambda file: file.name)

    def add_files(self, files: Ints, bad: Iterable[BadFile]) -> None:
        """Note which files the statistics are of, and which of them were left out."""
        self._files.add(files)
        self._bad.update({file.place: file for file in bad})

    def forget_unreadable(self) -> None:
        """Take files that could not be read as not met yet: they may be readable by now."""
        gone = [file.place for file in self._bad.values() if file.unreadable]
        self._files = DistinctNumbers(np.setdiff1d(self.files, gone))
        self._bad = {place: file for place, file in self._bad.items() if not file.unreadable}

    @property
    def largest_id(self) -> int:
        """Largest expert id met; -1 before the first token."""
        return self.routing.num_experts - 1 if self.routing.num_tokens else -1

    def merge(self, other: FilesTally) -> None:
        """Add the files of another tally, as a whole: Ctrl-C waits for it."""
        with signals_held():
            self.whole = False
            self.routing.merge(other.routing)
            self.profile.merge(other.profile)
            self.add_files(other.files, other._bad.values())
            self.whole = True

    def state(self) -> dict[str, Array]:
        """Return the tally as named arrays, for :meth:`restore`."""
        return {
            "files": self.files,
            "bad": bad_to_json(self.bad),
            **{f"routing/{name}": array for name, array in self.routing.state().items()},
            **{f"profile/{name}": array for name, array in self.profile.state().items()},
        }

    def restore(self, state: Mapping[str, Array] | None) -> None:
        """Take on what :meth:`state` returned of a tally of the same trace, if anything."""
        if state is None:
            return
        self.add_files(state["files"], bad_of_json(state["bad"]))
        for prefix, tally in (("routing/", self.routing), ("profile/", self.profile)):
            own = {name: array for name, array in state.items() if name.startswith(prefix)}
            tally.restore({name.removeprefix(prefix): array for name, array in own.items()})


class _Saver:
    """Keeps a tally in a journal now and then."""

    def __init__(self, journal: Journal, total: FilesTally) -> None:
        self._journal, self.total = journal, total
        self._kept, self._next = len(total.files), time.monotonic() + SAVE_EVERY_S

    def save(self) -> None:
        """Keep the tally, if it has changed and is whole; a second Ctrl-C waits for it."""
        if len(self.total.files) == self._kept or not self.total.whole:
            return
        with signals_held():
            started = time.monotonic()
            self._journal.save(STATE, self.total.state())
            ended = time.monotonic()
            self._kept, self._next = len(self.total.files), ended + max(SAVE_EVERY_S, (ended - started) / SAVE_SHARE)

    def save_if_due(self) -> None:
        """Keep the tally, if it is time."""
        if time.monotonic() >= self._next:
            self.save()


def _count_rest(source: PartedTrace, run: Run, work: CountPart, saver: _Saver) -> None:
    """Count the files that are not counted yet."""
    total, sizes = saver.total, source.file_bytes
    rest = np.setdiff1d(np.arange(len(sizes)), total.files)
    files, size_bytes = len(total.files), int(sizes[total.files].sum())
    run.watch(files, size_bytes, total.num_bad)
    even = int(sizes.sum()) // (PARTS_PER_WORKER * run.engine.workers)
    part_bytes = max(SMALLEST_PART_BYTES, min(even, source.table_bytes))
    for state in run.engine.run(work, source.parts(part_bytes, rest)):
        part = work.tally(total.routing.meta)
        part.restore(state)
        total.merge(part)
        files, size_bytes = files + len(part.files), size_bytes + int(sizes[part.files].sum())
        run.watch(files, size_bytes, total.num_bad)
        saver.save_if_due()
