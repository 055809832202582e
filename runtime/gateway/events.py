"""A generator's answer as it comes, and as events of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from runtime.errors import ServingError
from runtime.gateway.exchange import Exchange
from runtime.gateway.refused import Refused, as_refused
from runtime.gateway.upstream import UpstreamGone

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def to_the_end(pieces: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
    """Until the one with `finish_reason`. Raises UpstreamGone when it does not come."""
    finished = False
    async with aclosing(pieces):
        async for piece in pieces:
            finished = "finish_reason" in piece
            piece.pop("id", None)  # which is ours; a client's own is told beside
            yield piece
    if not finished:
        raise UpstreamGone("the answer has no end", nothing_came=False)


@asynccontextmanager
async def telling_late(exchange: Exchange) -> AsyncIterator[None]:
    """What fails before the head is out is raised, so that it has its status; later, it is told as an event."""
    try:
        yield
    except (ServingError, UpstreamGone) as error:
        if not exchange.started:
            raise
        broken = Refused(503, "the model's server broke off; try again")
        refused = as_refused(error) if isinstance(error, ServingError) else broken
        await exchange.piece(event(refused.body(exchange.openai)))


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
