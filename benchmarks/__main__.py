"""Run every benchmark module and print the figures beside their targets; ``--json FILE`` keeps them."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks.cases import Case


def main() -> int:
    """Run the benchmarks named (default: all) and report them; the exit code counts no misses."""
    names = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name.startswith("bench_")]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N-1 of every instance")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    cases: list[Case] = []
    for name in options.names or names:
        started = time.perf_counter()
        module = importlib.import_module(f"benchmarks.{name if name.startswith('bench_') else 'bench_' + name}")
        cases += module.cases(options.seeds)
        print(f"{module.__name__.removeprefix('benchmarks.')}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    show(cases)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(case) for case in cases], indent=1) + "\n")
    return 0


def show(cases: list[Case]) -> None:
    """Print one row per figure."""
    table = Table("benchmark", "figure", "unit", "target", "met", "note", box=None, pad_edge=False)
    for column in (1, 3):
        table.columns[column].justify = "right"
    words = {True: "yes", False: "NO", None: ""}
    for case in cases:
        sign = "≥" if case.at_least else "≤"
        target = "" if case.target is None else f"{sign} {case.target:,.4g}"
        table.add_row(case.name, f"{case.value:,.4g}", case.unit, target, words[case.met], case.note)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
