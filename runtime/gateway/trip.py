"""What a request brings along that is no handler's concern: its trace, and which version it goes to."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

_TRACE = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Taken(Protocol):
    """The version that a request went to."""

    version: int

    def left(self) -> None:
        """It has ended, whether it was asked or not."""

    def ended(self, status: int, seconds: float, pinned: bool) -> None: ...

    def rated(self, score: float) -> None: ...


@dataclass
class Trip:
    """`id`: the request's. `pinned`: the version that was asked for, empty for any; `lane`: the one that was taken,
    once there is one; `inferred`: it was asked for more than what it is. `salt`: whose prompts these are, empty where
    nobody is told from others. `started`, and `answered` when its answer began, 0 before: by the monotonic clock.
    `tokens_in`, `tokens_out`: that a model read and made for it, None where no model told."""

    id: str = ""
    trace: str = ""
    pinned: str = ""
    lane: Taken | None = None
    inferred: bool = False
    salt: str = ""
    heard: list[tuple[str, str]] | None = None  # prompts and answers, where they are to be sampled
    started: float = field(default_factory=time.monotonic)
    answered: float = 0.0
    tokens_in: int | None = None
    tokens_out: int | None = None
    span: Any = None  # OpenTelemetry's, where spans are sent

    def answers(self) -> None:
        """Its answer begins, or goes on."""
        self.answered = self.answered or time.monotonic()

    def spent(self, read: int, made: int | None = None) -> None:
        """Tokens, of one of the things that were asked for it."""
        self.tokens_in = (self.tokens_in or 0) + read
        if made is not None:
            self.tokens_out = (self.tokens_out or 0) + made

    def ended(self, status: int, seconds: float) -> None:
        if self.lane is None:
            return
        self.lane.left()
        if self.inferred:
            self.lane.ended(status, seconds, bool(self.pinned))

    @property
    def trace_line(self) -> bytes:
        """A line of an HTTP head, or nothing."""
        return b"traceparent: %s\r\n" % self.trace.encode() if self.trace else b""


NO_TRIP = Trip()  # of what nobody asked for; nothing is written into it
TRIP: ContextVar[Trip] = ContextVar("trip", default=NO_TRIP)


def read_trace(header: str) -> str:
    """W3C's traceparent; empty for one that is none, which W3C says to go on without."""
    return header if _TRACE.fullmatch(header) else ""


def as_one_text(texts: Sequence[str]) -> str:
    """Of what is heard: several, of a request with several prompts or choices, are a list in JSON."""
    return texts[0] if len(texts) == 1 else orjson.dumps(texts).decode()
