"""How far a figure of one run may be trusted: 95 % intervals by a bootstrap over the seconds of the run.

Seconds that follow each other are alike (a queue that is full stays full), so blocks of them are drawn, not single
seconds, and each draw is figured out as the whole run is. What differs between one run and the next beyond that, such
as a neighbour on the machine, no single run can show.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from loadtest.seen.figures import Counted, Figures, figures_of, merged
from loadtest.seen.recording import Cell
from runtime.record import Record

RESAMPLES = 300
LEAST_BLOCKS, MOST_BLOCKS = 5, 40
TAIL, NORMAL = 0.025, 1.96


class Interval(Record):
    """None at an end: a failed request, which is later than any answer."""

    low: float | None
    high: float | None

    def overlaps(self, other: Interval) -> bool:
        return self._low <= other._high and other._low <= self._high

    @property
    def _low(self) -> float:
        return math.inf if self.low is None else self.low

    @property
    def _high(self) -> float:
        return math.inf if self.high is None else self.high


Block = tuple[Cell, float]  # and the seconds that it was recorded in


def blocks_of(cells: Mapping[int, Cell], keys: Sequence[int], width_s: int) -> list[Block]:
    """Neighbouring intervals of the clock: few long blocks rather than many that depend on each other."""
    size = max(1, min(round(math.sqrt(len(keys))), len(keys) // LEAST_BLOCKS), math.ceil(len(keys) / MOST_BLOCKS))
    parts = [keys[at : at + size] for at in range(0, len(keys), size)]
    return [(merged(cells[key] for key in part if key in cells), len(part) * width_s) for part in parts]


def widening(strata: Sequence[Sequence[Block]]) -> float:
    """How much wider than its resamples an interval must be, because the blocks are few: Student's t over the normal
    quantile (Cornish-Fisher), and the resamples' variance is short by one block of each stratum.
    """
    blocks = sum(len(stratum) for stratum in strata)
    free = max(1, blocks - len(strata))
    student = NORMAL + (NORMAL**3 + NORMAL) / (4 * free)
    student += (5 * NORMAL**5 + 16 * NORMAL**3 + 3 * NORMAL) / (96 * free**2)
    return student / NORMAL * math.sqrt(blocks / free)


def resampled(strata: Sequence[Sequence[Block]], counted: Counted) -> list[Figures]:
    """Figures of runs that might have been; each stratum (a plateau of the load) keeps its share. Empty: too short."""
    if sum(len(blocks) for blocks in strata) < LEAST_BLOCKS:
        return []
    dice, found = random.Random(0), []
    for _ in range(RESAMPLES):
        drawn = [block for blocks in strata if blocks for block in dice.choices(blocks, k=len(blocks))]
        found.append(figures_of([cell for cell, _ in drawn], sum(seconds for _, seconds in drawn), counted))
    return found


def interval_of(value: float, resampled: Sequence[float], wider: float) -> Interval:
    """About `value`, by its values in resampled runs; infinite: a failed request."""
    ordered = sorted(resampled)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (TAIL, 1 - TAIL))
    if math.isfinite(value):
        low, high = max(0.0, value - wider * max(0.0, value - low)), value + wider * max(0.0, high - value)
    return Interval(low=None if low == math.inf else low, high=None if high == math.inf else high)
