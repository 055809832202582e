"""A group of rank processes, as its owner sees it."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from runtime.errors import ServerFault
from runtime.generation.executor import Copy
from runtime.generation.pools import CacheShape
from runtime.leases import abandoned, owner
from runtime.ranks.hosts import Gathering
from runtime.ranks.process import CPU_WORKER, end_processes, start_rank
from runtime.ranks.program import Layout, RankProgram

# What one rank is fed, and which of the values that it makes it returns.
RankStep = tuple[Mapping[str, NDArray[Any]], Sequence[str]]
Command = tuple[str, tuple[Any, ...]]  # of a rank's worker: a method's name, and its arguments

_START_SECONDS = 120.0
_PREFIX = "trireme-ranks-"


class RankGroup:
    """`count` processes that know each other. A rank that fails, dies or is late ends the whole group.

    Start it from a thread that lives as long as the group: the kernel ends the ranks with that thread.
    """

    def __init__(
        self,
        count: int,
        *,
        start_seconds: float = _START_SECONDS,
        gathering: Gathering | None = None,
        worker: str = CPU_WORKER,
    ) -> None:
        """`worker` is the module that each rank runs.

        With a `gathering`, `count` is over all its hosts; this one runs the first ranks, agents the others.
        """
        self.count, self._gathering, self._worker = count, gathering, worker
        _sweep_dead()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{owner()}-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        try:
            if gathering is None:
                self._start(range(count), f"file://{self._folder / 'store'}", "lo")
            else:
                meeting = f"tcp://{gathering.hosts.leader}:{_free_port()}"
                self._start(gathering.hosts.local(0), meeting, gathering.hosts.interface)
                self._connections += gathering.begin(meeting, start_seconds)
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

    def run_steps(self, steps: Sequence[Sequence[RankStep]], *, seconds: float) -> list[list[dict[str, NDArray[Any]]]]:
        """Steps that do not depend on each other, so that the stages work on different ones at the same time.

        `steps[i][rank]`; the same for the results. `seconds` is the limit of each step.
        """
        commands = [[("run", (dict(arrays), tuple(fetch))) for arrays, fetch in step] for step in steps]
        return self.call(commands, seconds=seconds)

    def reserve(self, shape: CacheShape, capacities: Sequence[int], rows: int, *, seconds: float = 60.0) -> None:
        """Every rank takes memory for the states of `rows` sequences in each pool; see `run_rows`."""
        self.call([[("reserve", (shape, tuple(capacities), rows))] * self.count], seconds=seconds)

    def run_rows(
        self, steps: Sequence[Sequence[RankStep]], rows: Sequence[tuple[int, int, int]], *, seconds: float
    ) -> list[list[dict[str, NDArray[Any]]]]:
        """`run_steps` on reserved states: step i works on `rows[i]`, (pool, first row, number of rows)."""
        commands = [
            [("run_rows", (dict(arrays), tuple(fetch), *where)) for arrays, fetch in step]
            for step, where in zip(steps, rows, strict=True)
        ]
        return self.call(commands, seconds=seconds)

    def copy_rows(self, copies: Sequence[Copy], *, seconds: float) -> None:
        """Every rank copies states between reserved rows, in order."""
        self.call([[("copy_rows", (list(copies),))] * self.count], seconds=seconds)

    def call_one(self, rank: int, command: Command, *, seconds: float) -> Any:
        self._send(rank, command[0], *command[1])
        return self._collect(range(rank, rank + 1), seconds)[0]

    def call(self, commands: Sequence[Sequence[Command]], *, seconds: float) -> list[list[Any]]:
        """`commands[i][rank]`, one after the other on each rank; the answers in the same order.

        `seconds` is the limit of each i.
        """
        if not self._connections:
            raise ServerFault("the rank group has ended")
        ranks = range(len(commands[0])) if commands else range(0)
        # Sent beside the collecting: if both waited in turn, full pipes in both directions would stop everything.
        writer = threading.Thread(target=self._send_all, args=(commands,), daemon=True)
        writer.start()
        try:
            return [self._collect(ranks, seconds) for _ in commands]
        finally:
            writer.join()  # ends at once where the group has ended: its pipes are broken

    def _send_all(self, commands: Sequence[Sequence[Command]]) -> None:
        connections = list(self._connections)
        # The collecting side learns of a fault from the same pipes, and ends the group: it closes a connection under
        # this thread's feet, which then writes to nothing (TypeError).
        with contextlib.suppress(OSError, TypeError):
            for step in commands:
                for command, connection in zip(step, connections, strict=False):
                    connection.send(command)

    def wait_for_death(self, seconds: float) -> bool:
        """Whether a rank has ended within `seconds`, or the group before. Reaps nothing and may run beside `run`."""
        if not self._processes:
            return True
        with contextlib.ExitStack() as stack:
            descriptors = []
            for process in list(self._processes):
                try:
                    descriptors.append(os.pidfd_open(process.pid))
                except ProcessLookupError:  # ended and reaped meanwhile
                    return True
                stack.callback(os.close, descriptors[-1])
            return bool(select.select(descriptors, [], [], seconds)[0])

    def close(self) -> None:
        """Ends every process. May be called twice."""
        for connection in self._connections:
            connection.close()
        if self._gathering is not None:
            self._gathering.dismiss()
        end_processes(self._processes)
        self._processes, self._connections = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, ranks: range, meeting: str, interface: str) -> None:
        for rank in ranks:
            ours, theirs = socket.socketpair()
            with theirs:
                process = start_rank(
                    rank, self.count, meeting, interface, theirs.fileno(), self._log(rank), self._worker
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
        """That the rank has died, and its last words; those of a rank on another host stay there."""
        log = self._log(rank)
        if not log.exists():
            return f"rank {rank} has died, or the link to its host"
        words = log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"rank {rank} has died{f' ({words[0][:200]})' if words else ''}"

    def _end(self, reason: str) -> ServerFault:
        self.close()
        return ServerFault(f"{reason}; all {self.count} ranks were ended")


def _free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _sweep_dead() -> None:
    """Removes folders of owners that were killed before they could tidy up."""
    for leftover in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        if abandoned(leftover, leftover.name.removeprefix(_PREFIX).split("-")[0]):
            shutil.rmtree(leftover, ignore_errors=True)
