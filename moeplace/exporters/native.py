"""The native placement file, ``moeplace/placement/1``: slots, what they were judged by, and where they come from.

JSON with sorted keys and fixed precision, one line per layer, and nothing that differs between two equal runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import IO, Any

from moeplace.diff import move_terms
from moeplace.errors import InfeasibleError, InputError, Location, NothingFoundError, PlacementError
from moeplace.exporters._faults import Inspection, Stack, Target
from moeplace.front import Front
from moeplace.frozen import Ints
from moeplace.objective import Term
from moeplace.placement import EMPTY, Placement
from moeplace.problem import Problem
from moeplace.solution import Limits, Solution, Stage, Status

DESCRIPTION = "moeplace's own JSON of any placement, with bound, terms and provenance (.json)"
SUFFIXES = (".json",)
FLAG = ""
STACK = Stack(name="moeplace", even=False, tolerated=("duplicate",))
SCHEMA = "moeplace/placement/1"
DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementFile:
    """A placement and what its file says about it.

    Attributes
    ----------
    placement
        The slots.
    layer_ids
        One id per MoE layer.
    details
        Every other key of the document, as JSON values.
    load
        ``[MoE layer, expert]`` loads of the problem it answers, for stacks that take loads; in no native file.
    """

    placement: Placement
    layer_ids: tuple[int, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    load: Ints | None = field(default=None, repr=False, compare=False)

    def renamed(self, order: Ints) -> PlacementFile:
        """The same with GPUs renamed: GPU g is this one's ``order[g]``; what was judged by GPU is left out."""
        kept = {key: value for key, value in self.details.items() if key in ("dataflow", "model", "topology")}
        return PlacementFile(placement=self.placement.permute_gpus(order), layer_ids=self.layer_ids, details=kept)


def document_of(
    problem: Problem, solution: Solution, limits: Limits | None = None, front: Front | None = None
) -> PlacementFile:
    """Collect what the native file says about a solution, and about the front it was chosen from.

    Raises
    ------
    InfeasibleError, NothingFoundError
        The solution has no placement: proven to have none, or none was found.
    """
    if solution.placement is None:
        raise _without_placement(solution)
    limits = limits or Limits()
    meta = problem.stats.meta
    terms = {**solution.terms, **move_terms(problem, solution.placement)}
    details = {
        "schema": SCHEMA,
        "model": {
            "name": problem.model.name,
            "num_moe_layers": meta.num_layers,
            "num_experts": meta.num_experts,
            "top_k": meta.top_k,
        },
        "topology": {
            "name": problem.topology.name,
            "num_nodes": problem.topology.num_nodes,
            "num_gpus": problem.num_gpus,
            "digest": problem.topology.digest(),
        },
        "dataflow": problem.dataflow,
        "routing": problem.routing,
        "objective": {"name": problem.objective, "value": _round(solution.objective), "unit": solution.unit},
        "bound": _round(solution.bound),
        "gap": _round(solution.gap),
        "status": str(solution.status),
        "stop_reason": str(solution.stop_reason),
        "terms": {name: _term(term) for name, term in terms.items()},
        "provenance": {
            "version": metadata.version("moeplace"),
            "trace_digest": problem.stats.trace_digest,
            "solver": solution.solver,
            "seed": solution.seed,
            "limits": {
                "time_limit_s": limits.time_limit_s if math.isfinite(limits.time_limit_s) else None,
                "gap": limits.gap,
                "work": limits.work,
            },
            "options": dict(sorted(limits.options.items())),
            "batch": {"phase": problem.law.phase, "requests": problem.law.requests, "tokens": problem.law.tokens},
            "stages": [_stage(stage) for stage in solution.stages],
            "notes": list(solution.notes),
        },
    }
    if front is not None:
        details["front"] = _front(front)
    load = problem.stats.load
    return PlacementFile(placement=solution.placement, layer_ids=meta.layer_ids, details=details, load=load)


def _front(front: Front) -> dict[str, Any]:
    points = [
        {name: _round(value) if isinstance(value, float) else value for name, value in dataclasses.asdict(one).items()}
        for one in front.points
    ]
    corner = {
        "load": _round(front.load_floor),
        "traffic": _round(front.traffic_bound),
        "step_time_us": _round(front.step_time_bound_us),
    }
    traffic = {"name": front.traffic, "unit": front.unit}
    return {"points": points, "chosen": front.chosen, "traffic": traffic, "corner": corner}


def _without_placement(solution: Solution) -> InfeasibleError | NothingFoundError:
    # the last note is the one that says why
    why = solution.notes[-1] if solution.notes else "no placement was found"
    if solution.status is Status.INFEASIBLE:
        return InfeasibleError(f"{solution.solver}: {why}", hint="loosen --load-cap, or add slots")
    return NothingFoundError(
        f"no placement: {why} (stopped: {solution.stop_reason})",
        rule="a placement keeps every constraint",
        hint="a looser --load-cap, more slots, a longer --time-limit, or another --solver",
    )


def write(document: PlacementFile, file: IO[bytes], target: Target | None = None, suffix: str = "") -> None:
    """Write the native JSON; it takes any placement, whatever it is for."""
    fields = {"schema": SCHEMA, **document.details}
    fields["layer_ids"] = list(document.layer_ids)
    fields.setdefault("model", {})
    lines = ["{"]
    for name in sorted([*fields, "slots"]):
        if name == "slots":
            rows = ",\n  ".join(_compact(layer) for layer in ragged(document.placement))
            lines.append(f' "slots": [\n  {rows}\n ],')
        else:
            lines.append(f" {json.dumps(name)}: {_compact(fields[name])},")
    lines[-1] = lines[-1].removesuffix(",")
    file.write(("\n".join([*lines, "}"]) + "\n").encode())


def ragged(placement: Placement) -> list[list[list[int]]]:
    """``[layer][GPU][slot]`` lists without the padding: slots beyond a GPU's last used one in every layer.

    Where even the fullest GPU has such slots they are no padding but room, and are kept, so that reading restores them.
    """
    used = (placement.slots != EMPTY).any(axis=0)
    last = [int(gpu.nonzero()[0].max(initial=-1)) + 1 for gpu in used]
    if max(last) < placement.max_slots:
        return placement.to_lists()
    return [[gpu[: last[g]] for g, gpu in enumerate(layer)] for layer in placement.to_lists()]


def sniff(data: bytes) -> bool:
    """Whether a file looks like a native placement."""
    return data.lstrip().startswith(b"{") and (b"moeplace/placement/" in data or b'"slots"' in data)


def check(data: bytes, name: str, target: Target) -> Inspection:
    """Find the faults of a file that can be read."""
    document = read(data, name)
    inspection = Inspection(STACK, target)
    held = [[[expert for expert in gpu if expert != EMPTY] for gpu in layer] for layer in document.placement.to_lists()]
    inspection.nested(held, [f"layer {layer}" for layer in document.layer_ids])
    inspection.layer_ids = document.layer_ids
    model = target.model
    if model and document.layer_ids not in (model.moe_layer_ids, tuple(range(model.num_moe_layers))):
        told = f"{len(document.layer_ids)} layers, {document.layer_ids[0]} to {document.layer_ids[-1]}"
        inspection.say("layer-count", told, f"the {model.num_moe_layers} MoE layers of {model.name}")
    return inspection


def read(data: bytes, name: str, target: Target | None = None) -> PlacementFile:
    """Read the native JSON.

    Raises
    ------
    InputError, PlacementError
        Not JSON, another schema, a missing key, or slots that break a rule; the message names the place.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        where = Location(file=name, line=getattr(error, "lineno", None), column=getattr(error, "colno", None))
        what = "not JSON" if isinstance(error, UnicodeDecodeError) else f"not JSON: {getattr(error, 'msg', error)}"
        raise InputError(what, rule="a placement file is a JSON object", where=where) from error
    schema = document.get("schema", SCHEMA) if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise InputError(f"schema {schema!r}", rule=f"this version reads {SCHEMA}", where=name)
    slots, model = document.get("slots"), document.get("model")
    experts = model.get("num_experts") if isinstance(model, dict) else None
    if not _is_nested_ints(slots) or type(experts) is not int:
        raise InputError(
            "slots or model.num_experts is missing or of the wrong type",
            rule="slots are lists of integers [layer][GPU][slot], num_experts an integer",
            where=name,
        )
    try:
        placement = Placement.from_lists(slots, experts)
    except PlacementError as error:
        raise PlacementError(error.what, rule=error.rule, hint=error.hint, where=name) from error
    layer_ids = document.get("layer_ids", list(range(placement.num_layers)))
    if not isinstance(layer_ids, list) or [type(x) for x in layer_ids] != [int] * placement.num_layers:
        rule = f"a list of integers, one for each of the {placement.num_layers} layers of slots"
        raise InputError(f"layer_ids is {_compact(layer_ids)[:60]}", rule=rule, where=name)
    details = {key: value for key, value in document.items() if key not in ("slots", "layer_ids")}
    return PlacementFile(placement=placement, layer_ids=tuple(layer_ids), details=details)


def _is_nested_ints(slots: Any) -> bool:
    return isinstance(slots, list) and all(
        isinstance(layer, list)
        and all(isinstance(gpu, list) and all(_is_id(expert) for expert in gpu) for gpu in layer)
        for layer in slots
    )


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**62  # what an array of integers holds; its range is checked later


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _term(term: Term) -> dict[str, Any]:
    shown = {"value": _round(term.value), "unit": term.unit}
    return shown if term.bound is None else shown | {"bound": _round(term.bound)}


def _stage(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "objective": _round(stage.objective),
        "bound": _round(stage.bound),
        "gap": _round(stage.gap),
        "unit": stage.unit,
        "status": str(stage.status),
        "stop_reason": str(stage.stop_reason),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), DIGITS)
