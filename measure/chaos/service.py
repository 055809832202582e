"""`trireme serve` with its children, and what they hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from measure.serving import start_serving

_START_S = 600
DISK_MB = 512  # for the files that a service writes while it runs
# The service's own disk, which goes with the service: nobody else sees it.
_OWN_DISK = ["unshare", "--user", "--map-root-user", "--mount"]
_MOUNT = 'mount -t tmpfs -o size={megabytes}m chaos "$TMPDIR" && exec "$@"'


@dataclass(frozen=True)
class Held:
    """By the service as a whole; `descriptors` of the gateway."""

    rss_mb: float
    descriptors: int
    shared: int

    def __str__(self) -> str:
        return f"{self.rss_mb:,.0f} MB, {self.descriptors} descriptors, {self.shared} in /dev/shm"


class StruckService:
    """On free ports. `disk`: the folder of its temporary files, a small disk of its own where this machine lets us make
    one, else None."""

    def __init__(self, spec: Path, build_dir: Path) -> None:
        """Raises MachineError where it does not start."""
        folder = build_dir / "chaos-disk"
        folder.mkdir(parents=True, exist_ok=True)
        self.disk = folder.resolve() if _can_mount(folder) else None
        before: list[str] = []
        if self.disk is not None:
            before = [*_OWN_DISK, "sh", "-c", _MOUNT.format(megabytes=DISK_MB), "sh"]
        environment = {**os.environ, **({} if self.disk is None else {"TMPDIR": str(self.disk)})}
        self._started = start_serving(
            spec, build_dir, f"--ready-timeout-s={_START_S}", before=before, environment=environment
        )
        facts, self._pid = self._started.facts, self._started.process.pid
        self.port, self.grpc = int(facts["gateway"].split(":")[1]), str(facts["gateway_grpc"])

    def pids(self, part: str) -> list[int]:
        """Processes of that program, or module, from the oldest to the youngest."""
        import psutil

        found = []
        for one in psutil.Process(self._pid).children(recursive=True):
            try:
                program, *rest = one.cmdline() or [""]
                if part in (Path(program).name, *rest[:2]) and one.status() != psutil.STATUS_ZOMBIE:
                    found.append((one.create_time(), one.pid))
            except psutil.NoSuchProcess:
                continue
        return [pid for _, pid in sorted(found)]

    def await_ready(self, seconds: float) -> None:
        """As the gateway says, which is when it is proven again; at most so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=10):
                    return
            except OSError:  # an HTTPError too
                time.sleep(0.1)

    def held(self) -> Held:
        import psutil

        own = psutil.Process(self._pid)
        memory = 0
        for one in (own, *own.children(recursive=True)):
            try:
                memory += one.memory_info().rss
            except psutil.NoSuchProcess:  # it has just ended
                continue
        gateways = self.pids("runtime.gateway")
        shared = len(list(Path("/dev/shm").glob(f"trireme_{self._pid}_*")))
        return Held(memory / 1e6, psutil.Process(gateways[-1]).num_fds() if gateways else 0, shared)

    def seen_disk(self) -> Path:
        """The disk as it is seen from outside of the service."""
        assert self.disk is not None
        return Path("/proc", str(self._pid), "root", *self.disk.parts[1:])

    def close(self) -> int:
        return self._started.end()


def _can_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    command = [*_OWN_DISK, "sh", "-c", _MOUNT.format(megabytes=1), "sh", "true"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=30).returncode == 0
