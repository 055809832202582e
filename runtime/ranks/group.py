"""A group of rank processes, as its owner sees it."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from runtime.errors import ServerFault
from runtime.leases import abandoned, owner
from runtime.ports import free_ports
from runtime.ranks import wire
from runtime.ranks.channel import Channel
from runtime.ranks.gathering import Gathering
from runtime.ranks.process import CPU_WORKER, end_processes, last_words, start_rank
from runtime.ranks.program import RankGrid, RankProgram
from runtime.rows import CacheShape
from runtime.step import Copy

# What one rank is fed, and which of the values that it makes it returns.
RankStep = tuple[Mapping[str, NDArray[Any]], Sequence[str]]
Command = tuple[str, tuple[Any, ...]]  # of a rank's worker: a method's name, and its arguments

_START_SECONDS = 120.0
_PREFIX = "trireme-ranks-"


class RankGroup:
    """`count` processes that know each other. A rank that fails, dies or is late ends the whole group, and so does
    whatever else interrupts a call: no answer may be taken for that of a later call.

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
        self._channels: list[Channel] = []
        try:
            if gathering is None:
                self._start(range(count), f"file://{self._folder / 'store'}", "lo")
            else:
                gathering.await_hosts()
                meeting = f"tcp://{gathering.hosts.leader}:{free_ports(1, '')[0]}"
                self._start(gathering.hosts.local(0), meeting, gathering.hosts.interface)
                self._channels += gathering.begin(meeting, start_seconds)
            self._exchange([[] for _ in range(count)], range(count), 1, start_seconds)
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def load(self, programs: Sequence[RankProgram], layout: RankGrid, *, seconds: float = 120.0) -> None:
        """A program for each rank of the layout; processes beyond it stay idle."""
        if len(programs) != layout.ranks or layout.ranks > self.count:
            raise ServerFault(f"{len(programs)} programs for {layout.ranks} ranks, and {self.count} processes")
        idle = [None] * (self.count - len(programs))
        self.call([[("load", (program, layout)) for program in (*programs, *idle)]], seconds=seconds)

    def forget(self, *, seconds: float = 60.0) -> None:
        """Drops the states of all ranks."""
        self.call([[("forget", ())] * self.count], seconds=seconds)

    def run(
        self, feeds: Sequence[Mapping[str, NDArray[Any]]], fetch: Sequence[str], *, seconds: float
    ) -> list[dict[str, NDArray[Any]]]:
        """One step on ranks 0 … len(feeds) - 1; of `fetch`, each rank returns what it makes."""
        return self.run_steps([[(arrays, fetch) for arrays in feeds]], seconds=seconds)[0]

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
        return self._exchange([[command]], range(rank, rank + 1), 1, seconds)[0][0]

    def call(self, commands: Sequence[Sequence[Command]], *, seconds: float) -> list[list[Any]]:
        """`commands[i][rank]`, one after the other on each rank; the answers in the same order.

        `seconds` is the limit of each i.
        """
        ranks = range(len(commands[0])) if commands else range(0)
        return self._exchange(list(zip(*commands, strict=True)), ranks, len(commands), seconds)

    def wait_for_death(self, seconds: float) -> bool:
        """Whether a rank has ended within `seconds`, another host is lost, or the group has ended before. Reaps nothing
        and may run beside `run`.
        """
        if not self._processes:
            return True
        with contextlib.ExitStack() as stack:
            ended = select.poll()  # `select.select` takes no descriptor above 1023
            if self._gathering is not None:
                for descriptor in self._gathering.watched():
                    ended.register(descriptor, select.POLLIN)
                for channel in self._channels[len(self._processes) :]:  # of ranks on other hosts
                    if (descriptor := channel.fileno()) < 0:  # closed meanwhile
                        return True
                    ended.register(descriptor, select.POLLRDHUP)  # their end, not their answers
            for process in list(self._processes):
                try:
                    descriptor = os.pidfd_open(process.pid)
                except ProcessLookupError:  # ended and reaped meanwhile
                    return True
                stack.callback(os.close, descriptor)
                ended.register(descriptor, select.POLLIN)
            return bool(ended.poll(seconds * 1e3))

    def close(self) -> None:
        """Ends every process. May be called twice."""
        for channel in self._channels:
            channel.close()
        if self._gathering is not None:
            self._gathering.dismiss()
        end_processes(self._processes)
        self._processes, self._channels = [], []
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
            self._channels.append(Channel(ours))
            with theirs:
                process = start_rank(
                    rank, self.count, meeting, interface, theirs.fileno(), self._log(rank), self._worker
                )
            self._processes.append(process)

    def _exchange(
        self, commands: Sequence[Sequence[Command]], ranks: range, count: int, seconds: float
    ) -> list[list[Any]]:
        """Sends `commands[i]` to `ranks[i]`, one after the other, and collects `count` answers of each: [answer][rank].

        Each row of answers must be complete `seconds` after the one before. Writing and reading take turns as the ranks
        are ready, so that full pipes in both directions stop nothing. Whatever goes wrong with one rank ends them all.
        """
        if not self._channels:
            raise ServerFault("the rank group has ended")
        answers: dict[int, list[Any]] = {rank: [] for rank in ranks}
        try:
            for rank, given in zip(ranks, commands, strict=True):
                for command in given:
                    self._move(rank, answers[rank], wire.encode(command))
            done, deadline = 0, time.monotonic() + seconds
            while done < count:
                late = [rank for rank in ranks if len(answers[rank]) <= done]
                if not late:
                    done, deadline = done + 1, time.monotonic() + seconds
                    continue
                ready = self._ready([rank for rank in ranks if len(answers[rank]) < count], deadline)
                if not ready:
                    raise self._end(f"no answer from rank {', '.join(map(str, late))} within {seconds:.0f} s")
                for rank in ready:
                    self._move(rank, answers[rank])
        except BaseException:
            self.close()
            raise
        return [[answers[rank][at] for rank in ranks] for at in range(count)]

    def _ready(self, ranks: Sequence[int], deadline: float) -> list[int]:
        """Those that have something to say, or can take what is left to send them; none when the time is up. Raises
        ServerFault when another host is lost.
        """
        polled = select.poll()
        hosts = {} if self._gathering is None else self._gathering.watched()
        for descriptor in hosts:
            polled.register(descriptor, select.POLLIN)
        at = {self._channels[rank].fileno(): rank for rank in ranks}
        for descriptor, rank in at.items():
            polled.register(descriptor, select.POLLIN | (select.POLLOUT if self._channels[rank].unsent else 0))
        found = [descriptor for descriptor, _ in polled.poll(max(0.0, deadline - time.monotonic()) * 1e3)]
        if lost := [hosts[descriptor] for descriptor in found if descriptor in hosts]:
            raise self._end(f"host {lost[0]}, or the link to it, is lost")
        return [at[descriptor] for descriptor in found]

    def _move(self, rank: int, answers: list[Any], command: bytes | None = None) -> None:
        """Sends and receives what goes without waiting."""
        channel = self._channels[rank]
        try:
            if command is not None:
                channel.put(command)
                return
            channel.write()
            while (message := channel.take()) is not None:
                status, answer = wire.decode(message)
                if status == "failed":
                    raise self._end(f"rank {rank} failed: {answer}")
                answers.append(answer)
        except (EOFError, OSError) as error:
            raise self._end(self._obituary(rank)) from error
        except (wire.NoMessage, TypeError, ValueError) as error:
            raise self._end(f"rank {rank} sent what is no answer ({error})") from error

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    def _obituary(self, rank: int) -> str:
        """That the rank has died, and its last words; those of a rank on another host stay there."""
        log = self._log(rank)
        if not log.exists():
            return f"rank {rank} has died, or the link to its host"
        words = last_words(log)
        return f"rank {rank} has died{f' ({words})' if words else ''}"

    def _end(self, reason: str) -> ServerFault:
        self.close()
        return ServerFault(f"{reason}; all {self.count} ranks were ended")


def _sweep_dead() -> None:
    """Removes folders of owners that were killed before they could tidy up."""
    for leftover in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        if abandoned(leftover, leftover.name.removeprefix(_PREFIX).split("-")[0]):
            shutil.rmtree(leftover, ignore_errors=True)
