"""Time of one attention layer on a rank: it does not depend on the placement, but a step waits for it.

``T_a = t0 + max( (weights + KV cache read) / (η_m·BW), flops / (η_c·F) )``: every rank holds the whole attention
(data-parallel attention), reads the cache of the tokens that are its own, and projects and scores them in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import ProblemError
from moeplace.frozen import Floats
from moeplace.hardware import Accelerator
from moeplace.model import ModelSpec

KV_BYTES = 2  # per cached element, bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTime:
    """Cost of one attention layer of a model on an accelerator [µs].

    Attributes
    ----------
    launch_us
        Fixed time.
    weight_us, cache_us
        Reading the weights; reading what one cached token left.
    token_us, score_us
        Projecting one token; scoring it against one cached token and summing up.
    """

    launch_us: float
    weight_us: float
    cache_us: float
    token_us: float
    score_us: float

    @classmethod
    def of(cls, model: ModelSpec, accelerator: Accelerator) -> AttentionTime:
        """Derive the constants.

        Raises
        ------
        ProblemError
            Nothing is known of the model's attention.
        """
        attention = model.attention
        if attention is None:
            raise ProblemError(
                f"the attention of {model.name} is unknown",
                rule="attention time needs the number and width of the heads",
                hint="--model names a preset, or a TOML file with [attention]; or leave attention out",
            )
        bytes_per_us = accelerator.hbm_efficiency * accelerator.hbm_tb_per_s * 1e6
        flops_per_us = accelerator.gemm_efficiency * accelerator.bf16_tflops * 1e6
        parameters = attention.parameters(model.hidden)
        # latent attention scores in the latent space; a cached token is multiplied for its score and for its value
        width = 2 * attention.kv_lora_rank + attention.rope_head_dim if attention.is_latent else 2 * attention.head_dim
        return cls(
            launch_us=accelerator.launch_us,
            weight_us=parameters * min(model.weight_bytes, 2.0) / bytes_per_us,
            cache_us=attention.kv_elements * KV_BYTES / bytes_per_us,
            token_us=2.0 * parameters / flops_per_us,
            score_us=2.0 * attention.num_heads * width / flops_per_us,
        )

    def rank_us(self, tokens: npt.NDArray[Any], context: npt.NDArray[Any], cached: npt.NDArray[Any]) -> Floats:
        """Time of each rank.

        Parameters
        ----------
        tokens
            ``[..., GPU]`` tokens of a step whose home is the rank.
        context
            ``[..., GPU]`` tokens that each of them looks at, summed over them.
        cached
            ``[..., GPU]`` tokens in the caches of their requests: the tokens of one request read its cache once.
        """
        memory = self.weight_us + cached * self.cache_us
        arithmetic = tokens * self.token_us + context * self.score_us
        result: Floats = self.launch_us + np.maximum(memory, arithmetic)
        return result
