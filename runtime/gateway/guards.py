"""Who may come in, and how much of them: keys, rates, requests at once, bytes that are held."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtime.gateway.answer_time import AnswerTimes, InTime
from runtime.gateway.keys import Keys
from runtime.gateway.limits import DoorLimits
from runtime.gateway.refused import Refused

_MOST_BUCKETS = 4096  # callers without a key are addresses, of which there are many


class Admission:
    """One request of a caller, from its beginning to its end."""

    def __init__(self, running: Counter[str], caller: str) -> None:
        self._running, self._caller = running, caller

    def __enter__(self) -> None:
        self._running[self._caller] += 1

    def __exit__(self, *exception: object) -> None:
        self._running[self._caller] -= 1
        if not self._running[self._caller]:
            del self._running[self._caller]


class Guards:
    """`keys` None: everybody may come in, and each address is a caller. Used by one thread."""

    def __init__(self, limits: DoorLimits, keys: Keys | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._keys, self._clock = limits, keys, clock
        self.running: Counter[str] = Counter()
        self.bytes = 0
        self._times = AnswerTimes(limits.answer_s)
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

    def admitted(self, caller: str) -> Admission:
        """One request of the caller. Raises Refused when it, or everybody together, has too many."""
        self._take_of_rate(caller)
        if sum(self.running.values()) >= self.limits.requests:
            raise Refused(429, "too many requests are running; try again later", close=True)
        if self.running[caller] >= self.limits.requests_per_key:
            most = self.limits.requests_per_key
            raise Refused(429, f"{most} requests of this caller are running; try again later", close=True)
        return Admission(self.running, caller)

    def in_time(self) -> InTime:
        """What is done in it may take as long as an answer may."""
        return InTime(self._times)

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
