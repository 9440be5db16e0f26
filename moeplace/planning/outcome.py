"""What came of a deployment: its times, its price, and which constraints it breaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moeplace.frozen import replaced
from moeplace.planning.deployment import Deployment

HOUR_S = 3600.0
DIGITS = 6
TIMED, BOUNDED, UNTIMED = "timed", "bounded", "untimed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """A constraint that a deployment breaks: which, what it would need, what is allowed; the need may be a bound."""

    constraint: str
    needed: float
    allowed: float
    unit: str
    at_least: bool = False

    @property
    def excess(self) -> float:
        """How far beyond, relatively; comparable between constraints."""
        return self.needed / self.allowed - 1 if self.allowed > 0 else float("inf")

    def __str__(self) -> str:
        least = "at least " if self.at_least else ""
        return f"{self.constraint} {least}{self.needed:.4g} {self.unit} of {self.allowed:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One deployment judged.

    Attributes
    ----------
    deployment
        What was judged.
    kind
        ``timed``; ``bounded`` where bounds showed that others are better in everything; ``untimed`` where it was ruled
        out before.
    tpot_ms
        ``mean`` and the chosen percentile of the time of a decode step, and what else was measured.
    ttft_ms
        The percentile of the time of a prefill step with one prompt on every GPU; None unless asked for.
    tokens_per_s
        Tokens of the whole instance.
    parts_us
        Part of a step → µs, mean over steps; ``hidden`` is what overlaps.
    memory_gb
        Kind of content → GB on the fullest GPU.
    usd, watts
        Part of the bill → price, watts (None: unknown).
    usd_per_hour
        Cost of an hour; None where a price is unknown.
    breaches
        Constraints that are broken.
    details
        What else explains the figures.
    """

    deployment: Deployment
    kind: str = TIMED
    tpot_ms: Mapping[str, float] = field(default_factory=dict)
    ttft_ms: float | None = None
    tokens_per_s: float = 0.0
    parts_us: Mapping[str, float] = field(default_factory=dict)
    memory_gb: Mapping[str, float] = field(default_factory=dict)
    usd: Mapping[str, float | None] = field(default_factory=dict)
    watts: Mapping[str, float | None] = field(default_factory=dict)
    usd_per_hour: float | None = None
    breaches: tuple[Breach, ...] = ()
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def feasible(self) -> bool:
        """Whether it was timed and breaks nothing."""
        return self.kind == TIMED and not self.breaches

    @property
    def per_gpu(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens_per_s / self.deployment.num_gpus

    @property
    def per_usd(self) -> float | None:
        """Tokens for each unit of money: an hour's tokens over an hour's cost."""
        return None if not self.usd_per_hour else self.tokens_per_s * HOUR_S / self.usd_per_hour

    @property
    def usd_per_million(self) -> float | None:
        """Cost of a million tokens."""
        per = self.per_usd
        return None if not per else 1e6 / per

    @property
    def total_watts(self) -> float | None:
        """Watts of the instance."""
        known = [value for value in self.watts.values() if value is not None]
        return sum(known) if known and len(known) == len(self.watts) else None

    @property
    def per_watt(self) -> float | None:
        """Tokens per second and watt: tokens per joule."""
        watts = self.total_watts
        return None if not watts else self.tokens_per_s / watts

    @property
    def latency_ms(self) -> float:
        """Time per output token at the chosen percentile."""
        return self.tpot_ms.get("slo", self.tpot_ms.get("mean", 0.0))

    def replace(self, **changes: object) -> Outcome:
        """Copy with some fields changed."""
        return replaced(self, **changes)

    def to_dict(self, *, exact: bool = False) -> dict[str, Any]:
        """Return it for a document; ``exact`` keeps all digits, so that it can be read back as it is."""
        if exact:
            own = {name: getattr(self, name) for name in self.__slots__}
            own["breaches"] = [asdict(breach) for breach in self.breaches]
            return own | {"deployment": self.deployment.to_dict()}
        plain = {
            "kind": self.kind,
            "tpot_ms": _rounded(self.tpot_ms),
            "ttft_ms": _round(self.ttft_ms),
            "tokens_per_s": _round(self.tokens_per_s),
            "parts_us": _rounded(self.parts_us),
            "memory_gb": _rounded(self.memory_gb),
            "usd": _rounded(self.usd),
            "watts": _rounded(self.watts),
            "usd_per_hour": _round(self.usd_per_hour),
            "breaches": [asdict(breach) for breach in self.breaches],
            "details": _rounded(self.details),
        }
        figures = {name: _round(getattr(self, name)) for name in FIGURES}
        return {"deployment": self.deployment.to_dict(), **plain, "figures": figures}

    @classmethod
    def of_dict(cls, document: Mapping[str, Any]) -> Outcome:
        """Read what :meth:`to_dict` returned."""
        fields = {name: document[name] for name in cls.__slots__}
        fields["deployment"] = Deployment.of_dict(document["deployment"])
        fields["breaches"] = tuple(Breach(**breach) for breach in document["breaches"])
        return cls(**fields)


FIGURES = ("per_gpu", "per_usd", "per_watt", "usd_per_million", "latency_ms")


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS + 3}g}")


def _rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: _round(value) for name, value in values.items()}
