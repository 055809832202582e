"""How many users run at which moment. Pure arithmetic: the locustfile hands the answer to Locust."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant", "steps"]
DRAIN_SLACK_S = 2  # over the request timeout, for the last users to notice the end
MAX_INTERVALS = 1800  # a longer run is recorded in wider intervals, so that memory stays bounded
EARLY_DRAIN_S = 3  # for requests under way when the load is ended early: who stops a run does not want to wait for it
SETTLE_S = 2  # Locust looks at its shape once a second, so the start of a step still shows the users of the last


@dataclass(frozen=True)
class Schedule:
    """`constant`: all users from start to end. `steps`: plateaux of equal length that rise to all users.

    The warm-up runs with the users of the first plateau. After the measured window the load goes on for a moment, so
    that the window, which begins on a whole interval of the clock, ends under full load.
    """

    shape: Shape
    users: int
    warm_up_s: int
    duration_s: int
    steps: int = 1

    @property
    def plateaux(self) -> tuple[int, ...]:
        """Users of each step, rising; the last is `users`."""
        if self.shape == "constant":
            return (self.users,)
        return tuple(math.ceil(self.users * (step + 1) / self.steps) for step in range(self.steps))

    @property
    def step_s(self) -> float:
        return self.duration_s / len(self.plateaux)

    @property
    def end_s(self) -> int:
        """Seconds after the start at which users stop."""
        return self.warm_up_s + self.duration_s + interval_for(self.duration_s) + 1

    def users_at(self, elapsed_s: float) -> int:
        """Users that should run; 0 after the end."""
        if elapsed_s >= self.end_s:
            return 0
        step = math.floor(max(0.0, elapsed_s - self.warm_up_s) / self.step_s)
        return self.plateaux[min(step, len(self.plateaux) - 1)]


def interval_for(duration_s: int) -> int:
    """Seconds an interval of a run must be wide."""
    return max(1, math.ceil(duration_s / MAX_INTERVALS))
