"""``moeplace list`` and ``moeplace doctor``: what there is, and whether it works here."""

from __future__ import annotations

from typing import Any

import click

from moeplace.cli.options import common

LIST_EPILOG = """\b
Examples:
  moeplace list solvers
  moeplace list models --json
"""
DOCTOR_EPILOG = """\b
Examples:
  moeplace doctor
  moeplace doctor --json
"""
KINDS = ("solvers", "topologies", "models", "accelerators", "formats")
PACKAGES = ("numpy", "scipy", "pulp", "ortools", "click", "rich", "numba", "orjson", "platformdirs", "backports.zstd")
EXTRAS = {
    "plot": ("matplotlib",),
    "torch": ("torch",),
    "formats": ("safetensors", "pyarrow", "pyyaml"),
    "partition": ("mtkahypar",),
    "cluster": ("dask", "distributed"),
}


@click.command("list", epilog=LIST_EPILOG)
@click.argument("kind", type=click.Choice(KINDS))
@common
def list_command(kind: str, **options: Any) -> None:
    """List solvers, topologies, models, accelerators or formats."""
    from moeplace.report import name_table, write_json

    rows = {
        "solvers": _solvers,
        "topologies": _topologies,
        "models": _models,
        "accelerators": _accelerators,
        "formats": _formats,
    }[kind]()
    if options["as_json"]:
        write_json({"schema": "moeplace/list/1", "kind": kind, "entries": rows})
        return
    heads = list(dict.fromkeys(key for row in rows for key in row))
    name_table([head.replace("_", " ") for head in heads], [[_shown(row.get(head)) for head in heads] for row in rows])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {text}" for key, text in value.items())
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _solvers() -> list[dict[str, Any]]:
    from moeplace.solvers import list_solvers, load_solver

    modules = {name: load_solver(name) for name in list_solvers()}
    auto: dict[str, Any] = {
        "name": "auto",
        "description": "tries what suits the size and keeps the best",
        "options": {},
    }
    return [
        auto,
        *[
            {"name": name, "description": module.DESCRIPTION, "options": dict(module.OPTIONS)}
            for name, module in modules.items()
        ],
    ]


def _topologies() -> list[dict[str, Any]]:
    from moeplace.topology import EXAMPLES, list_topologies, load_topology

    rows: list[dict[str, Any]] = []
    for name in [*list_topologies(), *EXAMPLES.split(", ")]:
        topology = load_topology(name)
        rows.append(
            {
                "name": name,
                "gpus": topology.num_gpus,
                "nodes": topology.num_nodes,
                "accelerator": topology.accelerator.name,
                "local_gb_per_s": topology.local_gb_per_s if not topology.link_gb_per_s else None,
                "nic_gb_per_s": topology.nic_gb_per_s if topology.num_nodes > 1 else None,
                "link_gb_per_s": topology.link_gb_per_s or None,
            }
        )
    return rows


def _models() -> list[dict[str, Any]]:
    from moeplace.model import list_models, load_model

    names = ("num_layers", "num_moe_layers", "num_experts", "top_k", "num_shared", "hidden", "expert_inner")
    return [
        {"name": name} | {field: getattr(load_model(name), field) for field in (*names, "num_groups")}
        for name in list_models()
    ]


def _accelerators() -> list[dict[str, Any]]:
    from moeplace.hardware import list_accelerators, load_accelerator

    names = ("hbm_gb", "hbm_tb_per_s", "bf16_tflops", "fp8_tflops", "scale_up_gb_per_s", "nic_gb_per_s")
    return [
        {"name": name} | {field: getattr(load_accelerator(name), field) for field in names}
        for name in list_accelerators()
    ]


def _formats() -> list[dict[str, Any]]:
    from moeplace.exporters import list_placement_formats, load_exporter
    from moeplace.readers import list_formats

    traces = [{"name": name, "of": "trace (input)", "description": text} for name, text in list_formats().items()]
    placements = [
        {"name": name, "of": "placement", "description": load_exporter(name).DESCRIPTION}
        for name in list_placement_formats()
    ]
    return [*traces, *placements]


@click.command("doctor", epilog=DOCTOR_EPILOG)
@common
def doctor_command(**options: Any) -> None:
    """Show versions, optional parts, and whether the solvers work here; paste it into a bug report."""
    import os
    import platform
    from importlib import metadata

    from moeplace.report import console, write_json, write_lines

    lines = {
        "moeplace": metadata.version("moeplace"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    lines |= {name: _version(name) for name in PACKAGES}
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if _version(name) == "missing"]
        lines[f"extra {extra}"] = f"missing {', '.join(missing)}: pip install 'moeplace[{extra}]'" if missing else "ok"
    lines |= {"CBC": _works(_try_cbc), "CP-SAT": _works(_try_cpsat), "compiled kernels": _works(_try_numba)}
    if options["as_json"]:
        write_json({"schema": "moeplace/doctor/1", **lines})
        return
    write_lines(lines, console())


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _works(attempt: Any) -> str:
    try:
        return f"ok {attempt()}".strip()
    except Exception as error:
        return f"does not work: {type(error).__name__}: {error}"


def _try_cbc() -> str:
    from moeplace.milp import LinearModel, solve_cbc

    return _solve_tiny(LinearModel, solve_cbc)


def _try_cpsat() -> str:
    from moeplace.milp import LinearModel, solve_cpsat

    return _solve_tiny(LinearModel, solve_cpsat)


def _try_numba() -> str:
    import numpy as np

    from moeplace.counting import PairCounter

    PairCounter(2, 4, compiled=True).add(np.zeros((1, 2, 1), np.uint8))
    return ""


def _solve_tiny(make: Any, solve: Any) -> str:
    raise NotImplementedError
