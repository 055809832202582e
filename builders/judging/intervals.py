"""How far a figure may be trusted: intervals by the bootstrap, and the words that they allow.

A figure of held-out texts, or of pairs, is one draw: others would have given another. The texts are drawn again with
replacement, many times, and the middle 95 % of what these draws give is the interval (Efron's percentile method). Two
models are compared on the same draws, so that hard texts are hard for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.record import Record

DRAWS, SEED = 1000, 0
_TAIL = 2.5  # percent on each side

Verdict = Literal["better", "worse", "no difference shown"]
Indices = NDArray[np.int64]


class ConfidenceInterval(Record):
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"

    def against(self, neutral: float, more_is_better: bool = True) -> Verdict:
        """A word about the figure, only where the whole interval lies on one side of `neutral`."""
        if self.low <= neutral <= self.high or not (self.low <= self.high):
            return "no difference shown"
        return "better" if (self.low > neutral) == more_is_better else "worse"


def draws(count: int, number: int = DRAWS) -> Indices:
    """[number, count] indices under `count`, the same each time."""
    return np.random.default_rng(SEED).integers(0, count, (number, count))


def of_figure(count: int, figure: Callable[[Indices], float], number: int = DRAWS) -> ConfidenceInterval:
    """Of anything that is computed from some of `count` texts, given by their indices."""
    return _middle(np.array([figure(chosen) for chosen in draws(count, number)]))


def of_mean(values: Sequence[float] | NDArray[Any]) -> ConfidenceInterval:
    found = np.asarray(values, np.float64)
    return _middle(found[draws(len(found))].mean(axis=1))


def of_difference(
    reference: Sequence[float] | NDArray[Any], candidate: Sequence[float] | NDArray[Any]
) -> ConfidenceInterval:
    """Of the mean of `candidate` less that of `reference`; both of the same texts in the same order."""
    return of_mean(np.asarray(candidate, np.float64) - np.asarray(reference, np.float64))


def of_ratio(
    reference: Sequence[float] | NDArray[Any], candidate: Sequence[float] | NDArray[Any]
) -> ConfidenceInterval:
    """Of the mean of `candidate` over that of `reference`, positive figures of the same texts in the same order."""
    chosen = draws(len(reference))
    below, above = (np.asarray(values, np.float64)[chosen].mean(axis=1) for values in (reference, candidate))
    return _middle(above / np.maximum(below, 1e-30))


def of_median(rounds: Sequence[float]) -> ConfidenceInterval:
    """From the least to the greatest of at least six rounds. The median lies outside with a chance of 2 / 2^rounds at
    most, which is 3 % for six: no assumption about how times are spread."""
    if len(rounds) < MEDIAN_ROUNDS:
        raise ValueError(f"{len(rounds)} rounds, of {MEDIAN_ROUNDS} that an interval needs")
    return ConfidenceInterval(low=min(rounds), high=max(rounds))


MEDIAN_ROUNDS = 6


def _middle(found: NDArray[Any]) -> ConfidenceInterval:
    low, high = np.percentile(found, [_TAIL, 100 - _TAIL])
    return ConfidenceInterval(low=float(low), high=float(high))
