"""The time that an answer may take. All have the same, so whoever began first is late first: one timer does for all,
where `asyncio.timeout` would set one for each request."""

from __future__ import annotations

import asyncio
from typing import Any


class AnswerTimes:
    """Used by one thread, on the event loop."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running: dict[InTime, None] = {}  # in the order in which they began
        self._next_look = 0.0  # by the event loop's clock

    def look_at(self, when: float, now: float, loop: asyncio.AbstractEventLoop) -> None:
        """Then, unless it is done earlier."""
        if self._next_look <= now:
            self._next_look = when
            loop.call_at(when, self._end_late, loop)

    def _end_late(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self._next_look = 0.0
        for one in self.running:
            if one.due > now:
                self.look_at(one.due, now, loop)
                return
            one.end()


class InTime:
    """What is done in it, by this task, has that time. Raises TimeoutError at its end."""

    def __init__(self, times: AnswerTimes) -> None:
        self._times, self._late = times, False

    def __enter__(self) -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        now = loop.time()
        self._task: asyncio.Task[Any] = task
        self._cancelled, self.due = task.cancelling(), now + self._times.seconds
        self._times.running[self] = None
        self._times.look_at(self.due, now, loop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        del self._times.running[self]
        if self._late and self._task.uncancel() <= self._cancelled and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def end(self) -> None:
        if not self._late:
            self._late = True
            self._task.cancel()
