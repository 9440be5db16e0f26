"""Laws of :mod:`moeplace.frozen`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.frozen import digest, frozen_array
from moeplace.placement import Placement


@pytest.mark.parametrize("view", [False, True])
def test_a_frozen_array_never_changes(view: bool) -> None:
    """Writing to the array it was made from, or to what a read-only view looks at, changes nothing."""
    source = np.arange(4)
    given_array = source[:] if view else source
    given_array.flags.writeable = not view
    kept = frozen_array(given_array, np.int64)
    source[0] = 99
    assert kept.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 1


def test_a_frozen_array_is_not_copied_again() -> None:
    """Freezing what is frozen costs nothing, and so does freezing a contiguous part of it."""
    once = frozen_array([1, 2, 3, 4], np.int64)
    assert frozen_array(once, np.int64) is once
    assert np.shares_memory(frozen_array(once[1:3], np.int64), once)
    assert frozen_array(once, np.int16).dtype == np.int16


@given(st.lists(st.integers(-1, 3), min_size=4, max_size=4), st.lists(st.integers(-1, 3), min_size=4, max_size=4))
def test_digests_tell_contents_apart(left: list[int], right: list[int]) -> None:
    """Two arrays have one digest exactly if they are equal; shape and type count."""
    a, b = np.array(left), np.array(right)
    assert (digest(a) == digest(b)) == (left == right)
    assert digest(a) != digest(a.reshape(2, 2))
    assert digest(a) != digest(a.astype(np.int16))


def test_digests_go_through_dataclasses_and_dicts() -> None:
    """Equal values have equal digests whatever the order of their keys; a changed field changes it."""
    one = Placement(slots=np.array([[[0, 1]]]), num_experts=2)
    assert digest({"a": one, "b": (1, None)}) == digest({"b": [1, None], "a": one.replace()})
    assert digest(one) != digest(one.replace(slots=np.array([[[1, 0]]])))
