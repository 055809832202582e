"""What runs in a pod: the model store, the init step, health, and the server itself with a real Triton."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from tritonclient import grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from builders import pipeline
from builders.__main__ import run
from builders.commands.manifests import publish as publish_spec
from builders.pipeline import Build
from runtime.errors import BadEnvironment
from runtime.pod.control import HealthServer
from runtime.pod.layout import Layout, lay_out
from runtime.pod.model_store import EngineKey, Publication, misfit, publications, publish, wait_for
from runtime.pod.node import Node, same_release
from runtime.ports import free_ports
from runtime.server.health import LIVE_WITHIN_S, READY_WITHIN_S, Health
from runtime.server.launch import Ports
from runtime.server.probing import Failure
from runtime.settings import EncoderModelSettings
from tests.conftest import tiny_spec, wait_until
from tests.manifests.test_k8s_folder import OURS, TRITON_METRICS

L4 = Node({"tensorrt": "11.1.0.106", "tensorrt-rtx": "1.7.1.116"}, "sm89")
NO_GPU = Node({}, None)
KEY = "a-key-of-the-test"
OF_GPUS = {name for name in TRITON_METRICS if name.startswith("nv_gpu_")}
OF_GENERATORS = {name for name in OURS if name.startswith("trireme_generation_")}


@pytest.fixture(scope="module")
def tiny(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    return pipeline.build(tiny_spec(tiny_bert), "cpu", tmp_path_factory.mktemp("tiny"), "repository")


@pytest.fixture
def store(tiny: Build, tmp_path: Path) -> Path:
    assert tiny.entry is not None
    publish(tiny.entry.repository, "cpu", tmp_path / "store")
    return tmp_path / "store"


def _publication(target: str = "sm89", version: str = "11.1.0.106", graph: str = "a" * 64, at: int = 0) -> Publication:
    engine = EngineKey(flavour="tensorrt", version=version, target=target, source_digest=graph)
    return Publication(
        model="m",
        models=("m",),
        platform="gpu",
        version=1,
        content_digest=f"{at}".ljust(64, "0"),
        published_ns=at,
        engines=(engine,),
        files=(),
    )


def _offer(store: Path, *offered: Publication) -> None:
    for item in offered:
        folder = store / item.model / item.platform / item.key
        folder.mkdir(parents=True)
        (folder / "published.json").write_text(item.model_dump_json())


@pytest.mark.parametrize(
    ("publication", "wanted", "said"),
    [
        (_publication(), "any", None),
        (_publication(), "a" * 64, None),
        (_publication(version="11.1.0.9"), "any", None),
        (_publication(version="11.2.0.106"), "any", "this image has tensorrt 11.1.0.106"),
        (_publication(target="sm90"), "any", "this node has sm89"),
        (_publication(), "b" * 64, "graph bbbbbbbbbbbb is wanted"),
    ],
)
def test_an_engine_fits_its_own_node_alone(publication: Publication, wanted: str, said: str | None) -> None:
    reason = misfit(publication, L4, wanted)
    assert reason is None if said is None else said in (reason or "")


def test_a_node_without_a_gpu_says_so() -> None:
    assert "this node has no GPU" in (misfit(_publication(), NO_GPU, "any") or "")


def test_of_those_that_fit_the_newest_is_taken(tmp_path: Path) -> None:
    old, new, other = _publication(at=1), _publication(at=2), _publication("sm90", at=3)
    _offer(tmp_path, old, new, other)
    assert [item.published_ns for item in publications(tmp_path, "m", "gpu")] == [3, 2, 1]
    assert wait_for(tmp_path, "m", "gpu", L4, "any", 0, lambda _: None) == new


def test_waiting_ends_with_what_was_refused_and_why(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(BadEnvironment, match="holds no model yet"):
        wait_for(tmp_path, "m", "gpu", L4, "any", 0, said.append)
    _offer(tmp_path, _publication("sm90"))
    with pytest.raises(BadEnvironment, match=r"no engine .* fits this node .*sm89.*Refused: .*this node has sm89"):
        wait_for(tmp_path, "m", "gpu", L4, "any", 0, said.append)
    assert len(said) == 2


def test_the_key_names_what_engines_were_built_for() -> None:
    assert _publication().key.startswith(f"tensorrt-11.1.0.106-sm89-{'a' * 12}-")


@pytest.mark.parametrize(("one", "other", "same"), [("1.2.3.4", "1.2.3.9", True), ("1.2.3", "1.2.4", False)])
def test_releases(one: str, other: str, same: bool) -> None:
    assert same_release(one, other) is same


def test_a_model_is_published_once(tiny: Build, store: Path) -> None:
    assert tiny.entry is not None
    (first,) = publications(store, "tiny", "cpu")
    again, unchanged = publish(tiny.entry.repository, "cpu", store)
    assert unchanged
    assert again == first


def test_what_was_cut_off_is_not_offered(tiny: Build, store: Path) -> None:
    assert tiny.entry is not None
    (found,) = publications(store, "tiny", "cpu")
    record = store / "tiny" / "cpu" / found.key / "published.json"
    record.write_text(record.read_text()[:50])
    assert publications(store, "tiny", "cpu") == []
    publish(tiny.entry.repository, "cpu", store)
    assert len(publications(store, "tiny", "cpu")) == 1


def test_a_spec_is_published_by_command(tiny: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.entry is not None
    file, build_dir = tmp_path / "spec.yaml", tiny.entry.repository.parents[2]
    file.write_text(yaml.safe_dump(tiny.spec.model_dump(mode="json")))
    run(lambda: publish_spec(str(file), tmp_path / "store", build_dir=build_dir, as_json=True))
    said = json.loads(capsys.readouterr().out)
    (found,) = publications(tmp_path / "store", "tiny", "cpu")
    assert said["content_digest"] == found.content_digest
    with pytest.raises(SystemExit) as stopped:
        run(lambda: publish_spec(str(file), tmp_path / "store", platform="gpu", target="sm10", build_dir=build_dir))
    assert stopped.value.code == 2
    assert "one of engine.targets" in capsys.readouterr().err


@pytest.mark.parametrize("copied", [False, True])
def test_weights_are_linked_or_copied_and_threads_are_the_pods(store: Path, tmp_path: Path, copied: bool) -> None:
    (found,) = publications(store, "tiny", "cpu")
    for _ in range(2):  # a container that starts again finds its own layout
        lay_out(found, Layout(store, tmp_path / "repository", copied, threads=3))
    version = tmp_path / "repository" / "tiny-encoder" / "1"
    assert (version / "graph.onnx").is_symlink() is not copied
    assert EncoderModelSettings.load(version).threads == 3
    assert not (version / "model.py").is_symlink()  # the supervisor touches it


@pytest.mark.parametrize(("name", "damage"), [("graph.onnx", "short"), ("model.py", "changed"), ("graph.onnx", "gone")])
def test_a_damaged_store_is_refused(store: Path, tmp_path: Path, name: str, damage: str) -> None:
    (found,) = publications(store, "tiny", "cpu")
    file = store / "tiny" / "cpu" / found.key / "repository" / "tiny-encoder" / "1" / name
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "short" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BadEnvironment, match="run engine-build again"):
        lay_out(found, Layout(store, tmp_path / "repository"))
    assert not (tmp_path / "repository" / "settings.json").exists()


def test_health_follows_the_probes() -> None:
    now = [0.0]
    health = Health(clock=lambda: now[0])
    assert health.ready() == "starting"
    assert health.closed()  # nothing of it is proven yet
    health.observed(None)
    assert health.ready() is None
    assert not health.closed()
    for _ in range(20):
        now[0] += READY_WITHIN_S - 1
        health.observed(Failure("queue is full", busy=True, moving=True))
        assert health.ready() is None  # a server that works for others is not broken
    now[0] += READY_WITHIN_S + 1
    health.observed(Failure("queue is full", busy=True))
    assert health.ready() == "queue is full"  # but one that only ever refuses serves nobody
    health.observed(None)
    health.observed(Failure("stub is dead"))
    assert health.ready() is None  # one failure may pass
    now[0] += READY_WITHIN_S + 1
    assert health.ready() == "stub is dead"
    assert not health.closed()  # what it still answers is right
    health.observed(None)
    health.restarting("Triton was killed by SIGKILL")
    assert health.ready() == "restarting: Triton was killed by SIGKILL"
    assert health.closed()
    assert health.live() is None
    now[0] += LIVE_WITHIN_S - 1
    health.turned()
    now[0] += LIVE_WITHIN_S - 1
    assert health.live() is None  # the launcher still works at it
    health.observed(None)
    now[0] += LIVE_WITHIN_S + 1
    assert "has not turned" in (health.live() or "")
    health.observed(None)
    health.drain()
    assert health.ready() == "draining"


def _get(port: int, path: str, key: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path, headers={"authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode().strip()
    finally:
        connection.close()


def test_health_is_asked_over_http() -> None:
    health = Health()
    with HealthServer(health, "127.0.0.1", 0) as server:
        assert _get(server.port, "/ready") == (503, "starting")
        assert _get(server.port, "/live") == (200, "ok")
        assert _get(server.port, "/../etc/passwd")[0] == 404
        health.observed(None)
        assert _get(server.port, "/ready") == (200, "ok")


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "runtime.pod", *map(str, arguments)]


def test_the_init_step_fails_with_a_reason(tmp_path: Path) -> None:
    arguments = ("--store", tmp_path, "--model", "m", "--platform", "cpu", "--into", tmp_path / "r", "--wait-s", 0)
    done = subprocess.run(_command("fetch", *arguments), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "holds no model yet" in done.stderr.splitlines()[-1]


@dataclass
class Pod:
    """A pod's serving container. `log`: its standard error, which a cluster keeps."""

    process: subprocess.Popen[str]
    ports: Ports
    health: int
    keys: Path
    log: Path

    def give_keys(self, *keys: str) -> None:
        """As a kubelet does: another file in the place of the one before."""
        lines = [f"{place}:{hashlib.sha256(key.encode()).hexdigest()}\n" for place, key in enumerate(keys)]
        fresh = self.keys.with_name("fresh")
        fresh.write_text("".join(lines))
        fresh.replace(self.keys)


@pytest.fixture
def pod(store: Path, tmp_path: Path) -> Iterator[Pod]:
    """The two containers of a pod, one after the other. The store is read-only, as it is mounted."""
    for path in store.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    fetch = ("--store", store, "--model", "tiny", "--platform", "cpu", "--into", tmp_path / "repository", "--wait-s", 5)
    subprocess.run(_command("fetch", *fetch), timeout=60, check=True)
    ports, (health, door, door_grpc) = Ports.free(), free_ports(3, "127.0.0.1")
    serve = [f"--{name}-port={port}" for name, port in vars(ports).items()]
    (tmp_path / "secret").write_text("a-secret-of-the-test\n")
    serve += [
        f"--control-secret-file={tmp_path / 'secret'}",
        f"--health-port={health}",
        f"--gateway-port={door}",
        f"--gateway-grpc-port={door_grpc}",
        f"--api-keys-file={tmp_path / 'keys'}",
        "--exit-timeout-s=5",
        "--withdraw-s=2",
        "--connection-age-s=300",
        "--ready-timeout-s=120",
    ]
    log = tmp_path / "log"
    with log.open("w") as stream:
        command = _command("serve", tmp_path / "repository", *serve)
        found = Pod(subprocess.Popen("false"), ports, health, tmp_path / "keys", log)
        found.give_keys(KEY)
        process = found.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)
    try:
        yield found
    finally:
        process.kill()
        process.wait(10)
        for path in (store, *store.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.triton
def test_a_pod_serves_refuses_and_drains(pod: Pod) -> None:
    process, ports, health = pod.process, pod.ports, pod.health
    assert process.stdout is not None
    assert wait_until(lambda: _ready(health), 120)  # its gateway included
    facts = json.loads(process.stdout.readline())
    _require_the_gateway(pod, facts)
    probe = subprocess.run(_command("probe", "--health-port", health), timeout=30, check=False)
    assert probe.returncode == 0
    with triton_grpc.InferenceServerClient(facts["grpc"]) as client:
        text = triton_grpc.InferInput("text", [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([[b"hello"]], dtype=np.object_))
        assert client.infer("tiny", [text]).as_numpy("embedding").shape == (1, 32)
        refused: list[Any] = [
            lambda: client.load_model("tiny"),
            lambda: client.get_system_shared_memory_status(),
            lambda: client.update_log_settings({"log_verbose_level": 1}),
            lambda: client.update_trace_settings("tiny", {"trace_level": ["TIMESTAMPS"]}),
        ]
        for call in refused:
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
        secret = {"triton-grpc-protocol-trireme-admin": "a-secret-of-the-test"}
        client.load_model("tiny", headers=secret)
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_system_shared_memory_status(headers=secret)  # for nobody
    door = int(facts["gateway"].rpartition(":")[2])
    process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: _get(door, "/readyz")[0] == 503, 10)
    assert _embedded(door, "another") == 200  # nobody sends more, and who has sent is answered
    assert process.wait(60) == 0
    with pytest.raises(ConnectionRefusedError):
        _get(door, "/readyz")
    lines = [json.loads(line) for line in pod.log.read_text().splitlines() if line.startswith("{")]
    assert {("/v1/embeddings", 200), ("/v1/embeddings", 401)} <= {(line["route"], line["status"]) for line in lines}
    assert subprocess.run(_command("probe", "--health-port", health), timeout=30, check=False).returncode == 1
    assert ports.grpc == int(facts["grpc"].rpartition(":")[2])


def _embedded(port: int, key: str) -> int:
    body = json.dumps({"model": "tiny", "input": "hello"})
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", "/v1/embeddings", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def _require_the_gateway(pod: Pod, facts: dict[str, Any]) -> None:
    """What clients of a pod find: both ports ask for keys, keys follow their file, one page has all metrics; Triton is
    on loopback alone."""
    door = int(facts["gateway"].rpartition(":")[2])
    assert wait_until(lambda: _get(door, "/readyz")[0] == 200, 30)
    assert (_embedded(door, KEY), _embedded(door, "another")) == (200, 401)
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{facts['gateway_grpc'].rpartition(':')[2]}") as client:
        assert client.is_model_ready("tiny", headers={"authorization": f"Bearer {KEY}"})
        with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
            client.is_model_ready("tiny")
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            client.load_model("tiny", headers={"triton-grpc-protocol-trireme-admin": "a-secret-of-the-test"})
    page = _get(door, "/metrics", KEY)[1]
    for name in (TRITON_METRICS | OURS) - OF_GPUS - OF_GENERATORS:
        assert f"\n{name}{{" in page, name
    listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    triton = {one.laddr.ip.removeprefix("::ffff:") for one in listening if one.laddr.port in vars(pod.ports).values()}
    assert triton == {"127.0.0.1"}
    pod.give_keys(KEY, "another")
    assert wait_until(lambda: _embedded(door, "another") == 200, 30)


def _ready(port: int) -> bool:
    try:
        return _get(port, "/ready")[0] == 200
    except OSError:
        return False
