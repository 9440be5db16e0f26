"""Traces for the tests of readers and writers: a tiny one to check by hand, and hypothesis strategies."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from moeplace.errors import TraceError
from moeplace.readers import open_trace, read_trace
from moeplace.trace import Counts, Trace, TraceMeta, concatenate

DATA = Path(__file__).parents[2] / "shared" / "data"
COLUMNS = ("experts", "request", "position", "phase", "step", "rank", "domain")


@dataclass(frozen=True)
class FakeModel:
    """The least that a reader asks of a model."""

    name: str = "toy"
    num_experts: int = 8
    top_k: int = 2
    moe_layer_ids: tuple[int, ...] = (0, 1, 2)


def real(path: str) -> Path:
    """Path of real data; skips the test where the data is not at hand."""
    if not (DATA / path).exists():
        pytest.skip(f"no shared/data/{path} beside the repository")
    return DATA / path


def token(i: int = 0, ids: Any = ((0, 1), (2, 3), (4, 5)), **fields: Any) -> dict[str, Any]:
    """One native line of a request ``r``."""
    return {"req_id": "r", "token_idx": i, "phase": "decode", "topk_ids": ids} | fields


def route(i: int, layer: int, ids: Any = (0, 1), **fields: Any) -> dict[str, Any]:
    """One line of one token and layer."""
    return {"type": "route", "req_id": "r", "token_idx": i, "layer": layer, "topk_ids": ids} | fields


META = {"type": "meta", "schema": "moeplace/trace/1", "num_experts": 8, "top_k": 2, "moe_layer_ids": [0, 1, 2]}


def lines(*rows: Any) -> bytes:
    """JSONL of objects; strings and bytes stand for themselves."""
    parts = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    return b"".join(part + b"\n" for part in parts)


def read_tokens(path: Path, **options: Any) -> Trace:
    """Read a file that holds tokens."""
    trace = read_trace(path, **options)
    assert isinstance(trace, Trace)
    return trace


def streamed(path: Path, **options: Any) -> Trace:
    """Read a file block by block, after a first walk that must give the same."""
    stream = open_trace(path, **options)
    assert not isinstance(stream, Counts)
    first, second = list(stream.blocks()), list(stream.blocks())
    assert_same(concatenate(first, stream.meta), concatenate(second, stream.meta))
    return concatenate(second, stream.meta)


def counts_of(path: Path, **options: Any) -> Counts:
    """Read counts."""
    counts = read_trace(path, **options)
    assert isinstance(counts, Counts)
    return counts


def error_of(path: Path, **options: Any) -> TraceError:
    """Return the error that reading gives."""
    with pytest.raises(TraceError) as caught:
        read_trace(path, **options)
    return caught.value


def assert_same(left: Trace, right: Trace) -> None:
    """Both traces have the same tokens, names and shape."""
    assert left.meta.replace(assumptions=()) == right.meta.replace(assumptions=())
    for name in COLUMNS:
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        assert a is None or np.array_equal(a, b), name
    assert left.digest() == right.digest()


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Put ``content`` on standard input."""

    class Stdin:
        buffer = io.BytesIO(content)

    monkeypatch.setattr("sys.stdin", Stdin())


def route_rows(trace: Trace, order: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Rows of the one-line-per-token-and-layer form, token by token, or in the order given."""
    rows = []
    for i in range(trace.num_tokens):
        for j, layer in enumerate(trace.meta.layer_ids):
            row: dict[str, Any] = {"type": "route", "token_idx": int(trace.position[i]), "layer": layer}
            request = int(trace.request[i])
            row["req_id"] = trace.meta.request_names[request] if trace.meta.request_names else request
            row["phase"] = ["prefill", "decode"][int(trace.phase[i])]
            for name in ("step", "rank"):
                if getattr(trace, name) is not None:
                    row[name] = int(getattr(trace, name)[i])
            if trace.domain is not None:
                row["domain"] = trace.meta.domains[trace.domain[i]] if trace.meta.domains else int(trace.domain[i])
            rows.append(row | {"topk_ids": trace.experts[i, j].tolist()})
    return rows if order is None else [rows[i] for i in order]


def meta_row(meta: TraceMeta) -> dict[str, Any]:
    """Meta line that declares everything."""
    return {
        "type": "meta",
        "num_experts": meta.num_experts,
        "top_k": meta.top_k,
        "moe_layer_ids": meta.layer_ids,
        "model_id": meta.model_id,
        "domains": meta.domains,
        "request_names": meta.request_names,
    }


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Small traces of any shape, with and without names and optional columns, of distinct (request, position)."""
    num_experts = draw(st.sampled_from([1, 2, 5, 32, 256, 257, 1000]))
    top_k = draw(st.integers(1, min(4, num_experts)))
    layer_ids = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True).map(sorted))
    num_tokens = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = st.lists(st.text(min_size=1, max_size=3, alphabet='ab é"\\'), unique=True, min_size=3, max_size=5)
    request_names = draw(st.one_of(st.just([]), names))
    domains = draw(st.one_of(st.just([]), names))
    choices = [[rng.permutation(num_experts)[:top_k] for _ in layer_ids] for _ in range(num_tokens)]
    requests = rng.integers(0, 3, num_tokens)
    meta = TraceMeta(
        num_experts=num_experts,
        top_k=top_k,
        layer_ids=tuple(layer_ids),
        model_id=draw(st.sampled_from([None, "a/model"])),
        domains=tuple(domains),
        request_names=tuple(request_names),
    )
    optional = {
        name: rng.integers(0, 3, num_tokens)
        for name in ("step", "rank", "domain")
        if draw(st.booleans()) or (name == "domain" and domains)
    }
    return Trace(
        meta=meta,
        experts=np.array(choices),
        request=requests if request_names else requests * draw(st.sampled_from([1, 7, 2**40])),
        position=rng.permutation(num_tokens) + draw(st.sampled_from([0, 100])),
        phase=rng.integers(0, 2, num_tokens),
        **optional,
    )
