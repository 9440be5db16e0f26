"""``moeplace export``, ``check`` and ``diff``, and the other commands on files of serving stacks."""

from __future__ import annotations

import json
import re
import shlex

import click
import numpy as np
import pytest
from shell import Shell
from strategies import dealt

from moeplace.cli import cli
from moeplace.cli.guides import guides
from moeplace.exporters import list_placement_formats, load_exporter, write_placement
from moeplace.model import load_model

STACKS = ("sglang", "trtllm", "vllm-mapping", "vllm-expert-map", "vllm-ascend", "mindie", "omni-infer", "eplb", "csv")


@pytest.fixture
def solved(shell: Shell) -> Shell:
    """A folder with a placement of the trace on 8 GPUs."""
    shell("solve t.npz -q -s eplb --num-gpus 8 --num-redundant-experts 8 -o p.json")
    return shell


def test_export_check_and_back_for_every_stack(solved: Shell) -> None:
    """What is exported passes check, is recognised, scores the same, and differs in nothing."""
    base = solved("score t.npz p.json --num-gpus 8 --batches 3 --phase decode --json").json["scores"][0]
    for name in STACKS:
        file = f"{name}{load_exporter(name).SUFFIXES[0]}"
        done = solved(f"export p.json --format {name} -o {file}")
        assert done.out == ""
        assert name == "csv" or "the model is unknown" in done.err
        assert "nothing is wrong" in solved(f"check {file} --format {name} --num-gpus 8").out
        assert solved(f"diff p.json {file}").out.startswith("0 of 120 copies move")
        score = solved(f"score t.npz {file} --num-gpus 8 --batches 3 --phase decode --json").json["scores"][0]
        if name != "omni-infer":
            assert score["step_time_us"] == base["step_time_us"], name
        solved(f"solve t.npz -q -s linear --num-gpus 8 --baseline {file} --dry-run")


def test_flat_rows_ask_for_the_number_of_gpus(solved: Shell) -> None:
    """Rows do not say how many GPUs there are: an option does, or the other file."""
    solved("export p.json --format trtllm -q -o a.yaml")
    solved("export p.json --format eplb -q -o b.npz")
    solved.fails("diff a.yaml b.npz", "does not say how many GPUs", "--num-gpus")
    solved("diff a.yaml b.npz --num-gpus 8")
    solved("diff a.yaml p.json")
    solved.fails("export a.yaml --format vllm-ascend", "does not say how many GPUs")
    solved("export a.yaml --format vllm-ascend --num-gpus 8 -q -o c.json")
    assert solved("diff c.json p.json").out.startswith("0 of")


def test_solve_writes_a_stack_s_file_and_the_native_one_beside_it(shell: Shell) -> None:
    """Formats that carry no provenance have it beside them; both are the same placement."""
    line = "solve t.npz -q -s eplb --num-gpus 8 --num-redundant-experts 8"
    shell(f"{line} --format trtllm -o map.yaml")
    assert shell.files().count("map.moeplace.json") == 1
    document = json.loads((shell.folder / "map.moeplace.json").read_text())
    assert document["provenance"]["solver"] == "eplb"
    assert shell("diff map.yaml map.moeplace.json").out.startswith("0 of 120")
    out = shell(f"{line} --format sglang").out
    assert list(json.loads(out)) == ["physical_to_logical_map"]
    shell(f"{line} --format lmdeploy -o loads.json")
    loads = np.array(json.loads((shell.folder / "loads.json").read_text()))
    assert loads.sum() == 400 * 3 * 4


def test_what_a_stack_cannot_hold_is_refused_before_anything_is_solved(shell: Shell) -> None:
    """32 experts and 3 more on 8 GPUs are uneven: refused with a number that works, the output left alone."""
    (shell.folder / "map.json").write_text("kept")
    line = "solve t.npz -q --num-gpus 8 --num-redundant-experts 3 --format sglang -o map.json"
    shell.fails(line, "GPUs have 4 to 5 slots", "--num-redundant-experts 8")
    assert (shell.folder / "map.json").read_text() == "kept"
    shell.fails("solve t.npz --num-gpus 8 --format sglang -o map.txt", "ends in .txt", "-o map.json")
    shell.fails("solve t.npz --num-gpus 8 --format vllm -o map.json", "vllm has several")


def test_check_tells_every_fault_with_what_the_stack_makes_of_it(shell: Shell) -> None:
    """A zero-based TensorRT-LLM file and an SGLang file with a key too many and an expert too few exit with 1."""
    model = load_model("deepseek-v3")
    write_placement(dealt(model, 32, 32), shell.folder / "map.json", format="sglang")
    options = "--format sglang --model deepseek-v3 --num-gpus 32 --num-redundant-experts 32"
    done = shell(f"check map.json {options}")
    assert done.out == "SGLang 0.5.23: 61 layers of 288 slots, 256 experts, 9 on each of 32 GPUs: nothing is wrong\n"
    value = json.loads((shell.folder / "map.json").read_text())
    row = value["physical_to_logical_map"][7]
    value["physical_to_logical_map"][7] = [0 if expert == 255 else expert for expert in row]
    (shell.folder / "bad.json").write_text(json.dumps({**value, "note": 1}))
    done = shell(f"check bad.json {options}", code=1)
    assert "error: keys 'note'" in done.out
    assert "stops at start with TypeError" in done.out
    assert "error: row 7 lacks expert 255" in done.out
    assert "ZeroDivisionError" in done.out
    document = shell(f"check bad.json {options} --json", code=1).json
    assert document["ok"] is False
    assert {fault["kind"] for fault in document["faults"]} >= {"unknown-key", "missing"}
    rows = {str(layer): row for layer, row in enumerate(value["physical_to_logical_map"][8:])}
    rows |= {str(layer): row for layer, row in enumerate(value["physical_to_logical_map"][3:])}
    rows = {key: rows[key] for key in map(str, range(58))}
    rows["4"] = value["physical_to_logical_map"][9]
    bad = {"num_slots": 288, "initial_global_assignments": rows, "layer_updates_per_iter": 0}
    (shell.folder / "zero.json").write_text(json.dumps(bad))
    done = shell("check zero.json --model deepseek-v3 --num-gpus 32", code=1)
    assert "MoE layers are numbered from 0" in done.out
    assert "KeyError" in done.out


def test_check_says_what_it_could_not_check(solved: Shell) -> None:
    """Without --num-gpus and --model a file may pass, with warnings of what was not looked at."""
    solved("export p.json --format trtllm -q -o a.yaml")
    out = solved("check a.yaml").out
    assert "warning: the number of GPUs is unknown" in out
    assert "warning: the model is unknown" in out
    assert solved("check a.yaml -q").out == ""
    assert solved("check p.json").out.endswith("nothing is wrong\n")
    solved.fails("check t.npz", "is not a placement file", "--format")


def test_diff_renames_gpus_and_schedules(shell: Shell) -> None:
    """--relabel finds renamed GPUs and writes the placement; --schedule has rounds; -o without --relabel is usage."""
    shell("solve t.npz -q -s eplb -t scale-out:2x4 --num-redundant-experts 8 -o a.json")
    shell("solve t.npz -q -s random --seed 4 -t scale-out:2x4 --num-redundant-experts 8 -o b.json")
    plain = shell("diff a.json b.json --json").json["moved_copies"]
    document = shell("diff a.json b.json --relabel -o c.json --json --schedule --model gpt-oss-20b").json
    assert document["moved_copies"] <= plain
    assert shell("diff a.json c.json --json").json["moved_copies"] == document["moved_copies"]
    loads = [load for one in document["schedule"]["rounds"] for load in one["loads"]]
    assert len(loads) == document["moved_copies"]
    assert sum(link["moved_copies"] for link in document["links"]) == document["moved_copies"]
    out = shell("diff a.json b.json --relabel --schedule --spare-slots 2").out
    assert "rounds with 2 spare slots per GPU" in out
    assert "→" in out
    assert "are not alike" not in shell("diff a.json b.json --relabel").err
    shell("solve t.npz -q -s linear -t torus:2x4 -o d.json")
    assert "GPUs of torus:2x4 are not alike" in shell("diff d.json d.json --relabel").err
    shell.fails("diff a.json b.json -o c.json", "give --relabel", code=2)
    shell.fails("diff a.json b.json --num-nodes 3", "8 GPUs on 3 nodes")


def test_guides_name_options_and_formats_that_exist() -> None:
    """Every command of a guide parses, and its format is one there is."""
    for name, text in guides().items():
        joined = re.sub(r"\n       (?=-)", " ", text)
        lines = re.findall(r"^ +(moeplace .*)$", joined, re.M)
        assert len(lines) >= 2, name
        for line in lines:
            words = shlex.split(line)[1:]
            command = cli.get_command(click.Context(cli), words[0])
            assert command is not None, line
            context = click.Context(command, info_name=words[0], resilient_parsing=True)
            values, _, _ = command.make_parser(context).parse_args(args=words[1:])
            assert values.get("output_format", "native") in list_placement_formats(), line
        assert all(len(line) <= 125 for line in text.splitlines()), name


def test_help_lists_its_topics_and_suggests(shell: Shell) -> None:
    """Topics in a list with what they are, one in full, a typo suggested."""
    assert shell("help").out.startswith("lmdeploy ")
    assert "--init-expert-location map.json" in shell("help sglang").out
    shell.fails("help sglan", "did you mean sglang")


def test_solve_says_when_layers_of_an_unknown_model_are_guessed(shell: Shell) -> None:
    """A file for a stack is numbered by the trace where no model says how: that is said."""
    line = "solve t.npz -s eplb --num-gpus 8 --format trtllm -o map.yaml"
    assert "its MoE layers are taken to be the placement's, 0 to 2" in shell(line).err
    assert "MoE layers are taken" not in shell("solve t.npz -s eplb --num-gpus 8 -o p.json").err
