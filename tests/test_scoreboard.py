"""Tables of scores: one line per score, one table per topology and phase, one line per layer."""

from __future__ import annotations

import re

import pytest
from strategies import make_trace, random_placement, slow_topology, small_model

from moeplace.scoreboard import score_tables
from moeplace.scoring import score


def test_scores_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    """A table per topology and phase, placements as columns; the change against the first only where there are two."""
    trace = make_trace(0, tokens=120, requests=10)
    placements = {"one": random_placement(0, [3, 3], 2, 6), "[b]": random_placement(1, [3, 3], 2, 6)}
    model = small_model()
    both = score(trace, placements, slow_topology("scale-up:2"), model, batches=20)
    score_tables(both, model)
    text = capsys.readouterr().out
    assert re.search(r"^scale-up:2, decode: 20 steps of \d+ requests × 1 token, dispatch-combine, toy$", text, re.M)
    assert len(re.findall(r"^figure +one +\[b\]$", text, re.M)) == 2
    assert re.search(r"^mean against first +\+0\.00% ± 0\.00 +[+-][\d.]+% ± [\d.]+$", text, re.M)
    assert re.search(r"^\[b\] on scale-up:2, prefill +[\d.,]+ ± [\d.,]+", text, re.M)
    assert "naive" not in text
    assert "by layer" not in text
    assert "use more --batches" in text
    score_tables(both[:1], model, recorded=True)
    text = capsys.readouterr().out
    assert "20 recorded steps of" in text
    assert "against first" not in text
    assert "--batches" not in text


def test_naive_assumptions_and_layers_are_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """The naive step time, both ratios to it, and a row per layer with the excess over the noise floor."""
    trace = make_trace(0, tokens=120, requests=10)
    placements = {"one": random_placement(0, [3, 3], 2, 6)}
    (entry,) = score(trace, placements, slow_topology("scale-up:2"), small_model(), batches=20, phase="decode")
    score_tables([entry], small_model(), naive=True, layers=True)
    text = capsys.readouterr().out
    assert entry.naive is not None
    assert f"naive step [µs]         {entry.naive.total_us:,.1f}" in re.sub(" {9,}", " " * 9, text)
    p99 = entry.simulation.summary["p99"].value / entry.naive.total_us
    assert re.search(rf"^p99 over naive +{p99:.3f}$", text, re.M)
    first = entry.simulation.layers[0]
    excess = first.max_over_mean - entry.simulation.noise_floor
    assert re.search(rf"^ *0 .* {first.max_over_mean:.4f} +{excess:.4f} ", text, re.M)
    assert not re.search(r"^one on scale-up:2, decode  ", text, re.M)


def test_the_head_tells_how_steps_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    """What of the execution is not as usual stands beside the dataflow."""
    trace = make_trace(0, tokens=120, requests=10)
    placements = {"one": random_placement(0, [4, 4], 2, 6)}
    chosen = {"routing": "lp", "homes": "random"}
    scores = score(trace, placements, slow_topology("scale-up:2"), small_model(), batches=20, phase="decode", **chosen)
    score_tables(scores, small_model())
    assert "dispatch-combine, routing lp, homes random, toy" in capsys.readouterr().out
