"""Ranks of one model on several hosts, as the pods of a LeaderWorkerSet.

Host 0 owns the group. On every other host an agent waits for it, starts that host's ranks when a group begins, and ends
them with it. Commands travel over one TCP connection to each rank; the ranks themselves meet at the leader over TCP.

Everything pickled that arrives runs code, so both ends prove a shared secret before the first pickle. Nothing is
encrypted: the hosts' network must be their own (a NetworkPolicy).

A link that is cut tells nobody. The kernel's keepalive ends the connections on both sides within about `_LOST_S`; the
owner then ends the group and the agent its ranks, whatever these were waiting for, and both meet anew.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from runtime.errors import BadEnvironment, ServerFault
from runtime.ranks.channel import Channel
from runtime.ranks.process import end_processes, start_rank

_LOST_S = 5  # of silence on a connection whose other end must answer keepalives
_GREETING_S = 5.0  # for a stranger to prove the secret and to say who it is; for a message that has begun
_LONGEST_GREETING = 1 << 10  # bytes of a stranger's message
_PAUSE_S = 0.5  # between an agent's attempts
_POLL_S = 0.2


@dataclass(frozen=True)
class Hosts:
    """`leader` is host 0 as all hosts name it; `interface` is the network interface between them, by name.

    Host h runs ranks h * ranks_each … (h + 1) * ranks_each - 1.
    """

    leader: str
    port: int
    count: int
    ranks_each: int
    interface: str
    secret: bytes

    @property
    def ranks(self) -> int:
        return self.count * self.ranks_each

    def local(self, host: int) -> range:
        return range(host * self.ranks_each, (host + 1) * self.ranks_each)


class Gathering:
    """Host 0's side: where agents and remote ranks come to. Lives longer than a group; one group at a time."""

    def __init__(self, hosts: Hosts) -> None:
        """Raises BadEnvironment when the port is taken."""
        self.hosts = hosts
        try:
            self._listener = socket.create_server(("", hosts.port), backlog=hosts.ranks)
        except OSError as error:
            raise BadEnvironment(f"port {hosts.port} for the other hosts cannot be used ({error.strerror})") from error
        self._agents: dict[int, Channel] = {}

    def begin(self, meeting: str, seconds: float) -> list[Channel]:
        """Waits for an agent of every other host, has it start its ranks, and returns their connections, by rank.

        `meeting` is where all ranks find each other: `tcp://host:port`. Raises ServerFault that names the hosts or the
        ranks that did not come within `seconds`.
        """
        end = time.monotonic() + seconds
        self.dismiss()
        try:
            self._agents = self._expect("host", range(1, self.hosts.count), (), end)
            for agent in self._agents.values():
                agent.send(meeting, until=end)
            ranks = self._expect("rank", range(self.hosts.ranks_each, self.hosts.ranks), (meeting,), end)
        except OSError as error:
            self.dismiss()
            raise ServerFault(f"a host went away while the group began ({error.strerror or error})") from error
        return [ranks[rank] for rank in sorted(ranks)]

    def dismiss(self) -> None:
        """Tells every agent that the group has ended: it ends its ranks and comes again."""
        for agent in self._agents.values():
            agent.close()
        self._agents = {}

    def close(self) -> None:
        self.dismiss()
        self._listener.close()

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _expect(self, kind: str, numbers: range, group: tuple[str, ...], end: float) -> dict[int, Channel]:
        """A connection of each number: the newest, where one came again. Others are closed."""
        found: dict[int, Channel] = {}
        while absent := set(numbers) - found.keys():
            arrived = self._arrival(end)
            if arrived is None:
                for connection in found.values():
                    connection.close()
                self.dismiss()
                raise ServerFault(f"{kind} {', '.join(map(str, sorted(absent)))} did not come in time")
            connection, (said, number, *rest) = arrived
            if said == kind and number in numbers and tuple(rest) == group:
                if number in found:
                    found[number].close()
                found[number] = connection
            else:
                connection.close()
        return found

    def _arrival(self, end: float) -> tuple[Channel, tuple[Any, ...]] | None:
        """The next connection that has proved the secret, with what it says of itself; None when the time is up."""
        while (left := end - time.monotonic()) > 0:
            self._listener.settimeout(left)
            try:
                arrived, _ = self._listener.accept()
                return _greet(arrived, self.hosts.secret, None, min(end, time.monotonic() + _GREETING_S))
            except (OSError, EOFError, AuthenticationError):
                continue  # the time is up, a stranger, or one that gave up
        return None


def serve_host(hosts: Hosts, host: int, stopped: Callable[[], bool]) -> None:
    """An agent: runs this host's ranks for one group after another, until `stopped`.

    Raises BadEnvironment when the leader does not know the secret; an absent leader is waited for.
    """
    while not stopped():
        try:
            control = _dial(hosts, ("host", host))
        except AuthenticationError as error:
            raise BadEnvironment(f"host {host} and leader {hosts.leader} were given different secrets") from error
        except (OSError, EOFError):
            time.sleep(_PAUSE_S)
            continue
        with closing(control):
            _serve_group(hosts, host, control, stopped)


def _serve_group(hosts: Hosts, host: int, control: Channel, stopped: Callable[[], bool]) -> None:
    """Returns when the leader has ended the group, or is lost."""
    try:
        while not control.poll(_POLL_S):
            if stopped():
                return
        meeting = str(control.recv(until=time.monotonic() + _GREETING_S))
        with _ranks(hosts, host, meeting):
            while not stopped() and not control.poll(_POLL_S):
                pass
    except (OSError, EOFError):
        return


@contextmanager
def _ranks(hosts: Hosts, host: int, meeting: str) -> Iterator[None]:
    """This host's rank processes, each with a connection of its own to the leader."""
    processes: list[subprocess.Popen[bytes]] = []
    with TemporaryDirectory(prefix="trireme-host-") as folder:
        try:
            for rank in hosts.local(host):
                with _dial(hosts, ("rank", rank, meeting)).detach() as commands:
                    log = Path(folder) / f"rank{rank}.log"
                    processes.append(start_rank(rank, hosts.ranks, meeting, hosts.interface, commands.fileno(), log))
            yield
        finally:
            end_processes(processes)


def _dial(hosts: Hosts, hello: tuple[object, ...]) -> Channel:
    dialled = socket.create_connection((hosts.leader, hosts.port), timeout=_GREETING_S)
    return _greet(dialled, hosts.secret, hello, time.monotonic() + _GREETING_S)[0]


def _greet(
    end: socket.socket, secret: bytes, hello: tuple[object, ...] | None, until: float
) -> tuple[Channel, tuple[Any, ...]]:
    """Both ends prove the secret to each other (HMAC of a challenge), and the one who dialled says who it is: `hello`.
    All of it until that moment; whatever goes wrong, the socket is closed.
    """
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, number in ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, _LOST_S - 2)):
        end.setsockopt(socket.IPPROTO_TCP, option, number)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _LOST_S * 1000)  # for what was sent and not taken
    channel = Channel(end, longest=_LONGEST_GREETING)
    try:
        steps = [deliver_challenge, answer_challenge]
        for step in steps if hello is None else reversed(steps):
            step(cast("Any", _Greeting(channel, until)), secret)
        if hello is None:
            hello = cast("tuple[Any, ...]", channel.recv(until=until))
        else:
            channel.send(hello, until=until)
    except AssertionError as error:  # how Python 3.11 says that this was no challenge
        channel.close()
        raise AuthenticationError("no challenge came") from error
    except BaseException:
        channel.close()
        raise
    channel.longest = None
    return channel, hello


@dataclass(frozen=True)
class _Greeting:
    """What the challenges are sent and read through."""

    channel: Channel
    until: float

    def send_bytes(self, message: bytes) -> None:
        self.channel.send_bytes(message, until=self.until)

    def recv_bytes(self, longest: int) -> bytes:
        return self.channel.recv_bytes(until=self.until)
