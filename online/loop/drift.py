"""Has the data moved: a Page-Hinkley test on how unusual what is new is to the champion: its losses, or the distance of
a vector from the mean of those that it knows. Page, 1954, "Continuous inspection
schemes"; Hinkley, 1971."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from online.loop.records import DriftState

# In spreads of what the champion knows. What is harder by less than TOLERATED is no drift. Of
# rows that are no harder, about one series in a hundred comes to ALARM within 10,000 rows, even where losses are as
# skewed as exponential ones; rows that are harder by one spread come to it within some 35. One row is no drift.
TOLERATED = 0.3
ALARM = 25.0
_MOST = 6.0


def known(losses: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and spread of losses on a hold-out."""
    return float(losses.mean()), max(float(losses.std(ddof=1)), 1e-6)


def watched(state: DriftState, losses: Iterable[float], mean: float, spread: float, scored_to: int) -> DriftState:
    """After these losses, in their order. One that is no number counts as very hard."""
    count, total, lowest, average = state.count, state.sum, state.lowest, state.mean
    for loss in losses:
        above = min((loss - mean) / spread, _MOST) if math.isfinite(loss) else _MOST
        count += 1
        average += (above - average) / count
        total += above - TOLERATED
        lowest = min(lowest, total)
    return DriftState(count=count, mean=average, sum=total, lowest=lowest, scored_to=scored_to)


def rise(state: DriftState) -> float:
    """By how much the losses have summed up since they were lowest; ALARM or more is drift."""
    return state.sum - state.lowest
