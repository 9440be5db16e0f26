"""The command line as a user runs it: start-up, and solve and score on real and synthetic traces."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.cases import DATA, ROOT, Case, best_seconds
from benchmarks.instances import make_trace
from moeplace.writers import write_trace

GPT_OSS = DATA / "gpt_oss_20b_fingerprinting" / "routing.npz"
GLM_COUNTS = DATA / "glm52_expert_counts" / "counts.npz"


def cases(seeds: int) -> list[Case]:
    """Time help, and solve plus score on every trace that is here."""
    results = [Case(name="moeplace --help", value=1e3 * best_seconds(lambda: _run("--help"), 5), unit="ms", target=150)]
    with tempfile.TemporaryDirectory() as folder:
        synthetic = Path(folder) / "dsv3.npz"
        write_trace(make_trace("dsv3", "mid", 0), synthetic)
        small = ["--topology", "scale-out:2x4"]
        results += _both(ROOT / "traces" / "tinymoe_8x32_top4.npz", small, folder)
        results += _both(GPT_OSS, ["--model", "gpt-oss-20b", *small], folder)
        glm = ["--model", "glm-5", "--topology", "scale-out:8x8"]
        results += _both(GLM_COUNTS, glm, folder, ["--num-redundant-experts", "32"])
        deepseek = ["--model", "deepseek-v3", "--topology", "scale-out:8x8"]
        results += _both(synthetic, deepseek, folder, ["--num-redundant-experts", "32"])
    return results


def _run(*words: str) -> str:
    """Run the command line in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "moeplace", *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


def _both(trace: Path, common: list[str], folder: str, slots: list[str] | None = None) -> list[Case]:
    if not trace.exists():
        return [Case(name=f"skipped: {trace.parent.name} is not beside the checkout", value=float("nan"), unit="")]
    placed = str(Path(folder) / "placement.json")
    label = trace.parent.name if trace.name in ("routing.npz", "counts.npz") else trace.stem
    fit = [str(trace), *common, "--fit", "half:0", "--solver", "eplb", "-o", placed, *(slots or [])]
    solved = best_seconds(lambda: _run("solve", *fit), 1)
    printed: list[str] = []
    test = [str(trace), "linear", placed, *common, "--test", "half:0", "--json"]
    scored = best_seconds(lambda: printed.append(_run("score", *test)), 1)
    scores = json.loads(printed[-1])["scores"]
    means = [entry["step_time_us"]["mean"]["value"] for entry in scores[:2]]
    note = f"mean step {means[1]:,.0f} µs, linear {means[0]:,.0f} µs"
    return [
        Case(name=f"solve (eplb) {label} {' '.join(common[-1:])}", value=solved, unit="s"),
        Case(
            name=f"  score on the other half, {scores[0]['batch']['batches']} steps", value=scored, unit="s", note=note
        ),
    ]
