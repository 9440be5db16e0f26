"""Exports in SGLang's own loader, from its wheel: ``make test-stacks`` installs it; skipped where it is not.

Of the wheel only ``sglang/srt/eplb/expert_location.py`` runs, on a CPU; the server's settings around it are given.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from strategies import dealt
from test_stacks import CASES

from moeplace.exporters import Target, check_placement, read_placement, write_placement
from moeplace.model import ModelSpec, load_model

NEEDED = [name for name in ("torch", "sglang") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(NEEDED), reason=f"needs {' and '.join(NEEDED)}: make test-stacks")
Load = Callable[..., Any]


def module(name: str, monkeypatch: pytest.MonkeyPatch, **names: Any) -> ModuleType:
    """Put a module with some names where the loader imports it."""
    made = ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """SGLang's loader for one rank of a server with the given settings."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    settings = SimpleNamespace()
    # packages without their __init__, which wants a GPU server's worth of imports
    for name in ("sglang", "sglang.srt", "sglang.srt.eplb", "sglang.srt.elastic_ep"):
        module(name, monkeypatch, __path__=[str(root.joinpath(*name.split(".")[1:]))])
    off = {"elastic_expanded_world_enabled": lambda: False}
    module("sglang.srt.elastic_ep.elastic_ep", monkeypatch, **off)
    module(
        "sglang.srt.runtime_context",
        monkeypatch,
        get_device=lambda: SimpleNamespace(device="cpu"),
        get_exec=lambda: SimpleNamespace(moe=settings),
        get_parallel=lambda: settings,
        get_resources=lambda: settings,
    )
    monkeypatch.delitem(sys.modules, "sglang.srt.eplb.expert_location", raising=False)
    loader = importlib.import_module("sglang.srt.eplb.expert_location")
    monkeypatch.setattr(loader.ModelConfigForExpertLocation, "from_model_config", staticmethod(lambda config: config))

    def run(path: Path, model: ModelSpec, gpus: int, redundant: int, rank: int, dispatch: str = "static") -> Any:
        vars(settings).update(
            init_expert_location=str(path),
            ep_num_redundant_experts=redundant,
            ep_size=gpus,
            tp_size=gpus,
            nnodes=1,
            elastic_ep_initial_size=None,
            ep_join_mode=None,
            ep_dispatch_algorithm=dispatch,
            moe_a2a_backend="deepep" if dispatch == "static" else "none",
        )
        shape = {"num_layers": model.num_layers, "num_logical_experts": model.num_experts, "num_groups": None}
        return loader.compute_initial_expert_location_metadata(loader.ModelConfigForExpertLocation(**shape), rank)

    return run


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_takes_the_file(case: str, suffix: str, load: Load, tmp_path: Path) -> None:
    """On every rank the map is the placement, and each expert is dispatched to a slot that holds it."""
    preset, gpus, redundant = CASES[case]
    model = load_model(preset)
    document, target = dealt(model, gpus, redundant), Target(model=model, num_gpus=gpus, num_redundant=redundant)
    path = tmp_path / f"map{suffix}"
    write_placement(document, path, format="sglang", target=target)
    assert read_placement(path, target=target).placement.digest() == document.placement.digest()
    wanted = document.placement.slots.reshape(model.num_moe_layers, -1)
    for rank in range(gpus) if suffix == ".json" else (0, gpus - 1):
        found = load(path, model, gpus, redundant, rank)
        table = found.physical_to_logical_map.numpy()
        assert table.shape == (model.num_layers, model.num_experts + redundant)
        assert (table[list(model.moe_layer_ids)] == wanted).all()
        assert (found.logical_to_all_physical_map_num_valid >= 1).all()
        chosen = found.logical_to_rank_dispatch_physical_map.numpy()
        for layer in range(model.num_layers):
            assert (table[layer, chosen[layer]] == range(model.num_experts)).all()


@pytest.mark.parametrize(
    ("kind", "error"),
    [("unknown-key", TypeError), ("range", IndexError), ("ragged", ValueError), ("missing", ZeroDivisionError)],
)
def test_what_check_foretells_is_what_the_loader_does(
    kind: str, error: type[Exception], load: Load, tmp_path: Path
) -> None:
    """Broken files fail in the loader with the error that the consequence names, and check finds each."""
    model = load_model("gpt-oss-20b")
    target = Target(model=model, num_gpus=8)
    write_placement(dealt(model, 8, 0), tmp_path / "map.json", format="sglang", target=target)
    value = json.loads((tmp_path / "map.json").read_text())
    row = value["physical_to_logical_map"][3]
    if kind == "unknown-key":
        value["note"] = 1
    elif kind == "ragged":
        row.pop()
    else:
        row[row.index(5)] = 32 if kind == "range" else 6
    (tmp_path / "map.json").write_text(json.dumps(value))
    faults = {fault.kind: fault for fault in check_placement(tmp_path / "map.json", target=target)[1].errors}
    assert error.__name__ in faults[kind].consequence
    with pytest.raises(error, match=r".+"):
        load(tmp_path / "map.json", model, 8, 0, 0)


def test_what_the_loader_takes_silently_check_finds(load: Load, tmp_path: Path) -> None:
    """Ids below 0 and rows of the MoE layers alone are loaded without a word."""
    model = load_model("deepseek-v3")
    target = Target(model=model, num_gpus=32)
    write_placement(dealt(model, 32, 0), tmp_path / "map.json", format="sglang", target=target)
    rows = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    for broken, kind in (
        ([[-1 if expert == 255 else expert for expert in row] for row in rows], "negative"),
        (rows[3:], "layer-numbering"),
    ):
        (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical_map": broken}))
        assert load(tmp_path / "map.json", model, 32, 0, 0, "dynamic") is not None
        assert kind in {fault.kind for fault in check_placement(tmp_path / "map.json", target=target)[1].errors}
