r"""Predicted time of the mean step: epigraphs of the busiest GPU and of the busiest link, layer by layer.

Every copy adds fixed µs of memory and of arithmetic to its GPU, so a layer's compute is the largest of two sums per
GPU. With low-latency kernels what a link carries is linear in the traffic. Its coefficients are read off the one
definition of cost by timing unit traffic from each GPU to each other. Under dispatch-combine traffic is linear in the
placement. Under context-coherent execution it is a product of two layers' placements, here a flow ``F[e, n, g, h]`` of
the pairs that leave a copy of ``e`` on ``g`` for GPU ``h``, with ``M_e`` pairs leaving ``e`` in all:

    Σ_h F = M_e/n·on[l, e, n, g],   Σ_{n,g} F = Σ_{f,m} T[e, f]/m·on[l+1, f, m, h],
    F[e, n, g, h] ≥ (Σ_{f,m} T[e, f]/m·on[l+1, f, m, h] - M_e·(1 - on[l, e, n, g]))/n

At whole points all of ``e``'s flow leaves from its copies, evenly: the last row, needed only with copies, says that
every copy has its share.
"""

from __future__ import annotations

import functools

import numpy as np

from moeplace.compute import ExpertCompute
from moeplace.frozen import Floats, Ints
from moeplace.joint.decision import Decision, Terms
from moeplace.joint.parts import Epigraphs, Part
from moeplace.network import LOW_LATENCY, Traffic, exchange, stages_us
from moeplace.objective import copy_costs, home_selections
from moeplace.placement import Placement
from moeplace.problem import CONTEXT_COHERENT, Problem

Stages = list[list[Floats]]
Flow = tuple[int, int, float, Terms]  # variable, where it leaves, share of a copy, where it arrives


def unit_stages(problem: Problem, *, returning: bool = False) -> Stages:
    """Phases of chunks of ``[round, link, from GPU, to GPU]`` µs that one copy keeps each link busy."""
    model, gpus = problem.model, problem.num_gpus
    one_each = np.eye(gpus * gpus).reshape(-1, gpus, gpus)
    size = float(model.bytes_per_copy_combine if returning else model.bytes_per_copy_dispatch)
    phases = stages_us(problem.topology, one_each, bytes_per_copy=size, returning=returning)
    return [[np.moveaxis(busy, 0, -1).reshape(*busy.shape[1:], gpus, gpus) for busy in chunks] for chunks in phases]


def add_times(decision: Decision, start: Floats | None, most: float) -> Part:
    """Add the time of the mean step [µs].

    Parameters
    ----------
    decision
        The placement.
    start, most
        A feasible point of the placement and its time; no optimum takes longer. None and infinite without one.
    """
    tops, flows = Epigraphs(decision.model), list[Flow]()
    costs: Terms = [(v, 1.0) for v in _compute(decision, tops)]
    if decision.problem.dataflow == CONTEXT_COHERENT:
        costs += [(v, 1.0) for v in _moves(decision, tops, flows)]
    else:
        costs += [(v, 1.0) for v in _dispatch(decision, tops)]

    def complete(point: Floats, placement: Placement) -> None:
        del placement
        for variable, leaves, share, arrives in flows:
            point[variable] = point[leaves] * share * sum(a * point[v] for v, a in arrives)
        tops.complete(point)

    if start is not None:
        point = np.pad(start, (0, decision.model.num_variables - len(start)))
        complete(point, decision.placement(point))
        tops.tighten(most, point, costs)
    return Part(costs=costs, scale=1.0, complete=complete)


def _compute(decision: Decision, tops: Epigraphs) -> list[int]:
    """Time of each layer's busiest GPU: a memory and an arithmetic sum for each."""
    problem, topology = decision.problem, decision.problem.topology
    compute = ExpertCompute.of(problem.model, topology.accelerator, problem.law.phase)
    home_rows = problem.law.step_tokens / problem.num_gpus
    speed = np.ones(problem.num_gpus) if topology.gpu_speed is None else topology.gpu_speed
    by_count = [
        copy_costs(problem, np.full((problem.num_layers, problem.num_experts), n), compute)
        for n in decision.counts.tolist()
    ]
    none, never = np.zeros(1), np.full(1, -np.inf)
    # one kind of time alone, the other being less than anything
    alone = (compute.expected_rank_us(none, never, home_rows), compute.expected_rank_us(never, none, home_rows))
    found = []
    for layer in range(problem.num_layers):
        sums = [
            (decision.weighted(layer, g, weight / speed[g]), float(fixed[0]) / float(speed[g]))
            for g in range(problem.num_gpus)
            for kind, fixed in enumerate(alone)
            for weight in [np.stack([costs[kind][layer] for costs in by_count], axis=1)]
        ]
        found.append(tops.at_least(f"compute{layer}", sums))
    return found


def _dispatch(decision: Decision, tops: Epigraphs) -> list[int]:
    """Times of dispatch and of combine, of each layer."""
    problem = decision.problem
    fixed, homes = _fixed_us(problem), home_selections(problem) * problem.law.step_tokens
    found = []
    for name, returning in (("dispatch", False), ("combine", True)):
        stages = unit_stages(problem, returning=returning)
        for layer, rows in enumerate(homes):
            variables = decision.on[layer].ravel()
            # [round, link, expert, copies-1, GPU]: what one copy brings from all homes
            weights = [
                [
                    _spread(busy, rows)[:, :, :, None, :] / decision.counts[:, None] * np.ones((decision.most, 1))
                    for busy in chunks
                ]
                for chunks in stages
            ]
            found.append(_exchange(tops, f"{name}{layer}", variables, weights, fixed))
    return found


def _spread(busy: Floats, rows: Floats) -> Floats:
    """``[round, link, expert, GPU]`` µs of an expert's rows [home, expert]; one row is for all homes alike."""
    by_home = busy.sum(axis=2, keepdims=True) if len(rows) == 1 else busy
    spread: Floats = np.einsum("rqsd,se->rqed", by_home, rows)
    return spread


def _moves(decision: Decision, tops: Epigraphs, flows: list[Flow]) -> list[int]:
    """Times of the moves from each layer to the next."""
    problem = decision.problem
    transition = problem.stats.transition
    if transition is None:
        raise ValueError("no transitions")
    fixed, stages = _fixed_us(problem), unit_stages(problem)
    gpus = problem.num_gpus
    # flows count parts of pairs, of which copies on both sides leave a whole number; a step has this many of each
    parts = decision.multiple**2
    unit = problem.law.step_tokens / problem.stats.num_tokens / parts
    found = []
    for layer, table in enumerate(transition):
        variables = [_flow(decision, (layer, e), row * parts, flows) for e, row in enumerate(table) if row.any()]
        count = len(variables) * decision.most
        weights = [
            [np.broadcast_to(busy[:, :, None] * unit, (*busy.shape[:2], count, gpus, gpus)) for busy in chunks]
            for chunks in stages
        ]
        found.append(_exchange(tops, f"move{layer}", np.array(variables, np.int64).ravel(), weights, fixed))
    return found


def _flow(decision: Decision, place: tuple[int, int], row: Ints, flows: list[Flow]) -> Ints:
    """``[copies-1, GPU, GPU]`` flows out of one expert ``place`` (layer, expert), ``row`` [next expert] in all."""
    model, (layer, e) = decision.model, place
    gpus, leaving = decision.on.shape[3], float(row.sum())
    make = functools.partial(model.integer, implied=True) if decision.is_whole else model.continuous
    variables = np.zeros((decision.most, gpus, gpus), np.int64)
    arrivals = [decision.weighted(layer + 1, h, row[:, None] / decision.counts) for h in range(gpus)]
    for n, g in np.ndindex(decision.most, gpus):
        on, share = int(decision.on[layer, e, n, g]), 1 / (n + 1)
        for h in range(gpus):
            upper = leaving * share
            variable = make(f"flow{layer}_{e}_{n + 1}_{g}_{h}", 0, upper)
            variables[n, g, h] = variable
            flows.append((variable, on, share, arrivals[h]))
            if decision.most > 1:
                brought = [(v, -a * share) for v, a in arrivals[h]]
                model.add([(variable, 1.0), *brought, (on, -upper)], lower=-upper)
        model.add([*((int(v), 1.0) for v in variables[n, g]), (on, -leaving * share)], 0, 0)
    for h in range(gpus):
        left = [(int(v), 1.0) for v in variables[:, :, h].ravel()]
        model.add([*left, *((v, -a) for v, a in arrivals[h])], 0, 0)
    return variables


def _exchange(tops: Epigraphs, name: str, variables: Ints, weights: Stages, fixed: float) -> int:
    """Time of an exchange: ``fixed + Σ_phase max_chunk Σ_round max_link`` with ``weights`` [round, link, ...] µs."""
    if len(weights) == 1 and len(weights[0]) == 1 and len(weights[0][0]) == 1:
        return tops.at_least(name, _links(weights[0][0][0], variables, fixed))
    slowest = []
    for p, chunks in enumerate(weights):
        sums: list[tuple[Terms, float]] = []
        for c, rounds in enumerate(chunks):
            busiest = [
                tops.at_least(f"{name}_{p}_{c}_{r}", _links(busy, variables, 0.0)) for r, busy in enumerate(rounds)
            ]
            sums.append(([(v, 1.0) for v in busiest], 0.0))
        slowest.append(tops.at_least(f"{name}_{p}", sums))
    return tops.at_least(name, [([(v, 1.0) for v in slowest], fixed)])


def _links(busy: Floats, variables: Ints, fixed: float) -> list[tuple[Terms, float]]:
    """Sums of the links ``busy`` [link, ...], equal ones once."""
    rows = np.unique(busy.reshape(len(busy), -1), axis=0)
    names = variables.tolist()
    return [([(v, a) for v, a in zip(names, row, strict=True) if a], fixed) for row in rows.tolist()]


def _fixed_us(problem: Problem) -> float:
    """Fixed time of one direction of an exchange, hops of direct networks included."""
    nothing = Traffic(copies=np.zeros((problem.num_gpus, problem.num_gpus)))
    return exchange(problem.topology, nothing, kernel=LOW_LATENCY, bytes_per_copy=0.0).latency_us
