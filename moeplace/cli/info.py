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
KINDS = ("solvers", "topologies", "models", "accelerators", "prices", "formats")
HEADS = {
    "gpus": "GPUs",
    "local_gb_per_s": "in node GB/s",
    "nic_gb_per_s": "NIC GB/s",
    "link_gb_per_s": "link GB/s",
    "num_layers": "layers",
    "num_moe_layers": "MoE layers",
    "num_experts": "experts",
    "top_k": "top-k",
    "num_shared": "shared",
    "expert_inner": "inner",
    "num_groups": "groups",
    "hbm_gb": "HBM GB",
    "hbm_tb_per_s": "HBM TB/s",
    "bf16_tflops": "BF16 TFLOPS",
    "fp8_tflops": "FP8 TFLOPS",
    "scale_up_gb_per_s": "scale-up GB/s",
}
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
    """List solvers, topologies, models, accelerators, prices or formats."""
    from moeplace.report import write_json, write_table

    rows = {
        "solvers": _solvers,
        "topologies": _topologies,
        "models": _models,
        "accelerators": _accelerators,
        "prices": _prices,
        "formats": _formats,
    }[kind]()
    if options["as_json"]:
        write_json({"schema": "moeplace/list/1", "kind": kind, "entries": rows})
        return
    if kind == "solvers":
        _write_solvers(rows)
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_shown(row.get(key)) for key in keys] for row in rows]
    numeric = [i for i, key in enumerate(keys) if all(isinstance(row.get(key), int | float | None) for row in rows)]
    write_table([[HEADS.get(key, key.replace("_", " ")) for key in keys], *cells], right=numeric)


def _write_solvers(rows: list[dict[str, Any]]) -> None:
    from moeplace.report import console, write_lines

    lines: list[tuple[str, str]] = []  # several solvers have an option of one name
    for row in rows:
        lines.append((row["name"], row["description"]))
        lines += [(f"  --option {key}=…", text) for key, text in row["options"].items()]
    write_lines(lines, console())


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _solvers() -> list[dict[str, Any]]:
    from moeplace.solvers import AUTO, list_solvers, load_solver

    rows: list[dict[str, Any]] = [
        {"name": AUTO, "description": "tries what suits the size and keeps the best", "options": {}}
    ]
    for name in list_solvers():
        try:
            module = load_solver(name)
            rows.append({"name": name, "description": module.DESCRIPTION, "options": dict(module.OPTIONS)})
        except Exception as error:  # another package's solver may not load: the others are listed all the same
            rows.append({"name": name, "description": f"does not load: {error}", "options": {}})
    return rows


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


def _prices() -> list[dict[str, Any]]:
    from moeplace.planning.pricebook import list_price_books, load_price_book

    books = [load_price_book(name) for name in list_price_books()]
    return [
        {"book": book.name, "date": book.date, "key": key, "value": value, "source": book.sources[key]}
        for book in books
        for key, value in book.numbers().items()
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
def doctor_command(**options: Any) -> int:
    """Show versions, optional parts, and whether the solvers work here; paste it into a bug report.

    Exits with 1 where a solver or the compiled kernels do not work.
    """
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
    probes = {"CBC": _works(_try_cbc), "CP-SAT": _works(_try_cpsat), "compiled kernels": _works(_try_numba)}
    lines |= probes
    if options["as_json"]:
        write_json({"schema": "moeplace/doctor/1", **lines})
    else:
        write_lines(lines, console())
    return 0 if all(text.startswith("ok") for text in probes.values()) else 1


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
    return _solve_tiny("cbc")


def _try_cpsat() -> str:
    return _solve_tiny("cpsat")


def _try_numba() -> str:
    import numpy as np

    from moeplace.counting import PairCounter

    PairCounter(2, 4, compiled=True).add(np.zeros((1, 2, 1), np.uint8))
    return ""


def _solve_tiny(name: str) -> str:
    """Solve a knapsack of three things and check the answer: 4 + 3 is the cheapest weight of at least 7."""
    from moeplace.errors import SolverError
    from moeplace.milp import Budget, LinearModel, backend
    from moeplace.solution import Status

    weights, costs = (5.0, 4.0, 3.0), (6.0, 5.0, 4.0)
    model = LinearModel()
    take = [model.binary(f"take{i}") for i in range(3)]
    model.add(zip(take, weights, strict=True), lower=7)
    model.minimise(zip(take, costs, strict=True))
    result = backend(name)(model, Budget(time_limit_s=60), None)
    found = None if result.values is None else [round(float(value)) for value in result.values]
    if found != [0, 1, 1] or result.status is not Status.OPTIMAL:
        raise SolverError(
            f"{name} answers {found}, {result.status}", rule="the optimum of a tiny knapsack is [0, 1, 1]"
        )
    return ""
