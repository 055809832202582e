"""`python -m runtime.gateway`: the process. Its supervisor is `runtime.server.gateway_process`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import BadEnvironment, InputError
from runtime.gateway.limits import DoorLimits

if TYPE_CHECKING:
    from runtime.gateway.feedback import FeedbackSink

_LOOPBACK = "127.0.0.1"
_LIMITS = (
    "head_s", "body_s", "keep_alive_s", "answer_s", "body_bytes", "bytes_in_flight", "connections_per_address",
    "requests", "requests_per_key", "rate_per_key", "inflated_bytes",
)  # fmt: skip


def make_parser(program: str = "python -m runtime.gateway") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--model", required=True, help="the one that is served")
    parser.add_argument("--triton-http-port", type=int, required=True)
    parser.add_argument("--triton-metrics-port", type=int, required=True)
    parser.add_argument("--repository", type=Path, help="holds the chat template")
    parser.add_argument("--address", default=_LOOPBACK)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--grpc-port", type=int, help="KServe over gRPC, beside; 0: any free one")
    parser.add_argument("--tls-cert", type=Path, help="PEM; for both doors")
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--listener", type=int, help="file descriptor of a socket that listens already")
    parser.add_argument("--api-keys-file", type=Path)
    parser.add_argument(
        "--no-auth", action="store_true", help="an address of the network, and nobody is asked for a key"
    )
    parser.add_argument("--access-log", type=Path, help="a line of JSON a request; -: standard error")
    parser.add_argument("--control-secret-file", type=Path, help="opens /control/versions to who sends what is in it")
    parser.add_argument("--mirror-log", type=Path, help="what a mirrored version answered")
    parser.add_argument("--vllm-metrics", action="store_true", help="a generator's figures under vLLM's names as well")
    parser.add_argument("--otlp-endpoint", help="a span for each request goes to this collector, by OTLP over HTTP")
    parser.add_argument("--drain-s", type=float, default=30.0, help="what is running may take so long after SIGTERM")
    parser.add_argument("--connection-age-s", type=int, help="close gRPC connections gently after this long")
    parser.add_argument("--supervised", action="store_true", help="standard input says what is ready, and ends with us")
    for name in _LIMITS:
        kind = float if name.endswith("_s") or name == "rate_per_key" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(DoorLimits, name))
    return parser


def main(
    parser: argparse.ArgumentParser | None = None,
    open_sink: Callable[[argparse.Namespace], FeedbackSink | None] = lambda arguments: None,
) -> None:
    """`open_sink`: where feedback goes, by the options that `parser` has besides."""
    import uvloop

    from runtime.gateway.process import serve

    try:
        arguments = (parser or make_parser()).parse_args()
        limits = DoorLimits(**{name: getattr(arguments, name) for name in _LIMITS})
        sink = open_sink(arguments)
        try:
            uvloop.run(serve(arguments, limits, sink))
        finally:
            if sink is not None:
                sink.close()
    except (BadEnvironment, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
