"""A corpus of per-request JSON at DeepSeek-V3's shape: MB/s to full statistics on one and two workers, and memory."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import orjson

from benchmarks.bench_read import synthetic
from benchmarks.cases import Case, in_child

FILES, TOKENS_PER_FILE, PROMPT, DENSE = 2_000, 192, 96, 3

COUNT = """
import sys, time
from moeplace.corpus import count_parts
from moeplace.engines import Processes, Run
from moeplace.parts import parted
from moeplace.readers import open_trace

rates = []
for workers in (1, 2):
    source = parted(open_trace(sys.argv[1]))
    started = time.perf_counter()
    with Processes(workers) as engine:
        counted = count_parts(source, Run(engine=engine, work_dir=sys.argv[2]))
    rates.append(source.file_bytes.sum() / 1e6 / (time.perf_counter() - started))
print(*rates, counted.stats.num_tokens)
"""


def write_corpus(folder: Path, files: int = FILES) -> None:
    """Write requests of a prompt and one-token steps, a few different ones over and over."""
    trace = synthetic(8 * TOKENS_PER_FILE)
    dense = {str(layer): None for layer in range(DENSE)}
    ids = trace.experts.astype(np.int64)
    requests = []
    for start in range(0, trace.num_tokens, TOKENS_PER_FILE):
        edges = [0, *range(PROMPT, TOKENS_PER_FILE + 1)]
        steps = [ids[start + a : start + b] for a, b in itertools.pairwise(edges)]
        layers = [{**dense, **{str(DENSE + i): step[:, i].tolist() for i in range(ids.shape[1])}} for step in steps]
        requests.append(orjson.dumps(layers))
    for number in range(files):
        (folder / f"{number:05d}.json").write_bytes(requests[number % len(requests)])


def cases(seeds: int) -> list[Case]:
    """Count a corpus of 2,000 files."""
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "corpus"
        corpus.mkdir()
        write_corpus(corpus)
        size = sum(path.stat().st_size for path in corpus.iterdir()) / 1e6
        _, memory, printed = in_child(COUNT, str(corpus), f"{place}/work")
    one, two, tokens = (float(word) for word in printed.split())
    name = f"per-request JSON to statistics, {FILES:,} files, {size:,.0f} MB, 2 workers"
    note = f"{tokens:,.0f} tokens; one worker {one:,.0f} MB/s"
    return [
        Case(name=name, value=two, unit="MB/s", target=60, at_least=True, note=note),
        Case(name="  two workers against one", value=two / one, unit="times", target=1.7, at_least=True),
        Case(name="  peak memory of the largest process", value=memory, unit="MB", target=1500),
    ]
