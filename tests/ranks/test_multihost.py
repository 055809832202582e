"""Ranks on two hosts: network namespaces with a cable between them, which is cut in the middle of a step."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest

from runtime.errors import BadEnvironment, ServerFault
from runtime.ports import free_ports
from runtime.ranks.agent import serve_host
from runtime.ranks.channel import Channel
from runtime.ranks.gathering import Gathering
from runtime.ranks.group import RankGroup
from runtime.ranks.hosts import Hello, Hosts, _Greeting, greet
from runtime.step import Row
from tests import ROOT
from tests.partition.test_ranks import gone

PORT, SECRET, CABLE = 29400, "s3cret", "cable0"
LEADER, WORKER = "10.213.7.1", "10.213.7.2"
PATIENCE_S = 90.0
AGENT = (
    "import sys; from runtime.ranks.agent import *; "
    f"serve_host(Hosts('{LEADER}', {PORT}, 2, 1, '{CABLE}', sys.argv[1]), 1, lambda: False)"
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@dataclass
class Process:
    """A Python program inside a namespace."""

    popen: subprocess.Popen[str]

    @staticmethod
    def start(namespace: str, *arguments: str, stderr: IO[str] | int = subprocess.PIPE) -> Process:
        command = ["ip", "netns", "exec", namespace, sys.executable, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, text=True, env=environment, cwd=ROOT)
        return Process(popen)

    def ask(self, request: str) -> str:
        """The answer, after the program has said that it is at it."""
        self.begin(request)
        return self.line()

    def begin(self, request: str) -> None:
        print(request, file=_open(self.popen.stdin), flush=True)
        found = self.line()
        assert found == "stepping", found

    def line(self) -> str:
        return _open(self.popen.stdout).readline().strip()

    def children(self) -> list[int]:
        """Process ids of the ranks. `ip netns exec` becomes the program, so its children are the program's."""
        found = []
        for task in Path(f"/proc/{self.popen.pid}/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
        return found

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate(timeout=20)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two hosts with one cable between them. Skips where the kernel does not let us."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    names = f"trireme-a-{os.getpid()}", f"trireme-b-{os.getpid()}"
    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no right to make network namespaces: {error.stderr.decode().strip()}")
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, (LEADER, WORKER), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def test_a_link_cut_in_the_middle_of_a_step(namespaces: tuple[str, str]) -> None:
    first, second = namespaces
    owner = Process.start(first, "-m", "tests.ranks.multihost_owner", LEADER, str(PORT), CABLE, SECRET)
    agent = Process.start(second, "-c", AGENT, SECRET)
    try:
        assert owner.ask("group") == "[[6.0], [6.0]]"
        ranks = [*owner.children(), *agent.children()]
        assert len(ranks) == 2, "one rank on each host"
        os.kill(agent.children()[0], signal.SIGSTOP)  # so that the step is surely not over yet
        owner.begin("step")
        ip("-n", second, "link", "set", CABLE, "down")
        reason = "the group fails by the silence of the link, long before its limit on the step"
        assert owner.line().startswith("failed: host 1, or the link to it, is lost"), reason
        assert gone(ranks), "on both hosts: the agent too has noticed"
        ip("-n", second, "link", "set", CABLE, "up")
        assert owner.ask("group") == "[[6.0], [6.0]]"
    finally:
        owner.end()
        agent.end()


@pytest.mark.slow
def test_a_rank_that_dies_on_the_other_host(namespaces: tuple[str, str]) -> None:
    first, second = namespaces
    owner = Process.start(first, "-m", "tests.ranks.multihost_owner", LEADER, str(PORT), CABLE, SECRET)
    agent = Process.start(second, "-c", AGENT, SECRET)
    try:
        assert owner.ask("group") == "[[6.0], [6.0]]"
        ranks = [*owner.children(), *agent.children()]
        os.kill(agent.children()[0], signal.SIGKILL)
        assert owner.ask("step").startswith("failed: rank")
        assert gone(ranks)
        assert owner.ask("group") == "[[6.0], [6.0]]"
        survivors = [*owner.children(), *agent.children()]
        owner.end()
        assert gone(survivors), "an owner that is killed leaves no rank on any host"
    finally:
        owner.end()
        agent.end()


def hosts(port: int, secret: str = "right") -> Hosts:
    return Hosts("127.0.0.1", port, 2, 1, "lo", secret)


@pytest.fixture
def gathering() -> Iterator[Gathering]:
    with Gathering(hosts(free_ports(1, "")[0])) as found:
        yield found


STOPPING = "tests.ranks.stopping_rank"


@pytest.fixture
def agent(gathering: Gathering) -> Iterator[None]:
    """Runs the second host's ranks, which are processes of this one: quick ones, that compute nothing."""
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(serve_host, gathering.hosts, 1, stopped.is_set, STOPPING)
        yield
        stopped.set()
        running.result(timeout=PATIENCE_S)


def far_rank(group: RankGroup) -> int:
    """The agent runs in this process, so its ranks are children of this one as the group's own are."""
    ours = {child.pid for child in psutil.Process().children() if STOPPING in child.cmdline()}
    [found] = ours - set(group.processes)
    return found


@pytest.mark.usefixtures("agent")
def test_a_group_over_two_hosts_ends_with_its_far_rank_and_comes_again(gathering: Gathering) -> None:
    echo = [("answer", ({"x": np.float32([1, 2])}, Row(1, 2))), ("answer", ("other",))]
    for _ in range(2):
        group = RankGroup(2, gathering=gathering, worker=STOPPING)
        [[first, second]] = group.call([echo], seconds=PATIENCE_S)
        assert (first[0]["x"].tolist(), first[1], second) == ([1, 2], Row(1, 2), ("other",))
        assert len(group.processes) == 1, "the other one is the agent's"
        assert not group.wait_for_death(0)
        far, near = far_rank(group), group.processes[0]
        os.kill(far, signal.SIGKILL)
        assert group.wait_for_death(PATIENCE_S), "also while nobody asks"
        with pytest.raises(ServerFault, match="rank 1 has died, or the link to its host"):
            group.call([echo], seconds=PATIENCE_S)
        assert gone([far, near])


def test_the_end_of_an_agent_ends_a_step_of_its_ranks(gathering: Gathering) -> None:
    """Its rank lives on for a moment: the leader does not wait for it."""
    with ThreadPoolExecutor(2) as pool:
        stopped = threading.Event()
        agent = pool.submit(serve_host, gathering.hosts, 1, stopped.is_set, STOPPING)
        group = RankGroup(2, gathering=gathering, worker=STOPPING)
        step = pool.submit(group.call, [[("answer", ()), ("deaf", ())]], seconds=PATIENCE_S)
        stopped.set()
        with pytest.raises(ServerFault, match=r"host 1, or the link to it, is lost|rank 1 has died"):
            step.result(timeout=PATIENCE_S)
        agent.result(timeout=PATIENCE_S)


def test_a_host_with_another_model_is_refused(gathering: Gathering) -> None:
    stopped = threading.Event()
    other = replace(gathering.hosts, content="other")
    with ThreadPoolExecutor(1) as pool:
        agent = pool.submit(serve_host, other, 1, stopped.is_set, STOPPING)
        with pytest.raises(ServerFault, match="host 1 holds another version of the model"):
            gathering.await_hosts(PATIENCE_S)
        stopped.set()
        gathering.close()
        agent.result(timeout=PATIENCE_S)


def test_a_model_of_other_ranks_is_refused() -> None:
    told = Hosts.from_text(hosts(1).to_text())
    assert told == hosts(1)
    assert Hosts.from_text(None) is None
    told.require(2)
    with pytest.raises(BadEnvironment, match="the model has 4 ranks, and 2 hosts with 1 each run 2"):
        told.require(4)


def test_a_host_that_does_not_come(gathering: Gathering) -> None:
    with pytest.raises(ServerFault, match="host 1 did not come in time"):
        gathering.await_hosts(0.3)


def test_a_group_of_one_host_waits_for_nobody() -> None:
    with Gathering(Hosts("127.0.0.1", 0, 1, 2, "lo", "right")) as alone:
        alone.await_hosts(0.3)
        assert alone.begin("tcp://127.0.0.1:1", 0.3) == []


def test_a_stranger_is_not_listened_to(gathering: Gathering) -> None:
    """Someone without the secret gets no further than the challenge, and one who says nothing does not stop others."""
    port = gathering.hosts.port
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", port)) as scanner:
        scanner.sendall(b"GET / HTTP/1.1\r\n\r\n")
        waiting = pool.submit(gathering.await_hosts, 3.0)
        with pytest.raises(BadEnvironment, match="different secrets"):
            serve_host(hosts(port, "wrong"), 1, lambda: False)
        with pytest.raises(ServerFault, match="host 1 did not come"):
            waiting.result(timeout=PATIENCE_S)


def test_a_stranger_that_sends_slowly_is_not_waited_for(gathering: Gathering) -> None:
    """The limit is of all that it says, not of each byte."""
    served = threading.Event()

    def drip(scanner: socket.socket) -> bool:
        scanner.sendall(struct.pack("!i", 250))
        return not any(served.wait(0.1) or scanner.send(b"x") < 1 for _ in range(250))

    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", gathering.hosts.port)) as scanner:
        dripping = pool.submit(drip, scanner)
        with pytest.raises(ServerFault, match="host 1 did not come"):
            gathering.await_hosts(0.5)
        served.set()
        with suppress(OSError):  # it was hung up on
            assert not dripping.result(timeout=PATIENCE_S), "it was listened to until its end"


def test_a_message_of_a_stranger_takes_no_memory(gathering: Gathering) -> None:
    with socket.create_connection(("127.0.0.1", gathering.hosts.port)) as scanner:
        scanner.sendall(struct.pack("!iQ", -1, 1 << 62))
        with pytest.raises(ServerFault, match="host 1 did not come"):
            gathering.await_hosts(0.5)


def test_a_host_that_stops_in_the_middle_of_its_name(gathering: Gathering) -> None:
    end = time.monotonic() + PATIENCE_S
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gathering.await_hosts, 1.0)
        with closing(Channel(socket.create_connection(("127.0.0.1", gathering.hosts.port)))) as half:
            answer_challenge(_Greeting(half, end), b"right")  # type: ignore[arg-type]
            deliver_challenge(_Greeting(half, end), b"right")  # type: ignore[arg-type]
            os.write(half.fileno(), struct.pack("!i", 100) + b"half")
            with pytest.raises(ServerFault, match="host 1 did not come"):
                waiting.result(timeout=PATIENCE_S)


def test_an_agent_whose_leader_stops_in_the_middle_of_a_message_can_be_stopped() -> None:
    stopped, asked = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        agent = pool.submit(serve_host, hosts(listener.getsockname()[1]), 1, stopped.is_set)
        arrived, _ = listener.accept()
        leader, hello = greet(arrived, "right", None, time.monotonic() + PATIENCE_S)
        asked.append(hello)
        os.write(leader.fileno(), struct.pack("!i", 100) + b"half")
        stopped.set()
        agent.result(timeout=PATIENCE_S)
        leader.close()
    assert asked == [Hello("host", 1, "")]


def test_an_agent_without_a_leader_can_be_stopped() -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        asked = iter([False, False, True])
        begun = time.monotonic()
        serve_host(hosts(probe.getsockname()[1]), 1, lambda: next(asked))
        assert time.monotonic() - begun < PATIENCE_S


def test_a_port_that_is_taken(gathering: Gathering) -> None:
    with pytest.raises(BadEnvironment, match="for the other hosts cannot be used"):
        Gathering(gathering.hosts)


def test_which_ranks_a_host_runs() -> None:
    found = Hosts("ranks-0.ranks", 29400, 3, 4, "eth0", "s")
    assert found.ranks == 12
    assert [rank for host in range(3) for rank in found.local(host)] == list(range(12))


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
