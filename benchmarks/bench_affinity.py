"""Trace → statistics at DeepSeek-V3 shape: tokens per second, and memory that does not grow with the trace."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.cases import Case, in_child
from benchmarks.instances import make_trace
from moeplace.trace import concatenate
from moeplace.writers import write_trace

COUNT = """
import sys, time
from moeplace.profile import count_and_profile
from moeplace.readers import open_trace
from moeplace.counting import PairCounter
import numpy as np
PairCounter(2, 4, compiled=True).add(np.zeros((1, 2, 1), np.uint8))
rates = []
for _ in range(3):
    started = time.perf_counter()
    stats, _ = count_and_profile(open_trace(sys.argv[1]), threads=2)
    rates.append(stats.num_tokens / (time.perf_counter() - started))
print(max(rates))
"""


def cases(seeds: int) -> list[Case]:
    """Measure a trace of 200,000 tokens and one four times as long."""
    part = make_trace("dsv3", "mid", 0, tokens=20_000)
    results = []
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        for copies in (10, 40):
            path = Path(folder) / f"{copies}.npz"
            whole = concatenate([part] * copies, part.meta)
            number = np.arange(whole.num_tokens)
            write_trace(whole.replace(request=number // 512, position=number % 512), path)
            del whole
            _, memory[copies], printed = in_child(COUNT, str(path))
            name = f"npz to full statistics, 58×256 top-8, {copies * 20_000:,} tokens"
            results.append(Case(name=name, value=float(printed), unit="tokens/s", target=100_000, at_least=True))
    results.append(Case(name="  peak memory, 200,000 tokens", value=memory[10], unit="MB", target=1500))
    results.append(Case(name="  peak memory, 800,000 tokens", value=memory[40], unit="MB", target=1500))
    return results
