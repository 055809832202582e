"""A gateway process before a running Triton, and the CPU time that processes have used."""

from __future__ import annotations

import subprocess
import sys

from runtime.server.launch import TritonServer


class MeasuredGateway:
    """Ends with the block."""

    def __init__(self, server: TritonServer) -> None:
        ports = ["--triton-http-port", str(server.ports.http), "--triton-metrics-port", str(server.ports.metrics)]
        command = [sys.executable, "-m", "runtime.gateway", "--model", server.settings.ensemble, *ports]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().split()[1])
        self.model = server.settings.ensemble

    def cpu_s(self) -> float:
        return cpu_s(self._process.pid)

    def __enter__(self) -> MeasuredGateway:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(30)


def cpu_s(pid: int) -> float:
    """Of a process and its children."""
    import psutil

    own = psutil.Process(pid)
    used = [one.cpu_times() for one in (own, *own.children(recursive=True))]
    return float(sum(times.user + times.system for times in used))
