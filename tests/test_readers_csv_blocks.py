"""CSV in whole blocks: what the row parser reads from the same bytes, and the same errors, in every layout."""

from __future__ import annotations

import csv
import gc
import gzip
import io
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cases import error_of, read_tokens, streamed, traces

from moeplace.errors import TraceError
from moeplace.files import open_input
from moeplace.readers import ReaderOptions, _csv_walk
from moeplace.readers._csv_blocks import Unclear
from moeplace.readers._csv_rows import RowParser
from moeplace.readers.csv import CsvStream
from moeplace.readers.csv import open as open_csv
from moeplace.trace import Counts, Trace

TOKENS = ("How", ",", '"', 'a "b", c', "7", "Ġé", "two\nlines", "")
LAYOUTS = ("moe-beyond", "scores", "numbered", "choices", "llama.cpp", "list", "counts")


def header_of(layout: str, meta: Any) -> list[str]:
    """The header; empty where the layout has none."""
    return {
        "moe-beyond": ["Layer ID", "Batch Number", "Token", "Activated Expert IDs"],
        "scores": ["layer_id", "token_id", "request", *(f"expert_{i}" for i in range(meta.num_experts))],
        "numbered": ["layer", "token", "request_id", *(f"expert_{i}" for i in range(meta.top_k))],
        "choices": ["req_id", "phase", "position", "layer", "rank", "expert"],
        "llama.cpp": [],
        "list": ["request", "phase", "step", "token_idx", "layer", "topk_ids"],
        "counts": ["layer", "expert"],
    }[layout]


def rows_of(layout: str, trace: Trace, token: int, j: int) -> list[list[Any]]:
    """The rows of one token and layer."""
    meta, ids = trace.meta, trace.experts[token, j].tolist()
    number, position, phase = (int(column[token]) for column in (trace.request, trace.position, trace.phase))
    request = meta.request_names[number] if meta.request_names else number
    layer = meta.layer_ids[j]
    scores = ["0.0000"] * meta.num_experts
    for rank, expert in enumerate(ids):
        scores[expert] = f"{1 / (rank + 3):.4f}"
    rows = {
        "moe-beyond": [[layer, request, TOKENS[token % len(TOKENS)], ids]],
        "scores": [[layer, position, request, *scores]],
        "numbered": [[layer, position, request, *ids]],
        "choices": [[request, phase, position, layer, rank, expert] for rank, expert in enumerate(ids)],
        "llama.cpp": [[position % 100 - 3, layer, *ids]],
        "list": [[request, ["prefill", "D"][phase], 2**40 + token, position, layer, " ".join(map(str, ids))]],
        "counts": [[layer, expert] for expert in ids],
    }
    return rows[layout]


def text_of(layout: str, trace: Trace, by_layer: bool = False, **style: Any) -> bytes:
    """A trace in one of the layouts, token by token or layer by layer, in any style of the standard CSV writer."""
    text = io.StringIO()
    writer = csv.writer(text, **style)
    if header := header_of(layout, trace.meta):
        writer.writerow(header)
    cells = [(i, j) for i in range(trace.num_tokens) for j in range(trace.meta.num_layers)]
    for i, j in sorted(cells, key=lambda cell: cell[::-1]) if by_layer else cells:
        writer.writerows(rows_of(layout, trace, i, j))
    return text.getvalue().encode()


def outcome(path: Path, options: ReaderOptions) -> Any:
    """Everything that reading gives: the columns of all rows, the tokens and the meta; or the error."""
    try:
        stream = open_csv(open_input(path), options)
        if isinstance(stream, Counts):
            return stream.digest(), stream.meta
        assert isinstance(stream, CsvStream)
        blocks = [block.digest() for block in stream.blocks()]
        parsed = [{name: (c.dtype, c.tolist()) for name, c in columns.items()} for columns in stream._parsed()]
        return blocks, stream.meta, parsed
    except TraceError as exc:
        return str(exc)


def row_by_row(patch: pytest.MonkeyPatch) -> None:
    """Read no block at once."""

    def unclear(*_: Any) -> None:
        raise Unclear

    patch.setattr(_csv_walk, "clear_rows", unclear)


STYLES = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from(",,;\t"),
        "lineterminator": st.sampled_from(["\n", "\n", "\r\n"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    }
)
DAMAGE = st.sampled_from([b"9", b"-", b".5", b'"', b"\n", b",", b" ", b"x", b"\r", b"[", b"\xff", b"1e9", b""])


@settings(max_examples=300)
@given(trace=traces(), layout=st.sampled_from(LAYOUTS), by_layer=st.booleans(), style=STYLES, data=st.data())
def test_blocks_and_single_rows_agree(
    trace: Trace, layout: str, by_layer: bool, style: dict[str, Any], data: st.DataObject
) -> None:
    """Whatever bytes of a file are changed, blocks of any length and single rows give the same columns or error."""
    text = bytearray(text_of(layout, trace, by_layer, **style))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(DAMAGE)
    options = ReaderOptions(
        skip_bad=data.draw(st.sampled_from([0, 1, 50])), block_bytes=data.draw(st.sampled_from([1, 40, 1 << 20]))
    )
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "t.csv"
        path.write_bytes(text)
        patch.setattr(_csv_walk, "CHUNK_BYTES", data.draw(st.sampled_from([80, 1 << 18])))
        patch.setattr(_csv_walk, "UNCLEAR_BYTES", data.draw(st.sampled_from([20, 1 << 15])))
        blocks = outcome(path, options)
        row_by_row(patch)
        assert outcome(path, options) == blocks


@settings(max_examples=100)
@given(trace=traces(), layout=st.sampled_from(LAYOUTS), by_layer=st.booleans(), style=STYLES)
def test_good_files_are_read_in_blocks(trace: Trace, layout: str, by_layer: bool, style: dict[str, Any]) -> None:
    """No row of a good file that the standard CSV writer has written is read by the slow row parser."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "t.csv"
        path.write_bytes(text_of(layout, trace, by_layer, **style))
        expected = outcome(path, ReaderOptions())
        patch.setattr(RowParser, "parse", None)
        if not isinstance(expected, str):
            assert outcome(path, ReaderOptions()) == expected


BEYOND = "Layer ID,Batch Number,Token,Activated Expert IDs\n" + '1,0,How,"[5, 2]"\n' * 3
SCORES = "layer,token,expert_0,expert_1,expert_2\n0,0,0.5,0.1,0\n"
LISTS = "layer,token,experts\n0,0,0 1\n"
CHOICES = "request,token,layer,expert\n" + "".join(f"{r},0,0,{e}\n" for r in "ab" for e in (1, 2))
HAZARDS = {
    "a quote inside a cell": BEYOND + '1,0,x"a,b","[1, 2]"\n',
    "text behind a quoted cell": BEYOND + '1,0,"a,b"c,"[1, 2]"\n',
    "quotes that pair up across cells": BEYOND + '1,0,a",b","[1, 2]"\n',
    "a quoted cell that never ends": BEYOND + '1,0,"a,[1, 2]\n',
    "a carriage return inside a cell": BEYOND + '1,0,a\rb,"[1, 2]"\n',
    "a byte that is not UTF-8": BEYOND.encode() + b'1,0,\xff,"[1, 2]"\n',
    "a cell longer than csv allows": BEYOND + f'1,0,{"x" * 140_000},"[1, 2]"\n',
    "a cell with line ends": BEYOND + '1,0,"a\nb\n","[1, 2]"\n1,0,c,"[1, 1]"\n',
    "an empty score": SCORES + "0,1,0.5,,0.1\n",
    "a score without digits": SCORES + "0,1,0.5,.,0.1\n",
    "a score with two points": SCORES + "0,1,0.5,0.0.0,0.1\n",
    "a score that is a JSON word": SCORES + "0,1,0.5,true,0\n",
    "a score that is text": SCORES + '0,1,0.5,"""0.1""",0\n',
    "two scores in a cell": SCORES + '0,1,"0.5,0.1",0,0\n',
    "a score beyond all numbers": SCORES + "0,1,0.5,1e999,0\n",
    "a whole score beyond all numbers": SCORES + f"0,1,0.5,{'9' * 400},0\n",
    "a score below 0": SCORES + "0,1,0.5,-0.1,0\n",
    "a score rounded to 0": SCORES + "0,1,0.5,0e0,0\n",
    "a very long score": SCORES + f"0,1,0.5,0.{'1' * 32_768},0.2\n",
    "equal scores": SCORES + "0,1,0.25,0.25,0\n0,2,0,0.25,0.25\n",
    "many equal scores": "layer,token," + ",".join(f"e{i}" for i in range(40)) + "\n" + "0,7" + ",0.5,0.2" * 20 + "\n",
    "an id beyond the largest": LISTS + "0,1,2 40000\n",
    "an id beyond all integers": LISTS + f"0,1,2 {2**64 + 3}\n",
    "a line end in place of a delimiter": LISTS + "0\n1,2 3\n",
    "a delimiter too few and one too many": LISTS + "0,1\n2 3,0,2,4 5\n",
    "ids of two rows in one": LISTS + "0,1,1 2 3\n0,2,4\n",
    "a negative layer": LISTS + "-1,1,2 3\n",
    "a blank line": LISTS + "\n0,1,2 3\n",
    "a line of space": LISTS + " \n0,1,2 3\n",
    "no line end at the end": LISTS + "0,1,2 3",
    "more or fewer choices": CHOICES + "c,0,0,1\nd,0,0,1\nd,0,0,2\nd,0,0,3\n",
    "a request of bad rows alone": CHOICES + "ghost,0,0,1\nc,0,0,1\nc,0,0,2\n",
    "a choice made twice": CHOICES + "c,0,0,1\nc,0,0,1\nc,0,0,2\n",
    "a bad choice among good ones": CHOICES + "c,0,0,1\nc,0,0,x\nc,0,0,2\nd,0,0,1\nd,0,0,2\n",
    "a number among names": CHOICES + "7,0,0,1\n7,0,0,2\n",
    "a name among numbers": CHOICES.replace("a,", "1,").replace("b,", "2,") + "c,0,0,1\nc,0,0,2\n",
    "names with space around": CHOICES + " c,0,0,1\nc ,0,0,2\n",
    "prompts one after another": "".join(f"{p},0,{p + 9},{p + 10}\n" for p in (-2, -1, 0, 1)) * 4,
}


@pytest.mark.parametrize("name", HAZARDS)
@pytest.mark.parametrize("skip_bad", [0, 9])
def test_what_could_mislead_a_reader_of_blocks(tmp_path: Path, name: str, skip_bad: int) -> None:
    """Whatever is odd in a file, and wherever blocks end, the columns or the error are those of the row parser."""
    text = HAZARDS[name]
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    options = ReaderOptions(skip_bad=skip_bad)
    with pytest.MonkeyPatch.context() as patch:
        row_by_row(patch)
        expected = outcome(path, options)
    for chunk in (1 << 18, 8, 16, 24, 40, 60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_csv_walk, "CHUNK_BYTES", chunk)
            patch.setattr(_csv_walk, "UNCLEAR_BYTES", 1)
            assert outcome(path, options) == expected, chunk


PLAIN = b"layer,token,experts\n0,0,0 1\n0,1,2 3\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace(b"2 3", b"+2 3"),
        PLAIN.replace(b"2 3", b"0_2 3"),
        PLAIN.replace(b"2 3", "2\xa03".encode()),
        PLAIN.replace(b"2 3", "٢ 3".encode()),
        PLAIN.replace(b"0,1,", b"0,\t1 ,"),
        PLAIN.replace(b"0,1,", b"0,+1,"),
        PLAIN + b"\n\n",
        b"layer,token,expert_0,expert_1,expert_2\n0,0,0.5,0.1,0.\n0,1,.2,+0.1,0\n",
        b"layer,token,expert_0,expert_1,expert_2\n0,0,0.5,1e-3,0\n0,1,2e-1, 0.1,-0.0\n",
    ],
)
def test_rare_spellings_are_read(tmp_path: Path, text: bytes) -> None:
    """What only the row parser understands is still read, as it was before there were blocks."""
    path = tmp_path / "t.csv"
    path.write_bytes(text)
    trace = read_tokens(path)
    assert trace.experts.shape == (2, 1, 2)
    assert trace.experts[1, 0].tolist() == ([2, 3] if b"expert_0" not in text else [0, 1])


def test_a_bad_row_in_a_long_file(tmp_path: Path) -> None:
    """One bad row far into a file is named by line and column, and costs only itself when it may be skipped."""
    rows = [f'{i},{i % 7},"[{i % 64}, {(i + 1) % 64}]"' for i in range(60_000)]
    rows[50_000] = '50000,0,"[3, 3]"'
    path = tmp_path / "t.csv"
    path.write_text("token,request,experts,layer\n" + "".join(f"{row},0\n" for row in rows))
    error = error_of(path)
    assert (error.where.line, error.where.column) == (50_002, 14)
    assert error.what == "expert 3 stands twice in the top-k [3, 3]"
    trace = read_tokens(path, skip_bad=1)
    expected = np.delete(np.arange(60_000), 50_000)
    assert np.array_equal(trace.position, expected)
    assert np.array_equal(trace.experts[:, 0, 0], expected % 64)


def test_a_long_file_of_single_choices(tmp_path: Path) -> None:
    """A top-k of single choices that is cut by the end of a block is joined all the same."""
    lines = [
        f"{token},{layer},{(token + layer + i) % 50}\n" for token in range(9_000) for layer in (1, 4) for i in range(3)
    ]
    path = tmp_path / "t.csv"
    path.write_text("token,layer,expert\n" + "".join(lines))
    assert path.stat().st_size > _csv_walk.CHUNK_BYTES
    trace = streamed(path)
    token = np.arange(9_000)[:, None, None]
    expected = (token + np.array([1, 4])[:, None] + np.arange(3)) % 50
    assert np.array_equal(trace.experts, expected)


def test_a_cut_off_gzip_names_the_line(tmp_path: Path) -> None:
    """A truncated gzip is an error with the line it stops in, never a shorter trace, whatever may be skipped."""
    rng = np.random.default_rng(0)
    rows = "".join(f"{token},0,{a},{a + 1}\n" for token, a in enumerate(rng.integers(0, 250, 60_000).tolist()))
    data = gzip.compress(b"token,layer,expert_0,expert_1\n" + rows.encode(), 1)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(data[: len(data) * 3 // 4])
    for skip_bad in (0, 100):
        error = error_of(path, skip_bad=skip_bad)
        assert error.what == "gzip data ends early"
        assert 20_000 < error.where.line < 60_000


def test_rows_of_a_file_that_is_read_twice(tmp_path: Path) -> None:
    """A row that the first walk refused stays refused in the next, where the largest id is known."""
    path = tmp_path / "t.csv"
    path.write_text("token,layer,expert\n0,58,1\n0,58,2\n0,34,0\n0,34,3\n0,34,1\n")
    for cache_bytes in (0, 1 << 20):
        stream = open_csv(open_input(path), ReaderOptions(skip_bad=1, cache_bytes=cache_bytes))
        assert isinstance(stream, CsvStream)
        (block,) = stream.blocks()
        assert block.experts.tolist() == [[[1, 2]]]
        assert stream.meta.layer_ids == (58,)
        assert "1 bad row skipped" in " ".join(stream.meta.assumptions)


def test_a_stream_that_is_dropped_is_freed_at_once(tmp_path: Path) -> None:
    """The blocks of a stream that nobody holds go with it, without waiting for the garbage collector."""
    path = tmp_path / "t.csv"
    path.write_bytes(PLAIN)
    stream = open_csv(open_input(path), ReaderOptions())
    assert isinstance(stream, CsvStream)
    assert len(list(stream.blocks())) == 1
    left = weakref.ref(stream)
    gc.disable()
    try:
        del stream
        assert left() is None
    finally:
        gc.enable()
