"""uvicorn's httptools protocol, with the bounds that it lacks: bytes and number of headers, pieces of a body, times for
head and body, connections of one address.

httptools refuses Content-Length beside Transfer-Encoding by itself; other parsers let a second request through there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from runtime.gateway.limits import DoorLimits

_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 413: b"Content Too Large", 431: b"Header Fields Too Large"}


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
        self._address: str | None = None
        self._reading_head = True
        self._head_bytes = self._chunks = 0

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

    def connection_lost(self, exc: Exception | None) -> None:
        self._by(None)
        if self._address is not None:
            self.addresses[self._address] -= 1
            if not self.addresses[self._address]:
                del self.addresses[self._address]
            self._address = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # what was on its way when the connection was given up
        if self._reading_head:
            self._head_bytes += len(data)
        super().data_received(data)
        # After the parser: a head that ended within these bytes is no longer read. One piece is at most 256 kB.
        if self._reading_head and self._head_bytes > self.limits.header_bytes:
            self._end(431)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._by(self.limits.head_s)  # empty lines before it begin nothing
        self._reading_head, self._chunks = True, 0
        self._fields = self._field_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_field(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._count_field(len(name) + len(value))
        if not self.transport.is_closing():
            super().on_header(name, value)

    def _count_field(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self.limits.header_bytes or self._fields > self.limits.headers:
            self._end(431)

    def on_headers_complete(self) -> None:
        self._reading_head, self._head_bytes = False, 0
        if self.transport.is_closing():
            return
        self._by(self.limits.body_s)
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > self.limits.chunks:
            self._end(413)

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._by(None)
        self._reading_head, self._head_bytes = True, 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def _by(self, seconds: float | None) -> None:
        """What is being received must be there within this time; None: nothing is."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._end, 408)

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
        self.transport.close()


def bounded(limits: DoorLimits) -> type[BoundedProtocol]:
    """The protocol with these limits, and a count of connections of its own."""
    return type("_Bounded", (BoundedProtocol,), {"limits": limits, "addresses": Counter()})
