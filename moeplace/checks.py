"""Trace checks: what is wrong or odd with a recording, one sentence each, before anyone builds on it.

Each check is a function of the routing statistics or of the trace (walked block by block, in bounded memory) and
returns a list of findings, empty when all is well. Recorders fail in few ways, and these are the known ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moeplace import measures
from moeplace.affinity import RoutingStats
from moeplace.loops import LoopTally
from moeplace.model import ModelSpec
from moeplace.subset import dummy_run
from moeplace.trace import Counts, TraceStream

DOMINANT = 0.98  # share of tokens that choose one expert in a layer
FEW_REQUESTS = 32
ENOUGH_TOKENS = 64  # fewer rows (or selections per expert) prove nothing about what never varies
ORDER_TOKENS = 20_000  # of the sample, looked at for the order of ids

Level = Literal["warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes
    ----------
    level
        ``warning``: results built on the trace may be wrong; ``note``: worth knowing.
    check
        Name of the check, stable across versions.
    sentence
        What was found, with numbers.
    hint
        What to do about it.
    """

    level: Level
    check: str
    sentence: str
    hint: str

    def __str__(self) -> str:
        return f"{self.sentence} ({self.hint})"


def check_trace(
    source: TraceStream | Counts, stats: RoutingStats, loops: LoopTally, model: ModelSpec | None = None
) -> tuple[Finding, ...]:
    """Run every check, warnings first. Complexity: that of the statistics; the trace is read as far as it begins alike.

    Parameters
    ----------
    source, stats
        A trace and its statistics.
    loops
        Its repetition loops, as :func:`~moeplace.profile.profile_trace` counts them on its walk.
    model
        The model it should be of.
    """
    findings = check_stats(stats, model)
    if not isinstance(source, Counts):
        findings = [*identical_start(source), *repetition_loops(loops, stats), *findings]
    return tuple(sorted(findings, key=lambda finding: finding.level != "warning"))


def check_stats(stats: RoutingStats, model: ModelSpec | None = None) -> list[Finding]:
    """Run the checks that need only the statistics: these are cheap enough for every solve."""
    found = [finding for check in STATS_CHECKS for finding in check(stats)]
    return found + ([] if model is None else layer_numbers(stats, model))


def identical_start(source: TraceStream) -> list[Finding]:
    """Find a run of identical rows at the start: engines route a dummy batch to profile memory, and it gets recorded.

    vLLM's is 16,384 rows long. Reads only as far as the run goes.
    """
    length = dummy_run(source)
    if length == 0:
        return []
    return [
        Finding(
            level="warning",
            check="identical-start",
            sentence=f"the first {length:,} rows choose the same experts in every layer, as an engine's dummy "
            "profiling run does",
            hint="they are no requests: moeplace convert --drop-dummy-run leaves them out",
        )
    ]


def repetition_loops(loops: LoopTally, stats: RoutingStats) -> list[Finding]:
    """Find requests that repeat themselves, as :mod:`moeplace.loops` counts them."""
    if not loops.requests.size:
        return []
    share = loops.tokens / stats.num_tokens
    return [
        Finding(
            level="warning" if share > 0.05 else "note",
            check="repetition-loops",
            sentence=f"{loops.requests.size:,} of {stats.num_requests:,} requests run in loops of repeated tokens "
            f"({_percent(share)} of all tokens)",
            hint="leave them out unless your users' requests loop too: they overstate skew and affinity",
        )
    ]


def few_requests(stats: RoutingStats) -> list[Finding]:
    """Find a trace of so few requests that halves of it are different workloads."""
    if not 0 < stats.num_requests < FEW_REQUESTS:
        return []
    return [
        Finding(
            level="warning",
            check="few-requests",
            sentence=f"the trace holds {_plural(stats.num_requests, 'request')}: a placement fitted on them is fitted "
            "to them",
            hint=f"record at least {FEW_REQUESTS}, better hundreds, of the kinds you serve",
        )
    ]


def repeated_layers(stats: RoutingStats) -> list[Finding]:
    """Find layers that repeat another layer's choices token by token (for counts: its counts, expert by expert)."""
    load = stats.load
    copies: dict[int, int] = {}
    for layer in range(1, len(load)):
        alike = [first for first in range(layer) if first not in copies and _repeats(stats, first, layer)]
        if alike:
            copies[layer] = alike[0]
    if not copies:
        return []
    ids = stats.meta.layer_ids
    pairs = [f"{ids[copy]} repeats {ids[first]}" for copy, first in copies.items()]
    return [
        Finding(
            level="warning",
            check="repeated-layers",
            sentence=f"{_plural(len(copies), 'layer')} of {len(load)} repeat{'s' * (len(copies) == 1)} another layer "
            f"exactly: layer {', '.join(pairs[:4])}{', …' * (len(pairs) > 4)}",
            hint="the recorder wrote one layer under several ids: record again, or leave the copies out",
        )
    ]


def _repeats(stats: RoutingStats, first: int, layer: int) -> bool:
    if (stats.load[first] != stats.load[layer]).any() or _constant_set(stats, layer):
        return False
    if stats.sample is None:
        return bool(np.ptp(stats.load[layer]) > 0)
    ids = stats.sample.experts
    return bool((np.sort(ids[:, first], axis=1) == np.sort(ids[:, layer], axis=1)).all())


def always_chosen(stats: RoutingStats) -> list[Finding]:
    """Find experts that every token chooses in every layer: top-k of NaN scores returns the same ids each time."""
    if not _can_vary(stats):
        return []
    everywhere = np.flatnonzero(_everywhere(stats))
    if everywhere.size == 0:
        return []
    return [
        Finding(
            level="warning",
            check="always-chosen",
            sentence=f"every token chooses expert {_listed(everywhere)} in every layer, as a router does whose scores "
            "are NaN",
            hint="check the recorder and the precision of the router; a shared expert does not belong in the ids",
        )
    ]


def constant_layers(stats: RoutingStats) -> list[Finding]:
    """Find layers where all tokens choose the same k experts: dense layers or padding recorded as MoE layers."""
    layers = [layer for layer in range(len(stats.load)) if _constant_set(stats, layer)]
    if not layers or _everywhere(stats).sum() == stats.meta.top_k:
        return []
    names = [stats.meta.layer_ids[layer] for layer in layers]
    return [
        Finding(
            level="warning",
            check="constant-layers",
            sentence=f"in layer {_listed(names)} all tokens choose the same {stats.meta.top_k} experts",
            hint="dense layers have no experts to place: leave them out of the trace (--model knows which they are)",
        )
    ]


def dominated_layers(stats: RoutingStats) -> list[Finding]:
    """Find layers where one expert is chosen by about every token, though not in all layers."""
    if not _can_vary(stats):
        return []
    chosen = stats.load / _rows(stats)[:, None]
    everywhere = _everywhere(stats)
    found = []
    for layer in range(len(chosen)):
        expert = int(np.argmax(np.where(everywhere, 0, chosen[layer])))
        if chosen[layer, expert] >= DOMINANT and not everywhere[expert] and not _constant_set(stats, layer):
            found.append((stats.meta.layer_ids[layer], expert, chosen[layer, expert]))
    if not found:
        return []
    layer_id, expert, share = max(found, key=lambda row: row[2])
    return [
        Finding(
            level="warning",
            check="dominated-layers",
            sentence=f"in layer {_listed([row[0] for row in found])} one expert serves nearly every token: expert "
            f"{expert} of layer {layer_id} {_percent(share)}",
            hint="a collapsed router or a shared expert under a routed id; replicate it if it is real",
        )
    ]


def uneven_rows(stats: RoutingStats) -> list[Finding]:
    """Find layers that counted fewer selections than others (only counts can: traces have a row per layer)."""
    total = stats.load.sum(axis=1)
    short = np.flatnonzero(total < total.max())
    if short.size == 0:
        return []
    worst = int(np.argmin(total))
    names = [stats.meta.layer_ids[layer] for layer in short]
    return [
        Finding(
            level="warning",
            check="uneven-rows",
            sentence=f"{_plural(short.size, 'layer')} counted fewer selections than the others (layer "
            f"{_listed(names)}): layer {stats.meta.layer_ids[worst]} {_percent(float(total[worst] / total.max()))} of "
            "the most",
            hint="the recorder missed steps, or dropped tokens beyond an expert's capacity",
        )
    ]


def unused_experts(stats: RoutingStats) -> list[Finding]:
    """Find expert ids that no layer uses: ids that count from 1, a wrong number of experts, or a pruned model."""
    if float(stats.load.sum()) < ENOUGH_TOKENS * stats.meta.num_experts:
        return []
    unused = np.flatnonzero(stats.load.sum(axis=0) == 0)
    if unused.size == 0:
        return []
    used = np.flatnonzero(stats.load.sum(axis=0))
    hint = "the model may have fewer experts than declared (--model), or the domains here never need them"
    if unused.tolist() == list(range(int(used[0]))):
        hint = "the ids may count from 1, or start behind shared experts: subtract the offset"
    return [
        Finding(
            level="note",
            check="unused-experts",
            sentence=f"no layer ever uses expert {_listed(unused)} of {stats.meta.num_experts}",
            hint=hint,
        )
    ]


def top_k_order(stats: RoutingStats) -> list[Finding]:
    """Say whether the k ids of a token stand in the order of the router's scores, by id, or in no visible order.

    Ranked ids put popular experts first: their first choices are distributed otherwise than their last ones, by more
    than four times what chance gives, and more unevenly.
    """
    top_k, sample = stats.meta.top_k, stats.sample
    if sample is None or top_k < 2 or sample.num_tokens < ENOUGH_TOKENS:
        return []
    ids = sample.experts[:: -(-sample.num_tokens // ORDER_TOKENS)].astype(np.int32)
    steps = np.diff(ids, axis=2)
    if (steps > 0).all() or (steps < 0).all():
        text, hint = "are sorted by id", "the order of the scores is lost; nothing here needs it"
    elif _looks_ranked(stats, ids):
        text, hint = "look ranked by the router's scores", "the first id is the first choice"
    else:
        text, hint = "are in no visible order", "do not read the first id as the first choice"
    return [Finding(level="note", check="top-k-order", sentence=f"the {top_k} ids of a token {text}", hint=hint)]


def _looks_ranked(stats: RoutingStats, ids: npt.NDArray[np.int32]) -> bool:
    experts, tokens, votes = stats.meta.num_experts, len(ids), []
    for layer in range(ids.shape[1]):
        first, last = (np.bincount(ids[:, layer, place], minlength=experts) for place in (0, -1))
        noise = measures.sampling_variation((first + last) / (2 * tokens), tokens, tokens)
        differ = measures.total_variation(first, last) > 4 * noise
        votes.append(differ and measures.gini(first) > measures.gini(last))
    return sum(votes) > len(votes) / 2


def layer_numbers(stats: RoutingStats, model: ModelSpec) -> list[Finding]:
    """Compare the trace's layers with the model's: dense layers included, layers missing, or ids that are offset."""
    ours, theirs = stats.meta.layer_ids, model.moe_layer_ids
    if ours == theirs:
        return []
    if len(ours) == model.num_layers != len(theirs):
        text = f"the trace has {len(ours)} layers, as many as {model.name} has with its dense ones"
        hint = f"only layers {theirs[0]}..{theirs[-1]} have experts: leave the others out"
    elif len(ours) != len(theirs):
        text = f"the trace has {_plural(len(ours), 'MoE layer')}, {model.name} has {len(theirs)}"
        hint = "layers are missing or the model is another one"
    elif ours == tuple(range(len(ours))):
        text = f"the trace numbers its layers 0..{len(ours) - 1}, {model.name}'s are {theirs[0]}..{theirs[-1]}"
        hint = "taken as the MoE layers in order"
    else:
        text = f"the trace's layer ids {ours[0]}..{ours[-1]} are not {model.name}'s {theirs[0]}..{theirs[-1]}"
        hint = "an offset of one is the usual cause; taken as the MoE layers in order"
    level: Level = "note" if len(ours) == len(theirs) else "warning"
    return [Finding(level=level, check="layer-numbers", sentence=text, hint=hint)]


STATS_CHECKS: tuple[Callable[[RoutingStats], list[Finding]], ...] = (
    few_requests,
    repeated_layers,
    always_chosen,
    constant_layers,
    dominated_layers,
    uneven_rows,
    unused_experts,
    top_k_order,
)


def _rows(stats: RoutingStats) -> npt.NDArray[np.float64]:
    """``[layer]`` tokens routed in each layer."""
    return stats.load.sum(axis=1) / stats.meta.top_k


def _everywhere(stats: RoutingStats) -> npt.NDArray[np.bool_]:
    """``[expert]`` whether every token chooses it in every layer."""
    everywhere: npt.NDArray[np.bool_] = (stats.load == _rows(stats)[:, None]).all(axis=0)
    return everywhere


def _can_vary(stats: RoutingStats) -> bool:
    return stats.meta.top_k < stats.meta.num_experts and float(_rows(stats).min()) >= ENOUGH_TOKENS


def _constant_set(stats: RoutingStats, layer: int) -> bool:
    """Whether all tokens choose the same k experts of a layer."""
    return _can_vary(stats) and int((stats.load[layer] > 0).sum()) == stats.meta.top_k


def _listed(values: Sequence[int] | npt.NDArray[Any], most: int = 6) -> str:
    items = [str(value) for value in list(values)[:most]]
    return ", ".join(items) + (f", … ({len(values)} in all)" if len(values) > most else "")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
