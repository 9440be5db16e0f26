"""Decide where the experts of a Mixture-of-Experts model live, with a proof of how far from optimal.

The whole command line is a few calls of this package::

    trace = moeplace.read_trace("trace.jsonl")
    fit, test = (moeplace.select(trace, split=moeplace.parse_split("half:0"), part=p) for p in ("fit", "test"))
    problem = moeplace.build_problem(fit, topology="scale-out:2x8", model="deepseek-v3")
    solution = moeplace.solve(problem, "eplb")
    scores = moeplace.score(test, {"mine": solution.placement}, problem.topology, problem.model)
    moeplace.write(problem, solution, "placement.json")

Names are imported when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplace.affinity import RoutingStats as RoutingStats
    from moeplace.affinity import count_routing as count_routing
    from moeplace.batches import BatchLaw as BatchLaw
    from moeplace.build import Choices as Choices
    from moeplace.build import build_problem as build_problem
    from moeplace.calibration import calibrate as calibrate
    from moeplace.calibration import read_compute_table as read_compute_table
    from moeplace.comparison import compare as compare
    from moeplace.corpus import count_parts as count_parts
    from moeplace.diff import compare_placements as compare_placements
    from moeplace.engines import DaskCluster as DaskCluster
    from moeplace.engines import Processes as Processes
    from moeplace.engines import Run as Run
    from moeplace.errors import MoeplaceError as MoeplaceError
    from moeplace.execution import Execution as Execution
    from moeplace.exporters import Target as Target
    from moeplace.exporters import check_placement as check_placement
    from moeplace.exporters import read_placement as read_placement
    from moeplace.exporters import write as write
    from moeplace.exporters import write_placement as write_placement
    from moeplace.front import trace_front as trace_front
    from moeplace.hardware import Accelerator as Accelerator
    from moeplace.hardware import load_accelerator as load_accelerator
    from moeplace.migration import schedule_moves as schedule_moves
    from moeplace.model import ModelSpec as ModelSpec
    from moeplace.model import load_model as load_model
    from moeplace.parts import parted as parted
    from moeplace.placement import Placement as Placement
    from moeplace.planning.pricebook import load_price_book as load_price_book
    from moeplace.planning.run import plan as plan
    from moeplace.problem import Problem as Problem
    from moeplace.readers import open_trace as open_trace
    from moeplace.readers import read_trace as read_trace
    from moeplace.reduction import counts_of as counts_of
    from moeplace.scoring import Score as Score
    from moeplace.scoring import score as score
    from moeplace.solution import Limits as Limits
    from moeplace.solution import Report as Report
    from moeplace.solution import Solution as Solution
    from moeplace.solvers import list_solvers as list_solvers
    from moeplace.solvers import solve as solve
    from moeplace.split import parse_split as parse_split
    from moeplace.split import select as select
    from moeplace.spool import spooled as spooled
    from moeplace.subset import Subset as Subset
    from moeplace.subset import narrowed as narrowed
    from moeplace.topology import Topology as Topology
    from moeplace.topology import load_topology as load_topology
    from moeplace.trace import Counts as Counts
    from moeplace.trace import Trace as Trace
    from moeplace.trace import TraceMeta as TraceMeta
    from moeplace.trials import Setup as Setup
    from moeplace.trials import Sides as Sides
    from moeplace.trials import Trial as Trial
    from moeplace.trials import run_trial as run_trial
    from moeplace.writers import write_trace as write_trace

_HOMES = {
    "affinity": ("RoutingStats", "count_routing"),
    "batches": ("BatchLaw",),
    "build": ("Choices", "build_problem"),
    "calibration": ("calibrate", "read_compute_table"),
    "comparison": ("compare",),
    "corpus": ("count_parts",),
    "diff": ("compare_placements",),
    "engines": ("DaskCluster", "Processes", "Run"),
    "errors": ("MoeplaceError",),
    "execution": ("Execution",),
    "exporters": ("Target", "check_placement", "read_placement", "write", "write_placement"),
    "front": ("trace_front",),
    "hardware": ("Accelerator", "load_accelerator"),
    "migration": ("schedule_moves",),
    "model": ("ModelSpec", "load_model"),
    "parts": ("parted",),
    "placement": ("Placement",),
    "planning.pricebook": ("load_price_book",),
    "planning.run": ("plan",),
    "problem": ("Problem",),
    "readers": ("open_trace", "read_trace"),
    "reduction": ("counts_of",),
    "scoring": ("Score", "score"),
    "solution": ("Limits", "Report", "Solution"),
    "solvers": ("list_solvers", "solve"),
    "split": ("parse_split", "select"),
    "subset": ("Subset", "narrowed"),
    "spool": ("spooled",),
    "topology": ("Topology", "load_topology"),
    "trace": ("Counts", "Trace", "TraceMeta"),
    "trials": ("Setup", "Sides", "Trial", "run_trial"),
    "writers": ("write_trace",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("moeplace")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moeplace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"moeplace.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
