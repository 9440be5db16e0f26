"""The shape of a Mixture-of-Experts model: layers, experts, widths, bytes; presets for published models."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeplace import presets
from moeplace.errors import InputError, ProblemError, unknown_name

_FILE = "models.toml"
_FP8_BLOCK = 128
_SCALE_BYTES = 4
# what publishers append to a model's name without changing its shape; the two formats change the weights' bytes
_SUFFIX = re.compile(r"-(instruct|chat|base|pt|hf|fp8|bf16|v0\.\d|\d{4})$")
_FORMAT_BYTES = {"fp8": 1.0, "bf16": 2.0}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What attention costs in parameters and in KV memory.

    ``kv_lora_rank > 0`` means multi-head latent attention (MLA: ``nope_head_dim``, ``rope_head_dim``, ``v_head_dim``,
    and ``q_lora_rank`` if queries are compressed too); otherwise grouped-query attention (``num_kv_heads``,
    ``head_dim``).

    Parameters
    ----------
    num_heads
        Query heads.
    num_layers
        Layers with this attention; 0 means all of the model's. The others are hybrids' token mixers.
    output_gate
        Whether the query projection also makes a gate of its own size (Qwen3-Next).
    extra_parameters
        Parameters of one attention layer beside its projections (GLM-5's sparse-attention indexer).
    mixer_parameters
        Parameters of the token mixer of one layer without attention (Mamba, gated DeltaNet).
    """

    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    nope_head_dim: int = 0
    rope_head_dim: int = 0
    v_head_dim: int = 0
    num_layers: int = 0
    output_gate: bool = False
    extra_parameters: int = 0
    mixer_parameters: int = 0

    def __post_init__(self) -> None:
        presets.check_whole("attention.num_heads", self.num_heads, 1)
        latent = ("nope_head_dim", "rope_head_dim", "v_head_dim")
        grouped = ("num_kv_heads", "head_dim")
        for field in dataclasses.fields(self):
            if field.type == "int":
                needed = field.name in (latent if self.is_latent else grouped)
                presets.check_whole(f"attention.{field.name}", getattr(self, field.name), int(needed))

    @property
    def is_latent(self) -> bool:
        """Whether keys and values are kept as one latent vector (MLA)."""
        return self.kv_lora_rank > 0

    @property
    def kv_elements(self) -> int:
        """Elements that one token leaves in the KV cache of one layer [elements]; sliding windows not counted."""
        if self.is_latent:
            return self.kv_lora_rank + self.rope_head_dim
        return 2 * self.num_kv_heads * self.head_dim

    def parameters(self, hidden: int) -> int:
        """Parameters of one attention layer of the given width, biases and norms left out."""
        if not self.is_latent:
            widths = self.num_heads * (2 + self.output_gate) + 2 * self.num_kv_heads
            return hidden * self.head_dim * widths + self.extra_parameters
        queries = self.num_heads * (self.nope_head_dim + self.rope_head_dim)
        rank = self.q_lora_rank
        count = rank * (hidden + queries) if rank else hidden * queries
        count += hidden * (self.kv_lora_rank + self.rope_head_dim)
        count += self.kv_lora_rank * self.num_heads * (self.nope_head_dim + self.v_head_dim)
        return count + self.num_heads * self.v_head_dim * hidden + self.extra_parameters


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A Mixture-of-Experts model, as far as placement and serving cost need to know it.

    Only the MoE shape is needed; the fields from ``vocab`` on serve parameter counts and KV memory.

    Parameters
    ----------
    name
        The model's name.
    num_layers
        All transformer layers.
    moe_layer_ids
        Ids of the layers with routed experts, counted from 0 over all layers, increasing.
    num_experts, top_k
        Routed experts of an MoE layer, and how many of them a token is sent to.
    hidden, expert_inner
        Widths of the activations and of one routed expert [elements].
    num_shared, shared_inner
        Experts of an MoE layer that serve every token, and their inner widths added up [elements].
    num_groups, groups_per_token
        Groups the experts of a layer are split into for routing, and how many of them one token may use;
        ``groups_per_token = 0`` means all.
    weight_bytes
        Bytes per expert weight as served; 0.53125 is MXFP4.
    dispatch_bytes, combine_bytes
        Bytes per activation element on its way to an expert (1 is fp8, with one 4-byte scale per 128) and back.
    vocab, dense_inner, tied_embeddings
        Vocabulary, inner width of the layers without experts, and whether input and output embeddings are one.
    attention
        The attention layers; None if unknown.
    published_parameters, published_active_parameters
        Counts as published, for comparison with the computed ones; None if unknown.

    Raises
    ------
    ProblemError
        If the numbers do not describe a model.
    """

    name: str
    num_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden: int
    expert_inner: int
    num_shared: int = 0
    shared_inner: int = 0
    num_groups: int = 1
    groups_per_token: int = 0
    weight_bytes: float = 2.0
    dispatch_bytes: int = 2
    combine_bytes: int = 2
    vocab: int = 0
    dense_inner: int = 0
    tied_embeddings: bool = False
    attention: Attention | None = None
    published_parameters: int | None = None
    published_active_parameters: int | None = None

    def __post_init__(self) -> None:
        may_be_zero = ("num_shared", "shared_inner", "groups_per_token", "vocab", "dense_inner")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.type == "int | None" and value is not None):
                presets.check_whole(field.name, value, 0 if field.name in may_be_zero else 1)
                object.__setattr__(self, field.name, operator.index(value))
        presets.check_positive("weight_bytes", self.weight_bytes)
        object.__setattr__(self, "weight_bytes", float(self.weight_bytes))
        object.__setattr__(self, "moe_layer_ids", _layer_ids(self.moe_layer_ids, self.num_layers))
        self._check_routing()
        object.__setattr__(self, "groups_per_token", self.groups_per_token or self.num_groups)

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return len(self.moe_layer_ids)

    @property
    def bytes_per_copy_dispatch(self) -> int:
        """Bytes of one token's activation sent to one place: elements, and the scales if they are fp8 [bytes]."""
        return self._bytes_per_copy(self.dispatch_bytes)

    @property
    def bytes_per_copy_combine(self) -> int:
        """Bytes of one token's partial result sent back: elements, and the scales if they are fp8 [bytes]."""
        return self._bytes_per_copy(self.combine_bytes)

    def _bytes_per_copy(self, element_bytes: int) -> int:
        scales = -(-self.hidden // _FP8_BLOCK) * _SCALE_BYTES if element_bytes == 1 else 0
        return self.hidden * element_bytes + scales

    @property
    def expert_weight_bytes(self) -> int:
        """Bytes of one routed expert: three matrices (gate, up, down) of hidden × inner [bytes]."""
        return round(3 * self.hidden * self.expert_inner * self.weight_bytes)

    @property
    def kv_elements_per_token(self) -> int | None:
        """Elements one token leaves in the KV cache, all layers [elements]; None without attention data."""
        if self.attention is None:
            return None
        return (self.attention.num_layers or self.num_layers) * self.attention.kv_elements

    @property
    def num_parameters(self) -> int | None:
        """All weights of the text model; None without attention or vocabulary.

        Counted: embeddings, token mixers, dense and expert feed-forward layers, routers. Left out, together well
        below 1 %: norms, biases, multi-token-prediction layers, vision towers.
        """
        return self._parameters(self.num_experts)

    @property
    def num_active_parameters(self) -> int | None:
        """The weights one token uses, embeddings included; None without attention or vocabulary."""
        return self._parameters(self.top_k)

    def replace(self, **changes: Any) -> ModelSpec:
        """Copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def digest(self) -> str:
        """Sha256 of the content, in hex."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _parameters(self, experts_counted: int) -> int | None:
        if self.attention is None or not self.vocab:
            return None
        mixed = self.attention.num_layers or self.num_layers
        count = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        count += mixed * self.attention.parameters(self.hidden)
        count += (self.num_layers - mixed) * self.attention.mixer_parameters
        count += (self.num_layers - self.num_moe_layers) * 3 * self.hidden * self.dense_inner
        inner = experts_counted * self.expert_inner + self.shared_inner
        return count + self.num_moe_layers * self.hidden * (3 * inner + self.num_experts)

    def _check_routing(self) -> None:
        if self.top_k > self.num_experts:
            raise ProblemError(
                f"top_k is {self.top_k} of {self.num_experts} experts",
                rule="top_k is at most num_experts",
                hint="check num_experts and top_k",
            )
        if self.num_experts % self.num_groups or self.groups_per_token > self.num_groups:
            raise ProblemError(
                f"{self.num_experts} experts in {self.num_groups} groups, {self.groups_per_token} per token",
                rule="groups divide the experts evenly, and a token uses at most all of them",
                hint="num_groups = 1 if routing is not limited to groups",
            )
        reachable = (self.groups_per_token or self.num_groups) * (self.num_experts // self.num_groups)
        if self.top_k > reachable:
            raise ProblemError(
                f"top_k is {self.top_k}, but a token's groups hold {reachable} experts",
                rule="a token's groups hold at least top_k experts",
                hint="raise groups_per_token",
            )
        if (self.num_shared > 0) != (self.shared_inner > 0):
            raise ProblemError(
                f"num_shared is {self.num_shared} and shared_inner {self.shared_inner}",
                rule="both are 0 or neither is",
                hint="shared_inner is the inner width of all shared experts together",
            )


def load_model(name: str | Path) -> ModelSpec:
    """Load a published model by name, alias or Hugging Face repository id, or a model from a TOML file.

    Parameters
    ----------
    name
        In any case: ``deepseek-v3``, ``openai/gpt-oss-20b``, ``Qwen/Qwen3-235B-A22B-FP8``, ``my/model.toml``.
        A file holds the fields of :class:`ModelSpec` one per line, ``[attention]`` as a table, and
        ``moe_layer_ids`` as a list or as ``{ first = 3, step = 1, count = 58 }`` (left out: every layer).

    Raises
    ------
    UnknownNameError
        If there is no such model; near names are suggested.
    InputError
        If a file cannot be used; the message names the file and the key.

    Examples
    --------
    >>> load_model("deepseek-ai/DeepSeek-V3").bytes_per_copy_dispatch
    7392
    """
    entry, suffix = _resolve(name)
    model = _build(entry)
    if suffix and model.weight_bytes != _FORMAT_BYTES[suffix]:
        model = model.replace(name=f"{model.name}-{suffix}", weight_bytes=_FORMAT_BYTES[suffix])
    return model


def list_models() -> tuple[str, ...]:
    """List the names of the published models that are known."""
    return tuple(presets.packaged(_FILE))


def model_provenance(name: str | Path) -> Mapping[str, str]:
    """Tell where each number of a model comes from: dotted key → source."""
    entry, suffix = _resolve(name)
    if suffix:
        return {**entry.sources, "weight_bytes": f"the suffix -{suffix} of the name"}
    return entry.sources


def generic_model(num_experts: int, top_k: int, moe_layer_ids: Sequence[int], name: str = "generic") -> ModelSpec:
    """Assume a model where the trace does not say: Qwen3-235B's widths, bf16 throughout, no shared experts.

    Parameters
    ----------
    num_experts, top_k, moe_layer_ids
        The MoE shape, as the trace shows it.
    name
        What to call the model.
    """
    return ModelSpec(
        name=name,
        num_layers=max(moe_layer_ids, default=0) + 1,
        moe_layer_ids=tuple(moe_layer_ids),
        num_experts=num_experts,
        top_k=top_k,
        hidden=4096,
        expert_inner=1536,
    )


def _resolve(name: str | Path) -> tuple[presets.Entry, str | None]:
    if presets.is_path(name):
        return presets.user_file(Path(name)), None
    known = presets.packaged(_FILE)
    tail = str(name).strip().lower().rpartition("/")[2]
    number_format = None
    while True:
        entry = presets.lookup(tail, known)
        if entry is not None:
            return entry, number_format
        match = _SUFFIX.search(tail)
        if match is None:
            raise unknown_name("model", str(name), tuple(known))
        number_format = match[1] if match[1] in _FORMAT_BYTES else number_format
        tail = tail[: match.start()]


def _build(entry: presets.Entry) -> ModelSpec:
    fields = presets.read_fields(entry, ModelSpec, skip=("moe_layer_ids", "attention"))
    try:
        if any(key.startswith("attention") for key in entry.values):
            if "attention" in entry.values:
                raise ProblemError("attention is not a table", rule="attention is a table", hint="see [attention]")
            fields["attention"] = Attention(**presets.read_fields(entry, Attention, prefix="attention."))
        return ModelSpec(moe_layer_ids=_given_layer_ids(entry, fields["num_layers"]), **fields)
    except ProblemError as error:
        raise ProblemError(error.what, rule=error.rule, hint=error.hint, where=entry.at()) from error


def _given_layer_ids(entry: presets.Entry, num_layers: int) -> tuple[int, ...]:
    key = "moe_layer_ids"
    parts = {name.removeprefix(f"{key}."): value for name, value in entry.values.items() if name.startswith(f"{key}.")}
    listed = entry.values.get(key)
    whole = [*parts.values()] if listed is None else listed
    steps = set(parts) in (set(), {"first", "step", "count"})
    if not steps or not isinstance(whole, list) or not all(type(item) is int for item in whole):
        raise InputError(
            f"{key} is {parts or listed!r}",
            rule=f"{key} is a list of layer numbers or {{ first = …, step = …, count = … }}",
            hint=f"leave {key} out if every layer has experts",
            where=entry.at(key),
        )
    if listed is not None:
        return tuple(listed)
    if not parts:
        return tuple(range(num_layers))
    return tuple(parts["first"] + parts["step"] * i for i in range(parts["count"]))


def _layer_ids(ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
    for layer in ids:
        presets.check_whole("moe_layer_ids", layer, 0)
    numbers = tuple(operator.index(layer) for layer in ids)
    increasing = all(a < b for a, b in itertools.pairwise(numbers))
    if not numbers or not increasing or numbers[-1] >= num_layers:
        raise ProblemError(
            f"moe_layer_ids is {_short(numbers)} in a model of {num_layers} layers",
            rule="at least one id, strictly increasing, each below num_layers",
            hint="ids count all layers from 0, dense ones included",
        )
    return numbers


def _short(numbers: tuple[int, ...]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"({', '.join(map(str, numbers[:7]))}, … {numbers[-1]})"
