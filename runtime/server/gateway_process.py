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
from runtime.otlp import traces_url
from runtime.server.health import Health
from runtime.server.launch import LOOPBACK, TritonServer
from runtime.server.pulse import Pulse
from runtime.told import CLOSED, READY

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_SETTLED_S = 60.0  # one that has run so long did not fail at its start
_MOST_FAILURES = 10  # in a row
DRAIN_S = 30.0
_LOOK_AT_FILES_S = 5.0
_STARTING = "the gateway starts"
_LEAVE_S = 10.0  # beyond the drain, to end


@dataclass(frozen=True)
class FeedbackOptions:
    """The program with a store behind the gateway, which stands above this room, and what it is told."""

    program: str
    database: str
    sample_share: float = 0.0
    sample_redact: str | None = None

    def options(self) -> list[str]:
        redact = [] if self.sample_redact is None else ["--sample-redact", self.sample_redact]
        return ["--feedback-database", self.database, "--sample-share", str(self.sample_share), *redact]


@dataclass(frozen=True)
class Doorway:
    """Where the gateway listens, and who may come in. Port 0: any free one; `grpc_port` None: no gRPC.

    `control_secret_file` opens the split of traffic between versions. `withdraw_s`: so long is it not ready, and still
    takes connections, before it drains. `connection_age_s` closes gRPC connections gently after a while, so that
    clients find new replicas. `follow_files`: keys and certificate are read again when somebody puts others in their
    place, as a kubelet does, which swaps files whole. `hang_s`: a gateway that does not say that it lives within this
    time, twice in a row, is ended; `start_s`: so long may it take until it first does.
    """

    port: int
    address: str = LOOPBACK
    keys_file: Path | None = None
    no_auth: bool = False
    drain_s: float = DRAIN_S
    grpc_port: int | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    control_secret_file: Path | None = None
    vllm_metrics: bool = False
    otlp_endpoint: str | None = None
    withdraw_s: float = 0.0
    connection_age_s: int | None = None
    follow_files: bool = False
    feedback: FeedbackOptions | None = None
    hang_s: float = 15.0
    start_s: float = 60.0

    def require_closed(self) -> None:
        """Raises BadEnvironment for a door that would stand open to a network unawares. The gateway itself judges keys;
        this is said before anything is built or started."""
        require_keys(self.address, self.keys_file is not None, self.no_auth)
        if self.keys_file is not None and not os.access(self.keys_file, os.R_OK):
            raise BadEnvironment(f"--api-keys-file {self.keys_file} cannot be read; give a file of lines name:sha256")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise BadEnvironment("--tls-cert and --tls-key belong together; give both")
        if self.otlp_endpoint is not None:
            traces_url(self.otlp_endpoint)
        for option, file in self._files.items():
            if not os.access(file, os.R_OK):
                raise BadEnvironment(f"--{option} {file} cannot be read")

    def listen(self) -> socket.socket:
        """Raises BadEnvironment for a port that is taken, and as `require_closed` does."""
        self.require_closed()
        try:
            return socket.create_server((self.address, self.port), family=self._family, backlog=1024)
        except OSError as error:
            raise self._busy("", self.port, error) from error

    def hold_grpc(self) -> socket.socket | None:
        """The port of gRPC, held so that no other program gets it while the gateway starts again: gRPC cannot be given
        a socket, but shares the port of one that does not listen. Raises BadEnvironment for a port that is taken."""
        if self.grpc_port is None:
            return None
        held = socket.socket(self._family)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind((self.address, self.grpc_port))  # alone: sharing would also hide that another program listens
            port = held.getsockname()[1]
            held.close()
            held = socket.socket(self._family)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind((self.address, port))
        except OSError as error:
            held.close()
            raise self._busy("grpc-", self.grpc_port, error) from error
        return held

    def files_stamp(self) -> tuple[tuple[int, int], ...]:
        """Other whenever one of the files is another than before."""
        found = []
        for file in self._files.values():
            with contextlib.suppress(OSError):  # one that is away for a moment
                about = file.stat()
                found.append((about.st_ino, about.st_mtime_ns))
        return tuple(found)

    @property
    def _files(self) -> dict[str, Path]:
        """Those that are given, by option."""
        named = {
            "api-keys-file": self.keys_file, "tls-cert": self.tls_cert, "tls-key": self.tls_key,
            "control-secret-file": self.control_secret_file,
        }  # fmt: skip
        return {option: file for option, file in named.items() if file is not None}

    @property
    def _family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET

    def _busy(self, kind: str, port: int, error: OSError) -> BadEnvironment:
        return BadEnvironment(
            f"gateway {kind}port {port} on {self.address} cannot be used ({error.strerror}); "
            f"stop what listens there, or choose another with --gateway-{kind}port"
        )

    def options(self) -> list[str]:
        """Of the process, but for its ports."""
        given = [part for name, file in self._files.items() for part in (f"--{name}", str(file))]
        flags = {"no-auth": self.no_auth, "vllm-metrics": self.vllm_metrics}
        given += [f"--{name}" for name, wanted in flags.items() if wanted]
        if self.connection_age_s is not None:
            given += ["--connection-age-s", str(self.connection_age_s)]
        given += [] if self.otlp_endpoint is None else ["--otlp-endpoint", self.otlp_endpoint]
        given += [] if self.feedback is None else self.feedback.options()
        return ["--address", self.address, "--drain-s", str(self.drain_s), *given]

    @property
    def program(self) -> str:
        return "runtime.gateway" if self.feedback is None else self.feedback.program


class GatewayProcess:
    """`turn` belongs into a loop that turns several times a second. `stop` drains; nothing is left after it."""

    def __init__(self, doorway: Doorway, server: TritonServer, health: Health) -> None:
        self._doorway, self._server, self._health = doorway, server, health
        self._listener = doorway.listen()
        self._grpc = doorway.hold_grpc()
        self.address = _written(self._listener)
        self.grpc_address = None if self._grpc is None else _written(self._grpc)
        # In a container standard error is the log that people read; what is mirrored never goes there: it has texts.
        self._in_container = server.exposure.log_to_stderr
        self.log = server.log.with_name("gateway.log")
        self._pulse = Pulse(self._listener.getsockname()[:2], doorway.tls_cert is not None, doorway.hang_s)
        self._process: subprocess.Popen[bytes] | None = None
        self._told: str | None = None
        self._failures = 0
        self._began = self._again = self._looked = 0.0
        self._files_seen = doorway.files_stamp()
        health.door(_STARTING)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def turn(self) -> None:
        """Starts it where it does not run, and tells it what is ready. Raises ServerFault when it keeps dying."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            self._close_pipe()
            self._failures = 1 if now - self._began >= _SETTLED_S else self._failures + 1
            self._pulse.forget()
            if self._failures > _MOST_FAILURES:
                said = "what it said stands above" if self._in_container else f"its log is {self.log}"
                raise ServerFault(f"the gateway died {self._failures} times in a row; {said}")
            self._again = now + pause_s(self._failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
            self._process = None
            self._health.door(_STARTING)
        if self._process is None:
            if now < self._again:
                return
            self._start(now)
        elif self._pulse.lost(now) and (self._pulse.felt or now - self._began > self._doorway.start_s):
            self._process.kill()  # the next turn sees that it died
            return
        elif self._pulse.felt:
            self._health.door(None)
            self._follow_files(now)
        self._tell_state()

    def _start(self, now: float) -> None:
        ports = self._server.ports
        grpc = [] if self._grpc is None else ["--grpc-port", str(self._grpc.getsockname()[1])]
        access_log = "-" if self._in_container else str(self.log)
        command = [
            sys.executable, "-m", self._doorway.program, "--supervised", "--model", self._server.settings.ensemble,
            "--triton-http-port", str(ports.http), "--triton-metrics-port", str(ports.metrics),
            "--repository", str(self._server.repository), "--listener", str(self._listener.fileno()),
            "--access-log", access_log, "--mirror-log", str(self.log.with_name("mirror.log")),
            *self._doorway.options(), *grpc,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=(self._listener.fileno(),),
            start_new_session=True,  # a Ctrl-C is for us, who drain it
        )  # fmt: skip
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # one that hangs must not hold up the supervisor
        self._began, self._told = now, None

    def _tell_state(self) -> None:
        reason = self._health.ready()
        word = READY if reason is None else reason.partition("\n")[0]
        self._tell(f"{CLOSED}{word}" if self._health.closed() else word)

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

    def _follow_files(self, now: float) -> None:
        if not self._doorway.follow_files or now - self._looked < _LOOK_AT_FILES_S:
            return
        self._looked, seen = now, self._doorway.files_stamp()
        if seen != self._files_seen:
            self._files_seen = seen
            self.read_again()

    def read_again(self) -> None:
        """Keys and certificate."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Not ready, until nobody sends it more; no new connections; what is running may end; then it is gone."""
        if self._process is not None and self._process.poll() is None:
            self._tell_state()
            time.sleep(self._doorway.withdraw_s)
        self._listener.close()
        if self._grpc is not None:
            self._grpc.close()
        self._pulse.close()
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


def _written(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
