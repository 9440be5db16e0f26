"""A wafer: a 2D mesh of dies without switches, where distance counts (Patterns behind Chaos, arXiv 2510.05497).

Contiguous placement with requests dealt to dies in turn is compared with what the paper suggests there:

* popular experts decentralised: dealt one to a die, the most popular in the middle of the mesh, round by round;
* copies of popular experts, each token served by the nearest;
* placement-aware distribution of work: requests go to the dies from which the experts that their prompts chose are
  fewest hops away, every die getting equally many (an assignment problem for each step).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplace.affinity import RoutingStats
from moeplace.batches import Steps
from moeplace.compute import ExpertCompute
from moeplace.execution import Execution, step_tokens
from moeplace.frozen import Floats, Ints, replaced
from moeplace.network import LOW_LATENCY, exchange
from moeplace.packing.eplb import balance_global
from moeplace.placement import EMPTY, Placement, spread_slots
from moeplace.planning.workload import Workload
from moeplace.routing import EVEN, NEAREST, Router
from moeplace.solvers.linear import contiguous
from moeplace.topology import Topology
from moeplace.traffic import StepTokens, visit

IN_TURN, AWARE = "in turn", "near their experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class WaferRow:
    """One way to place experts and requests.

    Attributes
    ----------
    placement, homes
        How experts are placed, and where requests live.
    step_us
        Mean time of the MoE layers of a step.
    compute_us, network_us
        Its parts.
    hops
        Links a copy of a token travels, on average.
    busiest_over_mean
        Load of the busiest die over the mean, mean over layers and steps.
    """

    placement: str
    homes: str
    step_us: float
    compute_us: float
    network_us: float
    hops: float
    busiest_over_mean: float


def compare_wafer(workload: Workload, stats: RoutingStats, mesh: Topology, batch: int) -> list[WaferRow]:
    """Time decode steps of ``batch`` requests for each die under every placement and both kinds of homes.

    Placements are fitted to ``stats``; work is distributed by the prompts of the judged requests alone.
    """
    steps = workload.decode_steps(batch * mesh.num_gpus, mesh.num_gpus)
    layers, experts = stats.meta.num_layers, stats.meta.num_experts
    load = stats.load.astype(np.float64)
    slots = spread_slots(experts, mesh.num_gpus)
    more = spread_slots(experts + mesh.num_gpus, mesh.num_gpus)
    placements = {
        "contiguous": (contiguous(slots, layers, experts), EVEN),
        "popular experts apart": (decentralised(load, mesh), EVEN),
        "copies of popular experts": (balance_global(load, more), NEAREST),
    }
    rows = []
    for name, (placement, routing) in placements.items():
        router = Router.of(placement, mesh, routing)
        tokens = step_tokens(steps, mesh.num_gpus, Execution(homes="turn"))
        rows.append(_timed((name, IN_TURN), workload, (steps, tokens), (mesh, router)))
        if workload.prefill is not None:
            near = replaced(tokens, home=aware_homes(workload, steps, placement, mesh))
            rows.append(_timed((name, AWARE), workload, (steps, near), (mesh, router)))
    return rows


def decentralised(load: Floats, mesh: Topology) -> Placement:
    """Experts dealt to dies by popularity, one to each in a round; the first round begins in the middle of the mesh.

    Parameters
    ----------
    load
        ``[layer, expert]`` popularity.
    mesh
        The dies.
    """
    gpus, experts = mesh.num_gpus, load.shape[1]
    middle_first = np.argsort(mesh.hops().sum(axis=1), kind="stable")
    width = -(-experts // gpus)
    slots = np.full((len(load), gpus, width), EMPTY, np.int16)
    for layer, weights in enumerate(load):
        ranked = np.argsort(-weights, kind="stable")
        for turn in range(width):
            dealt = ranked[turn * gpus : (turn + 1) * gpus]
            # what a die got in one round it makes up for in the next
            order = middle_first if turn % 2 == 0 else middle_first[::-1]
            slots[layer, order[: len(dealt)], turn] = dealt
    return Placement(slots=slots, num_experts=experts)


def aware_homes(workload: Workload, steps: Steps, placement: Placement, mesh: Topology) -> Ints:
    """``[token]`` die of each token of every step: equally many to each, fewest expected hops in all.

    Complexity: O(steps · requests³) for the assignments, O(prompt tokens · layers · k) before.
    """
    from scipy.optimize import linear_sum_assignment

    prefill = workload.prefill
    assert prefill is not None
    hops = mesh.hops().astype(np.float64)
    # from each die to the nearest copy of an expert: where there are several, that one serves
    hosts = placement.copies() > 0
    distance = np.array([np.where(held.T[:, :, None], hops[None], np.inf).min(axis=1) for held in hosts])
    names, number = np.unique(prefill.request, return_inverse=True)
    cost = np.zeros((len(names), mesh.num_gpus))
    for layer in range(placement.num_layers):
        np.add.at(cost, number, distance[layer][prefill.experts[:, layer]].sum(axis=1))
    cost /= np.bincount(number)[:, None]
    seen = steps.trace.request[steps.rows]
    place = np.minimum(np.searchsorted(names, seen), len(names) - 1)
    known = names[place] == seen
    each = -(-seen.shape[1] // mesh.num_gpus)
    homes = np.empty(seen.shape, np.int64)
    for step in range(len(seen)):
        own = np.where(known[step][:, None], cost[place[step]], cost.mean(axis=0))
        chosen, seat = linear_sum_assignment(np.repeat(own, each, axis=1))
        homes[step, chosen] = seat // each
    return homes.reshape(-1)


def _timed(
    names: tuple[str, str], workload: Workload, work: tuple[Steps, StepTokens], place: tuple[Topology, Router]
) -> WaferRow:
    (steps, tokens), (mesh, router), model = work, place, workload.model
    compute = ExpertCompute.of(model, mesh.accelerator, "decode")
    held = np.bincount(tokens.group * mesh.num_gpus + tokens.home, minlength=tokens.num_groups * mesh.num_gpus)
    own = held.reshape(tokens.num_groups, mesh.num_gpus)
    distance = mesh.hops()
    busy_us, way_us, hops, ratio = 0.0, 0.0, 0.0, 0.0
    layers = steps.trace.meta.num_layers
    for layer in range(layers):
        ids = np.ascontiguousarray(steps.trace.experts[:, layer])
        seen = visit(ids, tokens, router, layer, (mesh, LOW_LATENCY))
        busy_us += float(compute.rank_us(seen.rows, own).max(axis=1).mean())
        for size, returning in ((model.bytes_per_copy_dispatch, False), (model.bytes_per_copy_combine, True)):
            timed = exchange(mesh, seen.traffic, kernel=LOW_LATENCY, bytes_per_copy=size, returning=returning)
            way_us += float(timed.time_us.mean())
        hops += float((seen.traffic.copies * distance).sum() / seen.traffic.copies.sum())
        load = seen.rows.sum(axis=2)
        ratio += float((load.max(axis=1) / load.mean(axis=1)).mean())
    scale = workload.layer_scale
    return WaferRow(
        placement=names[0],
        homes=names[1],
        step_us=(busy_us + way_us) * scale,
        compute_us=busy_us * scale,
        network_us=way_us * scale,
        hops=hops / layers,
        busiest_over_mean=ratio / layers,
    )
