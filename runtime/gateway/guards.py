"""Who may come in, and how much of them: keys, rates, requests at once, bytes that are held."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from runtime.gateway.keys import Keys
from runtime.gateway.limits import DoorLimits
from runtime.gateway.refused import Refused

_MOST_BUCKETS = 4096  # callers without a key are addresses, of which there are many


@dataclass(eq=False)
class _Timed:
    due: float
    task: asyncio.Task[Any]
    late: bool = False


class Guards:
    """`keys` None: everybody may come in, and each address is a caller. Used by one thread."""

    def __init__(self, limits: DoorLimits, keys: Keys | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._keys, self._clock = limits, keys, clock
        self.running: Counter[str] = Counter()
        self.bytes = 0
        self._timed: dict[_Timed, None] = {}  # in the order in which they began
        self._next_look = 0.0  # by the event loop's clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when

    def replace_keys(self, keys: Keys | None) -> None:
        """Requests that run go on."""
        self._keys = keys

    def caller(self, authorization: bytes, address: str) -> str:
        """Raises Refused for a key that is nobody's."""
        if self._keys is None:
            return address
        name = self._keys.name(authorization)
        if name is None:
            said = "no such API key" if authorization else "an API key is needed: send Authorization: Bearer KEY"
            raise Refused(401, said, close=True, code="invalid_api_key")
        return name

    def salt(self, caller: str) -> str:
        """Of the caller's prompts in the model's cache. Addresses without keys are nobody's in particular."""
        return "" if self._keys is None else caller

    @contextmanager
    def admitted(self, caller: str) -> Iterator[None]:
        """One request of the caller. Raises Refused when it, or everybody together, has too many."""
        self._take_of_rate(caller)
        if self.running.total() >= self.limits.requests:
            raise Refused(429, "too many requests are running; try again later", close=True)
        if self.running[caller] >= self.limits.requests_per_key:
            most = self.limits.requests_per_key
            raise Refused(429, f"{most} requests of this caller are running; try again later", close=True)
        self.running[caller] += 1
        try:
            yield
        finally:
            self.running[caller] -= 1
            if not self.running[caller]:
                del self.running[caller]

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """What is done in it, by this task, may take as long as an answer may. Raises TimeoutError at the end of that.
        All have the same time, so whoever began first is late first, and one timer does for all."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        cancelled, own = task.cancelling(), _Timed(loop.time() + self.limits.answer_s, task)
        self._timed[own] = None
        if self._next_look <= loop.time():
            self._look_at(own.due, loop)
        try:
            yield
        except asyncio.CancelledError as error:
            if own.late and task.uncancel() <= cancelled:
                raise TimeoutError from error
            raise
        finally:
            del self._timed[own]

    def _look_at(self, when: float, loop: asyncio.AbstractEventLoop) -> None:
        self._next_look = when
        loop.call_at(when, self._end_late, loop)

    def _end_late(self, loop: asyncio.AbstractEventLoop) -> None:
        for one in self._timed:
            if one.due > loop.time():
                self._look_at(one.due, loop)
                return
            if not one.late:
                one.late = True
                one.task.cancel()

    def _take_of_rate(self, caller: str) -> None:
        rate = self.limits.rate_per_key
        if rate is None:
            return
        now, most = self._clock(), max(rate, 1.0)
        left, when = self._buckets.pop(caller, (most, now))
        left = min(most, left + (now - when) * rate)
        self._buckets[caller] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)
        if left < 1:
            raise Refused(429, f"more than {rate:g} requests a second of this caller; try again later", close=True)

    def hold(self, size: int) -> None:
        """Bytes that are about to be held, until `release`. Raises Refused when all together hold too many."""
        if self.bytes + size > self.limits.bytes_in_flight:
            raise Refused(429, "too many bytes are being received; try again later", close=True)
        self.bytes += size

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        self.hold(size)
        try:
            yield
        finally:
            self.release(size)

    def release(self, size: int) -> None:
        self.bytes -= size
