"""Ranks behind a real Triton on CPU: the plain model's vectors, and what the death of a rank does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from tritonclient import grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from builders import pipeline
from builders.judging import corpus
from builders.judging.vectors import graph_outputs, sample_requests
from builders.pipeline import Build
from builders.spec import load_spec
from runtime.server.launch import TritonServer
from runtime.server.supervise import ProbePace, Supervisor, ready_server
from tests.conftest import tiny_spec, wait_until

pytestmark = pytest.mark.triton


def _infer(client: triton_grpc.InferenceServerClient, name: str, texts: list[str]) -> np.ndarray:  # type: ignore[type-arg]
    item = triton_grpc.InferInput("text", [len(texts), 1], "BYTES")
    item.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=np.object_))
    vectors = client.infer(name, [item], client_timeout=30).as_numpy("embedding")
    assert vectors is not None
    return vectors


@contextmanager
def _serving(built: Build) -> Iterator[TritonServer]:
    """A ready server; when it has gone, so have its ranks."""
    assert built.entry is not None
    with ready_server(built.entry.repository) as server:
        yield server
        ranks = _ranks(server)
    assert wait_until(
        lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), 30
    )


@contextmanager
def _watched(server: TritonServer) -> Iterator[list[str]]:
    """By a supervisor that is soon out of patience; what it says."""
    asked_to_stop, said = threading.Event(), list[str]()
    supervisor = Supervisor(server, pace=ProbePace(interval_s=0.1, timeout_s=5.0, standstill_s=0.5))
    supervisor.wait_ready(60, asked_to_stop)
    watching = threading.Thread(target=supervisor.watch, args=(asked_to_stop, 60, said.append))
    watching.start()
    try:
        yield said
    finally:
        asked_to_stop.set()
        watching.join(60)
        supervisor.close()


def _client(server: TritonServer) -> triton_grpc.InferenceServerClient:
    return triton_grpc.InferenceServerClient(server.grpc_address)


def _ranks(server: TritonServer) -> list[psutil.Process]:
    """Rank processes in the order of their numbers."""
    found = {}
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "runtime.ranks.worker" in command:
            found[int(command[command.index("runtime.ranks.worker") + 1])] = process
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("preset", ["minilm-tp2", pytest.param("minilm-pp2", marks=pytest.mark.slow)])
def test_ranks_serve_the_vectors_of_the_plain_model(preset: str, minilm: Build) -> None:
    assert minilm.entry is not None
    built = pipeline.build(load_spec(preset), "cpu", minilm.entry.repository.parents[2], "repository")
    assert built.served is not None
    assert built.served.worst_cosine > 0.99999
    texts = corpus.texts(None, 40)
    want = graph_outputs(built.graph("fp32").file_path, sample_requests(built.checkpoint, texts), built.checkpoint)
    with _serving(built) as server, triton_grpc.InferenceServerClient(server.grpc_address) as client:
        assert len(_ranks(server)) == 2
        got = _infer(client, preset, texts)
    assert np.abs(got - want).max() < 1e-5


@dataclass
class _Load:
    """Clients that ask without a pause until told to stop; what each request came to."""

    address: str
    name: str
    stopped: threading.Event = field(default_factory=threading.Event)
    answers: list[float] = field(default_factory=list)  # when they came
    refusals: list[tuple[float, str]] = field(default_factory=list)

    def run(self) -> None:
        with triton_grpc.InferenceServerClient(self.address) as client:
            while not self.stopped.is_set():
                try:
                    _infer(client, self.name, ["a text of a few words"] * 3)
                    self.answers.append(time.monotonic())
                except InferenceServerException as error:
                    self.refusals.append((time.monotonic(), str(error.status())))
                    self.stopped.wait(0.02)


@pytest.fixture
def two_by_two(tiny_bert: Path, tmp_path: Path) -> Build:
    spec = tiny_spec(
        tiny_bert, parallel={"tensor": 2, "pipeline": 2}, serving={"executor": "onnxruntime", "max_batch_size": 8,
        "length_buckets": [16, 64]},
    )  # fmt: skip
    return pipeline.build(spec, "cpu", tmp_path, "repository")


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_rank_that_dies_under_load_refuses_clearly_and_comes_back(two_by_two: Build, victim: int) -> None:
    with _serving(two_by_two) as server:
        load = _Load(server.grpc_address, "tiny")
        threads = [threading.Thread(target=load.run) for _ in range(4)]
        for thread in threads:
            thread.start()
        before = _ranks(server)
        assert len(before) == 4
        assert wait_until(lambda: len(load.answers) > 20, 60)
        killed = time.monotonic()
        before[victim].kill()
        refused = wait_until(lambda: bool(load.refusals), 20)
        recovered = wait_until(lambda: any(when > load.refusals[0][0] for when in load.answers), 60)
        load.stopped.set()
        for thread in threads:
            thread.join(40)
        assert refused
        assert recovered
        assert all("UNAVAILABLE" in status for _, status in load.refusals), load.refusals[:3]
        assert load.refusals[0][0] - killed < 5  # 1 s is promised on an idle machine; this one may be busy
        assert not {rank.pid for rank in before} & {rank.pid for rank in _ranks(server)}
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in before)


def test_a_rank_that_dies_while_nobody_asks_is_replaced_before_anybody_does(two_by_two: Build) -> None:
    """And nobody takes the new ranks' start, which is longer than a server may stand still here, for a hang."""
    with _serving(two_by_two) as server, _watched(server) as said, _client(server) as client:
        before = _ranks(server)
        before[1].kill()
        assert wait_until(lambda: not any(rank.is_running() for rank in before) and len(_ranks(server)) == 4, 60)

        refusals: list[str] = []

        def answers() -> bool:
            try:
                return _infer(client, "tiny", ["hello"]).shape == (1, 32)
            except InferenceServerException as error:
                refusals.append(str(error.status()))
                return False

        assert wait_until(answers, 60)
        assert said == []
        assert set(refusals) <= {"StatusCode.UNAVAILABLE"}
