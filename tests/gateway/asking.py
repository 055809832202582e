"""Requests to a door in this process, over a model server of a few lines; and a gateway as a process of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from runtime.gateway.app import DoorFiles, Doors, make_doors
from runtime.gateway.cycle import CLIENT, Presence
from runtime.gateway.door import Door
from runtime.gateway.keys import Keys
from runtime.gateway.limits import DoorLimits
from runtime.gateway.readiness import Readiness
from runtime.gateway.triton import Blob, Facts, unpack_texts
from runtime.server.launch import TritonServer

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
    version: int = 3
    pair: bool = False
    logits: tuple[tuple[float, ...], ...] = ()  # of the rows, of a model that gives these and no embedding
    longest: int = 10  # characters; more are cut

    async def facts(self) -> Facts:
        outputs = ["text_output"] if self.generates else ["logits" if self.logits else "embedding", "token_count"]
        texts = ["text", "text_pair"] if self.pair else ["text"]
        metadata = {
            "name": self.model,
            "platform": "fake",
            "versions": [str(self.version)],
            "inputs": [
                *({"name": name, "datatype": "BYTES", "shape": [-1, 1]} for name in texts),
                *([{"name": "stream", "datatype": "BOOL", "shape": [-1, 1]}] if self.generates else []),
            ],
            "outputs": [
                {"name": name, "datatype": "BYTES" if name == "text_output" else "FP32", "shape": [-1, 2]}
                for name in outputs
            ],
        }
        return Facts(self.version, 2, metadata)

    async def infer(
        self, inputs: Sequence[Blob], outputs: Sequence[str], request_id: str, parameters: Mapping[str, Any]
    ) -> dict[str, Blob]:
        self.asked.append((inputs, outputs, request_id, parameters))
        if self.error is not None:
            raise self.error
        count = inputs[0].shape[0]
        vectors = np.arange(2 * count, dtype=np.float32)
        counts = np.full(count, 4, np.int32)
        rows = [unpack_texts(one.data, count) for one in inputs]
        cut = np.array([max(map(len, row)) > self.longest for row in zip(*rows, strict=True)], np.bool_)
        told = {"truncated": Blob("truncated", "BOOL", (count, 1), cut.tobytes())} if "truncated" in outputs else {}
        if self.logits:
            done = sum(one[0][0].shape[0] for one in self.asked[:-1])
            logits = np.array(self.logits[done : done + count], np.float32)
            told["logits"] = Blob("logits", "FP32", logits.shape, logits.tobytes())
        return told | {
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
    return doors_of(triton, limits, keys, log, repository).http


def doors_of(
    triton: FakeTriton, limits: DoorLimits | None = None, keys: Keys | None = None, log: Path | None = None,
    repository: Path | None = None, beside: Mapping[int, FakeTriton] = MappingProxyType({}),
    readiness: Readiness | None = None, **files: Any,
) -> Doors:  # fmt: skip
    """`beside`: further servers by their port; `readiness`: a supervisor's word, by default there is none."""
    return make_doors(
        triton, limits or DoorLimits(), keys, readiness or Readiness(supervised=False),
        DoorFiles(repository, log, **files),
        lambda place: beside[place.ports[0] if place.ports else 0],
    )  # fmt: skip


async def ask(
    door: Door, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = JSON, leave_after: int = -1
) -> Got:
    """`leave_after`: the client goes when it has seen so many pieces of the answer."""
    sent: list[Any] = []
    gone, presence = asyncio.Event(), Presence()
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
            asyncio.get_running_loop().call_soon(presence.leave)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": given, "client": ("10.0.0.9", 5), "root_path": "", "http_version": "1.1", "scheme": "http",
        CLIENT: presence,
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
    with gateway_ports(model, http_port, metrics_port, *options) as ports:
        yield ports["gateway"]


@contextmanager
def gateway_ports(model: str, http_port: int = 9, metrics_port: int = 9, *options: str) -> Iterator[dict[str, int]]:
    """By `gateway`, and `grpc` where `--grpc-port` asks for it; `pid` is the process."""
    command = [sys.executable, "-m", "runtime.gateway", "--model", model, "--triton-http-port", str(http_port)]
    command += ["--triton-metrics-port", str(metrics_port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = {"pid": process.pid}
    try:
        while "gateway" not in found:
            name, port = process.stdout.readline().split()
            found[name] = int(port)
        yield found
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


def post_json(port: int, path: str, body: Any, timeout_s: float = 60, **headers: str) -> tuple[int, Any]:
    """Status and answer of a server on loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST", path, json.dumps(body), {**JSON, **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def post_events(port: int, path: str, body: Any) -> list[Any]:
    """Events of a stream that ends by itself."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), dict(JSON))
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [json.loads(one.removeprefix("data: ")) for one in answer.read().decode().split("\n\n") if one]


def running(generator: TritonServer) -> float:
    """Requests that the generator works on, or holds."""
    page = urllib.request.urlopen(f"http://{generator.metrics_address}/metrics", timeout=20).read().decode()
    names = ("trireme_generation_running{", "trireme_generation_waiting{")
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(names))
