"""Which cluster, which topology, which split, at what cost per token: deployments searched, judged and priced.

A deployment is timed on steps drawn from the user's own trace, with a placement chosen for its topology, and priced by
a dated book whose every number names its source. All figures are model outputs and prices that a user may replace.
"""
