"""A synthetic trace as a stream: whole requests are drawn cell by cell, each cell with a generator of its own."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moeplace.errors import InputError
from moeplace.frozen import Floats, Ints
from moeplace.model import ModelSpec
from moeplace.parts import CHUNK_TOKENS
from moeplace.synth.routers import Knobs, LayerRouter, LayerTaste, num_topics
from moeplace.synth.spec import Reached, SynthSpec
from moeplace.trace import BLOCK_BYTES, DECODE, PREFILL, Trace, TraceMeta, concatenate, id_dtype

CELL_TOKENS = 4096  # a cell is the fewest whole requests with this many tokens; blocks are cut from cells
TOPIC_SWITCH = 0.05  # chance that a token's topic changes between layers
REQUEST_TASTE = 0.7  # standard deviation of a request's own log preference for topics


@dataclass(frozen=True, kw_only=True)
class SyntheticTrace:
    """A synthetic trace, drawn anew each time it is walked; its first tokens do not depend on its length.

    Attributes
    ----------
    model, spec, num_tokens, seed
        What it is a trace of.
    knobs
        What calibration found.
    reached
        What the pilot sample measured with them.
    block_tokens, threads
        Tokens per block (0: about 8 MB of ids) and threads; the tokens do not depend on them.
    """

    model: ModelSpec
    spec: SynthSpec
    num_tokens: int
    seed: int
    knobs: Knobs
    reached: Reached | None = None
    block_tokens: int = 0
    threads: int = 1
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        numbers = {
            "tokens": (self.num_tokens, 1),
            "seed": (self.seed, 0),
            "block tokens": (self.block_tokens, 0),
            "threads": (self.threads, 1),
        }
        for name, (value, low) in numbers.items():
            if value < low:
                raise InputError(f"{name} {value}", rule=f"at least {low}")
        meta = TraceMeta(
            num_experts=self.model.num_experts,
            top_k=self.model.top_k,
            layer_ids=self.model.moe_layer_ids,
            model_id=self.model.name,
            domains=tuple(f"domain{number}" for number in range(self.spec.domains)),
            assumptions=(f"synthetic routing in the shape of {self.model.name}, seed {self.seed}",),
        )
        object.__setattr__(self, "meta", meta)

    def replace(self, **changes: Any) -> SyntheticTrace:
        """Copy with other block sizes or threads (or anything else, which is then not calibrated)."""
        return dataclasses.replace(self, **changes)

    def blocks(self) -> Iterator[Trace]:
        """Yield the tokens in blocks. Complexity: O(tokens·layers·k²) time, O(states·layers·experts) memory."""
        item = np.dtype(id_dtype(self.model.num_experts)).itemsize
        size = self.block_tokens or max(1, BLOCK_BYTES // (self.model.num_moe_layers * self.model.top_k * item))
        pending: list[Trace] = []
        held, left = 0, self.num_tokens
        for tokens in self._cells():
            part = tokens if tokens.num_tokens <= left else tokens.take(np.arange(left))
            left -= part.num_tokens
            pending, held = [*pending, part], held + part.num_tokens
            while held >= size or (held and not left):
                joined = concatenate(pending, self.meta)
                yield joined.take(np.arange(min(size, held)))
                pending, held = [joined.take(np.arange(min(size, held), held))], max(0, held - size)

    def _cells(self) -> Iterator[Trace]:
        """Draw the cells in order, on several threads, a few ahead of what is taken."""
        count = -(-self.num_tokens // (self._cell_requests * self.spec.request_tokens))
        _ = self._routers, self._plane  # built once, before threads ask for them
        with ThreadPoolExecutor(self.threads) as pool:
            ahead = deque(pool.submit(self._cell, cell) for cell in range(min(count, self.threads + 1)))
            for cell in range(len(ahead), count + len(ahead)):
                tokens = ahead.popleft().result()
                if cell < count:
                    ahead.append(pool.submit(self._cell, cell))
                yield tokens

    @property
    def _cell_requests(self) -> int:
        return -(-CELL_TOKENS // self.spec.request_tokens)

    @cached_property
    def _routers(self) -> list[LayerRouter]:
        return [
            LayerTaste.draw(self.model, self.spec.domains, self.seed, layer).router(
                self.knobs, self.model, self.spec.hot
            )
            for layer in range(self.model.num_moe_layers)
        ]

    @cached_property
    def _plane(self) -> Floats:
        """``[2, topic]`` two tastes, orthogonal, of mean 0 and mean square 1, between which the mix of topics turns."""
        drawn = np.random.default_rng([self.seed, 3]).standard_normal((3, num_topics(self.model)))
        drawn[0] = 1
        basis = np.linalg.qr(drawn.T)[0].T
        return basis[1:] * np.sqrt(basis.shape[1])

    def _cell(self, number: int) -> Trace:
        """Draw one cell of whole requests, with a generator of its own."""
        rng = np.random.default_rng([self.seed, 2, number])
        count, length = self._cell_requests, self.spec.request_tokens
        request = number * count + np.arange(count)
        domain = rng.permutation(request % self.spec.domains)
        mix = self._topic_mix(request * length / CHUNK_TOKENS, rng)
        row = np.repeat(np.arange(count), length)
        tokens = number * count * length + np.arange(len(row))
        position = np.tile(np.arange(length), count)
        phase = np.where(position < round(self.spec.prompt_share * length), PREFILL, DECODE)
        base = (phase * self.spec.domains + domain[row]) * num_topics(self.model)
        topic = _drawn(mix, row, rng)
        experts = np.empty((len(row), self.model.num_moe_layers, self.model.top_k), id_dtype(self.model.num_experts))
        for layer, router in enumerate(self._routers):
            if layer:
                changes = np.flatnonzero(rng.random(len(row), np.float32) < TOPIC_SWITCH)
                topic[changes] = _drawn(mix, row[changes], rng)
            salt = (self.seed * self.model.num_moe_layers + layer) * 2
            experts[:, layer] = router.choose(base + topic, self.model.top_k, tokens, salt)
        return Trace(
            meta=self.meta,
            experts=experts,
            request=request[row],
            position=position,
            phase=phase,
            domain=domain[row],
        )

    def _topic_mix(self, time: Floats, rng: np.random.Generator) -> Floats:
        """``[request, topic]`` cumulative probability of topics, at times counted in chunks.

        The mix turns by a right angle per chunk: consecutive chunks are always equally far apart, and over a turn all
        topics come to the same.
        """
        angle = time[:, None] * (np.pi / 2)
        place = np.cos(angle) * self._plane[0] + np.sin(angle) * self._plane[1]
        # each taste is met by its opposite, so that chunks of different requests differ by little but the turn
        half = rng.standard_normal((-(-len(time) // 2), place.shape[1]))
        taste = rng.permutation(np.concatenate([half, -half])[: len(time)])
        logit = self.knobs.wander * place + REQUEST_TASTE * taste
        mix = np.cumsum(np.exp(logit - logit.max(axis=1, keepdims=True)), axis=1)
        return mix / mix[:, -1:]


def _drawn(mix: Floats, row: Ints, rng: np.random.Generator) -> Ints:
    """``[token]`` topics drawn from the cumulative mix of each token's request."""
    return (rng.random(len(row))[:, None] > mix[row, :-1]).sum(axis=1)
