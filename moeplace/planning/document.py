"""A plan as a document: the Pareto set, everything that was judged, and what was assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moeplace.planning.compare import compare_document
from moeplace.planning.evaluate import Evaluator
from moeplace.planning.explain import counts_sentence, infeasible_sentences
from moeplace.planning.pareto import pareto_set
from moeplace.planning.search import Found

SCHEMA = "moeplace/plan/1"


def plan_to_dict(
    found: Found, evaluator: Evaluator, assumed: Sequence[str], more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a ``moeplace/plan/1`` document.

    ``pareto`` holds the ids of the Pareto set, ``deployments`` everything that was judged; ``more`` is added.
    """
    work, book = evaluator.workload, evaluator.book
    return {
        "schema": SCHEMA,
        "trace_digest": work.trace_digest,
        "model": work.model.name,
        "workload": {
            "context": round(work.context, 3),
            "prompt": work.prompt,
            "steps": work.steps,
            "seed": work.seed,
        },
        "prices": {"name": book.name, "date": book.date, "unit": book.unit},
        "demands": asdict(evaluator.demands),
        "axes": list(found.axes),
        "summary": counts_sentence(found),
        "pareto": [outcome.deployment.id for outcome in pareto_set(found.outcomes, found.axes)],
        "deployments": [outcome.to_dict() for outcome in found.outcomes],
        "infeasible": list(infeasible_sentences(found)),
        "complete": not found.unjudged,
        "assumptions": list(assumed),
        **compare_document(found.outcomes),
        **(more or {}),
    }
