"""JSONL traces: every form reads the same, and every bad row is named with its place, value, rule and hint."""

from __future__ import annotations

import gzip
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cases import (
    META,
    FakeModel,
    assert_same,
    error_of,
    give_stdin,
    lines,
    meta_row,
    read_tokens,
    real,
    route,
    route_rows,
    streamed,
    token,
    traces,
)

from moeplace.errors import InputError, Location, TraceError
from moeplace.files import open_input
from moeplace.readers import ReaderOptions, _jsonl_batch, format_names, list_formats, open_trace, read_trace
from moeplace.readers.jsonl import JsonlStream
from moeplace.trace import Trace, concatenate
from moeplace.writers import write_trace

FAST = settings(max_examples=40, deadline=None)


@pytest.fixture
def trace_file(tmp_path: Path):
    """Write lines to a file and return its path."""

    def write(*rows: Any) -> Path:
        path = tmp_path / "t.jsonl"
        path.write_bytes(lines(*rows))
        return path

    return write


def outcome(path: Path, skip_bad: int) -> tuple[str, str]:
    """Return the digest and meta of a trace, or the error that reading it gives."""
    try:
        trace = read_tokens(path, format="jsonl", skip_bad=skip_bad)
    except TraceError as error:
        return "error", str(error)
    return trace.digest(), str(trace.meta)


def place(path: Path, line: int, at: str) -> Location:
    """Place of the last occurrence of ``at`` in a line."""
    return Location(file=str(path), line=line, column=path.read_text().splitlines()[line - 1].rindex(at) + 1)


def test_a_tiny_trace_by_hand(trace_file) -> None:
    """Two tokens read as they stand in the file."""
    trace = read_tokens(trace_file(META, token(0, rank=1), token(1, [[7, 6], [0, 1], [2, 3]], phase="prefill", rank=0)))
    assert trace.experts.tolist() == [[[0, 1], [2, 3], [4, 5]], [[7, 6], [0, 1], [2, 3]]]
    assert trace.experts.dtype == np.uint8
    assert trace.position.tolist() == [0, 1]
    assert trace.phase.tolist() == [1, 0]
    assert trace.rank is not None
    assert trace.rank.tolist() == [1, 0]
    assert trace.step is None
    assert trace.meta.request_names == ("r",)
    assert trace.meta.assumptions == ()


@FAST
@given(trace=traces(), data=st.data())
def test_per_layer_rows_equal_per_token_rows(trace: Trace, data: st.DataObject) -> None:
    """The one-line-per-token-and-layer form is the same trace, in any order that completes tokens in order."""
    num_layers, total = trace.meta.num_layers, trace.num_tokens * trace.meta.num_layers
    by_layer = [token * num_layers + layer for layer in range(num_layers) for token in range(trace.num_tokens)]
    order = data.draw(st.sampled_from([list(range(total)), by_layer]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.jsonl"
        rows = route_rows(trace, order)
        unique = {(row["req_id"], row["token_idx"], row["layer"]) for row in rows}
        assert len(unique) == total
        path.write_bytes(lines(meta_row(trace.meta), *rows))
        assert_same(streamed(path), trace)


@FAST
@given(trace=traces(), block_bytes=st.sampled_from([1, 7, 64]), cache_bytes=st.sampled_from([0, 100, 1 << 20]))
def test_block_and_cache_sizes_do_not_matter(trace: Trace, block_bytes: int, cache_bytes: int) -> None:
    """However small the blocks, the chunks of text and the cache, the trace and every later walk are the same."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jsonl_batch, "CHUNK_BYTES", 50)
        for name, rows in (("a", None), ("b", route_rows(trace))):
            path = Path(folder) / f"{name}.jsonl"
            write_trace(trace, path)
            if rows is not None:
                path.write_bytes(lines(meta_row(trace.meta), *rows))
            stream = JsonlStream(open_input(path), ReaderOptions(block_bytes=block_bytes, cache_bytes=cache_bytes))
            next(iter(stream.blocks()))
            for _ in range(3):
                blocks = list(stream.blocks())
                assert_same(concatenate(blocks, stream.meta), trace)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_undeclared_shape_is_found_in_a_first_pass(trace_file, per_layer: bool, cache_bytes: int) -> None:
    """Without a meta line the layers and the number of experts come from all rows, and the trace says so."""
    rows = [route(i, layer, [i, i + 1]) for layer in (4, 9) for i in range(5)]
    if not per_layer:
        rows = [token(i, [[i, i + 1]] * 2) for i in range(5)]
    stream = JsonlStream(open_input(trace_file(*rows)), ReaderOptions(block_bytes=1, cache_bytes=cache_bytes))
    assert stream.meta.num_experts == 6
    assert stream.meta.layer_ids == ((4, 9) if per_layer else (0, 1))
    expected = "num_experts not given: 6 = largest id + 1; --model or a meta line says it exactly"
    assert expected in stream.meta.assumptions
    trace = concatenate(list(stream.blocks()), stream.meta)
    assert trace.experts[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("per_layer", [False, True])
def test_stdin_can_be_walked_twice(monkeypatch: pytest.MonkeyPatch, per_layer: bool) -> None:
    """Blocks from standard input are kept, so that a second walk gives the same tokens."""
    rows = [route(i, layer) for i in range(9) for layer in (0, 1)] if per_layer else [token(i) for i in range(9)]
    give_stdin(monkeypatch, gzip.compress(lines(*rows)))
    stream = open_trace("-")
    assert [block.num_tokens for block in stream.blocks()] == [block.num_tokens for block in stream.blocks()] == [9]


@pytest.mark.parametrize(
    ("field", "alias"),
    [
        *(("topk_ids", alias) for alias in ("experts", "expert_ids", "topk_experts", "indices", "selected_experts")),
        *(("token_idx", alias) for alias in ("token", "position", "token_pos")),
        *(("req_id", alias) for alias in ("request_id", "rid", "request")),
        *(("layer", alias) for alias in ("layer_id", "layer_idx")),
    ],
)
def test_aliases(trace_file, field: str, alias: str) -> None:
    """Every alias of the contract reads as its field."""
    rows = [route(i, layer, [i, 7 - i]) for i in range(3) for layer in (0, 1)]
    expected = read_tokens(trace_file(*rows))
    assert_same(
        read_tokens(trace_file(*[{alias if key == field else key: row[key] for key in row} for row in rows])), expected
    )


@pytest.mark.parametrize(
    ("meta", "layer_ids"),
    [
        ({"layers_logged": [3, 5, 7]}, (3, 5, 7)),
        ({"moe_layer_ids": [1, 2, 3]}, (1, 2, 3)),
        ({"layer_ids": [2, 4, 6]}, (2, 4, 6)),
        ({"num_layers": 6, "first_moe_layer": 3, "layer_ids": "absolute"}, (3, 4, 5)),
        ({"first_moe_layer": 1}, (1, 2, 3)),
        ({"num_layers": 3}, (0, 1, 2)),
    ],
)
def test_meta_aliases(trace_file, meta: dict[str, Any], layer_ids: tuple[int, ...]) -> None:
    """The meta line's aliases give model, top-k and layer ids."""
    row = {"type": "meta", "model": "m", "num_experts_per_tok": 2, "num_experts": 8} | meta
    trace = read_tokens(trace_file(row, token()))
    assert trace.meta.model_id == "m"
    assert trace.meta.layer_ids == layer_ids
    assert trace.meta.assumptions == ()


def test_layers_of_the_compact_form(trace_file) -> None:
    """``layers`` names the rows' layers, and must be the same for every token."""
    assert read_tokens(trace_file(token(layers=[3, 4, 9]))).meta.layer_ids == (3, 4, 9)
    path = trace_file(token(layers=[3, 4, 9]), token(1, layers=[3, 4, 5]))
    error = error_of(path)
    assert error.where == place(path, 2, "[3, 4, 5]")
    assert "every token has the same layers" in str(error)


def test_what_is_missing_is_assumed_and_said(trace_file) -> None:
    """Without request, position and phase: one request, running numbers, decode; each in one sentence."""
    trace = read_tokens(trace_file(*[{"topk_ids": [[0, 1]]}] * 3))
    assert trace.request.tolist() == [0, 0, 0]
    assert trace.position.tolist() == [0, 1, 2]
    assert trace.phase.tolist() == [1, 1, 1]
    said = " ".join(trace.meta.assumptions)
    for part in ("request ids not given", "positions not given", "phase not given", "layer ids not given"):
        assert part in said
    rows = [{"rid": r, "layer": layer, "experts": [0, 1]} for layer in (0, 1) for r in ("a", "b", "a")]
    trace = read_tokens(trace_file(*rows))
    assert trace.request.tolist() == [0, 1, 0]
    assert trace.position.tolist() == [0, 0, 1]


def test_request_ids(trace_file) -> None:
    """Integer ids are kept, strings are numbered by first appearance, a mixture is refused at its place."""
    assert read_tokens(trace_file(token(req_id=12), token(req_id=5))).request.tolist() == [12, 5]
    trace = read_tokens(trace_file(token(req_id="b"), token(req_id="a"), token(req_id="b")))
    assert trace.request.tolist() == [0, 1, 0]
    assert trace.meta.request_names == ("b", "a")
    error = error_of(trace_file(token(req_id="b"), token(req_id=5)))
    assert str(error).startswith(f"{error.where}: req_id 5 among strings")
    assert str(error.where).endswith(":2:12")


def test_domains(trace_file) -> None:
    """Domains are names or numbers; numbers index the meta line's names."""
    trace = read_tokens(trace_file(token(domain="code"), token(1, domain="math"), token(2, domain="code")))
    assert trace.meta.domains == ("code", "math")
    assert trace.domain is not None
    assert trace.domain.tolist() == [0, 1, 0]
    meta = META | {"domains": ["x", "y"]}
    assert read_tokens(trace_file(meta, token(domain=1))).meta.domains == ("x", "y")
    assert "indexes the 2 domains" in str(error_of(trace_file(meta, token(domain=1), token(1, domain=2))))


def test_harmless_variations(trace_file, tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines, weights, booleans elsewhere and no last newline change nothing."""
    plain = read_tokens(trace_file(META, token(0), token(1)))
    odd = [token(i) | {"topk_weights": [[0.5, 0.5]] * 3, "cached": True, "rank": None} for i in (0, 1)]
    text = b"\xef\xbb\xbf" + lines(META, "", *odd, "  ").replace(b"\n", b"\r\n").rstrip()
    path = tmp_path / "odd.jsonl"
    path.write_bytes(text)
    assert_same(read_tokens(path), plain)
    mixed = trace_file(META, token(0), {"experts": [[0, 1], [2, 3], [4, 5]], "rid": "r", "position": 1, "phase": 1})
    assert_same(read_tokens(mixed), plain)
    joined = trace_file(META, token(0), META, token(1))
    assert_same(read_tokens(joined), plain)


# the ids, the text at the column that is named, what is wrong, and a part of the rule or hint
BAD_IDS: list[tuple[Any, str, str, str]] = [
    ([[0, 1], [2, 8], [4, 5]], "8]", "expert 8", "ids lie in 0..7"),
    ([[0, 1], [2, 300], [4, 5]], "300]", "expert 300", "ids lie in 0..7"),
    ([[0, 1], [2, 70000], [4, 5]], "70000]", "expert 70000", "ids lie in 0..7"),
    ([[0, 1], [2, -1], [4, 5]], "-1]", "expert -1", "leave padding tokens out"),
    ([[0, 1], [2, 3.0], [4, 5]], "3.0]", "expert id 3.0 (float)", "hint: write 3"),
    ([[0, 1], [2, 3.5], [4, 5]], "3.5]", "expert id 3.5 (float)", "expert ids are integers"),
    ([[0, 1], [2, True], [4, 5]], "true]", "expert id true (boolean)", "expert ids are integers"),
    ([[0, 1], [2, "3"], [4, 5]], '"3"]', 'expert id "3" (string)', "expert ids are integers"),
    ([[0, 1], [2, None], [4, 5]], "null]", "expert id null (null)", "expert ids are integers"),
    (
        [[0, 1], [3, 3], [4, 5]],
        "3], [4",
        "expert 3 stands twice in the top-k [3, 3]",
        "the 2 experts of a token differ",
    ),
    ([[0, 1], [2], [4, 5]], "[2]", "1 ids in one layer: [2]", "top-2 in every row"),
    ([[0, 1], [], [4, 5]], "[]", "[] (list) in place of a list of ids", "[[k ids] per MoE layer]"),
    ([[0, 1], 2, [4, 5]], "2, [4", "2 (integer) in place of a list of ids", "[[k ids] per MoE layer]"),
    ([[0, 1], [2, 3]], "[[0, 1]", "the token has ids for 2 layers", "3 layers for every token"),
    ("none", '"none"', 'topk_ids is "none" (string)', "[[k ids] per MoE layer]"),
]


@pytest.mark.parametrize(("ids", "at", "what", "rest"), BAD_IDS)
@pytest.mark.parametrize("meta", [True, False])
def test_bad_ids_are_located(trace_file, ids: Any, at: str, what: str, rest: str, meta: bool) -> None:
    """A bad id is named with file, line, column of the value, the value, the rule and a hint."""
    rows = [META] if meta else []
    model = None if meta else FakeModel()
    path = trace_file(*rows, token(0), token(1, ids), token(2))
    error = error_of(path, model=model)
    assert error.where == place(path, 3 if meta else 2, at)
    assert error.what == what
    assert rest in str(error)
    skipped = read_tokens(path, model=model, skip_bad=1)
    assert skipped.position.tolist() == [0, 2]
    assert skipped.meta.assumptions[-1].startswith(f"1 bad row skipped; the first: {error.where}")


BAD_LINES: list[tuple[Any, str, str, str]] = [
    ('{"topk_ids": [[0, NaN]]}', "NaN", "NaN is not JSON", "expert ids are integers"),
    ('{"topk_ids": [[0, -Infinity]]}', "-Inf", "-Infinity is not JSON", "expert ids are integers"),
    ('{"topk_ids": [[0, 1]}', "}", "not JSON: ", "one JSON object per line"),
    ("[1, 2]", "[1", "a line that is a list", "one JSON object"),
    ({"req_id": "r", "token_idx": 1}, "{", "no expert ids", "hint: the line has req_id, token_idx"),
    ({"type": "summary", "x": 1}, '"summ', "type 'summary'", "a line is of type meta or route"),
    (token(1, phase="train"), '"train"', "phase 'train'", "prefill or decode"),
    (token(1.5), "1.5", "token_idx 1.5 (float)", "token_idx is an integer"),
    (token(1, req_id=[1]), "[1],", "req_id [1] (list)", "an integer or a string"),
    (token(2**63), "92233", "token_idx 9223372036854775808 (integer)", "an integer"),
    (token(1, step=1), "{", "a step", "on every line or on none; the first row has none"),
    ({"token_idx": 1, "phase": "decode", "topk_ids": [[0, 1]] * 3}, "{", "no request", "the first row has one"),
    (route(1, 0), "{", "a layer", "on every line or on none"),
    ({"req_id": "r", "token_idx": 1, "topk_ids": [0, 1]}, "{", "ids of one layer without", "layer_id"),
    (META | {"num_experts": 9}, "9,", "a second meta line says num_experts 9, the first 8", "joined into one file"),
]


@pytest.mark.parametrize(("row", "at", "what", "rest"), BAD_LINES)
def test_bad_lines_are_located(trace_file, row: Any, at: str, what: str, rest: str) -> None:
    """Whatever else is wrong with a line is named with its line and column."""
    path = trace_file(META, token(0), row, token(2))
    error = error_of(path)
    assert error.where == place(path, 3, at)
    assert error.what.startswith(what)
    assert rest in str(error)
    assert read_tokens(path, skip_bad=1).position.tolist() == [0, 2]


def test_text_that_is_not_utf8_is_located(trace_file) -> None:
    """A byte that is not UTF-8 is named with its value and column."""
    path = trace_file(META, token(0), b'{"req_id": "\xff"}')
    error = error_of(path)
    assert error.where == Location(file=str(path), line=3, column=13)
    assert error.what == "byte 0xff is not UTF-8"


def test_columns_count_characters(trace_file) -> None:
    """Columns count characters, not bytes, and find values behind strings with brackets and quotes."""
    path = trace_file(META, token(0, req_id='é"]}{['), token(1, [[0, 1], [2, 9], [4, 5]], req_id='é"]}{['))
    path.write_text(path.read_text().replace("\\u00e9", "é"))
    error = error_of(path)
    assert isinstance(error.where, Location)
    line = path.read_text().splitlines()[2]
    assert line[error.where.column - 1 :].startswith("9]")


def test_the_first_bad_rows_are_shown_together(trace_file) -> None:
    """Up to five bad rows are shown, the last as the error itself, the others before it in order."""
    bad = [token(i, [[0, 9], [2, 3], [4, 5]]) for i in range(1, 8)]
    error = error_of(trace_file(META, token(0), *bad))
    assert [other.split("t.jsonl:")[1][0] for other in error.others] == ["3", "4", "5", "6"]
    assert isinstance(error.where, Location)
    assert error.where.line == 7
    assert str(error).count("expert 9") == 5


def test_skip_bad_counts(trace_file) -> None:
    """As many bad rows as allowed are skipped and counted; one more is an error, on every walk."""
    rows = [token(i, [[0, 9 if i % 3 == 1 else 1], [2, 3], [4, 5]]) for i in range(9)]
    path = trace_file(META, *rows)
    stream = open_trace(path, skip_bad=3)
    for _ in range(2):
        assert sum(block.num_tokens for block in stream.blocks()) == 6
    (said,) = stream.meta.assumptions
    assert said.startswith(f"3 bad rows skipped; the first: {place(path, 3, '9], [2')}: expert 9 (rule: ")
    error = error_of(path, skip_bad=2)
    assert error.others[0] == "more bad rows than the 2 that may be skipped; the first 3:"


def test_bad_rows_number_no_names(trace_file) -> None:
    """A request that stands only on skipped rows gets no number, however the lines fall into batches."""
    bad = token(0, [[9, 9]], req_id="ghost")
    trace = read_tokens(trace_file(META, token(req_id="a"), bad, token(req_id="b")), skip_bad=1)
    assert trace.meta.request_names == ("a", "b")


@settings(max_examples=150, deadline=None)
@given(trace=traces(), data=st.data(), skip_bad=st.sampled_from([0, 1, 50]))
def test_the_fast_path_and_the_careful_path_agree(trace: Trace, data: st.DataObject, skip_bad: int) -> None:
    """Whatever bytes of a file are changed, batches and single lines give the same trace or the same error."""
    rows = data.draw(st.sampled_from([[*map(json.dumps, route_rows(trace))], None]))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "t.jsonl"
        write_trace(trace, path)
        text = bytearray(path.read_bytes() if rows is None else lines(*rows))
        for _ in range(data.draw(st.integers(0, 2))):
            at = data.draw(st.integers(0, len(text) - 1))
            text[at : at + data.draw(st.integers(0, 2))] = data.draw(
                st.sampled_from([b"9", b"-", b".5", b'"', b"\n", b"true", b"]", b"\xff"])
            )
        path.write_bytes(text)
        fast = outcome(path, skip_bad)
        patch.setattr(_jsonl_batch.RowParser, "_fast", lambda parser, batch: None)
        assert outcome(path, skip_bad) == fast


def test_a_cut_off_file(tmp_path: Path) -> None:
    """A last line that stops short is named as the file being cut off; it can be skipped."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines(META, token(0), token(1))[:-20])
    error = error_of(path)
    assert error.what == "the last line is incomplete"
    assert str(error.where).endswith(f"t.jsonl:3:{len(lines(token(1))) - 20 + 1}")
    assert "cut off" in str(error)
    assert read_tokens(path, skip_bad=1).num_tokens == 1


def test_a_cut_off_gzip_names_the_line(tmp_path: Path) -> None:
    """A truncated gzip is an error with the line it stops in, never a shorter trace."""
    path = tmp_path / "t.jsonl.gz"
    rng = np.random.default_rng(0)
    rows = [token(i, [rng.permutation(8)[:2].tolist() for _ in range(3)]) for i in range(50_000)]
    data = gzip.compress(lines(META, *rows), 1)
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(InputError, match=r"t\.jsonl\.gz:\d+: gzip data ends early") as caught:
        read_trace(path)
    assert 1 < caught.value.where.line < 50_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (lines(META), "holds no routed tokens"),
        (b"\n\n", "of no known format|holds no routed tokens"),
        (b"a,b,c\n1,2,3\n", "looks like text that begins 'a,b,c'"),
        (b'{"a": 1}\n', "looks like JSON with the keys a"),
        (b"PAR1\0\0", "looks like a Parquet file"),
        (b"\x00\x01\x02\x03", "binary data that begins 00 01 02 03"),
    ],
)
def test_files_that_are_no_trace(tmp_path: Path, content: bytes, message: str) -> None:
    """An empty or foreign file is refused by what it looks like, with the known formats."""
    path = tmp_path / "unknown"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_the_name_breaks_a_tie(tmp_path: Path) -> None:
    """A file named .jsonl whose first line is broken is judged as JSONL, with the place."""
    path = tmp_path / "t.jsonl"
    path.write_text("garbage\n")
    assert str(error_of(path)).startswith(f"{path}:1:1: not JSON")


def test_formats_are_the_files_of_the_folder() -> None:
    """The registry is the folder; every format describes itself; an unknown one is answered with a suggestion."""
    assert set(format_names()) >= {"jsonl", "npz", "counts"}
    assert all(list_formats().values())
    with pytest.raises(InputError, match="did you mean jsonl"):
        read_trace(__file__, format="jsnl")


def test_a_wrong_model_is_named(trace_file) -> None:
    """File, ids and model must agree; the error names both sides."""
    assert "num_experts is 8, but model toy has 16" in str(
        error_of(trace_file(META, token()), model=FakeModel(num_experts=16))
    )
    assert "top_k is 2, but model toy has 4" in str(error_of(trace_file(META, token()), model=FakeModel(top_k=4)))
    assert "top-k of the tokens is 2, but model toy has 4" in str(
        error_of(trace_file(token()), model=FakeModel(top_k=4))
    )
    error = error_of(trace_file(token()), model=FakeModel(num_experts=4))
    assert "ids lie in 0..3: model toy has 4 experts per layer" in str(error)
    assert "is --model the model that was recorded?" in str(error)
    assert "tokens have 3 layers, but model toy has 2 MoE layers" in str(
        error_of(trace_file(token()), model=FakeModel(moe_layer_ids=(0, 1)))
    )
    assert "layers 0..2, but the MoE layers of model toy are 5..6" in str(
        error_of(trace_file(META, token()), model=FakeModel(moe_layer_ids=(5, 6)))
    )


def test_a_model_fills_in(trace_file) -> None:
    """A model gives the number of experts and the layer ids; ordinals become its layer ids, and it is said."""
    model = FakeModel(moe_layer_ids=(3, 4, 5))
    meta = read_tokens(trace_file(token()), model=model).meta
    assert (meta.num_experts, meta.layer_ids, meta.assumptions) == (8, (3, 4, 5), ())
    rows = [route(i, layer, phase="decode") for i in range(2) for layer in (0, 1, 2)]
    meta = read_tokens(trace_file(*rows), model=model).meta
    assert meta.layer_ids == (3, 4, 5)
    assert meta.assumptions == ("layers 0..2 taken as ordinals of the MoE layers of toy: its layers 3..5",)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0.*num_experts is an integer from 1"),
        ({"num_experts": "8"}, "num_experts is '8'"),
        ({"moe_layer_ids": [2, 1, 0]}, "increasing integers"),
        ({"domains": "code"}, "a list of strings"),
        ({"schema": "moeplace/trace/9"}, "this version reads moeplace/trace/1"),
        ({"moe_layer_ids": None, "num_layers": 2}, "tokens have 3 layers, but num_layers is 2"),
    ],
)
def test_bad_meta_lines(trace_file, meta: dict[str, Any], message: str) -> None:
    """A meta line with a wrong value is refused at its place."""
    error = error_of(trace_file(META | meta, token()))
    assert "t.jsonl:1:" in str(error.where)
    with pytest.raises(TraceError, match=f"(?s){message}"):
        raise error


def test_a_missing_layer_is_named(trace_file) -> None:
    """A token that never became complete is a bad row where it starts, with the layers it lacks."""
    rows = [route(i, layer) for i in range(3) for layer in range(3) if (i, layer) != (1, 2)]
    path = trace_file(META, *rows)
    error = error_of(path)
    assert error.where == Location(file=str(path), line=5, column=1)
    assert error.what == "token 1, which starts here, lacks 1 layers: 2"
    assert read_tokens(path, skip_bad=1).position.tolist() == [0, 2]


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize("again", [(0, 0), (0, 2), (1, 1)])
def test_a_repeated_row_is_named(trace_file, again: tuple[int, int], block_bytes: int) -> None:
    """A second row of a request, token and layer is refused with a hint about dummy runs, at once or much later."""
    rows = [route(i, layer) for i in range(3) for layer in range(3)]
    path = trace_file(META, *rows[:5], route(*again, [6, 7]), *rows[5:])
    with pytest.raises(TraceError) as caught:
        list(JsonlStream(open_input(path), ReaderOptions(block_bytes=block_bytes)).blocks())
    assert caught.value.where == Location(file=str(path), line=7, column=1)
    assert "dummy profiling run" in str(caught.value)


def test_a_layer_that_the_meta_line_does_not_name(trace_file) -> None:
    """A row of a layer outside ``layers_logged`` is a bad row at the layer's column."""
    path = trace_file({"type": "meta", "layers_logged": [0, 1]}, route(0, 0), route(0, 1), route(0, 2))
    error = error_of(path)
    assert error.where == place(path, 4, "2, ")
    assert "layer 2" in error.what


def test_a_long_trace_reads_in_several_batches(tmp_path: Path) -> None:
    """Line numbers and tokens are right beyond the first batch of text."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((4000, 3, 300)), axis=-1)[..., :2]
    rows = [json.dumps(token(i, ids[i].tolist())) for i in range(4000)] * 4
    bad = len(rows) - 5
    path = tmp_path / "t.jsonl"
    text = list(itertools.chain([json.dumps(META | {"num_experts": 300})], rows))
    path.write_text("\n".join(text))
    assert path.stat().st_size > _jsonl_batch.CHUNK_BYTES
    trace = read_tokens(path)
    assert trace.experts.dtype == np.uint16
    assert np.array_equal(trace.experts, np.tile(ids, (4, 1, 1)))
    text[bad] = text[bad].replace("[[", "[[300, ")
    path.write_text("\n".join(text))
    error = error_of(path)
    assert isinstance(error.where, Location)
    assert error.where.line == bad + 1


def test_the_vllm_sample_reads_as_it_is() -> None:
    """A recorded vLLM route log reads unchanged: one layer, top-4, and its rows are the dummy profiling run."""
    trace = read_tokens(real("format_samples/vllm_moe_routes_jsonl/moe_routes_head.jsonl"))
    assert trace.experts.shape == (1999, 1, 4)
    assert trace.meta.model_id == "Qwen/Qwen1.5-MoE-A2.7B-Chat"
    assert trace.meta.layer_ids == (0,)
    assert len(np.unique(trace.experts, axis=0)) == 1
