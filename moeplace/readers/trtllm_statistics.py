"""TensorRT-LLM expert statistics: per rank, how often each expert was chosen in each iteration and layer.

A run with ``EXPERT_STATISTIC_ITER_RANGE`` leaves a folder with ``meta_info.json`` and one ``rank{r}.safetensors`` per
rank; an array is named ``{iteration}_{layer}`` and holds one count per logical expert. Counts are summed over ranks,
iterations are the steps, and layers keep their absolute numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.files import STDIN_NAME, InputFile, InputFolder, open_input
from moeplace.readers._common import ReaderOptions
from moeplace.readers._counts import checked_counts
from moeplace.readers._extras import is_safetensors, load_safetensors
from moeplace.readers._nested import json_value
from moeplace.trace import Counts

NAME = "trtllm-statistics"
DESCRIPTION = "TensorRT-LLM expert statistics: a folder of meta_info.json and rank*.safetensors, or one rank's file"

Cells: TypeAlias = dict[tuple[int, int], npt.NDArray[np.int64]]

_RANK_FILE = re.compile(r"rank(\d+)\.safetensors")
_KEY = re.compile(r"(\d+)_(\d+)")
_META = "meta_info.json"


def sniff(head: bytes, name: str) -> int:
    """Score how much ``head`` looks like one rank's statistics."""
    return 90 if is_safetensors(head) and re.search(rb'[{,]"\d+_\d+":\{', head) else 0


def sniff_folder(folder: Path) -> int:
    """Score how much a folder looks like expert statistics."""
    return 95 if any(_RANK_FILE.fullmatch(path.name) for path in folder.iterdir()) else 0


def open(source: InputFile, options: ReaderOptions) -> Counts:
    """Read the statistics of one rank; ``meta_info.json`` beside it gives top-k.

    Raises
    ------
    TraceError
        An array is not named by iteration and layer, or no iteration has all layers.
    MissingExtraError
        The package safetensors is not installed.
    """
    meta = _meta_beside(source)
    note = "one rank's file: choices made on other ranks are not counted; give the folder for all ranks"
    return _joined([(source.name, _cells(source, meta))], meta, source.name, [note], options)


def open_folder(folder: Path, options: ReaderOptions) -> Counts:
    """Read the statistics of all ranks, summed; the errors are those of :func:`open`."""
    source = InputFolder(folder)
    files, notes = _rank_files(source), []
    if not files:
        raise TraceError("no rank*.safetensors", rule="one file per rank", where=Location(file=source.name))
    meta = {}
    if _META in source.files:
        with source.open(_META) as meta_file:
            meta = _parsed_meta(meta_file)
    else:
        notes.append(f"no {_META}: the model's shape is taken from the arrays")
    if missing := [str(rank) for rank in range(max(files) + 1) if rank not in files]:
        notes.append(f"no files of ranks {', '.join(missing)}: choices made there are not counted")
    ranks = []
    for rank in sorted(files):
        with source.open(files[rank]) as file:
            ranks.append((file.name, _cells(file, meta)))
    return _joined(ranks, meta, source.name, notes, options)


def _rank_files(folder: InputFolder) -> dict[int, str]:
    return {int(match[1]): name for name in folder.files if (match := _RANK_FILE.fullmatch(name))}


def _meta_beside(source: InputFile) -> dict[str, Any]:
    path = Path(source.name).parent / _META
    if source.name == STDIN_NAME or not path.is_file():
        return {}
    with open_input(path) as file:
        return _parsed_meta(file)


def _parsed_meta(file: InputFile) -> dict[str, Any]:
    known = ("num_experts", "num_experts_per_token")
    rule = f"{' and '.join(known)} are positive integers"
    with file.stream() as stream:
        value = json_value(stream.read(), file.name, rule)
    if not isinstance(value, dict) or any(type(value.get(key)) is not int or value[key] < 1 for key in known):
        raise TraceError("does not give the model's shape", rule=rule, where=Location(file=file.name))
    return value


def _cells(source: InputFile, meta: Mapping[str, Any]) -> Cells:
    """Read one rank's arrays by iteration and layer."""
    cells: Cells = {}
    num_experts = meta.get("num_experts")
    for key, array in load_safetensors(source).items():
        where = Location(file=source.name, element=key)
        match = _KEY.fullmatch(key)
        if match is None:
            rule = "arrays are named {iteration}_{layer}, as in 100_3"
            raise TraceError(f"array {key!r}", rule=rule, where=where)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            what = f"shape {list(array.shape)} of {array.dtype}"
            raise TraceError(what, rule="one integer per expert", where=where)
        num_experts = num_experts or array.size
        if array.size != num_experts:
            what = f"{array.size} counts"
            raise TraceError(what, rule=f"one per expert: {num_experts} in {_META} or the first array", where=where)
        if array.size and array.min() < 0:
            at = int(array.argmin())
            where = Location(file=source.name, element=f"{key}[{at}]")
            raise TraceError(f"count {array[at]}", rule="counts are not negative", where=where)
        cells[int(match[1]), int(match[2])] = array.astype(np.int64)
    if not cells:
        raise TraceError("holds no arrays", rule="one per iteration and layer", where=Location(file=source.name))
    return cells


def _joined(
    ranks: list[tuple[str, Cells]], meta: Mapping[str, Any], file: str, notes: list[str], options: ReaderOptions
) -> Counts:
    """Sum over ranks, on the grid of iterations that have every layer."""
    total: Cells = {}
    for name, cells in ranks:
        for cell, counts in cells.items():
            if cell in total and total[cell].size != counts.size:
                where = Location(file=name, element=f"{cell[0]}_{cell[1]}")
                what = f"{counts.size} counts, but {total[cell].size} on another rank"
                raise TraceError(what, rule="all ranks count the same experts", where=where)
            total[cell] = total[cell] + counts if cell in total else counts
    layers = sorted({layer for _, layer in total})
    iterations = sorted({iteration for iteration, _ in total})
    whole = [i for i in iterations if all((i, layer) in total for layer in layers)]
    if not whole:
        rule = f"an iteration has the layers {layers[0]}..{layers[-1]}"
        hint = "was the recording cut off? record again with a longer EXPERT_STATISTIC_ITER_RANGE"
        raise TraceError("no iteration has all layers", rule=rule, hint=hint, where=Location(file=file))
    if lost := [str(i) for i in iterations if i not in set(whole)]:
        notes.append(f"iterations {', '.join(lost)} lack layers: taken as cut off and left out")
    if uneven := [name for name, cells in ranks if any((i, layer) not in cells for i in whole for layer in layers)]:
        notes.append(f"{', '.join(uneven)} lacks layers or iterations that other ranks have: counted as 0 there")
    counts = np.stack([np.stack([total[i, layer] for layer in layers]) for i in whole])
    fields = {"layer_ids": layers, "top_k": meta.get("num_experts_per_token"), "assumptions": notes or None}
    return checked_counts(counts, "counts", file, fields, options)
