"""Per-request JSON with router data: generated tokens by position, files or folders, bad places by token and layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import error_of, read_tokens, real, streamed

from moeplace.errors import Location
from moeplace.parts import parted
from moeplace.readers import open_trace
from moeplace.readers.router_json import parse_router_data, sniff


def request(rows: Any, first: int = 146, layers: tuple[int, ...] = (0, 2)) -> dict[str, Any]:
    """A request whose generated tokens choose ``rows`` [token][layer][k]."""
    data = [
        {
            f"token_{first + i}": {
                f"layer_{layer}": {"selected_experts": ids, "selected_probs": [0.5] * len(ids)}
                for layer, ids in zip(layers, token, strict=True)
            }
        }
        for i, token in enumerate(rows)
    ]
    return {"row_index": 7, "category": "law", "original_prompt": "q", "full_text": ["a"], "router_data": data}


ROWS = [[[3, 1], [4, 0]], [[0, 2], [1, 3]], [[2, 4], [0, 1]]]


def test_a_tiny_request_by_hand(tmp_path: Path) -> None:
    """Tokens are decode tokens at the positions of their names, layers keep their numbers."""
    (tmp_path / "x_examples.json").write_text(json.dumps(request(ROWS), indent=2))
    trace = streamed(tmp_path / "x_examples.json")
    assert trace.experts.tolist() == ROWS
    assert trace.position.tolist() == [146, 147, 148]
    assert trace.phase.tolist() == [1, 1, 1]
    assert (trace.meta.layer_ids, trace.meta.num_experts, trace.meta.top_k) == ((0, 2), 5, 2)


def test_a_folder_can_be_read_in_parts(tmp_path: Path) -> None:
    """A folder of requests is one trace, its subfolders are domains, and its files can be read apart."""
    for number, name in enumerate(("law", "art", "law")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{number}.json").write_text(json.dumps(request(ROWS[number:])))
    trace = streamed(tmp_path)
    assert trace.meta.domains == ("art", "law")
    assert trace.request.tolist() == [0, 0, 1, 1, 1, 2]
    assert parted(open_trace(tmp_path)) is not None


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 999))
def test_what_was_written_is_read(tokens: int, layers: int, top_k: int, first: int) -> None:
    """Any tokens come back, whatever the order of the layers in the file."""
    rng = np.random.default_rng(first)
    rows = [[rng.permutation(300)[:top_k].tolist() for _ in range(layers)] for _ in range(tokens)]
    numbers = tuple(rng.permutation(50)[:layers].tolist())
    found = parse_router_data(json.dumps(request(rows, first, numbers)).encode(), "x")
    order = np.argsort(numbers)
    assert found.layer_ids == tuple(sorted(numbers))
    assert found.experts.tolist() == [[row[i] for i in order] for row in rows]
    assert found.first_position == first


def broken(change: Any) -> dict[str, Any]:
    """The small request, changed."""
    document = request(ROWS)
    change(document["router_data"])
    return document


@pytest.mark.parametrize(
    ("document", "element", "what"),
    [
        (
            broken(lambda data: data[1]["token_147"]["layer_2"].update(selected_experts=[1])),
            "token_147, layer_2",
            "1 exp",
        ),
        (
            broken(lambda data: data[2]["token_148"]["layer_0"].update(selected_experts=[1, "2"])),
            "token_148, layer_0",
            '"2"',
        ),
        (
            broken(lambda data: data[2]["token_148"]["layer_0"].pop("selected_experts")),
            "token_148, layer_0",
            "null in place",
        ),
        (broken(lambda data: data[1]["token_147"].pop("layer_0")), "token_147", "layer_0 in one token only"),
        (broken(lambda data: data[1].update(token_9=1)), "router_data[1]", "no token_147"),
        (broken(lambda data: data.pop(1)), "router_data[1]", "no token_147"),
        (broken(lambda data: data.clear()), None, "router_data without tokens"),
        (broken(lambda data: data[0].update({"token_146": {"0": 1}})), "router_data[0]", "does not name a token"),
        (broken(lambda data: data.__setitem__(0, 5)), "router_data[0]", "no dict of one token"),
        ({"full_text": [], "generated_only": []}, None, "no router_data"),
    ],
)
def test_every_wrong_place_is_named(tmp_path: Path, document: Any, element: str | None, what: str) -> None:
    """A value that breaks the format is an error with its token and layer."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document))
    error = error_of(path)
    assert error.where == Location(file=str(path), element=element)
    assert what in error.what


def test_other_json_is_not_taken_for_router_data() -> None:
    """The keys decide: other objects, lists and rows are left to other readers."""
    assert sniff(json.dumps(request(ROWS)).encode(), "x") == 92
    for other in ({"logical_count": [[1]]}, [{"1": [[1]]}], [{"router_data": []}], {"full_text": "x"}):
        assert sniff(json.dumps(other).encode(), "x") == 0


def test_the_real_request_is_that_of_the_published_trace() -> None:
    """The smallest request as published holds the tokens of the request that it was converted to."""
    trace = read_tokens(real("format_samples/gpt_oss_json/smallest_examples.json"))
    assert trace.experts.shape == (30, 24, 4)
    whole = read_tokens(real("gpt_oss_20b_fingerprinting/routing.npz"))
    own = whole.take(whole.request == 565)
    assert np.array_equal(trace.experts, own.experts)
    assert np.array_equal(trace.position, own.position)
