"""Tables and the log: aligned, whole, without markup, the same on a pipe as on a wide terminal."""

from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from strategies import make_problem, random_placement

from moeplace.diff import compare_placements
from moeplace.problem import Problem
from moeplace.report import SolveLog, align, diff_table, number, say_wrapped, write_json, write_table
from moeplace.solution import Solution, Stage, Status, StopReason
from moeplace.solvers import solve
from moeplace.trace import Trace

CELLS = st.text(st.characters(categories=("L", "N", "P", "Zs")), max_size=12).map(lambda text: " ".join(text.split()))


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6))
def test_columns_begin_or_end_together(rows: list[tuple[str, str, str]]) -> None:
    """Every cell stands whole at its column, in terminal cells; nothing trails."""
    lines = align(rows, right=(1, 2))
    assert len(lines) == len(rows)
    ends = {cell_len(line) for line, row in zip(lines, rows, strict=True) if row[2]}
    assert len(ends) <= 1
    for line, row in zip(lines, rows, strict=True):
        assert line == line.rstrip()
        assert line.lstrip().startswith(row[0].strip())


def test_long_texts_wrap_beneath_themselves_only_where_a_width_is_given() -> None:
    """A last column of text is wrapped with a hanging indent; without a width, or without room, it stays whole."""
    rows = [("name", "one two three four five six seven eight"), ("b", "short")]
    assert align(rows, right=(), width=32) == [
        "name  one two three four five",
        "      six seven eight",
        "b     short",
    ]
    assert align(rows, right=()) == ["name  one two three four five six seven eight", "b     short"]
    assert align(rows, right=(), width=12) == align(rows, right=())


def test_tables_are_written_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are text, not markup; a pipe of any width gets whole lines."""
    write_table([["name", "what"], ["a[bold]", "[step, layer] " + "x" * 200]])
    assert capsys.readouterr().out == f"name     what\na[bold]  [step, layer] {'x' * 200}\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.0000"),
        (0.87564, "0.8756"),
        (99.5, "99.5000"),
        (123.456, "123.456"),
        (1178.5017, "1,178.50"),
        (134056.14, "134,056"),
        (-2.5, "-2.5000"),
        (1e9, "1,000,000,000"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_the_digits_that_count(value: float, shown: str) -> None:
    """At most four decimals, six digits that count, thousands set apart."""
    assert number(value) == shown


def test_json_is_sorted_and_keeps_its_letters(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys are sorted at every depth; µ stays µ."""
    write_json({"b": 1, "a": {"d": "µs", "c": None}})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": {"c": None, "d": "µs"}, "b": 1}
    assert out.index('"a"') < out.index('"c"') < out.index('"d"') < out.index('"b"')
    assert "µs" in out


def _logged(problem: Problem, solver: str = "linear", shown: bool = True) -> tuple[SolveLog, Solution]:
    log = SolveLog(shown=shown)
    log.head({"trace": "t"}, ["a topology"], ["few requests"])
    answer = solve(problem, solver, report=log)
    log.tail(answer, problem)
    return log, answer


def test_the_log_tells_assumptions_improvements_and_the_end(
    toy_problem: Problem, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this order: instance, assumptions, notes, one line per improvement under a head, status and reason, terms."""
    _, answer = _logged(toy_problem)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:3] == ["trace  t", "assumed: a topology", "note: few requests"]
    (head,) = [i for i, line in enumerate(lines) if "objective [µs]" in line]
    assert re.match(r" +[\d.]+s  linear +[\d.,]+ +[\d.,]+ +[\d.]+% ", lines[head + 1])
    text = "\n".join(lines[head + 2 :])
    assert "status " in text
    assert re.search(rf"^objective +{re.escape(number(answer.objective))} µs; bound ", text, re.M)
    for label in ("load max/mean", "compute", "dispatch", "pairs across GPUs", "GPUs per token", "next-layer locality"):
        assert re.search(rf"^{label} ", text, re.M), label


def test_a_hidden_log_keeps_the_history_and_says_nothing(
    toy_problem: Problem, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --verbose and without a terminal only the history is kept."""
    log, _ = _logged(toy_problem, shown=False)
    log.progress(1, 2, "half")
    assert capsys.readouterr().err == ""
    assert [entry.source for entry in log.history] == ["linear"]


def test_the_log_has_a_head_per_unit_and_no_progress_on_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """A method whose stages have objectives of their own gets a new head where the unit changes."""
    log = SolveLog(shown=True)
    log.improved("a", 3.0, unit="tokens")
    log.improved("a", 2.0, unit="tokens", bound=1.0)
    log.progress(1, 2, "half")
    log.stage("next", "[bold]not markup[/]")
    log.improved("b", 1.0, unit="µs", figures={"load max/mean": 1.25})
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "source" in line] == [lines[0], lines[4]]
    assert "objective [tokens]" in lines[0]
    assert lines[2].split()[2:] == ["2.0000", "1.0000", "50.00%"]
    assert lines[3].endswith("next: [bold]not markup[/]")
    assert lines[5].endswith("1.25")
    assert "half" not in "".join(lines)


def test_stages_and_moves_stand_in_the_summary(small_trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    """A sub-problem has a line with its own gap and stop reason in words; a baseline one with copies and bytes."""
    problem = make_problem(small_trace, "scale-up:2", baseline=random_placement(2, [3, 3], 2, 6))
    stage = Stage(
        name="clusters", objective=4, bound=3, unit="tokens", status=Status.FEASIBLE, stop_reason=StopReason.TIME_LIMIT
    )
    answer = solve(problem, "linear").replace(stages=(stage,), notes=("[x] is text",))
    SolveLog(shown=True).summary(answer, problem)
    err = capsys.readouterr().err
    assert re.search(r"^clusters +4\.0000 tokens, feasible, gap 25\.000%, the time limit cut the run", err, re.M)
    assert answer.placement is not None
    assert problem.baseline is not None
    moved = compare_placements(problem.baseline, answer.placement).moved_copies
    assert re.search(rf"^moves +{moved} of 12 copies \([\d.]+%\), [\d.]+ GB, against the baseline$", err, re.M)
    assert "note: [x] is text" in err


def test_sentences_wrap_on_a_terminal_alone() -> None:
    """A terminal gets lines that fit, further ones indented, none beginning with %; a pipe gets the sentence whole."""
    text = "the busiest tenth holds 38 % of everything, as was to be expected of a load like this one"
    for terminal, lines in ((False, 1), (True, 4)):
        out = Console(file=io.StringIO(), width=28, force_terminal=terminal, color_system=None)
        say_wrapped(text, out, indent="   ")
        shown = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(shown) == lines
        assert " ".join(line.strip() for line in shown) == text
        assert not any(line.lstrip().startswith("%") for line in shown)
        assert all(line.startswith("   ") and len(line) <= 28 for line in shown[1:])


def test_diff_tables_name_gpus_only_where_something_moves(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing moved is one line; otherwise every GPU has one, and bytes are shown where they are known."""
    one, other = random_placement(0, [3, 3], 2, 6), random_placement(1, [3, 3], 2, 6)
    diff_table(compare_placements(one, one))
    assert capsys.readouterr().out == "0 of 12 copies move (0.0%)\n"
    diff_table(compare_placements(one, other, expert_bytes=1e9))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ of 12 copies move \([\d.]+%\), \d+\.00 GB", lines[0])
    assert lines[1].split() == ["GPU", "arriving", "leaving", "arriving", "[GB]"]
    assert len([line for line in lines if re.match(r" *[01] +\d", line)]) == 2
    assert any("link" in line for line in lines)
