"""One gateway from start to drain: its servers, its signals, and the pipe from its supervisor.

SIGTERM and SIGINT drain; SIGHUP reads the keys and the certificate again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from runtime.errors import BadEnvironment
from runtime.exposed import require_keys
from runtime.gateway.app import DoorFiles, Doors, make_doors
from runtime.gateway.feedback import FeedbackSink
from runtime.gateway.keys import Keys
from runtime.gateway.limits import DoorLimits
from runtime.gateway.protocol import bounded
from runtime.gateway.readiness import Readiness
from runtime.gateway.spans import OtlpSpans
from runtime.gateway.tls import Certificate
from runtime.gateway.triton import TritonHttp
from runtime.gateway.upstream import Upstream
from runtime.gateway.versions import Place
from runtime.otlp import traces_url
from runtime.secrets_file import read_secret

_LOOPBACK = "127.0.0.1"


async def serve(arguments: argparse.Namespace, limits: DoorLimits, sink: FeedbackSink | None = None) -> None:
    """Until it has drained; `sink` is where feedback goes. Raises BadEnvironment for what it cannot be started with."""
    keys = _keys(arguments)
    require_keys(arguments.address, keys is not None, arguments.no_auth)
    certificate = _certificate(arguments)
    readiness = Readiness(arguments.supervised)
    upstreams: list[Upstream] = []

    main_ports = arguments.triton_http_port, arguments.triton_metrics_port

    def connect(place: Place) -> TritonHttp:
        most = limits.upstream_connections, limits.answer_bytes
        http, metrics = (Upstream(_LOOPBACK, port, *most) for port in place.ports or main_ports)
        upstreams.extend((http, metrics))
        return TritonHttp(http, metrics, arguments.model, place.model)

    secret = None if arguments.control_secret_file is None else read_secret(arguments.control_secret_file).encode()
    spans = None if arguments.otlp_endpoint is None else OtlpSpans(traces_url(arguments.otlp_endpoint), arguments.model)
    files = DoorFiles(
        arguments.repository, arguments.access_log, arguments.mirror_log, secret, arguments.vllm_metrics, sink, spans
    )  # fmt: skip
    doors = make_doors(connect(Place()), limits, keys, readiness, files, connect)
    server = _http_server(doors, limits, certificate, arguments.drain_s)
    grpc = None
    if arguments.grpc_port is not None:
        grpc, port = await doors.grpc.open(
            _host_port(arguments.address, arguments.grpc_port), certificate, arguments.connection_age_s
        )
        if arguments.listener is None:
            print(f"grpc {port}", flush=True)

    def drain() -> None:
        readiness.draining = server.should_exit = True

    await _listen_to_signals(arguments, doors, certificate, readiness, drain)
    gc.freeze()  # what is there now stays: no collection need look at it
    try:
        await server.serve([_listener(arguments)])
    finally:
        if grpc is not None:
            await grpc.stop(arguments.drain_s)
        for one in upstreams:
            one.close()
        for file in doors.files:
            file.close()
        if spans is not None:
            spans.close()


def _keys(arguments: argparse.Namespace) -> Keys | None:
    return None if arguments.api_keys_file is None else Keys.load(arguments.api_keys_file)


def _certificate(arguments: argparse.Namespace) -> Certificate | None:
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise BadEnvironment("--tls-cert and --tls-key belong together; give both")
    return None if arguments.tls_cert is None else Certificate(arguments.tls_cert, arguments.tls_key)


def _host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


async def _listen_to_signals(
    arguments: argparse.Namespace, doors: Doors, certificate: Certificate | None, readiness: Readiness,
    drain: Callable[[], None],
) -> None:  # fmt: skip
    loop = asyncio.get_running_loop()

    def read_again() -> None:
        """What cannot be read stays as it was: a door that shuts for a typing error helps nobody."""
        try:
            keys = _keys(arguments)
            if certificate is not None:
                certificate.read()
        except BadEnvironment as error:
            print(f"gateway: SIGHUP changes nothing: {error}", file=sys.stderr, flush=True)
            return
        doors.guards.replace_keys(keys)
        print("gateway: keys and certificate are read again", file=sys.stderr, flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)
    loop.add_signal_handler(signal.SIGHUP, read_again)
    if arguments.supervised:
        await loop.connect_read_pipe(lambda: _Supervisor(readiness, drain), sys.stdin)


def _http_server(doors: Doors, limits: DoorLimits, certificate: Certificate | None, drain_s: float) -> uvicorn.Server:
    config = uvicorn.Config(
        doors.http,
        http=bounded(limits), ws="none", lifespan="off", interface="asgi3", loop="none", log_config=None,
        access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]  # it is added to a time
        timeout_graceful_shutdown=max(1, int(drain_s)), backlog=1024,
        ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
    )  # fmt: skip
    for name in ("uvicorn.error", "grpc", "grpc._cython.cygrpc"):  # a line for whatever a client sends
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return _Server(config, limits.head_s)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, handshake_s: float) -> None:
        super().__init__(config)
        self._handshake_s = handshake_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would raise them again at its end."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, for sockets that listen; a TLS handshake has the time that a head has, and not a minute."""
        config, loop = self.config, asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return made

        timeout: dict[str, Any] = {} if config.ssl is None else {"ssl_handshake_timeout": self._handshake_s}
        self.servers = [
            await loop.create_server(protocol, sock=one, ssl=config.ssl, backlog=config.backlog, **timeout)
            for one in sockets or []
        ]
        self.started = True


class _Supervisor(asyncio.Protocol):
    """The pipe from whoever started us. Its end is theirs, whatever they died of."""

    def __init__(self, readiness: Readiness, drain: Callable[[], None]) -> None:
        self._readiness, self._drain, self._rest = readiness, drain, b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._readiness.told(line.decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._drain()


def _listener(arguments: argparse.Namespace) -> socket.socket:
    if arguments.listener is not None:
        return socket.socket(fileno=arguments.listener)
    found = socket.create_server((arguments.address, arguments.port), backlog=1024)
    print(f"gateway {found.getsockname()[1]}", flush=True)
    return found
