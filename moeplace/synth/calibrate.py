"""Calibration: turn the knobs of a synthetic router until a pilot sample measures what was asked for."""

from __future__ import annotations

import math

import numpy as np

from moeplace import measures
from moeplace.errors import InputError
from moeplace.insight import domain_distances, phase_agreement
from moeplace.model import ModelSpec
from moeplace.parts import CHUNK_TOKENS
from moeplace.profile import profile_trace
from moeplace.synth.routers import MOST_CERTAIN, Knobs
from moeplace.synth.spec import TOLERANCES, Reached, SynthSpec
from moeplace.synth.stream import SyntheticTrace
from moeplace.trace import Trace, concatenate

PILOT_LAYERS, PILOT_CHOICES, PILOT_EXPERTS = 8, 128, 2048  # layers of a pilot: more where they are small
PILOT_CHUNKS = 4  # a whole turn of the mix of topics
SEARCH_STEPS = 12
GOOD_ENOUGH, PATIENCE = 0.3, 0.08  # of the tolerances: where the search stops, and how that rises with each step
INFORMATION_PAIRS = 1_500_000  # k·k per token, for mutual information
MOST_TURN = 2.0  # a knob at most doubles or halves in a step


def synthesise(model: ModelSpec, spec: SynthSpec, tokens: int, seed: int) -> SyntheticTrace:
    """Calibrate a generator and return its trace, not drawn yet.

    Parameters
    ----------
    model
        Its MoE shape and routing groups are used.
    spec
        What the trace should measure like.
    tokens
        Tokens per layer.
    seed
        The same arguments give the same tokens.

    Returns
    -------
    SyntheticTrace
        A stream; ``reached`` holds what a pilot sample of 100,000 tokens and a few layers measured.

    Raises
    ------
    InputError
        A value cannot be had with this model: what the nearest one is.
    """
    knobs, reached = calibrate(model, spec, seed)
    return SyntheticTrace(model=model, spec=spec, num_tokens=tokens, seed=seed, knobs=knobs, reached=reached)


def calibrate(model: ModelSpec, spec: SynthSpec, seed: int) -> tuple[Knobs, Reached]:
    """Turn the knobs until a pilot sample measures what is asked for, each value well within its tolerance.

    All knobs move at once, each by the ratio of what is asked to what was measured (they act nearly apart, so a few
    steps do); the best of at most :data:`SEARCH_STEPS` pilots is taken. Deterministic.
    """
    if model.top_k == model.num_experts:
        raise InputError(f"top-{model.top_k} of {model.num_experts} experts", rule="a token leaves some experts out")
    most = MOST_CERTAIN * model.num_experts / model.top_k
    if spec.hot > most:
        raise InputError(f"hot {spec.hot:g}", rule=f"at most {most:.1f}: no expert serves more than every token")
    knobs = Knobs(
        popularity=spec.sigma,
        domain=2.0 * spec.domain_distance if spec.domains > 1 else 0.0,
        topic=2.8 * math.sqrt(spec.mutual_information),
        agreement=2 * math.sin(math.pi * spec.rank_correlation / 6),
        wander=3.0 * spec.drift,
    )
    reached = pilot(model, spec, knobs, seed)
    best = knobs, reached
    for step in range(SEARCH_STEPS):
        if best[1].worst(spec)[0] <= GOOD_ENOUGH + PATIENCE * step:
            break
        knobs = _turned(knobs, spec, reached)
        reached = pilot(model, spec, knobs, seed)
        best = min(best, (knobs, reached), key=lambda pair: pair[1].worst(spec)[0])
    if best[1].worst(spec)[0] > 1:
        raise _unreachable(spec, best[1])
    return best


def pilot(model: ModelSpec, spec: SynthSpec, knobs: Knobs, seed: int) -> Reached:
    """Measure a sample of the first layers: what the whole trace will measure, but for noise."""
    layers = max(PILOT_LAYERS, min(PILOT_CHOICES // model.top_k, PILOT_EXPERTS // model.num_experts))
    small = model.replace(moe_layer_ids=model.moe_layer_ids[:layers])
    tokens = PILOT_CHUNKS * CHUNK_TOKENS
    stream = SyntheticTrace(model=small, spec=spec, num_tokens=tokens, seed=seed, knobs=knobs)
    return measured(concatenate(stream.blocks(), stream.meta), spec)


def measured(trace: Trace, spec: SynthSpec) -> Reached:
    """Measure a trace in the units of a specification. Complexity: O(tokens·layers·k²)."""
    profile = profile_trace(trace)
    load = profile.load.sum(axis=(0, 1))
    if spec.hot:
        load = np.sort(load, axis=1)[:, :-1]
    _, rows = domain_distances(profile)
    distances = [rows[a][b] for a in range(len(rows)) for b in range(a)]
    phases = phase_agreement(profile)
    information = [_information(trace, layer) for layer in range(trace.meta.num_layers - 1)]
    return Reached(
        sigma=float(np.median([measures.log_spread(row) for row in load])),
        domain_distance=float(np.mean(distances)) if distances else None,
        drift=float(profile.drift.mean()) if profile.drift.size else None,
        mutual_information=float(np.median(information)) if information else None,
        rank_correlation=None if phases is None else float(np.median(phases.rank_correlation)),
    )


def _information(trace: Trace, layer: int) -> float:
    stride = -(-trace.num_tokens * trace.meta.top_k**2 // INFORMATION_PAIRS)
    ids = trace.experts[::stride]
    table = measures.pair_table(ids[:, layer], ids[:, layer + 1], trace.meta.num_experts)
    bias = measures.information_bias(table, len(ids), trace.meta.top_k)
    return max(0.0, measures.mutual_information(table) - bias)


def _turned(knobs: Knobs, spec: SynthSpec, reached: Reached) -> Knobs:
    """Turn each knob by what is asked over what was measured, in the power with which it acts."""
    turns = {
        "popularity": _ratio(spec.sigma, reached.sigma),
        "domain": _ratio(spec.domain_distance, reached.domain_distance),
        "topic": _ratio(spec.mutual_information, reached.mutual_information) ** 0.6,
        "wander": _ratio(spec.drift, reached.drift),
    }
    turned = {name: getattr(knobs, name) * turn for name, turn in turns.items()}
    if reached.rank_correlation is not None:
        # on Fisher's scale, where equal steps are equally hard
        ask, got, now = (
            math.atanh(min(max(value, -0.999), 0.999))
            for value in (spec.rank_correlation, reached.rank_correlation, knobs.agreement)
        )
        turned["agreement"] = min(1.0, max(0.0, math.tanh(now + ask - got)))
    return knobs.replace(**turned)


def _ratio(asked: float, got: float | None) -> float:
    if got is None or asked == 0:
        return 1.0
    return min(MOST_TURN, max(1 / MOST_TURN, asked / max(got, 1e-9)))


def _unreachable(spec: SynthSpec, reached: Reached) -> InputError:
    _, name = reached.worst(spec)
    relative, absolute = TOLERANCES[name]
    return InputError(
        f"{name.replace('_', ' ')} {getattr(spec, name):g} is out of reach here: {getattr(reached, name):.3g} came out",
        rule=f"within {relative:.0%} or {absolute} of what was asked",
        hint="ask for a value nearer to that, or for less of the others: they pull on each other",
    )
