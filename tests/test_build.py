"""Problems and contests from names: defaults, what is said about them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import make_trace, random_placement

import moeplace
from moeplace.affinity import count_routing
from moeplace.batches import BatchLaw
from moeplace.build import (
    Choices,
    assumptions,
    build_problem,
    cap_for,
    describe,
    describe_trace,
    law_sentences,
    model_for,
    plural,
    topology_for,
)
from moeplace.contest import build_contest, compare_files, score_sentences
from moeplace.errors import InputError, ProblemError, UnknownNameError
from moeplace.exporters import read_placement
from moeplace.metrics import max_over_mean
from moeplace.packing.eplb import balance_global
from moeplace.problem import slots_for
from moeplace.trace import Counts, Trace, TraceMeta

TRACE = make_trace(0, tokens=200, layers=2, experts=8, requests=10)
META = TraceMeta(num_experts=8, top_k=2, layer_ids=(0, 1))
COUNTS = Counts(meta=META, counts=np.arange(1, 33).reshape(2, 2, 8) * 2)


def _named(trace: Trace, name: str) -> Trace:
    return trace.replace(meta=trace.meta.replace(model_id=name))


def test_plain_defaults() -> None:
    """One scale-up domain of 8 H100s, no redundant experts, step time under dispatch-combine, decode."""
    problem = build_problem(TRACE)
    assert (problem.topology.name, problem.topology.accelerator.name) == ("scale-up:8", "h100")
    assert (problem.objective, problem.dataflow, problem.law.phase) == ("step-time", "dispatch-combine", "decode")
    assert problem.num_slots == problem.num_experts
    assert problem.load_cap is None


def test_recorded_ranks_give_the_number_of_gpus() -> None:
    """A trace that records its ranks is placed on as many GPUs, and nothing is said about homes."""
    problem = build_problem(make_trace(0, tokens=200, experts=8, ranks=4))
    assert problem.num_gpus == 4
    assert not any("home ranks" in sentence for sentence in assumptions(problem, Choices()))


def test_what_was_said_is_not_assumed() -> None:
    """Each choice silences its own sentence and no other."""
    problem = build_problem(TRACE)
    everything = assumptions(problem, Choices())
    assert [sentence.split()[0] for sentence in everything] == ["the", "topology", "home", "load", "a"]
    for choices in (Choices(model="x"), Choices(topology="x"), Choices(batch_requests=10), Choices(phase="decode")):
        assert len(assumptions(problem, choices)) == len(everything) - 1


def test_the_model_a_trace_names_is_used_where_its_shape_fits() -> None:
    """A known name with the right experts and top-k is that preset, and said so; otherwise widths are said unknown."""
    trace = _named(make_trace(0, tokens=100, layers=2, experts=32, top_k=4), "gpt-oss-20b")
    problem = build_problem(trace)
    assert problem.model == moeplace.load_model("gpt-oss-20b")
    assert "model gpt-oss-20b, as the trace names it" in assumptions(problem, Choices())
    for name in ("gpt-oss-20b", "no such model", "evil.toml", ""):
        other = model_for(META.replace(model_id=name), None)
        assert (other.num_experts, other.top_k, other.hidden) == (8, 2, 4096)
    with pytest.raises(UnknownNameError):
        model_for(META, "gpt-oss")


def test_the_cap_of_eplb_is_its_own_maximum() -> None:
    """``eplb`` is the maximum of EPLB's global policy in each layer; a number holds in every layer."""
    stats, slots = count_routing(TRACE), slots_for(8, 4)
    cap = cap_for("eplb", stats, slots)
    assert cap is not None
    assert np.array_equal(cap, max_over_mean(balance_global(stats.load.astype(float), slots), stats.load))
    assert cap_for("1.5", stats, slots) == pytest.approx([1.5, 1.5])
    assert cap_for(None, stats, slots) is None
    with pytest.raises(InputError, match="load cap 'elpb'"):
        cap_for("elpb", stats, slots)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"num_gpus": 4, "topology": "scale-out:2x4"}, "leave one of"),
        ({"risk": "p99", "objective": "copies"}, "risk p99 of copies"),
        ({"risk": "p90"}, "one of mean, p95"),
        ({"slots_per_gpu": 1, "num_gpus": 2}, "every expert needs a slot"),
        ({"objective": "lod"}, "one of step-time"),
        ({"load_cap": 0.5}, "at least 1"),
    ],
)
def test_choices_that_cannot_be_met(choices: dict[str, Any], words: str) -> None:
    """Parts that disagree are refused with a reason."""
    with pytest.raises(InputError, match=words):
        build_problem(TRACE, **choices)


def test_choices_or_keywords_but_not_both() -> None:
    """Both ways of giving choices say the same; together they are a mistake."""
    one, other = build_problem(TRACE, Choices(num_gpus=4)), build_problem(TRACE, num_gpus=4)
    assert one.digest() == other.digest()
    with pytest.raises(TypeError):
        build_problem(TRACE, Choices(), num_gpus=4)


def test_counts_refuse_a_batch_law() -> None:
    """The steps of counts are the recorded ones: a law for them is an error, not ignored."""
    assert build_problem(COUNTS, num_gpus=4).law.batches == 2
    with pytest.raises(InputError, match="--batch-requests, --batch-tokens on counts"):
        build_problem(COUNTS, batch_requests=3, batch_tokens=2)


def test_a_law_cut_down_is_said() -> None:
    """Fewer requests or shorter chunks than usual are said, unless they were asked for."""
    decode, prefill = BatchLaw(phase="decode", requests=16), BatchLaw(phase="prefill", requests=64, tokens=32)
    assert "holds 16 requests, not 256" in law_sentences(decode, requests=None, tokens=None)[0]
    assert law_sentences(decode, requests=16, tokens=None) == []
    assert "takes 32 tokens of a request, not 128" in law_sentences(prefill, requests=None, tokens=None)[0]
    assert law_sentences(BatchLaw(phase="decode", requests=256), requests=None, tokens=None) == []


def test_descriptions_hold_what_a_reader_needs() -> None:
    """The head of a log has sizes, hardware, slots, cap and step; numbers agree with their nouns."""
    told = describe(build_problem(TRACE, num_gpus=3, redundant=2, load_cap=2))
    assert told["slots"] == "10 per layer, 3 to 4 per GPU, 2 redundant"
    assert told["topology"] == "scale-up:3: 3 × h100, 1 node"
    assert told["objective"] == "step-time under dispatch-combine, load cap 2.0000"
    assert "baseline" not in told
    assert "on average, as recorded" in describe(build_problem(COUNTS, num_gpus=4))["step"]
    deployed = random_placement(0, [4, 4], 2, 8)
    assert "16 copies" in describe(build_problem(TRACE, num_gpus=2, baseline=deployed))["baseline"]
    assert describe_trace(count_routing(COUNTS), 4)["requests"] == "unknown"
    assert (plural(1, "node"), plural(0, "node"), plural(1234, "node")) == ("1 node", "0 nodes", "1,234 nodes")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two placement files for four GPUs on one node, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("linear", "eplb"):
        problem = build_problem(TRACE, topology="scale-up:4")
        moeplace.write(problem, moeplace.solve(problem, name), tmp_path / f"{name[0]}.json")
    return tmp_path


def test_a_contest_takes_over_what_its_files_say(files: Path) -> None:
    """Topology comes from the files where they agree, and says so; ``linear`` is made for it."""
    contest = build_contest(TRACE, ["e.json", "linear"])
    assert [place.name for place in contest.topologies] == ["scale-up:4"]
    assert contest.placements["linear"].num_gpus == 4
    assert "as the placement files name it" in contest.assumptions[0]
    named = build_contest(TRACE, ["e.json"], Choices(model="mixtral-8x7b"), topologies=["scale-out:2x2", "scale-up:4"])
    assert [place.name for place in named.topologies] == ["scale-out:2x2", "scale-up:4"]
    assert named.model.name == "mixtral-8x7b"
    assert named.assumptions == ()
    assert build_contest(TRACE, ["linear"], Choices(num_gpus=2)).placements["linear"].num_gpus == 2


def test_files_that_name_several_topologies(files: Path) -> None:
    """Files of one size that name different topologies are judged on one scale-up domain, and that is said."""
    problem = build_problem(TRACE, topology="scale-out:2x2")
    moeplace.write(problem, moeplace.solve(problem, "linear"), "o.json")
    contest = build_contest(TRACE, ["o.json", "e.json"])
    assert contest.topologies[0].name == "scale-up:4"
    assert "name several" in contest.assumptions[0]


def test_foreign_files_without_a_topology_are_judged_on_one_domain(files: Path) -> None:
    """A file that holds only slots and experts is judged on a scale-up domain of its size."""
    document = json.loads((files / "e.json").read_text())
    bare = {"slots": document["slots"], "model": {"num_experts": 8}}
    (files / "bare.json").write_text(json.dumps(bare))
    contest = build_contest(TRACE, ["bare.json"])
    assert contest.topologies[0].name == "scale-up:4"
    assert "widths are unknown" in contest.assumptions[1]


def test_another_dataflow_than_a_file_s_is_said(files: Path) -> None:
    """A placement made for one dataflow and scored under the other gets a sentence."""
    contest = build_contest(TRACE, ["e.json", "linear"], Choices(dataflow="context-coherent"))
    assert "e was made for dispatch-combine execution and is scored under context-coherent" in contest.assumptions[-1]


def test_labels_stay_apart(files: Path) -> None:
    """Labels are file names; a second file of the same name is called by its path, the same path twice is refused."""
    (files / "sub").mkdir()
    (files / "sub" / "e.json").write_bytes((files / "e.json").read_bytes())
    assert list(build_contest(TRACE, ["e.json", "sub/e.json", "l.json"]).placements) == ["e", "sub/e.json", "l"]
    with pytest.raises(InputError, match="given twice"):
        build_contest(TRACE, ["e.json", "e.json", "e.json"])
    with pytest.raises(UnknownNameError, match="did you mean linear"):
        build_contest(TRACE, ["liner"])


def test_a_contest_refuses_a_law_for_counts(files: Path) -> None:
    """As a problem does; and scores of counts say that steps are the recorded ones."""
    with pytest.raises(InputError, match="--batches on counts"):
        build_contest(COUNTS, ["e.json"], batches=5)
    assert "recorded ones" in score_sentences((), COUNTS, Choices())[0]


def test_files_are_compared_in_the_bytes_of_the_model_they_name(files: Path) -> None:
    """Bytes come from the model given, else from a preset the second file names, else they are unknown."""
    before, after = read_placement("l.json"), read_placement("e.json")
    assert compare_files(before, after).moved_bytes is None
    change = compare_files(before, after, model="mixtral-8x7b")
    assert change.moved_bytes == change.moved_copies * moeplace.load_model("mixtral-8x7b").expert_weight_bytes


def test_a_topology_that_cannot_be_rebuilt_is_asked_for(files: Path) -> None:
    """Where a file's topology has another digest than its name gives, the score asks instead of guessing."""
    document = json.loads((files / "e.json").read_text())
    for told in ({"name": "my-cluster", "digest": "x"}, document["topology"] | {"digest": "x"}):
        (files / "odd.json").write_text(json.dumps(document | {"topology": told}))
        with pytest.raises(ProblemError, match="cannot be rebuilt"):
            build_contest(TRACE, ["odd.json"])
        assert build_contest(TRACE, ["odd.json"], topologies=["scale-up:4"]).topologies[0].name == "scale-up:4"


def test_gpus_on_nodes_are_a_scale_out_network() -> None:
    """GPUs and nodes name a topology; nodes that do not divide, or that a named topology has not, are told."""
    assert topology_for(Choices(num_gpus=8, num_nodes=2)).name == "scale-out:2x4"
    assert topology_for(Choices(num_gpus=8, num_nodes=1)).name == "scale-up:8"
    with pytest.raises(ProblemError, match="8 GPUs on 3 nodes"):
        topology_for(Choices(num_gpus=8, num_nodes=3))
    with pytest.raises(ProblemError, match="scale-out:2x4 has 2"):
        topology_for(Choices(topology="scale-out:2x4", num_nodes=4))


def test_groups_of_eplb_may_be_said(small_trace: Trace) -> None:
    """They take the place of the model's groups, and must divide the experts."""
    assert moeplace.build_problem(small_trace, num_groups=3, num_gpus=2).model.num_groups == 3
    with pytest.raises(ProblemError, match="6 experts in 4 groups"):
        moeplace.build_problem(small_trace, num_groups=4, num_gpus=2)
