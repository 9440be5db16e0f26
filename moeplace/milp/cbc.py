"""CBC, bundled with PuLP: PuLP writes the model and knows where CBC is; everything CBC says is read from CBC itself.

PuLP calls a run that was cut short "Optimal", and neither it nor CBC alone survives a Ctrl-C with a solution. So CBC
runs here as a process in a session of its own; its log is read line by line for incumbents and bounds; on a stop or a
time-out it gets one SIGINT, after which it writes its best solution and says so. This is the only file that imports
pulp.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.errors import SolverError
from moeplace.milp.cpsat import load_ortools
from moeplace.milp.model import Budget, Claim, Floats, LinearModel, MilpResult, OnIncumbent, judge
from moeplace.solution import StopReason

TERMS_PER_WORK = 2e5
GRACE_S = {StopReason.INTERRUPTED: 3.0, StopReason.TIME_LIMIT: 0.6}
POLL_S = 0.05
END = b"end of the log"
PRINTED = 1e-5
NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?)"
INCUMBENT = re.compile(rf"(?:Integer solution of|MIPStart provided solution with cost) {NUMBER}")
BOUND = re.compile(rf"best possible {NUMBER}")
FINAL_BOUND = re.compile(rf"^Lower bound:\s+{NUMBER}")
FINAL_OBJECTIVE = re.compile(rf"^Objective value:\s+{NUMBER}")
INFEASIBLE = re.compile(r"proven infeasible|relaxation infeasible|[Pp]roblem (?:is|proven) infeasible|says infeasible")


def solve_cbc(model: LinearModel, budget: Budget, on_incumbent: OnIncumbent | None = None) -> MilpResult:
    """Solve ``model`` with CBC (one thread).

    Parameters
    ----------
    model
        What to minimise; ``model.start`` becomes CBC's MIP start.
    budget
        ``work`` becomes a limit of ``200,000·work / terms`` nodes, at least 1: the answer does not depend on the clock
        unless ``time_limit_s`` cuts the run (and then the result says TIME_LIMIT).
    on_incumbent
        Called in the caller's thread with the objective and, once known, the lower bound, whenever either improves.

    Raises
    ------
    SolverError
        PuLP or its CBC cannot be used, or CBC failed without an answer.
    """
    deadline = time.monotonic() + budget.time_limit_s
    scale = _objective_scale(model)
    with tempfile.TemporaryDirectory(prefix="moeplace-cbc-") as name:
        folder = Path(name)
        columns = _write_model(model, scale, folder)
        log = _Log(scale, on_incumbent)
        reason = _run(_command(model, budget, folder), budget.stop, deadline, log)
        header, point = _read_solution(folder / "model.sol", columns, model)
    return judge(model, _claim(model, log, header, point, reason), budget.gap)


def _objective_scale(model: LinearModel) -> float:
    # CBC prints its final bound with three decimals: a power of two that makes the objective large keeps nine digits.
    size = abs(model.objective_of(model.start)) if model.start is not None else 0.0
    largest = max((abs(cost) for cost in model.costs.values()), default=0.0)
    if largest == 0:
        return 1.0
    return 2.0 ** round(math.log2(min(1e6 / (size or largest), 1e9 / largest)))


def _write_model(model: LinearModel, scale: float, folder: Path) -> dict[str, int]:
    """Write ``model.mps`` (and ``model.mst``) and return the variable behind each name in them.

    PuLP leaves out variables that stand in no row and cost nothing.
    """
    if importlib.util.find_spec("highspy"):
        load_ortools()  # pulp loads highspy where it is installed, after which OR-Tools no longer loads
    import pulp

    problem = pulp.LpProblem("moeplace", pulp.LpMinimize)
    kinds = {True: pulp.LpInteger, False: pulp.LpContinuous}
    branch = [whole and i not in model.implied for i, whole in enumerate(model.is_integer)]
    variables = [
        problem.add_variable(f"x{i}", _finite(model.lower[i]), _finite(model.upper[i]), kinds[branch[i]])
        for i in range(model.num_variables)
    ]
    problem.setObjective(pulp.LpAffineExpression([(variables[v], scale * c) for v, c in model.costs.items()]))
    for terms, lower, upper in model.rows:
        total = pulp.LpAffineExpression([(variables[v], c) for v, c in terms.items()])
        if lower == upper:
            problem.addConstraint(total == lower)
            continue
        if lower > -math.inf:
            problem.addConstraint(total >= lower)
        if upper < math.inf:
            problem.addConstraint(total <= upper)
    _, renamed, _, _ = problem.writeMPS(str(folder / "model.mps"), rename=1)
    columns = {renamed[variable.name]: i for i, variable in enumerate(variables) if variable.name in renamed}
    if model.start is not None:
        lines = [f"{i} {column} {float(model.start[i])!r} 0\n" for column, i in columns.items()]
        (folder / "model.mst").write_text("".join(["Stopped on time - objective value 0\n", *lines]))
    return columns


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


def _command(model: LinearModel, budget: Budget, folder: Path) -> list[str]:
    nodes = max(1, round(budget.work * TERMS_PER_WORK / max(1, model.num_terms)))
    command = [_cbc_path(), str(folder / "model.mps")]
    if model.start is not None:
        command += ["-mips", str(folder / "model.mst")]
    seed = str(1 + budget.seed % (2**31 - 2))  # 0 would mean the time of day
    command += ["-randomSeed", seed, "-randomCbcSeed", seed, "-maxNodes", str(nodes), "-ratio", repr(budget.gap)]
    # The limit is kept by SIGINT; CBC's own comes later and only matters if this process dies.
    command += ["-sec", str(round(budget.time_limit_s + 5, 1)), "-timeMode", "elapsed", "-log", "1"]
    return [*command, "-solve", "-printingOptions", "all", "-solution", str(folder / "model.sol")]


def _cbc_path() -> str:
    from pulp.apis.coin_api import PULP_CBC_CMD

    path = shutil.which(str(PULP_CBC_CMD.pulp_cbc_path)) or shutil.which("cbc")
    if path is None:
        raise SolverError("PuLP's bundled CBC does not run here", hint="use --backend cpsat, or install cbc")
    return path


@dataclass
class _Log:
    """CBC's log as it comes: best objective and bound so far, unscaled, and what the last lines say."""

    scale: float
    on_incumbent: OnIncumbent | None
    objective: float = math.inf
    bound: float = -math.inf
    final_objective: float | None = None
    final_bound: float | None = None
    result: str = ""
    infeasible: bool = False
    tail: list[str] = field(default_factory=list)

    def read(self, line: str) -> None:
        """Take one line."""
        self.tail = [*self.tail[-19:], line]
        if INFEASIBLE.search(line):
            self.infeasible = True
        if line.startswith("Result - "):
            self.result = line.removeprefix("Result - ").lower()
        elif match := FINAL_OBJECTIVE.match(line):
            self.final_objective = float(match[1]) / self.scale
        elif match := FINAL_BOUND.match(line):
            # three decimals are printed
            self.final_bound = (float(match[1]) - 1e-3) / self.scale
        else:
            self._progress(line)

    def _progress(self, line: str) -> None:
        before = (self.objective, self.bound)
        if match := INCUMBENT.search(line):
            self.objective = min(self.objective, float(match[1]) / self.scale)
        if (match := BOUND.search(line)) and abs(value := float(match[1])) < 1e40:
            # six digits are printed
            self.bound = max(self.bound, (value - PRINTED * abs(value)) / self.scale)
        if self.on_incumbent and (self.objective, self.bound) != before and self.objective < math.inf:
            self.on_incumbent(self.objective, self.bound if self.bound > -math.inf else None)


def _run(command: list[str], stop: threading.Event, deadline: float, log: _Log) -> StopReason | None:
    """Run CBC to its end, and return why this process ended it (None where CBC ended on its own)."""
    reason: StopReason | None = None
    asked_at = math.inf
    with _process(command) as (process, lines):
        while True:
            try:
                line = lines.get(timeout=POLL_S)
            except queue.Empty:
                line = ""
            if line is None:
                process.wait()
                return reason
            if line:
                log.read(line)
            now = time.monotonic()
            if reason is None and (stop.is_set() or now >= deadline):
                reason = StopReason.INTERRUPTED if stop.is_set() else StopReason.TIME_LIMIT
                process.send_signal(signal.SIGINT)
                asked_at = now
            elif reason is not None and now - asked_at > GRACE_S[reason]:
                return reason


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], queue.Queue[str | None]]]:
    """CBC in a session of its own, with a queue of its log's lines that ends in None; killed on the way out."""
    reader, writer = _line_channel()
    lines: queue.Queue[str | None] = queue.Queue()
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        os.close(reader)
        os.close(writer)
        raise SolverError(f"CBC does not start: {error}", hint="use --backend cpsat") from error
    threads = [
        threading.Thread(target=_pump, args=(reader, writer, lines), daemon=True),
        threading.Thread(target=_mark_end, args=(process, writer), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield process, lines
    finally:
        if process.poll() is None:
            process.kill()
        for thread in threads:
            thread.join()


def _line_channel() -> tuple[int, int]:
    # CBC holds back 4 kB of log when it writes to a pipe; a pseudo-terminal makes it write line by line.
    try:
        return os.openpty()
    except (AttributeError, OSError):
        return os.pipe()


def _mark_end(process: subprocess.Popen[bytes], writer: int) -> None:
    # A pseudo-terminal may forget what is unread when its last writer closes it: it stays open until all is read.
    process.wait()
    os.write(writer, b"\n" + END + b"\n")


def _pump(reader: int, writer: int, lines: queue.Queue[str | None]) -> None:
    rest, ended = b"", False
    while not ended and (block := os.read(reader, 65536)):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            ended = ended or line.strip() == END
            lines.put(None if ended else line.decode(errors="replace").strip())
    os.close(reader)
    os.close(writer)


def _read_solution(path: Path, columns: dict[str, int], model: LinearModel) -> tuple[str, Floats | None]:
    """First line of a solution file, lower case, and the values; variables left out are as near to 0 as can be."""
    if not path.exists():
        return "", None
    header, *rows = path.read_text().splitlines() or [""]
    point = np.clip(0.0, model.lower, model.upper)
    for row in rows:
        parts: list[Any] = row.replace("**", " ").split()
        if len(parts) >= 3 and parts[1] in columns:
            point[columns[parts[1]]] = float(parts[2])
    header = header.lower()
    return header, None if "infeasible" in header or "no integer" in header else point


def _claim(model: LinearModel, log: _Log, header: str, point: Floats | None, reason: StopReason | None) -> Claim:
    """What CBC says, from its log and solution header, never from PuLP."""
    if not header and reason is None and not log.infeasible:
        raise SolverError("CBC ended without an answer:\n" + "\n".join(log.tail))
    bounds = [bound for bound in (log.final_bound, log.bound) if bound is not None and bound > -math.inf]
    bound = max(bounds, default=None)
    complete = log.result.startswith("optimal") and header.startswith("optimal")
    within_gap = "gap" in log.result
    if complete and not within_gap and log.final_objective is not None:
        return Claim(point=point, bound=log.final_objective, infeasible=False, stop_reason=StopReason.PROVEN)
    if reason is not None:
        return Claim(point=point, bound=bound, infeasible=False, stop_reason=reason)
    if log.infeasible and (not header or "infeasible" in header):
        # "infeasible or unbounded" can only mean infeasible when no cost can fall without end
        bounded = all(math.isfinite(model.lower[v] if cost > 0 else model.upper[v]) for v, cost in model.costs.items())
        if bounded:
            return Claim(point=None, bound=None, infeasible=True, stop_reason=StopReason.PROVEN)
    stop = StopReason.GAP if within_gap else StopReason.EXHAUSTED
    if "time" in log.result:
        stop = StopReason.TIME_LIMIT
    return Claim(point=point, bound=bound, infeasible=False, stop_reason=stop)
