"""Kubernetes quantities: `500m`, `1.5Gi`, `2e3`.

Grammar and suffixes: kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity
"""

from __future__ import annotations

import re
from decimal import Decimal

_PATTERN = re.compile(
    r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:(Ki|Mi|Gi|Ti|Pi|Ei)|([numkMGTPE])|[eE]([+-]?[0-9]{1,3}))?"
)
_BINARY = {unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)}
_DECIMAL = {
    unit: Decimal(10) ** power
    for unit, power in {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}.items()
}


def parse_quantity(text: object) -> Decimal | None:
    """The number that a quantity stands for, in bytes or whole units; None when it is not one (`16GiB`)."""
    if isinstance(text, bool):
        return None
    match = _PATTERN.fullmatch(str(text))
    if match is None:
        return None
    number, binary, decimal, exponent = match.groups()
    value = Decimal(number)
    if binary:
        return value * _BINARY[binary]
    if decimal:
        return value * _DECIMAL[decimal]
    return value * Decimal(10) ** int(exponent or 0)
