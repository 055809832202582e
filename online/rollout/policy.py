"""What a user decides about rollouts."""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise

from pydantic import Field, model_validator

from runtime.record import Record


class Metric(StrEnum):
    ERRORS = "errors"  # requests that failed
    SLOW = "slow"  # requests over the latency SLO
    QUALITY = "quality"  # 1 - score of rated requests


class RolloutPolicy(Record):
    """`alpha` bounds both mistakes, each over the whole rollout and however often it is looked at: rolling back a
    version that is no worse, and promoting one that is worse by a margin."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    margins: dict[Metric, float] = Field(default={Metric.ERRORS: 0.01, Metric.SLOW: 0.02})  # of means; the watched
    shares: tuple[float, ...] = (0.01, 0.1, 0.5)  # of the traffic; then all of it
    mirrored_requests: int = Field(default=200, ge=1)
    step_requests: int = Field(default=50, ge=1)  # at the new version before the share grows
    soak_requests: int = Field(default=500, ge=1)  # with all of the traffic, before it is promoted
    most_requests: int = Field(default=200_000, ge=1)  # of both versions; then it is rolled back for want of evidence
    most_s: float = Field(default=86_400.0, gt=0)

    @model_validator(mode="after")
    def _makes_sense(self) -> RolloutPolicy:
        if not self.margins:
            raise ValueError("margins names no metric: nothing would be watched")
        if any(not 0 < margin < 1 for margin in self.margins.values()):
            raise ValueError("a margin lies between 0 and 1")
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise ValueError("shares lie between 0 and 1; the last step, all of the traffic, is not named")
        if any(later <= earlier for earlier, later in pairwise(self.shares)):
            raise ValueError("shares grow from step to step")
        return self

    @property
    def steps(self) -> tuple[float, ...]:
        return (*self.shares, 1.0)
