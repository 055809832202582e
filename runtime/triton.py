"""Starts and stops one Triton server, and leaves nothing behind.

The server is the one inside the nvidia-pytriton wheel, or that of NVIDIA's container image. It runs in a process group
of its own with a guardian beside it (see `runtime.guardian`), so that processes, shared memory and scratch files go
away whatever this process dies of.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runtime.encoder import require_numpy_1
from runtime.errors import BadEnvironment, ServerFault
from runtime.settings import ServerSettings

LOOPBACK = "127.0.0.1"
EXIT_TIMEOUT_S = 15  # Triton finishes what is in flight within this, then leaves
_STUB_TIMEOUT_S = 300
_SHM_BYTES = 1 << 20
_SECRET_HEADER = "trireme-admin"
# What a client must not do: load code, map memory, or name files that the server then writes (logs and traces).
_RESTRICTED = "model-repository,shared-memory,trace,logging"
_SYSTEM = Path("/opt/tritonserver")  # where NVIDIA's image keeps it


@dataclass(frozen=True)
class Ports:
    http: int
    grpc: int
    metrics: int

    @staticmethod
    def free() -> Ports:
        """Three ports that were free a moment ago."""
        sockets = [socket.socket() for _ in range(3)]
        try:
            for item in sockets:
                item.bind((LOOPBACK, 0))
            return Ports(*(item.getsockname()[1] for item in sockets))
        finally:
            for item in sockets:
                item.close()

    def require_free(self) -> None:
        """Raises BadEnvironment that names the busy port and the option that moves it."""
        for name, port in (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics)):
            with socket.socket() as item:
                item.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    item.bind((LOOPBACK, port))
                except OSError as error:
                    raise BadEnvironment(
                        f"{name} port {port} on {LOOPBACK} cannot be used ({error.strerror}); "
                        f"stop what listens there, or choose another with --{name}-port"
                    ) from error


@dataclass(frozen=True)
class Exposure:
    """Addresses that Triton binds, and how connections end. Everything on loopback unless said otherwise.

    HTTP has no business on another address: one malformed request ends the server. `connection_age_s` closes
    connections gently after a while, so that clients spread over new replicas. `log_to_stderr`: Triton's log joins
    ours, where a container's log is read, instead of a file that grows. `control_secret` opens repository control to
    whoever sends it; without one, a secret is made that only this process knows.
    """

    http: str = LOOPBACK
    grpc: str = LOOPBACK
    metrics: str = LOOPBACK
    exit_timeout_s: int = EXIT_TIMEOUT_S
    connection_age_s: int | None = None
    log_to_stderr: bool = False
    control_secret: str | None = None


@dataclass(frozen=True)
class Installation:
    """Where the pieces of Triton lie. `stub` is to be put beside the Python backend; None where it lies there."""

    server: Path
    backends: Path
    stub: Path | None
    caches: Path
    libraries: Path

    @staticmethod
    def find(system: Path = _SYSTEM) -> Installation:
        """The bundled server, else the system's. Raises BadEnvironment without either, or without a Python stub."""
        spec = importlib.util.find_spec("pytriton")
        if spec is not None and spec.submodule_search_locations:
            return Installation._bundled(Path(next(iter(spec.submodule_search_locations))))
        if (system / "bin" / "tritonserver").is_file():
            return Installation._of_the_system(system)
        raise BadEnvironment(
            f"no Triton: pip install nvidia-pytriton (Linux, Python 3.11 or 3.12), or use an image with {system}"
        )

    @staticmethod
    def _bundled(package: Path) -> Installation:
        root = package / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise BadEnvironment(f"the embedded Triton has no Python {version} stub; use Python 3.11 or 3.12")
        return Installation(
            server=root / "bin" / "tritonserver",
            backends=root / "backends",
            stub=stub,
            caches=root / "caches",
            libraries=package.parent / "nvidia_pytriton.libs",
        )

    @staticmethod
    def _of_the_system(root: Path) -> Installation:
        if not (root / "backends" / "python" / "triton_python_backend_stub").is_file():
            raise BadEnvironment(f"{root} has no Python backend; use an image whose tag ends in -py3")
        return Installation(
            server=root / "bin" / "tritonserver",
            backends=root / "backends",
            stub=None,
            caches=root / "caches",
            libraries=root / "lib",
        )


class TritonServer:
    """One server over one repository. Use as a context manager, or call `stop`.

    `secret` must be sent to reach repository control and shared memory; every other call is open on loopback.
    """

    def __init__(
        self, repository: Path, ports: Ports, log: Path | None = None, exposure: Exposure | None = None
    ) -> None:
        require_numpy_1()
        self.repository, self.ports, self.exposure = repository.resolve(), ports, exposure or Exposure()
        self.settings = load_server_settings(self.repository)
        self.secret = self.exposure.control_secret or secrets.token_hex(16)
        ports.require_free()
        installation = Installation.find()
        self._work = Path(tempfile.mkdtemp(prefix="trireme-triton-"))
        self.log = log or self._work / "triton.log"
        self.shm_prefix = f"trireme_{os.getpid()}_{secrets.token_hex(4)}_"
        self._guardian = _start_guardian(self.shm_prefix, self._work, self.exposure.exit_timeout_s)
        try:
            if installation.stub is not None:
                _lay_out_backend(installation, self._work / "backends" / "python")
            self._process = self._start(installation)
        except BaseException:
            self._dismiss_guardian()
            raise

    def _start(self, installation: Installation) -> subprocess.Popen[bytes]:
        with open(2, "wb", closefd=False) if self.exposure.log_to_stderr else self.log.open("wb") as stream:
            process = subprocess.Popen(
                self._command(installation),
                env=_environment(installation),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and stubs share one group to end
            )
        assert self._guardian.stdin is not None
        self._guardian.stdin.write(str(process.pid).encode())
        self._guardian.stdin.flush()
        return process

    def _command(self, installation: Installation) -> list[str]:
        restricted = f"{_SECRET_HEADER}={self.secret}"
        command = [
            str(installation.server),
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self.settings.load_order),
            "--disable-auto-complete-config",  # else every Python model is imported twice
            f"--backend-directory={self._work / 'backends' if installation.stub else installation.backends}",
            f"--cache-directory={installation.caches}",
            *(f"--{kind}-address={getattr(self.exposure, kind)}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            f"--http-restricted-api={_RESTRICTED}:{restricted}",
            f"--grpc-restricted-protocol={_RESTRICTED}:{restricted}",
            f"--exit-timeout-secs={self.exposure.exit_timeout_s}",
            "--pinned-memory-pool-byte-size=0",
            "--log-format=ISO8601",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--backend-config=python,shm-default-byte-size={_SHM_BYTES}",
            f"--backend-config=python,shm-growth-byte-size={_SHM_BYTES}",
            f"--backend-config=python,stub-timeout-seconds={_STUB_TIMEOUT_S}",
        ]
        if self.exposure.connection_age_s is not None:
            command.append(f"--grpc-max-connection-age={1000 * self.exposure.connection_age_s}")
        if self.settings.response_cache_bytes:
            command.append(f"--cache-config=local,size={self.settings.response_cache_bytes}")
        if self.settings.rate_limited:
            command.append("--rate-limit=execution_count")
        return command

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
        """gRPC metadata that opens repository control."""
        return {f"triton-grpc-protocol-{_SECRET_HEADER}": self.secret}

    def require_alive(self) -> None:
        """Raises ServerFault with the end of the log when the server has exited."""
        code = self._process.poll()
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            raise ServerFault(f"Triton {how}. Last of its log:\n{self.log_tail()}")

    def log_tail(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        kept = [line for line in text.splitlines() if line.strip()]
        return "\n".join(kept[-lines:])

    def stop(self) -> None:
        """Drains and ends the server. What is in flight gets the exit timeout; new connections are refused at once."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(self.exposure.exit_timeout_s + 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
        self._dismiss_guardian()

    def _dismiss_guardian(self) -> None:
        """It sees its pipe close, ends stubs that are left, and sweeps."""
        assert self._guardian.stdin is not None
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


def _lay_out_backend(installation: Installation, target: Path) -> None:
    """The backend directory wants the stub of this Python beside the library."""
    assert installation.stub is not None
    target.mkdir(parents=True)
    python = installation.backends / "python"
    for source in (
        python / "libtriton_python.so",
        python / "triton_python_backend_utils.py",
        installation.stub,
    ):
        shutil.copy(source, target / source.name)
    (target / installation.stub.name).chmod(0o755)


def _environment(installation: Installation) -> dict[str, str]:
    libraries = [str(installation.libraries), str(sysconfig.get_config_var("LIBDIR"))]
    libraries += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{sys.exec_prefix}/bin:{os.environ.get('PATH', '')}",  # the stub finds its prefix by `python3`
        "PYTHONDONTWRITEBYTECODE": "1",  # a new __pycache__ looks like a changed model
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads must not take the cores from the other processes
    }


def _start_guardian(shm_prefix: str, work: Path, grace_s: int) -> subprocess.Popen[bytes]:
    guardian = Path(__file__).with_name("guardian.py")
    command = [sys.executable, "-I", "-S", str(guardian), shm_prefix, str(work), str(grace_s)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
