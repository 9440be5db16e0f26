"""Which copy of an expert serves a token: one choice, for compute and communication alike.

* ``even``: every copy serves the same share, dealt by a hash of the token.
* ``weighted``: shares in proportion to 1/load of the copies' GPUs as the profile predicts it (weighted round-robin).
* ``nearest``: the copies that are the fewest links away from the token's home, evenly.
* ``topology-aware``: the same GPU, else the same node, else all (on direct networks the fewest hops), weighted within:
  TAR of GRACE-MoE (arXiv 2509.25041), with its load prediction.
* ``lp-static``: shares that make the busiest GPU of the profile as little loaded as possible (:mod:`moeplace.balance`).
* ``fewest-gpus``: a token visits as few GPUs as the copies of its experts allow, and decides between equals by weights
  of GPUs that even out loads of a profile's tokens (:mod:`moeplace.fanout`).
* ``lp``: the same for every step by itself, as LPLB and SGLang's ``--ep-dispatch-algorithm lp`` do online.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.balance import least_busy_split
from moeplace.errors import unknown_name
from moeplace.fanout import choose_copies, distinct_patterns, expected_shares, learn_weights
from moeplace.fingerprint import hashed
from moeplace.frozen import Floats, Ints
from moeplace.placement import EMPTY, Placement
from moeplace.topology import Topology

EVEN, WEIGHTED, NEAREST, TOPOLOGY_AWARE, LP_STATIC, LP, FEWEST = (
    "even",
    "weighted",
    "nearest",
    "topology-aware",
    "lp-static",
    "lp",
    "fewest-gpus",
)
STEP = np.uint64(0x9E3779B97F4A7C15)  # multiples of it spread evenly over 64 bits
POLICIES = (EVEN, WEIGHTED, NEAREST, TOPOLOGY_AWARE, LP_STATIC, LP, FEWEST)
BY_PROFILE = (WEIGHTED, TOPOLOGY_AWARE, LP_STATIC, FEWEST)  # policies that go by loads known beforehand


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTable:
    """Slots of every copy of every expert.

    Attributes
    ----------
    slot
        ``[layer, expert, copy]`` slot number within the layer (GPU · slots per GPU + slot), copies in slot order,
        repeated from the first where an expert has fewer copies than the widest.
    count
        ``[layer, expert]`` number of copies.
    slots_per_gpu
        Slots of each GPU, empty ones included: ``slot // slots_per_gpu`` is the GPU.
    """

    slot: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]
    slots_per_gpu: int

    @classmethod
    def of(cls, placement: Placement) -> ReplicaTable:
        """Index a placement. Complexity: O(layers · slots)."""
        count = placement.replicas()
        layers, experts = count.shape
        width = int(count.max())
        flat = placement.slots.reshape(layers, -1)
        table = np.zeros((layers, experts, width), np.int64)
        for layer in range(layers):
            used = np.flatnonzero(flat[layer] != EMPTY)
            order = used[np.argsort(flat[layer][used], kind="stable")]
            starts = np.cumsum(count[layer]) - count[layer]
            table[layer] = order[starts[:, None] + np.arange(width) % count[layer][:, None]]
        return cls(slot=table, count=count, slots_per_gpu=placement.max_slots)

    @property
    def gpu(self) -> Ints:
        """``[layer, expert, copy]`` GPU of each copy."""
        return self.slot // self.slots_per_gpu

    def of_layer(self, layer: int) -> tuple[Ints, Ints, Ints]:
        """``[expert, copy]`` slots and GPUs and ``[expert]`` counts of copies of one layer."""
        return self.slot[layer], self.slot[layer] // self.slots_per_gpu, self.count[layer]

    def is_copy(self) -> npt.NDArray[np.bool_]:
        """``[layer, expert, copy]`` False where a copy is only repeated."""
        return np.arange(self.slot.shape[2]) < self.count[:, :, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A policy applied to a placement.

    Attributes
    ----------
    policy
        Its name.
    table
        Where the copies are.
    upto
        ``[layer, class, expert, copy]`` share of an expert's tokens that this copy or one before it serves; 1 from the
        last copy on.
    class_of_home
        ``[GPU]`` class that tokens of this home belong to.
    weight
        ``[layer, GPU]`` weights of ``fewest-gpus``; None with other policies.
    served
        ``[layer, GPU, expert]`` shares that were counted on tokens (:meth:`measured`); None: those of ``upto``.
    """

    policy: str
    table: ReplicaTable
    upto: npt.NDArray[np.float32]
    class_of_home: Ints
    weight: Floats | None = None
    served: Floats | None = None

    @classmethod
    def of(
        cls,
        placement: Placement,
        topology: Topology,
        policy: str = EVEN,
        load: npt.NDArray[Any] | None = None,
        tokens: npt.NDArray[Any] | None = None,
    ) -> Router:
        """Apply a policy.

        Parameters
        ----------
        placement, topology
            Copies and where they are.
        policy
            One of :data:`POLICIES`.
        load
            ``[layer, expert]`` loads of a profile, from which loads of GPUs are predicted; default: all alike.
        tokens
            ``[token, layer, k]`` experts of a profile's tokens, from which ``fewest-gpus`` learns its weights and
            shares; default: weights all alike, shares even.

        Raises
        ------
        UnknownNameError
            No such policy.
        """
        if policy not in POLICIES:
            raise unknown_name("routing", policy, POLICIES)
        table = ReplicaTable.of(placement)
        expected = np.ones(table.count.shape) if load is None else np.asarray(load, np.float64)
        weight = np.where(table.is_copy(), 1.0, 0.0)[:, None]
        if policy in (WEIGHTED, TOPOLOGY_AWARE):
            weight = weight * _inverse_load(placement, table, expected)[:, None]
        if policy in (NEAREST, TOPOLOGY_AWARE):
            weight = _within_reach(table, topology, weight, policy)
        if policy in (LP_STATIC, LP):
            weight = _least_busy(table, topology.num_gpus, expected)[:, None]
        upto = np.cumsum(weight, axis=-1)
        # what rounding leaves below 1 would have no copy to go to
        upto = np.where(upto >= upto[..., -1:], 1.0, upto / upto[..., -1:])
        classes = np.arange(topology.num_gpus) if weight.shape[1] > 1 else np.zeros(topology.num_gpus, np.int64)
        router = cls(policy=policy, table=table, upto=upto.astype(np.float32), class_of_home=classes)
        if policy != FEWEST:
            return router
        layers, gpus = len(expected), topology.num_gpus
        if tokens is None or not len(tokens):
            return replace(router, weight=np.ones((layers, gpus)))
        learnt = [learn_weights(tokens[:, layer], table.of_layer(layer), gpus) for layer in range(layers)]
        return replace(router, weight=np.array(learnt)).measured(tokens)

    @property
    def per_step(self) -> bool:
        """Whether shares are made anew for every step, from its own loads; the static ones are then the profile's."""
        return self.policy == LP

    @property
    def is_joint(self) -> bool:
        """Whether the copies of a token's experts are chosen together, not each by itself."""
        return self.policy == FEWEST

    def measured(self, tokens: npt.NDArray[Any] | None) -> Router:
        """Return the router with the shares that it gives GPUs of ``tokens`` [token, layer, k] on average.

        Only where copies are chosen together: otherwise shares do not depend on tokens.
        """
        if self.weight is None or tokens is None or not len(tokens):
            return self
        shares, layers = [], len(self.weight)
        for layer, weight in enumerate(self.weight):
            patterns, count = distinct_patterns(tokens[:, layer])
            table = self.table.of_layer(layer)
            served = expected_shares(patterns, count, table, weight, times=layers)
            # an expert no token chose: evenly
            even = np.zeros(served.shape)
            np.add.at(even, (table[1], np.arange(len(table[2]))[:, None]), self.table.is_copy()[layer])
            served = np.where(served.sum(axis=0) > 0, served, even)
            shares.append(served / served.sum(axis=0))
        return replace(self, served=np.array(shares))

    def choose(
        self, layer: int, experts: npt.NDArray[Any], token: npt.NDArray[Any], home: npt.NDArray[Any]
    ) -> npt.NDArray[np.int64]:
        """Slot that serves each selection, by the static shares.

        Parameters
        ----------
        layer
            MoE layer ordinal.
        experts
            ``[token, k]`` chosen experts.
        token
            ``[token]`` token numbers; a token of a home always gets the same copy of an expert.
        home
            ``[token]`` rank whose attention holds the token.
        """
        slot = self.table.slot[layer]
        if slot.shape[1] == 1:
            return slot[experts, 0]
        return slot[experts, self.copy_of(layer, experts, token, home)]

    def copy_of(
        self, layer: int, experts: npt.NDArray[Any], token: npt.NDArray[Any], home: npt.NDArray[Any]
    ) -> npt.NDArray[np.int64]:
        """Number of the copy that serves each selection; the parameters are those of :meth:`choose`."""
        if self.weight is not None:
            return choose_copies(experts, hashed(token, layer), self.table.of_layer(layer), self.weight[layer])
        turn = turns(hashed(token, layer)[:, None], self.table.slot[layer][experts, 0])
        upto = self.upto[layer][self.class_of_home[home][:, None], experts]
        return (upto <= turn[:, :, None]).sum(axis=2)

    def gpu_share(self, num_gpus: int, home_share: npt.NDArray[Any] | None = None) -> Floats:
        """``[layer, GPU, expert]`` share of an expert's tokens that each GPU serves, by the static shares.

        ``home_share`` is ``[GPU]`` the share of tokens with that home; default: all alike.
        """
        if self.served is not None:
            return self.served
        layers, _, experts, _ = self.upto.shape
        share = np.diff(self.upto.astype(np.float64), axis=-1, prepend=0.0)
        if share.shape[1] > 1:
            weight = np.full(num_gpus, 1 / num_gpus) if home_share is None else np.asarray(home_share)
            share = np.einsum("lhec,h->lec", share, weight)
        else:
            share = share[:, 0]
        result = np.zeros((layers, num_gpus, experts))
        layer, expert = np.arange(layers)[:, None, None], np.arange(experts)[None, :, None]
        np.add.at(result, (layer, self.table.gpu, expert), share)
        return result


def turns(token_hash: npt.NDArray[np.uint64], first_slot: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return a number in [0, 1) for each selection, as good as random, the same for a token and an expert's slots.

    Offset by a copy's slot and not by its expert's number: renaming experts must not change who serves whom.
    """
    mixed = token_hash + first_slot.astype(np.uint64) * STEP
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _inverse_load(placement: Placement, table: ReplicaTable, load: Floats) -> Floats:
    """``[layer, expert, copy]`` 1/load of the copy's GPU, were all copies to share evenly."""
    on_gpu = placement.gpu_load(load)
    on_gpu = np.maximum(on_gpu, 1e-9 * on_gpu.max(axis=1, keepdims=True))
    return 1 / on_gpu[np.arange(len(on_gpu))[:, None, None], table.gpu]


def _within_reach(table: ReplicaTable, topology: Topology, weight: Floats, policy: str) -> Floats:
    """``[layer, home, expert, copy]`` weights of the copies that are nearest to each home, 0 for the others."""
    hops = topology.hops()
    away = np.moveaxis(hops[:, table.gpu], 0, 1)
    away = np.where(table.is_copy()[:, None], away, away.max() + 1)
    if policy == TOPOLOGY_AWARE and not topology.is_direct:
        away = np.minimum(away, 2)
    return np.where(away == away.min(axis=-1, keepdims=True), weight, 0.0)


def _least_busy(table: ReplicaTable, num_gpus: int, load: Floats) -> Floats:
    """``[layer, expert, copy]`` shares that make the busiest GPU as little loaded as possible."""
    shares = []
    for layer in range(len(load)):
        split, _ = least_busy_split(load[layer][None], table.gpu[layer], table.count[layer], num_gpus)
        even = table.is_copy()[layer] / table.count[layer][:, None]
        total = split[0].sum(axis=1, keepdims=True)
        shares.append(np.where(total > 0, split[0] / np.maximum(total, 1e-300), even))
    return np.stack(shares)
