"""Parts of a trace: named requests, a sample of requests, and what is left without an engine's dummy run.

Each part is a stream over another one: nothing is copied, renamed or reordered, so a part has the digest that ``--fit``
or ``--test`` would give it, and parts can be taken of parts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import InputError, UnknownNameError
from moeplace.files import open_input
from moeplace.frozen import Ints, replaced
from moeplace.parts import first_blocks
from moeplace.split import Part, Selection, Split, all_requests, select, select_tokens
from moeplace.trace import Counts, Trace, TraceMeta, TraceStream

IDENTICAL_ROWS = 32  # equal rows at the start that are no accident
SHOWN_ITEMS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """What to keep of a trace. The fields act in this order, each on what the one before left.

    Attributes
    ----------
    drop_dummy_run
        Leave out the run of identical rows at the start, see :func:`dummy_run`.
    split, part
        Keep a part of a split. Whatever is left out after it, no request moves between the parts.
    requests
        Names, numbers or ranges of the requests to keep, see :func:`named_requests`; None keeps all.
    without
        The same, of requests to leave out.
    phase
        Keep the tokens of ``prefill`` or ``decode`` only.
    sample, seed
        Keep a uniform sample of whole requests, see :func:`sample_requests`.
    """

    drop_dummy_run: bool = False
    split: Split | None = None
    part: Part = "fit"
    requests: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    phase: str | None = None
    sample: int | float | None = None
    seed: int = 0

    def replace(self, **changes: object) -> Subset:
        """Copy with some fields changed."""
        return replaced(self, **changes)


def narrowed(source: TraceStream | Counts, subset: Subset) -> TraceStream | Counts:
    """Return the part of a trace that a :class:`Subset` describes.

    Counts can be split by step; everything else needs tokens. Complexity: up to five walks, O(tokens) each; memory
    O(requests).

    Raises
    ------
    InputError
        A request is not in the trace, a sample is larger than what there is, no request is left, or counts are asked
        for what only tokens have.
    """
    if isinstance(source, Counts):
        _refuse_counts(subset)
        return select(source, split=subset.split, part=subset.part, phase=subset.phase)
    if subset.drop_dummy_run:
        source = Behind(source=source, rows=dummy_run(source))
    wanted = _wanted(source, subset)
    source = select_tokens(source, split=subset.split, part=subset.part)
    if wanted is not None:
        kept = np.intersect1d(wanted, all_requests(source))
        if kept.size == 0:
            where = f"in the {subset.part} part of {subset.split}" if subset.split else "in the trace"
            raise InputError(f"none of the requests to keep is {where}", hint="name others, or leave fewer out")
        source = Selection(source=source, requests=kept)
    source = select_tokens(source, phase=subset.phase)
    if subset.sample is None:
        return source
    chosen = sample_requests(all_requests(source), subset.sample, subset.seed)
    return Selection(source=source, requests=chosen)


def _refuse_counts(subset: Subset) -> None:
    asked = {
        "--drop-dummy-run": subset.drop_dummy_run,
        "--requests": subset.requests is not None,
        "--without-requests": bool(subset.without),
        "--sample": subset.sample is not None,
    }
    named = [flag for flag, given in asked.items() if given]
    if named:
        raise InputError(
            f"{', '.join(named)} on counts",
            rule="counts hold neither requests nor tokens",
            hint="leave it out, or use a per-token trace; the steps of counts can be split",
        )


def _wanted(source: TraceStream, subset: Subset) -> Ints | None:
    """Sorted numbers of the requests that ``requests`` and ``without`` leave; None where neither is given."""
    if subset.requests is None and not subset.without:
        return None
    everything = all_requests(source)
    kept = everything if subset.requests is None else named_requests(source.meta, everything, subset.requests)
    return np.setdiff1d(kept, named_requests(source.meta, everything, subset.without))


# --- named requests --------------------------------------------------------------------------------------------------


def parse_requests(text: str) -> tuple[str, ...]:
    """Read a list of requests: ``NAME,7,10-19``, or ``@FILE`` with one to a line (``@-``: standard input)."""
    if text.startswith("@"):
        with open_input(text[1:]) as file, file.stream() as stream:
            items = stream.read().decode("utf-8", "replace").splitlines()
    else:
        items = text.split(",")
    listed = tuple(item.strip() for item in items if item.strip())
    if not listed:
        raise InputError(
            f"no requests in {text!r}", rule="NAME,… or @FILE with at least one request", hint="for example 7,10-19"
        )
    return listed


def named_requests(meta: TraceMeta, everything: Ints, items: Sequence[str]) -> Ints:
    """Sorted numbers of the requests that items name.

    An item is a name of ``meta.request_names``, a request's number, or a range ``10-19`` of numbers that holds at least
    one request; where requests have names, they are numbered from 0 in the order of those names.

    Parameters
    ----------
    meta
        Names the requests.
    everything
        Sorted numbers of the requests there are.
    items
        Names, numbers and ranges.

    Raises
    ------
    UnknownNameError
        An item names no request: the error names the nearest ones and tells how many there are.
    """
    number_of = {name: number for number, name in enumerate(meta.request_names)}
    present = set(everything.tolist())
    kept: list[npt.NDArray[Any]] = [np.zeros(0, np.int64)]
    missing: list[str] = []
    for item in items:
        found = _matches(item, number_of, present, everything)
        kept.append(found)
        if found.size == 0:
            missing.append(item)
    if missing:
        raise _unknown_requests(missing, meta.request_names, everything)
    return np.unique(np.concatenate(kept))


def _matches(item: str, number_of: dict[str, int], present: set[int], everything: Ints) -> npt.NDArray[Any]:
    if number_of.get(item) in present:
        return np.array([number_of[item]])
    span = re.fullmatch(r"(\d+)\s*(?:-|\.\.)\s*(\d+)", item)
    if span:
        low, high = int(span[1]), int(span[2])
        if low > high:
            raise InputError(f"requests {item}", rule="a range goes up", hint=f"write {high}-{low}")
        return everything[(everything >= low) & (everything <= high)]
    number = int(item) if re.fullmatch(r"-?\d+", item) else None
    return np.array([number] if number in present else [], np.int64)


def _unknown_requests(missing: Sequence[str], names: Sequence[str], everything: Ints) -> UnknownNameError:
    shown = ", ".join(repr(item) for item in missing[:SHOWN_ITEMS]) + (", …" if len(missing) > SHOWN_ITEMS else "")
    many = f"s {shown} ({len(missing):,} in all)" if len(missing) > 1 else f" {shown}"
    near = difflib.get_close_matches(missing[0], [names[i] for i in everything] if names else [], n=3, cutoff=0.6)
    if not names and re.fullmatch(r"-?\d+", missing[0]):
        place = int(np.searchsorted(everything, int(missing[0])))
        near = [str(number) for number in everything[place - 1 : place + 1]] if 0 < place < len(everything) else []
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    if everything.size:
        first, last = int(everything[0]), int(everything[-1])
        hint += f"they are numbered {first} to {last}" + (
            f", from {names[first]!r} to {names[last]!r}" if names else ""
        )
    return UnknownNameError(
        f"unknown request{many}", rule=f"the trace has {len(everything):,} requests", hint=hint or None
    )


# --- samples ---------------------------------------------------------------------------------------------------------


def sample_requests(requests: Ints, size: float, seed: int = 0) -> Ints:
    """Draw a uniform sample of requests without replacement.

    It is the first ``size`` of ``default_rng(seed).permutation(requests)``, sorted: a larger sample of the same seed
    holds every smaller one.

    Parameters
    ----------
    requests
        Distinct request numbers.
    size
        How many (int), or a share in (0, 1] (float), rounded, at least one.
    seed
        Of the draw.

    Raises
    ------
    InputError
        There are fewer requests than asked for.
    """
    share = isinstance(size, float)
    if not (0 < size <= 1 if share else size >= 1):
        raise InputError(f"a sample of {size}", rule="at least one request, or a share above 0 and at most 1")
    number = max(1, round(size * len(requests))) if share else int(size)
    if number > len(requests):
        raise InputError(
            f"a sample of {number:,} requests out of {len(requests):,}",
            rule="a sample is drawn without replacement",
            hint="ask for fewer, or for a share such as 10%",
        )
    return np.sort(np.random.default_rng(seed).permutation(requests)[:number])


# --- an engine's dummy run -------------------------------------------------------------------------------------------


def identical_rows(source: TraceStream) -> int:
    """Count the rows at the start that choose the same experts as the first. Reads only as far as they go."""
    first: npt.NDArray[Any] | None = None
    length = 0
    for block in first_blocks(source):
        if block.num_tokens == 0:
            continue
        first = block.experts[0] if first is None else first
        differs = (block.experts != first).any(axis=(1, 2))
        if differs.any():
            return length + int(differs.argmax())
        length += block.num_tokens
    return length


def dummy_run(source: TraceStream) -> int:
    """Length of the run of identical rows at the start, 0 where it is shorter than :data:`IDENTICAL_ROWS`.

    Engines route a dummy batch to profile their memory, and recorders write it down: vLLM's is 16,384 rows long.
    """
    length = identical_rows(source)
    return length if length >= IDENTICAL_ROWS else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """A stream of the tokens behind the first ``rows`` of another stream."""

    source: TraceStream
    rows: int

    @property
    def meta(self) -> TraceMeta:
        """The source's."""
        return self.source.meta

    def blocks(self) -> Iterator[Trace]:
        """Yield the rest of the source, block by block."""
        ahead = self.rows
        for block in self.source.blocks():
            if ahead == 0:
                yield block
            elif ahead < block.num_tokens:
                yield block.take(np.arange(ahead, block.num_tokens))
            ahead = max(0, ahead - block.num_tokens)


# --- sizes -----------------------------------------------------------------------------------------------------------


class Sized:
    """A stream that knows its size once it has been walked, and refuses to be empty.

    Attributes
    ----------
    num_tokens, num_requests
        Of the last walk that came to the end.

    Raises
    ------
    InputError
        A walk met no token.
    """

    def __init__(self, source: TraceStream) -> None:
        self._source = source
        self.num_tokens = self.num_requests = 0

    @property
    def meta(self) -> TraceMeta:
        """The source's."""
        return self._source.meta

    def blocks(self) -> Iterator[Trace]:
        """Yield the source's blocks."""
        tokens, requests = 0, np.zeros(0, np.int64)
        for block in self._source.blocks():
            tokens += block.num_tokens
            requests = np.union1d(requests, block.request)
            yield block
        if tokens == 0:
            raise InputError("no tokens are left", rule="a trace holds at least one token", hint="keep more of it")
        self.num_tokens, self.num_requests = tokens, len(requests)
