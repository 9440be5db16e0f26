"""Laws of :mod:`moeplace.model` and its presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moeplace.errors import InputError, MoeplaceError, ProblemError, UnknownNameError
from moeplace.model import Attention, ModelSpec, generic_model, list_models, load_model, model_provenance

# layers, MoE layers, first MoE layer, experts, top-k, shared width, hidden, expert inner, groups, groups per token
SHAPES = {
    "mixtral-8x7b": (32, 32, 0, 8, 2, 0, 4096, 14336, 1, 1),
    "mixtral-8x22b": (56, 56, 0, 8, 2, 0, 6144, 16384, 1, 1),
    "deepseek-v3": (61, 58, 3, 256, 8, 2048, 7168, 2048, 8, 4),
    "deepseek-r1": (61, 58, 3, 256, 8, 2048, 7168, 2048, 8, 4),
    "deepseek-v2-lite": (27, 26, 1, 64, 6, 2 * 1408, 2048, 1408, 1, 1),
    "deepseek-v2": (60, 59, 1, 160, 6, 2 * 1536, 5120, 1536, 8, 3),
    "qwen3-30b-a3b": (48, 48, 0, 128, 8, 0, 2048, 768, 1, 1),
    "qwen3-235b-a22b": (94, 94, 0, 128, 8, 0, 4096, 1536, 1, 1),
    "qwen3-coder-480b": (62, 62, 0, 160, 8, 0, 6144, 2560, 1, 1),
    "qwen3-next-80b": (48, 48, 0, 512, 10, 512, 2048, 512, 1, 1),
    "qwen1.5-moe-a2.7b": (24, 24, 0, 60, 4, 5632, 2048, 1408, 1, 1),
    "llama-4-scout": (48, 48, 0, 16, 1, 8192, 5120, 8192, 1, 1),
    "llama-4-maverick": (48, 24, 1, 128, 1, 8192, 5120, 8192, 1, 1),
    "gpt-oss-20b": (24, 24, 0, 32, 4, 0, 2880, 2880, 1, 1),
    "gpt-oss-120b": (36, 36, 0, 128, 4, 0, 2880, 2880, 1, 1),
    "kimi-k2": (61, 60, 1, 384, 8, 2048, 7168, 2048, 1, 1),
    "minimax-m2": (62, 62, 0, 256, 8, 0, 3072, 1536, 1, 1),
    "glm-4.5": (92, 89, 3, 160, 8, 1536, 5120, 1536, 1, 1),
    "glm-4.6": (92, 89, 3, 160, 8, 1536, 5120, 1536, 1, 1),
    "glm-4.5-air": (46, 45, 1, 128, 8, 1408, 4096, 1408, 1, 1),
    "glm-5": (78, 75, 3, 256, 8, 2048, 6144, 2048, 1, 1),
    "phi-3.5-moe": (32, 32, 0, 16, 2, 0, 4096, 6400, 1, 1),
    "jamba-v0.1": (32, 16, 1, 16, 2, 0, 4096, 14336, 1, 1),
    "ernie-4.5-21b-a3b": (28, 27, 1, 64, 6, 2 * 1536, 2560, 1536, 1, 1),
    "olmoe-1b-7b": (16, 16, 0, 64, 8, 0, 2048, 1024, 1, 1),
    "dbrx": (40, 40, 0, 16, 4, 0, 6144, 10752, 1, 1),
    "qwen2-57b-a14b": (28, 28, 0, 64, 8, 20480, 3584, 2560, 1, 1),
}
ORDINARY = 0.015
LOOSE = {
    "jamba-v0.1": 0.02,  # published as 52 B for a hybrid whose norms are not counted here
    "qwen3-next-80b": 0.02,  # published as 80 B for a hybrid, rounded
    "ernie-4.5-21b-a3b": 0.04,  # 21.8 B, which the card rounds down to 21 B
}
# a published active count may leave out the input embedding, or both, and is often rounded down to a short name
ACTIVE_ROUNDING = 0.10

SMALL = ModelSpec(
    name="small", num_layers=4, moe_layer_ids=(1, 2, 3), num_experts=8, top_k=2, hidden=256, expert_inner=64
)
USER_FILE = """
num_layers = 4
moe_layer_ids = { first = 1, step = 2, count = 2 }
num_experts = 8
top_k = 2
hidden = 256
expert_inner = 64
weight_bytes = { value = 1, source = "my own quantisation" }
[attention]
num_heads = 4
num_kv_heads = 2
head_dim = 64
"""


def _write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_listed_model_is_in_the_table_of_shapes() -> None:
    """The presets are exactly the models the reference lists."""
    assert sorted(list_models()) == sorted(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_is_the_published_one(name: str) -> None:
    """Layers, experts, widths and groups of a preset equal an independently written table."""
    m = load_model(name)
    shape = (m.num_layers, m.num_moe_layers, m.moe_layer_ids[0], m.num_experts, m.top_k, m.shared_inner)
    assert (*shape, m.hidden, m.expert_inner, m.num_groups, m.groups_per_token) == SHAPES[name]
    assert m.name == name
    step = 2 if name in ("llama-4-maverick", "jamba-v0.1") else 1
    assert {b - a for a, b in zip(m.moe_layer_ids, m.moe_layer_ids[1:], strict=False)} == {step}


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_count_is_the_published_one(name: str) -> None:
    """Parameters computed from the configuration agree with the published count, so no width is wrong."""
    model = load_model(name)
    assert model.num_parameters is not None
    assert model.published_parameters is not None
    assert model.num_parameters == pytest.approx(model.published_parameters, rel=LOOSE.get(name, ORDINARY))


@pytest.mark.parametrize("name", SHAPES)
def test_active_parameter_count_brackets_the_published_one(name: str) -> None:
    """The published active count lies between the computed one with and without both embeddings."""
    model = load_model(name)
    most, published = model.num_active_parameters, model.published_active_parameters
    assert most is not None
    assert published is not None
    least = most - 2 * model.vocab * model.hidden
    assert least * (1 - ACTIVE_ROUNDING) <= published <= most * (1 + ACTIVE_ROUNDING)


@pytest.mark.parametrize("name", SHAPES)
def test_every_number_has_a_source(name: str) -> None:
    """No number of a preset is without a non-empty source, those filled by defaults included."""
    model, sources = load_model(name), model_provenance(name)
    numbers = {f.name for f in dataclasses.fields(ModelSpec)} - {"name", "moe_layer_ids", "attention"}
    keys = {key for key in numbers if getattr(model, key) not in (None, False, 0)}
    assert model.attention is not None
    shape = dataclasses.asdict(model.attention)
    keys |= {f"attention.{key}" for key, value in shape.items() if value and key != "output_gate"}
    assert [key for key in sorted(keys) if not sources.get(key, "").strip()] == []


def test_mixer_parameters_follow_from_their_configurations() -> None:
    """Token mixers given as one number equal the sum of their matrices, from the configurations' widths."""
    hidden, inner, state, rank, width = 4096, 2 * 4096, 16, 256, 4
    mamba = hidden * 2 * inner + inner * hidden + inner * (rank + 2 * state) + rank * inner + inner
    mamba += inner * width + inner + inner * state + inner
    jamba = load_model("jamba-v0.1").attention
    assert jamba is not None
    assert jamba.mixer_parameters == mamba
    keys, values, heads, hidden = 16 * 128, 32 * 128, 32, 2048
    delta = hidden * (2 * keys + 2 * values) + hidden * 2 * heads + 4 * (2 * keys + values) + values * hidden
    qwen = load_model("qwen3-next-80b").attention
    assert qwen is not None
    assert qwen.mixer_parameters == delta + 2 * heads + 128
    glm = load_model("glm-5").attention
    assert glm is not None
    assert glm.extra_parameters == 2048 * 32 * 128 + 6144 * 128 + 6144 * 32


def test_deepseek_v3_bytes() -> None:
    """A DeepSeek-V3 copy is 7,392 bytes out (fp8 with scales) and 14,336 back; an expert is 44 MB in fp8."""
    model = load_model("deepseek-v3")
    assert model.bytes_per_copy_dispatch == 7168 + 56 * 4 == 7392
    assert model.bytes_per_copy_combine == 14336
    assert model.expert_weight_bytes == 3 * 7168 * 2048


def test_deepseek_v3_kv_cache() -> None:
    """DeepSeek-V3 keeps 70.272 KB of bf16 KV per token, as arXiv 2505.09343 (table 1) says."""
    elements = load_model("deepseek-v3").kv_elements_per_token
    assert elements is not None
    assert 2 * elements == 70_272


def test_mxfp4_expert() -> None:
    """A gpt-oss expert has 3·2880² weights of 4.25 bits."""
    assert load_model("gpt-oss-120b").expert_weight_bytes == 3 * 2880 * 2880 * 17 // 32


@given(hidden=st.integers(1, 20_000), dispatch=st.integers(1, 4))
def test_scales_only_with_fp8(hidden: int, dispatch: int) -> None:
    """A copy carries one 4-byte scale per started 128 elements if and only if an element is one byte."""
    scales = sum(4 for _ in range(0, hidden, 128)) if dispatch == 1 else 0
    model = SMALL.replace(hidden=hidden, dispatch_bytes=dispatch)
    assert model.bytes_per_copy_dispatch == hidden * dispatch + scales


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("DeepSeek-V3", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("mistralai/Mixtral-8x22B-v0.1", "mixtral-8x22b"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3-235b-a22b"),
        ("Qwen/Qwen3-Coder-480B-A35B-Instruct", "qwen3-coder-480b"),
        ("Qwen/Qwen3-Next-80B-A3B-Thinking", "qwen3-next-80b"),
        ("Qwen/Qwen1.5-MoE-A2.7B-Chat", "qwen1.5-moe-a2.7b"),
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", "llama-4-maverick"),
        ("moonshotai/Kimi-K2-Instruct-0905", "kimi-k2"),
        ("zai-org/GLM-4.5-Air-Base", "glm-4.5-air"),
        ("microsoft/Phi-3.5-MoE-instruct", "phi-3.5-moe"),
        ("ai21labs/Jamba-v0.1", "jamba-v0.1"),
        ("baidu/ERNIE-4.5-21B-A3B-PT", "ernie-4.5-21b-a3b"),
        ("allenai/OLMoE-1B-7B-0924-Instruct", "olmoe-1b-7b"),
        ("databricks/dbrx-instruct", "dbrx"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-v2-lite"),
    ],
)
def test_aliases(given_name: str, name: str) -> None:
    """Repository ids, variants of the same shape and any letter case find the same preset."""
    assert load_model(given_name) == load_model(name)


def test_a_number_format_in_the_name_changes_the_weights() -> None:
    """An -FP8 or -BF16 variant has that format's bytes per weight, never silently the default's."""
    fp8 = load_model("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8")
    assert (fp8.name, fp8.weight_bytes) == ("qwen3-235b-a22b-fp8", 1.0)
    assert "-fp8" in model_provenance("Qwen3-235B-A22B-FP8")["weight_bytes"]
    assert load_model("deepseek-v3-bf16").expert_weight_bytes == 2 * load_model("deepseek-v3").expert_weight_bytes
    assert load_model("deepseek-v3-fp8") == load_model("deepseek-v3")


@pytest.mark.parametrize(
    ("wrong", "near"), [("deepsek-v3", "deepseek-v3"), ("mixtral-8x7", "mixtral-8x7b"), ("glm45", "glm-4.5")]
)
def test_unknown_names_suggest_near_ones(wrong: str, near: str) -> None:
    """A misspelt model is refused with the right name among the suggestions."""
    with pytest.raises(UnknownNameError) as caught:
        load_model(wrong)
    assert caught.value.hint is not None
    assert near in caught.value.hint.partition("?")[0]


def test_only_the_shape_is_needed() -> None:
    """A model without attention data can be built and costed; what needs the data is None, not a wrong number."""
    assert SMALL.num_parameters is None
    assert SMALL.num_active_parameters is None
    assert SMALL.kv_elements_per_token is None
    assert SMALL.groups_per_token == 1
    assert SMALL.num_moe_layers == 3
    assert SMALL.expert_weight_bytes == 3 * 256 * 64 * 2


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"hidden": -1}, "hidden"),
        ({"hidden": 256.0}, "hidden"),
        ({"top_k": True}, "top_k"),
        ({"top_k": 9}, "top_k"),
        ({"num_groups": 3}, "groups"),
        ({"num_groups": 4, "groups_per_token": 5}, "groups"),
        ({"num_groups": 8, "groups_per_token": 1}, "top_k"),
        ({"num_shared": 1}, "shared"),
        ({"weight_bytes": 0}, "weight_bytes"),
        ({"weight_bytes": float("nan")}, "weight_bytes"),
        ({"moe_layer_ids": ()}, "moe_layer_ids"),
        ({"moe_layer_ids": (1, 1)}, "moe_layer_ids"),
        ({"moe_layer_ids": (2, 1)}, "moe_layer_ids"),
        ({"moe_layer_ids": (3, 4)}, "moe_layer_ids"),
        ({"moe_layer_ids": (-1, 2)}, "moe_layer_ids"),
        ({"published_parameters": 0}, "published_parameters"),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, object], part: str) -> None:
    """Each rule of the constructor is enforced by an error that names the value, the rule and a way out."""
    with pytest.raises(ProblemError) as caught:
        SMALL.replace(**changes)
    assert part in caught.value.what
    assert caught.value.rule
    assert caught.value.hint


def test_impossible_attention_is_refused() -> None:
    """Attention needs the widths of its own kind."""
    with pytest.raises(ProblemError, match="head_dim"):
        Attention(num_heads=8, num_kv_heads=8)
    with pytest.raises(ProblemError, match="v_head_dim"):
        Attention(num_heads=8, kv_lora_rank=512, nope_head_dim=128, rope_head_dim=64)


@given(
    experts=st.integers(-2, 40),
    top_k=st.integers(-2, 40),
    groups=st.integers(-1, 8),
    per_token=st.integers(-1, 8),
    ids=st.lists(st.integers(-1, 12), max_size=6),
)
def test_constructor_accepts_exactly_what_the_rules_allow(
    experts: int, top_k: int, groups: int, per_token: int, ids: list[int]
) -> None:
    """The constructor succeeds if and only if every rule holds, and fails only with ``ProblemError``."""
    positive = experts >= 1 and top_k >= 1 and groups >= 1 and per_token >= 0
    even = positive and experts % groups == 0 and per_token <= groups
    routable = even and top_k <= experts // groups * (per_token or groups)
    layered = bool(ids) and ids == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < 10
    shape = {"num_experts": experts, "top_k": top_k, "num_groups": groups, "groups_per_token": per_token}
    try:
        model = SMALL.replace(num_layers=10, moe_layer_ids=tuple(ids), **shape)
    except ProblemError:
        assert not (routable and layered)
    else:
        assert routable
        assert layered
        assert model.num_moe_layers == len(ids)


@given(st.sampled_from(list_models()), st.sampled_from(list_models()))
def test_digest_is_of_the_content(one: str, other: str) -> None:
    """Equal models have equal digests, different ones different digests, and replacing back restores it."""
    assume(one != other)
    first, second = load_model(one), load_model(other)
    assert first.digest() == load_model(one).digest()
    assert first.digest() != second.digest()
    assert first.replace(top_k=1).digest() != first.digest() or first.top_k == 1
    assert first.replace(top_k=1).replace(top_k=first.top_k).digest() == first.digest()


def test_numpy_numbers_are_plain_ones() -> None:
    """Numbers read from arrays give the same model and digest as Python's."""
    ids = np.array([1, 2, 3])
    same = SMALL.replace(hidden=np.int64(256), moe_layer_ids=tuple(ids), weight_bytes=np.float32(2))
    assert same == SMALL
    assert same.digest() == SMALL.replace(weight_bytes=2).digest() == SMALL.digest()


def test_models_are_immutable() -> None:
    """A model cannot be changed in place."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.top_k = 3  # type: ignore[misc]


def test_generic_model_is_qwen3_wide_bf16() -> None:
    """An unknown model is assumed to have Qwen3-235B's widths, bf16 and no shared experts, in the trace's layers."""
    model, qwen = generic_model(16, 2, (0, 2, 5), "from-trace"), load_model("qwen3-235b-a22b")
    assert (model.hidden, model.expert_inner) == (qwen.hidden, qwen.expert_inner) == (4096, 1536)
    assert (model.name, model.num_layers, model.moe_layer_ids) == ("from-trace", 6, (0, 2, 5))
    assert (model.weight_bytes, model.dispatch_bytes, model.num_shared) == (2.0, 2, 0)


def test_user_file(tmp_path: Path) -> None:
    """A user's TOML file gives the model it describes, named after the file, with its own sources."""
    path = _write(tmp_path, USER_FILE)
    model = load_model(path)
    assert (model.name, model.moe_layer_ids, model.weight_bytes) == ("mine", (1, 3), 1.0)
    assert model.attention == Attention(num_heads=4, num_kv_heads=2, head_dim=64)
    assert load_model(str(path)) == model
    sources = model_provenance(path)
    assert sources["weight_bytes"] == "my own quantisation"
    assert "mine.toml" in sources["hidden"]
    listed = _write(tmp_path, "name = 'other'\n" + USER_FILE.replace("{ first = 1, step = 2, count = 2 }", "[1, 3]"))
    assert load_model(listed) == model.replace(name="other")
    dense = _write(tmp_path, "\n".join(line for line in USER_FILE.splitlines() if "moe_layer_ids" not in line))
    assert load_model(dense).moe_layer_ids == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("hidden = 256", "", "hidden"),
        ("hidden = 256", "hidden = '256'", "hidden"),
        ("hidden = 256", "hidden = 256.5", "hidden"),
        ("top_k = 2", "top_k = true", "top_k"),
        ("top_k = 2", "top_k = 99", "top_k"),
        ("top_k = 2", "topk = 2", "top_k"),
        ("count = 2", "count = 9", "moe_layer_ids"),
        ("step = 2, ", "", "moe_layer_ids"),
        ("{ first = 1, step = 2, count = 2 }", "'all'", "moe_layer_ids"),
        ("{ first = 1, step = 2, count = 2 }", "[1, 2.5]", "moe_layer_ids"),
        ("num_heads = 4", "num_heads = 'four'", "attention.num_heads"),
        ("num_heads = 4", "", "attention.num_heads"),
        ("head_dim = 64", "head_dimension = 64", "attention.head_dim"),
        ("[attention]", "attention = 5\n[other]", "other"),
        ("num_layers = 4", "num_layers = ", "line"),
        ("num_layers = 4", "name = 7\nnum_layers = 4", "name"),
    ],
)
def test_user_file_errors_name_file_and_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    """Whatever is wrong with a user's file, the message names the file and the key."""
    assert old in USER_FILE
    path = _write(tmp_path, USER_FILE.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert key in str(caught.value)


def test_attention_that_is_no_table_is_refused(tmp_path: Path) -> None:
    """``attention`` given as a plain value is an error, not silently dropped."""
    text = "attention = 5\n" + USER_FILE.partition("[attention]")[0]
    with pytest.raises(InputError, match="attention is not a table"):
        load_model(_write(tmp_path, text))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """A file that is missing, or is not text, is an error that names it."""
    for path in (tmp_path / "missing.toml", tmp_path / "binary.toml"):
        if path.stem == "binary":
            path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(MoeplaceError, match=path.name):
            load_model(path)
