"""Routed experts in responses of SGLang and vLLM: both encodings, phases, dense layers, and bad responses by line."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import FakeModel, assert_same, error_of, read_tokens, streamed

from moeplace.files import open_input
from moeplace.readers import ReaderOptions
from moeplace.readers.routed_experts import RoutedStream, sniff
from moeplace.trace import concatenate

# four tokens of three layers, the first of them dense
IDS = np.array([[[0, 0], [3, 1], [4, 0]], [[0, 0], [0, 2], [1, 3]], [[0, 0], [2, 4], [0, 1]], [[0, 0], [1, 4], [2, 3]]])
MODEL = FakeModel(num_experts=8, top_k=2, moe_layer_ids=(1, 2))


def raw(ids: Any) -> str:
    """Encode as SGLang does: base64 of raw int32."""
    return base64.b64encode(np.asarray(ids, "<i4").tobytes()).decode()


def npy(ids: Any, dtype: Any = np.uint8) -> str:
    """Encode as vLLM does: base64 of an .npy."""
    target = io.BytesIO()
    np.save(target, np.asarray(ids, dtype))
    return base64.b64encode(target.getvalue()).decode()


def generated(ids: Any = IDS, **meta: Any) -> dict[str, Any]:
    """A response of SGLang's /generate."""
    counts = {"id": "a", "prompt_tokens": 2, "completion_tokens": 3, "routed_experts": raw(ids)}
    return {"text": "x", "output_ids": [1, 2, 3], "meta_info": counts | meta}


def completion(*ids: Any, **fields: Any) -> dict[str, Any]:
    """A response of vLLM's completions, one choice for each of ``ids``."""
    choices = [{"index": i, "text": "x", "routed_experts": npy(one)} for i, one in enumerate(ids or [IDS])]
    return {"id": "b", "choices": choices, "usage": {"prompt_tokens": 2, "completion_tokens": 3}} | fields


@pytest.fixture
def save(tmp_path: Path):
    """Write responses as JSON Lines, or one value as it is, and return the path."""

    def write(*values: Any, indent: int | None = None) -> Path:
        path = tmp_path / "responses"
        path.write_text("".join(json.dumps(value, indent=indent) + "\n" for value in values))
        return path

    return write


@pytest.mark.parametrize(
    "response",
    [
        generated(),
        {"id": "a", "choices": [{"text": "x"}], "usage": completion()["usage"], "sglext": {"routed_experts": raw(IDS)}},
        completion(),
        completion(id="a", choices=[{"routed_experts": IDS.tolist()}]),
        {"custom_id": "a", "response": {"status_code": 200, "body": completion()}},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_every_form_reads_the_same(save, response: Any, indent: int | None) -> None:
    """Whatever engine and route: tokens, phases by the prompt's length, MoE layers of the model."""
    path = save(response, indent=indent)
    trace = streamed(path, model=MODEL)
    assert trace.experts.tolist() == IDS[:, 1:].tolist()
    assert trace.position.tolist() == [0, 1, 2, 3]
    assert trace.phase.tolist() == [0, 0, 1, 1]
    assert trace.meta.layer_ids == (1, 2)
    assert trace.meta.assumptions == ()


def test_dense_layers_without_a_model(save) -> None:
    """Without a model, layers that are 0 for every token of every response are dense; the sentence names them."""
    top_1 = IDS[:, :, :1].copy()
    top_1[:, 1] = 0
    other = top_1.copy()
    other[0, 1] = 3
    trace = streamed(save(completion(top_1), completion(other)))
    assert trace.meta.layer_ids == (1, 2)
    assert trace.experts.tolist() == [*top_1[:, 1:].tolist(), *other[:, 1:].tolist()]
    said = " ".join(trace.meta.assumptions)
    assert "layers 0 are 0 for every token: taken as dense layers and left out" in said
    assert "num_experts not given: 5" in said
    assert trace.meta.num_experts == 5
    assert read_tokens(save(completion(IDS[:, 1:]))).meta.layer_ids == (0, 1)


def test_requests_and_choices(save) -> None:
    """Each choice is a request; names are the responses' ids, made unique; a list of responses is many."""
    listed = [generated(), generated(id="c")]
    trace = streamed(save(completion(IDS, IDS), listed, generated(id=None), completion(), completion()), model=MODEL)
    assert trace.meta.request_names == ("b#0", "b#1", "a", "c", "4", "b", "b (2)")
    assert np.bincount(trace.request).tolist() == [4] * 7


def test_positions_and_phases(save) -> None:
    """A response without the first prompt tokens starts later; without token counts all tokens are decode, said so."""
    trace = read_tokens(save(generated(IDS[2:])), model=MODEL)
    assert trace.position.tolist() == [2, 3]
    assert trace.phase.tolist() == [1, 1]
    trace = read_tokens(save(generated(prompt_tokens=None)), model=MODEL)
    assert trace.phase.tolist() == [1] * 4
    assert "phase not given" in " ".join(trace.meta.assumptions)


def test_arrays_of_moe_layers_only(save) -> None:
    """As many layers as the model has MoE layers are those layers; any other number is refused."""
    trace = read_tokens(save(completion(IDS[:, 1:])), model=FakeModel(moe_layer_ids=(5, 9)))
    assert trace.meta.layer_ids == (5, 9)
    assert "3 layers, but the MoE layers of model toy" in str(
        error_of(save(completion()), model=FakeModel(moe_layer_ids=(5, 9)))
    )


@pytest.mark.parametrize(
    ("response", "where", "what"),
    [
        ({"id": "x", "choices": [{"text": "y"}]}, ":2", "no routed_experts"),
        (completion(choices=[{"routed_experts": None}]), ":2", "no routed_experts"),
        ([1], ":2", "a JSON int in place of a response"),
        (completion(choices=[{"routed_experts": "#"}]), ":2: routed_experts", "not base64"),
        (completion(choices=[{"routed_experts": npy(IDS)[:-8]}]), ":2: routed_experts", "not a whole npy"),
        (completion(choices=[{"routed_experts": npy(IDS, float)}]), ":2: routed_experts", "float64 of shape [4, 3, 2]"),
        (completion(choices=[{"routed_experts": [[1], [2, 3]]}]), ":2: routed_experts", "object of shape [0]"),
        (completion(IDS[:, :, 0]), ":2: routed_experts", "uint8 of shape [4, 3]"),
        (generated(IDS[:, :2]), ":2: routed_experts", "64 bytes, which 3 layers of top-2 do not divide"),
        (completion(IDS[:, :2]), ":2: routed_experts", "2 layers of top-2, others have 3 of top-2"),
        (generated(completion_tokens=1), ":2: routed_experts", "4 tokens, but prompt_tokens + completion_tokens = 3"),
        (generated(IDS + np.array([[0, 0], [0, 0], [9, 0]])), ":2: routed_experts[0, 2]", "expert 13"),
        (generated(IDS - np.array([[0, 0], [0, 0], [9, 0]])), ":2: routed_experts[0, 2]", "expert -5"),
        (generated(IDS * [[1, 1], [0, 0], [1, 1]]), ":2: routed_experts[0, 1]", "expert 0 stands twice"),
    ],
)
def test_every_bad_response_is_named(save, response: Any, where: str, what: str) -> None:
    """A response that breaks the format is an error with its line and, for ids, its token and layer."""
    path = save(generated(), response)
    text = str(error_of(path, model=MODEL))
    assert f"{path}{where}: {what}" in text
    assert read_tokens(path, model=MODEL, skip_bad=4).num_tokens == 4


def test_lines_that_are_not_json(save) -> None:
    """A broken line is named and can be skipped; a broken document is named by its line and column."""
    path = save(generated(), generated())
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[1][:50]}\n\n{lines[1]}\n")
    assert str(error_of(path, model=MODEL)).startswith(f"{path}:2:")
    assert read_tokens(path, model=MODEL, skip_bad=1).num_requests == 2
    path.write_text('{"meta_info":\n {"routed_experts": }')
    assert str(error_of(path, model=MODEL)).startswith(f"{path}:2:")


def test_python_objects_are_refused(save) -> None:
    """An .npy of Python objects is not loaded: it could run code."""
    target = io.BytesIO()
    np.save(target, np.array([{1}], object), allow_pickle=True)
    path = save(completion(choices=[{"routed_experts": base64.b64encode(target.getvalue()).decode()}]))
    assert "not a whole npy" in str(error_of(path))


def test_sglang_needs_a_model(save) -> None:
    """SGLang sends no shape: without a model the error asks for one."""
    error = error_of(save(generated()))
    assert error.what == "96 bytes of unknown shape"
    assert "--model" in (error.hint or "")


@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    num_experts=st.sampled_from([2, 256, 1000]),
    block_bytes=st.sampled_from([1, 1 << 20]),
    cache_bytes=st.sampled_from([0, 1 << 20]),
)
def test_both_engines_tell_the_same(
    seed: int, lengths: list[int], num_experts: int, block_bytes: int, cache_bytes: int
) -> None:
    """The same routing in either encoding, in any block and cache size, is the same trace."""
    rng = np.random.default_rng(seed)
    model = FakeModel(num_experts=num_experts, top_k=2, moe_layer_ids=(1, 3))
    rows = [np.array([[rng.permutation(num_experts)[:2] for _ in range(4)] for _ in range(n)]) for n in lengths]
    for ids in rows:
        ids[:, [0, 2]] = 0
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for encode in (raw, lambda ids: npy(ids, np.uint16)):
            path = Path(folder) / "r.jsonl"
            path.write_text("\n".join(json.dumps({"id": "r", "routed_experts": encode(ids)}) for ids in rows))
            options = ReaderOptions(model=model, block_bytes=block_bytes, cache_bytes=cache_bytes)
            stream = RoutedStream(open_input(path), options)
            found += [concatenate(list(stream.blocks()), stream.meta) for _ in range(2)]
    for trace in found:
        assert np.array_equal(trace.experts, np.concatenate(rows)[:, [1, 3]])
        assert_same(trace, found[0])


def test_other_json_is_not_taken_for_responses() -> None:
    """Only JSON with routed_experts is; with an engine's fields it wins over everything else."""
    assert sniff(json.dumps(generated()).encode(), "x") == 96
    assert sniff(json.dumps([completion()]).encode(), "x") == 96
    assert sniff(b'{"routed_experts": 1}', "x") == 60
    assert sniff(b'{"topk_ids": [1]}', "x") == sniff(b'routed_experts "routed_experts"', "x") == 0
