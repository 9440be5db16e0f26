"""Per-request JSON: files, folders and archives of requests are one trace, and a bad file is named by its place."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import FakeModel, assert_same, error_of, give_stdin, read_tokens, real, streamed

from moeplace.errors import InputError, Location, TraceError
from moeplace.files import InputFolder, open_input, zstd_module
from moeplace.readers import ReaderOptions, list_formats, open_trace, read_trace
from moeplace.readers.steps_json import open as open_steps
from moeplace.readers.steps_json import open_folder, sniff
from moeplace.trace import Trace, concatenate

PROMPT = {"0": None, "1": [[3, 1], [0, 2]], "2": [[4, 0], [1, 3]]}
DECODE = {"0": None, "1": [[2, 4]], "2": [[0, 1]]}
REQUEST = [PROMPT, DECODE, DECODE]


def changed(step: int, **layers: Any) -> list[dict[str, Any]]:
    """The small request with layers of one step changed; ``no_1`` removes layer 1."""
    steps = [dict(item) for item in REQUEST]
    for name, value in layers.items():
        if name.startswith("no_"):
            del steps[step][name[3:]]
        else:
            steps[step][name.removeprefix("l")] = value
    return steps


def tar_of(files: dict[str, bytes], mode: str = "w:") -> bytes:
    """A tar archive of files in the order given."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return target.getvalue()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three requests of two subjects, and a file that is none."""
    folder = tmp_path / "bench"
    for name, steps in {"law/10.json": REQUEST, "law/9.json": [DECODE], "art/1.json": REQUEST[:2]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(steps, indent=4))
    (folder / "README.md").write_text("notes")
    (folder / ".hidden.json").write_text("no")
    return folder


def test_a_tiny_request_by_hand(tmp_path: Path) -> None:
    """Step 0 is the prompt, each later step one decode token; null layers are dense; layers keep their numbers."""
    (tmp_path / "7.json").write_text(json.dumps(REQUEST))
    trace = streamed(tmp_path / "7.json")
    assert trace.experts.tolist() == [[[3, 1], [4, 0]], [[0, 2], [1, 3]], [[2, 4], [0, 1]], [[2, 4], [0, 1]]]
    assert trace.phase.tolist() == [0, 0, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 3]
    assert trace.request.tolist() == [0] * 4
    assert (trace.meta.layer_ids, trace.meta.num_experts, trace.meta.top_k) == ((1, 2), 5, 2)
    assert (trace.meta.request_names, trace.meta.domains) == (("7.json",), (tmp_path.name,))
    assert "num_experts not given: 5" in " ".join(trace.meta.assumptions)
    model = FakeModel(num_experts=8, moe_layer_ids=(1, 2))
    assert read_tokens(tmp_path / "7.json", model=model).meta.assumptions == ()


def test_a_folder_is_one_trace(corpus: Path) -> None:
    """Requests are numbered by sorted relative path, their domain is their folder, other files are named."""
    trace = streamed(corpus)
    assert trace.meta.request_names == ("art/1.json", "law/10.json", "law/9.json")
    assert trace.request.tolist() == [0] * 3 + [1] * 4 + [2]
    assert trace.meta.domains == ("art", "law")
    assert trace.domain is not None
    assert trace.domain.tolist() == [0] * 3 + [1] * 5
    assert "1 files that are not JSON left out: README.md" in trace.meta.assumptions
    law = read_tokens(corpus / "law")
    assert (law.meta.request_names, law.meta.domains) == (("10.json", "9.json"), ("law",))


@pytest.mark.parametrize("packed", ["", "gz", "zst"])
def test_an_archive_is_its_folder(corpus: Path, tmp_path: Path, packed: str) -> None:
    """A tar archive, plain or compressed, in sorted order, gives the same trace as the folder."""
    folder = InputFolder(corpus)
    data = tar_of({name: (corpus / name).read_bytes() for name in folder.files})
    pack = {"": bytes, "gz": gzip.compress, "zst": zstd_module().compress}[packed]
    (tmp_path / "bench.tar").write_bytes(pack(data))
    assert_same(streamed(tmp_path / "bench.tar"), read_tokens(corpus))


def test_an_archive_in_another_order_numbers_the_same(corpus: Path, tmp_path: Path) -> None:
    """Requests keep the numbers of their sorted paths whatever the order of the archive; out of a pipe they cannot."""
    names = [name for name in reversed(InputFolder(corpus).files) if name.endswith(".json")]
    data = tar_of({name: gzip.compress((corpus / name).read_bytes()) for name in names})
    (tmp_path / "x.tar").write_bytes(data)
    trace = read_tokens(tmp_path / "x.tar")
    assert trace.request.tolist() == [2] + [1] * 4 + [0] * 3
    assert_same(trace.take(np.argsort(trace.request, kind="stable")), read_tokens(corpus))


def test_an_archive_out_of_a_pipe(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input can be walked twice once it is read, with requests numbered as they come."""
    files = {name: (corpus / name).read_bytes() for name in InputFolder(corpus).files}
    give_stdin(monkeypatch, gzip.compress(tar_of(files)))
    stream = open_trace("-")
    first, second = list(stream.blocks()), list(stream.blocks())  # type: ignore[union-attr]
    for blocks in (first, second):
        assert_same(concatenate(blocks, stream.meta), read_tokens(corpus))


@pytest.mark.parametrize("reverse", [False, True])
def test_an_archive_out_of_a_pipe_in_another_order_is_told(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    """Where the order of the archive is not that of the names, other numbers than the file's are told, once."""
    names = sorted((name for name in InputFolder(corpus).files if name.endswith(".json")), reverse=reverse)
    give_stdin(monkeypatch, tar_of({name: (corpus / name).read_bytes() for name in names}))
    stream = open_trace("-")
    for _ in range(2):
        assert len(list(stream.blocks())) == 1  # type: ignore[union-attr]
    said = [sentence for sentence in stream.meta.assumptions if "through a pipe" in sentence]
    assert len(said) == reverse


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[Any, Trace | None]]:
    """Requests of one model as JSON values, with layers in any order, some of them dense."""
    num_experts, top_k = draw(st.sampled_from([(1, 1), (4, 2), (300, 8)]))
    layers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
    dense = draw(st.lists(st.integers(100, 110), max_size=2, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = [draw(st.integers(1, 4)), *draw(st.lists(st.sampled_from([1, 1, 1, 0, 2]), max_size=4))]
        ids = [
            {layer: [rng.permutation(num_experts)[:top_k].tolist() for _ in range(size)] for layer in layers}
            for size in sizes
        ]
        steps = [{str(layer): step.get(layer) for layer in [*dense, *layers]} for step in ids]
        tokens = [[step[layer][i] for layer in sorted(layers)] for step in ids for i in range(len(step[layers[0]]))]
        found.append((steps, (sorted(layers), tokens, sizes)))
    return found


@given(found=requests(), block_bytes=st.sampled_from([1, 20, 1 << 20]), cache_bytes=st.sampled_from([0, 60, 1 << 20]))
def test_what_was_written_is_read(found: Any, block_bytes: int, cache_bytes: int) -> None:
    """Any requests read back token by token, layers by number, however small the blocks and the cache."""
    with tempfile.TemporaryDirectory() as folder:
        for i, (steps, _) in enumerate(found):
            Path(folder, f"{i}.json").write_text(json.dumps(steps))
        options = ReaderOptions(block_bytes=block_bytes, cache_bytes=cache_bytes)
        stream = open_folder(Path(folder), options)
        for _ in range(2):
            trace = concatenate(list(stream.blocks()), stream.meta)
            assert trace.meta.layer_ids == tuple(found[0][1][0])
            for i, (_, (_, tokens, sizes)) in enumerate(found):
                own = trace.take(trace.request == i)
                assert own.experts.tolist() == tokens
                assert own.position.tolist() == list(range(sum(sizes)))
                assert own.phase.tolist() == [0] * sizes[0] + [1] * sum(sizes[1:])


@pytest.mark.parametrize(
    ("steps", "where", "what"),
    [
        (changed(0, l1=[[3, 1], [0]]), "step 0, layer 1, token 1", "1 experts: [0]"),
        (changed(1, l2=[[0, 1, 2]]), "step 1, layer 2, token 0", "3 experts: [0,1,2]"),
        (changed(2, l2=[[0, -1]]), "step 2, layer 2, token 0", "expert -1"),
        (changed(2, l2=[[0, 70000]]), "step 2, layer 2, token 0", "expert 70000"),
        (changed(2, l1=[[0, 1.5]]), "step 2, layer 1, token 0", "expert id 1.5"),
        (changed(2, l1=[[0, True]]), "step 2, layer 1, token 0", "expert id true"),
        (changed(2, l1=[[0, "1"]]), "step 2, layer 1, token 0", 'expert id "1"'),
        (changed(2, l1=[0, 1]), "step 2, layer 1, token 0", "0 in place of a token's experts"),
        (changed(1, l1=None), "step 1, layer 1", "null"),
        (changed(1, no_1=0), "step 1, layer 1", "no such layer"),
        (changed(1, l0=[[1, 2]]), "step 1, layer 0", "experts in a layer that the first step does not have"),
        (changed(1, l9=None), "step 1, layer 9", "the first step has other layers"),
        (changed(1, l1=[[0, 1], [2, 3]]), "step 1, layer 2", "1 tokens, but layer 1 has 2"),
        (changed(1, l1={}), "step 1, layer 1", "a dict in place of the tokens"),
        (changed(2, l2=[[4, 4]]), "step 2, layer 2, token 0", "expert 4 stands twice"),
        (changed(0, l2=[[4, 0], [3, 3]]), "step 0, layer 2, token 1", "expert 3 stands twice"),
        (changed(0, lx=[[1, 2]]), "step 0", "layer 'x'"),
        ([PROMPT, 5], "step 1", "a int in place of a step"),
        ([{"0": None}], None, "every layer is null"),
        ([{"0": []}], None, "no tokens in any step"),
        ([], None, "no steps"),
        ({"a": 1}, None, "a JSON dict in place of the list of steps"),
    ],
)
def test_every_wrong_place_is_named(tmp_path: Path, steps: Any, where: str | None, what: str) -> None:
    """A value that breaks the format is an error with its step, layer and token."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(steps))
    error = error_of(path, format="steps-json")
    assert error.where == Location(file=str(path), element=where)
    assert what in error.what


def test_ids_beyond_the_model_are_named(tmp_path: Path) -> None:
    """An id that the model does not have is named by its step, layer and token; another model's layers are refused."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(REQUEST))
    error = error_of(path, model=FakeModel(num_experts=4, moe_layer_ids=(1, 2)))
    assert str(error).startswith(f"{path}: step 0, layer 2, token 0: expert 4 (rule: ids lie in 0..3: model toy has 4")
    assert "MoE layers of model toy are 5..6" in str(error_of(path, model=FakeModel(moe_layer_ids=(5, 6))))
    assert "top-k of the tokens is 2" in str(error_of(path, model=FakeModel(top_k=3, moe_layer_ids=(1, 2))))


def test_bad_files_of_a_corpus_are_counted_and_named(corpus: Path) -> None:
    """A folder with bad files is refused with their names, or read without them when so many may be skipped."""
    (corpus / "art" / "0.json.gz").write_bytes(b"\x1f\x8b")
    (corpus / "law" / "0.json").write_text('[{"1": [[0, 1]\n')
    (corpus / "law" / "2.json").write_text(json.dumps([{"1": [[0, 1]]}]))
    (corpus / "law" / "3.json.gz").write_bytes(gzip.compress(json.dumps(REQUEST).encode())[:-4])
    (corpus / "law" / "4.json").write_text(json.dumps([{"1": [[0]], "2": [[1]]}]))
    (corpus / "law" / "5.json").write_text("")
    text = str(error_of(corpus))
    for part in (
        "art/0.json.gz: after 0 bytes",
        "law/0.json:2:1: not JSON",
        "law/2.json: 1 layers 1..1, others have 2 layers 1..2",
        "law/3.json.gz: after ",
        "law/4.json: top-1, others have top-2",
    ):
        assert part in text, part
    trace = read_tokens(corpus, skip_bad=6)
    assert trace.num_tokens == 8
    assert "6 bad rows skipped; the first:" in trace.meta.assumptions[-1]
    names = trace.meta.request_names
    assert [names[i] for i in np.unique(trace.request)] == ["art/1.json", "law/10.json", "law/9.json"]
    assert "more bad rows than the 5 that may be skipped" in str(error_of(corpus, skip_bad=5))


def test_a_cut_archive_is_refused(corpus: Path, tmp_path: Path) -> None:
    """An archive that ends inside a member is an error that names it; so is a damaged compressed one."""
    data = tar_of({"a.json": json.dumps(REQUEST).encode(), "b.json": json.dumps(REQUEST * 9).encode()})
    path = tmp_path / "x.tar"
    path.write_bytes(data[:1700])
    assert "is not a whole tar archive" in str(error_of(path))
    path.write_bytes(gzip.compress(data)[:-30])
    with pytest.raises(InputError, match="ends early"):
        read_trace(path)


def test_other_json_is_not_taken_for_steps(tmp_path: Path) -> None:
    """The layout decides, not the name: numbered layers in the first step, pretty-printed or not."""
    for value in (REQUEST, [DECODE], [{"12": []}]):
        for indent in (None, 2):
            assert sniff(json.dumps(value, indent=indent).encode(), "x") == 92
    for other in ([[1, 2]], {"1": [[1]]}, [{"layer": 1}], [], [{"1": 2}], [{"1": [2]}]):
        assert sniff(json.dumps(other).encode(), "0.json") == 0
    assert sniff(tar_of({"a.txt": b"no"}), "a.tar") == 5
    assert "steps-json" in list_formats()
    (tmp_path / "empty").mkdir()
    assert "is a folder of no known format: it holds nothing" in str(error_of(tmp_path / "empty"))
    with pytest.raises(TraceError, match="not jsonl"):
        open_trace(tmp_path / "empty", format="jsonl")
    assert "holds no routed tokens" in str(error_of(tmp_path / "empty", format="steps-json"))


def test_the_real_sample() -> None:
    """Llama-4 as recorded with SGLang: 25 prompt tokens, 128 decode steps, odd layers, top-1."""
    trace = read_tokens(real("format_samples/llama4_sglang_json/0.json"))
    assert trace.experts.shape == (153, 24, 1)
    assert trace.meta.layer_ids == tuple(range(1, 48, 2))
    assert (trace.phase == 0).sum() == 25
    assert trace.experts[:3, 0, 0].tolist() == [106, 89, 76]
    assert trace.experts[25, 0, 0] == 119


def test_a_request_opens_from_a_compressed_file(tmp_path: Path) -> None:
    """A single gzip request reads as the plain one."""
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(REQUEST).encode()))
    stream = open_steps(open_input(tmp_path / "a.json.gz"), ReaderOptions())
    assert sum(block.num_tokens for block in stream.blocks()) == 4
