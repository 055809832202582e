"""What a server keeps from everybody, though everybody on the machine can read its command line."""

from __future__ import annotations

import http.client
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tritonclient import grpc as triton_grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from runtime.server.launch import TritonServer

pytestmark = pytest.mark.triton

GRPC: list[Callable[[triton_grpc.InferenceServerClient], object]] = [
    lambda client: client.load_model("minilm"),
    lambda client: client.unload_model("minilm"),
    lambda client: client.get_model_repository_index(),
    lambda client: client.get_system_shared_memory_status(),
    lambda client: client.register_system_shared_memory("x", "/x", 1),
    lambda client: client.update_log_settings({"log_verbose_level": 1}),
    lambda client: client.update_trace_settings("minilm", {"trace_level": ["TIMESTAMPS"]}),
]
HTTP = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/minilm/load"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("GET", "/v2/logging"),
    ("GET", "/v2/trace/setting"),
]


@pytest.mark.parametrize("call", GRPC)
def test_control_is_refused_over_grpc(
    server: TritonServer, call: Callable[[triton_grpc.InferenceServerClient], object]
) -> None:
    with (
        triton_grpc.InferenceServerClient(server.grpc_address) as client,
        pytest.raises(InferenceServerException, match="restricted"),
    ):
        call(client)


@pytest.mark.parametrize(("method", "path"), HTTP)
def test_control_is_refused_over_http(server: TritonServer, method: str, path: str) -> None:
    connection = http.client.HTTPConnection(server.http_address, timeout=10)
    connection.request(method, path, body=b"{}", headers={"Content-Type": "application/json"})
    assert connection.getresponse().status == 403
    connection.close()


def _headers(server: TritonServer, option: str) -> set[tuple[str, str]]:
    """Name and value of what the command line says would open something."""
    found = set()
    for argument in psutil.Process(server.pid).cmdline():
        if argument.startswith(f"--{option}="):
            rule = argument.removeprefix(f"--{option}=")
            name, value = rule.partition(":")[2].split("=", 1)
            found.add((name, value))
    assert found
    return found


def _received(connection: socket.socket, until: bytes) -> bytes:
    got = b""
    try:
        while until not in got:
            part = connection.recv(65536)
            if not part:
                break
            got += part
    except OSError:
        pass
    return got


def _raw_http(server: TritonServer, name: str, value: str) -> bytes:
    """As a client could that checks nothing of what it sends."""
    with socket.create_connection(("127.0.0.1", server.ports.http), timeout=5) as connection:
        head = f"GET /v2/logging HTTP/1.1\r\nHost: x\r\n{name}: {value}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        return _received(connection, b"\r\n\r\n")


def _raw_grpc(server: TritonServer, method: str, message: bytes, *headers: tuple[str, str]) -> bytes:
    """The same for gRPC: HTTP/2 frames by hand, header fields as literals (RFC 7541, 6.2.2)."""

    def literal(text: str) -> bytes:
        data = text.encode()
        assert len(data) < 127
        return bytes([len(data)]) + data

    def frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
        return struct.pack(">I", len(data))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + data

    fields = [(":method", "POST"), (":scheme", "http"), (":path", f"/inference.GRPCInferenceService/{method}"),
              (":authority", "x"), ("te", "trailers"), ("content-type", "application/grpc"), *headers]  # fmt: skip
    block = b"".join(b"\0" + literal(name) + literal(value) for name, value in fields)
    body = b"\0" + struct.pack(">I", len(message)) + message
    with socket.create_connection(("127.0.0.1", server.ports.grpc), timeout=5) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        connection.sendall(frame(1, 4, 1, block) + frame(0, 1, 1, body))
        return _received(connection, b"grpc-status")


def test_what_the_command_line_tells_opens_nothing(server: TritonServer) -> None:
    status = service_pb2.SystemSharedMemoryStatusRequest().SerializeToString()
    shared_memory = ("SystemSharedMemoryStatus", status)
    accepted = b"grpc-accept-encoding"  # leads an answer that is none of refusal
    live = _raw_grpc(server, "ServerLive", b"", ("triton-grpc-protocol-known", "x"))
    assert accepted in live, "the client by hand can ask"
    assert b"restricted" in _raw_grpc(server, *shared_memory)
    for name, value in _headers(server, "grpc-restricted-protocol"):
        spellings = {name, name.replace("\n", ""), name.replace("\n", " "), name.replace("\n", "\r\n")}
        for spelling in spellings:
            assert accepted not in _raw_grpc(server, *shared_memory, (f"triton-grpc-protocol-{spelling}", value))
    for name, value in _headers(server, "http-restricted-api"):
        for spelling in {name, name.replace("\n", ""), name.replace("\n", "\n "), name.replace("\n", "\r\n\t")}:
            assert b" 200 " not in _raw_http(server, spelling, value)
    with triton_grpc.InferenceServerClient(server.grpc_address) as client:
        assert client.is_model_ready("minilm")


def test_shared_memory_is_its_owners_alone(server: TritonServer) -> None:
    """It holds what clients send, and what they get."""
    regions = list(Path("/dev/shm").glob(f"{server.shm_prefix}*"))
    assert regions
    assert all(region.stat().st_mode & 0o077 == 0 for region in regions)


def test_nothing_of_the_launchers_is_on_a_command_line(server: TritonServer) -> None:
    """Not the probe's id, and no word that looks like a secret."""
    tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    words = [word for process in tree for word in process.cmdline()]
    assert not any(server.probe_id in word for word in words)
    assert not any(re.search(r"(secret|token|admin)[^/]*=", word) for word in words)
