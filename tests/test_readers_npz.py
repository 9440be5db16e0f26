"""Npz traces stream out of the archive, and whatever is wrong in it is named by its element."""

from __future__ import annotations

import io
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cases import FakeModel, assert_same, error_of, give_stdin, read_tokens, real, streamed, traces

from moeplace.errors import TraceError
from moeplace.files import open_input
from moeplace.readers import ReaderOptions, open_trace, read_trace
from moeplace.readers.npz import NpzStream
from moeplace.trace import Counts, Trace, concatenate
from moeplace.writers import write_trace

FAST = settings(max_examples=30, deadline=None)
IDS = np.array([[[0, 1], [2, 3], [4, 5]], [[7, 6], [0, 1], [2, 3]]], np.uint8)


@pytest.fixture
def archive(tmp_path: Path):
    """Write arrays to an npz file and return its path."""

    def write(**arrays: Any) -> Path:
        np.savez_compressed(tmp_path / "t.npz", **arrays)
        return tmp_path / "t.npz"

    return write


def read_or_error(path: Path) -> Trace | TraceError:
    """Return the trace, or the error that reading gives."""
    try:
        return read_tokens(path, format="npz")
    except TraceError as error:
        return error


def test_a_tiny_trace_by_hand(archive) -> None:
    """The contract's keys read as they are."""
    path = archive(
        expert_ids=IDS,
        request=[4, 9],
        phase=[0, 1],
        position=[5, 6],
        step=[1, 2],
        rank=[0, 3],
        domain=[1, 0],
        domains=["a", "b"],
        layer_ids=[3, 4, 9],
        num_experts=8,
        model_id="m",
        top_k=2,
    )
    trace = read_tokens(path)
    assert np.array_equal(trace.experts, IDS)
    columns = (trace.request, trace.phase, trace.position, trace.step, trace.rank, trace.domain)
    assert [column.tolist() for column in columns] == [[4, 9], [0, 1], [5, 6], [1, 2], [0, 3], [1, 0]]
    assert (trace.meta.num_experts, trace.meta.layer_ids, trace.meta.model_id) == (8, (3, 4, 9), "m")
    assert trace.meta.domains == ("a", "b")
    assert trace.meta.assumptions == ()


def test_what_is_missing_is_assumed_and_said(archive) -> None:
    """Ids alone are a trace: one request, running numbers, decode, largest id + 1; each in one sentence."""
    trace = read_tokens(archive(expert_ids=IDS))
    assert trace.request.tolist() == [0, 0]
    assert trace.position.tolist() == [0, 1]
    assert trace.phase.tolist() == [1, 1]
    assert (trace.meta.num_experts, trace.meta.layer_ids) == (8, (0, 1, 2))
    said = " ".join(trace.meta.assumptions)
    for part in ("request ids", "positions", "phase", "layer ids", "num_experts not given: 8 = largest id + 1"):
        assert part in said
    trace = read_tokens(
        archive(expert_ids=np.tile(IDS, (2, 1, 1)), request=["x", "y", "x", "x"], token_pos=[3, 4, 5, 6])
    )
    assert trace.request.tolist() == [0, 1, 0, 0]
    assert trace.meta.request_names == ("x", "y")
    assert trace.position.tolist() == [3, 4, 5, 6]
    trace = read_tokens(archive(expert_ids=np.tile(IDS, (2, 1, 1)), request=[5, 6, 5, 5]))
    assert trace.position.tolist() == [0, 0, 1, 2]


@FAST
@given(trace=traces(), block_bytes=st.sampled_from([1, 7, 1 << 20]), cache_bytes=st.sampled_from([0, 50, 1 << 20]))
def test_block_and_cache_sizes_do_not_matter(trace: Trace, block_bytes: int, cache_bytes: int) -> None:
    """However small the blocks and the cache, declared or not, the tokens and every later walk are the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.npz"
        write_trace(trace, path)
        options = ReaderOptions(block_bytes=block_bytes, cache_bytes=cache_bytes)
        stream = NpzStream(open_input(path), options)
        for _ in range(2):
            assert_same(concatenate(list(stream.blocks()), stream.meta), trace)
        np.savez(path, expert_ids=trace.experts)
        stream = NpzStream(open_input(path), options)
        experts = np.concatenate([block.experts for block in stream.blocks()])
        assert np.array_equal(experts, trace.experts)
        assert stream.meta.num_experts == int(trace.experts.max()) + 1


@pytest.mark.parametrize("dtype", ["i1", "i8", "u2", ">u2", ">i4", "u8"])
@pytest.mark.parametrize("fortran", [False, True])
def test_integer_types_and_orders(archive, dtype: str, fortran: bool) -> None:
    """Ids of any integer type, byte order and array order are the same trace."""
    ids = IDS.astype(dtype)
    trace = read_tokens(archive(expert_ids=np.asfortranarray(ids) if fortran else ids, num_experts=np.uint8(8)))
    assert np.array_equal(trace.experts, IDS)
    assert trace.experts.dtype == np.uint8


@pytest.mark.parametrize("fortran", [False, True])
def test_one_layer_without_its_axis(archive, fortran: bool) -> None:
    """Ids of shape [token, k] are one layer."""
    ids = IDS[:, 1]
    trace = read_tokens(archive(expert_ids=np.asfortranarray(ids) if fortran else ids))
    assert np.array_equal(trace.experts, IDS[:, 1:2])


def test_npz_from_stdin_and_compressed(archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive reads from standard input and out of gzip, as often as wanted."""
    import gzip

    path = archive(expert_ids=IDS)
    expected = read_tokens(path)
    (tmp_path / "t.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert_same(streamed(tmp_path / "t.gz"), expected)
    give_stdin(monkeypatch, path.read_bytes())
    stream = open_trace("-")
    assert not isinstance(stream, Counts)
    assert [block.num_tokens for _ in range(2) for block in stream.blocks()] == [2, 2]


def with_id(value: int, dtype: str = "i8") -> np.ndarray:
    """The tiny ids with one of them changed."""
    ids = IDS.astype(dtype)
    ids[1, 2, 0] = value
    return ids


@pytest.mark.parametrize(
    ("ids", "element", "what", "rest"),
    [
        (with_id(8), "expert_ids[1, 2, 0]", "expert 8", "ids lie in 0..7"),
        (with_id(200, "u1"), "expert_ids[1, 2, 0]", "expert 200", "ids lie in 0..7"),
        (with_id(70000), "expert_ids[1, 2, 0]", "expert 70000", "ids lie in 0..7"),
        (with_id(-1), "expert_ids[1, 2, 0]", "expert -1", "leave padding tokens out"),
        (with_id(3), "expert_ids[1, 2, 1]", "expert 3 stands twice in the top-k [3, 3]", "a token differ"),
        (with_id(8)[:, 2], "expert_ids[1, 0]", "expert 8", "ids lie in 0..7"),
    ],
)
def test_bad_ids_are_located(archive, ids: np.ndarray, element: str, what: str, rest: str) -> None:
    """A bad id is named with its element, value, rule and hint; its token can be skipped."""
    path = archive(expert_ids=ids, num_experts=8, position=[10, 11])
    error = error_of(path)
    assert str(error.where) == f"{path}: {element}"
    assert error.what == what
    assert rest in str(error)
    trace = read_tokens(path, skip_bad=1)
    assert trace.position.tolist() == [10]
    assert trace.meta.assumptions[-1].startswith("1 bad row skipped")


def test_skip_bad_counts_over_blocks(archive) -> None:
    """Bad tokens are counted over all blocks, and the first five are shown."""
    ids = np.tile(IDS, (50, 1, 1))
    ids[10::20, 0] = 9
    path = archive(expert_ids=ids, num_experts=8)
    stream = NpzStream(open_input(path), ReaderOptions(block_bytes=60, skip_bad=5))
    assert sum(block.num_tokens for block in stream.blocks()) == 95
    assert stream.meta.assumptions[-1].startswith("5 bad rows skipped; the first: " + f"{path}: expert_ids[10, 0, 0]")
    error = error_of(path)
    assert len(error.others) == 4
    assert "expert_ids[90, 0, 0]" in str(error.where)
    with pytest.raises(TraceError, match="every token is bad"):
        read_trace(archive(expert_ids=ids[10:11], num_experts=8), skip_bad=5)


@pytest.mark.parametrize(
    ("arrays", "element", "message"),
    [
        ({"expert_ids": IDS.astype(float)}, "expert_ids", "float64.*save expert_ids.astype"),
        ({"expert_ids": np.where(IDS == 7, np.nan, IDS)}, "expert_ids[1, 0, 0]", "expert id nan"),
        ({"expert_ids": np.where(IDS == 7, 1.5, IDS)}, "expert_ids[1, 0, 0]", "expert id 1.5"),
        ({"expert_ids": IDS > 3}, "expert_ids", "bool.*integers"),
        ({"expert_ids": IDS.astype(str)}, "expert_ids", "integers"),
        ({"expert_ids": IDS.ravel()}, "expert_ids", r"shape \[12\].*\[token, MoE layer, k\]"),
        ({"expert_ids": IDS[:0]}, "expert_ids", "holds no routed tokens"),
        ({"expert_ids": IDS, "request": [0]}, "request", r"shape \[1\].*one value per token: 2"),
        ({"expert_ids": IDS, "request": [0.0, np.nan]}, "request[1]", "NaN"),
        ({"expert_ids": IDS, "position": [0.0, 1.0]}, "position", "float64.*save position.astype"),
        ({"expert_ids": IDS, "phase": [0, 2]}, "phase[1]", "phase 2.*0 .prefill. or 1 .decode."),
        ({"expert_ids": IDS, "domain": [0, 2], "domains": ["a", "b"]}, "domain[1]", "indexes 2 names"),
        ({"expert_ids": IDS, "layer_ids": [0, 1]}, "expert_ids", "tokens have 3 layers, but 2 layer ids"),
        ({"expert_ids": IDS, "layer_ids": [2, 1, 0]}, "layer_ids", "increasing integers"),
        ({"expert_ids": IDS, "top_k": 4}, "expert_ids", "tokens choose 2 experts per layer, but top_k is 4"),
        ({"expert_ids": IDS, "num_experts": [8, 8]}, "num_experts", "one positive integer"),
        ({"expert_ids": IDS, "model_id": 3}, "model_id", "one string"),
        ({"expert_ids": IDS, "request": np.array([{}, 1], object)}, "request", "holds Python objects"),
        ({"expert_ids": np.array([{}, 1], object)}, "expert_ids", "holds Python objects"),
    ],
)
def test_bad_arrays_are_located(archive, arrays: dict[str, Any], element: str, message: str) -> None:
    """Wrong types, shapes, lengths and values are refused by element, with the rule or what to save instead."""
    path = archive(**arrays)
    error = error_of(path)
    assert str(error.where) == f"{path}: {element}"
    with pytest.raises(TraceError, match=f"(?s){message}"):
        raise error


def test_an_archive_without_ids_names_what_it_has(archive) -> None:
    """Another npz is refused with the keys it holds."""
    assert "the archive holds placement, note" in str(error_of(archive(placement=IDS, note=[1])))


def test_cut_off_archives(archive, tmp_path: Path) -> None:
    """A truncated archive is an error wherever it was cut."""
    whole = archive(expert_ids=IDS).read_bytes()
    path = tmp_path / "cut.npz"
    for size in range(4, len(whole), 7):
        path.write_bytes(whole[:size])
        assert "is not a whole npz archive" in str(error_of(path))


def test_corrupt_archives(archive, tmp_path: Path) -> None:
    """A flipped byte anywhere gives the same trace or an error that names the file, never other tokens or a crash."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((20, 2, 8)), axis=-1)[..., :2].astype(np.uint8)
    path = archive(expert_ids=ids, num_experts=8, request=np.arange(20))
    whole, expected = path.read_bytes(), read_tokens(path)
    bad = tmp_path / "bad.npz"
    for at in range(0, len(whole), 3):
        data = bytearray(whole)
        data[at] ^= 0x55
        bad.write_bytes(data)
        outcome = read_or_error(bad)
        if isinstance(outcome, Trace):
            assert np.array_equal(outcome.experts, expected.experts)
        else:
            assert str(bad) in str(outcome.where)


def test_a_header_that_promises_more_or_less(tmp_path: Path) -> None:
    """An array whose header disagrees with its data is refused."""
    for shape, message in (((9, 3, 2), "the array ends early"), ((1, 3, 2), "longer than its header says")):
        member = io.BytesIO()
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
            archive.writestr("expert_ids.npy", member.getvalue() + IDS.tobytes())
        assert message in str(error_of(tmp_path / "t.npz"))


def test_a_wrong_model_is_named(archive) -> None:
    """File and model must agree on experts, top-k and layers; the error names both."""
    path = archive(expert_ids=IDS, num_experts=32)
    assert "num_experts is 32, but model toy has 8" in str(error_of(path, model=FakeModel()))
    path = archive(expert_ids=IDS)
    assert "model toy has 4 experts per layer" in str(error_of(path, model=FakeModel(num_experts=4)))
    assert "top-k of the tokens is 2, but model toy has 4" in str(error_of(path, model=FakeModel(top_k=4)))
    assert "model toy has 4 MoE layers" in str(error_of(path, model=FakeModel(moe_layer_ids=(0, 1, 2, 3))))
    assert read_tokens(path, model=FakeModel(moe_layer_ids=(3, 4, 5))).meta.layer_ids == (3, 4, 5)


def test_memory_does_not_grow_with_the_trace(archive) -> None:
    """Walking an archive takes a few blocks of memory beside the cache, whatever its length."""
    path = archive(expert_ids=np.tile(IDS, (200_000, 1, 1)), num_experts=8)
    options = ReaderOptions(block_bytes=1 << 16, cache_bytes=0)
    stream = NpzStream(open_input(path), options)
    tracemalloc.start()
    tokens = sum(block.num_tokens for block in stream.blocks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens == 400_000
    assert peak < 2_000_000


def test_gpt_oss_reads_as_it_is() -> None:
    """The recorded gpt-oss-20b trace has its published shape, and its model names what it does not say."""
    model = FakeModel("gpt-oss-20b", 32, 4, tuple(range(24)))
    stream = open_trace(real("gpt_oss_20b_fingerprinting/routing.npz"), model=model)
    assert not isinstance(stream, Counts)
    shapes = [block.experts.shape for block in stream.blocks()]
    assert sum(shape[0] for shape in shapes) == 215_438
    assert {shape[1:] for shape in shapes} == {(24, 4)}
    assert stream.meta.assumptions == ("phase not given: all tokens are taken as decode",)
    with pytest.raises(TraceError, match="top-k of the tokens is 4, but model mixtral-8x7b has 2"):
        open_trace(
            real("gpt_oss_20b_fingerprinting/routing.npz"), model=FakeModel("mixtral-8x7b", 8, 2, tuple(range(32)))
        )


def test_tinymoe_reads_as_it_is() -> None:
    """The trained small model's trace keeps its domains and phases."""
    trace = read_tokens(real("tinymoe_trained_8x32_top4/routing.npz"))
    assert trace.experts.shape == (64_472, 8, 4)
    assert trace.meta.domains[:2] == ("python", "c_headers")
    assert set(trace.phase.tolist()) == {0, 1}
    assert trace.num_requests == 320
