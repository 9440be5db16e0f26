"""All-to-all on direct networks: tori, full meshes and meshes, whose GPUs are joined by links of their own.

Traffic is a matrix of copies between positions. Each algorithm moves it dimension by dimension; what differs is the
order of the dimensions, and whether all of it is on its way at once:

* ``scheduled``: the buffer is cut into as many chunks as there are dimensions, and chunk ``c`` visits dimensions
  ``c, c+1, …`` in turn (DimRotation), so that every phase uses all links. On a ring a phase runs in rounds: in round
  ``r`` a link carries what has come ``r-1`` hops and goes on, the shorter way round, data for the opposite position
  half either way (HalfRing). On a full mesh a phase is one round. Rounds are in step: a phase lasts the sum over its
  rounds of the busiest link, and as long as its slowest dimension.
* ``one-shot``: everything at once in dimension order; the busiest link's time, times what congestion costs. On tori
  that is 1.75, which is one simulated router's; published are 1.2 to 1.8 (junsunchoi/booksim2, experiments), least with
  one port per GPU or a crossbar faster than the links.
* ``adaptive``: everything at once, every message spread evenly over all orders of the dimensions, as ideal minimal
  routing would.
* ``valiant``: everything at once to a random position and from there to its own (Valiant, SIAM J. Comput. 1982): any
  traffic becomes uniform, over twice the hops.

Under uniform traffic a link of a torus carries ``M·L/8`` (even ring length ``L``, ``M`` what each GPU sends, its own
share included), of a full mesh ``M/L``, and the centre link of a line ``M·L/4``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Floats
from moeplace.topology import ADAPTIVE, FULL_MESH, ONE_SHOT, SCHEDULED, TORUS, VALIANT, Topology

ONE_SHOT_CONGESTION = 1.75
AXES = "xyzw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """Traffic on the links of a direct network.

    Attributes
    ----------
    busiest
        ``[...]`` copies that set the time: on the busiest link, or summed over rounds in step.
    links
        Kind of link → ``[..., GPU]`` copies over the link of that kind that leaves each GPU.
    hops
        Links that the longest way has, one after another.
    """

    busiest: Floats
    links: dict[str, Floats]
    hops: int


def move(topology: Topology, copies: npt.NDArray[np.floating | np.integer]) -> Movement:
    """Move traffic over a direct network by its algorithm.

    Parameters
    ----------
    topology
        A torus, full mesh or mesh; ``all_to_all`` names the algorithm.
    copies
        ``[..., GPU, GPU]`` from source to destination; the diagonal stays where it is.

    Returns
    -------
    Movement
        Complexity: O(GPUs² · dimensions²) for each exchange.
    """
    position = np.arange(topology.num_gpus) if topology.coordinates is None else topology.coordinates
    network = _Network.of(topology, copies)
    moved = {
        SCHEDULED: network.scheduled,
        ONE_SHOT: network.one_shot,
        ADAPTIVE: network.adaptive,
        VALIANT: network.valiant,
    }[topology.all_to_all]()
    return Movement(
        busiest=moved.busiest, links={name: load[..., position] for name, load in moved.links.items()}, hops=moved.hops
    )


def stages(topology: Topology, copies: npt.NDArray[np.floating | np.integer]) -> list[list[Floats]]:
    """What :func:`move` takes the largest of: phases of chunks of ``[..., round, link]`` copies, linear in the traffic.

    ``busiest = Σ_phase max_chunk Σ_round max_link``; links of one-shot algorithms are weighted by their congestion.
    """
    if topology.all_to_all == SCHEDULED:
        phases = _Network.of(topology, copies).phases()
        return [[loads.reshape(*loads.shape[:-2], -1) for loads in chunks] for chunks in phases]
    congestion = ONE_SHOT_CONGESTION if topology.all_to_all == ONE_SHOT and topology.kind == TORUS else 1.0
    links = [congestion * load for load in move(topology, copies).links.values()]
    return [[np.concatenate(links, axis=-1)[..., None, :]]] if links else []


@functools.lru_cache(maxsize=64)
def _line(kind: str, length: int) -> tuple[tuple[str, ...], npt.NDArray[np.float64]]:
    """Names of the kinds of links of one line of GPUs, and who uses them.

    The array is ``[round, kind, position, source, destination]``: the share of what goes from source to destination
    that the link of a kind at a position carries in a round.
    """
    if kind == FULL_MESH:
        names = tuple(f"+{offset}" for offset in range(1, length))
        used = np.zeros((1, len(names), length, length, length))
        for offset, a in itertools.product(range(1, length), range(length)):
            used[0, offset - 1, a, a, (a + offset) % length] = 1
        return names, used
    rounds = length // 2 if kind == TORUS else length - 1
    used = np.zeros((rounds, 2, length, length, length))
    for a, b in itertools.permutations(range(length), 2):
        for direction, hops, share in _ways(kind, length, a, b):
            for hop in range(hops):
                used[hop, (1 - direction) // 2, (a + direction * hop) % length, a, b] = share
    return ("+", "-"), used


def _ways(kind: str, length: int, a: int, b: int) -> Iterator[tuple[int, int, float]]:
    """Directions from a to b on a ring or an open line, with hops and share."""
    if kind != TORUS or length == 2:  # a ring of two has one link
        yield (1 if b > a or kind == TORUS else -1), abs(b - a), 1.0
        return
    forward = (b - a) % length
    backward = length - forward
    if forward <= backward:
        yield 1, forward, 0.5 if forward == backward else 1.0
    if backward <= forward:
        yield -1, backward, 0.5 if forward == backward else 1.0


class _Network:
    """Traffic ``[..., position, position]`` on a grid of one kind."""

    def __init__(self, kind: str, dims: Sequence[int], copies: Floats) -> None:
        self._kind, self._dims = kind, tuple(dims)
        self._lead, self._size = copies.shape[:-2], copies.shape[-1]
        self._copies = copies
        self._links: dict[str, Floats] = {}

    @classmethod
    def of(cls, topology: Topology, copies: npt.NDArray[np.floating | np.integer]) -> _Network:
        """Lay traffic between ranks out by position."""
        laid = np.asarray(copies, np.float64)
        if topology.coordinates is not None:
            rank = np.argsort(topology.coordinates)
            laid = laid[..., rank[:, None], rank[None, :]]
        return cls(topology.kind, topology.dims, laid)

    def scheduled(self) -> Movement:
        """Chunks that visit the dimensions in rotation, in rounds."""
        busiest, hops = np.zeros(self._lead), 0
        for chunks in self.phases():
            slowest, rounds = np.zeros(self._lead), 0
            for loads in chunks:
                slowest = np.maximum(slowest, loads.max(axis=(-1, -2), initial=0).sum(axis=-1))
                rounds = max(rounds, loads.shape[-3])
            busiest += slowest
            hops += rounds
        return Movement(busiest=busiest, links=self._links, hops=hops)

    def phases(self) -> Iterator[Iterator[Floats]]:
        """Yield each phase's chunks, ``[..., round, kind, position]`` loads of the links that each uses."""
        count = len(self._dims)
        for phase in range(count):
            yield (
                self._loads((chunk + phase) % count, [(chunk + i) % count for i in range(phase)], 1 / count)
                for chunk in range(count)
            )

    def one_shot(self) -> Movement:
        """Everything at once in dimension order."""
        congestion = ONE_SHOT_CONGESTION if self._kind == TORUS else 1.0
        return self._at_once([range(len(self._dims))], congestion)

    def adaptive(self) -> Movement:
        """Everything at once, spread over all orders."""
        return self._at_once([*itertools.permutations(range(len(self._dims)))])

    def valiant(self) -> Movement:
        """Everything at once, twice as uniform traffic."""
        size = self._size
        apart = self._copies * ~np.eye(size, dtype=bool)
        away = np.repeat(apart.sum(axis=-1)[..., None] / size, size, axis=-1)
        home = np.repeat(apart.sum(axis=-2)[..., None, :] / size, size, axis=-2)
        self._copies = away + home
        moved = self._at_once([range(len(self._dims))])
        return Movement(busiest=moved.busiest, links=moved.links, hops=2 * moved.hops)

    def _at_once(self, orders: Sequence[Sequence[int]], congestion: float = 1.0) -> Movement:
        for order in orders:
            for place, dim in enumerate(order):
                self._loads(dim, list(order[:place]), 1 / len(orders))
        loads = [load.max(axis=-1, initial=0) for load in self._links.values()]
        busiest = np.max(loads, axis=0) if loads else np.zeros(self._lead)
        hops = sum(_line(self._kind, length)[1].shape[0] for length in self._dims)
        return Movement(busiest=congestion * busiest, links=self._links, hops=hops)

    def _loads(self, dim: int, visited: list[int], share: float) -> Floats:
        """``[..., round, kind, position]`` loads of a dimension's links; adds them to the links' totals."""
        names, used = _line(self._kind, self._dims[dim])
        moving = self._moving(dim, visited) * share
        loads = np.einsum("...ab,rqiab->...rqi", moving, used)
        # [..., other dimensions, round, kind, position of dim] → [..., round, kind, positions]
        others = len(self._dims) - 1
        first = len(self._lead)
        loads = np.moveaxis(loads, range(first, first + others), range(first + 2, first + 2 + others))
        loads = np.moveaxis(loads, -1, first + 2 + dim).reshape(*self._lead, *used.shape[:2], self._size)
        for number, name in enumerate(names):
            label = f"link {name}{AXES[dim]}"
            total = loads[..., number, :].sum(axis=-2)
            self._links[label] = self._links[label] + total if label in self._links else total
        return loads

    def _moving(self, dim: int, visited: list[int]) -> Floats:
        """``[..., other dimensions, source, destination]`` what moves along one dimension after those visited."""
        count = len(self._dims)
        sources, targets = "abcd"[:count], "efgh"[:count]
        kept = "".join(targets[k] if k in visited else sources[k] for k in range(count) if k != dim)
        grid = self._copies.reshape(*self._lead, *self._dims, *self._dims)
        moving: Floats = np.einsum(f"...{sources}{targets}->...{kept}{sources[dim]}{targets[dim]}", grid)
        return moving
