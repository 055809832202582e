"""Which heads, neurons and layers stay: arithmetic on scores alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.compress.plan import stay

Scores = NDArray[np.float64]  # of one layer's heads or neurons
Indices = NDArray[Any]


def kept(
    scores: Sequence[Scores], ranking: str, amount: float | None, exact: int | None, multiple: int
) -> list[Indices]:
    """For each layer, what stays, in its old order. Each keeps `multiple` at least, and a multiple of it.

    global: layers are cut into groups of `multiple`, the best together, and the best groups of the whole model stay.
    """
    there = [len(layer) for layer in scores]
    if ranking == "uniform":
        left = [stay([count], amount, exact, multiple) for count in there]
    else:
        left = _global(scores, stay(there, amount, exact, multiple), multiple)
    return [best(layer, count) for layer, count in zip(scores, left, strict=True)]


def best(scores: Scores, count: int) -> Indices:
    """The `count` highest, in rising order of their indices; of equals, the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _global(scores: Sequence[Scores], total: int, multiple: int) -> list[int]:
    groups = []
    for number, layer in enumerate(scores):
        ordered = np.sort(layer)[::-1]
        groups += [
            (float(ordered[start : start + multiple].sum()), number, start // multiple)
            for start in range(multiple, len(layer) // multiple * multiple, multiple)
        ]
    free = total // multiple - len(scores)  # each layer's best group stays without a contest
    chosen = sorted(groups, key=lambda group: (-group[0], group[2], group[1]))[:free]
    left = [multiple] * len(scores)
    for _, number, _ in chosen:
        left[number] += multiple
    return left
