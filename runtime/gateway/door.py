"""The ASGI application: one route table, guards before bodies, one place where errors become answers, one line of log.

Plain ASGI: Starlette's middleware of its own kind hides from a handler that its client has gone.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from runtime.errors import ServingError
from runtime.gateway.access_log import AccessLog, Logged
from runtime.gateway.counters import DoorCounters
from runtime.gateway.exchange import GONE_STATUS, VERSION_HEADER, ClientGone, Exchange, Message
from runtime.gateway.feedback import Feedback
from runtime.gateway.guards import Guards
from runtime.gateway.refused import Refused, as_refused
from runtime.gateway.spans import Spans
from runtime.gateway.trip import TRIP
from runtime.gateway.upstream import UpstreamGone

Handler = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """A handler behind the guards; `public` ones are open to whoever can connect, and hold nothing."""

    def __init__(self, handler: Handler, label: str, guards: Guards, public: bool) -> None:
        self._handler, self._label, self._guards, self._public = handler, label, guards, public

    async def __call__(self, scope: Message, receive: object, send: object) -> None:
        exchange: Exchange = scope["exchange"]
        exchange.label = self._label
        if self._public:
            await self._handler(exchange)
            return
        exchange.trip.pinned = _pinned(exchange)
        exchange.caller = self._guards.caller(exchange.headers.get(b"authorization", b""), exchange.address)
        exchange.trip.salt = self._guards.salt(exchange.caller)
        with self._guards.admitted(exchange.caller):
            async with asyncio.timeout(self._guards.limits.answer_s):
                await self._handler(exchange)


def route(path: str, method: str, handler: Handler, guards: Guards, public: bool = False) -> Route:
    return Route(path, Endpoint(handler, path, guards, public), methods=[method])


@dataclass(frozen=True)
class Witnesses:
    """Who hears of every request, over HTTP and gRPC. `spans` None: none are sent."""

    counters: DoorCounters
    log: AccessLog
    feedback: Feedback
    spans: Spans | None = None

    @contextmanager
    def counted(self, request: Logged) -> Iterator[None]:
        """A request from here to its end: it is written down with the status that it has then."""
        started = time.monotonic()
        self.counters.running += 1
        TRIP.set(request.trip)
        self.feedback.begun(request.trip)
        if self.spans is not None:
            self.spans.begun(request.trip)
        try:
            yield
        finally:
            self.counters.running -= 1
            seconds = time.monotonic() - started
            self.counters.ended(request.label, request.status, seconds, request.bytes_in, request.bytes_out)
            request.trip.ended(request.status, seconds)
            self.feedback.ended(request.trip, request.caller, request.status)
            self.log.ended(request, seconds)
            if self.spans is not None:
                self.spans.ended(request, seconds)


class Door:
    """`gone`: told when the model's server has broken off."""

    def __init__(self, routes: list[Route], guards: Guards, witnesses: Witnesses, gone: Callable[[], None]) -> None:
        self._router = Router(routes, redirect_slashes=False, default=_not_found)
        self._guards, self._witnesses, self._gone = guards, witnesses, gone

    @property
    def log(self) -> AccessLog:
        return self._witnesses.log

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        exchange = Exchange(scope, receive, send, self._guards, secrets.token_hex(12))
        # With an `app`, Starlette raises for a method that a route does not have, where it would else answer itself.
        scope.update(exchange=exchange, app=self)
        with self._witnesses.counted(exchange):
            try:
                await self._answer(scope, exchange)
            finally:
                exchange.release()

    async def _answer(self, scope: Message, exchange: Exchange) -> None:
        try:
            await self._router(scope, exchange.receive, exchange.send)
            return
        except ClientGone:
            exchange.status = GONE_STATUS
            return
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the client is told no more than a status
            refused = refusal(error, self._gone)
        if exchange.started:  # too late to say anything: uvicorn cuts the answer off, and it cannot be taken for whole
            return
        await exchange.refuse(refused)


def _pinned(exchange: Exchange) -> str:
    """The version that the header or the path names. Raises Refused where they differ."""
    header = exchange.headers.get(VERSION_HEADER, b"").decode("latin-1")
    path = str(exchange.scope.get("path_params", {}).get("version", ""))
    if header and path and header != path:
        raise Refused(400, f"{VERSION_HEADER.decode()} names version {header[:16]!r}, the path {path[:16]!r}")
    return header or path


def refusal(error: Exception, gone: Callable[[], None]) -> Refused:
    """`gone`: told when the model's server has broken off."""
    if isinstance(error, HTTPException):
        allow = (error.headers or {}).get("Allow")
        return Refused(error.status_code, "this path does not take that method", close=True, allow=allow)
    if isinstance(error, UpstreamGone):
        gone()
        return Refused(503, "the model's server is not there; try again later")
    if isinstance(error, TimeoutError):
        return Refused(504, "the answer took too long")
    if not isinstance(error, ServingError):
        traceback.print_exception(error, file=sys.stderr)
    return as_refused(error)


async def _not_found(scope: Message, receive: Any, send: Any) -> None:
    raise Refused(404, "no such path", close=True)
