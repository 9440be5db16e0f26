"""One request of a trace that keeps each request in a file, and what all requests of a trace have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplace.errors import Location, TraceError
from moeplace.readers._common import IdLimit, top_k_problem
from moeplace.trace import first_bad_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Routed tokens of one request.

    Attributes
    ----------
    layer_ids
        Absolute ids of its MoE layers.
    experts
        ``[token, MoE layer, k]``, uint8 or uint16.
    step_tokens
        Tokens of each step: the prompt, then the decode steps.
    first_position
        Position of the first token.
    """

    layer_ids: tuple[int, ...]
    experts: npt.NDArray[np.unsignedinteger[Any]]
    step_tokens: tuple[int, ...]
    first_position: int = 0

    @property
    def steps(self) -> npt.NDArray[np.int32]:
        """``[token]`` number of the step that a token was routed in."""
        return np.repeat(np.arange(len(self.step_tokens), dtype=np.int32), self.step_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShape:
    """What all requests of a trace have in common.

    Attributes
    ----------
    layer_ids
        Absolute ids of the MoE layers, as the files number them.
    top_k
        Experts that a token chooses in a layer.
    limit
        The largest id there may be.
    """

    layer_ids: tuple[int, ...]
    top_k: int
    limit: IdLimit

    def check(self, request: Request, file: str) -> None:
        """Hold a request to the shape and its ids to their rules.

        Raises
        ------
        TraceError
            It is of another model, an id is out of range, or an expert stands twice in a top-k; says where.
        """
        rule, hint = "all requests are of one model", "keep the requests of each model in a folder of its own"
        ours, theirs = self.layer_ids, request.layer_ids
        if theirs != ours:
            known = f"{len(ours)} layers {ours[0]}..{ours[-1]}"
            what = f"{len(theirs)} layers {theirs[0]}..{theirs[-1]}, others have {known}"
            raise TraceError(what, rule=rule, hint=hint, where=Location(file=file))
        if request.experts.shape[2] != self.top_k:
            what = f"top-{request.experts.shape[2]}, others have top-{self.top_k}"
            raise TraceError(what, rule=rule, hint=hint, where=Location(file=file))
        bad = first_bad_row(request.experts, self.limit.num_experts)
        if bad is not None:
            raise self._wrong(request, bad[0], file)

    def _wrong(self, request: Request, at: Sequence[int], file: str) -> TraceError:
        token, layer = at[:2]
        step = int(request.steps[token])
        element = f"layer {self.layer_ids[layer]}, token {token - sum(request.step_tokens[:step])}"
        problem = top_k_problem(request.experts[token, layer].tolist(), self.limit)
        _, what, rule, hint = problem or (0, "bad ids", "ids differ and exist", None)
        return TraceError(what, rule=rule, hint=hint, where=at_step(file, step, element))


def at_step(file: str, step: int, element: str = "") -> Location:
    """Where a step, and an element of it, stands in a file."""
    return Location(file=file, element=f"step {step}" + (f", {element}" if element else ""))


RequestParser: TypeAlias = Callable[[bytes, str], Request]
