"""What a benchmark reports, and helpers to measure it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One figure: ``value`` in ``unit``, and the target it should reach (at least, or at most)."""

    name: str
    value: float
    unit: str
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def best_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Shortest of several runs: the one the machine disturbed least."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def in_child(code: str, *arguments: str) -> tuple[float, float, str]:
    """Run Python code in a fresh process: wall seconds, peak memory [MB], and what it printed."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    output = child.stdout.read() if child.stdout else ""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"the benchmark's child process failed with exit code {child.returncode}")
    return time.perf_counter() - started, _megabytes(usage), output


def _megabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / 1024 if sys.platform != "darwin" else usage.ru_maxrss / 1e6
