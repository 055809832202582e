"""A model as people serve it, under requests that do not pause: what online learning is shown on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from builders.errors import MachineError
from measure.serving import PORTS, start_serving

USERS = 2
_READY_S = 30.0


@dataclass
class Live:
    """A server in a process of its own, and what its users were answered: status and version of each request."""

    gateway: str
    grpc: str
    secret: str
    answers: Counter[tuple[int, str]] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return sum(count for (status, _), count in self.answers.items() if status != 200)

    @property
    def said(self) -> str:
        versions: Counter[str] = Counter()
        for (status, version), count in self.answers.items():
            versions[f"version {version}" if status == 200 else f"status {status or 'none'}"] += count
        return ", ".join(f"{count} {name}" for name, count in sorted(versions.items()))


@contextmanager
def served(spec_file: Path, name: str, build_dir: Path) -> Iterator[Live]:
    """`trireme serve` with a gateway and model control on free ports; USERS of Locust ask it from the first answer to
    the end of the block. Raises MachineError where it does not start."""
    folder = build_dir / name
    secret, log = folder / "control-secret", folder / "serve.log"
    secret.touch(mode=0o600)
    secret.write_text("only-of-this-demo-0123456789")
    control = ["--control-secret-file", str(secret), "--model-control"]
    with log.open("w") as words:
        started = start_serving(spec_file, build_dir, *control, ports=PORTS[:4], words=words)
    try:
        live = Live(f"http://{started.facts['gateway']}", started.facts["grpc"], secret.read_text())
        _await_gateway(live)
        with _asking(live, name):
            yield live
    finally:
        started.end()


def _await_gateway(live: Live) -> None:
    for _ in range(int(_READY_S / 0.2)):
        try:
            with urllib.request.urlopen(f"{live.gateway}/readyz", timeout=_READY_S):
                return
        except OSError:
            time.sleep(0.2)
    raise MachineError("the gateway", got=f"not ready within {_READY_S:.0f} s", expected="ready", fix="see its log")


@contextmanager
def _asking(live: Live, model: str) -> Iterator[None]:
    """Raises MachineError where the users ended before the block."""
    command = [sys.executable, "-m", "measure.live_users", live.gateway, model, f"--users={USERS}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as users:

        def count() -> None:
            assert users.stdout is not None
            for line in users.stdout:
                status, _, version = line.strip().partition(" ")
                live.answers[int(status), version] += 1

        reader = threading.Thread(target=count)
        reader.start()
        try:
            yield
            code = users.poll()
        finally:
            users.terminate()
            reader.join()
    if code is not None:
        raise MachineError("Locust", got=f"exit code {code} while it was to ask", expected="users who ask",
                           fix="see its output above")  # fmt: skip
