"""Ranks of one model on several hosts, as the pods of a LeaderWorkerSet.

Host 0 owns the group. On every other host an agent waits for it, starts that host's ranks when a group begins, and ends
them with it. Commands travel over one TCP connection to each rank; the ranks themselves meet at the leader over TCP.

Both ends of every connection prove a shared secret first, and nothing that arrives is ever code (`wire`). Nothing is
encrypted: the hosts' network must be their own (a NetworkPolicy).

A link that is cut tells nobody. The leader sends every agent a word several times a second; what the other kernel does
not acknowledge within `_SILENT_MS` ends the connection, whatever the agent is busy with, and with it the group. On the
agent's side the kernel's keepalive finds out within `_LOST_S`. Then both meet anew.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from runtime.errors import BadEnvironment, ServerFault
from runtime.ranks.channel import Channel
from runtime.ranks.process import CPU_WORKER, end_processes, start_rank

RANK_HOSTS_VARIABLE = "TRIREME_RANK_HOSTS"  # how the launcher tells the model of them: `Hosts.to_text`
_BEAT_S = 0.25  # between two words to an agent
_SILENT_MS = 1250  # of the other kernel, for such a word
_FIRST_WAIT_S = 240.0  # for the other hosts: images are pulled, models laid out. Triton gives a model 300 s
_NEXT_WAIT_S = 5.0  # once they were there; callers are told meanwhile, and it is tried again
_LOST_S = 5  # of silence on a connection whose other end must answer keepalives
_GREETING_S = 5.0  # for a stranger to prove the secret and to say who it is; for a message that has begun
_LONGEST_GREETING = 1 << 10  # bytes of a stranger's message
_PAUSE_S = 0.5  # between an agent's attempts
_POLL_S = 0.2
_WORD = b"here"


@dataclass(frozen=True)
class Hosts:
    """`leader` is host 0 as all hosts name it; `interface` is the network interface between them, by name.

    Host h runs ranks h * ranks_each … (h + 1) * ranks_each - 1. `content` says what is served: ranks read their weights
    from their own host, and a host that holds others is refused.
    """

    leader: str
    port: int
    count: int
    ranks_each: int
    interface: str
    secret: str
    content: str = ""

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str | None) -> Hosts | None:
        """None where the launcher named no hosts."""
        return None if not text else Hosts(**json.loads(text))

    def require(self, ranks: int) -> None:
        """Raises BadEnvironment unless the model has as many ranks as these hosts run."""
        if ranks != self.ranks:
            raise BadEnvironment(
                f"the model has {ranks} ranks, and {self.count} hosts with {self.ranks_each} each run {self.ranks}; "
                "write the manifests of this model's spec again"
            )

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
        self._lock = threading.Lock()  # agents are written to by two threads
        self._wait_s = _FIRST_WAIT_S
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="hosts", daemon=True).start()

    def await_hosts(self, seconds: float | None = None) -> None:
        """Waits for an agent of every other host. Raises ServerFault that names those that did not come in time, and
        those that hold another model.
        """
        self.dismiss()
        found = self._expect("host", range(1, self.hosts.count), time.monotonic() + (seconds or self._wait_s))
        self._wait_s = _NEXT_WAIT_S
        for host, (agent, content) in found.items():
            if content != self.hosts.content:
                for other, _ in found.values():
                    other.close()
                raise ServerFault(
                    f"host {host} holds another version of the model than the leader; start all hosts anew"
                )
            agent.end_after(_SILENT_MS)
        with self._lock:
            self._agents = {host: agent for host, (agent, _) in found.items()}

    def begin(self, meeting: str, seconds: float) -> list[Channel]:
        """Has the agents that have come start their ranks, and returns their connections, by rank.

        `meeting` is where all ranks find each other: `tcp://host:port`. Raises ServerFault that names the ranks that
        did not come within `seconds`.
        """
        end = time.monotonic() + seconds
        try:
            with self._lock:
                for agent in self._agents.values():
                    agent.send_bytes(meeting.encode(), until=end)
            ranks = self._expect("rank", range(self.hosts.ranks_each, self.hosts.ranks), end, meeting)
        except OSError as error:
            self.dismiss()
            raise ServerFault(f"a host went away while the group began ({error.strerror or error})") from error
        return [ranks[rank][0] for rank in sorted(ranks)]

    def watched(self) -> dict[int, int]:
        """Descriptors of the agents' connections, and their hosts. An agent says nothing while its group runs: what
        can be read there is the end.
        """
        with self._lock:
            return {agent.fileno(): host for host, agent in self._agents.items()}

    def dismiss(self) -> None:
        """Tells every agent that the group has ended: it ends its ranks and comes again."""
        with self._lock:
            for agent in self._agents.values():
                agent.close()
            self._agents = {}

    def close(self) -> None:
        """May be called twice."""
        self._closed.set()
        self.dismiss()
        self._listener.close()

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _beat(self) -> None:
        """Words whose acknowledgement shows that the hosts are there."""
        while not self._closed.wait(_BEAT_S):
            with self._lock:
                for agent in self._agents.values():
                    if not agent.unsent:
                        with contextlib.suppress(OSError):  # who runs the group sees it, too
                            agent.put(_WORD)

    def _expect(
        self, kind: str, numbers: range, end: float, about: str | None = None
    ) -> dict[int, tuple[Channel, str]]:
        """A connection of each number, and what it said: `about`, where that is given. The newest, where one came
        again; others are closed.
        """
        found: dict[int, tuple[Channel, str]] = {}
        while absent := set(numbers) - found.keys():
            arrived = self._arrival(end)
            if arrived is None:
                for connection, _ in found.values():
                    connection.close()
                self.dismiss()
                raise ServerFault(f"{kind} {', '.join(map(str, sorted(absent)))} did not come in time")
            connection, hello = arrived
            number, said = hello.number, hello.about
            if hello.kind == kind and number in numbers and said == (said if about is None else about):
                if number in found:
                    found[number][0].close()
                found[number] = connection, said
            else:
                connection.close()
        return found

    def _arrival(self, end: float) -> tuple[Channel, _Hello] | None:
        """The next connection that has proved the secret, with what it says of itself; None when the time is up."""
        while (left := end - time.monotonic()) > 0:
            self._listener.settimeout(left)
            try:
                arrived, _ = self._listener.accept()
                return _greet(arrived, self.hosts.secret, None, min(end, time.monotonic() + _GREETING_S))
            except (OSError, EOFError, ValueError, AuthenticationError):
                continue  # the time is up, a stranger, or one that gave up
        return None


def serve_host(hosts: Hosts, host: int, stopped: Callable[[], bool], worker: str = CPU_WORKER) -> None:
    """An agent: runs this host's ranks for one group after another, until `stopped`. `worker` is the module of a rank.

    Raises BadEnvironment when the leader does not know the secret; an absent leader is waited for.
    """
    while not stopped():
        try:
            control = _dial(hosts, _Hello("host", host, hosts.content))
        except AuthenticationError as error:
            raise BadEnvironment(f"host {host} and leader {hosts.leader} were given different secrets") from error
        except (OSError, EOFError):
            time.sleep(_PAUSE_S)
            continue
        with closing(control):
            _serve_group(hosts, host, control, stopped, worker)


def _serve_group(hosts: Hosts, host: int, control: Channel, stopped: Callable[[], bool], worker: str) -> None:
    """Returns when the leader has ended the group, or is lost."""
    try:
        meeting = _next_message(control, stopped)
        if meeting is not None:
            with _ranks(hosts, host, meeting, worker):
                while _next_message(control, stopped) is not None:
                    pass
    except (OSError, EOFError):
        return


def _next_message(control: Channel, stopped: Callable[[], bool]) -> str | None:
    """What the leader says, but for the words that only show that it is there; None when asked to stop. One that has
    begun must come to its end. Raises OSError, EOFError.
    """
    while not stopped():
        if control.poll(_POLL_S):
            message = control.recv_bytes(until=time.monotonic() + _GREETING_S)
            if message != _WORD:
                return message.decode()
    return None


@contextmanager
def _ranks(hosts: Hosts, host: int, meeting: str, worker: str) -> Iterator[None]:
    """This host's rank processes, each with a connection of its own to the leader."""
    processes: list[subprocess.Popen[bytes]] = []
    with TemporaryDirectory(prefix="trireme-host-") as folder:
        try:
            for rank in hosts.local(host):
                with _dial(hosts, _Hello("rank", rank, meeting)).detach() as commands:
                    log = Path(folder) / f"rank{rank}.log"
                    end = commands.fileno()
                    processes.append(start_rank(rank, hosts.ranks, meeting, hosts.interface, end, log, worker))
            yield
        finally:
            _tell_deaths(processes, [Path(folder) / f"rank{rank}.log" for rank in hosts.local(host)])
            end_processes(processes)


def _tell_deaths(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    """The last words of ranks that ended by themselves: the leader does not get them."""
    for process, log in zip(processes, logs, strict=False):
        if process.poll() is not None:
            words = log.read_text(errors="replace").strip().splitlines()[-1:]
            print(
                f"ranks: {log.stem} has died ({process.returncode}) {''.join(words)[:200]}", file=sys.stderr, flush=True
            )


def _dial(hosts: Hosts, hello: _Hello) -> Channel:
    dialled = socket.create_connection((hosts.leader, hosts.port), timeout=_GREETING_S)
    return _greet(dialled, hosts.secret, hello, time.monotonic() + _GREETING_S)[0]


@dataclass(frozen=True)
class _Hello:
    """What the one who dials says: which "host" or "rank" it is, and the content of the host or the rank's meeting."""

    kind: str
    number: int
    about: str

    @staticmethod
    def of(message: bytes) -> _Hello:
        """Raises ValueError for anything else."""
        found = json.loads(message)
        if not (isinstance(found, list) and [type(item) for item in found] == [str, int, str]):
            raise ValueError(f"{message[:80]!r} says not who it is")
        return _Hello(*found)


def _greet(end: socket.socket, secret: str, hello: _Hello | None, until: float) -> tuple[Channel, _Hello]:
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
            step(cast("Any", _Greeting(channel, until)), secret.encode())
        if hello is None:
            hello = _Hello.of(channel.recv_bytes(until=until))
        else:
            channel.send_bytes(json.dumps([hello.kind, hello.number, hello.about]).encode(), until=until)
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
