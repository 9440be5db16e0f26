"""Which methods ``auto`` tries for a problem, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moeplace.network import KERNEL_OF_PHASE, NORMAL
from moeplace.partitions import MAX_DIVISIONS, num_divisions
from moeplace.problem import CONTEXT_COHERENT, COPIES, CROSS, GPU, REMOTE, STEP_TIME, Problem
from moeplace.routing import FEWEST, NEAREST, TOPOLOGY_AWARE
from moeplace.solution import Limits

AUTO_BINARIES = 8192
AUTO_WORK = 0.2
SLACKS = (0.01, 0.03, 0.1)  # caps under which auto tries fewest copies for step time, above the balanced load
MOST_PARTITIONED = 64  # experts of a layer that set partitioning takes in seconds
GOALS = {COPIES: "copies", REMOTE: "copies to other nodes"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method ``auto`` tries: its name, options the user did not set, and its share of the work budget.

    With ``slack`` it minimises ``goal`` instead, under a cap on load so far above the best balance.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    work: float = 1.0
    slack: float | None = None
    goal: str = COPIES

    def __str__(self) -> str:
        settings = " ".join(f"{key}={value}" for key, value in self.options.items())
        if self.slack is not None:
            settings = f"fewest {GOALS[self.goal]}, load {self.slack:+.0%}"
        return f"{self.name} ({settings})" if settings else self.name

    def limits(self, limits: Limits) -> Limits:
        """Return its limits: the user's options win."""
        return limits.replace(work=limits.work * self.work, options={**self.options, **limits.options})


def choose(problem: Problem) -> tuple[tuple[Candidate, ...], str]:
    """Methods that ``auto`` tries for a problem, each with its options, and why."""
    if divisible(problem):
        few = num_divisions(problem.num_experts, problem.num_gpus)
        return (Candidate("linear"), Candidate("exact")), f"{few:,} ways to divide a layer: few enough for a proof"
    if problem.objective == CROSS and not problem.whole_model:
        return (Candidate("linear"), Candidate("search")), "traffic between GPUs: annealed, and bounded"
    if problem.is_sampled and not problem.whole_model:
        tried = [Candidate("linear"), Candidate("eplb"), Candidate("balance"), Candidate("saa")]
        why = "" if problem.copies_cap is None else ", with few copies per token"
        return tuple(tried), f"{problem.risk} over steps drawn from the trace{why}"
    if problem.objective == STEP_TIME and problem.dataflow == CONTEXT_COHERENT and not problem.whole_model:
        tried = [Candidate("linear"), Candidate("eplb"), Candidate("balance"), Candidate("search")]
        return tuple(tried), "tokens move between experts: work of GPUs and traffic weighed against each other"
    if problem.objective == REMOTE and not problem.whole_model:
        tried = [Candidate("linear"), Candidate("eplb"), Candidate("balance"), Candidate("nearby")]
        if problem.num_slots > problem.num_experts and not _takes_near_copies(problem):
            why = f"copies save nothing under {problem.routing} routing: --routing {TOPOLOGY_AWARE} makes them count"
            return tuple(tried[:-1]), why
        return tuple(tried), "fewest copies to other nodes: nodes and replicas of each layer decided together"
    if problem.objective == COPIES and not problem.whole_model:
        tried = [Candidate("linear"), Candidate("eplb"), Candidate("setpart")]
        if problem.routing == FEWEST and problem.num_slots > problem.num_experts and problem.copies_level == GPU:
            tried.append(Candidate("fanout"))
            return tuple(tried), "fewest copies per token: each layer partitioned by itself, with and without replicas"
        return tuple(tried), "fewest copies per token: each layer partitioned by itself"
    binaries = problem.num_layers * problem.num_experts * problem.num_gpus
    tried = [Candidate("linear"), Candidate("eplb"), Candidate("balance")]
    if problem.model.num_groups > 1 and problem.topology.num_nodes > 1:
        tried.append(Candidate("eplb", {"policy": "global"}))
    if _knows_homes(problem):
        tried.append(Candidate("transport"))
    if _saves_copies(problem):
        tried += [Candidate("setpart", {"mode": "fast"}, slack=slack) for slack in SLACKS]
        if _takes_near_copies(problem):
            tried += [Candidate("nearby", slack=slack, goal=REMOTE) for slack in SLACKS]
        return tuple(tried), "one copy per GPU: fewer GPUs per token weighed against even load"
    if problem.num_slots > problem.num_experts:
        # a copy costs its weights' reading in every step: with few tokens per expert it may not pay
        return (*tried, Candidate("eplb", {"policy": "global", "copies": "none"})), "redundant slots, filled and not"
    if binaries <= AUTO_BINARIES:
        short = Candidate("moetuner", {"backend": "cpsat"}, AUTO_WORK)
        return (*tried, short), f"{binaries:,} binaries: small enough for a short integer programme too"
    return tuple(tried), f"{binaries:,} binaries: too many for integer programmes"


def _saves_copies(problem: Problem) -> bool:
    """Whether a token is sent once to every GPU that holds any of its experts, and layers are small enough to part."""
    once = problem.objective == STEP_TIME and KERNEL_OF_PHASE[problem.law.phase] == NORMAL
    even = problem.num_experts % problem.num_gpus == 0
    even = even and int(problem.slots_per_gpu.min()) * problem.num_gpus >= problem.num_experts
    small = problem.num_experts <= MOST_PARTITIONED and even and not problem.whole_model
    return once and small and problem.stats.sample is not None and problem.num_gpus > 1


def _takes_near_copies(problem: Problem) -> bool:
    """Whether tokens prefer copies on their own node, and there are nodes and slots for such copies."""
    near = problem.routing in (NEAREST, TOPOLOGY_AWARE) and problem.topology.num_nodes > 1
    return near and problem.num_slots > problem.num_experts


def _knows_homes(problem: Problem) -> bool:
    """Whether every selection is a row of its own from a recorded home, and only slots limit a GPU."""
    sources, alone = problem.stats.source_load, KERNEL_OF_PHASE[problem.law.phase] != NORMAL
    free = problem.objective == STEP_TIME and problem.load_cap is None and not problem.whole_model
    return free and alone and sources is not None and 1 < len(sources) <= problem.num_gpus


def divisible(problem: Problem) -> bool:
    """Whether traffic between GPUs is the objective and layers can be divided in few enough ways to try all."""
    few = 0 < num_divisions(problem.num_experts, problem.num_gpus) <= MAX_DIVISIONS
    crossing = problem.objective == CROSS and problem.copies_level == GPU
    return crossing and not problem.whole_model and problem.divides_evenly and few
