"""What a synthetic trace should measure like, what it does, and how far the two may be apart."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from moeplace.errors import InputError
from moeplace.model import ModelSpec

TOLERANCES = {  # how far a measured value may be from the one asked for: relative, absolute (the larger counts)
    "sigma": (0.10, 0.03),
    "domain_distance": (0.10, 0.02),
    "drift": (0.15, 0.02),
    "mutual_information": (0.10, 0.03),
    "rank_correlation": (0.0, 0.06),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSpec:
    """What a synthetic trace should measure like; the defaults are the middle of published traces.

    Drift is a turn of 100,000 tokens: a trace of whole turns measures what was asked for, a shorter one is a little
    more skewed, and its phases agree a little more, as it holds a part of the turn only.

    Attributes
    ----------
    sigma
        Standard deviation of ln(load) over a layer's experts, median over layers: 0.2 is mild, 0.5 a pool of
        domains, 1.0-1.2 a single domain, 1.6 a top-1 model.
    domains
        Domains, one per request, equally frequent.
    domain_distance
        Total variation between two domains' loads, mean over pairs and layers; 0.25-0.5 in published traces.
    drift
        Total variation between consecutive chunks of 25,000 tokens, mean over layers; 0.05-0.25. 0 asks for none:
        what requests differ by remains.
    mutual_information
        Bits between adjacent layers, bias taken off, median over layers; 0.4-0.6, about 1 for top-1 models.
    rank_correlation
        Spearman's ρ of prefill's and decode's loads, median over layers; about 0.8.
    hot
        Load of each layer's hottest expert over the mean; 0 leaves it to ``sigma``, which otherwise describes the
        other experts.
    request_tokens, prompt_share
        Tokens of a request, and the share of them that is prefill.
    """

    sigma: float = 0.5
    domains: int = 6
    domain_distance: float = 0.35
    drift: float = 0.12
    mutual_information: float = 0.5
    rank_correlation: float = 0.8
    hot: float = 0.0
    request_tokens: int = 512
    prompt_share: float = 0.5

    def __post_init__(self) -> None:
        ranges = {
            "sigma": (0, 3),
            "domains": (1, 256),
            "domain_distance": (0, 0.95),
            "drift": (0, 0.95),
            "mutual_information": (0, 4),
            "rank_correlation": (0, 1),
            "hot": (0, math.inf),
            "request_tokens": (1, 65_536),
            "prompt_share": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name.replace('_', ' ')} {value}", rule=f"between {low} and {high}")

    @classmethod
    def of_model(cls, model: ModelSpec) -> SynthSpec:
        """Return the defaults for a model: more skew, affinity and one hot expert where a token chooses only one."""
        # where a choice is one of few experts, there is less to tell
        choices = model.num_experts / model.top_k
        if model.top_k > 1:
            return cls(mutual_information=min(0.5, choices / 16))
        return cls(sigma=1.6, mutual_information=min(1.0, choices / 32), hot=min(16.0, choices / 4))

    @property
    def expected_successor_share(self) -> float:
        """Share of transitions on an expert's busiest fifth of successors that ``sigma`` and the bits imply.

        ``Φ(sqrt(σ² + 2·ln 2·I) − Φ⁻¹(0.8))``: what a log-normal successor distribution of that spread holds. With
        published values (σ 0.5, 0.4-0.6 bits) it is 52-57 %, as published.
        """
        from statistics import NormalDist

        law = NormalDist()
        return law.cdf(math.sqrt(self.sigma**2 + 2 * math.log(2) * self.mutual_information) - law.inv_cdf(0.8))

    def replace(self, **changes: Any) -> SynthSpec:
        """Copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What a sample measures, in the units of :class:`SynthSpec`; None where it cannot be measured."""

    sigma: float
    domain_distance: float | None
    drift: float | None
    mutual_information: float | None
    rank_correlation: float | None

    def error(self, spec: SynthSpec, name: str) -> float:
        """How far a value is from its target, in tolerances; 0 for what is not measured or asked to be 0."""
        value, target = getattr(self, name), getattr(spec, name)
        if value is None or target == 0:
            return 0.0
        relative, absolute = TOLERANCES[name]
        return float(abs(value - target)) / max(relative * target, absolute)

    def worst(self, spec: SynthSpec) -> tuple[float, str]:
        """Return the largest error in tolerances, and whose it is."""
        return max((self.error(spec, name), name) for name in TOLERANCES)
