"""The joint problem as an integer programme: every copy of every expert of all layers together.

One file per objective adds its sums to the decision (:mod:`moeplace.joint.decision`); for small instances, which are
solved to proof by any backend of :mod:`moeplace.milp`. Where nothing joins the layers, each is a programme of its own.
"""

from __future__ import annotations

from moeplace.joint.layers import solve_jointly
from moeplace.joint.run import num_terms

__all__ = ["num_terms", "solve_jointly"]
