"""Traces in parts: many files that are one trace, each of them read where and when it suits.

A :class:`PartedTrace` lists what it is made of without reading it. Each :class:`TracePart` is a small value that can be
sent to another process or machine, and reading one needs nothing of the others. What is counted from parts merges,
so that the number of them, their order and who reads them change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from moeplace.trace import Trace, TraceMeta, TraceStream

CHUNK_TOKENS = 25_000  # drift is the distance of consecutive stretches of this many tokens
MOST_CHUNKS = 256  # a longer trace has longer stretches
TOKENS_PER_FILE = 1 << 32  # places left for each file's tokens in the recorded order
LOOK_BYTES = 4 << 20  # of a part that is read to look at the beginning of a trace


@dataclass(frozen=True, slots=True, kw_only=True)
class BadFile:
    """A file that was left out, and why.

    Attributes
    ----------
    name, reason
        Which, and why.
    place
        Its place in the recorded order.
    unreadable
        Whether it could not be read at all: another run tries it again.
    """

    name: str
    reason: str
    place: int = -1
    unreadable: bool = False

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens of consecutive files of a part.

    Attributes
    ----------
    tokens
        Whole requests; their meta has the experts that are known by now.
    first
        Place of the first token in the recorded order of the whole.
    number
        Number of the stretch of the whole trace that they belong to: drift is measured between stretches.
    """

    tokens: Trace
    first: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTokens:
    """What a part holds: its tokens, and the files that break the format."""

    chunks: tuple[Chunk, ...]
    bad: tuple[BadFile, ...] = ()


def bad_to_json(bad: Sequence[BadFile]) -> npt.NDArray[np.uint8]:
    """Return bad files as bytes, to be kept beside other arrays."""
    told = [[file.name, file.reason, file.place, file.unreadable] for file in bad]
    return np.frombuffer(json.dumps(told).encode(), np.uint8)


def bad_of_json(data: npt.NDArray[np.uint8]) -> list[BadFile]:
    """Return the bad files that :func:`bad_to_json` was given."""
    return [
        BadFile(name=name, reason=reason, place=place, unreadable=unreadable)
        for name, reason, place, unreadable in json.loads(data.tobytes())
    ]


class TracePart(Protocol):
    """Some files of a trace, not read yet."""

    @property
    def meta(self) -> TraceMeta:
        """The whole trace's, without names; with too many experts where their number is not known yet."""

    @property
    def files(self) -> Sequence[int]:
        """Places of the files in the recorded order."""

    def read(self) -> PartTokens:
        """Read the files."""


class PartedTrace(Protocol):
    """A trace that lists its files and can be read part by part."""

    @property
    def can_part(self) -> bool:
        """Whether its files can be read apart from each other: not those of a compressed archive, nor of a pipe."""

    @property
    def identity(self) -> str:
        """Digest of the list of files, with sizes and times of change (an archive's own), and of how they are read."""

    @property
    def bare_meta(self) -> TraceMeta:
        """The meta that each part has."""

    @property
    def file_bytes(self) -> npt.NDArray[np.int64]:
        """``[file]`` bytes of each file."""

    @property
    def table_bytes(self) -> int:
        """Bytes of the statistics of one part, roughly."""

    def parts(self, part_bytes: int, files: npt.NDArray[Any] | None = None) -> Iterator[TracePart]:
        """Yield parts of about ``part_bytes`` each over the named ``files`` (default: all), in order."""

    def settled(self, largest_id: int, bad: Sequence[BadFile]) -> TraceMeta:
        """Return the meta of the whole, from the largest expert id and the bad files that its parts have shown.

        Raises
        ------
        TraceError
            More files are bad than may be skipped, or no file is good.
        """


def parted(source: object) -> PartedTrace | None:
    """Return a source that can be read part by part as such, else None."""
    return cast(PartedTrace, source) if getattr(source, "can_part", False) else None


def first_blocks(source: TraceStream) -> Iterator[Trace]:
    """Yield the blocks of a trace to look at its beginning: a trace of many files is not walked first."""
    whole = parted(source)
    if whole is None:
        yield from source.blocks()
        return
    for part in whole.parts(LOOK_BYTES):
        yield from (chunk.tokens for chunk in part.read().chunks)
