"""New versions on running pods, end to end: a real store, `runtime.pod` as processes, a real Triton in each, the fake
API server's websocket between them and the rollout."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from tritonclient import grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from builders import pipeline
from cluster.deploy import deploy
from cluster.errors import RolloutError
from cluster.load_version import LoadPace, PodPorts, load_version
from cluster.observe import observe
from runtime.errors import BadEnvironment
from runtime.pod.layout import Layout
from runtime.pod.model_store import PUBLISHED, Publication, choose, publications, publish
from runtime.pod.node import Node
from runtime.pod.versions import Versions
from runtime.server.launch import Ports
from runtime.settings import ADMIN_HEADER, ServerSettings
from tests.cluster.deploy_objects import CONFIG_MAPS, PATIENCE, SERVER, connected, deployment, silent
from tests.cluster.fake_cluster import FakeCluster
from tests.conftest import ALL_ONES, tiny_spec, wait_until

SECRET = "a-secret-of-the-test"
PACE = LoadPace(load_s=60, ready_s=20, pause_s=0.02)
HERE = Node({}, None)


@pytest.fixture(scope="module")
def builds(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two repositories whose answers differ. Each is version 1, as a Job with fresh scratch makes them."""
    found = []
    for pooling in ("mean", "cls"):
        spec = tiny_spec(tiny_bert, model={"pooling": pooling})
        built = pipeline.build(spec, "cpu", tmp_path_factory.mktemp(pooling), "repository")
        assert built.entry is not None
        assert built.entry.version == 1
        found.append(built.entry.repository)
    return found


def _damaged(build: Path, folder: Path, file: str, text: str) -> Path:
    """A copy with another file in it, under another digest."""
    shutil.copytree(build, folder)
    path = folder / "tiny-encoder" / "1" / file
    path.unlink()  # a link to the build's own
    path.write_text(text)
    settings = ServerSettings.load(folder)
    settings.model_copy(update={"content_digest": folder.name.ljust(64, "0")}).save(folder)
    return folder


def test_a_publication_has_the_next_number(builds: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    for number, build in enumerate(builds, 1):
        published, _ = publish(build, "cpu", store)
        assert published.version == number
        assert ServerSettings.load(published.folder(store) / "repository").version == number
    again, unchanged = publish(builds[0], "cpu", store)
    assert (again.version, unchanged) == (1, True)


def test_what_a_new_pod_serves(builds: list[Path], tmp_path: Path) -> None:
    for build in builds:
        publish(build, "cpu", tmp_path)
    offered = publications(tmp_path, "tiny", "cpu")

    def version(rolled_out: int, of: list[Publication] = offered) -> int | None:
        chosen = choose(of, HERE, "any", rolled_out)
        return chosen.version if chosen else None

    assert version(0) == 1, "before the first rollout nothing new is served"
    assert version(1) == 1
    assert version(2) == 2
    assert version(3) is None, "never an older one"
    assert version(1, [item for item in offered if item.version == 2]) == 2, "the first after it that fits"


def _laid_out(store: Path, into: Path) -> Versions:
    fetch = _command("fetch", "--store", store, "--model", "tiny", "--platform", "cpu", "--into", into, "--wait-s", 0)
    subprocess.run(fetch, timeout=60, check=True)
    versions = Versions("tiny", "cpu", HERE, "any", Layout(store, into), lambda _: None)
    versions.restore()
    return versions


def test_a_version_counts_when_it_has_answered(builds: list[Path], tmp_path: Path) -> None:
    store, into = tmp_path / "store", tmp_path / "repository"
    for build in builds:
        publish(build, "cpu", store)
    versions = _laid_out(store, into)
    config = into / "tiny" / "config.pbtxt"
    assert versions.stage(2).load_order == ("tiny-encoder", "tiny-tokenizer", "tiny")
    assert "versions: 2" in config.read_text()
    assert versions.answered(1) is None
    assert ServerSettings.load(into).version == 1
    versions.restore()  # a restart before the load
    assert "versions: 1" in config.read_text()
    assert not (into / "tiny" / "2").exists()
    versions = _laid_out(store, into)
    versions.stage(2)
    proven = versions.answered(2)
    assert proven is not None
    assert proven.version == ServerSettings.load(into).version == 2
    assert versions.discard().version == 2
    assert versions.stage(1).version == 1, "an older version is rolled out the same way"
    assert "versions: 1" in config.read_text()
    with pytest.raises(BadEnvironment, match=r"no version 7 of tiny; it has \[1, 2\]"):
        versions.stage(7)


def test_a_version_without_a_proof_is_not_laid_out(builds: list[Path], tmp_path: Path) -> None:
    """As an earlier release published it, beside one of this release that serves."""
    store, into, old = tmp_path / "store", tmp_path / "repository", tmp_path / "old"
    publish(builds[0], "cpu", store)
    shutil.copytree(builds[1], old)
    settings = ServerSettings.load(old).model_dump(mode="json", exclude={"proof_digest"})
    (old / "settings.json").write_text(json.dumps(settings))
    publish(old, "cpu", store)
    versions = _laid_out(store, into)
    with pytest.raises(BadEnvironment, match="version 2 of tiny carries no proof: an earlier release published it"):
        versions.stage(2)
    assert "versions: 1" in (into / "tiny" / "config.pbtxt").read_text()


def test_a_version_that_is_damaged_in_the_store_changes_nothing(builds: list[Path], tmp_path: Path) -> None:
    store, into = tmp_path / "store", tmp_path / "repository"
    for build in builds:
        published, _ = publish(build, "cpu", store)
    versions = _laid_out(store, into)
    (published.folder(store) / "repository" / "tiny-encoder" / "2" / "model.py").write_text("")
    with pytest.raises(BadEnvironment, match="run engine-build again"):
        versions.stage(2)
    assert "versions: 1" in (into / "tiny" / "config.pbtxt").read_text()
    shutil.rmtree(published.folder(store).parent)
    with pytest.raises(BadEnvironment, match="has gone from"):
        versions.restore()


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "runtime.pod", *map(str, arguments)]


@dataclass
class RunningPod:
    """Init container and server of one pod, as processes."""

    store: Path
    folder: Path
    version_file: Path
    ports: Ports = field(default_factory=Ports.free)
    health: int = field(default_factory=lambda: Ports.free().http)
    door: int = field(default_factory=lambda: Ports.free().http)
    door_grpc: int = field(default_factory=lambda: Ports.free().grpc)
    process: subprocess.Popen[str] | None = None

    def start(self, fetch: bool = True) -> dict[str, Any]:
        """`fetch`: a new pod; without it, a container that starts again. What the server announces."""
        what = ("--store", self.store, "--model", "tiny", "--platform", "cpu")
        into = self.folder / "repository"
        if fetch:
            shutil.rmtree(into, ignore_errors=True)
            init = _command("fetch", *what, "--into", into, "--wait-s", 5, "--version-file", self.version_file)
            subprocess.run(init, timeout=60, check=True)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "secret").write_text(SECRET)
        ports = [f"--{name}-port={port}" for name, port in vars(self.ports).items()]
        ports += [f"--gateway-port={self.door}", f"--gateway-grpc-port={self.door_grpc}"]
        more = (f"--health-port={self.health}", f"--control-secret-file={self.folder / 'secret'}", "--exit-timeout-s=5")
        self.process = subprocess.Popen(
            _command("serve", into, *what, *ports, *more), stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def answer(self) -> NDArray[Any]:
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{self.ports.grpc}") as client:
            return _ask(client)


def _ask(client: triton_grpc.InferenceServerClient) -> NDArray[Any]:
    text = triton_grpc.InferInput("text", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"hello world"]], dtype=np.object_))
    found: NDArray[Any] = client.infer("tiny", [text], client_timeout=30).as_numpy("embedding")
    return found


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """To the last bits, which differ each time that the graph is compiled."""
    return bool(np.allclose(one, other, atol=1e-6))


@contextmanager
def _asked_all_the_time(pod: RunningPod) -> Iterator[list[NDArray[Any]]]:
    """Every answer of the time in between; a request that fails, fails the test."""
    answers: list[NDArray[Any]] = []
    errors: list[Exception] = []
    done = threading.Event()

    def ask() -> None:
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{pod.ports.grpc}") as client:
            while not done.is_set() and not errors:
                try:
                    answers.append(_ask(client))
                except Exception as error:  # noqa: BLE001 - told below
                    errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        done.set()
        thread.join(60)
    assert not errors


@pytest.mark.triton
def test_a_version_goes_through_the_pods(builds: list[Path], tmp_path: Path) -> None:
    store, pointer, fake = tmp_path / "store", tmp_path / "version", FakeCluster()
    publish(builds[0], "cpu", store)
    pods: dict[str, RunningPod] = {}
    told: list[str] = []
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment(replicas=2)], PATIENCE, silent)
        try:
            for item in observe(cluster, SERVER).pods:
                name = item["metadata"]["name"]
                pods[name] = pod = RunningPod(store, tmp_path / name, pointer)
                assert pod.start()["version"] == 1
                fake.addresses[name, PodPorts().grpc] = ("127.0.0.1", pod.ports.grpc)
                fake.addresses[name, PodPorts().health] = ("127.0.0.1", pod.health)
            first, second = pods.values()
            old = first.answer()

            def load(version: int, secret: str = SECRET) -> list[str]:
                return load_version(cluster, SERVER, version, secret, pace=PACE, report=told.append)

            with pytest.raises(RolloutError, match=r"no version 2 of tiny; it has \[1\]"):
                load(2)
            publish(builds[1], "cpu", store)
            with pytest.raises(RolloutError, match="restricted to who holds the control secret"):
                load(2, "another-secret-than-this")

            publish(_damaged(builds[1], tmp_path / "broken", "graph.onnx", "no graph"), "cpu", store)
            with _asked_all_the_time(first) as answers, pytest.raises(RolloutError) as stopped:
                load(3)
            assert "Triton: " in str(stopped.value)
            assert "it serves version 1. Version 3 is in 0 of 2 pods" in str(stopped.value)
            assert answers
            assert all(_same(answer, old) for answer in answers)
            assert not any(list(pods)[1] in line for line in told), "the second pod was not touched"
            assert cluster.get(CONFIG_MAPS, "prod", "model-version") is None

            adapter = builds[1] / "tiny-encoder" / "1" / "model.py"
            useless = f"{adapter.read_text()}\n\nTritonPythonModel.execute = lambda self, requests: 1 / 0\n"
            publish(_damaged(builds[1], tmp_path / "useless", "model.py", useless), "cpu", store)
            with pytest.raises(RolloutError, match="its launcher has gone back to version 1: inferences failed"):
                load(4)
            assert _same(first.answer(), old)

            wrong = f"{adapter.read_text()}{ALL_ONES}"
            publish(_damaged(builds[1], tmp_path / "wrong", "model.py", wrong), "cpu", store)
            not_proven = r"gone back to version 1: tiny version 5 is not proven on this machine: mean cosine -?0\.\d"
            with pytest.raises(RolloutError, match=not_proven):
                load(5)
            assert _same(first.answer(), old)

            with _asked_all_the_time(first) as answers:
                assert load(2) == list(pods)
                new = first.answer()
            assert not _same(old, new)
            assert all(_same(answer, old) or _same(answer, new) for answer in answers)
            assert _same(second.answer(), new)
            written = cluster.get(CONFIG_MAPS, "prod", "model-version")
            assert written is not None

            first.stop()
            assert first.start(fetch=False)["version"] == 2, "a container that starts again"
            assert _same(first.answer(), new)
            pointer.write_text(written["data"]["version"])
            second.stop()
            assert second.start()["version"] == 2, "a new pod, though the store has a version 5"
        finally:
            for pod in pods.values():
                with suppress(OSError, AssertionError):
                    pod.stop()


@pytest.mark.triton
def test_a_server_that_dies_while_a_version_is_laid_out_comes_back_without_it(
    builds: list[Path], tmp_path: Path
) -> None:
    publish(builds[0], "cpu", tmp_path / "store")
    pod = RunningPod(tmp_path / "store", tmp_path / "pod", tmp_path / "version")
    triton = psutil.Process(pod.start()["pid"])
    try:
        old = pod.answer()
        publish(builds[1], "cpu", tmp_path / "store")
        control = http.client.HTTPConnection("127.0.0.1", pod.health, timeout=60)
        control.request("POST", "/versions/2", headers={ADMIN_HEADER: SECRET})
        assert control.getresponse().status == 200
        control.close()
        assert (tmp_path / "pod" / "repository" / "tiny-encoder" / "2").is_dir()
        triton.kill()

        def answers() -> bool:
            with suppress(InferenceServerException):
                return _same(pod.answer(), old)
            return False

        assert wait_until(answers, 60)
    finally:
        pod.stop()


def test_what_is_half_published_is_not_offered_for_a_load(builds: list[Path], tmp_path: Path) -> None:
    store, into = tmp_path / "store", tmp_path / "repository"
    for build in builds:
        published, _ = publish(build, "cpu", store)
    versions = _laid_out(store, into)
    (published.folder(store) / PUBLISHED).unlink()
    with pytest.raises(BadEnvironment, match=r"it has \[1\]"):
        versions.stage(2)
