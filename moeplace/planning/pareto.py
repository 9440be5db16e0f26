"""Deployments that no other beats in everything."""

from __future__ import annotations

from collections.abc import Sequence

from moeplace.planning.outcome import Outcome

PER_GPU, PER_USD, PER_WATT, LATENCY = "per-gpu", "per-usd", "per-watt", "latency"
RATES = (PER_USD, PER_GPU, PER_WATT)
AXES = (*RATES, LATENCY)


def merits(outcome: Outcome, axes: Sequence[str]) -> tuple[float, ...]:
    """Figures of an outcome on each axis, the larger the better; what is unknown counts as 0."""
    values = {
        PER_GPU: outcome.per_gpu,
        PER_USD: outcome.per_usd or 0.0,
        PER_WATT: outcome.per_watt or 0.0,
        LATENCY: -outcome.latency_ms,
    }
    return tuple(values[axis] for axis in axes)


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether ``a`` is at least as good as ``b`` everywhere and better somewhere."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def pareto_set(outcomes: Sequence[Outcome], axes: Sequence[str] = AXES) -> list[Outcome]:
    """Feasible outcomes that none of the others dominates, best on the first axis first.

    Of several with the same figures the first is kept. Complexity: O(outcomes · size of the set).
    """
    ranked = sorted(
        (outcome for outcome in outcomes if outcome.feasible),
        key=lambda outcome: (*(-value for value in merits(outcome, axes)), outcome.deployment.id),
    )
    kept: list[Outcome] = []
    seen: list[tuple[float, ...]] = []
    for outcome in ranked:
        own = merits(outcome, axes)
        if not any(dominates(other, own) or other == own for other in seen):
            kept.append(outcome)
            seen.append(own)
    return kept
