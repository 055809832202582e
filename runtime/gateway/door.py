"""The ASGI application: one route table, guards before bodies, one place where errors become answers, one line of log.

Plain ASGI: frameworks' middleware hides from a handler that its client has gone, and costs each request.
"""

from __future__ import annotations

import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from runtime.errors import ServingError
from runtime.gateway.access_log import AccessLog, Logged
from runtime.gateway.counters import DoorCounters
from runtime.gateway.exchange import GONE_STATUS, ClientGone, Exchange, Message
from runtime.gateway.feedback import Feedback
from runtime.gateway.guards import Guards
from runtime.gateway.refused import Refused, as_refused
from runtime.gateway.routes import RouteTable
from runtime.gateway.spans import Spans
from runtime.gateway.trip import TRIP
from runtime.gateway.upstream import UpstreamGone


@dataclass(frozen=True)
class Witnesses:
    """Who hears of every request, over HTTP and gRPC. `spans` None: none are sent."""

    counters: DoorCounters
    log: AccessLog
    feedback: Feedback
    spans: Spans | None = None

    def begun(self, request: Logged) -> None:
        """Of a request, which has an end in any case."""
        self.counters.running += 1
        TRIP.set(request.trip)
        self.feedback.begun(request.trip)
        if self.spans is not None:
            self.spans.begun(request.trip)

    def ended(self, request: Logged) -> None:
        """It is written down with the status that it has now."""
        self.counters.running -= 1
        seconds = time.monotonic() - request.trip.started
        self.counters.ended(request.label, request.status, seconds, request.bytes_in, request.bytes_out)
        request.trip.ended(request.status, seconds)
        self.feedback.ended(request.trip, request.caller, request.status)
        self.log.ended(request, seconds)
        if self.spans is not None:
            self.spans.ended(request, seconds)


class Door:
    """`gone`: told when the model's server has broken off."""

    def __init__(self, routes: RouteTable, guards: Guards, witnesses: Witnesses, gone: Callable[[], None]) -> None:
        self._routes, self._guards, self._witnesses, self._gone = routes, guards, witnesses, gone

    @property
    def log(self) -> AccessLog:
        return self._witnesses.log

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        exchange = Exchange(scope, receive, send, self._guards, secrets.token_hex(12))
        self._witnesses.begun(exchange)
        try:
            await self._answer(exchange)
        finally:
            exchange.release()
            self._witnesses.ended(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            endpoint, exchange.parts = self._routes.find(exchange.method, exchange.scope["path"])
            await endpoint(exchange)
            return
        except ClientGone:
            exchange.status = GONE_STATUS
            return
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the client is told no more than a status
            refused = refusal(error, self._gone)
        if exchange.started:  # too late to say anything: uvicorn cuts the answer off, and it cannot be taken for whole
            return
        await exchange.refuse(refused)


def refusal(error: Exception, gone: Callable[[], None]) -> Refused:
    """`gone`: told when the model's server has broken off."""
    if isinstance(error, UpstreamGone):
        gone()
        return Refused(503, "the model's server is not there; try again later")
    if isinstance(error, TimeoutError):
        return Refused(504, "the answer took too long")
    if not isinstance(error, ServingError):
        traceback.print_exception(error, file=sys.stderr)
    return as_refused(error)
