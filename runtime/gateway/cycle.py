"""One request on a connection, as an ASGI application sees it; a whole answer leaves as one write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

CLIENT = "trireme.client"  # of a scope: its Presence


class Presence:
    """Whether the client is still there. Told as it leaves, which `receive` would tell to another task alone."""

    def __init__(self) -> None:
        self._gone = False
        self._then: Callable[[], object] | None = None

    def gone(self) -> bool:
        return self._gone

    def watch(self, then: Callable[[], object] | None) -> None:
        """What is called when it leaves; None: nothing any more."""
        self._then = then

    def leave(self) -> None:
        self._gone = True
        if self._then is not None:
            self._then()


class BoundedCycle(RequestResponseCycle):
    """uvicorn's, but for `send`. The head waits for the first piece of the body: two writes would be two packets, and
    wake the client twice. Heads are made of our own words alone, so they are not searched for line ends."""

    presence: Presence
    _head: bytes = b""

    async def send(self, message: Any) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.start":
            self._start(message["status"], message["headers"])
        else:
            self._piece(message["body"], last=not message.get("more_body", False))

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self.response_started:
            raise RuntimeError("an answer was begun twice")
        self.response_started, self.waiting_for_100_continue = True, False
        lines = [STATUS_LINE[status]]
        self.chunked_encoding = self.scope["method"] != "HEAD"
        for name, value in (*self.default_headers, *headers):
            if name == b"content-length":
                self.chunked_encoding, self.expected_content_length = False, int(value)
            elif name == b"connection" and value == b"close":
                self.keep_alive = False
                continue
            lines += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"transfer-encoding: chunked\r\n\r\n" if self.chunked_encoding else b"\r\n")
        self._head = b"".join(lines)

    def _piece(self, body: bytes, last: bool) -> None:
        if not self.response_started or self.response_complete:
            raise RuntimeError("a piece of an answer that has not begun, or has ended")
        parts, self._head = [self._head] if self._head else [], b""
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
        elif not self.chunked_encoding:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0 or (last and self.expected_content_length):
                raise RuntimeError("an answer is not as long as its head says")
            parts += (body,) if body else ()
        else:
            if body:
                parts += (b"%x\r\n" % len(body), body, b"\r\n")
            if last:
                parts.append(b"0\r\n\r\n")
        self.transport.writelines(parts)
        if last:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()
