"""Weights between two versions: a part of the way from the previous one to the updated one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from runtime.record import Record

_GRID = (1.0, 0.75, 0.5, 0.25)
_HALVINGS = 4  # of the gap between the last share that held and the first that did not: to 1/64
_NOISE = 0.002  # by which a smaller share may be measured worse than a larger one


class TriedShare(Record):
    """`bound`: how much worse another hold-out may find the worst of the old domains, as a share of its perplexity;
    `fall`: by how much the worst of what is guarded may have fallen there."""

    share: float
    bound: float
    fall: float = 0.0


class PartialStep(Record):
    """The largest share of the update that was found to hold, 0 when none did. Whatever the shape of the curve, its own
    bound was measured. `monotone`: no smaller share was measured clearly worse than a larger one; where one was, a
    larger share might hold that was not looked for."""

    share: float = Field(ge=0, le=1)
    monotone: bool
    tried: tuple[TriedShare, ...]


def blend(previous: dict[str, Any], updated: dict[str, Any], share: float) -> dict[str, Any]:
    """State dicts of one architecture. Exactly the one or the other at 0 and at 1; integers come from the update."""
    if share in (0.0, 1.0):
        return dict(updated if share else previous)
    return {
        name: value.lerp(updated[name], share) if value.is_floating_point() else updated[name]
        for name, value in previous.items()
    }


def largest_step(tried_at: Callable[[float], TriedShare], bears: Callable[[TriedShare], bool]) -> PartialStep:
    """The largest share that is borne: a coarse grid downwards, then bisection."""
    tried: dict[float, TriedShare] = {}

    def holds(share: float) -> bool:
        tried[share] = tried_at(share)
        return bears(tried[share])

    low, high = 0.0, 1.0
    for share in _GRID:
        if holds(share):
            low = share
            break
        high = share
    for _ in range(_HALVINGS if low < 1 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    seen = tuple(tried[share] for share in sorted(tried))
    monotone = _rises([item.bound for item in seen]) and _rises([item.fall for item in seen])
    return PartialStep(share=low, monotone=monotone, tried=seen)


def _rises(values: Sequence[float]) -> bool:
    return all(value >= max(values[: place + 1]) - _NOISE for place, value in enumerate(values))
