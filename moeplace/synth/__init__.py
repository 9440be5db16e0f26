"""Synthetic traces of any model, calibrated: skew, affinity, domains, drift and phases come out as asked for.

Requests of equal length follow one another; each belongs to a domain and prefers some topics, each of its tokens has
one topic that lasts through the layers. Five knobs set how strong all this is, and a short deterministic search turns
them until :mod:`moeplace.insight`'s measures give what was asked for on a pilot sample.

What it is not: real. It has the statistics of published traces, one at a time, not their text.
"""

from moeplace.synth.calibrate import synthesise as synthesise
from moeplace.synth.spec import SynthSpec as SynthSpec
from moeplace.synth.stream import SyntheticTrace as SyntheticTrace
