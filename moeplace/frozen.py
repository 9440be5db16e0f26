"""Immutable values: read-only typed arrays and content digests, shared by every central type."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Value = TypeVar("Value")

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


def frozen_array(values: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Copy ``values`` to a C-ordered array of ``dtype`` that nobody can write to.

    An array that is already read-only, contiguous and of that type, and no view of a writable one, is returned as it
    is: nobody can change it.
    """
    array = np.asarray(values)
    if array.dtype != dtype or _is_writable(array) or not array.flags.c_contiguous:
        array = np.array(array, dtype=dtype, order="C", copy=True)
        array.setflags(write=False)
    return array


def _is_writable(array: object) -> bool:
    # a read-only view still changes when the array it looks at does
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return True
        array = array.base
    return False


def seal(instance: object, **fields: object) -> None:
    """Set fields of a frozen dataclass from its ``__post_init__``."""
    for name, value in fields.items():
        object.__setattr__(instance, name, value)


def digest(value: object) -> str:
    """Hex sha256 of a value's content: arrays by dtype, shape and bytes; dataclasses by field name and content.

    Two equal values have the same digest in every process and on every platform of the same byte order.
    """
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: object) -> None:
    if isinstance(value, np.ndarray):
        sha.update(f"array:{value.dtype.str}:{value.shape};".encode())
        sha.update(np.ascontiguousarray(value).data)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        sha.update(f"{type(value).__name__}(".encode())
        for field in dataclasses.fields(value):
            sha.update(f"{field.name}=".encode())
            _feed(sha, getattr(value, field.name))
        sha.update(b")")
    elif isinstance(value, tuple | list):
        sha.update(b"[")
        for item in value:
            _feed(sha, item)
            sha.update(b",")
        sha.update(b"]")
    elif isinstance(value, dict):
        _feed(sha, sorted(value.items()))
    else:
        sha.update(f"{value!r};".encode())


def replaced(instance: Value, **changes: object) -> Value:
    """Copy a frozen dataclass with some fields changed; the constructor checks the result again."""
    return dataclasses.replace(instance, **changes)  # type: ignore[type-var]
