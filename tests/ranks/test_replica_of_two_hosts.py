"""A language model that is served over two hosts: real Triton and pods' programs in network namespaces, a cable between
them that is cut, slowed down, and whose far end is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from builders.partition.cut.shard import partition_graph
from builders.partition.prove.verify import rank_programs
from runtime.generation.engine import generate
from runtime.generation.request import SamplingParams
from runtime.ranks.program import RankGrid
from runtime.ranks.stored import StoredPrograms, save_programs
from tests.generation.setup import VOCABULARY, prompts, real_engine, write_repository
from tests.ranks.test_multihost import CABLE, LEADER, Process, ip, namespaces

__all__ = ["namespaces"]  # the fixture
pytest_plugins = ("tests.generation.fixtures",)
pytestmark = [pytest.mark.triton, pytest.mark.slow]

SECRET, GRPC, HEALTH = "a-secret-of-the-hosts", 8001, 8003
CAPACITIES, LONG = (64, 2048), 1500
PATIENCE_S = 240.0
LATE_S = 5.0  # two seconds are promised; a machine whose cores others use is later


@dataclass
class Replica:
    """`leader` serves, `agent` runs the second stage, `client` asks on the leader's host."""

    leader: Process
    agent: Process
    client: Process
    far: str  # namespace of the agent
    logs: Path

    def tell(self, **request: Any) -> None:
        assert self.client.popen.stdin is not None
        print(json.dumps(request), file=self.client.popen.stdin, flush=True)

    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.client.line())
        return found

    def until(self, *keys: str) -> dict[str, Any]:
        while True:
            found = self.event()
            if set(keys) & found.keys():
                return found

    def ask(self, asked: list[list[int]], max_tokens: int) -> list[list[int]] | str:
        """The tokens of each, or the first error."""
        self.tell(prompts=asked, max_tokens=max_tokens)
        ended: dict[int, list[int]] = {}
        error = ""
        while "done" not in (found := self.event()):
            error = error or found.get("error", "")
            if "ended" in found:
                ended[found["ended"]] = found["tokens"]
        return error or [ended[number] for number in sorted(ended)]

    def begin(self, count: int) -> None:
        """Streams of which each has its first tokens."""
        self.tell(prompts=[[5, 6, 7 + number] for number in range(count)], max_tokens=LONG)
        for _ in range(count):
            self.until("began")

    def ended_after(self, moment: float, count: int) -> float:
        """Seconds from that moment until the last of `count` streams had its error, which says UNAVAILABLE."""
        errors = [self.until("error", "ended") for _ in range(count)]
        assert all("UNAVAILABLE" in found.get("error", "it came to its end") for found in errors), errors
        self.until("done")
        return max(float(found["at"]) for found in errors) - moment

    def becomes(self, status: int) -> str:
        """What the health port says with that status, once it does."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            self.tell(ready=True)
            found = self.event()
            if found["ready"] == status:
                return str(found.get("why", ""))
            time.sleep(0.3)
        raise AssertionError(f"{found}\n{self.words()}")

    def serves_again(self, asked: list[list[int]], expected: list[list[int]]) -> None:
        end = time.monotonic() + PATIENCE_S
        found: Any = None
        while time.monotonic() < end and found != expected:
            found = self.ask(asked, 8)
            assert found == expected or "UNAVAILABLE" in found, found
        assert found == expected, self.words()

    def far_ranks(self) -> list[int]:
        return self.agent.children()

    def words(self) -> str:
        """The end of what leader, agent and client logged."""
        return "\n".join(file.read_text()[-3000:] for file in sorted(self.logs.glob("*.log")))


def write_replica(root: Path, graph: Path) -> Path:
    """A repository whose one model is a pipeline of two stages."""
    partition = partition_graph(graph, 1, 2, root / "parts")
    outputs = tuple(port.name for port in partition.outputs)
    save_programs(StoredPrograms(RankGrid(1, 2), outputs, tuple(rank_programs(partition))), partition.directory)
    cache = {"heads": 2, "head_dim": 8, "dtype": "float32", "vocabulary": VOCABULARY}
    changes = {"executor": "ranks", "files": {"ranks": "ranks.json"}, "capacities": CAPACITIES, "rank_cache": cache}
    repository = write_repository(root / "repository", graph, **changes, max_length=2048, end_ids=())
    shutil.copytree(partition.directory, repository / "tiny" / "1", dirs_exist_ok=True)
    return repository


@pytest.fixture
def replica(namespaces: tuple[str, str], decoder_graph: Path, tmp_path: Path) -> Iterator[Replica]:
    repository = write_replica(tmp_path, decoder_graph)
    (tmp_path / "secret").write_text(SECRET)
    common = [
        f"--leader={LEADER}", "--hosts=2", "--ranks-each=1", f"--hosts-secret-file={tmp_path / 'secret'}",
        f"--interface={CABLE}",
    ]  # fmt: skip
    near, far = namespaces
    serve = [f"--health-port={HEALTH}", f"--grpc-port={GRPC}", f"--ready-timeout-s={PATIENCE_S}", "--exit-timeout-s=5"]
    started = []
    try:
        for host, arguments in (
            (near, ["runtime.pod", "serve", str(repository), *serve, *common]),
            (far, ["runtime.pod", "ranks", str(repository), "--platform=cpu", "--host=1", *common]),
            (near, ["tests.ranks.replica_client", str(GRPC), str(HEALTH)]),
        ):
            log = (tmp_path / f"{len(started)}.log").open("w")
            started.append(Process.start(host, "-m", *arguments, stderr=log))
        found = Replica(*started, far, tmp_path)
        found.becomes(200)
        yield found
    finally:
        for process in reversed(started):
            process.popen.terminate()
        for process in reversed(started):
            try:
                process.popen.wait(60)
            finally:
                process.end()


def reference(graph: Path) -> tuple[list[list[int]], list[list[int]]]:
    asked = prompts(6)
    return [prompt.tolist() for prompt in asked], generate(
        real_engine(graph, CAPACITIES, 4), asked, SamplingParams(max_tokens=8)
    )


def test_it_serves_one_ranks_tokens_and_survives_a_cut_cable(replica: Replica, decoder_graph: Path) -> None:
    asked, expected = reference(decoder_graph)
    assert replica.ask(asked, 8) == expected, "the tokens of one rank on one host"
    [rank] = replica.far_ranks()
    assert "runtime.ranks.worker" in psutil.Process(rank).cmdline()

    replica.begin(3)
    cut = time.monotonic()
    ip("-n", replica.far, "link", "set", CABLE, "down")
    assert replica.ended_after(cut, 3) < LATE_S
    assert "UNAVAILABLE" in replica.ask(asked[:1], 8), "the far host is not there"
    replica.becomes(503)
    ip("-n", replica.far, "link", "set", CABLE, "up")
    replica.serves_again(asked, expected)
    replica.becomes(200)

    replica.begin(2)
    killed = time.monotonic()
    os.kill(replica.far_ranks()[0], signal.SIGKILL)
    assert replica.ended_after(killed, 2) < LATE_S
    replica.serves_again(asked, expected)


def test_a_slow_cable_is_slow_and_no_fault(replica: Replica, decoder_graph: Path) -> None:
    asked, expected = reference(decoder_graph)
    answers, seconds = [replica.ask(asked, 8)], []
    slow = ("rate", "128kbit", "burst", "2kb", "latency", "400ms")
    for command in ((), ("tc", "qdisc", "add", "dev", CABLE, "root", "tbf", *slow)):
        if command:
            ip("netns", "exec", replica.far, *command)
        begun = time.monotonic()
        answers.append(replica.ask(asked, 8))
        seconds.append(time.monotonic() - begun)
    assert answers == [expected] * 3
    assert seconds[1] > 2 * seconds[0], "each step waits for the cable"


def test_a_rank_that_is_killed_ten_times_under_load(replica: Replica, decoder_graph: Path) -> None:
    asked, expected = reference(decoder_graph)
    for _ in range(10):
        replica.begin(3)
        killed = time.monotonic()
        os.kill(replica.far_ranks()[0], signal.SIGKILL)
        assert replica.ended_after(killed, 3) < LATE_S
        replica.serves_again(asked, expected)
    assert _waits(lambda: len(replica.far_ranks()) == 1), "no rank is left behind"


def _waits(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and not condition():
        time.sleep(0.1)
    return condition()
