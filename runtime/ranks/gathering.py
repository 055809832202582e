"""Host 0's side of a group over several hosts.

A link that is cut tells nobody. The leader sends every agent a word several times a second; what the other kernel does
not acknowledge within `_SILENT_MS` ends the connection, whatever the agent is busy with, and with it the group. On the
agent's side the kernel's keepalive finds out within some seconds. Then both meet anew.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from multiprocessing import AuthenticationError

from runtime.errors import BadEnvironment, ServerFault
from runtime.ranks.channel import Channel
from runtime.ranks.hosts import GREETING_S, WORD, Hello, Hosts, greet

_BEAT_S = 0.25  # between two words to an agent
_SILENT_MS = 1250  # of the other kernel, for such a word
_FIRST_WAIT_S = 240.0  # for the other hosts: images are pulled, models laid out. Triton gives a model 300 s
_NEXT_WAIT_S = 5.0  # once they were there; callers are told meanwhile, and it is tried again


class Gathering:
    """Where agents and remote ranks come to. Lives longer than a group; one group at a time."""

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
                            agent.put(WORD)

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
            if hello.kind == kind and number in numbers and about in (None, said):
                if number in found:
                    found[number][0].close()
                found[number] = connection, said
            else:
                connection.close()
        return found

    def _arrival(self, end: float) -> tuple[Channel, Hello] | None:
        """The next connection that has proved the secret, with what it says of itself; None when the time is up."""
        while (left := end - time.monotonic()) > 0:
            self._listener.settimeout(left)
            try:
                arrived, _ = self._listener.accept()
                return greet(arrived, self.hosts.secret, None, min(end, time.monotonic() + GREETING_S))
            except (OSError, EOFError, ValueError, AuthenticationError):
                continue  # the time is up, a stranger, or one that gave up
        return None
