"""Groups of given sizes that keep co-activated experts together: grown one expert at a time, then exchanged."""

from __future__ import annotations

import numpy as np

from moeplace.frozen import Floats, Ints


def grown(affinity: Floats, sizes: Ints) -> Ints:
    """``[expert]`` groups of ``sizes`` [group], filled one after another.

    A group begins with the free expert of most affinity to the other free ones, and takes the free expert of most
    affinity to its members until it is full. Complexity: O(experts²).
    """
    own = affinity.astype(np.float64)
    np.fill_diagonal(own, 0.0)
    label = np.full(len(own), -1, np.int64)
    for group, size in enumerate(sizes):
        pull = own[:, label < 0].sum(axis=1)
        for place in range(int(size)):
            expert = int(np.where(label < 0, pull, -1.0).argmax())
            label[expert] = group
            pull = own[expert].copy() if place == 0 else pull + own[expert]
    return label


def exchanged(affinity: Floats, label: Ints) -> Ints:
    """``[expert]`` the same groups after the exchange of two experts that keeps most affinity, again and again.

    Ends where no exchange keeps more. Complexity: O(experts²) for each exchange.
    """
    own = affinity.astype(np.float64)
    np.fill_diagonal(own, 0.0)
    label = label.copy()
    expert = np.arange(len(own))
    while True:
        pull = own @ (label[:, None] == np.arange(label.max() + 1)[None, :])
        stays = pull[expert, label]
        moves = pull[:, label]  # [expert, other]: pull of the other's group
        gain = moves + moves.T - stays[:, None] - stays[None, :] - 2 * own
        gain[label[:, None] == label[None, :]] = 0.0
        best = int(gain.argmax())
        one, other = divmod(best, len(own))
        if gain[one, other] <= 1e-9 * max(1.0, float(own.max())):
            return label
        label[one], label[other] = label[other], label[one]
