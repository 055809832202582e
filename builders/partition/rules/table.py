"""Which rule an operator has."""

from __future__ import annotations

from builders.partition.rules import compute, shape
from builders.partition.rules.op import Rule


def rule_for(op_type: str) -> Rule | None:
    """The rule of an operator, or None: such an operator is replicated."""
    return shape.RULES.get(op_type) or compute.RULES.get(op_type)
