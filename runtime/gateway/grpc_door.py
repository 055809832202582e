"""The door's gRPC side: eight methods of KServe's service, behind the guards of the HTTP side.

Messages come as bytes, and none is read before its caller's key has been checked. Every method is served as a stream,
which on the wire a single answer is too, because gRPC for Python would else read the message first. What is asked of
Triton goes over its HTTP port like everything else: its gRPC can crash on a cancellation that meets a stream's end.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import BadEnvironment
from runtime.gateway.door import Witnesses, refusal
from runtime.gateway.exchange import GONE_STATUS, VERSION_HEADER
from runtime.gateway.generate import Generate, read_fields
from runtime.gateway.grpc_kserve import (
    InferCall,
    infer_response,
    piece_blobs,
    read_infer,
    read_message,
    require_outputs,
    status_name,
    stream_error,
    stream_response,
)
from runtime.gateway.grpc_wire import EMPTY, MODEL
from runtime.gateway.guards import Guards
from runtime.gateway.kserve import EXTENSIONS, SERVER, require_version
from runtime.gateway.limits import DoorLimits
from runtime.gateway.model_config import config_message
from runtime.gateway.refused import RETRY_S, Refused
from runtime.gateway.tls import Certificate
from runtime.gateway.trip import TRIP, Trip, read_trace
from runtime.gateway.triton import Facts, Triton

_SERVICE = "/inference.GRPCInferenceService/"
_AT_ONCE = 64  # requests of one stream
_OPEN = ("ServerLive", "ServerReady")
Method = Callable[["GrpcCall"], Awaitable[None]]


@dataclass
class GrpcCall:
    """One call, or one request of a stream: what the log and the counters tell of it. `id` is ours."""

    context: Any
    label: str
    address: str
    caller: str = ""
    method: str = "GRPC"
    status: int = GONE_STATUS
    bytes_in: int = 0
    bytes_out: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    trip: Trip = field(default_factory=Trip)

    @property
    def trace(self) -> str:
        return self.trip.trace

    async def write(self, message: bytes) -> None:
        self.bytes_out += len(message)
        self.trip.answers()
        await self.context.write(message)


class GrpcDoor:
    """`generate` is the HTTP side's: streams of generators are its pieces."""

    def __init__(
        self, triton: Triton, generate: Generate, guards: Guards, witnesses: Witnesses,
        is_ready: Callable[[], Awaitable[bool]],
    ) -> None:  # fmt: skip
        self._triton, self._generate, self._guards = triton, generate, guards
        self._witnesses, self._is_ready = witnesses, is_ready
        self._methods: dict[str, Method] = {
            "ServerLive": self._live, "ServerReady": self._ready, "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata, "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config, "ModelInfer": self._infer, "ModelStreamInfer": self._stream,
        }  # fmt: skip

    @property
    def _limits(self) -> DoorLimits:
        return self._guards.limits

    async def open(
        self, address: str, certificate: Certificate | None = None, connection_age_s: int | None = None
    ) -> tuple[Any, int]:
        """A server that listens, and its port. Connections older than `connection_age_s` are closed when their calls
        have ended. Raises BadEnvironment for an address that cannot be used."""
        import grpc

        limits = self._limits
        ages = [] if connection_age_s is None else [
            ("grpc.max_connection_age_ms", 1000 * connection_age_s),
            ("grpc.max_connection_age_grace_ms", 1000 * int(limits.answer_s)),
        ]  # fmt: skip
        server = grpc.aio.server(
            maximum_concurrent_rpcs=limits.requests,
            options=[
                ("grpc.per_message_decompression", 0),  # whatever its size; see grpc_wire
                ("grpc.max_receive_message_length", limits.body_bytes),
                ("grpc.max_send_message_length", limits.answer_bytes),
                ("grpc.max_metadata_size", limits.header_bytes // 2),
                ("grpc.absolute_max_metadata_size", limits.header_bytes),
                ("grpc.max_allowed_incoming_connections", limits.connections),
                ("grpc.max_concurrent_streams", max(1, limits.requests_per_key)),
                ("grpc.server_handshake_timeout_ms", int(1000 * limits.head_s)),
                ("grpc.max_connection_idle_ms", 1000 * int(limits.answer_s)),
                ("grpc.so_reuseport", 1),  # the port is held by whoever starts us again
                *ages,
            ],
        )
        server.add_generic_rpc_handlers((_handlers(self._serve, self._methods),))
        try:
            if certificate is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, certificate.grpc_credentials())
        except RuntimeError as error:
            raise BadEnvironment(f"gRPC cannot listen on {address}; choose another --grpc-port") from error
        await server.start()
        return server, int(port)

    async def _serve(self, name: str, context: Any) -> None:
        call = GrpcCall(context, f"{_SERVICE}{name}", _address(context.peer()))
        call.trip.trace = read_trace(_texts(context).get("traceparent", ""))
        context.set_trailing_metadata((("x-request-id", call.id),))
        try:
            async with self._answering(call):
                await self._admitted(name, call)
        except Refused as refused:
            late = (("retry-after", str(RETRY_S)),) if refused.status in (429, 503) else ()
            await context.abort(_code(refused), refused.message, (("x-request-id", call.id), *late))

    @asynccontextmanager
    async def _answering(self, call: GrpcCall) -> AsyncIterator[None]:
        """Raises Refused for whatever went wrong in it, but for a client that has gone."""
        call.trip.id = call.id
        self._witnesses.begun(call)
        try:
            yield
            call.status = 200
        except Exception as error:  # whatever it was, the client is told no more than a status
            refused = refusal(error, self._triton.forget)
            call.status = refused.status
            raise refused from error
        finally:
            self._witnesses.ended(call)

    async def _admitted(self, name: str, call: GrpcCall) -> None:
        headers = _headers(call.context)
        call.trip.pinned = headers.get(VERSION_HEADER.decode(), "")
        if name in _OPEN:
            await self._methods[name](call)
            return
        call.caller = self._guards.caller(headers.get("authorization", "").encode(), call.address)
        call.trip.salt = self._guards.salt(call.caller)
        with self._guards.admitted(call.caller):
            if name == "ModelStreamInfer":
                await self._methods[name](call)
                return
            with self._guards.in_time():  # a client's own deadline cancels this
                await self._methods[name](call)

    async def _read(self, call: GrpcCall, seconds: float) -> bytes | None:
        """The next message, None behind the last. Raises Refused for one that does not come."""
        import grpc

        try:
            async with asyncio.timeout(seconds):
                message = await call.context.read()
        except TimeoutError as error:
            raise Refused(408, f"no message came within {seconds:g} s") from error
        if message is grpc.aio.EOF:
            return None
        call.bytes_in += len(message)
        return bytes(message)

    async def _only(self, call: GrpcCall) -> bytes:
        message = await self._read(call, self._limits.body_s)
        if message is None:
            raise Refused(400, "the call has no message")
        return message

    async def _live(self, call: GrpcCall) -> None:
        await self._tell(call, "ServerLive", live=True)

    async def _ready(self, call: GrpcCall) -> None:
        await self._tell(call, "ServerReady", ready=await self._is_ready())

    async def _server_metadata(self, call: GrpcCall) -> None:
        await self._tell(call, "ServerMetadata", name=SERVER, version="2", extensions=EXTENSIONS)

    async def _tell(self, call: GrpcCall, method: str, **told: Any) -> None:
        from tritonclient.grpc import service_pb2

        read_message(await self._only(call), getattr(service_pb2, f"{method}Request"), EMPTY, self._limits)
        await call.write(getattr(service_pb2, f"{method}Response")(**told).SerializeToString())

    async def _model_ready(self, call: GrpcCall) -> None:
        from tritonclient.grpc import service_pb2

        asked = read_message(await self._only(call), service_pb2.ModelReadyRequest, MODEL, self._limits)
        await self._served(asked.name, asked.version)
        told = service_pb2.ModelReadyResponse(ready=await self._triton.ready())
        await call.write(told.SerializeToString())

    async def _model_metadata(self, call: GrpcCall) -> None:
        from tritonclient.grpc import service_pb2

        asked = read_message(await self._only(call), service_pb2.ModelMetadataRequest, MODEL, self._limits)
        facts = await self._served(asked.name, asked.version)
        kind = service_pb2.ModelMetadataResponse
        tensors = {
            side: [
                kind.TensorMetadata(name=one["name"], datatype=one["datatype"], shape=one["shape"])
                for one in facts.metadata[side]
            ]
            for side in ("inputs", "outputs")
        }
        platform = facts.metadata.get("platform", "")
        told = kind(name=asked.name, versions=[str(facts.version)], platform=platform, **tensors)
        await call.write(told.SerializeToString())

    async def _model_config(self, call: GrpcCall) -> None:
        from tritonclient.grpc import service_pb2

        asked = read_message(await self._only(call), service_pb2.ModelConfigRequest, MODEL, self._limits)
        await call.write(config_message(await self._served(asked.name, asked.version)))

    async def _infer(self, call: GrpcCall) -> None:
        data = await self._only(call)
        with self._guards.holding(len(data)):
            asked = read_infer(data, self._limits)
            facts = await self._facts_for(asked)
            if facts.generates:
                raise Refused(400, f"{self._triton.model} streams; use ModelStreamInfer")
            message = await self._inferred(call, asked, facts)
        await call.write(message.SerializeToString())

    async def _facts_for(self, asked: InferCall) -> Facts:
        """Raises Refused for what the version that it goes to does not have."""
        facts = await self._served(asked.model, asked.version)
        require_outputs(asked.outputs, facts)
        return facts

    async def _served(self, model: str, version: str) -> Facts:
        """Of the version that the request goes to: the one that its message names, if it names one. Raises Refused."""
        trip = TRIP.get()
        if trip.pinned and version and trip.pinned != version:
            raise Refused(400, f"{VERSION_HEADER.decode()} and model_version name different versions")
        trip.pinned = trip.pinned or version
        return await require_version(self._triton, model, version)

    async def _inferred(self, call: GrpcCall, asked: InferCall, facts: Facts) -> Any:
        found = await self._triton.infer(asked.inputs, asked.outputs, call.id, asked.parameters)
        return infer_response(self._triton.model, facts.version, asked.id, found.values())

    async def _stream(self, call: GrpcCall) -> None:
        """Requests of one stream run together. A generator's pieces go out as they come, other answers in order."""
        gate, writing = asyncio.Semaphore(_AT_ONCE), asyncio.Lock()
        before: asyncio.Event | None = None
        async with asyncio.TaskGroup() as group:
            while (data := await self._read(call, self._limits.answer_s)) is not None:
                await gate.acquire()
                own = GrpcCall(_Writer(call.context, writing), f"{call.label}/request", call.address, call.caller)
                own.bytes_in, own.trip, ended = (
                    len(data),
                    Trip("", call.trace, call.trip.pinned, salt=call.trip.salt),
                    asyncio.Event(),
                )
                group.create_task(self._request(own, data, before, ended, gate))
                before = ended

    async def _request(
        self, call: GrpcCall, data: bytes, before: asyncio.Event | None, ended: asyncio.Event, gate: asyncio.Semaphore
    ) -> None:
        asked: InferCall | None = None
        try:
            async with self._answering(call):
                with self._guards.in_time(), self._guards.admitted(call.caller), self._guards.holding(len(data)):
                    asked = read_infer(data, self._limits)
                    facts = await self._facts_for(asked)
                    if facts.generates:
                        await self._pieces(call, asked, facts)
                    else:
                        message = await self._inferred(call, asked, facts)
                        if before is not None:
                            await before.wait()
                        await call.write(stream_response(message, final=True))
        except Refused as refused:
            await call.write(stream_error(refused, "" if asked is None else asked.id))
        finally:
            ended.set()
            gate.release()

    async def _pieces(self, call: GrpcCall, asked: InferCall, facts: Facts) -> None:
        fields = read_fields(asked.fields(), facts, self._triton.model)
        async with aclosing(self._generate.pieces(facts, {**fields, "id": call.id})) as pieces:
            async for piece in pieces:
                blobs = piece_blobs(piece, facts, asked.outputs)
                message = infer_response(self._triton.model, facts.version, asked.id, blobs)
                await call.write(stream_response(message, final="finish_reason" in piece))


class _Writer:
    """gRPC takes one message of a call at a time."""

    def __init__(self, context: Any, lock: asyncio.Lock) -> None:
        self._context, self._lock = context, lock

    async def write(self, message: bytes) -> None:
        async with self._lock:
            await self._context.write(message)


def _handlers(serve: Callable[[str, Any], Awaitable[None]], names: Any) -> Any:
    import grpc

    def handler(name: str) -> Any:
        async def answer(_: object, context: Any) -> None:
            await serve(name, context)

        return grpc.stream_stream_rpc_method_handler(answer)

    known = {f"{_SERVICE}{name}": handler(name) for name in names}

    class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            """None, which is UNIMPLEMENTED, for all that is not one of them."""
            return known.get(details.method)

    return Handlers()


def _texts(context: Any) -> dict[str, str]:
    return {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}


def _headers(context: Any) -> dict[str, str]:
    """Raises Refused for those that ask for what is not done here. None of them goes on to Triton."""
    found = _texts(context)
    if found.get("triton_grpc_error", "false").lower() != "false":
        raise Refused(400, "triton_grpc_error is not taken: errors of a stream are its messages")
    return found


def _address(peer: str) -> str:
    """Of `ipv4:127.0.0.1:53426` and `ipv6:%5B::1%5D:53426`."""
    return peer.partition(":")[2].rpartition(":")[0].removeprefix("%5B").removesuffix("%5D")


def _code(refused: Refused) -> Any:
    import grpc

    return getattr(grpc.StatusCode, status_name(refused))
