"""What is known of a server's health, for whoever asks: is it ready, does its launcher live."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from runtime.server.probing import Failure

READY_WITHIN_S = 15.0  # a few intervals of the supervisor's probe, each with its timeout
LIVE_WITHIN_S = 240.0  # going back to a version loads every model again, and may take a minute for each


class Health:
    """What the launcher knows, read by many threads. Times are of the monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._served = float("-inf")
        self._turned = self._clock()
        self._failure: Failure | None = Failure("starting")
        self._draining = False
        self._door: str | None = None

    def observed(self, failure: Failure | None) -> None:
        """The result of a probe; None is a success. That there is one shows that the loop turns.

        A full queue refuses the probe too. Were the pod taken out for it, its load would fall on the others, one by
        one: a server that works on other requests serves.
        """
        with self._lock:
            self._turned = self._clock()
            self._failure = failure
            if failure is None or failure.moving:
                self._served = self._turned

    def turned(self) -> None:
        """The launcher's loop is alive."""
        with self._lock:
            self._turned = self._clock()

    def restarting(self, reason: str) -> None:
        """The server has been ended and is not back yet."""
        with self._lock:
            self._served = float("-inf")
            self._failure = Failure(f"restarting: {reason}")

    def drain(self) -> None:
        """From here on never ready again."""
        with self._lock:
            self._draining = True

    def ready(self) -> str | None:
        """None when ready, else the reason."""
        with self._lock:
            if self._failure is not None and self._failure.wrong:
                return self._failure.reason  # at once, and still while it drains: no answer of it may be used
            if self._draining:
                return "draining"
            if self._clock() - self._served <= READY_WITHIN_S:
                return None
            return self._failure.reason if self._failure else "no inference has succeeded lately"

    def closed(self) -> bool:
        """Whether no answer of the server may be used: it starts, and is not proven yet, or was found wrong."""
        with self._lock:
            return self._served == float("-inf") or (self._failure is not None and self._failure.wrong)

    def door(self, reason: str | None) -> None:
        """Why the gateway before the server does not answer; None when it does."""
        with self._lock:
            self._door = reason

    def reachable(self) -> str | None:
        """None when the server is ready and its gateway answers, else the reason."""
        reason = self.ready()
        with self._lock:
            return self._door if reason is None else reason

    def live(self) -> str | None:
        """None when alive, else the reason."""
        with self._lock:
            age = self._clock() - self._turned
        return None if age <= LIVE_WITHIN_S else f"the supervisor has not turned for {age:.0f} s"
