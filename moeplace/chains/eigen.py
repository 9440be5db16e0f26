"""Eigenvectors of symmetric matrices in single precision, several at once in threads, and the parts above 0.

NumPy and SciPy either hold the interpreter's lock during LAPACK's routine or take twice its time; SciPy publishes the
routines themselves for compiled code, and a foreign call releases the lock.

Where a matrix changes little from one call to the next and few of its eigenvalues are positive, their space is followed
by subspace iteration with a Chebyshev filter (Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219, 2006).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

ARGUMENTS = 11
FOLLOWED_FROM = 200  # rows; smaller matrices are decomposed as soon
DEGREE = 3  # of the filter
MOST_FOLLOWED = 40  # calls after which the whole matrix is decomposed again
MOST_SHARE = 0.5  # of the rows, that may be followed
MARGIN = 1.3  # room below the least eigenvalue
EDGE = 0.9  # of the least eigenvalue that was followed


Singles = npt.NDArray[np.float32]


def eigh(matrix: Singles) -> tuple[Singles, Singles]:
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


class PositivePart:
    """The positive semidefinite part of a matrix that changes from call to call: its nearest one in the cone."""

    def __init__(self) -> None:
        self._basis: Singles | None = None
        self._age = 0
        self._low = self._edge = self._top = 0.0

    def of(self, matrix: Singles) -> Singles:
        """Return the part of ``matrix`` ``[n, n]`` above 0, as near as single precision and the filter have it.

        Complexity: O(n³), and O(n²·r) where the space of the ``r`` positive eigenvalues of the last call is followed.
        """
        size, basis = len(matrix), self._basis
        if size < FOLLOWED_FROM or basis is None or self._age >= MOST_FOLLOWED or basis.shape[1] > MOST_SHARE * size:
            return self._decomposed(matrix)
        part = self._followed(matrix, basis)
        return self._decomposed(matrix) if part is None else part

    def _decomposed(self, matrix: Singles) -> Singles:
        values, vectors = eigh(matrix)
        self._age, self._low, self._top = 0, MARGIN * min(float(values[0]), 0.0), float(values[-1])
        self._keep(values, vectors)
        above = values > 0
        if 2 * above.sum() <= len(values):
            return _composed(values[above], vectors[:, above])
        return matrix - _composed(values[~above], vectors[:, ~above])

    def _followed(self, matrix: Singles, basis: Singles) -> Singles | None:
        """Filter the space of the last call and return its part; None where it is too small or not independent."""
        filtered = self._filtered(matrix, basis)
        filtered /= np.linalg.norm(filtered, axis=0)
        try:
            root = np.linalg.cholesky((filtered.T @ filtered).astype(np.float64))
        except np.linalg.LinAlgError:
            return None
        own: Singles = filtered @ np.linalg.inv(root).T.astype(np.float32)
        small: Singles = own.T @ (matrix @ own)
        values, turn = eigh(np.float32(0.5) * (small + small.T))
        if values[0] > 0 or not np.isfinite(values).all():
            return None
        vectors = own @ turn
        self._age, self._top = self._age + 1, float(values[-1])
        self._keep(values, vectors)
        above = values > 0
        return _composed(values[above], vectors[:, above])

    def _filtered(self, matrix: Singles, basis: Singles) -> Singles:
        """Raise what lies above the edge against what lies between the least eigenvalue and it."""
        half, centre = (self._edge - self._low) / 2, (self._edge + self._low) / 2
        first = half / (self._top - centre)
        scale = first
        shift, before = np.float32(centre), basis
        now: Singles = (matrix @ basis - shift * basis) * np.float32(scale / half)
        for _ in range(DEGREE - 1):
            following = 1 / (2 / first - scale)
            after: Singles = (matrix @ now - shift * now) * np.float32(2 * following / half)
            after -= np.float32(scale * following) * before
            before, now, scale = now, after, following
        return now

    def _keep(self, values: Singles, vectors: Singles) -> None:
        """Keep the positive eigenvalues' vectors and some below."""
        positive = int((values > 0).sum())
        count = min(len(values), positive + positive // 4 + 8)
        self._basis = np.ascontiguousarray(vectors[:, -count:])
        edge = EDGE * float(values[-count])
        self._edge = edge if edge > self._low else self._low / 2


def _composed(values: Singles, vectors: Singles) -> Singles:
    """Return the matrix of some eigenvalues and their vectors."""
    return np.asarray((vectors * values) @ vectors.T, np.float32)


@functools.cache
def load_routine() -> Callable[..., Any]:
    """Load LAPACK's routine; what limits the threads of libraries acts on those that are loaded."""
    from numba.extending import get_cython_function_address

    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * ARGUMENTS)
    return kind(get_cython_function_address("scipy.linalg.cython_lapack", "ssyevd"))
