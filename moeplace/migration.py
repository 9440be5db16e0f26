"""From one placement to another while the server runs: rounds that never lose an expert.

In a round GPUs first drop copies, then load others, all at the same time. A copy is dropped only while another one is
there, and loaded only where there is room: in a free slot, or in a spare buffer that the GPU keeps for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.diff import check_nodes, sourced
from moeplace.errors import PlacementError
from moeplace.frozen import Ints
from moeplace.placement import Placement
from moeplace.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What happens at the same time, drops first.

    Attributes
    ----------
    drops
        ``[drop, 3]`` layer (its place, from 0), expert, GPU.
    loads
        ``[load, 4]`` layer, expert, GPU it is loaded from, GPU that loads it.
    """

    drops: Ints
    loads: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Rounds from one placement to another.

    Attributes
    ----------
    rounds
        In order; the last one may only drop.
    slots_per_gpu
        ``[GPU]`` slots each GPU has in a layer.
    spare_slots
        Copies a GPU can hold beyond its slots, over all layers together.
    layer_ids
        One id per layer.
    expert_bytes
        Bytes of one expert's weights, None when the model is unknown.
    """

    rounds: tuple[Round, ...]
    slots_per_gpu: Ints
    spare_slots: int
    layer_ids: tuple[int, ...]
    expert_bytes: float | None = None

    @property
    def busiest(self) -> int:
        """Copies that the busiest GPU loads, summed over rounds: the time goes by them where rounds wait."""
        return sum(map(self.busiest_of, self.rounds))

    def busiest_of(self, one: Round) -> int:
        """Copies that the busiest GPU of a round loads."""
        return int(np.bincount(one.loads[:, 3]).max()) if len(one.loads) else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the ``schedule`` of a ``moeplace/diff/1`` document; layers by their ids."""
        ids = np.array(self.layer_ids)
        rounds = [
            {name: np.column_stack([ids[rows[:, 0]], rows[:, 1:]]).tolist() for name, rows in
             (("drops", one.drops), ("loads", one.loads))}
            for one in self.rounds
        ]  # fmt: skip
        return {"rounds": rounds, "slots_per_gpu": self.slots_per_gpu.tolist(), "spare_slots": self.spare_slots}


def schedule_moves(
    before: Placement,
    after: Placement,
    *,
    spare_slots: int = 1,
    num_nodes: int = 1,
    layer_ids: tuple[int, ...] | None = None,
    expert_bytes: float | None = None,
) -> Schedule:
    """Find rounds of drops and loads that turn one placement into another.

    In each round every copy that is to go is dropped if another copy of its expert is there; then free slots are
    filled with what is to come. A full GPU that still waits holds the last copy of an expert that another full GPU
    waits for, and so on around: such a cycle loads all at once into spare buffers, and the old copies go in the next
    round. With one spare slot per GPU there is always a step to make.

    Parameters
    ----------
    before, after
        Placements of as many layers, GPUs and experts. A GPU has as many slots in a layer as either of them fills in
        any layer.
    spare_slots
        Copies a GPU can hold beyond its slots, over all layers together.
    num_nodes
        Nodes the GPUs are on, in equal runs: copies come from the same node where one holds them.
    layer_ids, expert_bytes
        Kept for the schedule's document.

    Returns
    -------
    Schedule
        Complexity: O(rounds · layers · GPUs · experts).

    Raises
    ------
    PlacementError
        The placements differ in shape, or without a spare slot there is no step to make.
    """
    held, goal = before.copies(), after.copies()
    if held.shape != goal.shape:
        raise PlacementError(f"placements of {held.shape} and {goal.shape}", rule="layers, GPUs and experts agree")
    check_nodes(before.num_gpus, num_nodes)
    slots = np.maximum(before.used_slots(), after.used_slots()).max(axis=0)
    rounds = []
    while (held != goal).any():
        drops = _drops(held, goal)
        np.subtract.at(held, tuple(drops[:, [0, 2, 1]].T), 1)
        wanted = _loads(held, goal, slots, spare_slots)
        if not len(wanted) and not len(drops):
            raise PlacementError(
                "every GPU that waits is full of last copies",
                rule="a copy is dropped only while another one is there",
                hint="--spare-slots 1 gives each GPU room for one more copy while it changes",
            )
        loads = sourced(held, wanted, np.ones(len(wanted), np.int64), num_nodes=num_nodes)
        np.add.at(held, tuple(wanted.T), 1)
        rounds.append(Round(drops=drops, loads=loads))
    return Schedule(
        rounds=tuple(rounds),
        slots_per_gpu=slots,
        spare_slots=spare_slots,
        layer_ids=layer_ids or tuple(range(before.num_layers)),
        expert_bytes=expert_bytes,
    )


def check_moves(problem: Problem, placement: Placement) -> str | None:
    """Say how a placement breaks the limits on moves, by the loads of a schedule; None where it keeps them."""
    moves, base = problem.moves, problem.baseline
    if moves is None or base is None:
        return None
    schedule = schedule_moves(base, placement)
    loads = np.concatenate([np.zeros(0, np.int64), *(one.loads[:, 3] for one in schedule.rounds)])
    loaded = np.bincount(loads, minlength=problem.num_gpus)
    if moves.max_copies is not None and loaded.sum() > moves.max_copies:
        return f"{int(loaded.sum()):,} copies move, {moves.max_copies:,} may"
    if moves.max_copies_per_gpu is not None and loaded.max() > moves.max_copies_per_gpu:
        gpu = int(loaded.argmax())
        return f"GPU {gpu} loads {int(loaded[gpu]):,} copies, a GPU may load {moves.max_copies_per_gpu:,}"
    return None


def _drops(held: Ints, goal: Ints) -> Ints:
    """``[drop, 3]`` layer, expert, GPU of every copy that may go, one copy of each expert always staying."""
    total = held.sum(axis=1)
    rows = []
    for layer, gpu, expert in np.argwhere((held > goal) & (total[:, None] > 1)).tolist():
        number = min(int(held[layer, gpu, expert] - goal[layer, gpu, expert]), int(total[layer, expert]) - 1)
        total[layer, expert] -= number
        rows += [(layer, expert, gpu)] * number
    return np.array(rows, np.int64).reshape(-1, 3)


def _loads(held: Ints, goal: Ints, slots: Ints, spare_slots: int) -> Ints:
    """``[load, 3]`` layer, GPU, expert of what there is room for in this round."""
    used = held.sum(axis=2)
    buffer = spare_slots - (used - slots).clip(min=0).sum(axis=0)  # left to each GPU, over all layers
    rows: list[tuple[int, int, int]] = []
    waits: npt.NDArray[np.bool_] = np.any(held < goal, axis=2)
    for layer in np.flatnonzero(waits.any(axis=1)).tolist():
        room = (used[layer] < slots)[waits[layer]].any()
        if not room and (buffer[waits[layer]] > 0).sum() < 2:
            continue  # no room left in this round, nor for a cycle
        waiting: dict[int, list[int]] = {}  # expert → GPUs that wait for a copy
        last: dict[int, list[int]] = {}  # GPU → experts of which it must hand on the last copy
        for gpu, expert in np.argwhere(held[layer] < goal[layer]).tolist():
            number = int(goal[layer, gpu, expert] - held[layer, gpu, expert])
            waiting.setdefault(expert, []).extend([gpu] * number)
        for gpu, expert in np.argwhere(held[layer] > goal[layer]).tolist():
            last.setdefault(gpu, []).append(expert)
        free = (slots - used[layer]).clip(min=0)
        handed = {expert for experts in last.values() for expert in experts}
        # what frees a slot elsewhere comes first
        for expert in sorted(waiting, key=lambda expert: (expert not in handed, expert)):
            for gpu in list(waiting[expert]):
                if free[gpu] > 0:
                    free[gpu] -= 1
                    waiting[expert].remove(gpu)
                    rows.append((layer, gpu, expert))
                    handed.discard(expert)
        while cycle := _cycle(waiting, {g: [e for e in last[g] if e in handed] for g in last}, buffer):
            for gpu, expert in cycle:
                buffer[gpu] -= 1
                waiting[expert].remove(gpu)
                handed.discard(expert)
                rows.append((layer, gpu, expert))
    return np.array(rows, np.int64).reshape(-1, 3)


def _cycle(waiting: dict[int, list[int]], last: dict[int, list[int]], buffer: Ints) -> list[tuple[int, int]]:
    """``(GPU, expert it loads)`` around a cycle of GPUs with buffers left, each holding what the next one waits for."""
    done: set[int] = set()
    for start in sorted(last):
        path: list[int] = []
        taken: dict[int, int] = {}  # GPU on the path → expert it hands to the next one
        gpu = start
        while gpu not in done and gpu not in taken and buffer[gpu] > 0:
            step = next(
                ((e, d) for e in last.get(gpu, ()) for d in waiting.get(e, ()) if buffer[d] > 0 and d not in done), None
            )
            if step is None:
                break
            path.append(gpu)
            taken[gpu], gpu = step
        if gpu in taken:
            ring = path[path.index(gpu) :]
            return [(ring[(i + 1) % len(ring)], taken[holder]) for i, holder in enumerate(ring)]
        done.update(path)
        done.add(gpu)
    return []
