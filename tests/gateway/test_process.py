"""A gateway as a process: TLS on both ports, files read again on SIGHUP, and an end for one that hangs."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import trustme

from runtime.errors import BadEnvironment
from runtime.gateway.tls import Certificate
from runtime.server.gateway_process import Doorway, GatewayProcess
from runtime.server.health import Health
from runtime.server.pulse import Pulse
from tests.conftest import wait_until
from tests.gateway.asking import exchange_raw, gateway_ports

LIVE = "/inference.GRPCInferenceService/ServerLive"


def _issue(authority: trustme.CA, folder: Path) -> tuple[Path, Path]:
    made = authority.issue_cert("localhost", "127.0.0.1")
    made.private_key_pem.write_to_path(folder / "key.pem")
    made.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    return folder / "cert.pem", folder / "key.pem"


def _write_keys(file: Path, key: str) -> None:
    file.write_text(f"ann:{hashlib.sha256(key.encode()).hexdigest()}\n")


def _status(port: int, path: str, context: ssl.SSLContext, key: str = "") -> int:
    connection = http.client.HTTPSConnection("localhost", port, timeout=20, context=context)
    try:
        connection.request("GET", path, headers={"authorization": f"Bearer {key}"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_both_ports_speak_tls_and_files_are_read_again(tmp_path: Path) -> None:
    authority = trustme.CA()
    cert, key = _issue(authority, tmp_path)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    _write_keys(tmp_path / "keys", "old")
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--grpc-port", "0")
    options += ("--api-keys-file", str(tmp_path / "keys"))
    with gateway_ports("m", 9, 9, *options) as ports:
        port, grpc_port = ports["gateway"], ports["grpc"]
        assert _status(port, "/healthz", context) == 200
        assert _status(port, "/v1/models", context, "old") == 200
        root = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        with grpc.secure_channel(f"localhost:{grpc_port}", root, [("grpc.enable_http_proxy", 0)]) as channel:
            assert channel.unary_unary(LIVE)(b"", timeout=20) == b"\x08\x01"
        assert not exchange_raw(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP")

        (tmp_path / "keys").write_text("nonsense\n")  # a fault changes nothing
        os.kill(ports["pid"], signal.SIGHUP)
        first = [ssl.get_server_certificate(("127.0.0.1", one), timeout=20) for one in (port, grpc_port)]
        _issue(authority, tmp_path)
        _write_keys(tmp_path / "keys", "new")
        assert _status(port, "/v1/models", context, "old") == 200
        os.kill(ports["pid"], signal.SIGHUP)
        assert wait_until(lambda: _status(port, "/v1/models", context, "new") == 200, 20)
        assert _status(port, "/v1/models", context, "old") == 401
        second = [ssl.get_server_certificate(("127.0.0.1", one), timeout=20) for one in (port, grpc_port)]
        assert second[0] == second[1] != first[0] == first[1]


def test_files_that_do_not_belong_together_are_refused_and_the_old_stay(tmp_path: Path) -> None:
    cert, key = _issue(trustme.CA(), tmp_path)
    found = Certificate(cert, key)
    trustme.CA().issue_cert("other").private_key_pem.write_to_path(key)
    with pytest.raises(BadEnvironment, match="--tls-key"):
        found.read()
    with pytest.raises(BadEnvironment, match="belong together"):
        Doorway(0, tls_cert=cert).require_closed()


def _lost(pulse: Pulse, turns: int = 60) -> bool:
    """Whether it was found lost within so many looks, each after the question before was answered."""
    for number in range(turns):
        if pulse.lost(10.0 * number):
            return True
        time.sleep(0.02)
    return False


def test_silence_is_a_hang_and_a_refusal_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = silent.getsockname()
        pulse = Pulse(address, False, 0.1)
        assert _lost(pulse)
        pulse.close()
    gone = Pulse(address, False, 0.1)
    assert not _lost(gone, 20)
    assert gone.felt
    gone.close()


def _turns_until(process: GatewayProcess, condition: Callable[[], bool], limit_s: float) -> bool:
    def turned() -> bool:
        process.turn()
        return condition()

    return wait_until(turned, limit_s)


def test_a_gateway_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    server = SimpleNamespace(
        log=tmp_path / "triton.log", repository=tmp_path, settings=SimpleNamespace(ensemble="m"),
        ports=SimpleNamespace(http=9, metrics=9), exposure=SimpleNamespace(log_to_stderr=False),
    )  # fmt: skip
    process = GatewayProcess(Doorway(0, hang_s=5.0, grpc_port=0, drain_s=1), server, Health())  # type: ignore[arg-type]
    try:
        assert _turns_until(process, lambda: process._pulse.felt, 120)
        first = process.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        assert _turns_until(process, lambda: process.pid not in (None, first) and process._pulse.felt, 120)
        assert process.grpc_address is not None
        with grpc.insecure_channel(process.grpc_address, [("grpc.enable_http_proxy", 0)]) as channel:
            assert channel.unary_unary(LIVE)(b"", timeout=60, wait_for_ready=True) == b"\x08\x01"
    finally:
        process.stop()


def test_a_busy_port_of_grpc_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken,
        pytest.raises(BadEnvironment, match="choose another with --gateway-grpc-port"),
    ):
        Doorway(0, grpc_port=taken.getsockname()[1]).hold_grpc()
