"""``moeplace stats`` as a person sees it, in a pipe and on terminals."""

from __future__ import annotations

import re

import pytest
from shell import Shell, on_terminal
from strategies import make_trace

from moeplace.trace import TraceMeta
from moeplace.writers import write_trace

BLOCKS = "·▁▂▃▄▅▆▇█"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def heat_lines(text: str) -> list[str]:
    """Lines of blocks, without colours."""
    lines = ESCAPES.sub("", text).splitlines()
    return [line for line in lines if re.fullmatch(rf" *\d+  [{BLOCKS}]+", line)]


def test_stats_show_what_is_measured(shell: Shell) -> None:
    """The sections stand in one order; JSON has the same figures under documented keys, and no heat."""
    text = shell("stats t.npz").out
    heads = [line for line in text.splitlines() if re.fullmatch(r"[a-z]+", line)]
    assert heads == ["load", "heat", "affinity", "sample", "patterns", "checks"]
    assert len(heat_lines(text)) == 3
    document = shell("stats t.npz --json").json
    row = document["per_layer"][0]
    assert {"gini", "gpu_balancedness", "mutual_information", "information_bias", "lift", "coactivation_share"} <= set(
        row
    )
    assert row["gpu_balancedness"] == pytest.approx(1 / row["gpu_max_over_mean"], abs=1e-5)
    assert not set(BLOCKS) & set(shell("stats t.npz --json").out)


def test_heat_can_be_left_out(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """--no-heat, or MOEPLACE_HEAT, leaves the lines of blocks out and everything else as it is."""
    full = shell("stats t.npz").out
    without = shell("stats t.npz --no-heat").out
    assert heat_lines(full)
    assert not heat_lines(without)
    assert re.sub(r"\nheat\n.*?\n\n", "\n", full, flags=re.S) == without
    monkeypatch.setenv("MOEPLACE_HEAT", "false")
    assert shell("stats t.npz").out == without
    assert shell("stats t.npz --heat").out == full


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_nothing_is_wider_than_the_terminal(shell: Shell, width: int) -> None:
    """On a terminal of any width lines fit, and every layer has one line of blocks that uses the room."""
    trace = make_trace(0, tokens=400, layers=12, experts=100, top_k=4, requests=40)
    write_trace(trace, shell.folder / "wide.npz")
    shown = ESCAPES.sub("", on_terminal(shell.folder, "stats wide.npz", width))
    lines = heat_lines(shown)
    assert len(lines) == 12
    assert len(lines[0]) == 4 + -(-100 // -(-100 // min(100, width - 4)))
    assert [line for line in shown.splitlines() if len(line) > width] == []


def test_a_pipe_gets_eighty_columns_of_blocks(shell: Shell) -> None:
    """In a pipe heat lines and tables keep to 80 columns, without colours; sentences stay whole."""
    trace = make_trace(0, tokens=400, layers=3, experts=200, top_k=4, requests=40)
    write_trace(trace, shell.folder / "wide.npz")
    text = shell("stats wide.npz").out
    assert "\x1b" not in text
    assert [len(line) for line in heat_lines(text)] == [3 + 67] * 3
    assert "a block for each 3 experts" in text
    tables = text.split("\nsample\n")[0].splitlines()
    assert [line for line in tables if len(line) > 80 and not line.startswith(("with ", "together"))] == []


def test_a_trace_is_checked_against_its_model(shell: Shell) -> None:
    """The model is the one named by --model or by the trace: missing and offset layers are found with either."""
    shape = {"tokens": 300, "experts": 32, "top_k": 4, "requests": 40}
    some = make_trace(0, layers=20, **shape)
    ids = tuple(range(20))
    write_trace(some.replace(meta=some.meta.replace(layer_ids=ids)), shell.folder / "some.npz")
    assert "gpt-oss-20b" not in shell("stats some.npz").out
    assert "20 MoE layers, gpt-oss-20b has 24" in shell("stats some.npz --model gpt-oss-20b").out
    write_trace(some.replace(meta=some.meta.replace(model_id="gpt-oss-20b")), shell.folder / "named.npz")
    assert "20 MoE layers, gpt-oss-20b has 24" in shell("stats named.npz").out
    shifted = make_trace(0, layers=24, **shape)
    meta = TraceMeta(num_experts=32, top_k=4, layer_ids=tuple(range(1, 25)), model_id="gpt-oss-20b")
    write_trace(shifted.replace(meta=meta), shell.folder / "shifted.npz")
    findings = shell("stats shifted.npz --json").json["findings"]
    assert "layer-numbers" in [finding["check"] for finding in findings]
