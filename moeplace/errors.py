"""The one tree of errors: what went wrong, the rule it broke, where, and what to do about it.

The library raises these; only the command line prints them and turns ``exit_code`` into the process's exit status.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A place in an input file.

    ``line`` and ``column`` count from 1; binary files use ``element`` instead (``expert_ids[5, 0, 2]``).
    """

    file: str
    line: int | None = None
    column: int | None = None
    element: str | None = None

    def __str__(self) -> str:
        parts = [self.file]
        if self.line is not None:
            parts.append(str(self.line))
            if self.column is not None:
                parts.append(str(self.column))
        text = ":".join(parts)
        return f"{text}: {self.element}" if self.element else text


class MoeplaceError(Exception):
    """Base of every error a user can cause or meet.

    Parameters
    ----------
    what
        What is wrong, with the offending value.
    rule
        The rule it breaks, as a clause (``"ids lie in 0..31"``).
    hint
        What the user can do about it.
    where
        The place in the input, when there is one.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, rule: str | None = None, hint: str | None = None, where: Location | str | None = None
    ) -> None:
        self.what, self.rule, self.hint, self.where = what, rule, hint, where
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where is not None else self.what
        if self.rule:
            head += f" (rule: {self.rule})"
        return f"{head}\nhint: {self.hint}" if self.hint else head


class InputError(MoeplaceError):
    """A file or value that cannot be used."""


class UnreadableError(InputError):
    """A file that the system does not open or read."""


class TraceError(InputError):
    """A trace that breaks its format; carries the first bad rows."""

    def __init__(
        self,
        what: str,
        *,
        rule: str | None = None,
        hint: str | None = None,
        where: Location | str | None = None,
        others: Sequence[str] = (),
    ) -> None:
        self.others = tuple(others)
        super().__init__(what, rule=rule, hint=hint, where=where)

    def __str__(self) -> str:
        text = MoeplaceError.__str__(self)
        return "\n".join([*self.others, text])


class PlacementError(InputError):
    """A placement that breaks a rule (an expert missing, an id out of range, too many copies on a GPU)."""


class TopologyError(InputError):
    """A topology that cannot be built, or cannot be costed yet."""


class UnknownNameError(InputError):
    """A name that is not in a list of known names; suggests the nearest ones."""


class ProblemError(InputError):
    """Parts that do not fit together: too few slots, shapes that disagree, weights that exceed the memory."""


class MissingExtraError(MoeplaceError):
    """An optional package is needed; the hint names the command that installs it."""


class OutputError(MoeplaceError):
    """An output that cannot be written."""


class SolverError(MoeplaceError):
    """A solver failed, or its answer did not stand up to the check made by code that is not the solver."""


class InfeasibleError(MoeplaceError):
    """Proven: no placement satisfies the constraints."""

    exit_code = 3


class NothingFoundError(MoeplaceError):
    """No placement was found within the limits; nothing was proven."""

    exit_code = 4


class RequirementError(MoeplaceError):
    """An answer was found, but it misses what ``--require`` asked for."""

    exit_code = 5


def unknown_name(kind: str, name: str, known: Sequence[str], *, where: str | None = None) -> UnknownNameError:
    """An :class:`UnknownNameError` that suggests the nearest known names."""
    import difflib

    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UnknownNameError(
        f"unknown {kind} {name!r}",
        rule=f"one of {len(known)} known names",
        hint=hint + "known: " + ", ".join(known),
        where=where,
    )
