"""Starts, restarts and stops one Triton server, and leaves nothing behind.

It runs in a process group of its own with a guardian beside it (see `runtime.server.guardian`), so that processes,
shared memory and scratch files go away whatever this process dies of.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.beside import FOLDER
from runtime.encoding.encoder import require_numpy_1
from runtime.errors import BadEnvironment, ServerFault
from runtime.generation.interface import PROBE_ID_VARIABLE
from runtime.model_config import CONFIG, pin
from runtime.model_control import control_headers
from runtime.ports import free_ports
from runtime.proof.proven import Proven
from runtime.ranks.hosts import RANK_HOSTS_VARIABLE, Hosts
from runtime.server.guardian import sweep
from runtime.server.installation import Installation
from runtime.server.stubs import SETTLED_S, Stubs
from runtime.settings import ADMIN_HEADER, ServerSettings

LOOPBACK = "127.0.0.1"
EXIT_TIMEOUT_S = 15  # Triton finishes what is in flight within this, then leaves
_STUB_TIMEOUT_S = 300
_SHM_BYTES = 1 << 20
# What no client may do: map memory, or name files that the server then writes (logs and traces). And load code, which
# is for the holder of a control secret where there is one, and for nobody otherwise.
_CLOSED = "shared-memory,trace,logging"
_CONTROL = "model-repository"
_ERROR_LINE = re.compile(r"\S+ [EF] ")  # `2026-11-29T21:34:27Z E 13395 file.cc:642] "text"`
_LOG_ERRORS, _LOG_LINE = 4, 600
# Triton opens a protocol to whoever sends a header, and everybody on this machine can read its command line. So the
# header has a name that cannot be sent: a line ends in it, which neither HTTP nor gRPC lets through.
_NO_HEADER = "no\nheader=opens-this"
# Waits for a word, so that the guardian knows of the process before it becomes a server.
_GATE = 'read -r _ && exec "$@" < /dev/null'
_POLL_S = 0.1
_KILL_S = 30
_DRAIN_SETTLED_S = 2.0


@dataclass(frozen=True)
class Ports:
    http: int
    grpc: int
    metrics: int

    @staticmethod
    def free() -> Ports:
        """Three ports that were free a moment ago."""
        return Ports(*free_ports(3, LOOPBACK))

    def hold(self) -> list[socket.socket]:
        """Keeps the ports from everybody but a server that reuses addresses, as Triton does, until they are closed:
        while it starts again, no other program gets one by chance.

        Raises BadEnvironment that names the busy port and the option that moves it.
        """
        held: list[socket.socket] = []
        for name, port in (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics)):
            item = socket.socket()
            held.append(item)
            item.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                item.bind((LOOPBACK, port))
            except OSError as error:
                for one in held:
                    one.close()
                raise BadEnvironment(
                    f"{name} port {port} on {LOOPBACK} cannot be used ({error.strerror}); "
                    f"stop what listens there, or choose another with --{name}-port"
                ) from error
        return held


@dataclass(frozen=True)
class Exposure:
    """What differs between a server on somebody's machine and one in a container. No port of it is ever on another
    address than loopback: one malformed request ends the server, so a network asks the gateway.

    `log_to_stderr`: Triton's log joins ours, where a container's log is read, instead of a file that grows.
    `control_secret` opens repository control to whoever sends it; it stands on the server's command line, which
    every user of a machine can read: so it is for a container, or a machine of one's own. Without one, repository
    control is off.
    """

    exit_timeout_s: int = EXIT_TIMEOUT_S
    log_to_stderr: bool = False
    control_secret: str | None = None


class TritonServer:
    """One server over one repository. Use as a context manager, or call `stop`.

    It may be started again in place: ports, log and scratch folder stay, and so does the guardian. `probe_id` is the
    request id that its generator counts as no request; nobody else can know it. `hosts`: those that its model's ranks
    run on besides this one.
    """

    def __init__(
        self,
        repository: Path,
        ports: Ports,
        log: Path | None = None,
        exposure: Exposure | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        require_numpy_1()
        self.repository, self.ports, self.exposure = repository.resolve(), ports, exposure or Exposure()
        self.settings = load_server_settings(self.repository)
        self._hosts = {} if hosts is None else {RANK_HOSTS_VARIABLE: hosts.to_text()}
        self.proven: Proven | None = None  # what the supervisor found of the version that it serves
        self._installation = Installation.find()
        self._held = ports.hold()
        self._work = Path(tempfile.mkdtemp(prefix="trireme-triton-"))
        self.log = log or self._work / "triton.log"
        self.shm_prefix = f"trireme_{os.getpid()}_{secrets.token_hex(4)}_"
        self.probe_id = secrets.token_hex(16)
        self._guardian = _start_guardian(self.shm_prefix, self._work, self.exposure.exit_timeout_s)
        try:
            self._backends = self._installation.backend_folder(self._work)
            self.log.write_bytes(b"")
            self._process = self._start()
        except BaseException:
            self._leave()
            raise
        self._stubs = self._watched()

    def _watched(self) -> Stubs:
        """A version beside may die by itself: its requests fail, and whoever rolls it out takes it back."""
        return Stubs(self.pid, beside=self.repository / FOLDER)

    def _start(self) -> subprocess.Popen[bytes]:
        with open(2, "wb", closefd=False) if self.exposure.log_to_stderr else self.log.open("ab") as stream:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _GATE, "sh", *self._command()],
                env=self._installation.environment() | {PROBE_ID_VARIABLE: self.probe_id} | self._hosts,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and stubs share one group to end
            )
        assert process.stdin is not None
        self._tell_guardian(f"+{process.pid}")
        with contextlib.suppress(BrokenPipeError):  # it has died already, which `dead` will say
            process.stdin.write(b"go\n")
            process.stdin.close()
        self._gone = False
        return process

    def kill(self) -> None:
        """Ends every process of the server at once; who waits for an answer sees the connection break.

        Raises ServerFault when the system does not let go of it.
        """
        if self._gone:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        try:
            self._process.wait(_KILL_S)
        except subprocess.TimeoutExpired as error:
            raise ServerFault(f"Triton (process {self.pid}) is still there {_KILL_S} s after SIGKILL") from error
        _await_group(self.pid)
        self._tell_guardian(f"-{self.pid}")
        self._gone = True
        sweep(self.shm_prefix)

    def start_again(self) -> None:
        """After `kill`: serves what the repository now holds, on the same ports. Raises BadEnvironment as at first."""
        if self.exposure.control_secret is None:
            self.settings = load_server_settings(self.repository)
        # Else the repository may hold a version that is to be loaded beside the one that was proven, which stays.
        self._process = self._start()
        self._stubs = self._watched()

    def _command(self) -> list[str]:
        command = [
            str(self._installation.server),
            *self._models(),
            "--disable-auto-complete-config",  # else every Python model is imported twice
            f"--backend-directory={self._backends}",
            f"--cache-directory={self._installation.caches}",
            *(f"--{kind}-address={LOOPBACK}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            *self._restrictions(),
            f"--exit-timeout-secs={self.exposure.exit_timeout_s}",
            "--pinned-memory-pool-byte-size=0",
            "--log-format=ISO8601",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--backend-config=python,shm-default-byte-size={_SHM_BYTES}",
            f"--backend-config=python,shm-growth-byte-size={_SHM_BYTES}",
            f"--backend-config=python,stub-timeout-seconds={_STUB_TIMEOUT_S}",
        ]
        if self.settings.response_cache_bytes:
            command.append(f"--cache-config=local,size={self.settings.response_cache_bytes}")
        if self.settings.rate_limited:
            command.append("--rate-limit=execution_count")
        return command

    def _models(self) -> list[str]:
        """Which models are served, and whether others may be loaded later."""
        if self.exposure.control_secret is not None:
            beside = self.repository / FOLDER
            beside.mkdir(exist_ok=True)
            self._pin()
            loaded = [f"--load-model={name}" for name in self.settings.load_order]
            folders = [f"--model-repository={folder}" for folder in (self.repository, beside)]
            return [*folders, "--model-control-mode=explicit", *loaded]
        # Without control Triton loads all that it finds, so it is shown the models of this build alone.
        shown = self._work / "models"
        shutil.rmtree(shown, ignore_errors=True)
        shown.mkdir()
        for name in self.settings.models:
            (shown / name).symlink_to(self.repository / name)
        return [f"--model-repository={shown}", "--model-control-mode=none"]

    def _pin(self) -> None:
        """A restart comes back with the version that was proven, whatever was published since. A pod's configurations
        name theirs already."""
        for name in self.settings.models:
            path = self.repository / name / CONFIG
            if "version_policy" not in path.read_text("utf-8"):
                pin(path, self.settings.version)

    def _restrictions(self) -> list[str]:
        secret = self.exposure.control_secret
        control = _NO_HEADER if secret is None else f"{ADMIN_HEADER}={secret}"
        rules = (f"{_CLOSED}:{_NO_HEADER}", f"{_CONTROL}:{control}")
        options = ("http-restricted-api", "grpc-restricted-protocol")
        return [f"--{option}={rule}" for option in options for rule in rules]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def grpc_address(self) -> str:
        return f"{LOOPBACK}:{self.ports.grpc}"

    @property
    def http_address(self) -> str:
        return f"{LOOPBACK}:{self.ports.http}"

    @property
    def metrics_address(self) -> str:
        return f"{LOOPBACK}:{self.ports.metrics}"

    @property
    def control_headers(self) -> dict[str, str]:
        """gRPC metadata that opens repository control, where a control secret was given."""
        secret = self.exposure.control_secret
        return {} if secret is None else control_headers(secret)

    def require_alive(self, settled_s: float = SETTLED_S) -> None:
        """Raises ServerFault with the end of the log when the server has died."""
        how = self.dead(settled_s)
        if how is not None:
            raise ServerFault(f"{how}\nLast of its log:\n{self.log_tail()}")

    def _ended(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        return f"Triton was killed by {signal.Signals(-code).name}" if code < 0 else f"Triton exited with {code}"

    def adopt(self) -> None:
        """Takes in what the server has made by now: the death of a stub that runs is its own death from here on (see
        `dead`), and its shared memory, which holds what clients send, is closed to other users: the stubs' library
        opens it to everybody, whatever the umask."""
        self._stubs.learn()
        for region in Path("/dev/shm").glob(f"{self.shm_prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                region.chmod(0o600)

    def dead(self, settled_s: float = SETTLED_S) -> str | None:
        """How the server died: itself, or one of its stubs, without which it serves nothing."""
        ended = self._ended()
        if ended is not None:
            return ended
        stub = self._stubs.dead(settled_s)
        return None if stub is None else f"a Python stub of Triton died (process {stub})"

    def log_tail(self, lines: int = 15) -> str:
        """The log's end, and the last errors before it: while a server goes, models that unload say much."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        kept = [line[:_LOG_LINE] for line in text.splitlines() if line.strip()]
        errors = [line for line in kept[:-lines] if _ERROR_LINE.match(line)]
        return "\n".join([*errors[-_LOG_ERRORS:], *kept[-lines:]])

    def stop(self) -> None:
        """Drains and ends the server. What is in flight gets the exit timeout; new connections are refused at once."""
        if self._process.poll() is None:
            self._process.terminate()
        end = time.monotonic() + self.exposure.exit_timeout_s + 10
        # Requests that a dead stub held never end. But stubs do end now, and a server that is busy may see it late.
        while self.dead(_DRAIN_SETTLED_S) is None and time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_S)
        if self._process.poll() is None:
            self.kill()
        self._leave()

    def _tell_guardian(self, line: str) -> None:
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then somebody ended the guardian, and the server is worth more
            self._guardian.stdin.write(f"{line}\n".encode())
            self._guardian.stdin.flush()

    def _leave(self) -> None:
        """The guardian sees its pipe close, ends stubs that are left, and sweeps."""
        for item in self._held:
            item.close()
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guardian.stdin.close()
        try:
            self._guardian.wait(self.exposure.exit_timeout_s + 15)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait(5)

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def load_server_settings(repository: Path) -> ServerSettings:
    """Raises BadEnvironment for a folder that is no repository of ours, or one whose publication was cut off."""
    settings = ServerSettings.load(repository)
    for name in settings.models:
        versions = [int(path.name) for path in (repository / name).glob("[0-9]*") if path.name.isdigit()]
        if max(versions, default=0) != settings.version:
            raise BadEnvironment(
                f"{repository}: {name} has versions {sorted(versions)}, but version {settings.version} was published; "
                "a build was cut off: run `trireme build` again"
            )
    return settings


def _await_group(group: int) -> None:
    """Until no process of it is left. The server's orphans are ours where this is the first process of a container."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-group, os.WNOHANG) != (0, 0):
                pass
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)


def _start_guardian(shm_prefix: str, work: Path, grace_s: int) -> subprocess.Popen[bytes]:
    guardian = Path(__file__).with_name("guardian.py")
    command = [sys.executable, "-I", "-S", str(guardian), shm_prefix, str(work), str(grace_s)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
