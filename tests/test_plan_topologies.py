"""DeepSeek-V3, EP64, decode: how the four topologies stand to one another, beside what arXiv 2605.00254 publishes.

Its price table is not public. The book's network prices are scaled so that the network is 0.2 to 0.6 of the price of a
switched scale-up cluster of 64; ``python -m benchmarks plan`` prints all figures on a trace of all layers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moeplace.affinity import count_routing
from moeplace.hardware import load_accelerator
from moeplace.model import load_model
from moeplace.overlap import DUAL_BATCH, NONE
from moeplace.planning.compare import best_of, repriced
from moeplace.planning.economics import with_network_share
from moeplace.planning.evaluate import Evaluator
from moeplace.planning.outcome import Outcome
from moeplace.planning.pricebook import load_price_book
from moeplace.planning.space import DEFAULT_KINDS, Space, cells, deployments
from moeplace.planning.workload import make_workload
from moeplace.topology import load_topology
from moeplace.trace import Trace, TraceMeta

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
SWITCHLESS = ("torus", "full-mesh")
BATCHES = (32, 64, 128, 256)


def skewed_trace(layers: int = 3, tokens: int = 3000) -> Trace:
    """256 experts, top-8, loads of log-normal spread 0.5: every token an independent choice, in a few layers."""
    rng = np.random.default_rng(0)
    popular = rng.normal(0, 0.5, (layers, 256))
    keys = popular + rng.gumbel(size=(tokens, layers, 256))
    return Trace(
        meta=TraceMeta(num_experts=256, top_k=8, layer_ids=tuple(range(3, 3 + layers))),
        experts=np.argpartition(-keys, 8, axis=2)[:, :, :8],
        request=np.arange(tokens) // 10,
        position=np.arange(tokens) % 10 + 2000,
        phase=np.ones(tokens, np.uint8),
    )


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """H100 with 2048 tokens of context, three of the 58 layers."""
    trace = skewed_trace()
    return Evaluator(
        workload=make_workload(trace, load_model("deepseek-v3"), context=2048, steps=4),
        stats=count_routing(trace),
        accelerators={"h100": load_accelerator("h100")},
        book=load_price_book(),
        solver="eplb",
    )


@pytest.fixture(scope="module")
def judged(evaluator: Evaluator) -> tuple[Outcome, ...]:
    """All topologies, batches, overlaps and three bandwidths, whether their caches fit or not."""
    space = Space(accelerators=evaluator.accelerators, ep_sizes=(64,), batches=BATCHES, link_scales=(1, 0.5, 0.15))
    found = cells(deployments(space, evaluator.workload.model))
    return tuple(
        one for cell in found for one in evaluator.time([evaluator.screen(own).replace(breaches=()) for own in cell])
    )


@pytest.fixture(scope="module")
def at_share(evaluator: Evaluator, judged: tuple[Outcome, ...]) -> Callable[[float], list[Outcome]]:
    """The same times at another network share."""
    base = load_topology("scale-up:64")

    def priced(share: float) -> list[Outcome]:
        book = with_network_share(evaluator.book, base, share)
        return [repriced(one, evaluator, book) for one in judged]

    return priced


def nominal(outcomes: list[Outcome], *kinds: str, batch: int | None = None) -> float:
    """Tokens for the cost, best over batch (or at one) and overlap, at 450 GB/s."""
    best = best_of(
        one
        for one in outcomes
        if one.deployment.kind in kinds
        and one.deployment.link_gb_per_s == 450
        and batch in (None, one.deployment.batch)
    )
    assert best is not None
    return best.per_usd or 0.0


def rates(judged: tuple[Outcome, ...], batch: int, kind: str) -> dict[str, float]:
    """Overlap → tokens per second and GPU at 450 GB/s."""
    return {
        one.deployment.overlap: one.per_gpu
        for one in judged
        if (one.deployment.kind, one.deployment.batch, one.deployment.link_gb_per_s) == (kind, batch, 450)
    }


@pytest.mark.parametrize("share", SHARES)
def test_switchless_networks_buy_more_than_scale_up(at_share: Callable[[float], list[Outcome]], share: float) -> None:
    """The best batch of a torus or full mesh gives more tokens for the cost than that of a switched domain."""
    outcomes = at_share(share)
    assert nominal(outcomes, *SWITCHLESS) > nominal(outcomes, "scale-up")
    assert nominal(outcomes, "scale-up") > nominal(outcomes, "scale-out")


@pytest.mark.parametrize("share", SHARES)
def test_switchless_networks_stay_ahead_of_scale_up_at_its_best_bandwidth(
    at_share: Callable[[float], list[Outcome]], share: float
) -> None:
    """Also where every topology may have the bandwidth that suits it, of those tried."""
    outcomes = at_share(share)
    best = {kind: best_of(one for one in outcomes if one.deployment.kind == kind) for kind in DEFAULT_KINDS}
    rate = {kind: (one.per_usd or 0.0) if one else 0.0 for kind, one in best.items()}
    assert max(rate[kind] for kind in SWITCHLESS) > rate["scale-up"]


def test_the_gain_falls_into_the_published_band(at_share: Callable[[float], list[Outcome]]) -> None:
    """Published: 20.6 to 56.2 % more for the cost. Ours grows with the share, through that band from 0.2 to 0.6."""
    gains = []
    for share in SHARES:
        outcomes = at_share(share)
        gains.append(nominal(outcomes, *SWITCHLESS) / nominal(outcomes, "scale-up") - 1)
    assert gains == sorted(gains)
    assert gains[0] < 0.206 < gains[1] < gains[2] < 0.562 < gains[-1]


@pytest.mark.xfail(
    strict=True,
    reason="64 requests a GPU and a share of 0.2: less to save than an exchange of 2.25 times costs",
)
def test_switchless_networks_buy_more_at_small_batches_and_cheap_networks(
    at_share: Callable[[float], list[Outcome]],
) -> None:
    """The same at 64 requests for each GPU alone, at the lowest share."""
    outcomes = at_share(0.2)
    assert nominal(outcomes, *SWITCHLESS, batch=64) > nominal(outcomes, "scale-up", batch=64)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_full_mesh_performs_at_least_as_well_as_a_torus(judged: tuple[Outcome, ...], batch: int) -> None:
    """At equal bandwidth for each accelerator: faster without overlap, and no slower with the better of both."""
    mesh, torus = rates(judged, batch, "full-mesh"), rates(judged, batch, "torus")
    assert mesh[NONE] > torus[NONE]
    assert max(mesh.values()) >= max(torus.values()) * (1 - 1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_links_are_wider_than_pays(at_share: Callable[[float], list[Outcome]], share: float) -> None:
    """A switched domain gives most for the cost below its 450 GB/s; the more so the dearer the network."""
    best = best_of(one for one in at_share(share) if one.deployment.kind == "scale-up")
    assert best is not None
    assert best.deployment.link_gb_per_s < 450


@pytest.mark.parametrize("kind", DEFAULT_KINDS)
def test_overlap_of_two_batches_loses_when_small_and_gains_when_large(judged: tuple[Outcome, ...], kind: str) -> None:
    """Published for 72 H100: −27 % at 32 tokens for each GPU, +25.5 % at 256.

    Over NICs the loss at 32 is near nothing here, since overlap is taken to hide all it can (see the README's misses).
    """
    small, large = rates(judged, 32, kind), rates(judged, 256, kind)
    assert small[DUAL_BATCH] < small[NONE]
    assert large[DUAL_BATCH] > large[NONE]
