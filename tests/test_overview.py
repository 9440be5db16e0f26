"""The terminal view of a trace: everything that was measured is there, in words, and what is unknown is left out."""

from __future__ import annotations

import numpy as np
import pytest
from strategies import make_trace

from moeplace.affinity import count_routing
from moeplace.checks import Finding
from moeplace.insight import TraceInsight, measure_trace, patterns
from moeplace.overview import sample_lines, write_overview, write_remarks
from moeplace.profile import profile_trace
from moeplace.summary import TraceSummary, summarise_trace
from moeplace.trace import Counts, Trace, TraceMeta

SHAPE = {"tokens": 60, "layers": 2, "experts": 6, "top_k": 2, "requests": 8}


def seen(source: Trace | Counts) -> tuple[TraceSummary, TraceInsight]:
    """What is measured of a trace."""
    stats = count_routing(source)
    insight = measure_trace(stats, profile_trace(source))
    return summarise_trace(stats, 2, insight), insight


def sections(text: str) -> dict[str, list[str]]:
    """Lines of each section, by its head."""
    parts = text.strip("\n").split("\n\n")
    return {part.splitlines()[0]: part.splitlines()[1:] for part in parts}


def test_every_table_has_a_row_per_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """Load, heat and affinity tell of every layer; the last one has no next layer to be bound to."""
    summary, insight = seen(make_trace(0, **SHAPE))
    write_overview(summary, insight, {"trace": "t"}, count_routing(make_trace(0, **SHAPE)).load)
    parts = sections(capsys.readouterr().out)
    assert list(parts) == ["trace  t", "load", "heat", "affinity", "sample"]
    first = summary.layers[0]
    assert parts["load"][1].split() == [
        "0",
        *[f"{x:.2f}" for x in (first.expert_max_over_mean, first.variation, first.gini)],
        f"{first.top_expert_share:.1%}",
        f"{first.gpu_max_over_mean:.3f}",
        f"{first.gpu_balancedness:.3f}",
        f"{first.gpu_max_over_mean - 1:.3f}",
    ]
    assert [len(line.split()[1]) for line in parts["heat"][-2:]] == [6, 6]
    assert parts["affinity"][-2].split()[1:4] == [
        f"{first.mutual_information:.4f}",
        f"{first.information_bias:.4f}",
        f"{first.lift:.2f}",
    ]
    assert parts["affinity"][-1].split()[:6] == ["1", "-", "-", "-", "-", "-"]


def test_every_share_stands_beside_its_null(capsys: pytest.CaptureFixture[str]) -> None:
    """No share of pairs is shown without what popularity alone gives."""
    summary, insight = seen(make_trace(0, **SHAPE))
    write_overview(summary, insight, {})
    head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("layer  ") and "bits" in line)
    assert head.split()[-6:] == ["top", "20", "%", "popularity", "together", "popularity"]


def test_what_is_unknown_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Counts have no affinity, top-1 choices no co-activation, one layer no next one; heat is shown where asked for."""
    counts = Counts(
        meta=TraceMeta(num_experts=4, top_k=2, layer_ids=(0, 1)), counts=np.array([[[4, 2, 1, 1], [2, 2, 2, 2]]])
    )
    write_overview(*seen(counts), {"trace": "t"})
    assert list(sections(capsys.readouterr().out)) == ["trace  t", "load", "sample"]
    write_overview(*seen(make_trace(0, **(SHAPE | {"top_k": 1}))), {"trace": "t"})
    assert "popularity" in (text := capsys.readouterr().out)
    assert "together  " not in text
    write_overview(*seen(make_trace(0, **(SHAPE | {"layers": 1}))), {"trace": "t"})
    assert " bits " not in (text := capsys.readouterr().out).replace("bits shared", "")
    assert "together  popularity" in text
    write_overview(*seen(make_trace(0, **(SHAPE | {"layers": 1, "top_k": 1}))), {"trace": "t"})
    assert "affinity" not in capsys.readouterr().out


def test_a_sample_is_told_with_its_size_and_its_spread() -> None:
    """Tokens, what they are worth, the error and the warning; phases where both are there; drift is never silent."""
    _, insight = seen(make_trace(0, **SHAPE))
    told = sample_lines(insight)
    assert told["tokens"].startswith("60 tokens of ")
    assert "design effect" in told["tokens"]
    assert told["error"] == f"±{insight.sample.relative_error:.1%} of an average expert's load (standard error)"
    assert "if its tokens are independent" in sample_lines(seen(make_trace(0, **(SHAPE | {"requests": 1})))[1])["error"]
    assert told["warning"] == insight.sample.warning
    assert "shorter than two chunks of 25,000" in told["drift"]
    assert "domains" not in told
    assert insight.phases is not None
    assert f"min {min(insight.phases.rank_correlation):.2f}" in told["phases"]
    assert "top 5/10/20 overlap " in told["phases"]
    decode = sample_lines(seen(make_trace(0, **(SHAPE | {"prompt": 0})))[1])
    assert "phases" not in decode


def test_drift_and_domains_are_told_beside_chance() -> None:
    """A long trace of two halves that route differently drifts between them; the most distant domains are named."""
    trace = make_trace(0, tokens=50_000, layers=1, experts=4, top_k=1, requests=50)
    shifted = np.where(np.arange(50_000)[:, None, None] < 25_000, 0, (trace.experts + 1) % 4)
    domain = np.arange(50_000) // 1000 % 3
    meta = trace.meta.replace(domains=("code", "law", "math"))
    changed = trace.replace(meta=meta, experts=shifted, domain=domain, request=np.arange(50_000) // 1000)
    _, insight = seen(changed)
    told = sample_lines(insight)
    assert f"max {insight.drift[0]:.3f}; by chance {insight.drift_noise[0]:.3f}" in told["drift"]
    distance = np.array(insight.domain_distance)
    far = np.unravel_index(np.argmax(distance), distance.shape)
    assert insight.most_distant == tuple(meta.domains[i] for i in sorted(far))
    assert f"max {distance.max():.3f} ({' and '.join(insight.most_distant)})" in told["domains"]
    assert f"min {distance[np.triu_indices(3, 1)].min():.3f}" in told["domains"]


def test_remarks_hold_patterns_and_findings(capsys: pytest.CaptureFixture[str]) -> None:
    """Six patterns, then each finding with its hint, or a line that there is none."""
    _, insight = seen(make_trace(0, **SHAPE))
    finding = Finding(level="warning", check="c", sentence="[x] is wrong", hint="mend it")
    write_remarks(patterns(insight), [finding])
    parts = sections(capsys.readouterr().out)
    assert len(parts["patterns"]) == 6
    assert parts["checks"] == ["[x] is wrong (mend it)"]
    write_remarks(patterns(insight), [])
    assert sections(capsys.readouterr().out)["checks"] == ["nothing looks wrong with the trace"]
