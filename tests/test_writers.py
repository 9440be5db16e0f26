"""What is written is read back equal, and the same content gives the same bytes."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cases import assert_same, read_tokens, streamed, traces

from moeplace.errors import OutputError
from moeplace.readers import open_trace, read_trace
from moeplace.trace import Counts, Trace, TraceMeta
from moeplace.writers import write_trace, write_traces

FAST = settings(max_examples=40, deadline=None)


def small_trace(**changes: object) -> Trace:
    """Two tokens of two layers."""
    meta = TraceMeta(num_experts=8, top_k=2, layer_ids=(3, 4), model_id="toy", assumptions=("phase was guessed",))
    trace = Trace(meta=meta, experts=np.arange(8).reshape(2, 2, 2), request=[7, 7], position=[0, 1], phase=[0, 1])
    return trace.replace(**changes)


def small_counts() -> Counts:
    """Two steps of two layers and three experts."""
    meta = TraceMeta(num_experts=3, top_k=2, layer_ids=(3, 4), domains=("b", "a"))
    return Counts(meta=meta, counts=np.arange(12).reshape(2, 2, 3), domain=[1, 0])


@FAST
@given(trace=traces(), suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".npz"]))
def test_round_trip(trace: Trace, suffix: str) -> None:
    """Every format gives back every field and the digest, read at once or walked twice."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"trace{suffix}"
        write_trace(trace, path)
        again = read_tokens(path)
        assert again.meta == trace.meta
        assert_same(again, trace)
        assert_same(streamed(path), trace)


@FAST
@given(trace=traces(), first=st.sampled_from([".jsonl", ".npz"]), second=st.sampled_from([".jsonl", ".npz"]))
def test_a_stream_writes_the_bytes_of_its_trace(trace: Trace, first: str, second: str) -> None:
    """Converting block by block, twice, gives the bytes of converting from memory."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"trace{first}"
        write_trace(trace, source)
        targets = [Path(folder) / f"{name}{second}" for name in "abc"]
        stream = open_trace(source)
        write_trace(stream, targets[0])
        write_trace(stream, targets[1])
        write_trace(read_trace(source), targets[2])
        assert len({target.read_bytes() for target in targets}) == 1


def test_jsonl_is_the_documented_form(tmp_path: Path) -> None:
    """The lines are those of the contract, in its order."""
    write_trace(small_trace(rank=[0, 3]), tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_text().splitlines() == [
        '{"type":"meta","schema":"moeplace/trace/1","model_id":"toy","num_experts":8,"top_k":2,"moe_layer_ids":[3,4],'
        '"assumptions":["phase was guessed"]}',
        '{"req_id":7,"token_idx":0,"phase":"prefill","rank":0,"topk_ids":[[0,1],[2,3]]}',
        '{"req_id":7,"token_idx":1,"phase":"decode","rank":3,"topk_ids":[[4,5],[6,7]]}',
    ]


def test_npz_loads_with_numpy(tmp_path: Path) -> None:
    """An npz is a plain NumPy archive with the contract's keys and types."""
    write_trace(small_trace(), tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz", allow_pickle=False) as arrays:
        assert arrays["expert_ids"].dtype == np.uint8
        assert arrays["expert_ids"].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
        assert arrays["phase"].tolist() == [0, 1]
        assert arrays["layer_ids"].tolist() == [3, 4]
        assert int(arrays["num_experts"]) == 8
    assert {info.date_time[0] for info in zipfile.ZipFile(tmp_path / "t.npz").infolist()} == {1980}


@pytest.mark.parametrize("suffix", [".json", ".json.zst", ".npz"])
def test_counts_round_trip(tmp_path: Path, suffix: str) -> None:
    """Counts come back with steps, layers, domains and top-k, and rewrite to the same bytes."""
    path, again = tmp_path / f"c{suffix}", tmp_path / f"d{suffix}"
    write_trace(small_counts(), path)
    counts = read_trace(path)
    assert isinstance(counts, Counts)
    assert counts.digest() == small_counts().digest()
    names = [counts.meta.domains[i] for i in counts.domain]
    assert names == ["a", "b"]
    assert counts.meta == small_counts().meta
    write_trace(counts, again)
    assert path.read_bytes() == again.read_bytes()


def test_json_counts_have_a_row_for_every_layer(tmp_path: Path) -> None:
    """Dense layers get rows of zeros, as SGLang numbers them; one step has no axis of its own; huge ids get no rows."""
    counts = small_counts()
    write_trace(counts, tmp_path / "c.json")
    table = np.array(json.loads((tmp_path / "c.json").read_text())["logical_count"])
    assert table.shape == (2, 5, 3)
    assert table[:, 3:].tolist() == counts.counts.tolist()
    assert not table[:, :3].any()
    one = Counts(meta=counts.meta, counts=counts.counts[:1])
    write_trace(one, tmp_path / "one.json")
    assert np.array(json.loads((tmp_path / "one.json").read_text())["logical_count"]).shape == (5, 3)
    for layer_ids in ((3, 10**9), (-1, 3)):
        odd = Counts(meta=counts.meta.replace(layer_ids=layer_ids), counts=counts.counts)
        write_trace(odd, tmp_path / "odd.json")
        assert np.array(json.loads((tmp_path / "odd.json").read_text())["logical_count"]).shape == (2, 2, 3)
        assert read_trace(tmp_path / "odd.json").digest() == odd.digest()


def test_several_files_appear_together(tmp_path: Path) -> None:
    """Parts are written as each alone would be; where one cannot be, none appears."""
    one, other = small_trace(), small_trace(phase=[1, 1])
    write_traces([(one, tmp_path / "a.npz"), (other, tmp_path / "b.jsonl")])
    for trace, name in ((one, "a.npz"), (other, "b.jsonl")):
        write_trace(trace, tmp_path / f"alone-{name}")
        assert (tmp_path / name).read_bytes() == (tmp_path / f"alone-{name}").read_bytes()
    unnamed = small_trace(request=[0, 2], meta=small_trace().meta.replace(request_names=("x", "y")))
    for bad, name in ((unnamed, "d.npz"), (other, "d.txt"), (other, "no/d.npz")):
        with pytest.raises(OutputError):
            write_traces([(one, tmp_path / "c.npz"), (bad, tmp_path / name)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "alone-a.npz", "alone-b.jsonl", "b.jsonl"]


def test_names_that_no_reader_would_guess_are_written(tmp_path: Path) -> None:
    """Names stand in the meta line only when first appearance would number them otherwise."""
    trace = small_trace(request=[1, 0], meta=small_trace().meta.replace(request_names=("x", "y")))
    write_trace(trace, tmp_path / "t.jsonl")
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])["request_names"] == ["x", "y"]
    write_trace(trace.replace(request=[0, 1]), tmp_path / "u.jsonl")
    assert "request_names" not in (tmp_path / "u.jsonl").read_text()
    with pytest.raises(OutputError, match="request 2 has no name"):
        write_trace(trace.replace(request=[0, 2]), tmp_path / "v.jsonl")
    assert not (tmp_path / "v.jsonl").exists()


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        (small_trace(), "t.json", "a trace cannot be written as json"),
        (small_counts(), "c.jsonl", "counts cannot be written as jsonl"),
        (small_trace(), "t.npz.gz", "npz is compressed already"),
        (small_trace(), "t.txt", r"suffix '\.txt' names no format"),
        (small_trace(), "t", "has no suffix"),
    ],
)
def test_formats_that_do_not_fit(tmp_path: Path, value: Trace | Counts, name: str, message: str) -> None:
    """A suffix that does not fit is refused with the ones that do, before a file appears."""
    with pytest.raises(OutputError, match=message):
        write_trace(value, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_explicit_format_wins(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """``format`` overrides the suffix; standard output is JSON Lines unless told otherwise."""
    write_trace(small_trace(), tmp_path / "t.dat", format="npz")
    assert (tmp_path / "t.dat").read_bytes().startswith(b"PK")
    write_trace(small_trace(), "-")
    assert capfdbinary.readouterr().out.startswith(b'{"type":"meta"')
