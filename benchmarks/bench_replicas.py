"""Replicas: what a budget over layers, a few moves, and copies where tokens go are worth, beside EPLB and none."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.cases import DATA, Case, in_child

GLM = "glm52_expert_counts/counts.npz"
TRACES = (  # name, path, cap without replicas, cap with them, least saved [%]
    ("gpt-oss-20b", str(DATA / "gpt_oss_20b_fingerprinting/routing.npz"), "1.05", "1.04", 8.0),
    ("tinymoe", "traces/tinymoe_8x32_top4.npz", "1.05", "1.03", 5.0),
)
CHAINS = (  # name, path, extra slots per GPU, cap, least saved [%]
    ("gpt-oss-20b", str(DATA / "gpt_oss_20b_fingerprinting/routing.npz"), "1", "1.05", 0.5),
    ("gpt-oss-20b", str(DATA / "gpt_oss_20b_fingerprinting/routing.npz"), "2", "1.1", 0.2),
    ("gpt-oss-20b", str(DATA / "gpt_oss_20b_fingerprinting/routing.npz"), "1", "eplb", None),
    ("tinymoe", "traces/tinymoe_8x32_top4.npz", "1", "1.05", 0.1),
    ("tinymoe", "traces/tinymoe_8x32_top4.npz", "2", "eplb", 2.0),
)
BUDGET_CODE = """
import json, sys, time
import numpy as np
from moeplace import read_trace
from moeplace.build import build_problem
from moeplace.metrics import max_over_mean
from moeplace.solution import Limits
from moeplace.solvers import solve
from moeplace.solvers.craft import _bound

problem = build_problem(read_trace(sys.argv[1]), topology="scale-up:64", redundant=64, objective="load",
                        accelerator="gb200")
def balancedness(placement):
    return float((1 / max_over_mean(placement, problem.stats.load)).mean())
eplb = solve(problem, "eplb")
spare = 64 * problem.num_layers
told = {"eplb": balancedness(eplb.placement), "shares": []}
for share in ("0", "25%", "10%", "5%", "2%"):
    started = time.perf_counter()
    answer = solve(problem, "craft", Limits(options={"extra": share}))
    told["shares"].append({
        "used": (int(answer.placement.used_slots().sum()) - 256 * problem.num_layers) / spare,
        "balanced": balancedness(answer.placement), "bound": answer.stages[0].bound,
        "seconds": time.perf_counter() - started,
    })
rule = solve(problem, "craft", Limits(options={"rule": "craft"}))
told["rule"] = balancedness(rule.placement)
told["rule_used"] = (int(rule.placement.used_slots().sum()) - 256 * problem.num_layers) / spare
# no placement with fewer extra slots can be as balanced as EPLB: by the floors of the layers
low, high = 0, spare
while low < high:
    middle = (low + high) // 2
    low, high = (middle + 1, high) if _bound(problem, middle) > eplb.objective else (low, middle)
told["least"] = low / spare
print(json.dumps(told))
"""
MOVES_CODE = """
import json, sys
import numpy as np
from moeplace import read_trace
from moeplace.build import build_problem
from moeplace.packing.bounded import arrivals
from moeplace.trace import Counts
from moeplace.solution import Limits
from moeplace.solvers import solve

counts = read_trace(sys.argv[1])
half = counts.num_steps // 2
before, after = (Counts(meta=counts.meta, counts=counts.counts[part]) for part in (slice(0, half), slice(half, None)))
choices = dict(topology="scale-up:64", redundant=64, objective="load", accelerator="gb200")
deployed = solve(build_problem(before, **choices), "eplb").placement
problem = build_problem(after, **choices)
anew = solve(problem, "eplb")
moved = solve(problem.replace(baseline=deployed), "swift", Limits(options={"moves": sys.argv[2]}))
print(json.dumps({
    "eplb": anew.objective, "swift": moved.objective, "eplb_moves": int(arrivals(deployed, anew.placement).sum()),
    "swift_moves": int(arrivals(deployed, moved.placement).sum()),
}))
"""
COPIES_CODE = """
import json, sys, time
from moeplace.affinity import count_routing
from moeplace.build import build_problem
from moeplace.metrics import max_over_mean, token_metrics
from moeplace.readers import open_trace
from moeplace.routing import FEWEST, Router
from moeplace.solution import Limits
from moeplace.solvers import solve
from moeplace.split import parse_split, select

path, without, cap = sys.argv[1:4]
trace, split = open_trace(path), parse_split("half:0")
fit = select(trace, split=split, part="fit")
held_out = count_routing(select(trace, split=split, part="test"))
def problem(**more):
    return build_problem(fit, topology="scale-up:8", objective="copies", **more)
bare = problem(load_cap=without)
plain = solve(bare, "setpart", Limits(threads=2, options={"mode": "fast"}))
copied = problem(load_cap=cap, redundant=bare.num_experts // 8, routing=FEWEST)
started = time.perf_counter()
answer = solve(copied, "fanout", Limits(threads=2, time_limit_s=1200))
seconds = time.perf_counter() - started
def told(placement, router):
    sample = held_out.sample
    router = router.measured(sample.experts)
    return (token_metrics(sample, placement, copied.topology, router)[0],
            float(max_over_mean(placement, held_out.load, router).mean()))
tokens = bare.stats.sample.experts
plain_copies, plain_load = told(plain.placement, Router.of(plain.placement, bare.topology))
router = Router.of(answer.placement, copied.topology, FEWEST, bare.stats.load, tokens)
copies, load = told(answer.placement, router)
eplb = solve(copied.replace(load_cap=None), "eplb").placement
eplb_copies, eplb_load = told(eplb, Router.of(eplb, copied.topology, FEWEST, bare.stats.load, tokens))
print(json.dumps({
    "plain": plain_copies, "plain_load": plain_load, "copies": copies, "load": load, "seconds": seconds,
    "eplb": eplb_copies, "eplb_load": eplb_load,
}))
"""

CHAINS_CODE = """
import json, sys, time
from moeplace.affinity import count_routing
from moeplace.build import build_problem
from moeplace.metrics import max_over_mean
from moeplace.objective import objective_value
from moeplace.readers import open_trace
from moeplace.solution import Limits
from moeplace.solvers import solve
from moeplace.split import parse_split, select

path, extra, cap = sys.argv[1:4]
trace, split = open_trace(path), parse_split("half:0")
held_out = count_routing(select(trace, split=split, part="test"))
problem = build_problem(select(trace, split=split, part="fit"), topology="scale-up:8", objective="cross",
                        dataflow="context-coherent", load_cap=cap, redundant=8 * int(extra))
told = {}
for copies in ("none", "fill"):
    started = time.perf_counter()
    answer = solve(problem, "search", Limits(work=0.2, threads=2, time_limit_s=1200, options={"copies": copies}))
    one = {"seconds": time.perf_counter() - started, "notes": answer.notes}
    if answer.placement is not None:
        one |= {
            "cross": objective_value(problem.replace(stats=held_out), answer.placement),
            "load": float(max_over_mean(answer.placement, held_out.load).mean()),
            "copies": int(answer.placement.replicas().sum()) - problem.num_layers * problem.num_experts,
            "fit": answer.objective, "bound": answer.bound,
        }
    told[copies] = one
print(json.dumps(told))
"""
SKEWED_CODE = """
import json, sys
from benchmarks.instances import make_trace
from moeplace.batches import BatchLaw
from moeplace.build import build_problem
from moeplace.solution import Limits
from moeplace.solvers import solve

problem = build_problem(make_trace("olmoe", "strong", int(sys.argv[1])), topology="scale-up:32", redundant=32,
                        objective="step-time", dataflow="context-coherent")
problem = problem.replace(law=BatchLaw(phase="decode", requests=65_536))
brief = Limits(work=0.1, threads=2, time_limit_s=1200)
told = {name: solve(problem, name, brief).objective for name in ("eplb", "balance", "search")}
told["none"] = solve(problem, "search", brief.replace(options={"copies": "none"})).objective
print(json.dumps(told))
"""


def cases(seeds: int) -> list[Case]:
    """Real counts and real tokens; figures of copies on requests that were held out."""
    del seeds  # every method here is deterministic, and the traces are what they are
    results: list[Case] = []
    if (DATA / GLM).exists():
        results += [*_budget(str(DATA / GLM)), *_moves(str(DATA / GLM))]
    for row in TRACES:
        if not row[1].startswith(str(DATA)) or (DATA / row[1]).exists():
            results += _copies(*row)
    for chain in CHAINS:
        if not chain[1].startswith(str(DATA)) or (DATA / chain[1]).exists():
            results += _chains(*chain)
    return [*results, *_skewed()]


def _told(code: str, *arguments: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(in_child(code, *arguments)[2])
    return told


def _budget(path: str) -> list[Case]:
    told = _told(BUDGET_CODE, path)
    reached = [one for one in told["shares"] if one["balanced"] >= told["eplb"]]
    fewest = min(reached, key=lambda one: one["used"]) if reached else told["shares"][1]
    note = f"balancedness {fewest['balanced']:.4f}, EPLB's {told['eplb']:.4f}; proved: no less than {told['least']:.2%}"
    results = [
        Case(
            name="craft, GLM-5.2 75×256 on 64 GPUs: EPLB's replicas that reach its balancedness",
            value=100 * fewest["used"],
            unit="%",
            target=25,
            note=note,
        )
    ]
    for one in told["shares"]:
        note = f"bound on max/mean {one['bound']:.4f}, {one['seconds']:.0f} s"
        title = f"  balancedness with {one['used']:.1%} of EPLB's replicas"
        results.append(Case(name=title, value=one["balanced"], unit="", note=note))
    note = f"with {told['rule_used']:.1%} of EPLB's replicas"
    return [*results, Case(name="  balancedness by CRAFT's threshold", value=told["rule"], unit="", note=note)]


def _moves(path: str) -> list[Case]:
    results = []
    for moves in ("1", "2"):
        told = _told(MOVES_CODE, path, moves)
        title = f"swift, GLM-5.2's other domains, {moves} moves per GPU and layer: max/mean"
        note = f"{told['swift_moves']:,} moves; EPLB anew {told['eplb']:.4f} with {told['eplb_moves']:,}"
        results.append(Case(name=title, value=told["swift"], unit="", target=told["eplb"] * 1.05, note=note))
    return results


def _copies(name: str, path: str, without: str, cap: str, least: float) -> list[Case]:
    told = _told(COPIES_CODE, path, without, cap)
    note = f"{told['copies']:.4f} copies per token, setpart without replicas {told['plain']:.4f}"
    title = f"fanout, {name} on 8 GPUs, E/8 extra slots, held-out requests: copies below the best without replicas"
    eplb = f"EPLB's replicas, same routing: {told['eplb']:.3f} copies, max/mean {told['eplb_load']:.3f}"
    saved = 100 * (1 - told["copies"] / told["plain"])
    return [
        Case(name=title, value=saved, unit="%", target=least, at_least=True, note=note),
        Case(name="  max/mean, at most that without replicas", value=told["load"], unit="", target=told["plain_load"]),
        Case(name="  time", value=told["seconds"], unit="s", note=eplb),
    ]


def _chains(name: str, path: str, extra: str, cap: str, least: float | None) -> list[Case]:
    """Pairs that cross on held-out requests, with copies and without, within one cap and at the same work."""
    told = _told(CHAINS_CODE, path, extra, cap)
    alone, copied = told["none"], told["fill"]
    title = f"search, {name} on 8 GPUs, {extra} extra slots each, load cap {cap}, held-out requests: "
    fit = f"fitted {copied['fit']:.4f}, certified {copied['bound']:.4f}; {copied['copies']} copies"
    if "cross" not in alone or least is None:
        note = "placed once, no start keeps the cap" if "cross" not in alone else f"placed once {alone['cross']:.4f}"
        first = Case(name=f"{title}pairs that cross", value=copied["cross"], unit="", note=f"{note}; {fit}")
        return [first, Case(name="  max/mean", value=copied["load"], unit="")]
    saved = 100 * (1 - copied["cross"] / alone["cross"])
    note = f"cross {copied['cross']:.4f}, placed once {alone['cross']:.4f}; {fit}"
    return [
        Case(name=f"{title}fewer pairs cross", value=saved, unit="%", target=least, at_least=True, note=note),
        Case(name="  max/mean", value=copied["load"], unit="", note=f"placed once {alone['load']:.4f}"),
        Case(name="  time", value=copied["seconds"], unit="s", note=f"placed once {alone['seconds']:.0f} s"),
    ]


def _skewed() -> list[Case]:
    """Step time where one expert is more than a GPU's share."""
    told = _told(SKEWED_CODE, "0")
    best = min(told["eplb"], told["balance"], told["none"])
    note = f"EPLB {told['eplb']:,.0f}, balance {told['balance']:,.0f}, search placed once {told['none']:,.0f} µs"
    title = "search, skewed 16×64 on 32 GPUs, 1 extra slot each, step time, at most the best other"
    return [Case(name=title, value=told["search"], unit="µs", target=best, note=note)]
