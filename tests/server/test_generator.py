"""A generator behind a real Triton and its supervisor: killed, hung, overloaded, and who may be taken for the probe."""

from __future__ import annotations

import http.client
import json
import os
import queue
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tritonclient import grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from runtime.channel import infer_input
from runtime.server.health import Health
from runtime.server.launch import EXIT_TIMEOUT_S, Ports, TritonServer
from runtime.server.probing import Failure, Probe
from runtime.server.supervise import ProbePace, Supervisor
from tests.conftest import wait_until
from tests.generation.setup import write_repository

pytestmark = pytest.mark.triton
pytest_plugins = ("tests.generation.fixtures",)

LONGEST = 4096
PATIENCE_S = 60


@dataclass
class Supervised:
    """A server that is watched, as `trireme serve` does it."""

    server: TritonServer
    health: Health
    said: list[str] = field(default_factory=list)
    stopped_s: float = 0.0
    heard: list[int] = field(default_factory=list)  # the server's process, at each turn in which no answer may be used

    def turn(self) -> None:
        """As what lives beside the server does several times a second."""
        if self.health.closed() and psutil.pid_exists(self.server.pid):
            self.heard.append(self.server.pid)

    @property
    def repairs(self) -> int:
        return sum("repair " in line for line in self.said)

    def stub(self) -> psutil.Process:
        (found,) = psutil.Process(self.server.pid).children()
        return found

    def metric(self, name: str) -> float:
        page = urllib.request.urlopen(f"http://{self.server.metrics_address}/metrics", timeout=10).read().decode()
        lines = [line for line in page.splitlines() if line.startswith(f"trireme_generation_{name}{{")]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    def answers(self) -> bool:
        """Whether a new request gets its tokens."""
        with suppress(InferenceServerException, queue.Empty):
            stream = Stream(self.server.grpc_address, 2)
            try:
                return stream.end() is None
            finally:
                stream.leave()
        return False


class Stream:
    """One streamed request over gRPC."""

    def __init__(self, address: str, tokens: int, request_id: str = "") -> None:
        self._client = triton_grpc.InferenceServerClient(address, channel_args=[("grpc.use_local_subchannel_pool", 1)])
        self._arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.ended = False
        self._client.start_stream(lambda result, error: self._arrived.put((result, error)))
        values = {"max_tokens": np.int32(tokens), "min_length": np.int32(tokens), "stream": np.bool_(True)}
        inputs = [infer_input("text_input", np.array([[b"open a file"]], np.object_))]
        inputs += [infer_input(name, np.array([[value]], value.dtype)) for name, value in values.items()]
        self._client.async_stream_infer("tiny", inputs, request_id=request_id)

    def piece(self) -> str | None:
        """Waits for the next; the status when it is an error."""
        result, error = self._arrived.get(timeout=PATIENCE_S)
        if error is not None:
            self.ended = True
            return str(error.status() or error.message())
        self.ended = result.as_numpy("finish_reason") is not None
        return None

    def end(self) -> str | None:
        """The status with which it ends; None for the whole text."""
        status = None
        while not self.ended:
            status = self.piece()
        return status

    def leave(self) -> None:
        # Triton 2.51 can crash on a cancellation that meets the end of its stream.
        self._client.stop_stream(cancel_requests=not self.ended)
        self._client.close()


@contextmanager
def _supervised(root: Path, pace: ProbePace | None = None, health: Health | None = None) -> Iterator[Supervised]:
    asked_to_stop = threading.Event()
    with TritonServer(root, Ports.free()) as server:
        running = Supervised(server, health or Health())
        supervisor = Supervisor(server, None, running.health, pace, beside=running.turn)
        supervisor.wait_ready(PATIENCE_S, asked_to_stop)
        running.health.observed(None)
        watching = threading.Thread(target=supervisor.watch, args=(asked_to_stop, PATIENCE_S, running.said.append))
        watching.start()
        try:
            yield running
        finally:
            asked_to_stop.set()
            watching.join(PATIENCE_S)
            supervisor.close()
            began = time.monotonic()
            server.stop()
            running.stopped_s = time.monotonic() - began
    assert not list(Path("/dev/shm").glob(f"{server.shm_prefix}*"))


@pytest.fixture(scope="module")
def repository(decoder_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"executor": "onnxruntime", "slots": 4, "queue_size": 4, "capacities": (LONGEST,), "end_ids": ()}
    return write_repository(tmp_path_factory.mktemp("repository"), decoder_graph, **settings)


def _ask_http(address: str, path: str, ends: dict[str, str]) -> None:
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    body = {"text_input": "x", "max_tokens": LONGEST - 20, "min_length": LONGEST - 20, "stream": path != "generate"}
    try:
        connection.request("POST", f"/v2/models/tiny/{path}", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        ends[path] = f"ended with {answer.status}"
    except TimeoutError:
        ends[path] = "never ended"
    except (OSError, http.client.HTTPException):  # cut off: a reset, or a body without its end
        ends[path] = "cut off"
    finally:
        connection.close()


@pytest.mark.parametrize("victim", ["stub", "server"])
def test_who_waits_hears_of_a_death_and_the_next_is_served(repository: Path, victim: str) -> None:
    with _supervised(repository) as running:
        streams = [Stream(running.server.grpc_address, LONGEST - 20) for _ in range(2)]
        ends: dict[str, str] = {}
        paths = ("generate", "generate_stream")
        asking = [threading.Thread(target=_ask_http, args=(running.server.http_address, path, ends)) for path in paths]
        for thread in asking:
            thread.start()
        assert [stream.piece() for stream in streams] == [None, None]
        assert wait_until(lambda: running.metric("running") == 4, PATIENCE_S)
        dies = running.stub() if victim == "stub" else psutil.Process(running.server.pid)
        dies.send_signal(signal.SIGKILL)
        assert [stream.end() for stream in streams] == ["StatusCode.UNAVAILABLE"] * 2
        for thread in asking:
            thread.join(PATIENCE_S)
        assert ends == dict.fromkeys(paths, "cut off")
        for stream in streams:
            stream.leave()
        assert wait_until(running.answers, PATIENCE_S)
        assert wait_until(lambda: running.health.ready() is None, PATIENCE_S)
        assert running.repairs == 1, running.said
        # A stub that dies in the middle of its answers may take Triton with it, which then aborts.
        causes = ("Python stub of Triton died", "killed by SIGABRT") if victim == "stub" else ("killed by SIGKILL",)
        assert any(cause in running.said[0] for cause in causes), running.said
    assert running.stopped_s < EXIT_TIMEOUT_S, "nothing was left in flight"


def test_readiness_says_restarting_at_once(repository: Path) -> None:
    with _supervised(repository) as running:
        assert running.health.ready() is None
        running.heard.clear()
        first = running.server.pid
        running.stub().send_signal(signal.SIGKILL)
        assert wait_until(lambda: (running.health.ready() or "").startswith("restarting: a Python stub"), PATIENCE_S)
        assert wait_until(lambda: bool(running.heard), PATIENCE_S)
        assert running.heard[0] == first, "what lives beside the server heard it only after the end of the server"
        assert running.health.live() is None
        assert wait_until(lambda: running.health.ready() is None, PATIENCE_S)


def test_a_stub_that_dies_while_draining_holds_up_nobody(repository: Path) -> None:
    with TritonServer(repository, Ports.free()) as server:
        supervisor = Supervisor(server)
        supervisor.wait_ready(PATIENCE_S, threading.Event())
        supervisor.close()
        stream = Stream(server.grpc_address, LONGEST - 20)
        assert stream.piece() is None
        (stub,) = psutil.Process(server.pid).children()
        stub.send_signal(signal.SIGKILL)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < EXIT_TIMEOUT_S
        assert stream.end() == "StatusCode.UNAVAILABLE"
        stream.leave()


_HELD = """
import pathlib
import time

from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor

_run = OnnxRuntimeStepExecutor.run


def _run_unless_held(executor, batches):
    while pathlib.Path({flag!r}).exists():
        time.sleep(0.05)
    return _run(executor, batches)


OnnxRuntimeStepExecutor.run = _run_unless_held
"""


@pytest.fixture
def held(repository: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A repository, and a file: while it is there, the generator's steps hang."""
    copy, flag = Path(shutil.copytree(repository, tmp_path / "repository")), tmp_path / "held"
    with (copy / "tiny" / "1" / "model.py").open("a") as adapter:
        adapter.write(_HELD.format(flag=str(flag)))
    return copy, flag


def test_a_generator_that_hangs_is_started_again(held: tuple[Path, Path]) -> None:
    repository, flag = held
    with _supervised(repository, ProbePace(interval_s=0.2, timeout_s=1.0, standstill_s=4.0)) as running:
        stream = Stream(running.server.grpc_address, LONGEST - 20)
        assert stream.piece() is None
        flag.touch()
        assert wait_until(lambda: running.repairs == 1, PATIENCE_S)
        flag.unlink()
        assert stream.end() == "StatusCode.UNAVAILABLE"
        stream.leave()
        assert wait_until(running.answers, PATIENCE_S)
        assert "nothing was done for" in running.said[0]
        assert "with work waiting" in running.said[0]


def test_a_generator_whose_process_is_stopped_is_started_again(repository: Path) -> None:
    with _supervised(repository, ProbePace(interval_s=0.2, standstill_s=4.0)) as running:
        stream = Stream(running.server.grpc_address, LONGEST - 20)
        assert stream.piece() is None
        running.stub().send_signal(signal.SIGSTOP)
        assert stream.end() == "StatusCode.UNAVAILABLE"
        stream.leave()
        assert wait_until(running.answers, PATIENCE_S)
        assert "is not healthy" in running.said[0]


def test_a_probe_that_waits_behind_others_is_left_in_the_queue(held: tuple[Path, Path]) -> None:
    """A cancellation can take Triton 2.51 with it; and the same inference, answered late, is as good."""
    repository, flag = held
    with TritonServer(repository, Ports.free()) as server, closing(Probe(server.grpc_address, "p", 0.5)) as probe:
        assert wait_until(lambda: probe.ask("tiny") == 1, PATIENCE_S)
        flag.touch()
        waiting = [probe.ask("tiny") for _ in range(3)]
        assert all(isinstance(found, Failure) and found.busy for found in waiting), waiting
        flag.unlink()
        answered = probe.ask("tiny")
        assert answered == 1
        counted = Supervised(server, Health())
        assert wait_until(lambda: counted.metric("requests_total") == 2, PATIENCE_S), "the first, and one that waited"


def test_a_probe_whose_stream_has_ended_says_why(repository: Path) -> None:
    with TritonServer(repository, Ports.free()) as server, closing(Probe(server.grpc_address, "p")) as probe:
        assert wait_until(lambda: probe.ask("tiny") == 1, PATIENCE_S)
        start = probe.client.start_stream

        def start_and_lose(*arguments: Any, **options: Any) -> None:
            start(*arguments, **options)
            server.kill()
            assert wait_until(lambda: not probe.client._stream._active, PATIENCE_S)

        probe.client.start_stream = start_and_lose
        found = probe.ask("tiny")
        assert isinstance(found, Failure)
        assert found.busy, found
        assert "no longer in valid state" not in found.reason


class HealthAndHistory(Health):
    """Keeps what it is told. Its clock runs three times as fast: one success makes ready for 5 seconds, not 15."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 3 * time.monotonic())
        self.failures: list[Failure] = []

    def observed(self, failure: Failure | None) -> None:
        super().observed(failure)
        self.failures += [failure] if failure is not None else []


def test_a_generator_with_more_than_it_can_do_stays_ready(repository: Path) -> None:
    """For longer than a server may stand still, and than one success makes it ready."""
    health = HealthAndHistory()
    done = threading.Event()
    with _supervised(repository, ProbePace(interval_s=0.1, timeout_s=0.5, standstill_s=6.0), health) as running:

        def ask() -> None:
            while not done.is_set():
                stream = Stream(running.server.grpc_address, LONGEST - 20)
                while not stream.ended and not done.is_set():
                    stream.piece()
                stream.leave()
                done.wait(0.1)  # those who are refused must not take the cores from the one who works

        asking = [threading.Thread(target=ask) for _ in range(16)]
        for thread in asking:
            thread.start()
        assert wait_until(lambda: len(health.failures) > 2, PATIENCE_S)
        end = time.monotonic() + 10
        unready = set()
        while time.monotonic() < end:
            unready.add(health.ready())
            done.wait(0.1)
        # Before any leave, who can take Triton 2.51 with them: see `Stream.leave`.
        under_load, repaired = list(health.failures), list(running.said)
        done.set()
        for thread in asking:
            thread.join(PATIENCE_S)
        assert [failure for failure in under_load if not failure.busy] == []
        assert sum(failure.moving for failure in under_load) > 3
        assert unready == {None}
        assert repaired == []


def test_nobody_else_can_be_taken_for_the_probe(repository: Path) -> None:
    with _supervised(repository) as running:
        secret = running.server.probe_id
        tree = [psutil.Process(running.server.pid), running.stub()]
        assert not any(secret in part for process in tree for part in process.cmdline())
        assert all(os.stat(f"/proc/{process.pid}/environ").st_mode & 0o077 == 0 for process in tree)
        before = running.metric("requests_total")
        for request_id in ("trireme-probe", "probe", ""):
            stream = Stream(running.server.grpc_address, 2, request_id)
            assert stream.end() is None
            stream.leave()
        assert wait_until(lambda: running.metric("requests_total") == before + 3, PATIENCE_S)
        own = Stream(running.server.grpc_address, 2, secret)  # as the launcher asks
        assert own.end() is None
        own.leave()
        steps = running.metric("steps_total")
        assert wait_until(lambda: running.metric("steps_total") > steps, PATIENCE_S)
        assert running.metric("requests_total") == before + 3
    with TritonServer(repository, Ports.free()) as other:
        assert other.probe_id != secret
