"""Price books and bills: every number has a source, parts add up, and shares and break-even points are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import InputError, ProblemError, UnknownNameError
from moeplace.hardware import load_accelerator
from moeplace.planning.economics import Bill, bill, break_even_factor, with_network_share
from moeplace.planning.pricebook import list_price_books, load_price_book
from moeplace.topology import Topology, build_topology, load_topology

SPECS = ("scale-up:64", "scale-out:8x8", "torus:4x4x4", "full-mesh:4x4x4", "mesh:8x8")


@pytest.mark.parametrize("name", list_price_books())
def test_every_number_of_a_book_has_a_source(name: str) -> None:
    """Books are dated, and no number is without a source."""
    book = load_price_book(name)
    assert book.date[:2] == "20"
    assert len(book.sources) > 15
    assert all(source.strip() for source in book.sources.values())


def test_a_user_s_book_says_only_what_differs(tmp_path: Path) -> None:
    """A file of one price takes the others over; bad keys and numbers are refused with their place."""
    file = tmp_path / "mine.toml"
    file.write_text('date = "2026-11"\n[accelerators.h100]\nusd = { value = 20000, source = "an offer" }\n')
    book, usual = load_price_book(file), load_price_book()
    assert (book.name, book.date, book.accelerator_usd["h100"]) == ("mine", "2026-11", 20000)
    assert book.sources["accelerators.h100.usd"] == "an offer"
    assert book.network == usual.network
    file.write_text("[network]\nnic_usd = 1\n")
    with pytest.raises(UnknownNameError, match=r"network\.nic_usd.*\n.*nic_usd_per_gb_per_s"):
        load_price_book(file)
    file.write_text("[accelerators.h100]\nusd = -1\n")
    with pytest.raises(InputError, match="at least 0"):
        load_price_book(file)
    with pytest.raises(UnknownNameError, match="did you mean street"):
        load_price_book("stret")


def test_bills_by_hand() -> None:
    """64 H100: what is counted for each topology, by the formulas of the module."""
    book = load_price_book()
    prices = book.network
    bills = {spec: bill(load_topology(spec), book) for spec in SPECS}
    assert {bills[spec].usd["accelerators"] for spec in SPECS} == {64 * 34400}
    assert bills["scale-up:64"].usd["switches"] == 64 * 450 * prices.scale_up_switch_usd_per_gb_per_s
    assert bills["scale-out:8x8"].usd["nics"] == 64 * 50 * prices.nic_usd_per_gb_per_s
    for spec, links in (("torus:4x4x4", 6), ("full-mesh:4x4x4", 9)):
        cables = 32 * 450 * prices.scale_up_cable_usd_per_gb_per_s + 32 * links * prices.scale_up_cable_usd_each
        assert bills[spec].usd["cables"] == pytest.approx(cables)
        assert bills[spec].usd["switches"] == bills[spec].usd["nics"] == 0
    both = bills["scale-up:64"] + bills["torus:4x4x4"]
    assert both.total_usd == pytest.approx(
        (bills["scale-up:64"].total_usd or 0) + (bills["torus:4x4x4"].total_usd or 0)
    )


def test_a_domain_beyond_one_switch_takes_more_tiers() -> None:
    """Twice the GPUs of a tier: three ports and two cables for each GPU instead of one of each."""
    book, h100 = load_price_book(), load_accelerator("h100")
    one, two = (bill(build_topology("scale-up", (gpus,), h100), book) for gpus in (144, 288))
    assert two.usd["switches"] == pytest.approx(6 * (one.usd["switches"] or 0))
    assert two.usd["cables"] == pytest.approx(4 * (one.usd["cables"] or 0))


@given(st.floats(0.0, 0.95))
def test_a_network_share_is_reached(share: float) -> None:
    """Scaled prices give the share asked for, and leave accelerators as they are."""
    book, topology = load_price_book(), load_topology("scale-up:64")
    scaled = bill(topology, with_network_share(book, topology, share))
    assert scaled.network_share == pytest.approx(share)
    assert scaled.usd["accelerators"] == bill(topology, book).usd["accelerators"]


def test_what_cannot_be_priced_is_refused() -> None:
    """A matrix of bandwidths; a share of a cluster without prices."""
    custom = Topology(
        name="m",
        kind="custom",
        dims=(2,),
        accelerator=load_accelerator("h100"),
        local_gb_per_s=1,
        nic_gb_per_s=1,
        pair_gb_per_s=[[1, 1], [1, 1]],  # type: ignore[arg-type]
    )
    with pytest.raises(ProblemError, match="price of m"):
        bill(custom, load_price_book())
    with pytest.raises(ProblemError, match="network share"):
        with_network_share(load_price_book(), load_topology("scale-up:8", accelerator="tpu-v5p"), 0.3)
    assert bill(load_topology("torus:4x4x4", accelerator="tpu-v5p"), load_price_book()).total_usd is None


@given(st.floats(0.3, 3.0))
def test_at_the_break_even_factor_both_buy_the_same(ratio: float) -> None:
    """Tokens per second for the price are equal there; where there is no factor, one is better at any."""
    book = load_price_book()
    first, second = (bill(load_topology(spec), book) for spec in ("scale-up:64", "torus:4x4x4"))
    factor = break_even_factor((1.0, first), (ratio, second))

    def value(rate: float, priced: Bill, times: float) -> float:
        return rate / ((priced.usd["accelerators"] or 0) + times * priced.network_usd)

    if factor is None:
        signs = {value(1.0, first, f) > value(ratio, second, f) for f in (0.0, 1.0, 1e6)}
        assert len(signs) == 1
    else:
        assert value(1.0, first, factor) == pytest.approx(value(ratio, second, factor), rel=1e-6)
