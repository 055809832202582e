"""One request and its answer, as the handlers see them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Any, TypeVar

from runtime.errors import TriremeError
from runtime.gateway.bodies import declared_size, require_plain
from runtime.gateway.cycle import CLIENT, Presence
from runtime.gateway.guards import Guards
from runtime.gateway.refused import Refused
from runtime.gateway.trip import Trip, read_trace

T = TypeVar("T")
Message = MutableMapping[str, Any]
JSON = frozenset({b"application/json"})
JSON_OR_BINARY = JSON | {b"application/octet-stream"}
VERSION_HEADER = b"x-trireme-version"  # of a request: it goes there and nowhere else; of an answer: where it went
_CLOSE = (b"connection", b"close")
GONE_STATUS = 499  # what proxies write of a client that did not wait


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first failure cancels the others, and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


class ClientGone(TriremeError):
    """Nobody is there to answer."""


class Exchange:
    """`id` is ours, whatever the client sent. `started`: the answer's head has gone out."""

    def __init__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
        guards: Guards,
        request_id: str,
    ) -> None:
        self.scope, self.id = scope, request_id
        self.receive, self.send, self._guards = receive, send, guards
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.parts: dict[str, str] = {}  # of the path, by their names in the route table
        self.caller = ""
        self.trip = Trip(request_id, read_trace(self.headers.get(b"traceparent", b"").decode("latin-1")))
        self.label = "other"
        self.status = GONE_STATUS
        self.started = self.read = False
        self.bytes_in = self.bytes_out = self._held = 0

    @property
    def openai(self) -> bool:
        return bool(self.scope["path"].startswith("/v1/"))

    @property
    def trace(self) -> str:
        return self.trip.trace

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    @property
    def address(self) -> str:
        client = self.scope.get("client")
        return str(client[0]) if client else ""

    async def body(self, types: frozenset[bytes] = JSON) -> bytes:
        """The whole of it. Raises Refused for one that is too large, encoded or of another type, ClientGone."""
        require_plain(self.headers, types)
        most = self._guards.limits.body_bytes
        declared = declared_size(self.headers)
        if declared is not None and declared > most:
            raise Refused(413, f"the body has {declared} bytes; at most {most} are taken", close=True)
        pieces = []
        while not self.read:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("while its request came")
            piece = message.get("body", b"")
            self.bytes_in += len(piece)
            if self.bytes_in > most:
                raise Refused(413, f"the body has more than the {most} bytes that are taken", close=True)
            self._hold(len(piece))  # what came, not what was declared: a declaration costs its sender nothing
            pieces.append(piece)
            self.read = not message.get("more_body", False)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _hold(self, size: int) -> None:
        self._guards.hold(size)
        self._held += size

    def release(self) -> None:
        self._guards.release(self._held)
        self._held = 0

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work gives; it is cancelled when the client leaves, and ClientGone is raised."""
        doing = asyncio.current_task()
        assert doing is not None
        presence: Presence = self.scope[CLIENT]
        if presence.gone():
            work.close()
            raise ClientGone("before it was answered")
        presence.watch(doing.cancel)
        try:
            return await work
        except asyncio.CancelledError:
            if not presence.gone():
                raise
            doing.uncancel()
            raise ClientGone("while it was answered") from None
        finally:
            presence.watch(None)

    async def answer(
        self,
        body: bytes,
        status: int = 200,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        given = headers if headers is not None else [(b"content-type", b"application/json")]
        await self.start(status, [*given, (b"content-length", str(len(body)).encode())])
        await self.piece(body, last=True)

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started, self.status = True, status
        self.trip.answers()
        # A body that nobody reads would be received and thrown away for as long as it comes.
        closing = [] if self._nothing_comes() or _CLOSE in headers else [_CLOSE]
        head = [*headers, (b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff"), *closing]
        if self.trip.lane is not None and self.trip.inferred:
            head.append((VERSION_HEADER, str(self.trip.lane.version).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": head})

    def _nothing_comes(self) -> bool:
        if self.read:
            return True
        size = declared_size(self.headers)
        return size == 0 or (size is None and b"transfer-encoding" not in self.headers)

    async def piece(self, data: bytes, last: bool = False) -> None:
        self.bytes_out += len(data)
        await self.send({"type": "http.response.body", "body": data, "more_body": not last})

    async def refuse(self, refused: Refused) -> None:
        await self.answer(refused.body(self.openai), refused.status, refused.headers())
