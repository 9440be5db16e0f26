"""What a cluster is planned for: a model, and steps of any size drawn from a trace of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplace.batches import BatchLaw, Steps, TokenIndex, gather
from moeplace.errors import InputError
from moeplace.frozen import Ints, digest
from moeplace.model import ModelSpec
from moeplace.trace import DECODE, PHASES, PREFILL, Counts, Trace, TraceStream

POOL_TOKENS = 40_000  # of each phase that are kept in memory
DEFAULT_STEPS = 32
FEWEST_STEPS, MANY_GPUS = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Tokens to draw steps from, and what a request looks like.

    Attributes
    ----------
    model
        The whole model; the trace may hold only some of its MoE layers.
    decode, prefill
        Pools of tokens; None where the trace has none of a phase.
    context
        Tokens in the cache of a request that decodes, on average.
    prompt
        Tokens of a prompt.
    trace_digest
        Digest of the pools' content.
    steps, seed
        Steps drawn for each deployment, and the seed.
    """

    model: ModelSpec
    decode: Trace | None
    prefill: Trace | None
    context: float
    prompt: int
    trace_digest: str
    steps: int = DEFAULT_STEPS
    seed: int = 0

    @property
    def layer_scale(self) -> float:
        """MoE layers of the model over those of the trace: the others are taken to be like them."""
        pool = self.decode or self.prefill
        return 1.0 if pool is None else self.model.num_moe_layers / pool.meta.num_layers

    def steps_for(self, gpus: int) -> int:
        """Steps to draw for a deployment: fewer beyond 64 GPUs, where each has many tokens and costs GPUs²."""
        return min(self.steps, max(FEWEST_STEPS, self.steps * MANY_GPUS**2 // gpus**2))

    def decode_steps(self, requests: int, gpus: int = 1) -> Steps:
        """Draw decode steps of one token of each request."""
        law = BatchLaw(phase="decode", requests=requests, batches=self.steps_for(gpus), seed=self.seed)
        return _drawn(self.decode, law)

    def prefill_steps(self, prompts: int) -> Steps:
        """Draw steps in which every one of some prompts is computed as a whole."""
        batches = max(4, self.steps_for(prompts) // 4)
        law = BatchLaw(phase="prefill", requests=prompts, tokens=self.prompt, batches=batches, seed=self.seed)
        return _drawn(self.prefill or self.decode, law)


def _drawn(pool: Trace | None, law: BatchLaw) -> Steps:
    """Steps whose requests are distinct as far as the pool's go; beyond that, one stands for several.

    Each request gives tokens at uniformly drawn positions (a prompt: consecutive ones, from its start again where it
    ends), so that a step may be larger than the trace.
    """
    if pool is None:
        raise InputError("the trace has no decode tokens", hint="plan needs the tokens of requests that generate")
    rng = np.random.default_rng(law.seed)
    order = np.lexsort((pool.position, pool.request))
    _, first, length = np.unique(pool.request[order], return_index=True, return_counts=True)
    rows = np.empty((law.batches, law.requests, law.tokens), np.int64)
    for batch in range(law.batches):
        chosen = _requests(rng, len(first), law.requests)
        start = rng.integers(0, length[chosen])
        place = (start[:, None] + np.arange(law.tokens)) % length[chosen][:, None]
        rows[batch] = order[first[chosen][:, None] + place]
    return Steps(trace=pool, rows=rows.reshape(law.batches, -1), law=law)


def _requests(rng: np.random.Generator, known: int, wanted: int) -> Ints:
    rounds = [rng.permutation(known) for _ in range(-(-wanted // known))]
    return np.concatenate(rounds)[:wanted]


def make_workload(
    source: TraceStream | Counts,
    model: ModelSpec,
    *,
    context: float | None = None,
    prompt: int | None = None,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
) -> Workload:
    """Read the tokens that steps are drawn from.

    Parameters
    ----------
    source
        The part of a trace that deployments are judged on.
    model
        The model; it must have the experts and top-k of the trace, and at least its MoE layers.
    context, prompt
        Default: the mean position of the trace's decode tokens, and the median of its prompts.
    steps, seed
        Steps to draw for each deployment, and the seed.

    Raises
    ------
    InputError
        Counts, which do not tell which tokens make a step; a trace without decode tokens; a model of another shape.
    """
    if isinstance(source, Counts):
        raise InputError("counts", rule="plan draws steps of any size from tokens", hint="record a per-token trace")
    meta = source.meta
    if (model.num_experts, model.top_k) != (meta.num_experts, meta.top_k) or model.num_moe_layers < meta.num_layers:
        raise InputError(
            f"the trace has {meta.num_layers} layers of {meta.num_experts} experts, top-{meta.top_k}; {model.name} has "
            f"{model.num_moe_layers} of {model.num_experts}, top-{model.top_k}",
            rule="trace and model agree",
            hint="is --model the one the trace was recorded on?",
        )
    index = TokenIndex.of(source)
    pools = {phase: _pool(source, index, phase, seed) for phase in (DECODE, PREFILL)}
    decode, prefill = pools[DECODE], pools[PREFILL]
    if decode is None:
        raise InputError("the trace has no decode tokens", hint="plan needs the tokens of requests that generate")
    lengths = index.by_request(PHASES[PREFILL]).length
    usual = int(np.median(lengths)) if len(lengths) else 1
    return Workload(
        model=model,
        decode=decode,
        prefill=prefill,
        context=float(decode.position.mean() + 1) if context is None else float(context),
        prompt=prompt or max(1, usual),
        trace_digest=digest((decode.digest(), None if prefill is None else prefill.digest())),
        steps=steps,
        seed=seed,
    )


def _pool(source: TraceStream, index: TokenIndex, phase: int, seed: int) -> Trace | None:
    """Whole requests of one phase, drawn until the pool is full."""
    known = index.by_request(PHASES[phase])
    if not len(known.length):
        return None
    order = np.random.default_rng(seed).permutation(len(known.length))
    upto = int(np.searchsorted(np.cumsum(known.length[order]), POOL_TOKENS)) + 1
    chosen = np.sort(order[:upto])
    numbers = np.concatenate([known.rows[known.first[i] : known.first[i] + known.length[i]] for i in chosen])
    return gather(source, numbers)[0]
