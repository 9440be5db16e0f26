"""Traffic between GPUs of consecutive layers: what ``search`` reaches within a load cap, when, and its gap."""

from __future__ import annotations

import json

from benchmarks.cases import DATA, Case, in_child

GPT_OSS = "gpt_oss_20b_fingerprinting/routing.npz"
SYNTHETIC = (  # shape, affinity, GPUs, time limit [s], least gain [%] and when [s], most gap [%], least captured [%]
    ("olmoe", "mid", 8, 20, None, None, 1.5, 75),
    ("olmoe", "strong", 8, 20, None, None, 3, 75),
    ("qwen3", "mid", 8, 30, None, None, 2, 75),
    ("qwen3", "strong", 8, 30, None, None, 5, 75),
    ("dsv3", "mid", 8, 60, 5, 10, 1.8, 75),
    ("dsv3", "strong", 8, 60, 17, 10, 6, 75),
    ("dsv3", "mid", 64, 60, 2.2, 10, 0.8, None),
    ("dsv3", "strong", 64, 60, 6.5, 10, 2.8, None),
    ("kimi", "mid", 64, 60, 2.1, 20, None, None),
)
REAL = ((8, 0.26, 0.69, 1.11), (4, 0.44, None, None))  # GPUs, least local share, least locality, most test max/mean
CODE = """
import json, sys
import numpy as np
from benchmarks.instances import make_trace
from moeplace.build import build_problem
from moeplace.chains.anneal import Schedule, anneal
from moeplace.chains.instance import Instance
from moeplace.solution import Limits, Report
from moeplace.solvers import solve

shape, affinity, gpus, seed, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
tiny = Instance.of(np.ones((1, 4, 4), int), np.ones((2, 4)), np.ones(2) * 9, 2)
anneal(tiny, np.array([[0, 0, 1, 1]] * 2), Schedule(sweeps=4), 0, compiled=True)  # compile
problem = build_problem(make_trace(shape, affinity, seed), topology=f"scale-up:{gpus}", load_cap="eplb",
                        objective="cross", dataflow="context-coherent", accelerator="gb200")
eplb = solve(problem, "eplb").objective
report = Report()
answer = solve(problem, "search", Limits(time_limit_s=limit, threads=2, seed=seed), report)
print(json.dumps({
    "history": [[entry.seconds, 100 * (1 - entry.objective / eplb)] for entry in report.history],
    "cross": answer.objective, "gap": 100 * answer.gap, "captured": 100 * answer.terms["captured_share"].value,
    "seconds": report.seconds, "eplb": eplb,
}))
"""
REAL_CODE = """
import json, sys
from moeplace import read_trace
from moeplace.affinity import count_routing
from moeplace.build import build_problem
from moeplace.metrics import max_over_mean, traffic_metrics
from moeplace.readers import open_trace
from moeplace.solution import Limits
from moeplace.solvers import solve
from moeplace.split import parse_split, select

path, gpus, cap = sys.argv[1], int(sys.argv[2]), sys.argv[3]
trace, split = open_trace(path), parse_split("half:0")
problem = build_problem(select(trace, split=split, part="fit"), topology=f"scale-up:{gpus}", load_cap=cap,
                        objective="cross", dataflow="context-coherent")
answer = solve(problem, "search", Limits(threads=2))
held_out = count_routing(select(trace, split=split, part="test"))
figures = {}
rival = solve(problem.replace(load_cap=None), "eplb")
for name, placement in (("search", answer.placement), ("eplb", rival.placement)):
    told = traffic_metrics(held_out, placement, problem.topology)
    figures[name] = [1 - told.cross_gpu_share, told.next_layer_locality,
                     float(max_over_mean(placement, held_out.load).mean())]
fit = max_over_mean(answer.placement, problem.stats.load).max()
print(json.dumps({**figures, "gap": answer.gap, "fit": fit, "local": 1 - answer.objective}))
"""


def cases(seeds: int) -> list[Case]:
    """Traffic at published sizes within EPLB's own cap, and of real traces on requests that were held out."""
    return [*_real(), *(case for seed in range(seeds) for case in _synthetic(seed))]


def _synthetic(seed: int) -> list[Case]:
    results = []
    for shape, affinity, gpus, limit, least, when, most, captured in SYNTHETIC:
        _, megabytes, output = in_child(CODE, shape, affinity, str(gpus), str(seed), str(limit))
        told = json.loads(output)
        name = f"search, {shape} {affinity} on {gpus} GPUs, seed {seed}"
        by_then = [value for seconds, value in told["history"] if seconds <= (when or limit)]
        note = f"cross {told['cross']:.5f}, EPLB {told['eplb']:.5f}; at the end {told['history'][-1][1]:.2f} %"
        results.append(
            Case(
                name=f"{name}: below EPLB after {when or limit} s",
                value=max(by_then, default=0.0),
                unit="%",
                target=least,
                at_least=True,
                note=note,
            )
        )
        results.append(Case(name=f"  gap in {told['seconds']:.0f} s", value=told["gap"], unit="%", target=most))
        results.append(Case(name="  captured", value=told["captured"], unit="%", target=captured, at_least=True))
        results.append(Case(name="  peak memory", value=megabytes, unit="MB", target=2048))
    return results


def _real() -> list[Case]:
    results = []
    if (DATA / GPT_OSS).exists():
        for gpus, local, locality, busiest in REAL:
            _, _, output = in_child(REAL_CODE, str(DATA / GPT_OSS), str(gpus), "1.05")
            told = json.loads(output)
            name, found = f"search, gpt-oss-20b on {gpus} GPUs, fit cap 1.05, held-out requests", told["search"]
            note = f"EPLB {told['eplb'][0]:.3f}; fit {told['local']:.3f}, gap {100 * told['gap']:.2f} %"
            results.append(
                Case(name=f"{name}: local share", value=found[0], unit="", target=local, at_least=True, note=note)
            )
            note = f"EPLB {told['eplb'][1]:.3f}"
            results.append(Case(name="  locality", value=found[1], unit="", target=locality, at_least=True, note=note))
            note = f"EPLB {told['eplb'][2]:.3f}; fit {told['fit']:.4f} at most"
            results.append(Case(name="  max/mean", value=found[2], unit="", target=busiest, note=note))
    _, _, output = in_child(REAL_CODE, "traces/tinymoe_8x32_top4.npz", "8", "1.05")
    told = json.loads(output)
    note = f"EPLB {told['eplb'][0]:.3f}; fit {told['local']:.3f}, max/mean {told['search'][2]:.3f}"
    name = "search, tinymoe on 8 GPUs, fit cap 1.05, held-out requests: local share"
    results.append(Case(name=name, value=told["search"][0], unit="", target=0.25, at_least=True, note=note))
    return results
