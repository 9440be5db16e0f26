"""Copies of one layer's tokens as a hypergraph to be partitioned: experts are vertices, token patterns are hyperedges.

Under dispatch–combine a token costs one copy on every GPU that holds some of its experts, and each layer is a problem
of its own: partition its experts into sets of given sizes, within a load cap, so that tokens touch few sets.
"""

from __future__ import annotations

from moeplace.hypergraph.layer import Effort, Found, Layer, LayerSearch
from moeplace.hypergraph.patterns import Patterns
from moeplace.hypergraph.relaxation import default_steps
from moeplace.hypergraph.split import split_nodes

__all__ = ["Effort", "Found", "Layer", "LayerSearch", "Patterns", "default_steps", "split_nodes"]
