"""Types of the values that options take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """Seconds, written ``90``, ``90s``, ``5m`` or ``1h``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a duration in seconds."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h)?\s*", str(value))
        if not match or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a duration: write 90, 90s, 5m or 1h", param, ctx)
        return float(match[1]) * _SECONDS[match[2] or "s"]


class Share(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """A fraction, written ``0.01`` or ``1%``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a fraction between 0 and 1."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            self.fail(f"{value!r} is not a share: write 0.01 or 1%", param, ctx)
        return share


class Portion(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """A number of things, written ``200``, or a share of them, written ``10%`` or ``0.1``."""

    name = "n|share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """Read a whole number as int, a share as float."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        text = str(value).strip().replace("_", "")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text)
        if match and text.isdigit() and int(text) >= 1:
            return int(text)
        share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
        if not 0 < share <= 1:
            self.fail(f"{value!r} is neither a number of at least 1 nor a share: write 200 or 10%", param, ctx)
        return share


class Size(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """Bytes, written ``500MB``, ``2GB`` or ``1.5GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a size in bytes."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", str(value))
        if not match or (match[3] and not match[2]):
            self.fail(f"{value!r} is not a size: write 500MB, 2GB or 1.5GiB", param, ctx)
        return float(match[1]) * float((1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


class Requirement(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """``optimal``, or the largest gap that will do."""

    name = "optimal|gap"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        """Read ``optimal`` or a gap."""
        if str(value).strip().lower() == "optimal":
            return "optimal"
        try:
            return Share().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither 'optimal' nor a gap such as 1%", param, ctx)


class Whole(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """A whole number of at least ``low``."""

    name = "n"

    def __init__(self, low: int) -> None:
        self.low = low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a whole number."""
        try:
            number = int(str(value).replace("_", ""))
        except ValueError:
            number = self.low - 1
        if number < self.low:
            self.fail(f"{value!r} is not a whole number of at least {self.low}", param, ctx)
        return number


class Homes(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """A rule of :class:`moeplace.execution.Execution`."""

    name = "rule"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the name; what follows a colon is checked where it is used."""
        name, colon, _ = str(value).partition(":")
        if name not in self.known or (colon and name != "affinity"):
            self.fail(f"{value!r} is none of {', '.join(self.known)}, affinity:N", param, ctx)
        return str(value)


class KeyValue(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """``KEY=VALUE``."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the first ``=``."""
        if isinstance(value, tuple):
            return (str(value[0]), str(value[1]))
        key, equals, text = str(value).partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key.strip().replace("_", "-"), text.strip()
