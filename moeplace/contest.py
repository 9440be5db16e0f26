"""From names to what a score needs: placements side by side, the hardware and the model they are judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moeplace.build import (
    Choices,
    check_law,
    law_sentences,
    measured,
    model_for,
    model_sentence,
    preset_for,
    sent_as,
    topology_for,
)
from moeplace.diff import Change, compare_placements
from moeplace.errors import InputError, ProblemError, UnknownNameError, unknown_name
from moeplace.exporters import Target, load_bytes, parse_placement
from moeplace.exporters.native import PlacementFile
from moeplace.migration import Schedule, schedule_moves
from moeplace.model import ModelSpec, load_model
from moeplace.placement import Placement
from moeplace.problem import slots_for
from moeplace.routing import EVEN, POLICIES
from moeplace.scoring import Score
from moeplace.solvers.linear import contiguous
from moeplace.topology import Topology, load_topology
from moeplace.trace import Counts, TraceMeta, TraceStream

LINEAR = "linear"
BUILT_IN = (LINEAR,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Placements to be judged, and on what.

    Attributes
    ----------
    placements
        Label → placement, in the order given.
    topologies, model
        Where they are judged.
    assumptions
        What was not said but assumed, one sentence each.
    fitted_on
        Label → digest of the tokens a placement file says it was fitted on.
    routings
        Label → replica choice that a placement file names, where it is not the even one and no other is asked for.
    """

    placements: Mapping[str, Placement]
    topologies: tuple[Topology, ...]
    model: ModelSpec
    assumptions: tuple[str, ...]
    fitted_on: Mapping[str, str]
    routings: Mapping[str, str]


def build_contest(
    source: TraceStream | Counts,
    names: Sequence[str],
    choices: Choices | None = None,
    *,
    topologies: Sequence[str] = (),
    batches: int | None = None,
) -> Contest:
    """Load what is to be scored.

    Parameters
    ----------
    source
        The trace they are scored on.
    names
        Placement files, or ``linear`` for the contiguous placement of the trace's experts.
    choices
        Model, accelerator, number of GPUs and batch law, where they are fixed.
    topologies
        Names or files; by default what the placement files name.
    batches
        Steps to draw, where that is fixed.

    Raises
    ------
    InputError, ProblemError
        A file cannot be read, or the parts do not fit together.
    """
    choices = choices or Choices()
    check_law(source, requests=choices.batch_requests, tokens=choices.batch_tokens, batches=batches)
    files = _load(names, _target(source.meta, choices, topologies))
    known = [file for file in files.values() if file is not None]
    places, said = _topologies(topologies, choices, known)
    model = sent_as(_model(source.meta, choices.model, known, said), choices)
    fitted = [measured(place, model, choices) for place in places]
    said += dict.fromkeys(sentence for _, told in fitted for sentence in told)
    said += _other_dataflows(files, choices.dataflow)
    routings = {} if choices.routing else _routings(files, said)
    gpus, meta = places[0].num_gpus, source.meta
    linear = contiguous(slots_for(meta.num_experts, gpus), meta.num_layers, meta.num_experts)
    return Contest(
        placements={label: linear if file is None else file.placement for label, file in files.items()},
        topologies=tuple(place for place, _ in fitted),
        model=model,
        assumptions=tuple(said),
        fitted_on={label: _trace_digest(file) for label, file in files.items() if file is not None},
        routings=routings,
    )


def _routings(files: Mapping[str, PlacementFile | None], said: list[str]) -> dict[str, str]:
    """Replica choices that files name; ``said`` grows by a sentence for each, and for those that are not known."""
    found = {}
    for label, file in files.items():
        named = None if file is None else file.details.get("routing")
        if not isinstance(named, str) or named == EVEN:
            continue
        if named in POLICIES:
            found[label] = named
            said.append(f"{label}: copies are chosen {named}, as its file says; --routing names another choice")
        else:
            said.append(f"{label}: its replica choice {named!r} is not known, copies share evenly; --routing names one")
    return found


def _trace_digest(file: PlacementFile) -> str:
    provenance = file.details.get("provenance")
    return str(provenance.get("trace_digest", "")) if isinstance(provenance, dict) else ""


def read_files(paths: Sequence[str], target: Target | None = None, *, format: str | None = None) -> list[PlacementFile]:
    """Read placement files that belong together: those that do not say how many GPUs there are have as many as others.

    Raises
    ------
    InputError
        A file cannot be read, or no file and no ``target`` says how many GPUs there are.
    """
    target = target or Target()
    contents = [load_bytes(path) for path in paths]
    files: dict[int, PlacementFile] = {}
    failed: dict[int, InputError] = {}
    for place, (path, data) in enumerate(zip(paths, contents, strict=True)):
        try:
            files[place] = parse_placement(data, path, format=format, target=target)
        except InputError as error:
            failed[place] = error
    gpus = {file.placement.num_gpus for file in files.values()}
    if failed and (target.num_gpus is not None or len(gpus) != 1):
        raise next(iter(failed.values()))
    for place in failed:
        told = replace(target, num_gpus=next(iter(gpus)))
        files[place] = parse_placement(contents[place], paths[place], format=format, target=told)
    return [files[place] for place in range(len(paths))]


def compare_files(
    before: PlacementFile,
    after: PlacementFile,
    *,
    model: str | None = None,
    num_nodes: int | None = None,
    relabel: bool = False,
) -> Change:
    """Compare two placement files; bytes are those of ``model``, else of the preset a file names."""
    spec = load_model(model) if model is not None else _preset_of(after) or _preset_of(before)
    return compare_placements(
        before.placement,
        after.placement,
        layer_ids=after.layer_ids,
        expert_bytes=None if spec is None else float(spec.expert_weight_bytes),
        num_nodes=num_nodes or nodes_of(after, before),
        relabel=relabel,
    )


def schedule_files(
    before: PlacementFile,
    after: PlacementFile,
    change: Change,
    *,
    spare_slots: int = 1,
    num_nodes: int | None = None,
) -> Schedule:
    """Find rounds that make a change happen, its GPUs renamed if they were for it."""
    goal = after.placement if change.order is None else after.placement.permute_gpus(change.order)
    return schedule_moves(
        before.placement,
        goal,
        spare_slots=spare_slots,
        num_nodes=num_nodes or nodes_of(after, before),
        layer_ids=change.layer_ids,
        expert_bytes=change.expert_bytes,
    )


def rename_sentences(*files: PlacementFile) -> tuple[str, ...]:
    """Say where renaming GPUs changes what a placement costs: on networks whose GPUs are not all alike."""
    names = dict.fromkeys(told[0] for file in files if (told := _topology_of(file)) is not None)
    for name in names:
        try:
            topology = load_topology(name)
        except InputError:
            continue
        if topology.link_gb_per_s:
            return (f"GPUs of {name} are not alike: renaming them changes the traffic; score the renamed placement",)
    return ()


def nodes_of(*files: PlacementFile) -> int:
    """Nodes that the first file to say so names; 1 where none does."""
    for file in files:
        told = file.details.get("topology")
        nodes = told.get("num_nodes") if isinstance(told, dict) else None
        if type(nodes) is int and nodes > 0 and file.placement.num_gpus % nodes == 0:
            return nodes
    return 1


def fit_sentences(contest: Contest, scores: Sequence[Score]) -> tuple[str, ...]:
    """Say which placements were fitted on the very tokens they are scored on."""
    scored = {entry.trace_digest for entry in scores}
    seen = [label for label, digest in contest.fitted_on.items() if digest in scored]
    if not seen:
        return ()
    verb = "was" if len(seen) == 1 else "were"
    return (
        f"{', '.join(seen)} {verb} fitted on these very tokens, which flatters the score: --fit and --test part them",
    )


def score_sentences(scores: Sequence[Score], source: TraceStream | Counts, choices: Choices) -> tuple[str, ...]:
    """What a score says about its steps: where the default batch law was cut down to what the trace has."""
    if isinstance(source, Counts):
        return ("counts have no tokens to draw steps from: the steps are the recorded ones",)
    laws = dict.fromkeys((entry.law.phase, entry.law.requests, entry.law.tokens) for entry in scores)
    first = {entry.law.phase: entry.law for entry in scores}
    asked = {"requests": choices.batch_requests, "tokens": choices.batch_tokens}
    return tuple(line for phase, _, _ in laws for line in law_sentences(first[phase], **asked))


def _target(meta: TraceMeta, choices: Choices, topologies: Sequence[str]) -> Target:
    """What placement files are of that do not say: the trace's model, the GPUs of the topologies."""
    gpus = choices.num_gpus
    if gpus is None and topologies:
        gpus = topology_for(replace(choices, topology=topologies[0])).num_gpus
    return Target(model=model_for(meta, choices.model), num_gpus=gpus)


def _load(names: Sequence[str], target: Target) -> dict[str, PlacementFile | None]:
    """Label → file; None for names computed from the trace's shape. Labels are file names, made unique."""
    labels: dict[str, str] = {}
    files: list[str] = []
    for name in names:
        built_in = name in BUILT_IN and not Path(name).exists()
        if not built_in and name != "-" and not Path(name).suffix and not Path(name).exists():
            raise (
                unknown_name("placement", name, BUILT_IN) if "/" not in name else InputError("no such file", where=name)
            )
        label = name if built_in or name == "-" else Path(name).stem
        label = name if label in labels else label
        if label in labels:
            raise InputError(f"placement {name} is given twice", rule="each is scored once")
        labels[label] = name
        files += [] if built_in else [name]
    read = dict(zip(files, read_files(files, target), strict=True))
    return {label: read.get(name) for label, name in labels.items()}


def _topologies(
    specs: Sequence[str], choices: Choices, files: Sequence[PlacementFile]
) -> tuple[list[Topology], list[str]]:
    if specs:
        return [topology_for(replace(choices, topology=spec)) for spec in specs], []
    named = dict.fromkeys(_topology_of(file) for file in files)
    if choices.num_gpus is None and len(named) == 1 and (told := next(iter(named))) is not None:
        topology = _rebuilt(*told, choices)
        said = f"topology {topology.name} of {topology.accelerator.name}, as the placement files name it"
        return [topology], [said]
    sizes = dict.fromkeys(file.placement.num_gpus for file in files)
    gpus = next(iter(sizes)) if choices.num_gpus is None and sizes else choices.num_gpus
    topology = topology_for(replace(choices, num_gpus=gpus, topology=None))
    many = "; the placement files name several" if len(named) > 1 else ""
    said = f"topology {topology.name} of {topology.accelerator.name}{many}; --topology names another"
    return [topology], [said]


def _topology_of(file: PlacementFile) -> tuple[str, str] | None:
    """Name and digest of the topology a file was made for."""
    told = file.details.get("topology")
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        return None
    return told["name"], str(told.get("digest", ""))


def _rebuilt(name: str, digest: str, choices: Choices) -> Topology:
    try:
        topology = load_topology(name, accelerator=choices.accelerator)
    except (UnknownNameError, InputError):
        topology = None
    same = choices.accelerator is None and choices.compute_table is None
    if topology is None or (same and digest and topology.digest() != digest):
        raise ProblemError(
            f"the placement was made for {name!r}, which cannot be rebuilt from its name",
            rule="a topology is a preset, a TOML file, or KIND:DIMS of an accelerator",
            hint="give --topology, and --accelerator and --compute-table if they were given then",
        )
    return topology


def _model(meta: TraceMeta, name: str | None, files: Sequence[PlacementFile], said: list[str]) -> ModelSpec:
    model = model_for(meta, name)
    if name is not None:
        return model
    if preset_for(meta, meta.model_id) is None:
        presets = [_preset_of(file, meta) for file in files]
        names = {preset.name if preset else None for preset in presets}
        if len(names) == 1 and presets[0] is not None:
            said.append(f"model {presets[0].name}, as the placement files name it")
            return presets[0]
    said.append(model_sentence(meta, model))
    return model


def _other_dataflows(files: Mapping[str, PlacementFile | None], dataflow: str) -> list[str]:
    made = {label: file.details.get("dataflow", dataflow) for label, file in files.items() if file is not None}
    return [
        f"{label} was made for {made_for} execution and is scored under {dataflow}; --dataflow changes that"
        for label, made_for in made.items()
        if made_for != dataflow
    ]


def _preset_of(file: PlacementFile, meta: TraceMeta | None = None) -> ModelSpec | None:
    told = file.details.get("model")
    name = told.get("name") if isinstance(told, dict) else None
    if not isinstance(name, str):
        return None
    if meta is not None:
        return preset_for(meta, name)
    try:
        return load_model(name)
    except (UnknownNameError, InputError):
        return None
