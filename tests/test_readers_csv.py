"""CSV traces: every known header, tokens put together from their layers, and bad cells by line and column."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from trace_cases import FakeModel, assert_same, error_of, give_stdin, read_tokens, real, streamed, traces

from moeplace.errors import Location
from moeplace.readers import open_trace, read_trace
from moeplace.readers.csv import CsvStream
from moeplace.readers.csv import open as open_csv
from moeplace.trace import Counts, Trace, concatenate

MOE_BEYOND = """Layer ID,Batch Number,Token,Activated Expert IDs
1,0,How,"[5, 2]"
1,0,"a ""quoted"",
token","[0, 1]"
1,1,7,"[1, 3]"
2,0,How,"[4, 0]"
2,0,"a ""quoted"",
token","[3, 5]"
2,1,7,"[2, 4]"
"""
IDS = [[[5, 2], [4, 0]], [[0, 1], [3, 5]], [[1, 3], [2, 4]]]


@pytest.fixture
def save(tmp_path: Path):
    """Write text or bytes and return the path."""

    def write(content: str | bytes, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_moe_beyond(save) -> None:
    """Layers of a token are put together; tokens may hold commas, quotes and line ends; ids keep the router's order."""
    trace = streamed(save(MOE_BEYOND))
    assert trace.experts.tolist() == IDS
    assert trace.meta.layer_ids == (1, 2)
    assert trace.request.tolist() == [0, 0, 1]
    assert trace.position.tolist() == [0, 1, 0]
    assert "token positions not given" in " ".join(trace.meta.assumptions)


def test_compressed_piped_and_with_a_mark(save, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gzip, standard input, a byte order mark and CRLF line ends give the same tokens."""
    expected = read_tokens(save(MOE_BEYOND))
    dos = b"\xef\xbb\xbf" + MOE_BEYOND.replace("\n", "\r\n").encode()
    assert_same(read_tokens(save(gzip.compress(MOE_BEYOND.encode()), "trace.gz")), expected)
    assert_same(read_tokens(save(dos, "dos")), expected)
    give_stdin(monkeypatch, MOE_BEYOND.encode())
    assert_same(read_tokens(Path("-")), expected)


def test_dynande(save) -> None:
    """One score per expert: those above 0 are the chosen ones, highest first; the columns give the experts."""
    header = "layer_id,token_id," + ",".join(f"expert_{i}" for i in range(4))
    rows = ["0,0,0.000000,0.25,0.000000,0.75", "0,1,0.5,0,0.1,0", "1,0,0.1,0,0,0.2", "1,1,0,0.3,0.4,0"]
    trace = streamed(save("\n".join([header, *rows])))
    assert trace.meta.num_experts == 4
    assert trace.experts.tolist() == [[[3, 1], [3, 0]], [[0, 2], [2, 1]]]
    binary = streamed(save(f"{header}\n0,0,1,0,0,1\n0,1,0,1,1,0\n"))
    assert binary.experts.tolist() == [[[0, 3]], [[1, 2]]]


@pytest.mark.parametrize(
    "text",
    [
        "layer,token,experts\n1,0,5 2\n2,0,4 0\n1,1,0 1\n2,1,3 5\n1,2,1 3\n2,2,2 4\n",
        "token_idx;layer_id;topk_ids\n0;1;[5,2]\n0;2;[4,0]\n1;1;[0,1]\n1;2;[3,5]\n2;1;[1,3]\n2;2;[2,4]\n",
        "layer\ttoken\texpert_1\texpert_2\n1\t0\t5\t2\n1\t1\t0\t1\n1\t2\t1\t3\n2\t0\t4\t0\n2\t1\t3\t5\n2\t2\t2\t4\n",
        "layer_id,expert_ids\n1,5 2\n2,4 0\n1,0 1\n2,3 5\n1,1 3\n2,2 4\n",
        "# a comment\n\ntoken,layer,rank,expert\n"
        + "".join(
            f"{token},{layer + 1},{rank},{expert}\n"
            for token, layers in enumerate(IDS)
            for layer, ids in enumerate(layers)
            for rank, expert in enumerate(ids)
        ),
    ],
)
def test_generic_headers(save, text: str) -> None:
    """Lists, numbered columns or a row per choice, separated by commas, semicolons or tabs: the same tokens."""
    trace = streamed(save(text))
    assert trace.experts.tolist() == IDS
    assert trace.meta.layer_ids == (1, 2)
    assert trace.position.tolist() == [0, 1, 2]


def test_requests_phases_and_steps(save) -> None:
    """Named requests, phases and steps have columns of their own."""
    header = "request_id,phase,step,position,layer,experts\n"
    trace = streamed(save(header + "b,prefill,1,0,0,0 1\na,decode,2,5,0,1 2\nb,p,3,1,0,2 3\n"))
    assert trace.meta.request_names == ("b", "a")
    assert trace.request.tolist() == [0, 1, 0]
    assert trace.phase.tolist() == [0, 1, 0]
    assert trace.step is not None
    assert trace.step.tolist() == [1, 2, 3]


def test_llama_cpp_without_a_header(save) -> None:
    """Rows of position, layer and ids: negative positions are the prompt, and files joined end to end are requests."""
    one = "-2,0,1,2\n-1,0,3,4\n-2,1,0,1\n-1,1,2,3\n0,0,5,1\n0,1,4,2\n"
    trace = streamed(save(one + one))
    assert trace.request.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.position.tolist() == [-2, -1, 0] * 2
    assert trace.phase.tolist() == [0, 0, 1] * 2
    assert trace.experts[:3].tolist() == [[[1, 2], [0, 1]], [[3, 4], [2, 3]], [[5, 1], [4, 2]]]


def test_layer_and_expert_alone_are_counts(save) -> None:
    """Rows of one choice that do not name the token can only be counted."""
    for text in ("layer,expert\n3,0\n3,2\n7,1\n3,2\n", "3,0\n3,2\n7,1\n3,2\n"):
        counts = read_trace(save(text), format="csv")
        assert isinstance(counts, Counts)
        assert counts.counts.tolist() == [[[1, 0, 2], [0, 1, 0]]]
        assert counts.meta.layer_ids == (3, 7)
        assert "rows do not say which token chose" in " ".join(counts.meta.assumptions)
    counts = read_trace(save("layer,expert\n1,0\n"), model=FakeModel())
    assert (counts.meta.num_experts, counts.meta.top_k) == (8, 2)


HEAD = "layer,token,experts\n0,0,0 1\n"


@pytest.mark.parametrize(
    ("text", "line", "column", "what"),
    [
        (HEAD + "0,1,2 x\n", 3, 7, "expert id x"),
        (HEAD + "0,1,2 2.5\n", 3, 7, "expert id 2.5"),
        (HEAD + "0,1,2 -1\n", 3, 7, "expert -1"),
        (HEAD + "0,1,2 2\n", 3, 7, "expert 2 stands twice in the top-k [2, 2]"),
        (HEAD + "0,1,1 2 3\n", 3, 5, "3 experts: [1, 2, 3]"),
        (HEAD + "0,1,\n", 3, 5, "no experts"),
        (HEAD + "0,1\n", 3, 1, "2 cells"),
        (HEAD + "x,1,1 2\n", 3, 1, "'x' in place of the layer"),
        (HEAD + "-1,1,1 2\n", 3, 1, "layer -1"),
        (HEAD + "0,1.5,1 2\n", 3, 3, "'1.5' in place of the token's position"),
        (HEAD + '0,1,"1 2\n', 3, None, "not CSV: unexpected end of data"),
        (HEAD.encode() + b"0,\xff,1 2\n", 3, 3, "byte 0xff is not UTF-8"),
        (HEAD + "1,0,2 3\n0,1,1 2\n", 4, 1, "token 1, which starts here, lacks 1 layers: 1"),
        (HEAD + "0,0,2 3\n", 3, 1, "token 0, layer 0: the request has this row already"),
        ("layer,token,expert_0,expert_1\n0,0,1,2\n0,1,3,3\n", 3, 7, "expert 3 stands twice in the top-k [3, 3]"),
        ("layer,token,expert_0,expert_1\n0,0,1,2\n0,1,3,y\n", 3, 7, "'y' in place of an expert id"),
        ("layer,token,expert_0,expert_1,expert_2\n0,0,0.5,0,0\n0,1,0,nan,0\n", 3, 7, "score 'nan' of expert 1"),
        ("layer,token,expert_0,expert_1,expert_2\n0,0,0.5,0,0\n0,1,0,0,0\n", 3, 5, "no expert is chosen"),
        ("layer,token,expert_0,expert_1,expert_2\n0,0,0.5,0.1,0\n0,1,0.2,0,0\n", 3, 5, "1 experts: [0]"),
        ("layer,token,phase,experts\n0,0,decode,1\n0,1,warmup,2\n", 3, 5, "phase 'warmup'"),
        ("layer,token,expert\n0,0,1\n0,0,2\n0,0,1\n", 4, 5, "expert 1 stands twice in the top-k [1, 2, 1]"),
        (MOE_BEYOND.replace("[3, 5]", "[3, 3]"), 8, 13, "expert 3 stands twice in the top-k [3, 3]"),
    ],
)
def test_bad_cells_are_located(save, text: str | bytes, line: int, column: int | None, what: str) -> None:
    """Every bad cell is named by file, line and column, also behind quoted cells of several lines."""
    path = save(text)
    error = error_of(path)
    assert error.what == what
    assert error.where == Location(file=str(path), line=line, column=column)


def test_the_first_bad_rows_are_shown_and_some_may_be_skipped(save) -> None:
    """Bad rows up to the limit are left out and counted; one more is an error that shows them."""
    path = save(HEAD + "0,1,x 1\n0,2,3 4\n0,3,5 5\n")
    error = error_of(path)
    assert len(error.others) == 1
    trace = read_tokens(path, skip_bad=2)
    assert trace.position.tolist() == [0, 2]
    assert "2 bad rows skipped" in " ".join(trace.meta.assumptions)
    assert "more bad rows than the 1" in str(error_of(path, skip_bad=1))


def test_other_files_are_refused(save) -> None:
    """Tables without layers or experts, and headers without rows, are no traces."""
    assert "is of no known format" in str(error_of(save("name,value\na,1\n")))
    assert "no layer or no experts" in str(error_of(save("name,value\na,1\n"), format="csv"))
    assert "holds no routed tokens" in str(error_of(save("layer,token,experts\n")))
    assert "is of no known format" in str(error_of(save("3,0\n3,2\n")))
    assert "holds no choices" in str(error_of(save("layer,expert\n")))


def test_the_model_must_agree(save) -> None:
    """Experts, top-k and layers must be the model's; MoE ordinals become its layers."""
    path = save(MOE_BEYOND)
    assert read_tokens(path, model=FakeModel()).meta.num_experts == 8
    assert read_tokens(path, model=FakeModel(moe_layer_ids=(3, 4, 5))).meta.layer_ids == (4, 5)
    assert "top-k of the tokens is 2, but model toy has 3" in str(error_of(path, model=FakeModel(top_k=3)))
    assert "expert 5" in str(error_of(path, model=FakeModel(num_experts=5)))


def csv_of(trace: Trace) -> str:
    """Write a trace as CSV, layer by layer."""
    rows = ["layer,request,position,phase,experts"]
    for j, layer in enumerate(trace.meta.layer_ids):
        for i in range(trace.num_tokens):
            ids = " ".join(map(str, trace.experts[i, j]))
            rows.append(f"{layer},{trace.request[i]},{trace.position[i]},{trace.phase[i]},{ids}")
    return "\n".join(rows)


@given(trace=traces())
def test_any_trace_reads_back(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Layer by layer in CSV, any trace reads back as it was, also in blocks of one row."""
    from moeplace.files import open_input
    from moeplace.readers import ReaderOptions

    path = tmp_path_factory.mktemp("csv") / "trace.csv"
    path.write_text(csv_of(trace))
    meta = trace.meta
    model = FakeModel("m", meta.num_experts, meta.top_k, meta.layer_ids)
    stream = open_csv(open_input(path), ReaderOptions(model=model, block_bytes=1, cache_bytes=64))
    assert isinstance(stream, CsvStream)
    for _ in range(2):
        read = concatenate(stream.blocks(), stream.meta)
        # numbers only: names do not stand in this file
        plain = dict.fromkeys(("step", "rank", "domain"))
        bare = meta.replace(model_id=None, domains=(), request_names=(), assumptions=())
        expected = trace.replace(meta=bare, **plain)
        assert_same(read, expected)


def test_the_moe_beyond_sample() -> None:
    """The real sample has 33 tokens of DeepSeek-V2-Lite: layers 1..26, top-6 of 64."""
    (path,) = real("format_samples/moebeyond_csv").glob("*.csv")
    trace = streamed(path)
    assert trace.experts.shape == (33, 26, 6)
    assert trace.meta.layer_ids == tuple(range(1, 27))
    assert trace.experts[0, 0].tolist() == [8, 26, 56, 57, 60, 43]


def test_the_dynande_sample() -> None:
    """The real sample has 64 tokens, top-6 of 64, and a file name that disagrees with its layer column."""
    (path,) = real("format_samples/dynande_csv").glob("*.csv")
    trace = streamed(path)
    assert trace.experts.shape == (64, 1, 6)
    assert trace.meta.num_experts == 64
    assert "says layer 2, its rows say layer 0" in " ".join(trace.meta.assumptions)
    assert np.bincount(trace.experts.reshape(-1), minlength=64).sum() == 64 * 6


def test_opening_is_a_stream(save) -> None:
    """Tokens come as a stream that can be walked again."""
    assert isinstance(open_trace(save(MOE_BEYOND)), CsvStream)
