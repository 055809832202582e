"""The route table: handlers behind the guards, by path and method. What does not stand in it is 404."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from runtime.gateway.exchange import VERSION_HEADER, Exchange
from runtime.gateway.guards import Guards
from runtime.gateway.refused import Refused

Handler = Callable[[Exchange], Awaitable[None]]
_PART = re.compile(r"\{(\w+)\}")
Route = tuple[str, str, Handler, bool]  # path, method, handler, and whether it is open to whoever can connect


class Endpoint:
    """A handler behind the guards; `public` ones are open to whoever can connect, and hold nothing."""

    def __init__(self, handler: Handler, label: str, guards: Guards, public: bool) -> None:
        self._handler, self._label, self._guards, self._public = handler, label, guards, public

    async def __call__(self, exchange: Exchange) -> None:
        exchange.label = self._label
        if self._public:
            await self._handler(exchange)
            return
        exchange.trip.pinned = _pinned(exchange)
        exchange.caller = self._guards.caller(exchange.headers.get(b"authorization", b""), exchange.address)
        exchange.trip.salt = self._guards.salt(exchange.caller)
        with self._guards.admitted(exchange.caller), self._guards.in_time():
            await self._handler(exchange)


class RouteTable:
    """`{name}` in a path stands for one part of it. A path without such is found at once, whatever else there is."""

    def __init__(self, routes: Sequence[Route], guards: Guards) -> None:
        self._paths: dict[str, dict[str, Endpoint]] = {}
        for path, method, handler, public in routes:
            methods = self._paths.setdefault(path, {})
            for one in (method, "HEAD") if method == "GET" else (method,):
                methods[one] = Endpoint(handler, path, guards, public)
        self._patterns = [
            (re.compile(_PART.sub(r"(?P<\1>[^/]+)", path)), methods)
            for path, methods in self._paths.items()
            if _PART.search(path)
        ]

    def find(self, method: str, path: str) -> tuple[Endpoint, dict[str, str]]:
        """And the parts of the path that have a name. Raises Refused."""
        methods, parts = self._methods(path)
        if method not in methods:
            raise Refused(405, "this path does not take that method", close=True, allow=", ".join(methods))
        return methods[method], parts

    def _methods(self, path: str) -> tuple[dict[str, Endpoint], dict[str, str]]:
        if path in self._paths and "{" not in path:
            return self._paths[path], {}
        for pattern, methods in self._patterns:
            if found := pattern.fullmatch(path):
                return methods, found.groupdict()
        raise Refused(404, "no such path", close=True)


def _pinned(exchange: Exchange) -> str:
    """The version that the header or the path names. Raises Refused where they differ."""
    header = exchange.headers.get(VERSION_HEADER, b"").decode("latin-1")
    path = exchange.parts.get("version", "")
    if header and path and header != path:
        raise Refused(400, f"{VERSION_HEADER.decode()} names version {header[:16]!r}, the path {path[:16]!r}")
    return header or path
