"""A small HTTP/1.1 client for Triton's port on loopback: kept connections, our own framing, answers by the piece.

A general client costs more than the rest of the gateway. An answer that nobody reads to its end closes its connection,
which is how Triton hears that a client has gone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import httptools

from runtime.errors import TriremeError

_HIGH_WATER = 256 << 10  # of an answer that is not taken fast enough
_CONNECT_S = 2.0
_MOST_IDLE = 64  # kept connections: a crowd that has gone leaves no more of its descriptors


class UpstreamGone(TriremeError):
    """No connection, or one that broke. `nothing_came`: the request may be sent again."""

    def __init__(self, message: str, nothing_came: bool = True) -> None:
        super().__init__(message)
        self.nothing_came = nothing_came


class UpstreamConnection(asyncio.Protocol):
    """One kept connection with at most one request on it. `streaming`: what comes waits until it is taken."""

    streaming = False

    def __init__(self, answer_bytes: int) -> None:
        self._answer_bytes = answer_bytes
        self.transport: Any = None
        self.lost = False
        self._waiting: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.pieces: deque[bytes] = deque()
        self._size = self._total = 0
        self._paused = self.complete = False
        self.came = False

    def send(self, head: bytes, *parts: bytes) -> None:
        self._begin()
        self.transport.writelines((head, *parts))

    @property
    def reusable(self) -> bool:
        return self.complete and not self.lost and self.headers.get(b"connection", b"").lower() != b"close"

    async def arrive(self) -> None:
        """Until something more of the answer has come, or it is lost."""
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def take(self) -> bytes:
        piece = b"".join(self.pieces)
        self.pieces.clear()
        self._size = 0
        if self._paused and not self.lost:
            self._paused = False
            self.transport.resume_reading()
        return piece

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    # asyncio's side
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.complete:  # nobody asked for it
            self.lost = True
            self.transport.abort()
            return
        self.came = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._wake()

    # the parser's side
    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)
        self._size += len(body)
        self._total += len(body)
        if self._total > self._answer_bytes:
            self.lost = True
            self.transport.abort()
        elif self._size > _HIGH_WATER and not self._paused and self.streaming:
            self._paused = True
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        self.complete = not self.lost


class UpstreamAnswer:
    """An answer whose head has come."""

    def __init__(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self.status, self.headers = connection.status, connection.headers

    async def read(self) -> bytes:
        """The whole body. Raises UpstreamGone when it breaks off."""
        while not self._connection.complete:
            if self._connection.lost:
                raise UpstreamGone("the model's server broke the connection", nothing_came=False)
            await self._connection.arrive()
        return self._connection.take()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """As they come. Raises UpstreamGone when the answer breaks off."""
        while True:
            if self._connection.pieces:
                yield self._connection.take()
            elif self._connection.complete:
                return
            elif self._connection.lost:
                raise UpstreamGone("the model's server broke the connection", nothing_came=False)
            else:
                await self._connection.arrive()


class UpstreamRequest:
    """Entered, it is the answer. (`asynccontextmanager` would cost more than what is done here.)"""

    def __init__(self, upstream: Upstream, head: bytes, body: tuple[bytes, ...], stream: bool) -> None:
        self._upstream, self._asked = upstream, (head, body, stream)
        self._connection: UpstreamConnection | None = None

    async def __aenter__(self) -> UpstreamAnswer:
        await self._upstream.free.acquire()
        try:
            self._connection = await self._upstream.answered(*self._asked)
        except BaseException:
            self._upstream.free.release()
            raise
        return UpstreamAnswer(self._connection)

    async def __aexit__(self, *exception: object) -> None:
        assert self._connection is not None
        self._upstream.keep(self._connection)
        self._upstream.free.release()


class Upstream:
    """Connections to one address, `most` at once."""

    def __init__(self, host: str, port: int, most: int, answer_bytes: int) -> None:
        self._host, self._port, self._answer_bytes = host, port, answer_bytes
        self._idle: deque[UpstreamConnection] = deque()
        self.free = asyncio.Semaphore(most)
        self._host_header = f"{host}:{port}".encode()

    def ask(
        self, method: bytes, path: str, headers: bytes = b"", body: tuple[bytes, ...] = (), stream: bool = False
    ) -> UpstreamRequest:
        """`headers` are whole lines. The connection is kept when the answer was read to its end, else closed. A kept
        one that was closed meanwhile is no fault: the request goes again over a fresh one."""
        size = sum(map(len, body))
        head = b"%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n%s\r\n" % (
            method, path.encode("ascii"), self._host_header, size, headers,
        )  # fmt: skip
        return UpstreamRequest(self, head, body, stream)

    def keep(self, connection: UpstreamConnection) -> None:
        """For the next request, where it can be."""
        if connection.reusable and len(self._idle) < _MOST_IDLE:
            connection.take()
            self._idle.append(connection)
        else:
            connection.transport.abort()

    async def answered(self, head: bytes, body: tuple[bytes, ...], stream: bool) -> UpstreamConnection:
        """A connection on which the head of the answer has come."""
        while True:
            kept = self._kept()
            connection = kept or await self._open()
            try:
                connection.streaming = stream
                connection.send(head, *body)
                while not connection.status and not connection.lost:
                    await connection.arrive()
            except BaseException:
                connection.transport.abort()
                raise
            if connection.status:
                return connection
            if kept is None or connection.came:
                raise UpstreamGone("the model's server broke the connection", nothing_came=not connection.came)

    def _kept(self) -> UpstreamConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost:
                return connection
        return None

    async def _open(self) -> UpstreamConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self._answer_bytes), self._host, self._port
                )
        except OSError as error:  # a timeout is one
            raise UpstreamGone("the model's server does not answer") from error
        return connection

    def close(self) -> None:
        while self._idle:
            self._idle.pop().transport.abort()
