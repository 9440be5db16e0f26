"""How fast traces are read, at DeepSeek-V3's shape (58 layers, 256 experts, top-8): text in MB/s, npz in tokens/s.

Every case writes a synthetic trace to a temporary folder and walks it block by block in one process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks.cases import Case, best_seconds
from moeplace.readers import open_trace
from moeplace.trace import Counts, Trace, TraceMeta
from moeplace.writers import write_trace

NUM_LAYERS, NUM_EXPERTS, TOP_K = 58, 256, 8
TOKENS_PER_REQUEST = 256


def synthetic(num_tokens: int, seed: int = 0) -> Trace:
    """Tokens with random distinct experts at DeepSeek-V3's shape."""
    rng = np.random.default_rng(seed)
    # steps of an odd stride modulo 256 never meet, so no row needs sorting to have distinct experts
    start = rng.integers(0, NUM_EXPERTS, (num_tokens, NUM_LAYERS, 1))
    stride = 2 * rng.integers(0, NUM_EXPERTS // 2, (num_tokens, NUM_LAYERS, 1)) + 1
    experts = (start + stride * np.arange(TOP_K)) % NUM_EXPERTS
    token = np.arange(num_tokens)
    meta = TraceMeta(num_experts=NUM_EXPERTS, top_k=TOP_K, layer_ids=tuple(range(3, 3 + NUM_LAYERS)))
    return Trace(
        meta=meta,
        experts=experts.astype(np.uint8),
        request=token // TOKENS_PER_REQUEST,
        position=token % TOKENS_PER_REQUEST,
        phase=np.ones(num_tokens, np.uint8),
    )


def route_lines(trace: Trace) -> Iterable[str]:
    """Yield the one-line-per-token-and-layer form of a trace, layer by layer within each request."""
    for request in np.unique(trace.request).tolist():
        rows = np.flatnonzero(trace.request == request).tolist()
        for layer in range(trace.meta.num_layers):
            for row in rows:
                ids = trace.experts[row, layer].tolist()
                token = int(trace.position[row])
                key = f'"req_id":{request},"token_idx":{token},"layer":{layer + 3}'
                yield f'{{"type":"route",{key},"topk_ids":{ids}}}\n'


def moe_beyond_rows(trace: Trace) -> Iterable[str]:
    """Yield the rows of moe-beyond's CSV, layer by layer within each request; some tokens are quoted text."""
    yield "Layer ID,Batch Number,Token,Activated Expert IDs\n"
    words = ["Ġthe", "How", '","', "Ġof", "7"]
    for request in np.unique(trace.request).tolist():
        rows = np.flatnonzero(trace.request == request).tolist()
        for layer in range(trace.meta.num_layers):
            for row in rows:
                yield f'{layer + 3},{request},{words[row % len(words)]},"{trace.experts[row, layer].tolist()}"\n'


def walk(path: Path) -> None:
    """Open a trace and walk all of its blocks."""
    trace = open_trace(path)
    if isinstance(trace, Counts):
        raise TypeError(f"{path} holds counts")
    for _ in trace.blocks():
        pass


def cases(seeds: int) -> list[Case]:
    """Measure every form of input."""
    return [_jsonl_case(), _route_case(), _csv_case(), _npz_case()]


def _jsonl_case() -> Case:
    rate = _rate(lambda path: write_trace(synthetic(30_000), path), "tokens.jsonl", _megabytes)
    return Case(name="read JSONL, one line per token, 58×8 ids", value=rate, unit="MB/s", target=40, at_least=True)


def _route_case() -> Case:
    def write(path: Path) -> None:
        path.write_text("".join(route_lines(synthetic(4_096))))

    rate = _rate(write, "route.jsonl", _megabytes)
    return Case(name="read JSONL, one line per token and layer", value=rate, unit="MB/s")


def _csv_case() -> Case:
    def write(path: Path) -> None:
        path.write_text("".join(moe_beyond_rows(synthetic(8_192))), encoding="utf-8")

    rate = _rate(write, "moe_beyond.csv", _megabytes)
    return Case(
        name="read CSV of moe-beyond, one row per token and layer", value=rate, unit="MB/s", target=40, at_least=True
    )


def _npz_case() -> Case:
    num_tokens = 200_000
    rate = _rate(lambda path: write_trace(synthetic(num_tokens), path), "tokens.npz", lambda path: num_tokens)
    return Case(name="read npz, 58×8 ids", value=rate, unit="tokens/s", target=200_000, at_least=True)


def _rate(write: Callable[[Path], None], name: str, size: Callable[[Path], float]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return size(path) / best_seconds(lambda: walk(path))


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6
