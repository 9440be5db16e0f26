"""What is wrong with a placement file: its rules checked on raw values, before they are known to be a placement.

An :class:`Inspection` takes the values as the file holds them and collects every :class:`Fault`, so that a broken
file is told all at once, each fault with what the serving stack itself would make of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moeplace.model import ModelSpec

Level = Literal["error", "warning"]
TOLERATED = ("duplicate", "unknown-key")  # what does not keep a placement from being read, unless a stack says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a placement file is written, read or checked for; None: unknown.

    Attributes
    ----------
    model
        The model it is of: its experts, and which of its layers have them.
    num_gpus
        GPUs (expert-parallel ranks).
    num_redundant
        Slots beyond the experts, per layer over all GPUs, that the server is told of.
    """

    model: ModelSpec | None = None
    num_gpus: int | None = None
    num_redundant: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Who reads a format, and what becomes of broken files.

    Attributes
    ----------
    name
        The stack and its version.
    consequences
        Kind of fault → what the stack makes of it, a sentence.
    tolerated
        Kinds of faults of which a placement can be read all the same.
    even
        Whether every GPU holds as many experts, in every layer.
    """

    name: str
    consequences: Mapping[str, str] = field(default_factory=dict)
    tolerated: tuple[str, ...] = TOLERATED
    even: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One rule that a file breaks.

    Attributes
    ----------
    level
        ``error``: the file must not be used; ``warning``: something could not be checked, or is odd.
    kind
        Name of the rule, stable across versions.
    what, rule
        What is wrong, with the first place and how many there are; and the rule.
    consequence
        What the stack does with such a file; empty where nothing is known.
    """

    level: Level
    kind: str
    what: str
    rule: str = ""
    consequence: str = ""

    def __str__(self) -> str:
        rule = f" (rule: {self.rule})" if self.rule else ""
        return f"{self.what}{rule}{'. ' if self.consequence else ''}{self.consequence}"


class Inspection:
    """Collects the faults of one file, and what of it is well-formed.

    Attributes
    ----------
    faults
        What was found so far.
    slots
        ``[layer][GPU][slot]`` expert ids once they are known to be integers; None before, or where they are not.
    layer_ids
        The model's own number of each layer, or 0, 1, … where the model is unknown.
    num_experts
        Experts per layer: the model's, else the highest id and one.
    details
        What else the file tells of itself.
    """

    def __init__(self, stack: Stack, target: Target) -> None:
        self.stack, self.target = stack, target
        self.faults: list[Fault] = []
        self.slots: list[list[list[int]]] | None = None
        self.layer_ids: tuple[int, ...] = ()
        self.num_experts = target.model.num_experts if target.model else 0
        self.details: dict[str, Any] = {}
        self.cut = True

    @property
    def errors(self) -> list[Fault]:
        """The faults that forbid using the file."""
        return [fault for fault in self.faults if fault.level == "error"]

    def shape(self) -> str:
        """``61 layers of 288 slots, 256 experts, 9 on each of 32 GPUs``, of what could be read."""
        if not self.slots:
            return f"{len(self.layer_ids)} layers"
        widths = sorted({sum(map(len, layer)) for layer in self.slots})
        told = f"{len(self.slots)} layers of {' to '.join(map(str, dict.fromkeys((widths[0], widths[-1]))))} slots, "
        told += f"{self.num_experts} experts"
        if not self.cut:
            return told
        sizes = sorted({len(gpu) for layer in self.slots for gpu in layer})
        each = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
        return f"{told}, {each} on each of {len(self.slots[0])} GPUs"

    def say(self, kind: str, what: str, rule: str = "", *, level: Level = "error") -> None:
        """Add a fault; the stack knows its consequence."""
        consequence = self.stack.consequences.get(kind, "")
        self.faults.append(Fault(level=level, kind=kind, what=what, rule=rule, consequence=consequence))

    def keys(self, given: Iterable[Any], known: Sequence[str], required: Sequence[str], *, strict: bool) -> bool:
        """Check the keys of an object; False where a required one is missing.

        ``strict``: the stack refuses keys it does not know; others ignore them.
        """
        names = [str(key) for key in given]
        if strict and (extra := [name for name in names if name not in known]):
            self.say("unknown-key", f"keys {', '.join(map(repr, extra))}", f"no keys but {', '.join(known)}")
        lacking = [name for name in required if name not in names]
        if lacking:
            self.say("missing-key", f"no {' and no '.join(lacking)}", f"needed: {', '.join(required)}")
        return not lacking

    def number(self, document: Mapping[Any, Any], key: str, *, low: int = 0) -> int | None:
        """Return an integer of an object; None, with a fault, where it is none or below ``low``."""
        value = document.get(key)
        if type(value) is int and value >= low:
            return value
        self.say("type", f"{key} is {shown(value)}", f"an integer of at least {low}")
        return None

    def flat(self, rows: Sequence[Any], names: Sequence[str]) -> None:
        """Check rows ``[layer][slot]``, slot p on GPU p // (slots per GPU), and cut them by GPU."""
        if not self._typed(rows, names):
            return
        widths = [len(row) for row in rows]
        width = usual(widths)
        self._widths(widths, width, names)
        gpus = self.target.num_gpus
        if gpus is None:
            self.say("unchecked", "the number of GPUs is unknown: copies per GPU are not checked", level="warning")
            gpus, self.cut = 1, False
        elif width % gpus:
            rule = "every GPU has as many slots"
            self.say("indivisible", f"{width} slots per layer on {gpus} GPUs", rule)
            gpus, self.cut = 1, False
        share = max(1, -(-width // gpus))
        self.cells([[row[i : i + share] for i in range(0, len(row), share)] for row in rows], names)

    def nested(self, layers: Sequence[Any], names: Sequence[str]) -> None:
        """Check lists ``[layer][GPU][slot]``."""
        for name, layer in zip(names, layers, strict=True):
            if not isinstance(layer, list):
                self.say("type", f"{name} is {shown(layer)}", "a list of GPUs")
                return
            if not self._typed(layer, [f"{name}, GPU {g}" for g in range(len(layer))]):
                return
        gpus = self.target.num_gpus or usual([len(layer) for layer in layers])
        wrong = [(name, len(layer)) for name, layer in zip(names, layers, strict=True) if len(layer) != gpus]
        if wrong:
            self.say("gpu-count", f"{wrong[0][0]} has {wrong[0][1]} GPUs{_more(len(wrong))}", f"{gpus} GPUs")
        if self.stack.even:
            for name, layer in zip(names, layers, strict=True):
                sizes = sorted({len(gpu) for gpu in layer})
                if len(sizes) > 1:
                    self.say("uneven", f"{name} has GPUs of {sizes[0]} to {sizes[-1]} slots", "as many on each GPU")
                    break
            totals = [sum(map(len, layer)) for layer in layers]
            self._widths(totals, usual(totals), names)
        self.cells(layers, names)

    def cells(self, layers: Sequence[Sequence[Sequence[int]]], names: Sequence[str]) -> None:
        """Check ids, coverage and copies of ``[layer][GPU][slot]`` integers, and keep them."""
        highest = max((expert for layer in layers for gpu in layer for expert in gpu), default=-1)
        if not self.target.model:
            self.num_experts = highest + 1
            told = f"the model is unknown: layers are not checked, experts only up to {highest}, the highest there is"
            self.say("unchecked", told, level="warning")
        experts = range(self.num_experts)
        negative, beyond, missing, twice = [], [], [], []
        for name, layer in zip(names, layers, strict=True):
            seen = {expert for gpu in layer for expert in gpu}
            if not seen.issubset(experts):
                negative += [f"expert {expert} in {name}" for expert in sorted(seen) if expert < 0]
                beyond += [f"expert {expert} in {name}" for expert in sorted(seen) if expert >= len(experts)]
            if len(seen) < len(experts) or not seen.issuperset(experts):
                missing += [f"{name} lacks expert {expert}" for expert in experts if expert not in seen]
            for g, gpu in enumerate(layer if self.cut else ()):
                if len(set(gpu)) < len(gpu):
                    copies = Counter(gpu)
                    twice += [f"{name} has expert {e} {n} times on GPU {g}" for e, n in copies.items() if n > 1]
        last = self.num_experts - 1
        for kind, places, rule in (
            ("negative", negative, f"ids lie in 0..{last}, and no slot is empty"),
            ("range", beyond, f"ids lie in 0..{last}"),
            ("missing", missing, "every expert of every layer is in a slot"),
            ("duplicate", twice, "copies of an expert sit on distinct GPUs"),
        ):
            if places:
                self.say(kind, places[0] + _more(len(places)), rule)
        self.slots = [[list(gpu) for gpu in layer] for layer in layers]

    def _typed(self, rows: Sequence[Any], names: Sequence[str]) -> bool:
        for name, row in zip(names, rows, strict=True):
            if not isinstance(row, list):
                self.say("type", f"{name} is {shown(row)}", "a list of expert ids")
                return False
            for slot, expert in enumerate(row):
                if type(expert) is not int or abs(expert) >= 2**31:
                    self.say("type", f"{name}, slot {slot}: {shown(expert)}", "expert ids are integers")
                    return False
        return True

    def _widths(self, widths: Sequence[int], width: int, names: Sequence[str]) -> None:
        wrong = [(name, size) for name, size in zip(names, widths, strict=True) if size != width]
        if wrong:
            told = f"{wrong[0][0]} has {wrong[0][1]} slots, most have {width}{_more(len(wrong))}"
            self.say("ragged", told, "every layer has as many slots")
        model, spare = self.target.model, self.target.num_redundant
        if model and width < model.num_experts:
            self.say("width", f"{width} slots for {model.num_experts} experts", "at least a slot for each expert")
        elif model and spare is not None and width != model.num_experts + spare:
            told = f"{width} slots for {model.num_experts} experts and {spare} redundant ones"
            self.say("width", told, f"{model.num_experts + spare} slots per layer")


def usual(values: Sequence[int]) -> int:
    """The most frequent value, the largest of those; 0 of none."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value), default=0)


def shown(value: Any) -> str:
    """A value as an error shows it: short, with its type where that is what is wrong."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '…'}"


def _more(count: int) -> str:
    return f" ({count} such in all)" if count > 1 else ""
