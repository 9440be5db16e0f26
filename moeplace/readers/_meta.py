"""What the file, the model and the ids say about the model's shape, brought to agree or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moeplace.errors import Location, TraceError
from moeplace.readers._common import IdLimit, ModelLike
from moeplace.trace import TraceMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What a file says about itself; None or empty where it says nothing."""

    num_experts: int | None = None
    top_k: int | None = None
    layer_ids: tuple[int, ...] | None = None
    num_layers: int | None = None
    first_moe_layer: int | None = None
    model_id: str | None = None
    domains: tuple[str, ...] = ()
    request_names: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()


class Shape:
    """The model's shape as it becomes known: declared first, then the model's, then what the ids show.

    Parameters
    ----------
    file
        Name for errors.
    declared
        What the file says.
    model
        The model the user names.
    where
        The place of the declaration, for errors.

    Raises
    ------
    TraceError
        The file and the model disagree.
    """

    def __init__(self, file: str, declared: Declared, model: ModelLike | None, where: Location | None = None) -> None:
        self.declared, self.model = declared, model
        self.where = where or Location(file=file)
        self.assumptions = list(declared.assumptions)
        self.num_experts = declared.num_experts
        self.top_k = declared.top_k
        self.layer_ids: tuple[int, ...] | None = None
        if model is not None:
            self._agree("num_experts", declared.num_experts, model.num_experts, "experts per layer")
            self._agree("top_k", declared.top_k, model.top_k, "experts per token and layer")
            self.num_experts = model.num_experts
            # what the file once had to guess, the model now says
            self.assumptions = [s for s in self.assumptions if not s.startswith(("num_experts not", "top_k not"))]

    @property
    def limit(self) -> IdLimit:
        """The largest id that may appear, with its source."""
        if self.declared.num_experts is not None:
            return IdLimit(num_experts=self.declared.num_experts, source="the file says so with num_experts")
        if self.model is not None:
            source = f"model {self.model.name} has {self.model.num_experts} experts per layer"
            return IdLimit(num_experts=self.model.num_experts, source=source, from_model=True)
        return IdLimit() if self.num_experts is None else IdLimit(num_experts=self.num_experts, source="largest id + 1")

    def assume(self, sentence: str) -> None:
        """Note an assumption once."""
        if sentence not in self.assumptions:
            self.assumptions.append(sentence)

    def set_top_k(self, seen: int) -> None:
        """Settle top-k from the first token."""
        if self.declared.top_k is None and self.model is not None:
            self._agree("top-k of the tokens", seen, self.model.top_k, "experts per token and layer")
        elif self.declared.top_k not in (None, seen):
            raise self._refused(
                f"tokens choose {seen} experts per layer, but top_k is {self.declared.top_k}",
                "top_k is the number of ids per layer",
            )
        self.top_k = seen

    def set_num_experts(self, largest_id: int) -> None:
        """Settle the number of experts from the largest id when nothing else says it."""
        if self.num_experts is None:
            self.num_experts = largest_id + 1
            self.assume(
                f"num_experts not given: {largest_id + 1} = largest id + 1; --model or a meta line says it exactly"
            )

    def set_layers(self, count: int, seen: Sequence[int] | None = None) -> None:
        """Settle the layer ids from the number of layers per token, or from the layer numbers ``seen`` in the rows."""
        ids = tuple(seen) if seen is not None else self.declared.layer_ids
        if ids is None:
            ids = self._numbered(count)
        elif len(ids) != count:
            raise self._refused(
                f"tokens have {count} layers, but {len(ids)} layer ids are given", "one layer id per layer"
            )
        if any(b <= a for a, b in pairwise(ids)):
            raise self._refused(f"layer ids {list(ids)}", "layer ids increase strictly")
        self.layer_ids = (
            ids if self.model is None or ids == self.model.moe_layer_ids else self._of_model(ids, self.model)
        )

    def build(self, extra: Sequence[str] = (), **names: tuple[str, ...]) -> TraceMeta:
        """Return the meta of what is known by now; ``names`` are ``domains`` and ``request_names``."""
        return TraceMeta(
            num_experts=self.num_experts or self.limit.num_experts,
            top_k=self.top_k or 1,
            layer_ids=self.layer_ids or (0,),
            model_id=self.declared.model_id,
            assumptions=(*self.assumptions, *(s for s in extra if s not in self.assumptions)),
            **names,
        )

    def _numbered(self, count: int) -> tuple[int, ...]:
        first, total = self.declared.first_moe_layer or 0, self.declared.num_layers
        if total is not None and total not in (count, count + first):
            if first or count > total:
                what = f"tokens have {count} layers, but num_layers is {total} and first_moe_layer is {first}"
                raise self._refused(what, "tokens have num_layers - first_moe_layer layers")
            self.assume(f"num_layers is {total}, tokens have {count}: layers numbered as ordinals of the MoE layers")
        declared = self.declared.first_moe_layer is not None or total is not None
        if not declared and self.model is None:
            self.assume(f"layer ids not given: the layers are numbered 0..{count - 1} in the order of the rows")
        if declared or self.model is None:
            return tuple(range(first, first + count))
        if count != len(self.model.moe_layer_ids):
            raise self._refused(
                f"tokens have {count} layers, but model {self.model.name} has "
                f"{len(self.model.moe_layer_ids)} MoE layers",
                "the trace and the model agree",
                "is --model the model that was recorded? a trace of some layers says which with moe_layer_ids",
            )
        return self.model.moe_layer_ids

    def _of_model(self, ids: tuple[int, ...], model: ModelLike) -> tuple[int, ...]:
        if set(ids) <= set(model.moe_layer_ids):
            return ids
        if ids[-1] < len(model.moe_layer_ids):
            mapped = tuple(model.moe_layer_ids[i] for i in ids)
            self.assume(
                f"layers {ids[0]}..{ids[-1]} taken as ordinals of the MoE layers of {model.name}: "
                f"its layers {mapped[0]}..{mapped[-1]}"
            )
            return mapped
        raise self._refused(
            f"layers {ids[0]}..{ids[-1]}, but the MoE layers of model {model.name} are "
            f"{model.moe_layer_ids[0]}..{model.moe_layer_ids[-1]}",
            "the trace and the model agree",
            "is --model the model that was recorded?",
        )

    def _agree(self, name: str, said: int | None, models: int, unit: str) -> None:
        if said is not None and said != models and self.model is not None:
            raise self._refused(
                f"{name} is {said}, but model {self.model.name} has {models} {unit}",
                "the trace and the model agree",
                "is --model the model that was recorded?",
            )

    def _refused(self, what: str, rule: str, hint: str | None = None) -> TraceError:
        return TraceError(what, rule=rule, hint=hint, where=self.where)
