"""Which GPU of a plan is which rank of a machine: groups of experts keep together, their GPUs get other names.

Renaming GPUs leaves every GPU's load as it is and changes what its traffic costs on the way. With traffic tables
``T[l]`` between the GPUs of consecutive layers and costs ``C`` of every way, names ``n`` cost
``Σ_l Σ_{g,h} T[l, g, h]·C[n_l(g), n_{l+1}(h)]``.

Names may differ from layer to layer (:func:`name_layers`), as in MoETuner's second programme with a sum for its maximum
(arXiv 2502.06643, §4): the names of one layer given its neighbours' are an assignment problem, and where all ways
between GPUs cost the same, naming one layer after the other is the optimum, in exactly ``layers - 1`` of them, because
renaming all later layers alike changes nothing. Or they are the same in all layers (:func:`map_ranks`), a quadratic
assignment problem, improved by exchanges.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moeplace.frozen import Floats, Ints
from moeplace.network import LOW_LATENCY, Traffic, exchange
from moeplace.objective import mean_chain_traffic, objective_value
from moeplace.placement import Placement
from moeplace.problem import CONTEXT_COHERENT, CROSS, GPU, Problem

MOST_SWEEPS = 50
LESS = 1e-9
Same = npt.NDArray[np.bool_]


def rename_gpus(
    problem: Problem, placement: Placement, *, seed: int, tries: int, stop: Callable[[], bool]
) -> Placement:
    """Return a placement with its GPUs renamed for less traffic on the way, never worse in the problem's objective.

    Where tokens return home, each layer's groups of experts go to the ranks whose recorded tokens choose them most, an
    assignment problem per layer. Where they move from expert to expert: first layer by layer, then all layers alike,
    both by the cost of ways; on direct networks, where what counts is the
    busiest link, then by random exchanges in all layers alike as long as predicted times fall.

    Parameters
    ----------
    problem, placement
        What is renamed, and for what.
    seed, tries
        Of the random exchanges, and how many.
    stop
        Asked between them.
    """
    if problem.num_gpus < 2:
        return placement
    if problem.dataflow != CONTEXT_COHERENT:
        return _nearest_homes(problem, placement)
    if problem.stats.transition is None:
        return placement
    tables = mean_chain_traffic(problem, placement).copies
    cost = 1 / problem.topology.pair_bandwidth_gb_per_s()
    room = problem.slots_per_gpu
    same = np.broadcast_to(room[:, None] == room[None, :], cost.shape)
    options = [placement]
    if problem.objective == CROSS:
        cost = crossing_cost(problem, tie=cost)
    order = name_layers(tables, cost, same)
    options.append(placement.permute_gpus(order))
    named = _named(tables, order)
    mapped = map_ranks(named.sum(axis=0), cost, same)
    if problem.topology.is_direct:

        def time_us(order: Ints) -> float:
            moved = Traffic(copies=named[:, order[:, None], order[None, :]])
            bytes_per_copy = problem.model.bytes_per_copy_dispatch
            return float(
                exchange(problem.topology, moved, kernel=LOW_LATENCY, bytes_per_copy=bytes_per_copy).time_us.sum()
            )

        rng = np.random.default_rng(seed)
        mapped = min((np.arange(len(cost)), mapped), key=time_us)
        mapped = swap_while_better(mapped, same, time_us, rng=rng, tries=tries, stop=stop)
    options.append(options[-1].permute_gpus(mapped))
    return min(reversed(options), key=lambda option: objective_value(problem, option))


def _nearest_homes(problem: Problem, placement: Placement) -> Placement:
    """Return a placement with the GPUs of every layer named for the least cost of ways from the recorded homes."""
    sources = problem.stats.source_load
    if sources is None or len(sources) > problem.num_gpus:
        return placement
    cost, room = 1 / problem.topology.pair_bandwidth_gb_per_s(), problem.slots_per_gpu
    sent = np.einsum("sle,lge->lsg", sources.astype(np.float64), placement.even_share())
    same = np.broadcast_to(room[:, None] == room[None, :], cost.shape)
    order = np.stack([_assigned(table.T @ cost[: len(sources)], same) for table in sent])
    named = placement.permute_gpus(order)
    return min((named, placement), key=lambda option: objective_value(problem, option))


def crossing_cost(problem: Problem, tie: Floats) -> Floats:
    """``[GPU, GPU]`` 1 where a pair crosses GPUs (nodes, as ``copies_level`` says), a little more by the way's cost."""
    gpus = problem.num_gpus
    group = np.arange(gpus) if problem.copies_level == GPU else problem.topology.node_of_gpu()
    cost: Floats = (group[:, None] != group[None, :]) + 1e-3 * tie / max(float(tie.max()), 1e-300)
    return cost


def _named(tables: Floats, order: Ints) -> Floats:
    """Traffic tables between GPUs with new names."""
    return np.array([table[np.ix_(order[i], order[i + 1])] for i, table in enumerate(tables)])


def name_layers(tables: Floats, cost: Floats, same: Same) -> Ints:
    """Names of GPUs in every layer: forward from the first, then layer by layer until nothing changes.

    Parameters
    ----------
    tables
        ``[layer-1, GPU, GPU]`` traffic between consecutive layers, GPUs named as they are.
    cost
        ``[GPU, GPU]`` cost of a way from the rank in one layer to the rank in the next.
    same
        ``[GPU, GPU]`` whether two GPUs may swap names (equally many slots).

    Returns
    -------
    ndarray
        ``[layer, GPU]`` which GPU of the plan each rank is: what :meth:`~moeplace.placement.Placement.permute_gpus`
        takes. Optimal where ``cost`` is one number off its diagonal. Complexity: O(sweeps · layers · GPUs³).
    """
    layers, gpus = len(tables) + 1, len(cost)
    order = np.tile(np.arange(gpus), (layers, 1))
    for layer in range(1, layers):
        order[layer] = _assigned(_toward(tables, order, layer, cost), same)
    best = chain_cost(tables, cost, order)
    for _ in range(MOST_SWEEPS):
        for layer in range(layers):
            table = _toward(tables, order, layer, cost)
            if layer + 1 < layers:
                table = table + tables[layer][:, order[layer + 1]] @ cost.T
            order[layer] = _assigned(table, same)
        now = chain_cost(tables, cost, order)
        if now >= best * (1 - LESS):
            break
        best = now
    return order


def _toward(tables: Floats, order: Ints, layer: int, cost: Floats) -> Floats:
    """``[GPU of the plan, rank]`` cost of what a layer receives."""
    if layer == 0:
        return np.zeros_like(cost)
    table: Floats = tables[layer - 1][order[layer - 1]].T @ cost
    return table


def _assigned(table: Floats, same: Same) -> Ints:
    """``[rank]`` GPUs of the plan at least cost."""
    gpu, rank = linear_sum_assignment(np.where(same, table, 2 * np.abs(table).sum() + 1.0))
    order = np.empty_like(gpu)
    order[rank] = gpu
    return order


def chain_cost(tables: Floats, cost: Floats, order: Ints) -> float:
    """Cost of all traffic under names ``[layer, GPU]``."""
    return sum(
        float((table[np.ix_(order[layer], order[layer + 1])] * cost).sum()) for layer, table in enumerate(tables)
    )


def map_ranks(table: Floats, cost: Floats, same: Same) -> Ints:
    """Names that are the same in all layers: best exchanges of two GPUs until none helps.

    Parameters
    ----------
    table
        ``[GPU, GPU]`` traffic of all layers together.
    cost, same
        As for :func:`name_layers`; costs are taken as if both directions of a way cost their mean.

    Returns
    -------
    ndarray
        ``[GPU]`` which GPU of the plan each rank is. Complexity: O(exchanges · GPUs³), one matrix product each.
    """
    gpus = len(cost)
    order = np.arange(gpus)
    flow, way = (table + table.T) / 2, (cost + cost.T) / 2
    flow, way = flow * ~np.eye(gpus, dtype=bool), way * ~np.eye(gpus, dtype=bool)
    least = LESS * float(flow.sum() * way.max(initial=0.0))
    for _ in range(gpus * gpus):
        here = flow[np.ix_(order, order)]
        product = here @ way
        own = np.diag(product)
        change = product + product.T - own[:, None] - own[None, :] + 2 * here * way
        change = np.where(same, change, np.inf)
        p, q = np.unravel_index(int(change.argmin()), change.shape)
        if not change[p, q] < -least:
            break
        order[[p, q]] = order[[q, p]]
    return order


def swap_while_better(
    order: Ints,
    same: Same,
    cost_of: Callable[[Ints], float],
    *,
    rng: np.random.Generator,
    tries: int,
    stop: Callable[[], bool],
) -> Ints:
    """Exchange names of random pairs as long as a cost given by a function falls; ``tries`` evaluations at most."""
    first, second = np.nonzero(np.triu(same, 1))
    best, idle = cost_of(order), 0
    for pick in rng.integers(0, max(1, len(first)), tries) if len(first) else ():
        if stop() or idle > 4 * len(first):
            break
        other = order.copy()
        p, q = first[pick], second[pick]
        other[..., [p, q]] = other[..., [q, p]]
        now = cost_of(other)
        idle += 1
        if now < best * (1 - LESS):
            order, best, idle = other, now, 0
    return order
