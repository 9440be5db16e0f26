"""Means, quantiles and tails of a sample, each with a 95 % interval, and the noise floor of perfect balance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeplace.frozen import Floats

QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
TAIL = 0.95
CONFIDENCE = 0.95
MEAN = "mean"
CVAR = "cvar95"
RISKS = (MEAN, "p95", "p99", CVAR)
RESAMPLES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value estimated from a sample, with a 95 % interval."""

    value: float
    low: float
    high: float


def summarise(sample: Floats) -> Mapping[str, Estimate]:
    """Return mean, p50, p95, p99 and cvar95 of a sample, with intervals.

    Quantiles are order statistics (the smallest value with at least that share of the sample at or below it), their
    intervals those of the binomial number of values below the true quantile; the mean's is Student's t; CVaR95, the
    mean of the worst 5 %, is bootstrapped with a fixed seed.
    """
    result = {"mean": _mean(sample)}
    ordered = np.sort(sample)
    result |= {name: quantile(ordered, share) for name, share in QUANTILES.items()}
    result["cvar95"] = _cvar(sample)
    return result


def paired(sample: Floats, base: Floats) -> Estimate:
    """Relative change of the mean against a base measured on the same steps, with Student's t interval of the pairs.

    The base's own mean is taken as known: what varies from step to step alike in both does not widen the interval.
    """
    change = _mean(np.asarray(sample, np.float64) - base)
    mean = float(np.mean(base))
    return Estimate(value=change.value / mean, low=change.low / mean, high=change.high / mean)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of one quantity over seeds, with Student's t interval of its values; that of a single seed as it is."""
    if len(estimates) == 1:
        return estimates[0]
    return _mean(np.array([estimate.value for estimate in estimates]))


def risk_value(sample: Floats, risk: str) -> float:
    """Value of one of :data:`RISKS` on a sample: its mean, an order statistic, or the mean of its worst 5 %.

    None falls when a value of the sample rises, so a floor of every value gives a floor of each.
    """
    if risk == MEAN:
        return float(sample.mean())
    if risk in QUANTILES:
        return quantile(np.sort(sample), QUANTILES[risk]).value
    return cvar(sample)


def quantile(ordered: Floats, share: float) -> Estimate:
    """Order statistic of a sorted sample, with its distribution-free interval (David & Nagaraja 2003, §7.1)."""
    from scipy.stats import binom

    count = len(ordered)
    index = min(count - 1, max(0, int(np.ceil(share * count)) - 1))
    tail = (1 - CONFIDENCE) / 2
    low = int(binom.ppf(tail, count, share)) - 1
    high = int(binom.ppf(1 - tail, count, share))
    return Estimate(
        value=float(ordered[index]),
        low=float(ordered[min(index, max(0, low))]),
        high=float(ordered[max(index, min(count - 1, high))]),
    )


def tail_steps(count: int, share: float) -> float:
    """Return how many of ``count`` steps lie beyond a quantile; below 10 its estimate is rough."""
    return count * (1 - share)


def cvar(sample: Floats, share: float = TAIL) -> float:
    """Mean of the worst ``1-share`` of a sample, the boundary value weighted (Rockafellar & Uryasev 2002)."""
    ordered = np.sort(sample)[::-1]
    mass = (1 - share) * len(ordered)
    # (1-share)·n of a whole number comes out a hair below it in floating point
    whole = min(int(mass + 1e-9), len(ordered))
    part = max(0.0, mass - whole)
    total = float(ordered[:whole].sum()) + (part * float(ordered[whole]) if part > 1e-9 else 0.0)
    return total / mass


def _mean(sample: Floats) -> Estimate:
    from scipy.stats import t

    value = float(sample.mean())
    if len(sample) < 2:
        return Estimate(value=value, low=value, high=value)
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample)))
    return Estimate(value=value, low=value - half, high=value + half)


def _cvar(sample: Floats) -> Estimate:
    value = cvar(sample)
    rng = np.random.default_rng(0)
    drawn = [cvar(sample[rng.integers(0, len(sample), len(sample))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=value, low=min(value, float(low)), high=max(value, float(high)))


def noise_floor(num_gpus: int, selections_per_gpu: float) -> float:
    """max/mean load that perfect long-run balance still shows in a step: ``1 + z_R·sqrt((1-1/R)/m)``.

    ``z_R`` is the expected maximum of ``R`` independent standard normals, ``m`` the mean selections per GPU in a step.
    What a placement can still win is the excess over this.
    """
    if num_gpus < 2:
        return 1.0
    return 1.0 + expected_maximum(num_gpus) * float(np.sqrt((1 - 1 / num_gpus) / selections_per_gpu))


def expected_maximum(count: int) -> float:
    """Return the expected maximum of ``count`` independent standard normals, by quadrature."""
    from scipy.special import ndtr

    grid = np.linspace(-10.0, 10.0, 4001)
    # E max = a + ∫_a P(max > x) dx for any a that the maximum never falls below
    return float(grid[0] + np.trapezoid(1 - ndtr(grid) ** count, grid))
