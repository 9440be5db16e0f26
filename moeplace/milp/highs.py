"""HiGHS, bundled with SciPy: ``scipy.optimize.milp`` in a process of its own.

SciPy's call takes no starting point, tells nothing on its way, cannot be interrupted and may overrun its time limit. So
it runs in a child process, which is ended when it is asked to stop or is late; the model's start is kept then, and
what HiGHS had found by itself is lost. HiGHS stops at a relative gap of 1e-4 unless it is told otherwise; it is.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.errors import SolverError
from moeplace.milp.model import Budget, Claim, LinearModel, MilpResult, OnIncumbent, judge
from moeplace.solution import StopReason

TERMS_PER_WORK = 2e5
GRACE_S = 0.6  # that HiGHS may be late: it looks at its clock between steps of its work
POLL_S = 0.02
# what SciPy says by its status codes; a limit may be of nodes or of time
OPTIMAL, LIMIT, INFEASIBLE = 0, 1, 2


def solve_highs(model: LinearModel, budget: Budget, on_incumbent: OnIncumbent | None = None) -> MilpResult:
    """Solve ``model`` with HiGHS (one thread).

    Parameters
    ----------
    model
        What to minimise. ``model.start`` is not known to HiGHS, but kept where nothing better is found.
    budget
        ``work`` becomes a limit of ``200,000·work / terms`` nodes, at least 1; there is no seed.
    on_incumbent
        Called once, at the end.

    Raises
    ------
    SolverError
        HiGHS failed without an answer.
    """
    deadline = time.monotonic() + budget.time_limit_s
    with tempfile.TemporaryDirectory(prefix="moeplace-highs-") as name:
        folder = Path(name)
        _write(model, budget, deadline, folder / "model.npz")
        reason = _run(folder, budget.stop, deadline)
        claim = _claim(folder / "answer.npz", reason, deadline)
    result = judge(model, claim, budget.gap)
    if on_incumbent is not None and result.objective is not None:
        on_incumbent(result.objective, result.bound)
    return result


def _write(model: LinearModel, budget: Budget, deadline: float, path: Path) -> None:
    """Write the model as arrays: rows as coordinates, and the limits."""
    entries = [(row, v, a) for row, (terms, _, _) in enumerate(model.rows) for v, a in terms.items()]
    at_row, column, value = zip(*entries, strict=True) if entries else ((), (), ())
    np.savez(
        path,
        costs=np.array([model.costs.get(v, 0.0) for v in range(model.num_variables)]),
        lower=np.array(model.lower),
        upper=np.array(model.upper),
        whole=np.array([w and v not in model.implied for v, w in enumerate(model.is_integer)], np.uint8),
        at_row=np.array(at_row, np.int64),
        column=np.array(column, np.int64),
        value=np.array(value, np.float64),
        row_lower=np.array([lower for _, lower, _ in model.rows]),
        row_upper=np.array([upper for _, _, upper in model.rows]),
        limits=np.array([max(1, round(budget.work * TERMS_PER_WORK / max(1, len(entries)))), budget.gap, deadline]),
    )


def _run(folder: Path, stop: threading.Event, deadline: float) -> StopReason | None:
    """Run the child to its end, and return why it was ended before (None where it ended on its own)."""
    code = "import sys; from moeplace.milp.highs import answer; answer(sys.argv[1])"
    with _process([sys.executable, "-c", code, str(folder)]) as process:
        while process.poll() is None:
            if stop.is_set():
                return StopReason.INTERRUPTED
            if time.monotonic() > deadline + GRACE_S:
                return StopReason.TIME_LIMIT
            stop.wait(POLL_S)
        failed = process.stderr.read() if process.returncode and process.stderr is not None else ""
    if failed:
        raise SolverError("HiGHS ended without an answer:\n" + failed[-1000:], hint="use another --backend")
    return None


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a child in a session of its own, out of reach of a terminal's Ctrl-C; killed on the way out."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def answer(folder: str) -> None:
    """Solve ``model.npz`` of a folder and write ``answer.npz`` beside it: what the child process does."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    with np.load(Path(folder) / "model.npz") as file:
        model = {name: file[name] for name in file.files}
    nodes, gap, deadline = model["limits"].tolist()
    rows: Any = ()
    if len(model["row_lower"]):
        shape = (len(model["row_lower"]), len(model["costs"]))
        matrix = csr_array((model["value"], (model["at_row"], model["column"])), shape=shape)
        rows = LinearConstraint(matrix, model["row_lower"], model["row_upper"])
    # the clock is the machine's, not the process's: loading SciPy counts too
    options = {"mip_rel_gap": gap, "node_limit": int(nodes), "time_limit": max(0.01, deadline - time.monotonic())}
    found = milp(
        model["costs"],
        integrality=model["whole"],
        bounds=Bounds(model["lower"], model["upper"]),
        constraints=rows,
        options=options,
    )
    bound = found.get("mip_dual_bound")
    if bound is None and found.status == OPTIMAL:
        bound = found.fun
    np.savez(
        Path(folder) / "answer.npz",
        status=found.status,
        point=np.array([]) if found.x is None else found.x,
        bound=-np.inf if bound is None else bound,
    )


def _claim(path: Path, reason: StopReason | None, deadline: float) -> Claim:
    """What HiGHS says; of a run that was ended nothing."""
    if not path.exists():
        return Claim(point=None, bound=None, infeasible=False, stop_reason=reason or StopReason.EXHAUSTED)
    with np.load(path) as file:
        status, point, bound = int(file["status"]), file["point"], float(file["bound"])
    if reason is None and status == LIMIT:
        reason = StopReason.TIME_LIMIT if time.monotonic() >= deadline - POLL_S else StopReason.EXHAUSTED
    return Claim(
        point=point if point.size else None,
        bound=bound if np.isfinite(bound) else None,
        infeasible=status == INFEASIBLE,
        stop_reason=reason or (StopReason.PROVEN if status in (OPTIMAL, INFEASIBLE) else StopReason.EXHAUSTED),
    )
