"""Laws of :mod:`moeplace.routing`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import placements, random_placement, relabel_placement

from moeplace.balance import least_busy_split
from moeplace.errors import UnknownNameError
from moeplace.placement import Placement
from moeplace.routing import EVEN, LP, POLICIES, Router
from moeplace.topology import Topology, load_topology

SIX = Placement(slots=np.array([[[0, 1], [0, 2], [3, 1], [0, 4], [5, 1], [0, 2]]]), num_experts=6)


def domain(placement: Placement) -> Topology:
    """As many GPUs as the placement has, behind one switch."""
    return load_topology(f"scale-up:{placement.num_gpus}")


def share_of(router: Router, expert: int, home: int, tokens: int = 30_000) -> dict[int, float]:
    """Share of an expert's tokens of one home that each GPU serves, counted."""
    slot = router.choose(0, np.full((tokens, 1), expert), np.arange(tokens), np.full(tokens, home))
    gpu, count = np.unique(slot // router.table.slots_per_gpu, return_counts=True)
    return dict(zip(gpu.tolist(), (count / tokens).tolist(), strict=True))


@given(placements(), st.sampled_from(POLICIES), st.integers(0, 99))
def test_the_slot_chosen_holds_the_expert(placement: Placement, policy: str, seed: int) -> None:
    """Whatever the policy, token and home, a selection is served by a slot that holds its expert, always the same."""
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 9, (placement.num_layers, placement.num_experts))
    router = Router.of(placement, domain(placement), policy, load)
    token, home = rng.integers(0, 2**40, 50), rng.integers(0, placement.num_gpus, 50)
    experts = rng.integers(0, placement.num_experts, (50, 3))
    for layer in range(placement.num_layers):
        slot = router.choose(layer, experts, token, home)
        assert np.array_equal(placement.slots[layer].ravel()[slot], experts)
        assert np.array_equal(slot, router.choose(layer, experts, token, home))
    share = router.gpu_share(placement.num_gpus)
    assert share.sum(axis=1) == pytest.approx(1)
    assert (share[placement.copies() == 0] == 0).all()


def test_copies_share_evenly() -> None:
    """Of 30,000 consecutive tokens every copy of an expert serves its share within six deviations."""
    router = Router.of(SIX, domain(SIX))
    for expert, copies in ((0, 4), (1, 3), (2, 2), (3, 1)):
        counted = share_of(router, expert, 0)
        assert len(counted) == copies
        assert max(abs(share - 1 / copies) for share in counted.values()) <= 6 * np.sqrt(1 / copies / 30_000)
    assert router.gpu_share(6) == pytest.approx(SIX.even_share())


def test_layers_choose_independently() -> None:
    """The copy a token gets in one layer says nothing about the next: a quarter of the tokens in each combination."""
    placement = Placement(slots=np.array([[[0], [0]], [[0], [0]]]), num_experts=1)
    router, none = Router.of(placement, domain(placement)), np.zeros(40_000, int)
    one, other = (router.choose(layer, none[:, None], np.arange(40_000), none).ravel() for layer in (0, 1))
    counts = np.bincount(one * 2 + other)
    assert np.abs(counts - 10_000).max() < 6 * np.sqrt(10_000)


@given(placements(layers=2), st.integers(0, 99))
def test_renaming_experts_changes_nothing(placement: Placement, seed: int) -> None:
    """With experts renamed in placement and trace alike, every selection is served by the same slot."""
    rng = np.random.default_rng(seed)
    order, home = rng.permutation(placement.num_experts), rng.integers(0, placement.num_gpus, 20)
    experts = rng.integers(0, placement.num_experts, (20, 2))
    place = domain(placement)
    plain, renamed = Router.of(placement, place), Router.of(relabel_placement(placement, order), place)
    for layer in range(2):
        slot = plain.choose(layer, experts, np.arange(20), home)
        assert np.array_equal(slot, renamed.choose(layer, order[experts], np.arange(20), home))


def test_weights_are_inverse_loads_by_hand() -> None:
    """Copies on GPUs of predicted load 3, 1 and 2 serve in the proportion 2 : 6 : 3."""
    placement = Placement(slots=np.array([[[0, 1], [0, 2], [0, 3]]]), num_experts=4)
    load = np.array([[3.0, 2.0, 0.0, 1.0]])
    router = Router.of(placement, domain(placement), "weighted", load)
    assert router.gpu_share(3)[0, :, 0] == pytest.approx(np.array([2, 6, 3]) / 11)
    assert share_of(router, 0, 1) == pytest.approx({0: 2 / 11, 1: 6 / 11, 2: 3 / 11}, abs=0.02)


def test_near_copies_serve_first() -> None:
    """On 2×3 GPUs: a copy on the home GPU serves alone, else those of the node, else all; evenly, or by load."""
    topology = load_topology("scale-out:2x3")
    load = np.array([[8.0, 3, 1, 1, 1, 1]])
    for policy in ("nearest", "topology-aware"):
        router = Router.of(SIX, topology, policy, load)
        assert share_of(router, 0, 1) == {1: 1.0}
        assert set(share_of(router, 0, 2)) == {0, 1}
        assert set(share_of(router, 2, 0)) == {1}
        assert set(share_of(router, 2, 3)) == {5}
    even = share_of(Router.of(SIX, topology, "nearest", load), 0, 2)
    assert even[0] == pytest.approx(0.5, abs=0.02)
    aware = share_of(Router.of(SIX, topology, "topology-aware", load), 0, 2)
    # GPU 0 carries 2 + 1, GPU 1 2 + 1/2
    assert aware[0] == pytest.approx((1 / 3) / (1 / 3 + 1 / 2.5), abs=0.02)
    everywhere = Placement(slots=np.array([[[0, 1], [0, 2], [3, 4], [5, 6], [7, 8], [9, 9]]]), num_experts=10)
    far = Router.of(everywhere, topology, "nearest")
    assert set(share_of(far, 0, 4)) == {0, 1}


def test_hops_count_on_direct_networks() -> None:
    """On a ring of six the copy fewer links away serves; two as far away share."""
    ring = load_topology("torus:6")
    placement = Placement(slots=np.array([[[0], [1], [2], [0], [3], [4]]]), num_experts=5)
    for policy in ("nearest", "topology-aware"):
        router = Router.of(placement, ring, policy)
        assert [set(share_of(router, 0, home)) for home in range(6)] == [{0}, {0}, {3}, {3}, {3}, {0}]


@given(st.integers(0, 10**6))
def test_the_static_programme_is_least_busy(seed: int) -> None:
    """Shares of lp-static give the profile's busiest GPU the least load possible, never more than even shares do."""
    rng = np.random.default_rng(seed)
    placement = random_placement(seed, [2, 3, 2, 2], 1, 5)
    load = rng.lognormal(0, 1, (1, 5))
    router = Router.of(placement, domain(placement), "lp-static", load)
    busiest = float((router.gpu_share(4)[0] @ load[0]).max())
    table = router.table
    _, least = least_busy_split(load, table.gpu[0], table.count[0], 4)
    assert busiest == pytest.approx(float(least[0]), rel=1e-4)
    assert busiest <= float(placement.gpu_load(load).max()) * (1 + 1e-4)
    assert Router.of(placement, domain(placement), LP, load).per_step
    assert not router.per_step


def test_unknown_policies_are_refused() -> None:
    """A misspelt policy is named with its neighbours."""
    with pytest.raises(UnknownNameError, match="nearest"):
        Router.of(SIX, domain(SIX), "nearst")
    assert Router.of(SIX, domain(SIX), EVEN).policy == "even"
