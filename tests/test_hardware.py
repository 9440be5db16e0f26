"""Laws of :mod:`moeplace.hardware` and its presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import InputError, ProblemError, UnknownNameError
from moeplace.hardware import Accelerator, accelerator_provenance, list_accelerators, load_accelerator
from moeplace.model import load_model

# HBM GB, TB/s, bf16 and fp8 TFLOPS, scale-up GB/s, NIC GB/s (lowest, highest), domain
NOMINAL = {
    "a100-80": (80, 2.039, 312, None, 300, (25, 25), 8),
    "a800": (80, 2.039, 312, None, 200, (25, 25), 8),
    "h100": (80, 3.35, 989, 1979, 450, (50, 50), 8),
    "h200": (141, 4.8, 989, 1979, 450, (50, 50), 8),
    "h800": (80, 3.35, 989, 1979, 200, (50, 50), 8),
    "h20": (96, 4.0, 148, 296, 450, (50, 50), 8),
    "l20": (48, 0.864, 119.5, 239, 32, (25, 50), 8),
    "l40s": (48, 0.864, 362, 733, 32, (25, 50), 8),
    "b200": (180, 7.7, 2250, 4500, 900, (50, 100), 8),
    "gb200-nvl72": (185, 8.0, 2500, 5000, 900, (50, 100), 72),
    "mi300x": (192, 5.3, 1307, 2615, 448, (50, 50), 8),
    "ascend-910c": (128, 3.2, 780, None, 392, (50, 50), 384),
    "tpu-v5p": (95, 2.765, 459, None, 6 * 90, (0, 50), 8960),
    "tpu-v6e": (32, 1.64, 918, None, 4 * 90, (0, 50), 256),
}
# DeepEP README, H800: ranks → dispatch and combine of 128 tokens, top-8, hidden 7168 [µs]
DEEPEP_US = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
USER_FILE = """
hbm_gb = 64
hbm_tb_per_s = 2.0
bf16_tflops = 500
scale_up_gb_per_s = { value = 100, source = "measured here" }
nic_gb_per_s = 12.5
scale_up_efficiency = 0.8
nic_efficiency = 0.9
scale_up_latency_us = 10
nic_latency_us = 20
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_listed_accelerator_is_in_the_table() -> None:
    """The presets are exactly the accelerators the reference lists."""
    assert sorted(list_accelerators()) == sorted(NOMINAL)


@pytest.mark.parametrize("name", NOMINAL)
def test_nominal_rates_are_the_published_ones(name: str) -> None:
    """Memory, arithmetic and links of a preset equal an independently written table."""
    a = load_accelerator(name)
    hbm, rate, bf16, fp8, scale_up, nic, domain = NOMINAL[name]
    assert (a.hbm_gb, a.hbm_tb_per_s, a.bf16_tflops, a.fp8_tflops) == (hbm, rate, bf16, fp8)
    assert (a.name, a.scale_up_gb_per_s, a.scale_up_domain) == (name, scale_up, domain)
    assert nic[0] <= a.nic_gb_per_s <= nic[1]


@pytest.mark.parametrize("name", NOMINAL)
def test_every_number_has_a_source(name: str) -> None:
    """No number of a preset is without a non-empty source, those filled by defaults included."""
    accelerator, sources = load_accelerator(name), accelerator_provenance(name)
    numbers = {f.name for f in dataclasses.fields(Accelerator)} - {"name", "price_note"}
    keys = {key for key in numbers if getattr(accelerator, key) is not None}
    assert [key for key in sorted(keys) if not sources.get(key, "").strip()] == []
    assert accelerator.price_note


def test_direct_links() -> None:
    """Links are counted where they are direct: 6 in a 3D torus, 4 in a 2D torus, 7 in a mesh of 8; not to a switch."""
    links = {name: load_accelerator(name).scale_up_links for name in list_accelerators()}
    assert {name: n for name, n in links.items() if n} == {"tpu-v5p": 6, "tpu-v6e": 4, "mi300x": 7}


def test_prices() -> None:
    """Only prices with a source in dollars are numbers; the others are unknown, not guessed."""
    prices = {name: load_accelerator(name).price_usd_per_hour for name in list_accelerators()}
    assert {name: price for name, price in prices.items() if price is not None} == {"h100": 2.3, "h800": 2.0}


def _low_latency_us(ranks: int, bytes_per_copy: int) -> float:
    gpu = load_accelerator("h800")
    nvlink_share, nic_share = (7 / ranks, (ranks - 8) / ranks) if ranks <= 64 else (0.0, 1.0)
    latency_us = gpu.nic_latency_us if nic_share else gpu.scale_up_latency_us
    sent = 128 * 8 * bytes_per_copy * 1e-3
    nic_us = sent * nic_share / gpu.nic_effective_gb_per_s
    return latency_us + max(nic_us, sent * nvlink_share / gpu.scale_up_effective_gb_per_s)


def test_h800_reproduces_deepep_low_latency() -> None:
    """α + max(NIC, NVLink) with the H800 preset is within 14 % of each DeepEP time of June 2025, 6 % on average."""
    model = load_model("deepseek-v3")
    errors = []
    for ranks, (dispatch_us, combine_us) in DEEPEP_US.items():
        errors.append(abs(_low_latency_us(ranks, model.bytes_per_copy_dispatch) / dispatch_us - 1))
        errors.append(abs(_low_latency_us(ranks, model.bytes_per_copy_combine) / combine_us - 1))
    assert max(errors) <= 0.14
    assert sum(errors) / len(errors) <= 0.06


@pytest.mark.parametrize(("experts", "measured_us"), [(64, 1049), (16, 276)])
def test_h100_reproduces_decode_gemm(experts: int, measured_us: float) -> None:
    """20 µs + reading every hit fp8 expert at the reached HBM rate is the measured decode time, within 10 %."""
    gpu, model = load_accelerator("h100"), load_model("deepseek-v3")
    read_us = experts * model.expert_weight_bytes / (gpu.hbm_effective_tb_per_s * 1e6)
    assert 20 + read_us == pytest.approx(measured_us, rel=0.10)


@pytest.mark.parametrize(
    ("given_name", "name"),
    [("A100", "a100-80"), ("H100-SXM5", "h100"), ("GB200", "gb200-nvl72"), ("nvl72", "gb200-nvl72")],
)
def test_aliases(given_name: str, name: str) -> None:
    """Common names in any letter case find the same preset."""
    assert load_accelerator(given_name) == load_accelerator(name)


@pytest.mark.parametrize(("wrong", "near"), [("h101", "h100"), ("gb200-nvl7", "gb200-nvl72"), ("tpu-v5", "tpu-v5p")])
def test_unknown_names_suggest_near_ones(wrong: str, near: str) -> None:
    """A misspelt accelerator is refused with the right name among the suggestions."""
    with pytest.raises(UnknownNameError) as caught:
        load_accelerator(wrong)
    assert caught.value.hint is not None
    assert near in caught.value.hint.partition("?")[0]


FIELDS = [f.name for f in dataclasses.fields(Accelerator) if str(f.type).startswith("float")]


@given(st.sampled_from(FIELDS), st.floats() | st.integers(-3, 3) | st.booleans() | st.just("1"))
def test_constructor_accepts_exactly_finite_positive_rates(field: str, value: object) -> None:
    """A rate is accepted if and only if it is finite and above 0, an efficiency if it is at most 1 too."""
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
    allowed = 0 < number <= (1.0 if field.endswith("_efficiency") else 1.7976931348623157e308)
    h100 = load_accelerator("h100")
    if allowed:
        assert getattr(h100.replace(**{field: value}), field) == number
        return
    with pytest.raises(ProblemError) as caught:
        h100.replace(**{field: value})
    assert field in caught.value.what
    assert caught.value.rule
    assert caught.value.hint


@pytest.mark.parametrize("changes", [{"scale_up_domain": 0}, {"scale_up_links": 0}, {"scale_up_links": 1.5}])
def test_counts_are_whole_and_positive(changes: dict[str, object]) -> None:
    """Domains and links are counted in whole numbers from 1."""
    with pytest.raises(ProblemError, match=next(iter(changes))):
        load_accelerator("h100").replace(**changes)


def test_digest_is_of_the_content() -> None:
    """All presets differ in digest; an equal one has the same, whether its numbers were whole or not."""
    digests = {load_accelerator(name).digest() for name in list_accelerators()}
    assert len(digests) == len(NOMINAL)
    h100 = load_accelerator("h100")
    assert h100.replace(hbm_gb=80).digest() == h100.digest() != h100.replace(hbm_gb=94).digest()


def test_user_file(tmp_path: Path) -> None:
    """A user's TOML file gives the accelerator it describes, with defaults for the rest and its own sources."""
    path = _write(tmp_path, USER_FILE)
    mine = load_accelerator(path)
    assert (mine.name, mine.hbm_gb, mine.fp8_tflops, mine.hbm_efficiency) == ("mine", 64.0, None, 0.81)
    assert mine.scale_up_effective_gb_per_s == pytest.approx(80)
    assert mine.normal_latency_us == 55
    sources = accelerator_provenance(str(path))
    assert sources["scale_up_gb_per_s"] == "measured here"
    assert "mine.toml" in sources["hbm_gb"]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("hbm_gb = 64", "", "hbm_gb"),
        ("hbm_gb = 64", "hbm_gb = 'much'", "hbm_gb"),
        ("hbm_gb = 64", "hbm_gb = -64", "hbm_gb"),
        ("hbm_gb = 64", "hbm_gb = 64\nhbm_eficiency = 0.8", "hbm_efficiency"),
        ("nic_efficiency = 0.9", "nic_efficiency = 90", "nic_efficiency"),
        ("hbm_gb = 64", "hbm_gb = 64\nscale_up_links = 6.0", "scale_up_links"),
        ("hbm_gb = 64", "hbm_gb = 64\nprice_note = 2", "price_note"),
    ],
)
def test_user_file_errors_name_file_and_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    """Whatever is wrong with a user's file, the message names the file and the key."""
    path = _write(tmp_path, USER_FILE.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_accelerator(path)
    assert str(path) in str(caught.value)
    assert key in str(caught.value)
