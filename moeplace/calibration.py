"""Expert compute fitted to a user's own measurements: start-up time and the reached shares of memory and arithmetic.

A table has one row per measurement of a grouped expert GEMM on one GPU: how many experts had rows, how many rows each
of them had, and the time. The model of :mod:`moeplace.compute` is fitted to it,
``T = t0 + max(w·experts, c·experts·⌈rows/τ⌉·τ)``, and its constants take the place of the accelerator's.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeplace.compute import TILE_ROWS, ExpertCompute
from moeplace.errors import InputError, Location
from moeplace.files import open_input
from moeplace.frozen import Floats
from moeplace.hardware import Accelerator
from moeplace.model import ModelSpec

COLUMNS = ("activated_experts", "rows_per_expert", "time_us")
PHASE = "phase"
PREFILL_FROM_ROWS = 128
LEAST_LAUNCH_US = 0.01
EXACT = 1e-4  # relative errors below this are not told apart
MAX_ROWS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeTable:
    """Measured times of grouped expert GEMMs.

    Attributes
    ----------
    experts, rows
        ``[measurement]`` experts that had rows, and rows of each of them.
    tile_rows
        ``[measurement]`` tile height of the phase.
    time_us
        ``[measurement]`` what it took.
    name
        Where it was read from.
    """

    experts: Floats
    rows: Floats
    tile_rows: npt.NDArray[np.int64]
    time_us: Floats
    name: str = "table"

    @property
    def padded_rows(self) -> Floats:
        """``[measurement]`` rows that are computed, tiles filled up."""
        whole: Floats = self.experts * np.ceil(self.rows / self.tile_rows) * self.tile_rows
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """An accelerator whose compute constants are those of a table.

    Attributes
    ----------
    accelerator
        With ``launch_us``, ``hbm_efficiency`` and ``gemm_efficiency`` of the fit.
    fitted
        Which of these the table determines; the others are left as they were.
    errors
        ``[measurement]`` fitted over measured, minus 1.
    name
        Of the table.
    """

    accelerator: Accelerator
    fitted: tuple[str, ...]
    errors: Floats
    name: str

    def __str__(self) -> str:
        """One sentence for a log."""
        made, off = self.accelerator, np.abs(self.errors)
        left = [name for name in ("hbm_efficiency", "gemm_efficiency") if name not in self.fitted]
        kept = f"; {' and '.join(left)} not determined, left as it was" if left else ""
        return (
            f"expert compute is that of {self.name}: launch {made.launch_us:.1f} µs, {made.hbm_efficiency:.3f} of the "
            f"memory bandwidth, {made.gemm_efficiency:.3f} of the arithmetic{kept}; "
            f"the fit is off by {np.median(off):.1%} (median), {off.max():.1%} (worst) in {len(off)} measurements"
        )


def read_compute_table(path: str | Path) -> ComputeTable:
    """Read a CSV file with the columns ``activated_experts``, ``rows_per_expert``, ``time_us``, and perhaps ``phase``.

    Without ``phase``, 128 rows per expert or more are taken for prefill, whose tiles are higher.

    Raises
    ------
    InputError
        A column is missing, or a value is not a positive number; the message names line and column.
    """
    name = str(path)
    with open_input(name) as file, file.stream() as stream:
        lines = stream.read().decode("utf-8-sig", errors="replace").splitlines()
    reader = csv.DictReader(lines)
    found = [str(column).strip().lower() for column in reader.fieldnames or ()]
    if missing := [column for column in COLUMNS if column not in found]:
        hint = f"the first line is a header, for example {','.join(COLUMNS)}"
        raise InputError(f"no column {', '.join(missing)}", rule="a compute table has all three", hint=hint, where=name)
    reader.fieldnames = found
    values, tiles = [], []
    for row in reader:
        where = Location(file=name, line=reader.line_num)
        values.append([_positive(row[column], column, where) for column in COLUMNS])
        tiles.append(_tile_rows(row.get(PHASE) or "", values[-1][1], where))
        if len(values) > MAX_ROWS:
            raise InputError("too many measurements", rule=f"at most {MAX_ROWS:,}", where=where)
    if not values:
        raise InputError("no measurements", rule="one or more lines below the header", where=name)
    experts, rows, time_us = np.array(values).T
    return ComputeTable(experts=experts, rows=rows, tile_rows=np.array(tiles), time_us=time_us, name=name)


def _positive(text: str | None, column: str, where: Location) -> float:
    try:
        value = float(text or "")
        if 0 < value < float("inf"):
            return value
    except ValueError:
        pass
    raise InputError(f"{column} {text!r}", rule="a positive number", where=where)


def _tile_rows(phase: str, rows: float, where: Location) -> int:
    phase = phase.strip().lower() or ("prefill" if rows >= PREFILL_FROM_ROWS else "decode")
    if phase not in TILE_ROWS:
        raise InputError(f"phase {phase!r}", rule=f"one of {', '.join(TILE_ROWS)}", where=where)
    return TILE_ROWS[phase]


def calibrate(accelerator: Accelerator, model: ModelSpec, table: ComputeTable) -> Calibration:
    """Fit the compute constants of an accelerator to a table by least squares of the relative errors.

    Measurements with few rows per expert are bound by memory, the others by arithmetic; every way to draw the line
    between them is tried, each a linear fit with nothing below zero. The one with the least error is taken, a further
    constant only where it pays by the Bayesian information criterion; of equals, the nearest to the accelerator's own.

    Raises
    ------
    InputError
        The table does not determine the constants, or implies more than the accelerator has.

    Complexity: O(measurements²).
    """
    preset = ExpertCompute.of(model, accelerator, "decode")
    usual = np.array([accelerator.launch_us, preset.weight_us, preset.row_us])
    best: tuple[float, float, Floats] | None = None
    order = np.argsort(table.padded_rows / table.experts, kind="stable")
    density = (table.padded_rows / table.experts)[order]
    cuts = [0, *[place for place, (low, high) in enumerate(pairwise(density), start=1) if low < high], len(order)]
    for cut in cuts:
        arithmetic = np.zeros(len(order), bool)
        arithmetic[order[cut:]] = True
        constants = _linear(table, arithmetic, (preset.weight_us, preset.row_us))
        if constants is None:
            continue
        misfit = float((_relative(table, constants) ** 2).mean()) + EXACT**2
        free = 1 + np.count_nonzero(constants[1:] != usual[1:])
        criterion = len(order) * np.log(misfit) + free * np.log(len(order))
        away = float(np.abs(np.log(constants[1:] / usual[1:])).sum())
        if best is None or (round(criterion, 6), away) < best[:2]:
            best = round(criterion, 6), away, constants
    if best is None:
        raise InputError(
            "the measurements do not determine the start-up time beside the rest",
            rule="at least two numbers of activated experts, or of rows per expert where arithmetic binds",
            hint="measure with few and with many experts",
            where=table.name,
        )
    launch, weight, row = best[2]
    known = zip(("hbm_efficiency", "gemm_efficiency"), best[2][1:] != usual[1:], strict=True)
    fitted = ("launch_us", *(name for name, found in known if found))
    made = accelerator.replace(
        launch_us=max(launch, LEAST_LAUNCH_US),
        hbm_efficiency=_share(accelerator.hbm_efficiency * preset.weight_us / weight, "memory bandwidth", table),
        gemm_efficiency=_share(accelerator.gemm_efficiency * preset.row_us / row, "arithmetic", table),
    )
    return Calibration(accelerator=made, fitted=fitted, errors=_relative(table, best[2]), name=table.name)


def _linear(table: ComputeTable, arithmetic: npt.NDArray[np.bool_], preset: tuple[float, float]) -> Floats | None:
    """``(t0, w, c)`` for a given part that is bound by arithmetic; None where they are not determined."""
    from scipy.optimize import nnls

    columns = [np.ones(len(arithmetic)), table.experts * ~arithmetic, table.padded_rows * arithmetic]
    used = [0, *([1] * bool((~arithmetic).any())), *([2] * bool(arithmetic.any()))]
    design = np.stack([columns[place] / table.time_us for place in used], axis=1)
    scale = np.linalg.norm(design, axis=0)
    if np.linalg.matrix_rank(design / scale, tol=1e-9) < len(used):
        return None
    found, _ = nnls(design / scale, np.ones(len(arithmetic)))
    constants = np.array([0.0, *preset])
    constants[used] = found / scale
    return constants if (constants[1:] > 0).all() else None


def _relative(table: ComputeTable, constants: Floats) -> Floats:
    launch, weight, row = constants
    errors: Floats = (launch + np.maximum(weight * table.experts, row * table.padded_rows)) / table.time_us - 1
    return errors


def _share(share: float, what: str, table: ComputeTable) -> float:
    if share > 1:
        raise InputError(
            f"the measurements imply {share:.2f} of the accelerator's {what}",
            rule="no more than all of it is reached",
            hint="are --accelerator and --model those that were measured?",
            where=table.name,
        )
    return share
