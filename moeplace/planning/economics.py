"""What a cluster costs: accelerators, NICs, switches and cables of a topology, in money and in watts.

Parts of ``N`` accelerators with ``B`` GB/s of scale-up bandwidth each:

* ``scale-up``: ``N·B`` GB/s of switch ports and of cables to them; a second tier of switches where one does not reach.
* ``scale-out``: the same inside every node, and a NIC, a fibre and a switch port for each accelerator; each further
  tier of a non-blocking tree adds two ports and one cable for every port below it.
* ``torus``, ``full-mesh``, ``mesh``: a link joins two accelerators and needs no switch, so ``N·B/2`` GB/s of cables,
  and as many of them as there are links.

The share of the network in the price is what decides between them (arXiv 2605.00254 compares topologies at equal
bandwidth per accelerator); its own price table is not public.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeplace.errors import ProblemError
from moeplace.frozen import replaced
from moeplace.planning.pricebook import NetworkPrices, PriceBook
from moeplace.topology import CUSTOM, SCALE_OUT, Topology, num_links_per_gpu

PARTS = ("accelerators", "nics", "switches", "cables")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """Price and power of a cluster.

    Attributes
    ----------
    usd
        Part (of :data:`PARTS`) → price, in the book's unit; None for accelerators of unknown price.
    watts
        Part → watts; None for accelerators of unknown power.
    """

    usd: dict[str, float | None]
    watts: dict[str, float | None]

    @property
    def total_usd(self) -> float | None:
        """Price of everything; None where a part has none."""
        return _sum(self.usd)

    @property
    def total_watts(self) -> float | None:
        """Power of everything; None where a part's is unknown."""
        return _sum(self.watts)

    @property
    def network_usd(self) -> float:
        """Price of what is not an accelerator."""
        return sum(value or 0.0 for part, value in self.usd.items() if part != "accelerators")

    @property
    def network_share(self) -> float | None:
        """Share of the network in the price."""
        total = self.total_usd
        return None if not total else self.network_usd / total

    def per_hour(self, book: PriceBook) -> float | None:
        """Cost of an hour, in the book's unit; None where a price is unknown."""
        total = self.total_usd
        return None if total is None else book.per_hour(total, self.total_watts)

    def __add__(self, other: Bill) -> Bill:
        return Bill(
            usd={part: _plus(self.usd[part], other.usd[part]) for part in PARTS},
            watts={part: _plus(self.watts[part], other.watts[part]) for part in PARTS},
        )


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _sum(parts: dict[str, float | None]) -> float | None:
    known = [value for value in parts.values() if value is not None]
    return sum(known) if len(known) == len(parts) else None


def bill(topology: Topology, book: PriceBook) -> Bill:
    """Price a topology by a book.

    Raises
    ------
    ProblemError
        A custom topology: a matrix of bandwidths does not say what it is made of.
    """
    if topology.kind == CUSTOM:
        rule = "a cluster is priced by what it is made of; a matrix of bandwidths does not say"
        raise ProblemError(f"the price of {topology.name}", rule=rule, hint="name a KIND:DIMS topology")
    usd, watts = scale_up_parts(topology, book.network)
    if topology.kind == SCALE_OUT and topology.num_nodes > 1:
        size, nic = (topology.num_gpus, topology.num_nodes), topology.accelerator.nic_gb_per_s
        more_usd, more_watts = fabric(size, nic, book.network, topology.spine_oversubscription)
        usd = {part: usd[part] + more_usd[part] for part in usd}
        watts = {part: watts[part] + more_watts[part] for part in watts}
    name, gpus = topology.accelerator.name, topology.num_gpus
    price, power = book.accelerator_usd.get(name), book.accelerator_watts.get(name)
    return Bill(
        usd={"accelerators": None if price is None else gpus * price, **usd},
        watts={"accelerators": None if power is None else gpus * power, **watts},
    )


def scale_up_parts(topology: Topology, prices: NetworkPrices) -> tuple[dict[str, float], dict[str, float]]:
    """Links among the accelerators of a domain, switched or direct."""
    gpus, bandwidth = topology.num_gpus, topology.accelerator.scale_up_gb_per_s
    if topology.is_direct:
        ports, cables = 0.0, gpus * bandwidth / 2
        count = gpus * num_links_per_gpu(topology.kind, topology.dims) / 2
    else:
        per_node = topology.gpus_per_node
        tiers = _tiers(per_node, bandwidth, prices.scale_up_switch_gb_per_s) if per_node > 1 else 0
        ports = gpus * bandwidth * max(0, 2 * tiers - 1)
        cables, count = gpus * bandwidth * tiers, float(gpus * tiers)
    usd = {
        "nics": 0.0,
        "switches": ports * prices.scale_up_switch_usd_per_gb_per_s,
        "cables": cables * prices.scale_up_cable_usd_per_gb_per_s + count * prices.scale_up_cable_usd_each,
    }
    watts = {
        "nics": 0.0,
        "switches": ports * prices.scale_up_switch_watts_per_gb_per_s,
        "cables": cables * prices.scale_up_cable_watts_per_gb_per_s,
    }
    return usd, watts


def fabric(
    size: tuple[int, int], nic_gb_per_s: float, prices: NetworkPrices, oversubscription: float = 1.0
) -> tuple[dict[str, float], dict[str, float]]:
    """NICs of some accelerators in some nodes (``size``), and the trees of switches that join them, rail by rail."""
    gpus, nodes = size
    bandwidth = gpus * nic_gb_per_s
    tiers = _tiers(nodes, nic_gb_per_s, prices.switch_gb_per_s)
    upward = bandwidth * (tiers - 1) / oversubscription  # what goes on to further tiers
    ports, cables = bandwidth + 2 * upward, bandwidth + upward
    usd = {
        "nics": bandwidth * prices.nic_usd_per_gb_per_s,
        "switches": ports * prices.switch_usd_per_gb_per_s,
        "cables": cables * prices.cable_usd_per_gb_per_s,
    }
    watts = {
        "nics": bandwidth * prices.nic_watts_per_gb_per_s,
        "switches": ports * prices.switch_watts_per_gb_per_s,
        "cables": cables * prices.cable_watts_per_gb_per_s,
    }
    return usd, watts


def _tiers(hosts: int, port_gb_per_s: float, switch_gb_per_s: float) -> int:
    """Tiers of a non-blocking tree of switches with ``k`` ports: one joins k hosts, two k·k/2, and so on."""
    ports = max(4.0, switch_gb_per_s / port_gb_per_s)
    tiers, reach = 1, ports
    while hosts > reach:
        tiers, reach = tiers + 1, reach * ports / 2
    return tiers


def with_network_share(book: PriceBook, topology: Topology, share: float) -> PriceBook:
    """Return the book with all network prices scaled so that the network is ``share`` of the price of a topology.

    Raises
    ------
    ProblemError
        The share is not in [0, 1), or the topology has no network or no price.
    """
    priced = bill(topology, book)
    total, network = priced.total_usd, priced.network_usd
    if total is None or network <= 0 or not 0 <= share < 1:
        rule = "a share of at least 0 and below 1 of a cluster whose accelerators and network have prices"
        raise ProblemError(f"a network share of {share:g} in {topology.name} by the book {book.name}", rule=rule)
    factor = share / (1 - share) * (total - network) / network
    return replaced(book, name=f"{book.name}, network {share:.0%}", network=book.network.times(factor))


def break_even_factor(first: tuple[float, Bill], second: tuple[float, Bill]) -> float | None:
    """Factor on all network prices at which two clusters buy the same tokens per second for their price.

    Each is its tokens/s and its bill; ``r1/(a1 + f·n1) = r2/(a2 + f·n2)`` is solved for ``f``, with ``a`` the price of
    the accelerators and ``n`` of the network. Electricity is left out.

    Returns
    -------
    float or None
        None where no factor of at least 0 does: one of them is better at any network price.
    """
    rate1, bill1 = first
    rate2, bill2 = second
    a1, a2 = bill1.usd["accelerators"], bill2.usd["accelerators"]
    if a1 is None or a2 is None:
        return None
    slope = rate2 * bill1.network_usd - rate1 * bill2.network_usd
    if slope == 0:
        return None
    factor = (rate1 * a2 - rate2 * a1) / slope
    return factor if factor >= 0 else None
