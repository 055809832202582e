"""The client of the model's server, against a server of a few lines that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import orjson
import pytest

from runtime.gateway.refused import Refused
from runtime.gateway.trip import TRIP, Trip
from runtime.gateway.triton import Blob, TritonHttp
from runtime.gateway.upstream import Upstream, UpstreamGone

Serve = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def _request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head + await reader.readexactly(size)


def _with_server(serve: Serve, test: Callable[[Upstream], Awaitable[None]], answer_bytes: int = 1 << 20) -> int:
    """How many connections were made."""
    made = 0

    async def run() -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal made
            made += 1
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await serve(made, reader, writer)
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        upstream = Upstream("127.0.0.1", server.sockets[0].getsockname()[1], 4, answer_bytes)
        await asyncio.wait_for(test(upstream), 20)
        upstream.close()
        server.close()

    asyncio.run(run())
    return made


async def _ask(upstream: Upstream, body: bytes = b"x") -> bytes:
    async with upstream.ask(b"POST", "/a", b"", (body,)) as answer:
        return await answer.read()


def test_a_connection_is_kept() -> None:
    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            assert (await _request(reader)).endswith(b"\r\n\r\nx")
            writer.write(OK)

    async def test(upstream: Upstream) -> None:
        assert [await _ask(upstream) for _ in range(3)] == [b"ok"] * 3

    assert _with_server(serve, test) == 1


def test_a_kept_connection_that_was_closed_meanwhile_is_no_fault() -> None:
    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        writer.write(OK)
        await writer.drain()
        if number == 1:
            await _request(reader)  # and it is closed without an answer

    async def test(upstream: Upstream) -> None:
        assert [await _ask(upstream) for _ in range(2)] == [b"ok"] * 2

    assert _with_server(serve, test) == 2


def test_a_request_that_was_begun_to_be_answered_is_not_sent_twice() -> None:
    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        writer.write(OK[:-1])

    async def test(upstream: Upstream) -> None:
        with pytest.raises(UpstreamGone):
            await _ask(upstream)

    assert _with_server(serve, test) == 1


@pytest.mark.parametrize("answer", [b"SSH-2.0\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9000])
def test_an_answer_that_is_none_or_too_large_is_given_up(answer: bytes) -> None:
    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        writer.write(answer)
        await writer.drain()
        await reader.read()

    async def test(upstream: Upstream) -> None:
        with pytest.raises(UpstreamGone):
            await _ask(upstream)

    _with_server(serve, test, answer_bytes=1000)


def test_leaving_an_answer_closes_its_connection() -> None:
    closed = asyncio.Event()

    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
        assert await reader.read() == b""
        closed.set()

    async def test(upstream: Upstream) -> None:
        async with upstream.ask(b"GET", "/a", stream=True) as answer:
            async for piece in answer.pieces():
                assert piece == b"ok"
                break
        await closed.wait()

    _with_server(serve, test)


def test_nobody_there() -> None:
    async def run() -> None:
        with pytest.raises(UpstreamGone):
            await _ask(Upstream("127.0.0.1", 9, 1, 100))

    asyncio.run(run())


def test_a_salt_goes_to_the_model_with_the_prompt() -> None:
    bodies: list[bytes] = []

    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bodies.append((await _request(reader)).partition(b"\r\n\r\n")[2])
        event = b'data: {"text_output": "ab"}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(event) + event)

    async def test(upstream: Upstream) -> None:
        triton = TritonHttp(upstream, upstream, "m")
        for salt in ("ann", ""):
            TRIP.set(Trip(salt=salt))
            assert [piece async for piece in triton.generate({"text_input": "a"})]

    _with_server(serve, test)
    assert [json.loads(body).get("cache_salt") for body in bodies] == ["ann", None]


class _Encoder:
    """A model server whose answers wait until they are let go."""

    def __init__(self, queue_size: int, group: dict[str, Any], max_batch_size: int) -> None:
        ensemble = {
            "parameters": {"queue_size": {"string_value": str(queue_size)}},
            "ensemble_scheduling": {"step": [{"model_name": "m-tokenizer"}, {"model_name": "m-encoder"}]},
        }
        encoder = {"instance_group": [group], "max_batch_size": max_batch_size}
        self.configs = {b"/v2/models/m/config": ensemble, b"/v2/models/m-encoder/config": encoder}
        self.go = asyncio.Event()

    async def serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                body = orjson.dumps(self.configs.get(head.split(b" ")[1], {}))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                continue
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            await self.go.wait()
            body = orjson.dumps({"outputs": []})
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


async def _infer(triton: TritonHttp, **parameters: int) -> int:
    """200, or the status of the refusal."""
    text = Blob("text", "BYTES", (1, 1), np.array([1, 0, 0, 0, 97], np.uint8).tobytes())
    try:
        await triton.infer([text], [], "id", parameters)
    except Refused as refused:
        return refused.status
    return 200


def test_more_than_there_are_places_for_are_refused_at_once() -> None:
    async def test(upstream: Upstream) -> None:
        triton = TritonHttp(upstream, upstream, "m")
        waiting = [asyncio.create_task(_infer(triton)) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert [await _infer(triton) for _ in range(3)] == [429] * 3
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        assert await _infer(triton, timeout=10_000) == 504, "who left gave its place back"
        last = asyncio.create_task(_infer(triton, timeout=60_000_000))
        await asyncio.sleep(0.1)
        encoder.go.set()
        assert [await waiting[1], await last, await _infer(triton)] == [200] * 3

    encoder = _Encoder(1, {"count": 1, "kind": "KIND_CPU"}, 1)
    _with_server(encoder.serve, test)


@pytest.mark.parametrize(
    ("group", "max_batch_size", "places"),
    [
        ({"count": 1, "kind": "KIND_CPU"}, 8, 5 + 8),
        ({"count": 2, "kind": "KIND_GPU", "gpus": [0, 1, 2]}, 8, 5 + 6 * 8),
        ({"count": 1, "kind": "KIND_MODEL"}, 0, 5 + 1),
    ],
)
def test_there_are_places_for_a_batch_of_each_copy(group: dict[str, Any], max_batch_size: int, places: int) -> None:
    async def test(upstream: Upstream) -> None:
        assert (await TritonHttp(upstream, upstream, "m").facts()).places == places

    _with_server(_Encoder(5, group, max_batch_size).serve, test)


def test_what_comes_after_a_stub_was_given_up_is_nobodys() -> None:
    """Triton takes the answer of a stub that goes on for that of another request."""

    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if number > 1 or encoder.go.is_set():
            await encoder.serve(number, reader, writer)
            return
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await _request(reader)
        await asyncio.sleep(0.2)
        body = orjson.dumps({"error": "Stub process 'm-encoder_0_0' is not healthy."})
        writer.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await reader.read()

    async def test(upstream: Upstream) -> None:
        triton = TritonHttp(upstream, upstream, "m")
        given_up, beside = (asyncio.create_task(_infer(triton)) for _ in range(2))
        assert await given_up == 503
        encoder.go.set()
        assert await beside == 503, "it was under way"
        assert await _infer(triton) == 503
        triton.forget()  # the server has gone: another one answers
        assert await _infer(triton) == 200

    encoder = _Encoder(5, {"count": 1, "kind": "KIND_CPU"}, 1)
    _with_server(serve, test)
