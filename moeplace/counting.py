"""Counting kernels: how often experts and pairs of experts are chosen, exactly, in int64.

Two implementations of the same counts: NumPy for traces that take under about a second, and compiled loops, cached on
disk and run on several threads, for longer ones. They are tested against each other and against a brute-force loop.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

COMPILE_FROM_VISITS = 1_000_000
COMPILE_FROM_PAIRS = 100_000_000  # about a second of NumPy; compiling takes about as long, once per machine

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(slots=True)
class Tables:
    """Running counts: ``load`` [L, E], ``transition`` [L-1, E, E], ``together`` [L, E, E] (unordered pairs)."""

    load: npt.NDArray[np.int64]
    transition: npt.NDArray[np.int64]
    together: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int) -> Tables:
        """Return empty tables for a model of that shape."""
        square = (num_experts, num_experts)
        return cls(
            np.zeros((num_layers, num_experts), np.int64),
            np.zeros((max(0, num_layers - 1), *square), np.int64),
            np.zeros((num_layers, *square), np.int64),
        )


class PairCounter:
    """Adds blocks of tokens to :class:`Tables`, switching to compiled loops once the work is large.

    Complexity: O(tokens · layers · k²) time, O(layers · experts²) memory, whatever the length of the trace.
    """

    def __init__(self, num_layers: int, num_experts: int, *, threads: int = 1, compiled: bool | None = None) -> None:
        self.tables = Tables.zeros(num_layers, num_experts)
        self._threads = max(1, min(threads, num_layers))
        self._compiled = compiled
        self._pairs_seen = 0

    def add(self, experts: Ids) -> None:
        """Count the tokens of ``experts`` [token, layer, k]."""
        tokens, layers, top_k = experts.shape
        self._pairs_seen += tokens * layers * top_k * top_k
        compiled = self._pairs_seen > COMPILE_FROM_PAIRS if self._compiled is None else self._compiled
        count = _compiled_loop() if compiled else count_layers_numpy
        by_layer = np.ascontiguousarray(np.moveaxis(experts, 1, 0))
        edges = np.linspace(0, layers, self._threads + 1).astype(int)
        spans = [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
        if self._threads == 1:
            count(by_layer, *self._arrays(), *spans[0])
            return
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda span: count(by_layer, *self._arrays(), *span), spans))

    def _arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self.tables.load, self.tables.transition, self.tables.together


def count_layers_numpy(
    by_layer: Ids,
    load: npt.NDArray[np.int64],
    transition: npt.NDArray[np.int64],
    together: npt.NDArray[np.int64],
    *span: int,
) -> None:
    """Add layers ``span[0]`` to ``span[1]-1`` of ``by_layer`` [layer, token, k] to the tables, by histograms."""
    num_experts = load.shape[1]
    square = num_experts * num_experts
    top_k = by_layer.shape[2]
    left, right = np.triu_indices(top_k, 1)
    for layer in range(*span):
        ids = by_layer[layer].astype(np.int64)
        load[layer] += np.bincount(ids.ravel(), minlength=num_experts)
        pairs = (ids[:, left] * num_experts + ids[:, right]).ravel()
        together[layer] += np.bincount(pairs, minlength=square).reshape(num_experts, num_experts)
        if layer + 1 < by_layer.shape[0]:
            following = by_layer[layer + 1].astype(np.int64)
            pairs = (ids[:, :, None] * num_experts + following[:, None, :]).ravel()
            transition[layer] += np.bincount(pairs, minlength=square).reshape(num_experts, num_experts)


def _count_layers_loop(
    by_layer: Any, load: Any, transition: Any, together: Any, first: int, last: int
) -> None:  # pragma: no cover - compiled
    num_layers, tokens, top_k = by_layer.shape
    # counts of one layer and block in 32 bits stay in the processor's cache, those of all layers do not
    pairs = np.zeros(together.shape[1:], np.uint32)
    for layer in range(first, last):
        for token in range(tokens):
            for i in range(top_k):
                a = by_layer[layer, token, i]
                load[layer, a] += 1
                for j in range(i + 1, top_k):
                    pairs[a, by_layer[layer, token, j]] += 1
        together[layer] += pairs
        pairs[:] = 0
        if layer + 1 < num_layers:
            for token in range(tokens):
                for i in range(top_k):
                    a = by_layer[layer, token, i]
                    for j in range(top_k):
                        pairs[a, by_layer[layer + 1, token, j]] += 1
            transition[layer] += pairs
            pairs[:] = 0


def count_visits(
    source: npt.NDArray[np.int64],
    place: npt.NDArray[Any],
    shape: tuple[int, int],
    *,
    distinct: bool,
    compiled: bool | None = None,
) -> npt.NDArray[np.int64]:
    """Count how often tokens of each source visit each place.

    Parameters
    ----------
    source
        ``[token]`` source of each token, below ``shape[0]``.
    place
        ``[token, k]`` places it visits, below ``shape[1]``.
    shape
        Sources and places of the result.
    distinct
        Count a place once per token, however often it stands among its ``k``.
    compiled
        Use the compiled loop; default: from a million visits on.

    Returns
    -------
    array
        ``[source, place]`` int64. Complexity: O(tokens · k²), O(tokens · k) if not ``distinct``.
    """
    if place.size > COMPILE_FROM_VISITS if compiled is None else compiled:
        table = np.zeros(shape, np.int64)
        _compiled_visits()(source, place, table, distinct)
        return table
    flat = source[:, None] * shape[1] + place
    chosen = flat[first_visits(place)] if distinct else flat.ravel()
    return np.bincount(chosen, minlength=shape[0] * shape[1]).reshape(shape)


def first_visits(place: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """``[token, k]`` True where a place appears for the first time among a token's ``k``.

    Complexity: O(tokens · k²), vectorised.
    """
    first = np.ones(place.shape, bool)
    for j in range(1, place.shape[1]):
        for i in range(j):
            first[:, j] &= place[:, j] != place[:, i]
    return first


def _count_visits_loop(source: Any, place: Any, table: Any, distinct: bool) -> None:  # pragma: no cover - compiled
    tokens, top_k = place.shape
    for token in range(tokens):
        for j in range(top_k):
            new = True
            if distinct:
                for i in range(j):
                    new = new and place[token, i] != place[token, j]
            if new:
                table[source[token], place[token, j]] += 1


@functools.cache
def _compiled_visits() -> Callable[..., None]:
    return compile_kernel(_count_visits_loop)


@functools.cache
def _compiled_loop() -> Callable[..., None]:
    return compile_kernel(_count_layers_loop)


def compile_kernel(function: Callable[..., Any], *helpers: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop with Numba, without the interpreter lock, cached in the platform's cache folder.

    ``helpers`` are functions of the same module that it calls by name; each may call those after it.
    """
    import numba
    from platformdirs import user_cache_dir

    numba.config.CACHE_DIR = numba.config.CACHE_DIR or user_cache_dir("moeplace")
    known: dict[str, Any] = {}
    for helper in reversed(helpers):
        # helpers are called from compiled code alone: without wrappers they compile in a fifth less time
        plain = numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
        known[helper.__name__] = plain(_with_globals(helper, known))
    whole = _with_globals(function, known)
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True)(whole)
    except RuntimeError:  # no folder to keep it in: compile anew in every process
        compiled = numba.njit(nogil=True)(whole)
    return compiled


def _with_globals(function: Callable[..., Any], known: dict[str, Any]) -> Callable[..., Any]:
    """Return the function with some of its module's names meaning something else."""
    if not known:
        return function
    code, names = getattr(function, "__code__"), getattr(function, "__globals__")  # noqa: B009 # typed as Callable
    changed = types.FunctionType(code, {**names, **known}, function.__name__, function.__defaults__)
    changed.__module__, changed.__qualname__ = function.__module__, function.__qualname__
    return changed
