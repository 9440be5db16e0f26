"""The folder is the registry of placement formats: one file each, with ``write``, ``sniff`` and ``read``."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import IO, Protocol

from moeplace.errors import InputError, unknown_name
from moeplace.exporters.native import PlacementFile, document_of
from moeplace.files import atomic_output, open_input
from moeplace.problem import Problem
from moeplace.solution import Limits, Solution

DEFAULT = "native"


class Exporter(Protocol):
    """What a format module offers."""

    DESCRIPTION: str

    def write(self, document: PlacementFile, file: IO[bytes]) -> None:
        """Write a placement; the same document always gives the same bytes."""

    def sniff(self, data: bytes) -> bool:
        """Whether a file's content looks like this format."""

    def read(self, data: bytes, name: str) -> PlacementFile:
        """Read a placement back."""


def list_placement_formats() -> tuple[str, ...]:
    """Names of every placement format, sorted, without importing any."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))


def load_exporter(name: str) -> Exporter:
    """Import one placement format by name."""
    known = list_placement_formats()
    if name not in known:
        raise unknown_name("placement format", name, known)
    module: Exporter = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module


def write_placement(document: PlacementFile, path: str | Path, *, format: str = DEFAULT) -> None:
    """Write a placement file, replacing ``path`` only once everything is written; ``-`` is standard output."""
    exporter = load_exporter(format)
    with atomic_output(path) as file:
        exporter.write(document, file)


def write(
    problem: Problem, solution: Solution, path: str | Path, *, limits: Limits | None = None, format: str = DEFAULT
) -> None:
    """Write a solution's placement file; the same solution always gives the same bytes."""
    write_placement(document_of(problem, solution, limits), path, format=format)


def read_placement(path: str | Path) -> PlacementFile:
    """Read a placement file of any format that can be read back.

    Raises
    ------
    InputError
        The file is unreadable, of no known format, or breaks its format's rules.
    """
    with open_input(path) as source, source.stream() as stream:
        data = stream.read()
    for name in list_placement_formats():
        exporter = load_exporter(name)
        if exporter.sniff(data):
            return exporter.read(data, str(path))
    raise InputError(
        "is not a placement file" if data.strip() else "is empty",
        rule=f"a placement file has one of the formats: {', '.join(list_placement_formats())}",
        hint="moeplace solve TRACE -o placement.json writes one",
        where=str(path),
    )
