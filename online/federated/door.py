"""The coordinator over gRPC: who calls is told by the certificate, and nobody without one is heard."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from typing import Any

from online.federated import wire
from online.federated.coordinator import ClientRefused, Coordinator
from online.federated.tls import TlsIdentity, name_in
from runtime.errors import MachineError

_CALLS_EACH = 2  # threads for a client: one call under way, and one that it left hanging
_STOP_S = 2.0


@contextlib.contextmanager
def listening(coordinator: Coordinator, address: str, identity: TlsIdentity) -> Iterator[int]:
    """The port. Raises MachineError for an address that cannot be used."""
    import grpc

    threads = _CALLS_EACH * coordinator.offer.plan.most_clients + 2
    server = grpc.server(
        futures.ThreadPoolExecutor(threads, "federated"),
        options=[*wire.OPTIONS, ("grpc.so_reuseport", 0), ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                 ("grpc.keepalive_permit_without_calls", 1)],
        maximum_concurrent_rpcs=threads,
    )  # fmt: skip
    server.add_generic_rpc_handlers((_handlers(_Door(coordinator)),))
    try:
        port = server.add_secure_port(address, identity.of_server())
    except RuntimeError as error:
        raise MachineError(
            f"--listen {address}", got=str(error), expected="an address of this machine, and a port that is free",
            fix="choose another",
        ) from error  # fmt: skip
    server.start()
    try:
        yield port
    finally:
        server.stop(_STOP_S).wait()


def _handlers(door: _Door) -> Any:
    import grpc

    return grpc.method_handlers_generic_handler(
        wire.SERVICE,
        {
            "Join": grpc.unary_unary_rpc_method_handler(door.join),
            "Pull": grpc.unary_stream_rpc_method_handler(door.pull),
            "Push": grpc.stream_unary_rpc_method_handler(door.push),
        },
    )


class _Door:
    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()  # under way, by client

    def join(self, message: bytes, context: Any) -> bytes:
        with self._guarded(context) as client:
            return wire.said(self._coordinator.join(client, wire.read(wire.JoinHello, message)))

    def pull(self, message: bytes, context: Any) -> Iterator[bytes]:
        with self._guarded(context) as client:
            task, file = self._coordinator.pull(client, wire.read(wire.Ask, message))
            yield wire.said(task)
            if file is not None:
                yield from wire.pieces(file)

    def push(self, messages: Iterator[bytes], context: Any) -> bytes:
        with self._guarded(context) as client:
            first = wire.read(wire.Pushed, next(messages, b""))
            return wire.said(self._coordinator.push(client, first, messages))

    @contextlib.contextmanager
    def _guarded(self, context: Any) -> Iterator[str]:
        """The client's name. What goes wrong becomes a status that its side knows; `abort` raises."""
        import grpc

        client = name_in(context)
        if client is None:
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                "the certificate names no client: its common name is to be letters, digits, ., _ and -, at most 64",
            )
            raise AssertionError  # not reached
        with self._counted(client) as calls:
            if calls > _CALLS_EACH:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{client} has {_CALLS_EACH} calls under way")
            try:
                yield client
            except ClientRefused as error:
                code = grpc.StatusCode.ABORTED if error.anew else grpc.StatusCode.FAILED_PRECONDITION
                context.abort(code, str(error))
            except wire.NotOurs as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                why = "is full" if full else "does not answer"
                context.abort(grpc.StatusCode.UNAVAILABLE, f"the coordinator's disk {why}")

    @contextlib.contextmanager
    def _counted(self, client: str) -> Iterator[int]:
        with self._lock:
            self._calls[client] += 1
            calls = self._calls[client]
        try:
            yield calls
        finally:
            with self._lock:
                self._calls[client] -= 1
