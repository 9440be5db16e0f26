"""The README and the help are true: their commands run, their Python runs, every option is explained."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from moeplace.cli import COMMANDS, CONTEXT, cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout to commands that read traces and write here."""
    (tmp_path / "traces").symlink_to(ROOT / "traces")
    return tmp_path


def test_the_readme_s_commands_run(checkout: Path) -> None:
    """Every moeplace command of the README exits with 0, in the order it stands there."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("moeplace ")]
    assert len(lines) >= 9
    for line in lines:
        words = [sys.executable, "-m", "moeplace", *shlex.split(line)[1:]]
        done = subprocess.run(words, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_readme_s_make_targets_exist() -> None:
    """Every make target the README names is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test", "check", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:.*##", makefile, re.M), target


def test_the_readme_s_python_runs(checkout: Path) -> None:
    """The README's Python runs as it stands and prints one line per placement."""
    done = subprocess.run([sys.executable, "-c", *blocks("python")], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"linear \d+ µs \(95 %: \d+ to \d+\)\neplb \d+ µs \(95 %: \d+ to \d+\)\n", done.stdout)


def test_the_python_twin_writes_the_command_s_bytes(checkout: Path) -> None:
    """The library call and the command write the same placement file, byte for byte."""
    subprocess.run([sys.executable, "-c", *blocks("python")], cwd=checkout, check=True, capture_output=True)
    twin = (checkout / "placement.json").read_bytes()
    words = "solve traces/tinymoe_8x32_top4.npz -t scale-out:2x4 --fit half:0 -s eplb -o placement.json"
    subprocess.run([sys.executable, "-m", "moeplace", *words.split()], cwd=checkout, check=True, capture_output=True)
    assert (checkout / "placement.json").read_bytes() == twin


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_every_command_has_examples(name: str) -> None:
    """Each command's help ends in examples, and each of its options has a help text."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.epilog is not None
    assert f"moeplace {name}" in command.epilog
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_examples_parse(name: str) -> None:
    """The commands in a help's examples name only options that exist."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.epilog is not None
    for line in command.epilog.splitlines():
        found = re.search(rf"moeplace {name}( [^|>]*)?", line)
        if found:
            words = shlex.split(found.group(1) or "")
            # click keeps a command's help option: with other names here, -h would be unknown to the tests after
            context = click.Context(command, info_name=name, resilient_parsing=True, **CONTEXT)
            parser = command.make_parser(context)
            parser.parse_args(args=words)


def test_the_changelog_names_the_version_in_development() -> None:
    """The changelog starts with what is unreleased."""
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_hand_checkable_trace_has_the_figures_its_readme_derives() -> None:
    """The figures in traces/README.md follow from hand.jsonl."""
    import moeplace

    stats = moeplace.count_routing(moeplace.read_trace(ROOT / "traces" / "hand.jsonl"))
    assert stats.load.tolist() == [[5, 3, 2, 2], [4, 2, 4, 2]]
    assert stats.transition is not None
    assert int(stats.transition.sum()) == 24
    problem = moeplace.build_problem(
        moeplace.read_trace(ROOT / "traces" / "hand.jsonl"), topology="scale-up:2", objective="load"
    )
    assert moeplace.solve(problem, "linear").objective == pytest.approx((8 / 6 + 1) / 2)


def test_the_two_forms_of_the_shipped_trace_are_the_same_trace() -> None:
    """The npz and the JSONL of tinymoe hold the same tokens."""
    import moeplace

    both = [moeplace.read_trace(ROOT / "traces" / f"tinymoe_8x32_top4.{kind}") for kind in ("npz", "jsonl.zst")]
    assert both[0].digest() == both[1].digest()
    assert both[0].meta == both[1].meta


def test_no_file_names_a_machine_s_paths() -> None:
    """The repository speaks of the product alone: no absolute path of the machine it was made on."""
    here = os.fspath(ROOT.parent) + "/"
    for folder in ("moeplace", "tests", "benchmarks", "traces", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".toml", ".txt") or path.name == "run":
                assert here not in path.read_text(encoding="utf-8"), path
