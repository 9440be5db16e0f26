"""Homes that follow a request's experts: the rank that its first tokens visited most.

Under dispatch–combine a copy whose expert lives on the token's home never meets the network. A request goes on choosing
the experts it has chosen, so the rank that its first tokens visited most serves more of the later ones too; a server
that picks the decode rank of a request after its prompt, as with prefill and decode apart, can go by it. The names of
GPUs are free in every layer: they are chosen so that what requests visit in one layer and in the next has one name,
which changes neither loads nor copies. To place tokens and experts together is Semantic Parallelism's idea (arXiv
2503.04398).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moeplace.errors import InputError
from moeplace.frozen import Floats, Ints
from moeplace.placement import Placement
from moeplace.topology import Topology
from moeplace.trace import Trace

AFFINITY = "affinity"
SEEN_TOKENS = 64
MOST_REQUESTS = 1000  # of a fit: names of GPUs have few degrees of freedom
ROUNDS, STARTS = 30, 4
LEAST_GAIN = 1e-9


def seen_tokens(homes: str) -> int | None:
    """Return the tokens of a request that its home is chosen by: of ``affinity`` or ``affinity:N``; else None.

    Raises
    ------
    InputError
        What follows the colon is not a whole number of at least 1.
    """
    name, colon, number = homes.partition(":")
    if name != AFFINITY:
        return None
    if not colon:
        return SEEN_TOKENS
    if not number.isdecimal() or int(number) < 1:
        raise InputError(f"homes {homes!r}", rule="affinity:N goes by the first N tokens of a request, at least 1")
    return int(number)


def visits(trace: Trace, share: Floats, layer: int) -> Floats:
    """``[token, GPU]`` chance that a token visits each GPU in a layer, with ``share`` [layer, GPU, expert]."""
    missed, left = np.ones((trace.num_tokens, share.shape[1])), 1.0 - share[layer].T
    for place in range(trace.meta.top_k):
        missed *= left[trace.experts[:, layer, place]]
    return 1.0 - missed


def preferences(opening: Trace, share: Floats, topology: Topology) -> tuple[Ints, Floats]:
    """Numbers of the requests of ``opening``, and ``[request, GPU]`` what each saves per token with each GPU for home.

    Parameters
    ----------
    opening
        First tokens of the requests.
    share
        ``[layer, GPU, expert]`` share of an expert's tokens that a GPU serves.
    topology
        A copy costs one over the bandwidth between its GPU and the home, nothing if they are one. Complexity:
        O(tokens · layers · k · GPUs).
    """
    cost = 1 / topology.pair_bandwidth_gb_per_s()
    names, of = np.unique(opening.request, return_inverse=True)
    seen = np.zeros((len(names), topology.num_gpus))
    for layer in range(opening.meta.num_layers):
        np.add.at(seen, of, visits(opening, share, layer))
    return names, -(seen @ cost) / np.bincount(of)[:, None]


def deal(preference: Floats, known: npt.NDArray[np.bool_]) -> Ints:
    """``[batch, request]`` homes: each request in turn takes the best rank that has room, the emptiest if unknown.

    Parameters
    ----------
    preference
        ``[batch, request, GPU]``; larger is better.
    known
        ``[batch, request]`` whether a request's first tokens have been seen.

    Returns
    -------
    ndarray
        Every rank holds ``requests / GPUs``, rounded up, at most. Complexity: O(batches · requests · GPUs).
    """
    batches, requests, gpus = preference.shape
    room = np.full((batches, gpus), -(-requests // gpus))
    home = np.empty((batches, requests), np.int64)
    batch = np.arange(batches)
    for turn in range(requests):
        value = np.where(known[:, turn, None], preference[:, turn], room.astype(np.float64))
        home[:, turn] = np.where(room > 0, value, -np.inf).argmax(axis=1)
        room[batch, home[:, turn]] -= 1
    return home


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """How many copies meet no network.

    Attributes
    ----------
    copies, at_home
        Copies per token and layer in all, and those whose GPU is the token's home.
    by_chance
        What ``at_home`` is when homes do not follow experts.
    """

    copies: float
    at_home: float
    by_chance: float

    @property
    def remote_change(self) -> float:
        """Relative change of the copies that leave their home, against homes by chance."""
        before = self.copies - self.by_chance
        return (self.by_chance - self.at_home) / before if before > 0 else 0.0


def held_at_home(trace: Trace, placement: Placement, topology: Topology, seen: int) -> Held:
    """Copies that stay at home when requests are dealt by their first ``seen`` tokens, over the tokens after those.

    Requests are dealt in the order of the trace, equally many to every rank; short ones, never seen to the end of
    their first tokens, are left out. Complexity: O(tokens · layers · k · GPUs).
    """
    share = placement.even_share()
    order = np.lexsort((trace.position, trace.request))
    early = _turn_of(trace, order) < seen
    opening, later = trace.take(order[early]), trace.take(order[~early])
    if not later.num_tokens:
        raise InputError(
            f"no request has more than {seen} tokens",
            rule="homes go by the first tokens of a request, and are judged on the others",
            hint="--homes affinity:N with fewer tokens",
        )
    names, preference = preferences(opening, share, topology)
    home = deal(preference[None], np.ones((1, len(names)), bool))[0][np.searchsorted(names, later.request)]
    copies = at_home = 0.0
    for layer in range(trace.meta.num_layers):
        visited = visits(later, share, layer)
        copies += float(visited.sum())
        at_home += float(visited[np.arange(len(home)), home].sum())
    size = later.num_tokens * trace.meta.num_layers
    return Held(copies=copies / size, at_home=at_home / size, by_chance=copies / size / topology.num_gpus)


def _turn_of(trace: Trace, order: Ints) -> Ints:
    """``[token]`` which token of its request each of ``order`` is."""
    request = trace.request[order]
    first = np.flatnonzero(np.diff(request, prepend=request[:1] - 1))
    return np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))


def align_names(trace: Trace, placement: Placement, topology: Topology, seed: int) -> Placement:
    """Rename GPUs in every layer so that what a request visits has one name; loads and copies stay as they are.

    Requests' homes given the names, and names given the homes, in turn until nothing changes: both are assignment
    problems, homes with equally many requests on every rank, names within nodes and of whole nodes. The best of
    several starts.

    Parameters
    ----------
    trace
        Tokens to fit; of at most 1,000 requests.
    placement, topology
        What is renamed. GPUs with unequal numbers of slots keep their kind.
    seed
        Of the first homes.

    Returns
    -------
    Placement
        Complexity: O(starts · rounds · (layers · GPUs³ + requests³)).
    """
    names, of = np.unique(trace.request, return_inverse=True)
    if len(names) > MOST_REQUESTS:
        trace = trace.take(np.flatnonzero(np.isin(of, np.linspace(0, len(names) - 1, MOST_REQUESTS).astype(np.int64))))
        names, of = np.unique(trace.request, return_inverse=True)
    share = placement.even_share()
    seen = np.zeros((trace.meta.num_layers, len(names), topology.num_gpus))
    for layer, table in enumerate(seen):
        np.add.at(table, of, visits(trace, share, layer))
    tables = _Names(seen=seen, cost=1 / topology.pair_bandwidth_gb_per_s(), node=_nodes(topology), slots=placement)
    rng = np.random.default_rng(seed)
    best, order = tables.settle(tables.best_homes(np.tile(np.arange(topology.num_gpus), (len(seen), 1))))
    for _ in range(STARTS):
        value, other = tables.settle(rng.permutation(np.arange(len(names)) % topology.num_gpus))
        if value < best:
            best, order = value, other
    return placement.permute_gpus(order)


def _nodes(topology: Topology) -> Ints:
    """``[GPU]`` node of each; all one where a node has one GPU or the network is direct: names are free then."""
    node = topology.node_of_gpu()
    alone = topology.is_direct or len(np.unique(node)) == topology.num_gpus
    return np.zeros_like(node) if alone else node


class _Names:
    """The two assignment problems."""

    def __init__(self, *, seen: Floats, cost: Floats, node: Ints, slots: Placement) -> None:
        self.seen, self.cost = seen, cost
        self.blocks = [np.flatnonzero(node == n) for n in np.unique(node)]
        room = (slots.slots >= 0).sum(axis=2)
        self.same = room[:, :, None] == room[:, None, :]

    def settle(self, home: Ints) -> tuple[float, Ints]:
        """Return the cost and the names ``[layer, rank]`` that homes ``[request]`` end in."""
        least, names = np.inf, np.empty((0, 0), np.int64)
        for _ in range(ROUNDS):
            order = self._best_names(home)
            home = self.best_homes(order)
            value = float(self._costs(order)[np.arange(len(home)), home].sum())
            if not value < least * (1 - LEAST_GAIN):
                break
            least, names = value, order
        return least, names

    def _costs(self, order: Ints) -> Floats:
        """``[request, home]`` cost of a request's copies under names."""
        named = np.take_along_axis(self.seen, order[:, None, :], axis=2).sum(axis=0)
        cost: Floats = named @ self.cost
        return cost

    def best_homes(self, order: Ints) -> Ints:
        """``[request]`` homes at least cost, equally many requests on every rank."""
        cost = self._costs(order)
        room = -(-len(cost) // cost.shape[1])
        _, place = linear_sum_assignment(np.repeat(cost, room, axis=1))
        home: Ints = place // room
        return home

    def _best_names(self, home: Ints) -> Ints:
        """``[layer, rank]`` GPUs of the plan at least cost, each node as a whole."""
        gpus = len(self.cost)
        order = np.empty((len(self.seen), gpus), np.int64)
        from_home = np.zeros((gpus, gpus))
        for layer, seen in enumerate(self.seen):
            from_home[:] = 0.0
            np.add.at(from_home, home, seen)
            table = np.where(self.same[layer], from_home.T @ self.cost, 1e3 * (1 + from_home.sum()))
            order[layer] = self._assigned(table)
        return order

    def _assigned(self, table: Floats) -> Ints:
        """``[rank]`` GPUs of the plan: nodes to nodes, and within each pair GPUs to ranks."""
        inner = [[linear_sum_assignment(table[np.ix_(a, b)])[1] for b in self.blocks] for a in self.blocks]
        outer = [
            [table[a, b[rank]].sum() for b, rank in zip(self.blocks, row, strict=True)]
            for a, row in zip(self.blocks, inner, strict=True)
        ]
        order = np.empty(len(table), np.int64)
        for i, j in zip(*linear_sum_assignment(np.array(outer)), strict=True):
            order[self.blocks[j][inner[i][j]]] = self.blocks[i]
        return order
