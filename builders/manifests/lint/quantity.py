"""Kubernetes quantities: `500m`, `1.5Gi`, `2e3`.

Grammar and suffixes: kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

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


def canonical(text: object) -> str:
    """A quantity as the API server writes it back: `1024Mi` is `1Gi`, `125000` is `125k`, `0.5` is `500m`.

    What is written otherwise differs from what the server holds, and a second manager's apply of it is a conflict.
    An exponent (`2e3`) is written with a unit. Raises ValueError when it is no quantity.
    """
    value = parse_quantity(text)
    if value is None:
        raise ValueError(f"{text!r} is no quantity")
    whole = value == value.to_integral_value()
    if str(text).endswith(tuple(_BINARY)) and whole and abs(value) >= 1024:
        return _largest(value, {"": Decimal(1), **_BINARY})
    return _largest(value, {"": Decimal(1), **_DECIMAL})


def _largest(value: Decimal, units: dict[str, Decimal]) -> str:
    """With the largest unit that leaves a whole number; the smallest unit rounds up, as the server does."""
    if not value:
        return "0"
    fitting = [(size, unit) for unit, size in units.items() if value / size == (value / size).to_integral_value()]
    size, unit = max(fitting) if fitting else min((size, unit) for unit, size in units.items())
    return f"{(value / size).to_integral_value(ROUND_CEILING):f}{unit}"
