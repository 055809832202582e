"""32 streams of tokens at once: directly as Triton's `generate_stream`, through the gateway as OpenAI's completions.

Blocks of both alternate and are compared as pairs. A tiny model makes many events, and asks the most of a gateway; one
of 100 M parameters is the smallest that people serve.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from builders import pipeline
from builders.spec import DeploymentSpec
from builders.training.recipe import TrainingRecipe
from measure.bench.measured_gateway import MeasuredGateway, cpu_s
from measure.bench.random_llama import LLAMA_100M, random_llama
from runtime.gateway.triton import TritonHttp
from runtime.gateway.upstream import Upstream
from runtime.server.launch import LOOPBACK, TritonServer
from runtime.server.supervise import ready_server

STREAMS, TOKENS = 32, 64
_CONTEXT = 256
_TINY = TrainingRecipe(vocabulary=4096, hidden=256, layers=4, heads=4, kv_heads=2, ffn=512, context=_CONTEXT)
_HEAD = b"Content-Type: application/json\r\n"
_ANSWER_BYTES = 16 << 20
Way = Callable[[int], Awaitable[tuple[float, int]]]  # a stream by its number: when its first event came, how many did


@dataclass(frozen=True)
class StreamBlock:
    """`first_ms`: the median time to a stream's first event; `events`: of all streams together."""

    per_s: float
    first_ms: float
    events: int


def compare_streams(build_dir: Path, count: int) -> None:
    """Prints medians over `count` pairs of blocks for the tiny model, and a third of them for the larger one."""
    print(f"{STREAMS} streams of a model of 3 M: {_compared(build_dir, _TINY, count)}", flush=True)
    print(f"{STREAMS} streams of one of 100 M: {_compared(build_dir, LLAMA_100M, max(3, count // 3))}", flush=True)


def _compared(build_dir: Path, sizes: TrainingRecipe, count: int) -> str:
    source = build_dir / f"streams-{sizes.layers}x{sizes.hidden}"
    spec = DeploymentSpec.model_validate(
        {
            "name": "streams",
            "model": {"source": str(random_llama(source, sizes)), "task": "generation", "max_length": _CONTEXT},
            "precision": {"cpu": "fp32"},
            "generation": {"slots": STREAMS, "cache_lengths": [_CONTEXT]},
        }
    )  # fmt: skip
    built = pipeline.build(spec, "cpu", build_dir, "repository")
    assert built.entry is not None
    with ready_server(built.entry.repository) as server, MeasuredGateway(server) as gateway:
        return asyncio.run(_compare(server, gateway, count))


async def _compare(server: TritonServer, gateway: MeasuredGateway, count: int) -> str:
    upstream, door = (Upstream(LOOPBACK, port, STREAMS, _ANSWER_BYTES) for port in (server.ports.http, gateway.port))
    ways = _direct(TritonHttp(upstream, upstream, gateway.model)), _through(door, gateway.model)
    for way in ways:
        await _block(way)
    pairs, events, gateway_s, server_s = [], 0, gateway.cpu_s(), cpu_s(server.pid)
    for number in range(count):
        blocks = {way: await _block(way) for way in (ways if number % 2 else ways[::-1])}
        pairs.append((blocks[ways[0]], blocks[ways[1]]))
        events += blocks[ways[1]].events
    spent, server_spent = gateway.cpu_s() - gateway_s, cpu_s(server.pid) - server_s
    upstream.close()
    door.close()
    tokens = count * STREAMS * TOKENS
    return (
        f"{median(direct.per_s for direct, _ in pairs):.0f} tokens/s directly, throughput "
        f"{median(through.per_s / direct.per_s for direct, through in pairs):.3f} of it, first event "
        f"{median(direct.first_ms for direct, _ in pairs):.1f} ms, "
        f"{median(through.first_ms - direct.first_ms for direct, through in pairs):+.1f} ms; CPU: gateway "
        f"{1e6 * spent / events:.0f} us an event ({tokens / events:.1f} tokens), Triton "
        f"{1e6 * server_spent / 2 / tokens:.0f} us a token"
    )


async def _block(way: Way) -> StreamBlock:
    began = time.perf_counter()
    found = await asyncio.gather(*(way(number) for number in range(STREAMS)))
    seconds = time.perf_counter() - began
    first = 1e3 * median(at - began for at, _ in found)
    return StreamBlock(STREAMS * TOKENS / seconds, first, sum(events for _, events in found))


def _direct(triton: TritonHttp) -> Way:
    async def way(number: int) -> tuple[float, int]:
        fields = {"text_input": f"Opens file {number}", "stream": True, "max_tokens": TOKENS, "min_length": TOKENS}
        first, found = 0.0, list[dict[str, Any]]()
        async with aclosing(triton.generate(fields)) as pieces:
            async for piece in pieces:
                first = first or time.perf_counter()
                found.append(piece)
        assert found[-1]["completion_tokens"] == TOKENS, found
        return first, len(found)

    return way


def _through(door: Upstream, model: str) -> Way:
    async def way(number: int) -> tuple[float, int]:
        asked = {
            "model": model, "prompt": f"Opens file {number}", "stream": True, "max_tokens": TOKENS,
            "min_tokens": TOKENS, "temperature": 0, "stream_options": {"include_usage": True},
        }  # fmt: skip
        first, text = 0.0, b""
        body = (orjson.dumps(asked),)
        async with (
            door.ask(b"POST", "/v1/completions", _HEAD, body, stream=True) as answer,
            aclosing(answer.pieces()) as pieces,
        ):
            async for piece in pieces:
                first, text = first or time.perf_counter(), text + piece
        *events, counted, end = text.removesuffix(b"\n\n").split(b"\n\n")
        assert end == b"data: [DONE]", end
        assert orjson.loads(counted.removeprefix(b"data: "))["usage"]["completion_tokens"] == TOKENS, counted
        return first, len(events)

    return way
