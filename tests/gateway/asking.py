"""Requests to a door in this process, over a model server of a few lines; and a gateway as a process of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.gateway.access_log import AccessLog
from runtime.gateway.app import make_door
from runtime.gateway.door import Door
from runtime.gateway.keys import Keys
from runtime.gateway.limits import DoorLimits
from runtime.gateway.readiness import Readiness
from runtime.gateway.triton import Blob, Facts

JSON = {"content-type": "application/json"}


@dataclass
class FakeTriton:
    """Embeds a text as its length, and tells a text word by word. `error`: raised instead of an answer."""

    model: str = "m"
    generates: bool = False
    error: Exception | None = None
    words: tuple[str, ...] = ("one", " two", " three")
    finish: str = "length"
    hang: bool = False  # after the first word
    left: bool = False  # a stream was given up
    asked: list[Any] = field(default_factory=list)
    forgotten: int = 0

    async def facts(self) -> Facts:
        outputs = ["text_output"] if self.generates else ["embedding", "token_count"]
        metadata = {
            "name": self.model,
            "platform": "fake",
            "versions": ["3"],
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}],
            "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, 2]} for name in outputs],
        }
        return Facts(3, 2, metadata)

    async def infer(
        self, inputs: Sequence[Blob], outputs: Sequence[str], request_id: str, parameters: Mapping[str, Any]
    ) -> dict[str, Blob]:
        self.asked.append((inputs, outputs, request_id, parameters))
        if self.error is not None:
            raise self.error
        count = inputs[0].shape[0]
        vectors = np.arange(2 * count, dtype=np.float32)
        counts = np.full(count, 4, np.int32)
        return {
            "embedding": Blob("embedding", "FP32", (count, 2), vectors.tobytes()),
            "token_count": Blob("token_count", "INT32", (count, 1), counts.tobytes()),
        }

    async def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(fields)
        try:
            for word in self.words:
                yield {"text_output": word}
                if self.hang:
                    await asyncio.sleep(3600)
            if self.error is not None:
                raise self.error
            counts = {"prompt_tokens": 5, "completion_tokens": len(self.words)}
            yield {"text_output": "", "finish_reason": self.finish, **counts}
        except (GeneratorExit, asyncio.CancelledError):
            self.left = True
            raise

    async def ready(self) -> bool:
        return self.error is None

    async def metrics_page(self) -> bytes:
        return b"nv_inference_count 1\n"

    def forget(self) -> None:
        self.forgotten += 1


@dataclass
class Got:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream; the end as it is written."""
        found = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [one if one == "[DONE]" else json.loads(one) for one in found]


def door_of(
    triton: FakeTriton, limits: DoorLimits | None = None, keys: Keys | None = None, log: Path | None = None,
    repository: Path | None = None,
) -> Door:  # fmt: skip
    return make_door(
        triton,  # type: ignore[arg-type]
        limits or DoorLimits(), keys, repository, Readiness(supervised=False), AccessLog(log),
    )  # fmt: skip


async def ask(
    door: Door, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = JSON, leave_after: int = -1
) -> Got:
    """`leave_after`: the client goes when it has seen so many pieces of the answer."""
    sent: list[Any] = []
    gone = asyncio.Event()
    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    if body and not any(name in headers for name in ("content-length", "transfer-encoding")):
        given.append((b"content-length", str(len(body)).encode()))
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            gone.set()

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": given, "client": ("10.0.0.9", 5), "root_path": "", "http_version": "1.1", "scheme": "http",
    }  # fmt: skip
    await asyncio.wait_for(door(scope, receive, send), 20)
    door.log.flush()
    if not sent:
        return Got(0, {}, b"")
    head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Got(sent[0]["status"], head, b"".join(item["body"] for item in sent[1:]))


def post(door: Door, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Got:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(ask(door, "POST", path, data, {**JSON, **(headers or {})}))


def get(door: Door, path: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Got:
    return asyncio.run(ask(door, method, path, headers=headers or {}))


@contextmanager
def gateway(model: str, http_port: int = 9, metrics_port: int = 9, *options: str) -> Iterator[int]:
    """The port of a gateway process. Port 9 is nobody's: no model's server answers."""
    command = [sys.executable, "-m", "runtime.gateway", "--model", model, "--triton-http-port", str(http_port)]
    command += ["--triton-metrics-port", str(metrics_port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline().split()[1])
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def exchange_raw(port: int, *parts: bytes, timeout_s: float = 20) -> bytes:
    """What comes back over one connection until its other side closes it; nothing where it is broken off."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except (ConnectionError, BrokenPipeError):
            pass  # it had seen enough; what it said may be there
        found = b""
        try:
            while piece := connection.recv(1 << 16):
                found += piece
        except ConnectionError:
            pass
    return found
