"""How placements pass through each operator: one small pure function each.

A rule is told that one slot of a node is cut (`slot`, `shard`) and answers with the placement of every slot that
follows, its own included; or None where it must wait for others; or raises Illegal where the operator cannot work on
slices. Slots number inputs 0, 1, …; outputs are `out(0)`, `out(1)`, …
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from builders.partition.placement import Placement, Shard
from builders.partition.read import shape_of

Assignment = Mapping[int, Placement]


class Illegal(Exception):
    """This split cannot be: a finding of the search, not a fault. The text says which operator is in the way."""


def out(index: int) -> int:
    return -1 - index


OUT = out(0)


@dataclass(frozen=True)
class Op:
    """A node, the ranks, and what is known of its slots so far.

    `share_copies`: ranks may outnumber heads where these repeat fewer key and value heads.
    """

    node: ir.Node
    ranks: int
    known: Mapping[int, Placement]
    constant: frozenset[int]  # slots that depend on no graph input
    share_copies: bool = False

    def value(self, slot: int) -> ir.Value | None:
        values = self.node.outputs if slot < 0 else self.node.inputs
        index = -1 - slot if slot < 0 else slot
        return values[index] if index < len(values) else None

    def has(self, slot: int) -> bool:
        value = self.value(slot)
        return value is not None and (slot >= 0 or value.name != "")

    def shape(self, slot: int) -> tuple[int | str, ...]:
        value = self.value(slot)
        shape = shape_of(value) if value is not None else None
        if shape is None:
            raise Illegal(f"{self.name}: the shape of slot {slot} is unknown")
        return shape

    def size(self, slot: int, dim: int) -> int:
        size = self.shape(slot)[dim]
        if not isinstance(size, int):
            raise Illegal(f"{self.name}: dimension {dim} of slot {slot} is dynamic")
        return size

    def attribute(self, name: str, default: Any) -> Any:
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    @property
    def inputs(self) -> list[int]:
        return [slot for slot, value in enumerate(self.node.inputs) if value is not None]

    @property
    def name(self) -> str:
        return f"{self.node.op_type} {self.node.name or self.node.outputs[0].name}"

    def illegal(self, reason: str) -> Illegal:
        return Illegal(f"{self.name} {reason}")

    def plain(self, shard: Shard) -> None:
        """Most rules do not know shards with copies."""
        if shard.copies is not None:
            raise self.illegal("has no rule for repeated heads")


Rule = Callable[[Op, int, Shard], "Assignment | None"]
