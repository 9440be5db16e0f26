"""Time a rank spends in its experts: grouped GEMMs bound by weight bytes or by arithmetic.

``T_r = t0 + max( Σ_{e: n_e>0} 3·h·f·w_b / (η_m·BW),  Σ_e ⌈n_e/τ⌉·τ·6·h·f / (η_c·F) )`` with ``n_e`` rows of expert
``e`` on the rank, ``h`` hidden width, ``f`` expert inner width, ``w_b`` bytes per weight, ``BW`` memory bandwidth,
``F`` arithmetic rate and ``τ`` the tile height (64 rows in decode, 128 in prefill). Decode is bound by the first term,
which counts *distinct activated experts*, so copies can hurt; prefill by the second. Shared experts run on every rank.

``η_c`` is a kernel's as much as an accelerator's: the presets have DeepGEMM's in fp8, while bf16 kernels on one H100
reach 0.21 to 0.82 of its peak. Experts without rows cost nothing here; masked kernels spend 0.5 to 0.9 µs on each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.frozen import Floats, replaced
from moeplace.hardware import Accelerator
from moeplace.model import ModelSpec

TILE_ROWS = {"decode": 64, "prefill": 128, "mixed": 128}
SMALL_TILES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCompute:
    """Cost constants of one model on one accelerator in one phase, all in µs.

    Attributes
    ----------
    launch_us
        Fixed time per layer.
    weight_us, row_us
        Reading one expert's weights; computing one row of it.
    shared_weight_us, shared_row_us
        The same for the shared experts, together.
    tile_rows
        Rows are computed in tiles of this height.
    """

    weight_us: float
    row_us: float
    shared_weight_us: float = 0.0
    shared_row_us: float = 0.0
    tile_rows: int = 64
    launch_us: float = 20.0

    @classmethod
    def of(cls, model: ModelSpec, accelerator: Accelerator, phase: str) -> ExpertCompute:
        """Derive the constants from a model and an accelerator."""
        bytes_per_us = accelerator.hbm_efficiency * accelerator.hbm_tb_per_s * 1e6
        # narrower formats (MXFP4) are widened to 16 bits before the product
        fp8 = model.weight_bytes == 1 and accelerator.fp8_tflops is not None
        tflops = accelerator.fp8_tflops if fp8 and accelerator.fp8_tflops else accelerator.bf16_tflops
        flops_per_us = accelerator.gemm_efficiency * tflops * 1e6
        shared = model.hidden * model.shared_inner
        return cls(
            weight_us=model.expert_weight_bytes / bytes_per_us,
            row_us=6.0 * model.hidden * model.expert_inner / flops_per_us,
            shared_weight_us=3.0 * shared * model.weight_bytes / bytes_per_us,
            shared_row_us=6.0 * shared / flops_per_us,
            tile_rows=TILE_ROWS[phase],
            launch_us=accelerator.launch_us,
        )

    def rank_us(self, rows: npt.NDArray[Any], home_rows: npt.NDArray[Any] | float) -> Floats:
        """Time of each rank for counted rows.

        Parameters
        ----------
        rows
            ``[..., GPU, slot]`` rows of each copy.
        home_rows
            ``[..., GPU]`` tokens whose home is the rank: the rows of its shared experts.
        """
        memory = (rows > 0).sum(axis=-1) * self.weight_us + self.shared_weight_us
        tiles = -(-rows // self.tile_rows)
        arithmetic = tiles.sum(axis=-1) * (self.tile_rows * self.row_us) + self._shared_us(home_rows)
        return self.launch_us + np.maximum(memory, arithmetic)

    def _shared_us(self, home_rows: npt.NDArray[Any] | float) -> Floats:
        tiles: Floats = np.ceil(np.asarray(home_rows) / self.tile_rows)
        return tiles * (self.tile_rows * self.shared_row_us)

    def expected_copy_us(self, rows: npt.NDArray[Any]) -> tuple[Floats, Floats]:
        """Expected memory and arithmetic time of a copy that gets a Poisson number of rows with the given means.

        Both add up over the copies of a rank, which is what makes the rank's time linear for a solver.

        Returns
        -------
        tuple
            ``P(n>0)·weight_us`` and ``E⌈n/τ⌉·τ·row_us``, of the shape of ``rows``.
        """
        mean = np.asarray(rows, dtype=np.float64)
        return -np.expm1(-mean) * self.weight_us, self.expected_tiles(mean) * (self.tile_rows * self.row_us)

    def expected_tiles(self, mean: npt.NDArray[Any]) -> Floats:
        """``E⌈n/τ⌉ = Σ_{j≥0} P(n > j·τ)`` for a Poisson ``n``; ``mean/τ + (1-1/τ)/2`` from 12 tiles on.

        The second form is within 0.5 % there, and the whole grows with the mean.
        """
        from scipy.special import pdtrc

        mean = np.asarray(mean, dtype=np.float64)
        tiles: Floats = np.zeros_like(mean)
        few = mean < SMALL_TILES * self.tile_rows
        tiles[~few] = mean[~few] / self.tile_rows + (1 - 1 / self.tile_rows) / 2
        small = mean[few]
        # a Poisson number this far above its mean has no weight left in float64
        most = int(np.ceil((small.max() + 40 + 10 * np.sqrt(small.max())) / self.tile_rows)) if small.size else 0
        for j in range(most + 1):
            tiles[few] += pdtrc(j * self.tile_rows, small)
        return tiles

    def expected_rank_us(self, memory: Floats, arithmetic: Floats, home_rows: float) -> Floats:
        """Time of a rank from the sums of its copies' expected memory and arithmetic times."""
        shared = float(self._shared_us(home_rows))
        return self.launch_us + np.maximum(memory + self.shared_weight_us, arithmetic + shared)

    def replace(self, **changes: object) -> ExpertCompute:
        """Copy with some fields changed."""
        return replaced(self, **changes)
