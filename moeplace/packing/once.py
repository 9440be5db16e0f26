"""Every expert once: EPLB's packing, balanced further in layers that exceed the load cap."""

from __future__ import annotations

from collections.abc import Callable

from moeplace.frozen import Floats, Ints
from moeplace.packing.eplb import balance_global, slots_without_copies
from moeplace.packing.kernel import pack_layers
from moeplace.placement import Placement

KICKS = 100
MET = 1e-9


def packed_once(
    load: Floats, slots_per_gpu: Ints, cap: Floats, *, seed: int = 0, stop: Callable[[], bool] = lambda: False
) -> Placement:
    """Pack ``load`` [layer, expert] without copies, so that GPUs keep ``cap`` [layer] where exchanges reach it.

    Complexity: that of :func:`~moeplace.packing.pack_layers`.
    """
    rooms = slots_without_copies(slots_per_gpu, load.shape[1])
    placement = balance_global(load, rooms)
    if stop() or (placement.gpu_load(load).max(axis=1) <= cap * (1 + MET)).all():
        return placement
    return pack_layers(load, placement, rooms, floor=cap, kicks=KICKS, seed=seed, stop=stop)
