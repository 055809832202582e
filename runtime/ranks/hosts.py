"""Ranks of one model on several hosts, as the pods of a LeaderWorkerSet: who the hosts are, and how they greet.

Host 0 owns the group (`gathering`). On every other host an agent waits for it, starts that host's ranks when a group
begins, and ends them with it. Commands travel over one TCP connection to each rank; the ranks themselves meet at the
leader over TCP.

Both ends of every connection prove a shared secret first, and nothing that arrives is ever code (`wire`). Nothing is
encrypted: the hosts' network must be their own (a NetworkPolicy).
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from typing import Any, cast

from runtime.errors import BadEnvironment
from runtime.ranks.channel import Channel

RANK_HOSTS_VARIABLE = "TRIREME_RANK_HOSTS"  # how the launcher tells the model of them: `Hosts.to_text`
WORD = b"here"  # from the leader to an agent, now and then
GREETING_S = 5.0  # for a stranger to prove the secret and to say who it is; for a message that has begun
_LOST_S = 5  # of silence on a connection whose other end must answer keepalives
_LONGEST_GREETING = 1 << 10  # bytes of a stranger's message


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


def ranks_here(hosts: Hosts | None, ranks: int) -> int:
    """Of a model with so many, those that this host runs: all of them where there are no other hosts. Raises
    BadEnvironment as `require` does."""
    if hosts is None:
        return ranks
    hosts.require(ranks)
    return hosts.ranks_each


@dataclass(frozen=True)
class Hello:
    """What the one who dials says: which "host" or "rank" it is, and the content of the host or the rank's meeting."""

    kind: str
    number: int
    about: str

    @staticmethod
    def of(message: bytes) -> Hello:
        """Raises ValueError for anything else."""
        found = json.loads(message)
        if not (isinstance(found, list) and [type(item) for item in found] == [str, int, str]):
            raise ValueError(f"{message[:80]!r} says not who it is")
        return Hello(*found)


def dial(hosts: Hosts, hello: Hello) -> Channel:
    dialled = socket.create_connection((hosts.leader, hosts.port), timeout=GREETING_S)
    return greet(dialled, hosts.secret, hello, time.monotonic() + GREETING_S)[0]


def greet(end: socket.socket, secret: str, hello: Hello | None, until: float) -> tuple[Channel, Hello]:
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
            hello = Hello.of(channel.recv_bytes(until=until))
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
