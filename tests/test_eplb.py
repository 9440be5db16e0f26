"""Laws of :mod:`moeplace.solvers.eplb`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_problem, make_trace, small_model

from moeplace.affinity import count_routing, grouped_load
from moeplace.bounds import hottest_copy, load_floor
from moeplace.errors import InputError, ProblemError
from moeplace.metrics import max_over_mean, token_metrics
from moeplace.model import load_model
from moeplace.packing.eplb import balance_global, balance_hierarchical, pack, replicate
from moeplace.placement import EMPTY
from moeplace.problem import Problem, slots_for
from moeplace.solution import Limits
from moeplace.solvers import solve
from moeplace.solvers.linear import contiguous
from moeplace.split import first_half
from moeplace.topology import load_topology
from moeplace.trace import Counts, Trace, TraceMeta

DATA = Path(__file__).parents[2] / "shared" / "data"
README_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def _real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"no shared/data/{name} beside the repository")
    return DATA / name


def _stats_problem(load: Any, spec: str, slots: Any, groups: int = 1) -> Problem:
    counts = np.asarray(load, np.int64)[None]
    layers, experts = counts.shape[1:]
    meta = TraceMeta(num_experts=experts, top_k=1, layer_ids=tuple(range(layers)))
    model = small_model(layers, experts, 1, num_groups=groups)
    base = make_problem(
        make_trace(0, layers=layers, experts=experts, top_k=1), spec, slots_per_gpu=slots, model=model, objective="load"
    )
    return base.replace(stats=count_routing(Counts(meta=meta, counts=counts)))


def test_the_readme_example() -> None:
    """DeepSeek's README: two layers of twelve experts in four groups, 16 slots on two nodes of four GPUs, exactly."""
    found = balance_hierarchical(np.array(README_LOAD, float), np.full(8, 2), nodes=2, groups=4)
    assert found.slots.reshape(2, 16).tolist() == README_MAP
    problem = _stats_problem(README_LOAD, "scale-out:2x4", np.full(8, 2), groups=4)
    answer = solve(problem, "eplb")
    assert answer.placement is not None
    assert answer.placement.slots.reshape(2, 16).tolist() == README_MAP
    assert answer.notes[0] == "EPLB's hierarchical policy"


def test_the_flashlb_example() -> None:
    """The public eight-expert example on eight GPUs of two slots: the hottest GPU has 232, as with the original."""
    load = np.array([[600, 560, 120, 120, 20, 10, 10, 10]], float)
    placement = balance_global(load, np.full(8, 2))
    assert placement.gpu_load(load).max() == pytest.approx(232)
    assert placement.duplicates() == []


def restated(load: list[float], gpus: int, slots: int) -> tuple[list[list[int]], bool]:
    """Global EPLB in plain Python, copies allowed to share a GPU; and whether any do."""
    copies, count = list(range(len(load))), [1] * len(load)
    while len(copies) < gpus * slots:
        hottest = max(range(len(load)), key=lambda e: (load[e] / count[e], -e))
        copies.append(hottest)
        count[hottest] += 1
    weight = [load[e] / count[e] for e in copies]
    if slots == 1:
        return [[e] for e in copies], False
    packs: list[list[int]] = [[] for _ in range(gpus)]
    total = [0.0] * gpus
    for item in sorted(range(len(copies)), key=lambda i: (-weight[i], i)):
        target = min((g for g in range(gpus) if len(packs[g]) < slots), key=lambda g: (total[g], g))
        packs[target].append(copies[item])
        total[target] += weight[item]
    return packs, any(len(set(held)) < len(held) for held in packs)


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 6), st.integers(0, 3))
def test_global_equals_a_plain_restatement(seed: int, experts: int, gpus: int, extra: int) -> None:
    """Wherever the original keeps copies apart the result is the original's, slot for slot, also when loads tie."""
    slots = -(-experts // gpus) + extra
    load = np.random.default_rng(seed).integers(1, 8 if seed % 2 else 10_000, (1, experts)).astype(float)
    expected, shared = restated(load[0].tolist(), gpus, slots)
    found = balance_global(load, np.full(gpus, slots))
    if not shared:
        assert found.slots[0].tolist() == expected
    assert found.duplicates() == []


def test_hierarchical_equals_a_plain_restatement() -> None:
    """Groups to nodes heaviest first, then the global steps inside each node over its groups in that order."""
    compared = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        nodes, per_node, size, slots = (int(x) for x in rng.integers([2, 1, 1, 1], [4, 4, 4, 4]))
        gpus = int(rng.integers(1, 4))
        if gpus * slots < per_node * size:
            continue
        load = rng.integers(1, 6 if seed % 2 else 1000, nodes * per_node * size).astype(float)
        weight = load.reshape(-1, size).sum(axis=1)
        held: list[list[int]] = [[] for _ in range(nodes)]
        if per_node == 1:
            held = [[group] for group in range(nodes)]
        else:
            for group in sorted(range(len(weight)), key=lambda g: (-weight[g], g)):
                open_nodes = [n for n in range(nodes) if len(held[n]) < per_node]
                held[min(open_nodes, key=lambda n: (sum(weight[g] for g in held[n]), n))].append(group)
        expected, shared = [], False
        for groups in held:
            names = [group * size + i for group in groups for i in range(size)]
            packs, doubled = restated([load[e] for e in names], gpus, slots)
            expected += [[names[e] for e in pack] for pack in packs]
            shared |= doubled
        if not shared:
            found = balance_hierarchical(load[None], np.full(nodes * gpus, slots), nodes, nodes * per_node)
            assert found.slots[0].tolist() == expected
            compared += 1
    assert compared > 40


@given(st.integers(0, 10**6), st.integers(1, 14), st.lists(st.integers(0, 6), min_size=1, max_size=7))
def test_any_shape_is_placed(seed: int, experts: int, room: list[int]) -> None:
    """Odd GPU counts, uneven and empty GPUs, spare slots beyond the experts: all placed, nothing twice on a GPU."""
    room[0] += max(0, experts - sum(room))
    load = np.random.default_rng(seed).integers(0, 1000, (3, experts)).astype(float)
    found = balance_global(load, np.array(room))
    found.check_fits(np.array(room))
    # a slot stays empty only on a GPU that holds every expert, or where no exchange can fill it
    full = min(sum(min(slots, experts) for slots in room), experts * sum(slots > 0 for slots in room))
    assert (found.used_slots().sum(axis=1) >= min(full, experts)).all()


@given(st.integers(0, 10**6), st.sampled_from([(2, 4), (2, 2), (3, 3), (4, 4)]), st.integers(1, 3), st.integers(0, 3))
def test_hierarchical_keeps_groups_on_nodes(seed: int, shape: tuple[int, int], size: int, extra: int) -> None:
    """Every copy of every expert of a group is on one node, each node has as many groups, all experts are placed."""
    nodes, groups = shape
    experts, gpus = groups * size, 2
    room = np.full(nodes * gpus, -(-experts // (nodes * gpus)) + extra)
    load = np.random.default_rng(seed).integers(1, 1000, (2, experts)).astype(float)
    found = balance_hierarchical(load, room, nodes, groups)
    found.check_fits(room)
    for layer in found.slots:
        homes: dict[int, set[int]] = {}
        for (gpu, _), expert in np.ndenumerate(layer):
            if expert != EMPTY:
                homes.setdefault(int(expert) // size, set()).add(gpu // gpus)
        assert all(len(home) == 1 for home in homes.values())
        counts = np.bincount([next(iter(home)) for home in homes.values()], minlength=nodes)
        assert set(counts.tolist()) == {groups // nodes}


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6), st.integers(0, 8), st.integers(1, 4))
def test_replication_is_optimal_for_the_hottest_copy(load: list[int], spare: int, most: int) -> None:
    """Greedy copies make the hottest copy as cold as any dealing can; no expert gets more than ``most``."""
    copies, count = replicate(np.array([load], float), len(load) + spare, most)
    assert count.max() <= max(most, 1)
    assert (copies >= 0).sum() == count.sum() == min(len(load) + spare, most * len(load))
    assert [int((copies[0] == e).sum()) for e in range(len(load))] == count[0].tolist()
    if len(load) + spare <= most * len(load):
        floor = hottest_copy(np.array([load], float), spare, most)[0]
        assert (np.array(load) / count[0]).max() == pytest.approx(floor)


@given(st.integers(0, 10**6), st.integers(1, 12), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_packing_respects_room(seed: int, items: int, room: list[int]) -> None:
    """Packs hold at most their room; as many items as fit are packed, the heaviest first; places count from 0."""
    weight = np.random.default_rng(seed).random((2, items))
    found = pack(weight, np.array(room), None)
    for row in range(2):
        packed = np.flatnonzero(found.pack_of[row] >= 0)
        assert len(packed) == min(items, sum(room))
        if 0 < len(packed) < items:
            assert weight[row][packed].min() >= np.delete(weight[row], packed).max()
        for gpu, places in itertools.groupby(
            sorted(packed, key=lambda i: found.pack_of[row, i]), key=lambda i: found.pack_of[row, i]
        ):
            orders = sorted(found.order_in[row, list(places)].tolist())
            assert orders == list(range(len(orders)))
            assert len(orders) <= room[int(gpu)]


def test_copies_never_share_a_gpu_in_a_known_case() -> None:
    """256 experts with 32 redundant ones on 32 GPUs, where the original puts two copies on one GPU: never here."""
    load = np.random.default_rng(0).lognormal(4, 1, (20, 256))
    found = balance_global(load, np.full(32, 9))
    assert found.duplicates() == []
    assert (found.used_slots() == 9).all()
    assert (found.gpu_load(load).max(axis=1) / found.gpu_load(load).mean(axis=1)).max() < 1.1


@pytest.mark.parametrize(
    ("groups", "spec", "policy", "used"),
    [
        (4, "scale-out:2x4", "auto", "hierarchical"),
        (4, "scale-out:2x4", "global", "global"),
        (3, "scale-out:2x4", "auto", "global"),
        (4, "scale-up:8", "auto", "global"),
        (1, "scale-out:2x4", "auto", "global"),
        (4, "scale-up:8", "hierarchical", "global"),
    ],
)
def test_policies(groups: int, spec: str, policy: str, used: str) -> None:
    """The default is hierarchical exactly where groups divide over several nodes; the note says which policy ran."""
    problem = _stats_problem(README_LOAD, spec, np.full(8, 2), groups)
    answer = solve(problem, "eplb", Limits(options={"policy": policy}))
    assert answer.notes[0] == f"EPLB's {used} policy"


def test_policies_that_cannot_run() -> None:
    """A policy that does not exist, groups that do not divide and nodes without room are errors with a way out."""
    problem = _stats_problem(README_LOAD, "scale-out:2x4", np.full(8, 2), 3)
    with pytest.raises(ProblemError, match="3 expert groups on 2 nodes") as caught:
        solve(problem, "eplb", Limits(options={"policy": "hierarchical"}))
    assert caught.value.hint
    with pytest.raises(InputError, match="policy 'both'"):
        solve(problem, "eplb", Limits(options={"policy": "both"}))
    lopsided = _stats_problem(README_LOAD, "scale-out:2x2", [4, 4, 2, 2], 4)
    with pytest.raises(ProblemError, match="node 1 has 4 slots for 6 experts"):
        solve(lopsided, "eplb", Limits(options={"policy": "hierarchical"}))


def test_uneven_slots_of_the_issue() -> None:
    """256 experts and 32 redundant ones on 64 GPUs (5 and 4 slots): every slot used, close to balance."""
    load = np.random.default_rng(1).gamma(2.0, 100.0, (5, 256))
    room = slots_for(256, 64, redundant=32)
    found = balance_global(load, room)
    found.check_fits(room)
    assert np.array_equal(found.used_slots(), np.tile(room, (5, 1)))
    even = balance_global(load, slots_for(256, 64))
    assert found.gpu_load(load).max(axis=1).mean() < even.gpu_load(load).max(axis=1).mean()


def _gpt_oss() -> Trace:
    data = np.load(_real("gpt_oss_20b_fingerprinting/routing.npz"))
    position = data["token_pos"]
    meta = TraceMeta(num_experts=32, top_k=4, layer_ids=tuple(range(24)))
    experts = data["expert_ids"]
    return Trace(meta=meta, experts=experts, request=data["request"], position=position, phase=np.ones(len(experts)))


def test_gpt_oss_on_held_out_requests() -> None:
    """gpt-oss-20b, fitted on half 0 for 8 GPUs: 3.559 copies per token on the other half, and loads near balance."""
    trace = _gpt_oss()
    fit = np.isin(trace.request, first_half(trace.request, 0))
    one, other = trace.take(fit), trace.take(~fit)
    loads = [grouped_load(part, np.zeros(part.num_tokens, int), 1)[0] for part in (one, other)]
    placement = balance_global(loads[0].astype(float), np.full(8, 4))
    copies, _, _ = token_metrics(other, placement, load_topology("scale-up:8"))
    assert copies == pytest.approx(3.559, abs=0.002)
    default = contiguous(np.full(8, 4), 24, 32)
    fitted, held_out, untouched = (
        max_over_mean(p, load).mean() for p, load in ((placement, loads[0]), (placement, loads[1]), (default, loads[1]))
    )
    assert 1 <= fitted <= held_out < untouched


def test_glm_counts_on_64_gpus() -> None:
    """GLM-5.2 counts, 256 experts and 32 redundant ones on 64 GPUs: floor ≤ EPLB < contiguous in every layer."""
    data = np.load(_real("glm52_expert_counts/counts.npz"))
    key = next(name for name in ("counts", "logical_count") if name in data)
    counts = data[key]
    keep = counts.sum(axis=(0, 2)) > 0
    meta = TraceMeta(num_experts=256, top_k=8, layer_ids=tuple(range(int(keep.sum()))))
    stats = count_routing(Counts(meta=meta, counts=counts[:, keep]))
    problem = Problem(
        stats=stats,
        model=load_model("glm-5").replace(num_layers=int(keep.sum()), moe_layer_ids=meta.layer_ids),
        topology=load_topology("scale-out:8x8"),
        slots_per_gpu=slots_for(256, 64, redundant=32),
        objective="load",
    )
    answer = solve(problem, "eplb", Limits(options={"policy": "global"}))
    assert answer.placement is not None
    ratio = max_over_mean(answer.placement, stats.load)
    assert (ratio >= load_floor(problem) - 1e-12).all()
    assert ratio.mean() < 1.2
    default = contiguous(problem.slots_per_gpu, problem.num_layers, 256)
    assert (ratio < max_over_mean(default, stats.load)).all()


def test_without_copies_every_expert_is_placed_once_and_evenly() -> None:
    """With copies=none each expert has one copy, spare slots stay empty, and GPUs hold evenly many experts."""
    from moeplace.packing.eplb import slots_without_copies

    assert slots_without_copies(np.array([5, 5, 4, 4]), 16).tolist() == [4, 4, 4, 4]
    assert slots_without_copies(np.array([9, 1, 1, 1]), 10).tolist() == [7, 1, 1, 1]
    load = np.random.default_rng(0).lognormal(0, 1, (3, 16))
    placed = balance_global(load, slots_without_copies(np.array([5, 5, 4, 4]), 16))
    assert (placed.replicas() == 1).all()
