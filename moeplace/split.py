"""Splits: which requests a placement is fitted on and which it is judged on.

``half:SEED``, ``domain:NAME,…`` and ``time:FRACTION`` name the fit part; the test part of the same split is what it
leaves out, so that ``solve --fit S`` and ``score --test S`` never see a common request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moeplace.errors import InputError, TraceError, unknown_name
from moeplace.frozen import digest, replaced
from moeplace.parts import BadFile, PartedTrace, PartTokens, TracePart, parted
from moeplace.trace import PHASES, Counts, Trace, TraceMeta, TraceStream

KINDS = ("half", "domain", "time")
Part = Literal["fit", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A rule that divides requests (or, for counts, steps) into a fit part and a test part.

    Attributes
    ----------
    kind
        One of :data:`KINDS`.
    seed
        Of ``half``.
    domains
        Of ``domain``: the names to fit on.
    fraction
        Of ``time``: the share of requests, in order of first appearance, to fit on.
    """

    kind: str
    seed: int = 0
    domains: tuple[str, ...] = ()
    fraction: float = 0.5

    def __str__(self) -> str:
        if self.kind == "half":
            return f"half:{self.seed}"
        return f"domain:{','.join(self.domains)}" if self.kind == "domain" else f"time:{self.fraction!r}"


def parse_split(text: str) -> Split:
    """Read ``half:SEED``, ``domain:NAME,…`` or ``time:FRACTION``."""
    kind, _, argument = text.partition(":")
    if kind not in KINDS:
        raise unknown_name("split", kind, KINDS)
    try:
        if kind == "half":
            seed = int(argument or 0)
            if seed < 0:
                raise ValueError
            return Split(kind=kind, seed=seed)
        if kind == "time":
            fraction = float(argument)
            if not 0 < fraction < 1:
                raise ValueError
            return Split(kind=kind, fraction=fraction)
    except ValueError:
        rule = "half:SEED with a whole number" if kind == "half" else "time:FRACTION with a fraction between 0 and 1"
        raise InputError(f"split {text!r}", rule=rule, hint="for example half:0 or time:0.5") from None
    names = tuple(name.strip() for name in argument.split(",") if name.strip())
    if not names:
        raise InputError(f"split {text!r}", rule="domain:NAME,… with at least one name")
    return Split(kind=kind, domains=names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A stream of the tokens of some requests and phase of another stream.

    Attributes
    ----------
    source
        The stream selected from.
    requests
        Sorted request numbers to keep; None keeps all.
    phase
        Phase number to keep; None keeps both.
    model_id
        Name of the model to give the trace; None keeps its own.
    """

    source: TraceStream
    requests: npt.NDArray[np.int64] | None = None
    phase: int | None = None
    model_id: str | None = None

    @property
    def meta(self) -> TraceMeta:
        """The model's shape."""
        meta = self.source.meta
        return meta if self.model_id is None else meta.replace(model_id=self.model_id)

    def blocks(self) -> Iterator[Trace]:
        """Yield the selected tokens, block by block."""
        for block in self.source.blocks():
            own = _kept(block, self.requests, self.phase)
            if own.num_tokens:
                yield own

    @property
    def can_part(self) -> bool:
        """Whether the source can be read part by part, and so this part of it."""
        return parted(self.source) is not None

    @property
    def identity(self) -> str:
        """Digest of the source's files and of what is selected of them."""
        return digest((self._parted.identity, self.requests, self.phase))

    @property
    def bare_meta(self) -> TraceMeta:
        """The meta that each part has."""
        return self._parted.bare_meta

    @property
    def file_bytes(self) -> npt.NDArray[np.int64]:
        """``[file]`` bytes of each file, selected or not."""
        return self._parted.file_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the statistics of one part, roughly."""
        return self._parted.table_bytes

    def parts(self, part_bytes: int, files: npt.NDArray[Any] | None = None) -> Iterator[SelectedPart]:
        """Yield the source's parts, to be read without what is not selected."""
        for part in self._parted.parts(part_bytes, files):
            yield SelectedPart(part=part, requests=self.requests, phase=self.phase)

    def settled(self, largest_id: int, bad: Sequence[BadFile]) -> TraceMeta:
        """Return the meta of the selection; an empty one is an error."""
        meta = self._parted.settled(max(largest_id, self.bare_meta.top_k - 1), bad)
        if largest_id < 0:
            raise TraceError("no tokens", rule="a trace holds at least one token", hint="the selection is empty")
        return meta if self.model_id is None else meta.replace(model_id=self.model_id)

    @property
    def _parted(self) -> PartedTrace:
        whole = parted(self.source)
        if whole is None:
            raise AttributeError("the source cannot be read part by part")
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedPart:
    """A part of a trace, of which only some requests or one phase are read."""

    part: TracePart
    requests: npt.NDArray[np.int64] | None = None
    phase: int | None = None

    @property
    def meta(self) -> TraceMeta:
        """The part's."""
        return self.part.meta

    @property
    def files(self) -> Sequence[int]:
        """Places of the part's files in the recorded order."""
        return self.part.files

    def read(self) -> PartTokens:
        """Read the files, and keep what is selected."""
        read = self.part.read()
        chunks = [replaced(chunk, tokens=_kept(chunk.tokens, self.requests, self.phase)) for chunk in read.chunks]
        return PartTokens(chunks=tuple(chunks), bad=read.bad)


def _kept(block: Trace, requests: npt.NDArray[np.int64] | None, phase: int | None) -> Trace:
    """Return the tokens of a block that are of some requests and phase."""
    keep = np.ones(block.num_tokens, bool)
    if requests is not None:
        keep &= np.isin(block.request, requests)
    if phase is not None:
        keep &= block.phase == phase
    return block if keep.all() else block.take(keep)


def select(
    source: TraceStream | Counts, *, split: Split | None = None, part: Part = "fit", phase: str | None = None
) -> TraceStream | Counts:
    """Return one part of a split, of one phase or both.

    Raises
    ------
    InputError
        The split needs what the trace does not have (domains, at least two requests), or the part is empty.
    """
    if isinstance(source, Counts):
        return _select_counts(source, split, part, phase)
    return select_tokens(source, split=split, part=part, phase=phase)


def select_tokens(
    source: TraceStream, *, split: Split | None = None, part: Part = "fit", phase: str | None = None
) -> TraceStream:
    """Do what :func:`select` does, for a trace that is known to hold tokens."""
    if phase is not None and phase not in PHASES:
        raise unknown_name("phase", phase, PHASES)
    number = None if phase is None else PHASES.index(phase)
    if split is None:
        return source if number is None else Selection(source=source, phase=number)
    requests = _fit_requests(source, split)
    everything = all_requests(source)
    chosen = requests if part == "fit" else np.setdiff1d(everything, requests)
    _check_part(chosen, split, part)
    return Selection(source=source, requests=chosen, phase=number)


def _check_part(chosen: npt.NDArray[Any], split: Split, part: Part) -> None:
    if len(chosen) == 0:
        raise InputError(f"the {part} part of {split} is empty", hint="use another split or a trace with more requests")


def all_requests(source: TraceStream) -> npt.NDArray[np.int64]:
    """Request numbers of a trace, sorted, each once. Complexity: one walk, O(tokens)."""
    seen = [np.unique(block.request) for block in source.blocks()]
    return np.unique(np.concatenate(seen)) if seen else np.zeros(0, np.int64)


def _fit_requests(source: TraceStream, split: Split) -> npt.NDArray[np.int64]:
    if split.kind == "half":
        return first_half(all_requests(source), split.seed)
    if split.kind == "time":
        order = _by_first_appearance(source)
        return np.sort(order[: _share(len(order), split.fraction)])
    numbers = _domain_numbers(source.meta, split)
    chosen: list[npt.NDArray[np.int64]] = []
    for block in source.blocks():
        if block.domain is None:
            raise TraceError(
                "the trace records no domains", rule=f"{split} needs a domain per token", hint="use half:0"
            )
        chosen.append(np.unique(block.request[np.isin(block.domain, numbers)]))
    return np.unique(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def first_half(values: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """The fit half: the first half (rounded down) of a seeded permutation of the distinct values, sorted."""
    distinct = np.unique(values)
    return np.sort(np.random.default_rng(seed).permutation(distinct)[: len(distinct) // 2])


def _share(count: int, fraction: float) -> int:
    # 0.29·100 comes out a hair below 29 in floating point
    return int(count * fraction + 1e-9)


def _by_first_appearance(source: TraceStream) -> npt.NDArray[np.int64]:
    seen: dict[int, None] = {}
    for block in source.blocks():
        names, first = np.unique(block.request, return_index=True)
        seen.update(dict.fromkeys(names[np.argsort(first)].tolist()))
    return np.array(list(seen), np.int64)


def _domain_numbers(meta: TraceMeta, split: Split) -> list[int]:
    for name in split.domains:
        if name not in meta.domains:
            raise (
                unknown_name("domain", name, meta.domains)
                if meta.domains
                else TraceError(f"domain {name!r}", rule="the trace names its domains", hint="use half:0 or time:0.5")
            )
    return [meta.domains.index(name) for name in split.domains]


def _select_counts(counts: Counts, split: Split | None, part: Part, phase: str | None) -> Counts:
    if phase is not None:
        raise InputError(f"--phase {phase} on counts", rule="counts do not record phases", hint="leave the phase out")
    if split is None:
        return counts
    steps = np.arange(counts.num_steps)
    if split.kind == "half":
        fit = first_half(steps, split.seed)
    elif split.kind == "time":
        fit = steps[: _share(len(steps), split.fraction)]
    else:
        numbers = _domain_numbers(counts.meta, split)
        if counts.domain is None:
            raise TraceError("the counts record no domains", rule=f"{split} needs a domain per step", hint="use half:0")
        fit = steps[np.isin(counts.domain, numbers)]
    chosen = fit if part == "fit" else np.setdiff1d(steps, fit)
    _check_part(chosen, split, part)
    return counts.take(chosen)


def named(source: TraceStream | Counts, model_id: str | None) -> TraceStream | Counts:
    """Return the same trace under a model's name, so that whoever reads it later knows its widths."""
    if model_id is None:
        return source
    if isinstance(source, Counts):
        return Counts(meta=source.meta.replace(model_id=model_id), counts=source.counts, domain=source.domain)
    return Selection(source=source, model_id=model_id)
