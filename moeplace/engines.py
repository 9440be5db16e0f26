"""Where the parts of a large trace are read: this process, processes of this machine, or a Dask cluster.

An engine maps a function over items and yields results as they come, with few items under way at a time. Functions and
items are small values that can be sent elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Self, TypeVar

from moeplace.errors import InputError, MissingExtraError, MoeplaceError

Item = TypeVar("Item")
Result = TypeVar("Result")

PROCESSES_FROM_BYTES = 48 << 20  # less is read before processes have started
ANSWER_WITHIN_S = 10  # of a Dask scheduler
ASK_EVERY_S, LOST_AFTER_S = 5.0, 60.0  # whether a cluster has workers; how long it may have none
AHEAD = 2  # items under way for each worker: the next waits while one is read


class Engine(ABC):
    """Workers that read parts. Use it as a context manager: leaving it ends the workers it has started.

    Attributes
    ----------
    workers
        Items that are worked on at the same time.
    """

    workers: int

    @abstractmethod
    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results of ``work`` on each item, in the order in which they are ready.

        Raises
        ------
        MoeplaceError
            What ``work`` raises; or a worker was lost.
        """

    def close(self) -> None:  # noqa: B027 # most engines start nothing
        """End what was started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcess(Engine):
    """One item after another, here."""

    workers = 1

    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield each result in order."""
        return map(work, items)


class Processes(Engine):
    """Processes of this machine.

    Parameters
    ----------
    workers
        How many.
    """

    def __init__(self, workers: int) -> None:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        self.workers = workers
        # a fresh interpreter: a fork would copy threads' locks in any state
        context = get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)

    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results as they are ready."""
        from concurrent.futures import FIRST_COMPLETED, Future, wait
        from concurrent.futures.process import BrokenProcessPool

        waiting = iter(items)
        running: set[Future[Result]] = set()
        try:
            while True:
                for item in itertools.islice(waiting, AHEAD * self.workers - len(running)):
                    with _sparing_children():
                        running.add(self._pool.submit(work, item))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as exc:
            raise MoeplaceError(
                "a worker process has died", hint="was it out of memory? --threads 1 uses one, with less"
            ) from exc

    def close(self) -> None:
        """End the processes without waiting for what they do."""
        pool = self._pool
        processes = list((pool._processes or {}).values())  # noqa: SLF001 # terminate_workers of Python 3.14
        results: Any = getattr(pool, "_result_queue", None)
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            with contextlib.suppress(OSError, ValueError):
                process.terminate()
        # a worker that was ended within a result leaves the pool's thread waiting for the rest of it, until no process
        # holds the other end of the pipe: this one does too
        with contextlib.suppress(OSError, AttributeError):
            results._writer.close()  # noqa: SLF001


@contextlib.contextmanager
def _sparing_children() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started here: they inherit what is blocked, before they can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """Leave Ctrl-C to the process that started this one, and end with it, however it ends."""
    from multiprocessing import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # killed: nobody waits for this worker's result

    threading.Thread(target=follow, daemon=True).start()


class DaskCluster(Engine):
    """Workers of a Dask scheduler that runs already. They must have moeplace, and see the files under the same paths.

    Parameters
    ----------
    address
        ``tcp://HOST:PORT``, or the path of a scheduler file (``*.json``).

    Raises
    ------
    MissingExtraError
        Dask is not installed.
    InputError
        No scheduler answers, or it has no workers.
    """

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError as exc:
            raise MissingExtraError("--cluster needs Dask", hint="pip install 'moeplace[cluster]'") from exc
        by_file = address.endswith(".json")
        where: dict[str, Any] = {"scheduler_file": address} if by_file else {"address": address}
        try:
            if by_file:
                Path(address).open("rb").close()  # Dask would wait for it to appear
            self._client = Client(**where, timeout=ANSWER_WITHIN_S, set_as_default=False)
        except (OSError, ValueError) as exc:
            hint = "start one with 'dask scheduler' and 'dask worker', and give the address it prints"
            raise InputError(f"no Dask scheduler answers at {address}: {exc}", hint=hint) from exc
        self.workers = sum(self._client.nthreads().values())
        if not self.workers:
            self._client.close()
            hint = "start some with 'dask worker ADDRESS'"
            raise InputError(f"the Dask scheduler at {address} has no workers", hint=hint)

    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results as they are ready; an item whose worker is lost is read by another one."""
        done: SimpleQueue[Any] = SimpleQueue()
        waiting = iter(items)
        running: set[Any] = set()
        while True:
            for item in itertools.islice(waiting, AHEAD * self.workers - len(running)):
                # not pure: an equal item of another run must be read again
                future = self._client.submit(work, item, pure=False)
                running.add(future)
                future.add_done_callback(done.put)
            if not running:
                return
            future = self._next(done)
            running.remove(future)
            result: Result = future.result()
            future.release()  # else the cluster keeps every result
            yield result

    def _next(self, done: SimpleQueue[Any]) -> Any:
        """Return the next item that is done; an error where the cluster has been without workers for a while."""
        left = LOST_AFTER_S
        while left > 0:
            with contextlib.suppress(Empty):
                return done.get(timeout=ASK_EVERY_S)
            left = LOST_AFTER_S if self._client.nthreads() else left - ASK_EVERY_S
        hint = "start some with 'dask worker ADDRESS' and run the command again: it goes on from here"
        raise MoeplaceError("the Dask cluster has lost all its workers", hint=hint)

    def close(self) -> None:
        """Leave the cluster; it goes on for others."""
        self._client.close()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the context is left: what is done in it is done as a whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for held, frame in came[:1]:
            again = before[signal.Signals(held)]
            if callable(again):
                again(held, frame)


def _silent(sentence: str) -> None:
    """Say nothing."""


def _nothing(files: int, size_bytes: int, bad: int) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How the parts of a trace are read.

    Attributes
    ----------
    engine
        Where.
    work_dir
        Folder for the progress; None is the platform's cache folder.
    watch
        Called with the numbers of files, bytes and bad files that are done, whenever they change.
    tell
        Called with what the user should know, such as that progress cannot be kept.
    """

    engine: Engine = field(default_factory=InProcess)
    work_dir: str | None = None
    watch: Callable[[int, int, int], None] = _nothing
    tell: Callable[[str], None] = _silent


def engine_for(cluster: str | None, threads: int, total_bytes: int) -> Engine:
    """Return the engine that suits: the cluster named, else processes where there is enough to read, else this one."""
    if cluster is not None:
        return DaskCluster(cluster)
    enough = total_bytes >= PROCESSES_FROM_BYTES
    return Processes(threads) if threads > 1 and enough else InProcess()
