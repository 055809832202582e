"""The gateway beside a server: started, told what is ready, started again when it dies, drained before the server is.

Its listening socket is ours, so that clients who come while it starts again wait and are not refused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.backoff import pause_s
from runtime.errors import BadEnvironment, ServerFault
from runtime.exposed import require_keys
from runtime.server.health import Health
from runtime.server.launch import LOOPBACK, TritonServer

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_SETTLED_S = 60.0  # one that has run so long did not fail at its start
_MOST_FAILURES = 10  # in a row
DRAIN_S = 30.0
_LEAVE_S = 10.0  # beyond the drain, to end


@dataclass(frozen=True)
class Doorway:
    """Where the gateway listens, and who may come in. Port 0: any free one."""

    port: int
    address: str = LOOPBACK
    keys_file: Path | None = None
    no_auth: bool = False
    drain_s: float = DRAIN_S

    def require_closed(self) -> None:
        """Raises BadEnvironment for a door that would stand open to a network unawares. The gateway itself judges keys;
        this is said before anything is built or started."""
        require_keys(self.address, self.keys_file is not None, self.no_auth)
        if self.keys_file is not None and not os.access(self.keys_file, os.R_OK):
            raise BadEnvironment(f"--api-keys-file {self.keys_file} cannot be read; give a file of lines name:sha256")

    def listen(self) -> socket.socket:
        """Raises BadEnvironment for a port that is taken, and as `require_closed` does."""
        self.require_closed()
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        try:
            return socket.create_server((self.address, self.port), family=family, backlog=1024)
        except OSError as error:
            raise BadEnvironment(
                f"gateway port {self.port} on {self.address} cannot be used ({error.strerror}); "
                "stop what listens there, or choose another with --gateway-port"
            ) from error


class GatewayProcess:
    """`turn` belongs into a loop that turns several times a second. `stop` drains; nothing is left after it."""

    def __init__(self, doorway: Doorway, server: TritonServer, health: Health) -> None:
        self._doorway, self._server, self._health = doorway, server, health
        self._listener = doorway.listen()
        host, port = self._listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.log = server.log.with_name("gateway.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._told: str | None = None
        self._failures = 0
        self._began = self._again = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def turn(self) -> None:
        """Starts it where it does not run, and tells it what is ready. Raises ServerFault when it keeps dying."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            self._close_pipe()
            self._failures = 1 if now - self._began >= _SETTLED_S else self._failures + 1
            if self._failures > _MOST_FAILURES:
                raise ServerFault(f"the gateway died {self._failures} times in a row; its log is {self.log}")
            self._again = now + pause_s(self._failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
            self._process = None
        if self._process is None:
            if now < self._again:
                return
            self._start(now)
        self._tell("ready" if (reason := self._health.ready()) is None else reason.partition("\n")[0])

    def _start(self, now: float) -> None:
        doorway, ports = self._doorway, self._server.ports
        keys = [] if doorway.keys_file is None else ["--api-keys-file", str(doorway.keys_file)]
        command = [
            sys.executable, "-m", "runtime.gateway", "--supervised", "--model", self._server.settings.ensemble,
            "--triton-http-port", str(ports.http), "--triton-metrics-port", str(ports.metrics),
            "--repository", str(self._server.repository), "--listener", str(self._listener.fileno()),
            "--address", doorway.address, "--access-log", str(self.log), "--drain-s", str(doorway.drain_s),
            *keys, *(["--no-auth"] if doorway.no_auth else []),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=(self._listener.fileno(),),
            start_new_session=True,  # a Ctrl-C is for us, who drain it
        )  # fmt: skip
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # one that hangs must not hold up the supervisor
        self._began, self._told = now, None

    def _tell(self, word: str) -> None:
        if word == self._told or self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):
            os.write(self._process.stdin.fileno(), f"{word}\n".encode())
            self._told = word

    def _close_pipe(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def stop(self) -> None:
        """No new connections; what is running may end; then it is gone."""
        self._listener.close()
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(self._doorway.drain_s + _LEAVE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._close_pipe()
        self._process = None
