"""TensorRT-LLM's ``moe_config.load_balancer``: slots and the map of each MoE layer by the model's layer number.

The reader (``MoeLoadBalancerConfig``) forbids other keys. YAML, or JSON, which is YAML too. What the file cannot carry:
empty slots, GPUs of different sizes, the number of GPUs (``--num-gpus``), where the placement comes from.
"""

from __future__ import annotations

import importlib
import json
from typing import IO, Any

from moeplace.errors import InputError, Location, MissingExtraError
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.exporters._maps import an_object, compact, flat_rows, model_layers, number_absolute, placement_of, refuse
from moeplace.exporters.native import PlacementFile

DESCRIPTION = "TensorRT-LLM's moe_config.load_balancer: num_slots, initial_global_assignments by layer (.yaml, .json)"
SUFFIXES = (".yaml", ".yml", ".json")
FLAG = "moe_config: {load_balancer: FILE} in --config"
MAP, SLOTS, UPDATES = "initial_global_assignments", "num_slots", "layer_updates_per_iter"
STACK = Stack(
    name="TensorRT-LLM",
    consequences={
        "unknown-key": "TensorRT-LLM stops at start with a validation error: extra keys are forbidden",
        "missing-key": "TensorRT-LLM stops at start: without num_slots the config is invalid, without a map the "
        "placement "
        "is its own",
        "type": "TensorRT-LLM stops at start with a validation error",
        "ragged": "TensorRT-LLM stops at that layer: a row has num_slots entries",
        "width": "TensorRT-LLM stops at the first layer: a row has num_slots entries, at least one per expert",
        "negative": "TensorRT-LLM stops at that layer: a row holds the experts 0..E-1 and nothing else",
        "range": "TensorRT-LLM stops at that layer: a row holds the experts 0..E-1 and nothing else",
        "missing": "TensorRT-LLM stops at that layer: a row holds every expert",
        "duplicate": "TensorRT-LLM accepts it, and the second copy on a GPU takes memory and serves nothing",
        "layer-count": "TensorRT-LLM stops with KeyError at the first layer that is not there",
        "layer-numbering": "TensorRT-LLM gives layers the map of others, and stops with KeyError at the first "
        "that is not "
        "there: keys are the model's own layer numbers, dense layers counted",
        "indivisible": "TensorRT-LLM stops at start: num_slots must divide by the expert-parallel size",
    },
)


def write(document: PlacementFile, file: IO[bytes], target: Target, suffix: str = "") -> None:
    """Write YAML with a line per layer, or with suffix ``.json`` the same as JSON."""
    rows = dict(zip(model_layers(document, target.model), flat_rows(document, STACK), strict=True))
    width = len(next(iter(rows.values())))
    refuse(_inspected({MAP: rows, SLOTS: width, UPDATES: 0}, target))
    if suffix == ".json":
        lines = ",\n".join(f'"{layer}": {compact(row)}' for layer, row in rows.items())
        file.write(f'{{"{MAP}": {{\n{lines}\n}},\n"{UPDATES}": 0,\n"{SLOTS}": {width}}}\n'.encode())
        return
    lines = "".join(f"  {layer}: [{', '.join(map(str, row))}]\n" for layer, row in rows.items())
    file.write(f"{MAP}:\n{lines}{UPDATES}: 0\n{SLOTS}: {width}\n".encode())


def sniff(data: bytes) -> bool:
    """Whether a file has the map's name and is not vLLM's record of the same key."""
    return MAP.encode() in data and b"eplb_initial_mapping" not in data


def read(data: bytes, name: str, target: Target) -> PlacementFile:
    """Read YAML or JSON; layers come in the order of their numbers.

    Raises
    ------
    InputError, PlacementError
        Neither YAML nor JSON, a broken map, or an unknown number of GPUs.
    MissingExtraError
        YAML that is not JSON, and pyyaml is not installed.
    """
    return placement_of(check(data, name, target), name)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find every fault of a file."""
    return _inspected(_loaded(data, name), target)


def _inspected(value: Any, target: Target) -> Inspection:
    inspection = Inspection(STACK, target)
    if not an_object(value, inspection):
        return inspection
    if not inspection.keys(value, (MAP, SLOTS, UPDATES), (MAP, SLOTS), strict=True):
        return inspection
    width = inspection.number(value, SLOTS, low=1)
    if UPDATES in value:
        inspection.number(value, UPDATES)
    table = value[MAP]
    if not isinstance(table, dict) or not table or not all(_is_layer(key) for key in table):
        inspection.say("type", f"{MAP} is not a map from layer numbers to rows", "layer: [expert of each slot]")
        return inspection
    rows = dict(sorted((int(layer), row) for layer, row in table.items()))
    if len(rows) < len(table):
        inspection.say("type", f"{MAP} has a layer twice", "a row for each layer")
        return inspection
    inspection.flat(list(rows.values()), [f"layer {layer}" for layer in rows])
    number_absolute(inspection, tuple(rows))
    sizes = {len(row) for row in rows.values() if isinstance(row, list)}
    if width is not None and len(sizes) == 1 and sizes != {width}:
        inspection.say("width", f"rows of {sizes.pop()} slots, but {SLOTS} is {width}", f"{SLOTS} entries in each row")
    return inspection


def _is_layer(key: Any) -> bool:
    # pydantic turns "3" into 3, and nothing else that is written in digits
    return (type(key) is int and key >= 0) or (isinstance(key, str) and key.isascii() and key.isdigit())


def _loaded(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        pass
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError as error:
        hint = "pip install 'moeplace[formats]', or write the file as JSON, which TensorRT-LLM takes as well"
        raise MissingExtraError(
            f"{name} is YAML: reading it needs pyyaml, which is not installed", hint=hint
        ) from error
    # the compiled loader is the same safe subset, ten times as fast
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(data, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = Location(file=name, line=mark.line + 1 if mark else None, column=mark.column + 1 if mark else None)
        what = f"not YAML: {getattr(error, 'problem', None) or type(error).__name__}"
        raise InputError(what, rule="the file is YAML, or JSON", where=where) from error
