r"""Copies per token: token patterns with their numbers, and the places that each touches.

Tokens of a layer that choose the same experts are one pattern ``p`` with multiplicity ``m_p``; ``y[p, g] = 1`` where it
touches GPU (or node) ``g``, so ``y[p, g] ≥ on[l, e, g]`` for its experts, and ``Σ m_p·y / (tokens·layers)`` is what
:func:`moeplace.metrics.token_metrics` counts. A pattern of ``k`` experts touches at least ``⌈k/S⌉`` places of ``S``
slots. Which copy serves a token is a hash of the token, so with copies this is no model: experts are placed once here.
"""

from __future__ import annotations

import numpy as np

from moeplace.frozen import Floats, Ints
from moeplace.joint.decision import Decision, Terms
from moeplace.joint.parts import Part
from moeplace.placement import Placement
from moeplace.problem import Problem


def patterns(problem: Problem) -> list[tuple[Ints, Ints]]:
    """``[pattern, k]`` experts and ``[pattern]`` numbers of tokens, for each layer.

    Complexity: O(tokens · layers · k).
    """
    sample = problem.stats.sample
    if sample is None:
        raise ValueError("no token sample")
    found = []
    for layer in range(problem.num_layers):
        chosen = np.sort(sample.experts[:, layer].astype(np.int64), axis=1)
        distinct, number = np.unique(chosen, axis=0, return_counts=True)
        found.append((distinct, number))
    return found


def add_copies(decision: Decision) -> Part:
    """Add the copies. Size: O(patterns · places · k) terms."""
    problem, model = decision.problem, decision.model
    node = problem.topology.node_of_gpu()
    place = np.arange(problem.num_gpus) if problem.copies_level == "gpu" else node
    members = [np.flatnonzero(place == p) for p in range(int(place.max()) + 1)]
    slots = np.array([problem.slots_per_gpu[gpus].sum() for gpus in members])
    largest = int(slots.max()) * (problem.num_layers if problem.whole_model else 1)
    costs: Terms = []
    made: list[tuple[int, list[int]]] = []
    for layer, (distinct, number) in enumerate(patterns(problem)):
        for p, (experts, many) in enumerate(zip(distinct.tolist(), number.tolist(), strict=True)):
            touched: list[int] = []
            for q, gpus in enumerate(members):
                y = model.integer(f"y{layer}_{p}_{q}", 0, 1, implied=True)
                touched.append(y)
                held = decision.on[layer, experts][:, 0, gpus]
                for row in held.tolist():
                    model.add([(y, 1.0), *((v, -1.0) for v in row)], 0)
                made.append((y, held.ravel().tolist()))
            model.add([(y, 1.0) for y in touched], max(1, -(-len(experts) // largest)))
            costs += [(y, float(many)) for y in touched]

    def complete(point: Floats, placement: Placement) -> None:
        del placement
        for y, held in made:
            point[y] = float(max(point[v] for v in held))

    tokens = sum(int(number.sum()) for _, number in patterns(problem))
    return Part(costs=costs, scale=float(tokens), complete=complete)
