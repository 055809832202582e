"""uvicorn's httptools protocol, with the bounds that it lacks: bytes and number of headers, pieces of a body, times for
head and body, connections of one address.

httptools refuses Content-Length beside Transfer-Encoding by itself; other parsers let a second request through there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from runtime.gateway.cycle import CLIENT, BoundedCycle, Presence
from runtime.gateway.limits import DoorLimits

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    from uvicorn.server import ServerState

_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 413: b"Content Too Large", 431: b"Header Fields Too Large"}

_FRAME = 12  # bytes around a chunk: its size, and two ends of lines


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `limits` and `addresses`, how many connections each address has, are set by `bounded`."""

    limits = DoorLimits()
    addresses: ClassVar[Counter[str]] = Counter()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._deadline: asyncio.TimerHandle | None = None
        self._allowed: float | None = None  # seconds, for what is being received; None: nothing is
        self._idle_since: float | None = None
        self._answering: BoundedCycle | None = None  # of requests that came together, the first without an answer
        self._address: str | None = None
        self._reading_head, self._moved = True, False
        self._head_bytes = self._piece_bytes = self._chunks = 0
        self._frame_bytes = 0  # of a body that comes in chunks: what is around them, and behind the last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        crowded = self.addresses[address] >= self.limits.connections_per_address
        if crowded or len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._address = address
        self.addresses[address] += 1
        self._by(self.limits.head_s)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._by(None)
        self._set_timer()
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        if self._address is not None:
            self.addresses[self._address] -= 1
            if not self.addresses[self._address]:
                del self.addresses[self._address]
            self._address = None
        super().connection_lost(exc)
        self._leave()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # what was on its way when the connection was given up
        self._piece_bytes = len(data)
        if self._reading_head:
            self._head_bytes += len(data)
        else:
            self._frame_bytes += len(data)
        super().data_received(data)
        # After the parser: a head that ended within these bytes is no longer read. One piece is at most 256 kB.
        if self._reading_head and self._head_bytes > self.limits.header_bytes:
            self._end(431)
        elif not self._reading_head and self._frame_bytes > self.limits.header_bytes + _FRAME * self.limits.chunks:
            self._end(413)
        if self._moved and (self._allowed is not None or self._deadline is not None):
            self._set_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._by(self.limits.head_s)  # empty lines before it begin nothing
        self._reading_head, self._idle_since = True, None
        self._chunks = self._frame_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        if len(self.headers) > self.limits.headers:
            self._end(431)

    def on_headers_complete(self) -> None:
        # Of requests that came together the second's head is in a piece that was not counted as one.
        most = self.limits.header_bytes
        if self._head_bytes + self._piece_bytes > most and self._size_of_head() > most:
            self._end(431)
        self._reading_head, self._head_bytes = False, 0
        if self.transport.is_closing():
            return
        self._by(self.limits.body_s)
        self._begin()

    def _size_of_head(self) -> int:
        """Without what else was in those bytes."""
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _begin(self) -> None:
        """As uvicorn's `on_headers_complete`, with a cycle of ours. Requests that come before an answer wait."""
        version = self.parser.get_http_version()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        parsed = httptools.parse_url(self.url)
        path = parsed.path.decode("ascii")
        scope["method"], scope["http_version"] = self.parser.get_method().decode("ascii"), version
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"], scope["query_string"] = parsed.path, parsed.query or b""
        scope[CLIENT] = presence = Presence()
        before = self.cycle
        self.cycle = BoundedCycle(
            scope=self.scope, transport=self.transport, flow=self.flow, logger=self.logger,
            access_logger=self.access_logger, access_log=False, default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(), expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(), on_response=self.on_response_complete,
        )  # fmt: skip
        self.cycle.presence = presence
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > self.limits.chunks:
            self._end(413)

    def on_body(self, body: bytes) -> None:
        self._frame_bytes -= len(body)
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._by(None)
        self._reading_head, self._head_bytes = True, 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        assert isinstance(cycle, BoundedCycle)
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """As uvicorn's, with one timer for a connection, where that sets one after each answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_again(self.timeout_keep_alive)

    def _look_again(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return  # it is set again with the answer
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._look_again(left)
        else:
            self.transport.close()

    def _unset_keepalive_if_required(self) -> None:
        """Of any bytes; only a request that begins ends the time of a connection that is idle."""

    def _leave(self) -> None:
        cycle = self._answering
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            cycle.presence.leave()

    def _by(self, seconds: float | None) -> None:
        """What is being received must be there within this time; None: nothing is. The timer is set when all bytes at
        hand are read: most requests come as a whole, and need none."""
        self._allowed, self._moved = seconds, True

    def _set_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._moved, allowed = False, self._allowed
        self._deadline = None if allowed is None else self.loop.call_later(allowed, self._end, 408)

    def _end(self, status: int) -> None:
        """The connection ends here. It is told why, unless an answer is on its way already."""
        self._by(None)
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            reason = _REASONS[status]
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
                % (status, reason, len(reason), reason)
            )
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._leave()
        self.transport.close()


def bounded(limits: DoorLimits) -> type[BoundedProtocol]:
    """The protocol with these limits, and a count of connections of its own."""
    return type("_Bounded", (BoundedProtocol,), {"limits": limits, "addresses": Counter()})
