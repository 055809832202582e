"""Serves one model repository in the foreground: the whole life of a server, from start through restarts to drain."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runtime.errors import NotProven
from runtime.ranks.hosts import Hosts
from runtime.server.gateway_process import Doorway, GatewayProcess
from runtime.server.health import Health
from runtime.server.launch import Exposure, Ports, TritonServer
from runtime.server.probing import Failure
from runtime.server.staging import StagedVersions
from runtime.server.stopping import stop_requests
from runtime.server.supervise import Supervisor


def serve_repository(
    repository: Path,
    ports: Ports,
    ready_timeout_s: float,
    as_json: bool,
    exposure: Exposure | None = None,
    health: Health | None = None,
    versions: StagedVersions | None = None,
    doorway: Doorway | None = None,
    hosts: Hosts | None = None,
) -> None:
    """Returns after SIGTERM or SIGINT, with everything drained and swept. `health` is told what the probes find.

    `versions`: those that may be loaded while it runs, with what the last run left behind put in order.
    `doorway`: a gateway listens there, beside the server. `hosts`: those that the model's ranks run on.

    Raises BadEnvironment before the start, ServerFault when the server does not come up, or breaks so often that
    starting it again is no help.
    """
    health = health or Health()
    started = time.monotonic()
    with stop_requests() as asked_to_stop:
        with TritonServer(repository, ports, exposure=exposure, hosts=hosts) as server:
            gateway = None if doorway is None else GatewayProcess(doorway, server, health)
            if gateway is not None:
                _pass_on_hangups(gateway)
            beside: Callable[[], None] = (lambda: None) if gateway is None else gateway.turn
            supervisor = Supervisor(server, versions, health, report=_log, beside=beside)
            try:
                supervisor.wait_ready(ready_timeout_s, asked_to_stop)
                if not asked_to_stop.is_set():
                    health.observed(None)
                    beside()  # the gateway hears of it before the world does
                    _announce(server, gateway, time.monotonic() - started, as_json)
                supervisor.watch(asked_to_stop, ready_timeout_s, _log)
            except NotProven as error:
                health.observed(Failure(str(error), wrong=True))
                raise
            finally:
                health.drain()
                if gateway is not None:
                    gateway.stop()  # its clients' answers end before the server goes
                supervisor.close()
            _log("draining")
        _log("stopped")


def _announce(server: TritonServer, gateway: GatewayProcess | None, seconds: float, as_json: bool) -> None:
    settings = server.settings
    facts = {
        "model": settings.ensemble,
        "version": settings.version,
        "grpc": server.grpc_address,
        "http": server.http_address,
        "metrics": server.metrics_address,
        "pid": server.pid,
        "ready_s": round(seconds, 2),
        "proven": server.proven.model_dump(mode="json", exclude={"server"}) if server.proven else None,
    }
    if gateway is not None:
        grpc = {} if gateway.grpc_address is None else {"gateway_grpc": gateway.grpc_address}
        facts |= {"gateway": gateway.address, **grpc, "gateway_pid": gateway.pid}
    if as_json:
        print(json.dumps(facts), flush=True)
        return
    print(f"{settings.ensemble} version {settings.version} is ready after {seconds:.1f} s", flush=True)
    print(f"  proven   {server.proven}", flush=True)
    for name in ("grpc", "http", "metrics", "gateway", "gateway_grpc"):
        if name in facts:
            print(f"  {name.replace('_', ' '):<8} {facts[name]}", flush=True)
    print(f"  log      {server.log}\nCtrl-C drains and stops.", flush=True)


def _pass_on_hangups(gateway: GatewayProcess) -> None:
    """SIGHUP makes the gateway read its keys and certificate again. From a terminal it means that this one has closed,
    and ends us as ever."""
    if not os.isatty(0):
        signal.signal(signal.SIGHUP, lambda *_: gateway.read_again())


def _log(message: str) -> None:
    print(f"trireme: {message}", file=sys.stderr, flush=True)
