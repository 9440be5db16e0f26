"""Copies of experts packed onto GPUs for the least load of the busiest.

By EPLB's rules, by exchanges and kicks from there, and exactly where a layer is small.
"""

from __future__ import annotations

from moeplace.packing.configurations import configuration_floor
from moeplace.packing.exact import exact_layer
from moeplace.packing.kernel import pack_layers

__all__ = ["configuration_floor", "exact_layer", "pack_layers"]
