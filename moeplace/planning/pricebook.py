"""Price books: what accelerators, NICs, switches and cables cost, dated, each number with its source.

A book is a TOML file; a user's own may hold only what differs and takes the rest over from the book it names in
``like`` (default ``street``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moeplace.errors import InputError, unknown_name
from moeplace.frozen import replaced
from moeplace.presets import Entry, is_path, user_file

DEFAULT_BOOK = "street"
HOURS_PER_YEAR = 8766.0
_FOLDER = "prices"
_TEXTS = ("date", "unit", "like")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPrices:
    """Prices of network parts, per GB/s (1e9 bytes per second, one direction) of a port or cable.

    Attributes
    ----------
    switch_usd_per_gb_per_s, switch_watts_per_gb_per_s, switch_gb_per_s
        A switch between nodes: for each GB/s of its ports; and the GB/s one switch joins, beyond which there is
        another tier.
    cable_usd_per_gb_per_s, cable_watts_per_gb_per_s
        A cable to or between such switches, with what is at its ends.
    nic_usd_per_gb_per_s, nic_watts_per_gb_per_s
        A network adapter.
    scale_up_switch_usd_per_gb_per_s, scale_up_switch_watts_per_gb_per_s, scale_up_switch_gb_per_s
        The same for switches of a scale-up domain.
    scale_up_cable_usd_per_gb_per_s, scale_up_cable_watts_per_gb_per_s, scale_up_cable_usd_each
        Scale-up cables and direct links: by bandwidth, and for each one however thin.
    """

    switch_usd_per_gb_per_s: float
    switch_watts_per_gb_per_s: float
    switch_gb_per_s: float
    cable_usd_per_gb_per_s: float
    cable_watts_per_gb_per_s: float
    nic_usd_per_gb_per_s: float
    nic_watts_per_gb_per_s: float
    scale_up_switch_usd_per_gb_per_s: float
    scale_up_switch_watts_per_gb_per_s: float
    scale_up_switch_gb_per_s: float
    scale_up_cable_usd_per_gb_per_s: float
    scale_up_cable_watts_per_gb_per_s: float
    scale_up_cable_usd_each: float

    def times(self, factor: float) -> NetworkPrices:
        """Every price ``factor`` times; watts and sizes as they are."""
        return replaced(self, **{f.name: factor * getattr(self, f.name) for f in _fields() if "_usd_" in f.name})


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBook:
    """Prices of one date.

    Attributes
    ----------
    name, date, unit
        What the book is called, when its prices were taken, and their unit (``USD``).
    network
        Prices of network parts.
    accelerator_usd, accelerator_watts
        Accelerator → price and watts of one with its share of the server; where nothing is known it is absent.
    amortisation_years, usd_per_kwh, power_overhead
        What turns prices and watts into costs per hour.
    sources
        Dotted key → where its number comes from.
    """

    name: str
    date: str
    unit: str
    network: NetworkPrices
    accelerator_usd: Mapping[str, float]
    accelerator_watts: Mapping[str, float]
    amortisation_years: float
    usd_per_kwh: float
    power_overhead: float
    sources: Mapping[str, str]

    def per_hour(self, usd: float, watts: float | None) -> float:
        """Cost of an hour: the price spread over the years, and the electricity."""
        power = (watts or 0.0) * self.power_overhead / 1000 * self.usd_per_kwh
        return usd / (self.amortisation_years * HOURS_PER_YEAR) + power

    def numbers(self) -> dict[str, float]:
        """Dotted key → number, all of the book's, sorted."""
        found: dict[str, float] = {}
        for key in self.sources:
            table, _, rest = key.partition(".")
            name, _, what = rest.rpartition(".")
            if table == "accelerators":
                found[key] = (self.accelerator_usd if what == "usd" else self.accelerator_watts)[name]
            else:
                found[key] = getattr(self.network if table == "network" else self, rest)
        return found

    def replace(self, **changes: object) -> PriceBook:
        """Copy with some fields changed."""
        return replaced(self, **changes)


def list_price_books() -> tuple[str, ...]:
    """Names of the books that come with the library."""
    folder = resources.files("moeplace").joinpath(_FOLDER)
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir()))


def load_price_book(name: str | Path = DEFAULT_BOOK) -> PriceBook:
    """Load a price book by name, or a user's own TOML file.

    Raises
    ------
    UnknownNameError
        There is no such book, or it has a key that no book has; near names are suggested.
    InputError
        The file cannot be read, or a number in it is none or is negative.

    Examples
    --------
    >>> load_price_book("megascale").accelerator_usd["h20"]
    1.85
    """
    entry = user_file(Path(name)) if is_path(name) else _packaged(str(name))
    values, sources = dict(entry.values), dict(entry.sources)
    if is_path(name):
        base = _packaged(str(values.pop("like", DEFAULT_BOOK)))
        values, sources = {**base.values, **values, "name": entry.name}, {**base.sources, **sources}
    return _book(dataclasses.replace(entry, values=values, sources=sources))


def _packaged(name: str) -> Entry:
    if name not in list_price_books():
        raise unknown_name("price book", name, list_price_books())
    with resources.as_file(resources.files("moeplace").joinpath(_FOLDER, f"{name}.toml")) as path:
        return user_file(path)


def _book(entry: Entry) -> PriceBook:
    numbers = {key: value for key, value in entry.values.items() if key not in (*_TEXTS, "name")}
    network = {key.removeprefix("network."): value for key, value in numbers.items() if key.startswith("network.")}
    known = {*(f"network.{f.name}" for f in _fields()), *_RUNNING}
    prices: dict[str, float] = {}
    watts: dict[str, float] = {}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise InputError(f"{key} is {value!r}", rule="a number of at least 0", where=entry.at(key))
        accelerator, _, what = key.removeprefix("accelerators.").rpartition(".")
        if key.startswith("accelerators.") and what in ("usd", "watts"):
            (prices if what == "usd" else watts)[accelerator] = float(value)
        elif key not in known:
            raise unknown_name("key", key, [*sorted(known), "accelerators.NAME.usd"], where=str(entry.at(key)))
    if missing := sorted(known - set(numbers)):
        raise InputError(f"the key {missing[0]!r} is missing", rule="a book has every price", where=entry.at())
    if not numbers["running.amortisation_years"] or not min(network[f"{n}switch_gb_per_s"] for n in ("", "scale_up_")):
        raise InputError("a size or time is 0", rule="amortisation and switch sizes are above 0", where=entry.at())
    return PriceBook(
        name=str(entry.values.get("name", entry.name)),
        date=str(entry.values.get("date", "undated")),
        unit=str(entry.values.get("unit", "USD")),
        network=NetworkPrices(**{key: float(value) for key, value in network.items()}),
        accelerator_usd=MappingProxyType(prices),
        accelerator_watts=MappingProxyType(watts),
        **{key.removeprefix("running."): float(numbers[key]) for key in _RUNNING},
        sources=MappingProxyType({key: entry.sources[key] for key in sorted(numbers)}),
    )


_RUNNING = ("running.amortisation_years", "running.usd_per_kwh", "running.power_overhead")


def _fields() -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(NetworkPrices)
