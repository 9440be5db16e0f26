"""Blocks that can be walked again: kept in memory while they are few, parsed again when they are many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import ismethod
from itertools import islice
from typing import Generic, TypeVar
from weakref import WeakMethod

Block = TypeVar("Block")


class KeptBlocks(Generic[Block]):
    """A re-iterable over the blocks that ``parse`` yields.

    Blocks are kept as they are met, up to ``limit_bytes``; beyond it they are dropped and every walk parses again.
    ``limit_bytes=None`` keeps all of them: for an input that cannot be read twice.

    Parameters
    ----------
    parse
        Starts a walk over the input.
    size_bytes
        Size of a block.
    limit_bytes
        Bytes to keep; None for all.
    live
        A walk that has been started already, used for the first pass.
    """

    def __init__(
        self,
        parse: Callable[[], Iterator[Block]],
        size_bytes: Callable[[Block], int],
        limit_bytes: int | None,
        live: Iterator[Block] | None = None,
    ) -> None:
        self._size_bytes, self._limit_bytes = size_bytes, limit_bytes
        # a method of the stream that holds these blocks: were it held, both would outlive their use until the
        # collector runs, which large arrays do not bring about
        self._parse: Callable[[], Callable[[], Iterator[Block]] | None]
        self._parse = WeakMethod(parse) if ismethod(parse) else lambda: parse
        self._live = live
        self._kept: list[Block] | None = []
        self._kept_bytes = 0
        self._failure: BaseException | None = None
        self.complete = False

    def __iter__(self) -> Iterator[Block]:
        done = 0
        while self._kept is not None:
            if done < len(self._kept):
                yield self._kept[done]
                done += 1
                continue
            if self.complete:
                return
            block, rest = self._advance()
            if block is None:
                continue
            yield block
            done += 1
            if rest is not None:
                yield from rest
                return
        # another walk went past the limit meanwhile: go on with a fresh one
        yield from islice(self._started(), done, None)

    def _started(self) -> Iterator[Block]:
        parse = self._parse()
        if parse is None:
            raise ReferenceError("blocks of a stream that is gone")
        return parse()

    def _advance(self) -> tuple[Block | None, Iterator[Block] | None]:
        """Parse one block further; hand the running walk to the caller when the block does not fit."""
        if self._failure is not None:
            raise self._failure
        if self._live is None:
            self._live = self._started()
        try:
            block = next(self._live, None)
        except BaseException as exc:
            # the generator is dead: without this the next walk would take the input as ended here
            self._restart(exc)
            raise
        if block is None:
            self.complete, self._live = True, None
            return None, None
        self._kept_bytes += self._size_bytes(block)
        if self._limit_bytes is not None and self._kept_bytes > self._limit_bytes:
            rest, self._live, self._kept = self._live, None, None
            return block, rest
        if self._kept is not None:
            self._kept.append(block)
        return None, None

    def _restart(self, exc: BaseException) -> None:
        if self._limit_bytes is None:
            self._failure = exc
        else:
            self._kept, self._kept_bytes, self._live = [], 0, None
