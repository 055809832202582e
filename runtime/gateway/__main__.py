"""`python -m runtime.gateway`: the process. Its supervisor is `runtime.server.gateway_process`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import BadEnvironment
from runtime.exposed import require_keys
from runtime.gateway.limits import DoorLimits
from runtime.gateway.readiness import Readiness

_LOOPBACK = "127.0.0.1"
_LIMITS = (
    "head_s", "body_s", "answer_s", "body_bytes", "bytes_in_flight", "connections_per_address", "requests",
    "requests_per_key", "rate_per_key",
)  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m runtime.gateway")
    parser.add_argument("--model", required=True, help="the one that is served")
    parser.add_argument("--triton-http-port", type=int, required=True)
    parser.add_argument("--triton-metrics-port", type=int, required=True)
    parser.add_argument("--repository", type=Path, help="holds the chat template")
    parser.add_argument("--address", default=_LOOPBACK)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--listener", type=int, help="file descriptor of a socket that listens already")
    parser.add_argument("--api-keys-file", type=Path)
    parser.add_argument(
        "--no-auth", action="store_true", help="an address of the network, and nobody is asked for a key"
    )
    parser.add_argument("--access-log", type=Path)
    parser.add_argument("--drain-s", type=float, default=30.0, help="what is running may take so long after SIGTERM")
    parser.add_argument("--supervised", action="store_true", help="standard input says what is ready, and ends with us")
    for name in _LIMITS:
        kind = float if name.endswith("_s") or name == "rate_per_key" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(DoorLimits, name))
    return parser.parse_args()


async def _serve(arguments: argparse.Namespace) -> None:
    import uvicorn

    from runtime.gateway.access_log import AccessLog
    from runtime.gateway.app import make_door
    from runtime.gateway.keys import Keys
    from runtime.gateway.protocol import bounded
    from runtime.gateway.triton import Triton
    from runtime.gateway.upstream import Upstream

    limits = DoorLimits(**{name: getattr(arguments, name) for name in _LIMITS})
    keys = None if arguments.api_keys_file is None else Keys.load(arguments.api_keys_file)
    require_keys(arguments.address, keys is not None, arguments.no_auth)
    readiness = Readiness(arguments.supervised)
    ports = (arguments.triton_http_port, arguments.triton_metrics_port)
    upstream, metrics = (Upstream(_LOOPBACK, port, limits.upstream_connections, limits.answer_bytes) for port in ports)
    log = AccessLog(arguments.access_log)
    triton = Triton(upstream, metrics, arguments.model)
    config = uvicorn.Config(
        make_door(triton, limits, keys, arguments.repository, readiness, log),
        http=bounded(limits), ws="none", lifespan="off", interface="asgi3", loop="none", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=max(1, int(arguments.drain_s)), backlog=1024,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a line for whatever a client sends
    server = _server_of(config)
    loop = asyncio.get_running_loop()

    def drain() -> None:
        readiness.draining = server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)
    if arguments.supervised:
        await loop.connect_read_pipe(lambda: _Supervisor(readiness, drain), sys.stdin)
    gc.freeze()  # what is there now stays: no collection need look at it
    await server.serve([_listener(arguments)])
    upstream.close()
    metrics.close()
    log.close()


def _server_of(config: Any) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are ours: uvicorn would raise them again at its end."""
            yield

    return Server(config)


class _Supervisor(asyncio.Protocol):
    """The pipe from whoever started us. Its end is theirs, whatever they died of."""

    def __init__(self, readiness: Readiness, drain: Any) -> None:
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


def main() -> None:
    import uvloop

    try:
        uvloop.run(_serve(_arguments()))
    except BadEnvironment as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
