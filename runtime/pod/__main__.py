"""What runs in a pod: `python -m runtime.pod fetch | serve | ranks | probe`. The serving image holds no `builders`.

    fetch   init container: waits for a model that fits this node, and lays it out for Triton
    serve   Triton on loopback and the gateway before it under one supervisor, with health over HTTP; SIGTERM drains.
            With the store and a control secret it lays out further versions on request, for a load over gRPC
            (`trireme load-version`)
    ranks   a further pod of a replica that spans several: runs its ranks for the pod that serves
    probe   asks `serve` whether it is ready, gateway and all, for container engines that run a command

Exit codes as everywhere: 0 done, 1 a fault while serving, 2 an environment that cannot serve.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import BadEnvironment, ServerFault, ServingError
from runtime.heard import hear_signals
from runtime.secrets_file import read_secret

if TYPE_CHECKING:
    from runtime.pod.versions import Versions
    from runtime.ranks.hosts import Hosts

HEALTH_PORT = 8003
RANKS_PORT = 29400
_PROBE_S = 3.0
_AFTER_DRAIN_S = 5


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    hear_signals()
    try:
        options.run(options)
    except ServingError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime.pod", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    fetch = commands.add_parser("fetch", help="wait for a model that fits this node, and lay it out")
    fetch.set_defaults(run=_fetch)
    _store_arguments(fetch, required=True)
    fetch.add_argument("--into", type=Path, required=True, help="folder that becomes the model repository")
    fetch.add_argument("--wait-s", type=float, default=3600)
    fetch.add_argument("--version-file", type=Path, help="holds the version that was rolled out; absent before that")

    serve = commands.add_parser("serve", help="serve a model repository until SIGTERM")
    serve.set_defaults(run=_serve)
    serve.add_argument("repository", type=Path)
    _store_arguments(serve, required=False)
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        serve.add_argument(f"--{name}-port", type=int, default=port, help="Triton's own, on loopback")
    serve.add_argument("--health-port", type=int, default=HEALTH_PORT)
    serve.add_argument("--health-address", default="127.0.0.1")
    serve.add_argument("--ready-timeout-s", type=float, default=300)
    serve.add_argument("--exit-timeout-s", type=int, default=30, help="what is in flight gets this long after SIGTERM")
    serve.add_argument("--withdraw-s", type=float, default=0, help="not ready, and still answering, before that")
    _gateway_arguments(serve)
    serve.add_argument("--control-secret-file", type=Path, help="opens repository control; where absent, nobody may")
    _hosts_arguments(serve, required=False)

    ranks = commands.add_parser("ranks", help="run this host's ranks of a replica of several pods")
    ranks.set_defaults(run=_ranks)
    ranks.add_argument("repository", type=Path, help="the same as the leader's, at the same place")
    ranks.add_argument("--platform", choices=["cpu", "gpu"], required=True)
    ranks.add_argument("--host", type=int, required=True, help="1 for the first pod after the leader")
    _hosts_arguments(ranks, required=True)
    ranks.add_argument("--health-address", default="127.0.0.1")
    ranks.add_argument("--health-port", type=int, default=HEALTH_PORT)

    probe = commands.add_parser("probe", help="exit 0 when `serve` is ready")
    probe.set_defaults(run=_probe)
    probe.add_argument("--health-port", type=int, default=HEALTH_PORT)
    return parser


def _gateway_arguments(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--gateway-port", type=int, default=8080, help="OpenAI's API, KServe's and the metrics")
    serve.add_argument("--gateway-grpc-port", type=int, default=8081, help="KServe over gRPC")
    serve.add_argument("--gateway-address", default="127.0.0.1", help="others than loopback ask for keys")
    serve.add_argument("--api-keys-file", type=Path, help="name:sha256 a line; read again when it is replaced")
    serve.add_argument("--no-auth", action="store_true", help="the gateway answers anybody on any address")
    serve.add_argument("--tls-cert", type=Path, help="of the gateway, both ports: certificate chain in PEM")
    serve.add_argument("--tls-key", type=Path, help="its key, in PEM")
    serve.add_argument("--vllm-metrics", action="store_true", help="a generator's figures under vLLM's names as well")
    serve.add_argument("--otlp-endpoint", help="a span for each request goes to this collector, by OTLP over HTTP")
    serve.add_argument("--connection-age-s", type=int, help="close gRPC connections gently after this long")


def _hosts_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Of a replica that spans several pods."""
    parser.add_argument("--hosts", type=int, required=required, default=1, help="pods of a replica, the leader as well")
    parser.add_argument("--leader", required=required, help="host name of the pod that serves, as all know it")
    parser.add_argument("--ranks-each", type=int, required=required, help="ranks, and GPUs, of one pod")
    parser.add_argument("--hosts-secret-file", type=Path, required=required, help="the same on all hosts")
    parser.add_argument("--hosts-port", type=int, default=RANKS_PORT)
    parser.add_argument("--interface", default="eth0", help="network interface between the hosts")


def _store_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--store", type=Path, required=required, help="where `trireme publish` writes")
    parser.add_argument("--model", required=required, help="the spec's name")
    parser.add_argument("--platform", choices=["cpu", "gpu"], required=required)
    parser.add_argument("--graph-digest", default="any", help="SHA-256 of the graph that engines must come from")
    parser.add_argument("--threads", type=int, help="CPU threads of an instance, where the model leaves them open")
    parser.add_argument("--copy-weights", action="store_true", help="copies instead of links into the store")


def _fetch(options: argparse.Namespace) -> None:
    from runtime.pod.layout import Layout, lay_out
    from runtime.pod.model_store import wait_for
    from runtime.pod.node import Node

    offer = options.store, options.model, options.platform, Node.find(), options.graph_digest
    found = wait_for(*offer, options.wait_s, _say, _rolled_out(options.version_file))
    lay_out(found, Layout(options.store, options.into, options.copy_weights, options.threads))
    _say(f"{found.model} version {found.version} from {found.key} is in {options.into}")


def _rolled_out(path: Path | None) -> int:
    """0 before the first rollout."""
    if path is None or not path.exists():
        return 0
    text = path.read_text().strip()
    if not text.isdecimal():
        raise BadEnvironment(f"{path}: {text[:40]!r} is no version; `trireme load-version` writes its number")
    return int(text)


def _serve(options: argparse.Namespace) -> None:
    from runtime.pod.control import Control, HealthServer
    from runtime.server.gateway_process import Doorway
    from runtime.server.health import Health
    from runtime.server.launch import Exposure, Ports
    from runtime.server.serve import serve_repository

    doorway = Doorway(
        options.gateway_port, options.gateway_address, options.api_keys_file, options.no_auth, options.exit_timeout_s,
        options.gateway_grpc_port, options.tls_cert, options.tls_key, vllm_metrics=options.vllm_metrics,
        otlp_endpoint=options.otlp_endpoint,
        withdraw_s=options.withdraw_s, connection_age_s=options.connection_age_s, follow_files=True,
    )  # fmt: skip
    doorway.require_closed()
    hosts = _hosts(options)
    secret, versions = _secret(options.control_secret_file), _versions(options)
    if hosts is not None:
        secret = versions = None  # the other hosts hold the version that they started with
    if versions is not None:
        versions.restore()
    control = Control(secret, versions) if secret is not None and versions is not None else None
    # What is in flight ends in the gateway, before Triton is asked to leave.
    exposure = Exposure(exit_timeout_s=_AFTER_DRAIN_S, log_to_stderr=True, control_secret=secret)
    ports = Ports(options.http_port, options.grpc_port, options.metrics_port)
    health = Health()
    with HealthServer(health, options.health_address, options.health_port, control):
        serve_repository(
            options.repository, ports, options.ready_timeout_s, True, exposure, health, versions, doorway, hosts=hosts
        )


def _versions(options: argparse.Namespace) -> Versions | None:
    """None without a store: then the repository is what it is."""
    if options.store is None:
        return None
    if options.model is None or options.platform is None:
        raise BadEnvironment("serve --store needs --model and --platform as well, as `fetch` does")
    from runtime.pod.layout import Layout
    from runtime.pod.node import Node
    from runtime.pod.versions import Versions

    layout = Layout(options.store, options.repository, options.copy_weights, options.threads)
    return Versions(options.model, options.platform, Node.find(), options.graph_digest, layout, _say)


def _secret(path: Path | None) -> str | None:
    """None where it is absent: the Secret is optional."""
    return None if path is None or not path.exists() else read_secret(path)


def _ranks(options: argparse.Namespace) -> None:
    from runtime.pod.control import HealthServer
    from runtime.ranks.agent import serve_host
    from runtime.ranks.process import CPU_WORKER, GPU_WORKER
    from runtime.server.health import Health
    from runtime.server.stopping import stop_requests

    hosts = _hosts(options)
    if hosts is None:
        raise BadEnvironment(f"--hosts={options.hosts}: an agent is for a replica of several hosts")
    worker = GPU_WORKER if options.platform == "gpu" else CPU_WORKER
    health = Health()
    with stop_requests() as asked_to_stop, HealthServer(health, options.health_address, options.health_port):

        def stopped() -> bool:  # asked several times a second, so that the agent is seen to live
            health.observed(None)
            return asked_to_stop.is_set()

        serve_host(hosts, options.host, stopped, worker)


def _hosts(options: argparse.Namespace) -> Hosts | None:
    """None for a replica of one host."""
    if options.hosts == 1:
        return None
    from runtime.ranks.hosts import Hosts
    from runtime.settings import ServerSettings

    missing = [name for name in ("leader", "ranks_each", "hosts_secret_file") if getattr(options, name) is None]
    if missing:
        raise BadEnvironment(f"--hosts={options.hosts} needs {', '.join('--' + n.replace('_', '-') for n in missing)}")
    secret = _secret(options.hosts_secret_file)
    if secret is None:
        raise BadEnvironment(f"{options.hosts_secret_file}: no such file; hosts prove a shared secret to each other")
    content = ServerSettings.load(options.repository).content_digest
    return Hosts(
        options.leader, options.hosts_port, options.hosts, options.ranks_each, options.interface, secret, content
    )


def _probe(options: argparse.Namespace) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", options.health_port, timeout=_PROBE_S)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        if answer.status != 200:
            raise ServerFault(f"not ready: {answer.read(500).decode(errors='replace').strip()}")
    except OSError as error:
        raise ServerFault(f"not ready: no answer on port {options.health_port} ({error.strerror or error})") from error
    finally:
        connection.close()


def _say(message: str) -> None:
    print(f"trireme: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
