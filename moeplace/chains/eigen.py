"""Eigenvectors of symmetric matrices in single precision, several at once in threads.

NumPy and SciPy either hold the interpreter's lock during LAPACK's routine or take twice its time; SciPy publishes the
routines themselves for compiled code, and a foreign call releases the lock.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

ARGUMENTS = 11


def eigh(matrix: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Eigenvalues ``[n]``, ascending, and eigenvectors ``[n, n]`` in columns, by divide and conquer (``ssyevd``).

    Complexity: O(n³). ``LinAlgError`` if it does not converge.
    """
    size = len(matrix)
    vectors = np.array(matrix, np.float32, order="C")
    values = np.empty(size, np.float32)
    work = np.empty(1 + 6 * size + 2 * size * size, np.float32)
    whole = np.empty(3 + 5 * size, np.int32)
    sizes = np.array([size, work.size, whole.size, 0], np.int32)
    word = sizes.itemsize
    first = sizes.ctypes.data
    job, half = ctypes.create_string_buffer(b"V"), ctypes.create_string_buffer(b"L")
    load_routine()(
        ctypes.addressof(job), ctypes.addressof(half), first, vectors.ctypes.data, first, values.ctypes.data,
        work.ctypes.data, first + word, whole.ctypes.data, first + 2 * word, first + 3 * word,
    )  # fmt: skip
    if sizes[3] != 0:
        raise np.linalg.LinAlgError("eigenvalues did not converge")
    return values, vectors.T


@functools.cache
def load_routine() -> Callable[..., Any]:
    """Load LAPACK's routine; what limits the threads of libraries acts on those that are loaded."""
    from numba.extending import get_cython_function_address

    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * ARGUMENTS)
    return kind(get_cython_function_address("scipy.linalg.cython_lapack", "ssyevd"))
