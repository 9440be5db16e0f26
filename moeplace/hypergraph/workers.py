"""Layers worked on in threads that never hold up the interpreter."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable

from threadpoolctl import threadpool_limits

from moeplace.solution import Clock

POLL_S = 0.05
GRACE_S = 1.5  # for steps under way when a run is stopped; after it they are left behind


def work_layers(
    count: int, work: Callable[[int], None], clock: Clock, *, threads: int, ended: Callable[[int, int], None]
) -> None:
    """Work on layers ``0`` to ``count - 1``, each by itself, and return once all are done or the clock is over.

    A step of a foreign library cannot be interrupted: its thread is left behind. Libraries of linear algebra use one
    thread, or sums would depend on their number.

    Parameters
    ----------
    count, work
        How many layers, and what to do with one, in a thread.
    clock
        When to stop.
    threads
        How many.
    ended
        Called in the caller's thread with a layer and how many are done.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for layer in range(count):
        waiting.put(layer)
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    abandoned = threading.Event()

    def run() -> None:
        while not clock.over and not abandoned.is_set():
            try:
                layer = waiting.get_nowait()
            except queue.Empty:
                return
            work(layer)
            done.put(layer)

    workers = [threading.Thread(target=run, daemon=True) for _ in range(min(count, max(1, threads)))]
    with threadpool_limits(1, user_api="blas"):
        for worker in workers:
            worker.start()
        told, late = 0, math.inf
        while any(worker.is_alive() for worker in workers) and clock.seconds < late:
            try:
                layer = done.get(timeout=POLL_S)
                told += 1
                ended(layer, told)
            except queue.Empty:
                pass
            if clock.over and late == math.inf:
                late = clock.seconds + GRACE_S
    abandoned.set()
