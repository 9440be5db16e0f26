"""Placements of consecutive layers chosen together, for the pairs of choices that stay on their GPU.

A state is an array ``[layer, expert]`` of GPUs. What stays is ``Σ_l Σ_{e,f} A[l,e,f]·[gpu(l,e) = gpu(l+1,f)]`` with the
transition counts ``A``. States are annealed, repaired until they keep every load cap, recombined and polished
(:mod:`moeplace.chains.climb`); :mod:`moeplace.chains.duals` and :mod:`moeplace.chains.sdp` bound what can stay.
"""

from __future__ import annotations

from moeplace.chains.climb import Climb, Work
from moeplace.chains.instance import Instance

__all__ = ["Climb", "Instance", "Work"]
