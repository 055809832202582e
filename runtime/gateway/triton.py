"""Triton behind the door: what it serves, and inference as this gateway asks for it. Nothing of a client's is passed on
as it came: requests are built here, tensors travel as binary.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from runtime.errors import ServingError
from runtime.gateway.refused import STUB_ENDED, Refused, upstream_refusal
from runtime.gateway.trip import TRIP
from runtime.gateway.upstream import Upstream, UpstreamAnswer
from runtime.generation.interface import CACHE_SALT
from runtime.model_config import QUEUE_SIZE

NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
    "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
_FACTS_S = 10.0  # how long what is known of a model is believed: a pod may load another version
_EVENT_BYTES = 1 << 20
_MISTRUST_S = 30.0  # at most: a server that has lost a stub is ended by its supervisor within seconds
_BINARY = b"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n"


class Blob(NamedTuple):
    """A tensor as it travels: `data` is little-endian, of BYTES each element after its length in 4 bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> NDArray[Any]:
        """Not for BYTES."""
        return np.frombuffer(self.data, NUMPY[self.datatype]).reshape(self.shape)

    def total(self) -> int:
        """Of whole numbers. For few of them numpy's own sum takes ten times as long."""
        return sum(memoryview(self.data).cast(np.dtype(NUMPY[self.datatype]).char))  # type: ignore[call-overload]


@dataclass(frozen=True)
class Facts:
    """Of the one model that is served. `metadata` is Triton's own answer; `optional`: inputs that may be left out;
    `places`: inferences that the model may have been asked for and not answered, None where it bounds them itself."""

    version: int
    max_batch_size: int
    metadata: dict[str, Any]
    optional: frozenset[str] = frozenset()
    places: int | None = None

    @cached_property
    def outputs(self) -> frozenset[str]:
        return frozenset(item["name"] for item in self.metadata["outputs"])

    @cached_property
    def inputs(self) -> frozenset[str]:
        return frozenset(item["name"] for item in self.metadata["inputs"])

    @cached_property
    def generates(self) -> bool:
        return "text_output" in self.outputs

    @cached_property
    def embeds(self) -> bool:
        return "embedding" in self.outputs

    @cached_property
    def width(self) -> int:
        """Of a vector."""
        return int(next(item["shape"][-1] for item in self.metadata["outputs"] if item["name"] == "embedding"))


def pack_texts(texts: Sequence[bytes]) -> bytes:
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def unpack_texts(data: bytes, most: int) -> list[bytes]:
    """Raises ValueError for what is not framed so, or holds more than `most`."""
    found: list[bytes] = []
    place = 0
    while place < len(data):
        end = place + 4 + int.from_bytes(data[place : place + 4], "little")
        if place + 4 > len(data) or end > len(data) or len(found) == most:
            raise ValueError("lengths do not fit")
        found.append(data[place + 4 : end])
        place = end
    return found


class Triton(Protocol):
    """The model's server, as handlers see it."""

    @property
    def model(self) -> str: ...

    async def facts(self) -> Facts: ...

    async def infer(
        self, inputs: Sequence[Blob], outputs: Sequence[str], request_id: str, parameters: Mapping[str, Any]
    ) -> dict[str, Blob]: ...

    def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]: ...

    async def ready(self) -> bool: ...

    async def metrics_page(self) -> bytes: ...

    def forget(self) -> None: ...


class TritonHttp:
    """One model on one server. `there`: its name there, where it has another one than for clients."""

    def __init__(self, upstream: Upstream, metrics: Upstream, model: str, there: str | None = None) -> None:
        self._upstream, self._metrics, self.model = upstream, metrics, model
        self._path = f"/v2/models/{there or model}"
        self._facts: Facts | None = None
        self._known = 0.0
        self._asked = 0  # inferences that have no answer yet
        self._stubs_ended = 0
        self._mistrusted_until = 0.0

    async def facts(self) -> Facts:
        """Raises Refused when the model is not there, UpstreamGone when the server is not."""
        if self._facts is None or time.monotonic() - self._known > _FACTS_S:
            metadata = {**await self._get(self._path), "name": self.model}
            config = await self._get(f"{self._path}/config")
            versions = [int(item) for item in metadata.get("versions", [])]
            optional = frozenset(item["name"] for item in config.get("input", []) if item.get("optional"))
            size = int(config.get("max_batch_size", 0))
            self._facts = Facts(max(versions, default=0), size, metadata, optional, await self._places(config))
            self._known = time.monotonic()
        return self._facts

    async def _places(self, config: dict[str, Any]) -> int | None:
        """For those who wait, and for a full batch of each copy that computes: Triton knows on how many GPUs they are.
        The first step of an ensemble reads the texts."""
        queue_size = config.get("parameters", {}).get(QUEUE_SIZE, {}).get("string_value")
        if queue_size is None:
            return None
        computing = await self._get(f"/v2/models/{config['ensemble_scheduling']['step'][1]['model_name']}/config")
        groups = computing["instance_group"]
        copies = sum(int(group["count"]) * max(1, len(group.get("gpus", ()))) for group in groups)
        return int(queue_size) + copies * max(1, int(computing["max_batch_size"]))

    def forget(self) -> None:
        """The server broke off: what comes back may be another version."""
        self._facts = None
        self._mistrusted_until = 0.0

    async def ready(self) -> bool:
        async with self._upstream.ask(b"GET", f"{self._path}/ready") as answer:
            await answer.read()
            return answer.status == 200

    async def _get(self, path: str) -> dict[str, Any]:
        async with self._upstream.ask(b"GET", path) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise Refused(503, "the model is not ready")
            found: dict[str, Any] = orjson.loads(body)
            return found

    async def infer(
        self, inputs: Sequence[Blob], outputs: Sequence[str], request_id: str, parameters: Mapping[str, Any]
    ) -> dict[str, Blob]:
        """Outputs by name. Raises Refused with what the model said against it, when all places are taken, when there
        is no answer within the `timeout` of `parameters`, in microseconds, and while answers are mistrusted.

        Triton 2.51 could bound its queue, but then lets requests wait half a second now and then. And it gives a stub
        up that has not moved for a second; when that one goes on, its answer is taken for that of another request. So
        what comes after Triton has told of such a stub is nobody's, until its server has gone.
        """
        if time.monotonic() < self._mistrusted_until:
            raise Refused(503, STUB_ENDED)
        places = (await self.facts()).places
        if places is not None and self._asked >= places:
            raise Refused(429, f"{places} requests wait or run already; try again later")
        timeout_us = parameters.get("timeout")
        self._asked += 1
        try:
            if not timeout_us:
                return await self._infer(inputs, outputs, request_id, parameters)
            rest = {name: value for name, value in parameters.items() if name != "timeout"}
            async with asyncio.timeout(timeout_us / 1e6):
                return await self._infer(inputs, outputs, request_id, rest)
        except TimeoutError:
            raise Refused(504, f"no answer within the request's own timeout, {timeout_us} us") from None
        finally:
            self._asked -= 1

    async def _infer(
        self, inputs: Sequence[Blob], outputs: Sequence[str], request_id: str, parameters: Mapping[str, Any]
    ) -> dict[str, Blob]:
        asked: dict[str, Any] = {
            "id": request_id,
            "inputs": [
                {
                    "name": item.name, "datatype": item.datatype, "shape": item.shape,
                    "parameters": {"binary_data_size": len(item.data)},
                }
                for item in inputs
            ],
            "parameters": {**parameters, "binary_data_output": True},
        }  # fmt: skip
        if outputs:
            asked["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        ended = self._stubs_ended
        header = orjson.dumps(asked)
        parts = (header, *(item.data for item in inputs))
        path = f"{self._path}/infer"
        trace = TRIP.get().trace_line
        async with self._upstream.ask(b"POST", path, _BINARY % len(header) + trace, parts) as answer:
            body = await answer.read()
            if answer.status != 200:
                refused = upstream_refusal(answer.status, _error_text(body))
                if refused.message == STUB_ENDED:
                    self._stubs_ended += 1
                    self._mistrusted_until = time.monotonic() + _MISTRUST_S
                raise refused
            if self._stubs_ended != ended:
                raise Refused(503, STUB_ENDED)
            return _outputs(answer, body)

    async def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The pieces of a generator's answer, as they are made. Leaving the iterator cancels the request. Raises
        Refused with what the model said against it, in the beginning or on the way."""
        trip = TRIP.get()
        body = orjson.dumps({**fields, CACHE_SALT: trip.salt} if trip.salt else fields)
        path = f"{self._path}/generate_stream"
        head = b"Content-Type: application/json\r\n" + trip.trace_line
        async with self._upstream.ask(b"POST", path, head, (body,), stream=True) as answer:
            if answer.status != 200:
                raise upstream_refusal(answer.status, _error_text(await answer.read()))
            rest = b""
            async with aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    *events, rest = (rest + piece).split(b"\n\n")
                    if len(rest) > _EVENT_BYTES:
                        raise Refused(500, "the model's answer cannot be read")
                    for event in events:
                        yield _event(event)

    async def metrics_page(self) -> bytes:
        async with self._metrics.ask(b"GET", "/metrics") as answer:
            return await answer.read()


def _event(event: bytes) -> dict[str, Any]:
    data: dict[str, Any] = orjson.loads(event.removeprefix(b"data:"))
    if "error" in data:
        raise upstream_refusal(400, str(data["error"]))
    return data


def _error_text(body: bytes) -> str:
    try:
        return str(orjson.loads(body.removeprefix(b"data:")).get("error", ""))
    except (ValueError, AttributeError):
        return ""


def _outputs(answer: UpstreamAnswer, body: bytes) -> dict[str, Blob]:
    try:
        place = int(answer.headers.get(b"inference-header-content-length", len(body)))
        header = orjson.loads(body[:place])
        found = {}
        for item in header["outputs"]:
            size = item["parameters"]["binary_data_size"]
            found[item["name"]] = Blob(item["name"], item["datatype"], tuple(item["shape"]), body[place : place + size])
            place += size
        return found
    except (ValueError, KeyError) as error:
        raise ServingError("the model's answer cannot be read") from error
