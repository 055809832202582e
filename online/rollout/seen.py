"""What the door counted, by version. Counters only grow, unless the door was started again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from online.rollout.policy import Metric
from runtime.record import Record

SCORES = 11  # a rating from 0 to 1 counts in tenths
Counts = NDArray[np.float64]

# How bad a request of each bin is, from 0 to 1.
BADNESS: dict[Metric, Counts] = {
    Metric.ERRORS: np.array([0.0, 1.0]),
    Metric.SLOW: np.array([0.0, 1.0]),
    Metric.QUALITY: 1 - np.arange(SCORES) / (SCORES - 1),
}


class VersionCounters(Record):
    requests: int = Field(default=0, ge=0)
    errors: int = Field(default=0, ge=0)
    slow: int = Field(default=0, ge=0)
    scores: tuple[int, ...] = (0,) * SCORES  # rated requests by tenths of the score

    @model_validator(mode="after")
    def _adds_up(self) -> VersionCounters:
        if max(self.errors, self.slow) > self.requests:
            raise ValueError("more requests failed or were slow than there were")
        if len(self.scores) != SCORES or min(self.scores) < 0:
            raise ValueError(f"scores are {SCORES} counts")
        return self

    def since(self, before: VersionCounters) -> VersionCounters | None:
        """None when a counter went back: the door was started again, and what it did between is unknown."""
        scores = tuple(now - then for now, then in zip(self.scores, before.scores, strict=True))
        delta = (self.requests - before.requests, self.errors - before.errors, self.slow - before.slow)
        if min(*delta, *scores) < 0 or max(delta[1:]) > delta[0]:
            return None
        return VersionCounters(requests=delta[0], errors=delta[1], slow=delta[2], scores=scores)

    def bins(self, metric: Metric) -> Counts:
        """Requests in each bin of `BADNESS`."""
        if metric is Metric.QUALITY:
            return np.array(self.scores, float)
        bad = self.errors if metric is Metric.ERRORS else self.slow
        return np.array([self.requests - bad, bad], float)
