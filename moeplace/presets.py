"""Preset files: TOML tables whose every number says where it comes from.

A number is written plainly, and then stands under its table's ``source``, or as ``{ value = 80, source = "…" }``.
A table ``[defaults]`` fills what the others leave out; ``like`` names a table to take over. A user's own file is one
such table without its header.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moeplace.errors import InputError, Location, ProblemError, unknown_name

_NOT_NUMBERS = frozenset({"name", "source", "aliases"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One preset: its values by dotted key (``attention.num_heads``) and the source of each.

    Parameters
    ----------
    name
        The preset's own name.
    file
        The file it was read from, for messages.
    values, sources
        Values and source texts, both by dotted key.
    aliases
        Other names it answers to, in lower case.
    inside
        What stands before the keys in the file (``"h100."``), for messages.
    """

    name: str
    file: str
    values: Mapping[str, Any]
    sources: Mapping[str, str]
    aliases: tuple[str, ...] = ()
    inside: str = ""

    def at(self, key: str = "") -> Location:
        """Place of a key, for an error message."""
        return Location(file=self.file, element=(self.inside + key).rstrip(".") or None)


@cache
def packaged(file: str) -> Mapping[str, Entry]:
    """Read a preset file that comes with the library; read once, on first use."""
    tables = tomllib.loads(files("moeplace").joinpath(file).read_text(encoding="utf-8"))
    defaults = tables.pop("defaults", {})
    entries = {}
    for name, table in tables.items():
        base = {key: value for key, value in tables.get(table.pop("like", ""), {}).items() if key != "aliases"}
        entries[name] = _entry(name, file, {**defaults, **base, **table}, f"{name}.")
    return MappingProxyType(entries)


def user_file(path: Path) -> Entry:
    """Read a user's own preset file; it is named by its ``name``, else by the file's stem.

    Raises
    ------
    InputError
        If the file cannot be read or is not TOML.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot read the file: {reason}", hint="check the path", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not TOML: {error}", hint="one 'key = value' per line", where=str(path)) from error
    name = table.get("name", path.stem)
    if not isinstance(name, str) or not name:
        raise InputError(f"name is {name!r}", rule="a name is a non-empty text", where=Location(file=str(path)))
    table.pop("aliases", None)
    return _entry(name, str(path), table)


def find(kind: str, name: str, presets: Mapping[str, Entry]) -> Entry:
    """Find a preset by its name or an alias, whatever the case.

    Raises
    ------
    UnknownNameError
        If no preset answers to the name; the nearest names are suggested.
    """
    entry = lookup(name, presets)
    if entry is None:
        raise unknown_name(kind, name, tuple(presets))
    return entry


def lookup(name: str, presets: Mapping[str, Entry]) -> Entry | None:
    """Find a preset by its name or an alias, whatever the case; None if there is none."""
    key = name.strip().lower()
    return presets.get(key) or next((entry for entry in presets.values() if key in entry.aliases), None)


def is_path(name: str | Path) -> bool:
    """Whether a name given by the user means a TOML file of theirs rather than a preset."""
    return isinstance(name, Path) or name.lower().endswith(".toml")


def read_fields(entry: Entry, owner: type, *, prefix: str = "", skip: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments for the constructor of a dataclass, from the keys of a preset under a prefix.

    Parameters
    ----------
    entry
        The preset.
    owner
        The dataclass to be built; its fields' annotations say what type each key must have.
    prefix
        What the keys start with (``"attention."``); keys elsewhere are not looked at.
    skip
        Names of fields (and, for the top level, of sub-tables) that the caller reads itself.

    Raises
    ------
    InputError
        If a key is unknown, missing or of the wrong type; the message names the file and the key.
    """
    wanted = {f.name: f for f in dataclasses.fields(owner) if f.name not in skip}
    given = {key.removeprefix(prefix) for key in entry.values if key.startswith(prefix)}
    for key in sorted(given - set(wanted)):
        if key.partition(".")[0] not in skip:
            raise unknown_name("key", key, sorted({*wanted, *skip}), where=str(entry.at(prefix + key)))
    arguments: dict[str, Any] = {}
    for name, field in wanted.items():
        if name == "name" and not prefix:
            arguments[name] = entry.name
        elif name in given:
            arguments[name] = _typed(entry, prefix + name, str(field.type))
        elif field.default is dataclasses.MISSING:
            raise InputError(
                f"the key {prefix + name!r} is missing",
                rule=f"a {owner.__name__} needs {', '.join(n for n, f in wanted.items() if _needed(f))}",
                hint=f"add a line '{prefix + name} = …'",
                where=entry.at(prefix + name),
            )
    return arguments


def check_whole(label: str, value: object, low: int) -> None:
    """Raise ``ProblemError`` unless a value is a whole number of at least ``low``."""
    try:
        holds = not isinstance(value, bool) and operator.index(value) >= low  # type: ignore[arg-type]
    except TypeError:
        holds = False
    if not holds:
        rule = f"a whole number of at least {low}"
        raise ProblemError(f"{label} is {value!r}", rule=rule, hint=f"give {label} as {rule}")


def check_positive(label: str, value: object, at_most: float = math.inf) -> None:
    """Raise ``ProblemError`` unless a value is a finite number above 0 and at most ``at_most``."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    if not math.isfinite(number) or not 0 < number <= at_most:
        rule = "a number above 0" + ("" if math.isinf(at_most) else f" and at most {at_most:g}")
        raise ProblemError(f"{label} is {value!r}", rule=rule, hint=f"give {label} as {rule}")


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.name != "name"


def _entry(name: str, file: str, table: Mapping[str, Any], inside: str = "") -> Entry:
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    _flatten(table, "", str(table.get("source", f"given in {file}")), values, sources)
    aliases = values.pop("aliases", ())
    values.pop("source", None)
    return Entry(
        name=name,
        file=file,
        values=MappingProxyType(values),
        sources=MappingProxyType(sources),
        aliases=tuple(alias.lower() for alias in aliases),
        inside=inside,
    )


def _flatten(
    table: Mapping[str, Any], prefix: str, source: str, values: dict[str, Any], sources: dict[str, str]
) -> None:
    for key, value in table.items():
        inner = value if isinstance(value, Mapping) else None
        if inner is not None and "value" not in inner:
            _flatten(inner, f"{prefix}{key}.", str(inner.get("source", source)), values, sources)
            continue
        if prefix and key == "source":
            continue
        values[prefix + key] = value if inner is None else inner["value"]
        if key not in _NOT_NUMBERS:
            sources[prefix + key] = source if inner is None else str(inner.get("source", source))


def _typed(entry: Entry, key: str, annotation: str) -> Any:
    value = entry.values[key]
    wanted = annotation.removesuffix(" | None")
    accepted: tuple[type, ...] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}[wanted]
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted != "bool"):
        names = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}
        raise InputError(
            f"{key} is {value!r}",
            rule=f"{key} is {names[wanted]}",
            hint="write numbers without quotes, texts with them",
            where=entry.at(key),
        )
    return float(value) if isinstance(value, int) and wanted == "float" else value
