"""The README's figures on how far to trust the times are those of the comparisons with published measurements."""

from __future__ import annotations

from pathlib import Path

import test_published_compute
import test_published_exchanges
import test_published_steps
from published import mean, percent, span, worst

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## How far to trust the times\n")[2].partition("\n## ")[0]
MODULES = (test_published_exchanges, test_published_compute, test_published_steps)


def rows(heading: str) -> list[str]:
    """Rows of the section's table whose first column has a heading, without the outer bars."""
    table = SECTION.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return [row.strip("| ") for row in table.splitlines()[2:]]


def test_the_readme_shows_every_comparison() -> None:
    """One row for each comparison, in order, with the mean and the worst error that the tests find."""
    expected = []
    for module in MODULES:
        for name, (predict, _, _) in module.COMPARISONS.items():
            found = predict()
            expected.append(f"{name} | {percent(mean(found))} | {percent(worst(found), '+')}")
    assert rows("published") == expected


def test_the_readme_shows_every_known_miss() -> None:
    """One row for each known miss, in order, with the published figure and the errors that the tests find."""
    expected = [
        f"{name} | {figure} | {span(predict())}"
        for module in MODULES
        for name, (predict, figure) in module.MISSES.items()
    ]
    assert rows("known miss") == expected
