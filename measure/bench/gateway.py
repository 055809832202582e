"""`make bench-gateway`: embeddings and streams through the gateway against Triton's own HTTP port, by turns in one run.

One client process drives both with the same code: closed loops of 1, 8 and 32 users, one text a request, kept
connections. Directly it asks in Triton's binary tensors, through the gateway as OpenAI's client does, in base64. Short
blocks of both alternate and are compared as pairs, so that noise of the machine hits both. Then 32 streams of a tiny
language model at once, and of one of 100 M parameters, directly as `generate_stream` and through the gateway as
OpenAI's completions.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from builders import pipeline
from builders.judging import corpus
from builders.spec import load_spec
from measure.bench.gateway_streams import compare_streams
from measure.bench.measured_gateway import MeasuredGateway, cpu_s
from runtime.gateway.triton import Blob, TritonHttp, pack_texts
from runtime.gateway.upstream import Upstream
from runtime.server.launch import LOOPBACK, TritonServer
from runtime.server.supervise import ready_server

USERS = (1, 8, 32)
PAIRS = 20
REQUESTS = {1: 24, 8: 96, 32: 192}  # of a block
_HEAD = b"Content-Type: application/json\r\n"
_ANSWER_BYTES = 16 << 20
Ask = Callable[[str], Awaitable[NDArray[np.float32]]]


@dataclass(frozen=True)
class TimedBlock:
    p50_ms: float
    per_s: float


@dataclass(frozen=True)
class Compared:
    """Medians over pairs of blocks."""

    users: int
    direct_ms: float
    added_ms: float
    ratio: float
    gateway_cpu_us: float  # a request
    server_cpu_us: float  # a request, of Triton and its stubs

    @staticmethod
    def of(users: int, pairs: Sequence[tuple[TimedBlock, TimedBlock]], gateway_s: float, server_s: float) -> Compared:
        requests = len(pairs) * REQUESTS[users]
        return Compared(
            users,
            median(direct.p50_ms for direct, _ in pairs),
            median(through.p50_ms - direct.p50_ms for direct, through in pairs),
            median(through.per_s / direct.per_s for direct, through in pairs),
            1e6 * gateway_s / requests,
            1e6 * server_s / (2 * requests),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--users", type=int, nargs="+", choices=USERS, default=USERS)
    parser.add_argument("--only", choices=("embeddings", "streams"))
    arguments = parser.parse_args()
    if arguments.only != "streams":
        _embeddings(arguments)
    if arguments.only != "embeddings":
        compare_streams(arguments.build_dir, max(2, arguments.pairs // 2))


def _embeddings(arguments: argparse.Namespace) -> None:
    built = pipeline.build(load_spec("minilm"), "cpu", arguments.build_dir, "repository")
    assert built.entry is not None
    with ready_server(built.entry.repository) as server, MeasuredGateway(server) as gateway:
        print(f"{built.spec.name} in {built.spec.precision.cpu}, {os.cpu_count()} cores, {arguments.pairs} pairs")
        print("users   direct p50   added p50   throughput   CPU a request: gateway, Triton")
        for users in arguments.users:
            found = asyncio.run(_compare(server, gateway, users, arguments.pairs))
            print(
                f"{users:>5}{found.direct_ms:>10.2f} ms{found.added_ms:>9.2f} ms{found.ratio:>13.3f}"
                f"{found.gateway_cpu_us:>18.0f} us{found.server_cpu_us:>9.0f} us",
                flush=True,
            )


async def _compare(server: TritonServer, gateway: MeasuredGateway, users: int, count: int) -> Compared:
    upstream = Upstream(LOOPBACK, server.ports.http, users, _ANSWER_BYTES)
    door = Upstream(LOOPBACK, gateway.port, users, _ANSWER_BYTES)
    direct, through = _direct(TritonHttp(upstream, upstream, gateway.model)), _through(door, gateway.model)
    texts = corpus.texts(None, REQUESTS[users])
    same = float(await direct(texts[0]) @ await through(texts[0]))
    assert same > 0.99, f"the two do not answer alike: cosine {same:.3f}"
    for ask in (direct, through):  # connections, caches
        await _block(ask, texts, users)
    pairs, gateway_s, server_s = [], gateway.cpu_s(), cpu_s(server.pid)
    for number in range(count):
        blocks = {}
        for ask in (direct, through) if number % 2 else (through, direct):
            blocks[ask] = await _block(ask, texts, users)
        pairs.append((blocks[direct], blocks[through]))
    upstream.close()
    door.close()
    return Compared.of(users, pairs, gateway.cpu_s() - gateway_s, cpu_s(server.pid) - server_s)


def _direct(triton: TritonHttp) -> Ask:
    async def ask(text: str) -> NDArray[np.float32]:
        item = Blob("text", "BYTES", (1, 1), pack_texts([text.encode()]))
        found = await triton.infer([item], ["embedding", "token_count"], "", {})
        vector: NDArray[np.float32] = found["embedding"].array()[0]
        return vector

    return ask


def _through(door: Upstream, model: str) -> Ask:
    import base64

    import orjson

    async def ask(text: str) -> NDArray[np.float32]:
        body = orjson.dumps({"model": model, "input": text, "encoding_format": "base64", "truncate": True})
        async with door.ask(b"POST", "/v1/embeddings", _HEAD, (body,)) as answer:
            told = orjson.loads(await answer.read())
        return np.frombuffer(base64.b64decode(told["data"][0]["embedding"]), np.float32)

    return ask


async def _block(ask: Ask, texts: Sequence[str], users: int) -> TimedBlock:
    """Every text once, by users who each wait for their answer."""
    left, taken = list(texts), []

    async def user() -> None:
        while left:
            text = left.pop()
            began = time.perf_counter()
            await ask(text)
            taken.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(user())
    return TimedBlock(1e3 * median(taken), len(taken) / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
