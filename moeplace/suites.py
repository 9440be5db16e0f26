"""Methods to compare, as one text each, and suites of them: the published ones beside ours.

A method is ``SOLVER[:OPTION=VALUE…][@ROUTING]``, such as ``eplb:policy=global`` or ``grace@topology-aware``. Options
are those of its solver; ``objective``, ``load-cap``, ``copies-level`` and ``risk-batches`` (steps drawn to solve on)
are those of the problem instead, for solvers that answer only some. The routing is how copies are chosen when it is
solved and judged; without one it is that of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeplace.errors import InputError, unknown_name
from moeplace.routing import POLICIES

GOALS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "objective": ("objective", str),
    "load-cap": ("load_cap", str),
    "copies-level": ("copies_level", str),
    "risk-batches": ("risk_batches", int),
}
SUITES: Mapping[str, tuple[str, ...]] = {
    # what this installation lacks, or what cannot take a problem, is listed with the reason
    "published": (
        "linear",
        "eplb:policy=global",
        "eplb:policy=hierarchical",
        "tensorrt-llm",
        "flashlb:risk-batches=64",
        "linear+swift",
        "craft",
        "moetuner",
        "occult",
        "grace@weighted",
        "grace@topology-aware",
        "grace:ratio=0.15@topology-aware",
        "exflow",
        "prefill-remap",
        "prefill-dup",
        "balance",
        "setpart:objective=copies:load-cap=eplb:mode=fast",
        "nearby:objective=remote:load-cap=1.1@topology-aware",
        "auto",
        "auto@topology-aware",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A solver (or chain of them) with its options, changes to the problem, and the choice between copies."""

    solver: str
    options: Mapping[str, str] = field(default_factory=dict)
    goals: Mapping[str, Any] = field(default_factory=dict)
    routing: str | None = None

    @classmethod
    def of(cls, text: str) -> Method:
        """Read ``SOLVER[:OPTION=VALUE…][@ROUTING]``.

        Raises
        ------
        InputError
            The text has another form, or the routing does not exist.
        """
        rest, at, routing = text.partition("@")
        solver, *settings = rest.split(":")
        pairs = [setting.partition("=") for setting in settings]
        if not solver or any(not key or not equals for key, equals, _ in pairs):
            raise InputError(f"method {text!r}", rule="SOLVER[:OPTION=VALUE…][@ROUTING], e.g. grace@topology-aware")
        if at and routing not in POLICIES:
            raise unknown_name("routing", routing, POLICIES)
        given = {key: value for key, _, value in pairs}
        return cls(
            solver=solver,
            options={key: value for key, value in given.items() if key not in GOALS},
            goals=_goals({key: value for key, value in given.items() if key in GOALS}),
            routing=routing or None,
        )


def _goals(given: Mapping[str, str]) -> dict[str, Any]:
    """Fields of the problem, each of its type."""
    goals: dict[str, Any] = {}
    for key, text in given.items():
        name, kind = GOALS[key]
        try:
            goals[name] = kind(text)
        except ValueError as error:
            raise InputError(f"{key} {text!r}", rule="a whole number") from error
    return goals


def suite(name: str) -> tuple[str, ...]:
    """Return the methods of a suite; raises :class:`~moeplace.errors.UnknownNameError`."""
    if name not in SUITES:
        raise unknown_name("suite", name, sorted(SUITES))
    return SUITES[name]
