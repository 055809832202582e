"""A group of rank processes, as its owner sees it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from runtime.errors import ServerFault
from runtime.ranks.program import Layout, RankProgram

_START_SECONDS = 120.0
_ROOT = Path(__file__).resolve().parents[2]
_PREFIX = "trireme-ranks-"


class RankGroup:
    """`count` processes that know each other. A rank that fails, dies or is late ends the whole group.

    Start it from a thread that lives as long as the group: the kernel ends the ranks with that thread.
    """

    def __init__(self, count: int, *, start_seconds: float = _START_SECONDS) -> None:
        self.count = count
        _sweep_dead()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        try:
            for rank in range(count):
                self._start(rank)
            self._collect(range(count), start_seconds)
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def load(self, programs: Sequence[RankProgram], layout: Layout, *, seconds: float = 120.0) -> None:
        """A program for each rank of the layout; processes beyond it stay idle."""
        if len(programs) != layout.ranks or layout.ranks > self.count:
            raise ServerFault(f"{len(programs)} programs for {layout.ranks} ranks, and {self.count} processes")
        for rank in range(self.count):
            self._send(rank, "load", programs[rank] if rank < len(programs) else None, layout)
        self._collect(range(self.count), seconds)

    def forget(self, *, seconds: float = 60.0) -> None:
        """Drops the states of all ranks."""
        for rank in range(self.count):
            self._send(rank, "forget")
        self._collect(range(self.count), seconds)

    def run(
        self, feeds: Sequence[Mapping[str, NDArray[Any]]], fetch: Sequence[str], *, seconds: float
    ) -> list[dict[str, NDArray[Any]]]:
        """One step on ranks 0 … len(feeds) - 1; of `fetch`, each rank returns what it makes."""
        for rank, arrays in enumerate(feeds):
            self._send(rank, "run", dict(arrays), tuple(fetch))
        return self._collect(range(len(feeds)), seconds)

    def close(self) -> None:
        """Ends every process. May be called twice."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes, self._connections = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [
                str(rank),
                str(self.count),
                str(self._folder / "store"),
                str(theirs.fileno()),
                str(os.getpid()),
            ]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "runtime.ranks.worker", *arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stderr=log,
                    env={**environment, "PYTHONPATH": os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")])},
                )
        self._processes.append(process)
        self._connections.append(Connection(ours.detach()))

    def _send(self, rank: int, name: str, *arguments: object) -> None:
        if not self._connections:
            raise ServerFault("the rank group has ended")
        try:
            self._connections[rank].send((name, arguments))
        except OSError as error:
            raise self._end(self._obituary(rank)) from error

    def _collect(self, ranks: range, seconds: float) -> list[Any]:
        """One answer of each rank within `seconds`. Whatever goes wrong with one rank ends them all."""
        from multiprocessing.connection import wait

        answers: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        waiting = {self._connections[rank]: rank for rank in ranks}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(map(str, sorted(waiting.values())))
                raise self._end(f"no answer from rank {late} within {seconds:.0f} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    status, answers[rank] = connection.recv()
                except (EOFError, OSError) as error:
                    raise self._end(self._obituary(rank)) from error
                if status == "failed":
                    raise self._end(f"rank {rank} failed: {answers[rank]}")
        return [answers[rank] for rank in ranks]

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    def _obituary(self, rank: int) -> str:
        """That the rank has died, and its last words."""
        words = self._log(rank).read_text(errors="replace").strip().splitlines()[-1:]
        return f"rank {rank} has died{f' ({words[0][:200]})' if words else ''}"

    def _end(self, reason: str) -> ServerFault:
        self.close()
        return ServerFault(f"{reason}; all {self.count} ranks were ended")


def _sweep_dead() -> None:
    """Removes folders of owners that were killed before they could tidy up."""
    for leftover in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = leftover.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(leftover, ignore_errors=True)
