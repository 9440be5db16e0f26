"""What MoETuner's stages have reached, and how it is said: values, certified bounds, why each search ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from moeplace.frozen import Ints
from moeplace.milp import MilpResult
from moeplace.moetuner.clusters import Layer, balanced_start, deviation_bound
from moeplace.solution import Report, Stage, Status, StopReason

PROOF = 1e-6
SELECTIONS = "selections"
WORST_FIRST = (
    StopReason.INTERRUPTED,
    StopReason.TIME_LIMIT,
    StopReason.EXHAUSTED,
    StopReason.GAP,
    StopReason.PROVEN,
)


class Tally:
    """ILP1 over all layers: clusters, deviations, bounds, and why each layer's search ended."""

    def __init__(self, name: str, layers: Sequence[Layer], report: Report) -> None:
        self.name, self.layers, self.report = name, layers, report
        self.clusters = [balanced_start(layer) for layer in layers]
        self.value = [layer.deviation(cluster) for layer, cluster in zip(layers, self.clusters, strict=True)]
        self.bound = [deviation_bound(layer) for layer in layers]
        within = [layer.cluster_load(c).max() <= layer.cap for layer, c in zip(layers, self.clusters, strict=True)]
        self.missing = [i for i, fits in enumerate(within) if not fits]
        self.reasons = [StopReason.EXHAUSTED] * len(layers)
        self.infeasible: list[int] = []
        self.too_large = 0
        self.best = sum(self.value)
        if not self.missing:
            self._tell(f"{self.name} start")

    def is_proven(self, i: int) -> bool:
        """Whether a layer's start meets its bound."""
        proven = i not in self.missing and self.value[i] - self.bound[i] <= PROOF * self.value[i]
        if proven:
            self.reasons[i] = StopReason.PROVEN
        return proven

    def improved(self, i: int, value: float, bound: float | None) -> None:
        """A layer's search has news."""
        self.bound[i] = max(self.bound[i], min(value, bound or 0.0))
        if value < self.value[i]:
            self.value[i] = value
            if not self.missing and sum(self.value) < self.best * (1 - PROOF):
                self.best = sum(self.value)
                self._tell(self.name)

    def finish(self, i: int, result: MilpResult, cluster: Ints | None) -> None:
        """A layer's search is over."""
        self.reasons[i] = result.stop_reason
        if result.status is Status.INFEASIBLE:
            self.infeasible.append(i)
        if cluster is None:
            return
        self.clusters[i] = cluster
        self.value[i] = self.layers[i].deviation(cluster)
        self.bound[i] = min(self.value[i], max(self.bound[i], result.bound or 0.0))
        if i in self.missing:
            self.missing.remove(i)

    def stage(self) -> Stage:
        """The sum over layers as one stage."""
        reason = worst(self.reasons)
        if self.infeasible or self.missing:
            return Stage(
                name=self.name,
                objective=math.inf,
                bound=None,
                unit=SELECTIONS,
                status=Status.INFEASIBLE if self.infeasible else Status.UNKNOWN,
                stop_reason=StopReason.PROVEN if self.infeasible else reason,
            )
        return stage_of(self.name, sum(self.value), sum(self.bound), SELECTIONS, reason)

    def _tell(self, source: str) -> None:
        self.report.improved(source, sum(self.value), bound=sum(self.bound), unit=SELECTIONS)


def stage_of(name: str, value: float, bound: float, unit: str, reason: StopReason, gap: float = 0.0) -> Stage:
    """A stage with a solution: OPTIMAL when its bound meets its value, whatever a solver called it."""
    bound = min(bound, value)
    proven = value - bound <= PROOF * value
    if proven:
        reason = StopReason.PROVEN
    elif reason in (StopReason.PROVEN, StopReason.EXHAUSTED) and value - bound <= gap * value:
        reason = StopReason.GAP
    status = Status.OPTIMAL if proven else Status.FEASIBLE
    return Stage(name=name, objective=value, bound=bound, unit=unit, status=status, stop_reason=reason)


def worst(reasons: Iterable[StopReason]) -> StopReason:
    """The reason that says most against a result: a stop by the user first, a proof last."""
    present = list(reasons)
    return next((reason for reason in WORST_FIRST if reason in present), StopReason.EXHAUSTED)
