"""Laws of :mod:`moeplace.balance`: the split is complete, and no other one has a less busy busiest GPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moeplace import balance
from moeplace.balance import least_busy_split
from moeplace.frozen import Floats, Ints


def hosts(seed: int, experts: int, gpus: int) -> tuple[Ints, Ints]:
    """Random distinct GPUs for one to all copies of each expert."""
    rng = np.random.default_rng(seed)
    count = rng.integers(1, gpus + 1, experts)
    host = np.stack([np.resize(rng.permutation(gpus)[:n], gpus) for n in count])
    return host, count


def least_busiest(load: npt.NDArray[np.float64], host: Ints, count: Ints, gpus: int) -> float:
    """The same by linear programming."""
    pairs = [(e, c) for e in range(len(load)) for c in range(count[e])]
    serve, meet = np.zeros((gpus, len(pairs) + 1)), np.zeros((len(load), len(pairs) + 1))
    for i, (e, c) in enumerate(pairs):
        serve[host[e, c], i] = 1
        meet[e, i] = 1
    serve[:, -1] = -1
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1
    return float(linprog(cost, A_ub=serve, b_ub=np.zeros(gpus), A_eq=meet, b_eq=load, method="highs").fun)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 6), st.booleans())
def test_the_split_is_a_linear_programmes(seed: int, experts: int, gpus: int, whole: bool) -> None:
    """Copies serve all of their expert and nothing negative, and the busiest GPU has the least possible load."""
    rng = np.random.default_rng(seed)
    host, count = hosts(seed, experts, gpus)
    load = rng.integers(0, 9, (2, experts)).astype(float) if whole else rng.lognormal(0, 2, (2, experts))
    split, busiest = least_busy_split(load, host, count, gpus)
    assert (split >= -1e-9).all()
    assert split.sum(axis=2) == pytest.approx(load)
    for case in range(2):
        on_gpu = np.zeros(gpus)
        for e in range(experts):
            np.add.at(on_gpu, host[e, : count[e]], split[case, e, : count[e]])
            assert not split[case, e, count[e] :].any()
        assert on_gpu.max() == pytest.approx(busiest[case])
        assert busiest[case] == pytest.approx(least_busiest(load[case], host, count, gpus), abs=1e-9)


def test_compiled_and_plain_split_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loop gives the same split, bit by bit."""
    host, count = hosts(3, 20, 6)
    load: Floats = np.random.default_rng(0).lognormal(0, 1, (5, 20))
    plain = least_busy_split(load, host, count, 6)
    monkeypatch.setattr(balance, "COMPILE_FROM_SPLITS", 1)
    for one, other in zip(plain, least_busy_split(load, host, count, 6), strict=True):
        assert np.array_equal(one, other)


def test_flashlbs_example() -> None:
    """Loads of a published example with enough copies: a fractional split reaches the mean of all GPUs, 181.25."""
    load = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])
    count = np.array([4, 4, 2, 2, 1, 1, 1, 1])
    host = np.zeros((8, 4), np.int64)
    places = [(0, 1, 2, 3), (4, 5, 6, 7), (0, 4), (1, 5), (2,), (3,), (6,), (7,)]
    for e, gpus in enumerate(places):
        host[e, : len(gpus)] = gpus
    _, busiest = least_busy_split(load, host, count, 8)
    assert busiest[0] == pytest.approx(1450 / 8)
