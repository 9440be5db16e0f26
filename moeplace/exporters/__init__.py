"""The folder is the registry of placement formats: one file each, with ``write``, ``sniff``, ``read`` and ``check``.

Every format says in its file what it cannot carry. Writers check what they are about to write by the same rules as
``check``, and refuse what a stack would reject or, worse, accept and misread.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from moeplace.errors import InputError, MoeplaceError, OutputError, PlacementError, UnknownNameError, unknown_name
from moeplace.exporters._faults import Fault as Fault
from moeplace.exporters._faults import Inspection as Inspection
from moeplace.exporters._faults import Stack as Stack
from moeplace.exporters._faults import Target as Target
from moeplace.exporters.native import PlacementFile, document_of
from moeplace.files import atomic_output, open_input
from moeplace.model import ModelSpec, load_model
from moeplace.presets import is_path
from moeplace.problem import Problem
from moeplace.routing import EVEN, LP, NEAREST, TOPOLOGY_AWARE
from moeplace.solution import Limits, Solution

DEFAULT = "native"
STDOUT = "-"
STATIC = "--ep-dispatch-algorithm static (a copy on its GPU, else on its node, else always the same one)"
FLAGS = {  # a stack's own choice of copies that comes nearest to a placement's
    ("sglang", NEAREST): STATIC,
    ("sglang", TOPOLOGY_AWARE): STATIC,
    ("sglang", LP): "--ep-dispatch-algorithm lp",
}


class Exporter(Protocol):
    """What a format module offers.

    Attributes
    ----------
    DESCRIPTION
        One line for ``moeplace list formats``.
    SUFFIXES
        Endings a file may have, the usual one first: several stacks choose how to read by them.
    FLAG
        What makes the stack load the file; empty where no stack does.
    STACK
        Who reads it, and what becomes of broken files.
    """

    DESCRIPTION: str
    SUFFIXES: tuple[str, ...]
    FLAG: str
    STACK: Stack

    def write(self, document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
        """Write a placement; the same document always gives the same bytes."""

    def sniff(self, data: bytes) -> bool:
        """Whether a file's content looks like this format."""

    def read(self, data: bytes, name: str, target: Target) -> PlacementFile:
        """Read a placement back."""

    def check(self, data: bytes, name: str, target: Target) -> Inspection:
        """Find every fault of a file."""


def list_placement_formats() -> tuple[str, ...]:
    """Names of every placement format, sorted, without importing any."""
    names = (module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")
    return tuple(sorted(names))


def load_exporter(name: str) -> Exporter:
    """Import one placement format by name."""
    known = list_placement_formats()
    if name not in known:
        family = [other for other in known if other.startswith(f"{name}-")]
        if family:
            hint = f"{name} has several: {', '.join(family)} (moeplace list formats)"
            raise UnknownNameError(f"unknown placement format {name!r}", rule="a format has one name", hint=hint)
        raise unknown_name("placement format", name, known)
    module: Exporter = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module


def suffix_for(format: str, path: str | Path | None) -> str:
    """The ending by which a file is written; the usual one for standard output.

    Raises
    ------
    OutputError
        The name ends otherwise than the stack expects, which may go by it.
    """
    known = load_exporter(format).SUFFIXES
    if path is None or str(path) == STDOUT or format == DEFAULT:
        return known[0]
    found = Path(path).suffix
    if found in known or (Path(path).exists() and not Path(path).is_file()):
        return found if found in known else known[0]
    raise OutputError(
        f"{path} ends in {found or 'nothing'}",
        rule=f"a file of format {format} ends in {' or '.join(known)}",
        hint=f"-o {Path(path).with_suffix(known[0])}",
    )


def beside(path: str | Path | None) -> Path | None:
    """Where the native file of a placement goes that is written to ``path`` in another format; None for a pipe."""
    if path is None or str(path) == STDOUT or (Path(path).exists() and not Path(path).is_file()):
        return None
    return Path(path).with_suffix(".moeplace.json")


def check_room(format: str, problem: Problem) -> None:
    """Refuse a format before anything is solved whose stack has as many slots on every GPU where the problem has not.

    Raises
    ------
    PlacementError
        GPUs have different numbers of slots.
    """
    stack, slots = load_exporter(format).STACK, problem.slots_per_gpu
    if stack.even and (slots.min() < slots.max() or problem.whole_model):
        spare = -(-int(slots.sum()) // problem.num_gpus) * problem.num_gpus - problem.num_experts
        raise PlacementError(
            "layers differ in slots"
            if slots.min() == slots.max()
            else f"GPUs have {slots.min()} to {slots.max()} slots",
            rule=f"{stack.name} has as many slots on every GPU, in every layer",
            hint=f"--num-redundant-experts {spare}, or another --format (native and csv take any placement)",
        )


def loaded_by(format: str, path: str | Path, redundant: int) -> str:
    """What makes the stack load a file, with its name and the number of redundant experts; empty where none does."""
    flag = re.sub(r"\bR\b", str(redundant), load_exporter(format).FLAG)
    return re.sub(r"(?<![A-Z_])FILE\b", lambda _: str(path), flag)


def numbering_note(format: str, model: ModelSpec | None, layer_ids: Sequence[int]) -> tuple[str, ...]:
    """What is assumed of layers where no model says which of them have experts; nothing for formats of our own."""
    if model is not None or format in (DEFAULT, "csv"):
        return ()
    ids = f"{layer_ids[0]} to {layer_ids[-1]}"
    return (f"the model is unknown: its MoE layers are taken to be the placement's, {ids}; --model says",)


def routing_note(format: str, routing: str) -> tuple[str, ...]:
    """Say where a placement's replica choice is lost in a file; native files carry it, an even one needs no word."""
    if routing == EVEN or format == DEFAULT:
        return ()
    if (flag := FLAGS.get((format, routing))) is not None:
        return (f"{format} files do not carry the replica choice {routing}: start the server with {flag}",)
    return (f"{format} files do not carry the replica choice {routing}: whoever reads them chooses among copies alone",)


def write_placement(
    document: PlacementFile, path: str | Path, *, format: str = DEFAULT, target: Target | None = None
) -> None:
    """Write a placement file, replacing ``path`` only once everything is written; ``-`` is standard output.

    Parameters
    ----------
    document
        The placement.
    path
        Where it goes; its ending chooses among JSON, YAML and tensors where a format has several.
    format
        Name of the format.
    target
        The model it is for; default: the preset the document names.

    Raises
    ------
    PlacementError
        The format cannot express the placement, or the stack would misread it.
    OutputError
        The file cannot be written, or has another ending than the stack expects.
    """
    exporter, suffix = load_exporter(format), suffix_for(format, path)
    with atomic_output(path) as file:
        exporter.write(document, file, target_of(document, target), suffix)


def write(
    problem: Problem, solution: Solution, path: str | Path, *, limits: Limits | None = None, format: str = DEFAULT
) -> None:
    """Write a solution's placement file; the same solution always gives the same bytes."""
    target = Target(model=problem.model)
    write_placement(document_of(problem, solution, limits), path, format=format, target=target)


def target_of(document: PlacementFile, target: Target | None = None) -> Target:
    """What a placement is for: the model given or named in its file, and its own GPUs and slots."""
    placement, model = document.placement, target.model if target else None
    told = document.details.get("model")
    name = told.get("name") if isinstance(told, dict) else None
    if model is None and isinstance(name, str) and not is_path(name):
        try:
            named = load_model(name)
        except InputError:
            named = None
        # a name is a hint: a small model of one's own may bear that of a large one
        shape = (placement.num_experts, placement.num_layers)
        if named is not None and (named.num_experts, named.num_moe_layers) == shape:
            model = named
    return Target(model=model, num_gpus=placement.num_gpus)


def identify(data: bytes, path: str | Path) -> tuple[str, ...]:
    """Names of the formats that a file's content looks like.

    Raises
    ------
    InputError
        There is none.
    """
    names = tuple(name for name in list_placement_formats() if load_exporter(name).sniff(data))
    if names:
        return names
    raise InputError(
        "is not a placement file" if data.strip() else "is empty",
        rule=f"a placement file has one of the formats: {', '.join(list_placement_formats())}",
        hint="moeplace solve TRACE -o placement.json writes one; --format names a format that cannot be recognised",
        where=str(path),
    )


def read_placement(path: str | Path, *, format: str | None = None, target: Target | None = None) -> PlacementFile:
    """Read a placement file of any format that can be read back.

    Parameters
    ----------
    path
        The file; ``-`` is standard input.
    format
        Name of its format; default: by content.
    target
        Model and number of GPUs, for formats that do not say.

    Raises
    ------
    InputError
        The file is unreadable, of no known format, or breaks its format's rules.
    """
    return parse_placement(load_bytes(path), path, format=format, target=target)


def load_bytes(path: str | Path) -> bytes:
    """Read a whole file, decompressed."""
    with open_input(path) as source, source.stream() as stream:
        return stream.read()


def parse_placement(
    data: bytes, path: str | Path, *, format: str | None = None, target: Target | None = None
) -> PlacementFile:
    """Read a placement of a file's content; where several formats look alike, by the first that reads it."""
    names: Sequence[str] = (format,) if format else identify(data, path)
    refusals: list[MoeplaceError] = []
    for name in names:
        try:
            return load_exporter(name).read(data, str(path), target or Target())
        except MoeplaceError as error:
            refusals.append(error)
    raise refusals[0]


def check_placement(
    path: str | Path, *, format: str | None = None, target: Target | None = None
) -> tuple[str, Inspection]:
    """Check a placement file by the rules of its stack: what its loader would reject, and what it would misread.

    Parameters
    ----------
    path
        The file; ``-`` is standard input.
    format
        Name of its format; default: by content.
    target
        Model, number of GPUs and redundant experts it is for; what is unknown is not checked, and said.

    Returns
    -------
    tuple[str, Inspection]
        The format, and every fault. Complexity: O(layers · slots).

    Raises
    ------
    InputError
        The file cannot be read at all.
    """
    data = load_bytes(path)
    # of formats that look alike, the one that other names are after: the more lenient
    name = format or identify(data, path)[-1]
    return name, load_exporter(name).check(data, str(path), target or Target())
